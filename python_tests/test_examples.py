"""The examples in the docstrings."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["ops", "streaming", "views", "wrapper"])
def test_docstrings(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"srt_ext.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
