"""``srt-ext`` in this process, and a model that is small enough to be run often."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from srt_ext.cli import app

SMALL = "test_vit"  # 6 blocks of 64 channels, patches of 16 pixels


def run(*arguments: object) -> tuple[int, str]:
    """Exit status, and what was printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def small_weights(path: Path, seed: int = 0) -> Path:
    """Random ones of the small model, in a file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(timm.create_model(SMALL).state_dict(), path)
    return path
