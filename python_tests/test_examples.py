"""The examples in the docstrings."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["numpy", "ops", "streaming", "views", "wrapper"])
def test_docstrings(module: str) -> None:
    if module == "numpy":
        pytest.importorskip("srt_ext.numpy", exc_type=ImportError)
    results = doctest.testmod(importlib.import_module(f"srt_ext.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
