"""Helpers to run ``srt-ext`` in this process: the command, a small model, and images."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")  # skips the tests that import this module
pytest.importorskip("typer")

import timm
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

from srt_ext.cli import app

SMALL = "test_vit"  # 6 blocks of 64 channels, patches of 16 pixels
_FOLDER = tempfile.TemporaryDirectory()


def run(*arguments: object, code: int = 0) -> str:
    """Runs the command, asserts its exit status ``code`` and returns its output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@functools.cache
def small_weights(seed: int = 0) -> Path:
    """The path of a file with random weights of the small model."""
    path = Path(_FOLDER.name, f"{seed}.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(timm.create_model(SMALL).state_dict(), path)
    return path


@functools.cache
def _photo() -> np.ndarray:
    return data.chelsea()


def crops(count: int, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Different parts of a photograph."""
    photo = _photo()
    return [photo[40 * i : 40 * i + size[0], 60 * i : 60 * i + size[1]] for i in range(count)]
