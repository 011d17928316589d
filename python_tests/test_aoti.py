"""The ops in a program that AOTInductor compiled, loaded in Python. From C++: examples/cpp."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import srt_ext

GRID, PATCH = (3, 4), (4, 6)


class Fields(torch.nn.Module):
    """Every op, every kind of argument; what lies between them is exact, in any order."""

    def forward(
        self, images: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ops = torch.ops.srt
        views = ops.shift(images * 2, offsets, padding="circular", interpolation="bicubic")
        tokens = views[..., :: PATCH[0], :: PATCH[1]].flatten(3).transpose(2, 3).contiguous()
        where = (tokens, offsets, GRID, PATCH)
        mean = ops.ensemble(*where, weights, border="zeros", stride=[2, 3])
        median = ops.ensemble(*where, reduce="median", upsample="nearest")
        average, variance = ops.ensemble_moments(*where, weights)
        running = torch.zeros_like(average)
        weight = torch.zeros(running.shape[2:], dtype=torch.float64)
        ops.accumulate_mean_(running, weight, *where)
        return mean, median, average, variance, running, weight


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_package_gives_what_eager_gives(tmp_path: Path) -> None:
    def arguments(batch: int) -> tuple[torch.Tensor, ...]:
        images = torch.randn(batch, 5, GRID[0] * PATCH[0], GRID[1] * PATCH[1])
        return images, srt_ext.views.grid(2), torch.rand(25)

    batch = torch.export.Dim("batch", min=1, max=16)
    sizes = {"images": {0: batch}, "offsets": None, "weights": None}
    program = torch.export.export(Fields(), arguments(2), dynamic_shapes=sizes)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "fields.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    given = arguments(3)
    for result, expected in zip(compiled(*given), Fields()(*given), strict=True):
        assert torch.equal(result, expected)
