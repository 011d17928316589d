"""``pytest benchmarks``: the time of small calls, whose overhead dominates.

pytest-benchmark measures them; with ``--benchmark-disable``, as in CI, each call runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import srt_ext

PLACE: dict[str, Any] = {"grid": (14, 14), "patch": (16, 16), "stride": (16, 16)}
Benchmark = Callable[..., Any]


def tokens(views: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(views, 1, 196, 384).to(dtype)


@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
@pytest.mark.parametrize("views", ["best:4", "grid:1", "best:16", "grid:3"])
class TestTokenScale:
    def test_op(self, benchmark: Benchmark, views: str, upsample: str) -> None:
        offsets = srt_ext.views.parse(views).offsets
        field = benchmark(
            torch.ops.srt.ensemble, tokens(len(offsets)), offsets, **PLACE, upsample=upsample
        )
        assert field.shape == (1, 384, 14, 14)

    def test_function(self, benchmark: Benchmark, views: str, upsample: str) -> None:
        offsets = srt_ext.views.parse(views).offsets
        field = benchmark(
            srt_ext.ensemble, tokens(len(offsets)), offsets, **PLACE, upsample=upsample
        )
        assert field.shape == (1, 384, 14, 14)


@pytest.mark.parametrize("views", [4, 9, 16, 49])
def test_limit_reading_the_tokens(benchmark: Benchmark, views: int) -> None:
    benchmark(tokens(views).sum)


def test_median_of_nine(benchmark: Benchmark) -> None:
    offsets = srt_ext.views.grid(1).offsets
    benchmark(srt_ext.ensemble, tokens(9), offsets, **PLACE, reduce="median")


@pytest.mark.parametrize("kind", ["RunningMean", "RunningMoments", "RunningMedian"])
def test_update(benchmark: Benchmark, kind: str) -> None:
    running = getattr(srt_ext, kind)(**PLACE)
    benchmark(running.update, tokens(8), srt_ext.views.grid(1).offsets[:8])


@pytest.mark.parametrize("views", ["grid:1", "best:16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_shift(benchmark: Benchmark, dtype: torch.dtype, views: str) -> None:
    image = (255 * torch.rand(1, 3, 32, 32)).to(dtype)
    offsets = srt_ext.views.parse(views).offsets
    pictures = benchmark(torch.ops.srt.shift, image, offsets)
    assert pictures.shape == (len(offsets), 1, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_windows(benchmark: Benchmark, dtype: torch.dtype) -> None:
    image, centers = (255 * torch.rand(1, 3, 32, 32)).to(dtype), 32 * torch.rand(1, 4, 2)
    windows = benchmark(torch.ops.srt.windows, image, centers, (8, 8))
    assert windows.shape == (1, 4, 3, 8, 8)


def test_sample(benchmark: Benchmark) -> None:
    field = torch.randn(1, 384, 14, 14).contiguous(memory_format=torch.channels_last)
    tokens = benchmark(srt_ext.sample, field, 224 * torch.rand(1, 16, 2), 16)
    assert tokens.shape == (1, 16, 384)
