"""The median: against torch.median, and the views that it ignores."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from backends import Backend, Ops
from process import needs_proc, peak_of
from samples import DTYPES, Ensemble

# The smallest and largest count of each network, and counts beyond the largest network.
COUNTS = (1, 2, 3, 4, 5, 9, 10, 16, 17, 25, 26, 36, 37, 49, 50, 51, 65, 121, 225, 300)


@cache
def values(views: int, dtype: torch.dtype) -> tuple[Ensemble, torch.Tensor, torch.Tensor]:
    """A case, its tokens, and torch.median over the fields of its views (nearest)."""
    generator = torch.Generator().manual_seed(views)
    offsets = torch.randint(-5, 6, (views, 2), generator=generator).tolist()
    border = ("zeros", "clamp")[COUNTS.index(views) % 2]
    case = Ensemble((2, 3), (4, 4), tuple(map(tuple, offsets)), 72, 1)
    case = replace(case, border=border, upsample="nearest")
    tokens = torch.randn(views, 1, 6, 72, generator=generator).to(dtype)
    tokens[..., 8:16] = tokens[..., 8:16].round()  # many ties
    tokens[..., 16:24] *= torch.finfo(dtype).smallest_normal  # and subnormal numbers
    # As in torch.median, infinities are ordinary values and NaN propagates.
    share = torch.rand(tokens.shape, generator=generator)
    for channels, negative, finite in ((24, 0.2, 0.6), (36, 0.0, 0.2), (48, 0.8, 0.2)):
        part, shares = tokens[..., channels:], share[..., channels:]
        part[shares > finite] = float("inf")
        part[shares < negative] = -float("inf")
    tokens[..., 60:][share[..., 60:] > 1 - 1 / views] = float("nan")
    fields = [
        Ops("cpu").ensemble(replace(case, offsets=case.offsets[v : v + 1]), tokens[v : v + 1])
        for v in range(views)
    ]
    return case, tokens, torch.stack(fields).median(0).values


@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("views", COUNTS)
def test_median_equals_torch_median(views: int, accumulator: torch.dtype, backend: Backend) -> None:
    dtype = accumulator
    if accumulator == torch.float32:
        dtype = DTYPES[COUNTS.index(views) % 3]
    case, tokens, expected = values(views, dtype)
    field = backend.ensemble(case, tokens, reduce="median")
    assert torch.equal(field.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(field[kept], expected[kept])


# ---- coverage -----------------------------------------------------------------------------------


def test_views_that_do_not_cover_a_pixel_are_ignored(backend: Backend) -> None:
    """Expected values written out: two of three views cover the left half of 4 pixels."""
    tokens = torch.tensor([1.0, 5.0, 3.0]).reshape(3, 1, 1, 1)
    case = Ensemble((1, 1), (1, 4), ((0.0, 0.0), (0.0, 2.0), (0.0, -2.0)), channels=1, batch=1)
    for border, median in (
        ("coverage", 1.0),  # of (1, 5) and of (1, 3): the lower
        ("zeros", 1.0),  # of (0, 1, 5) and of (0, 1, 3)
        ("clamp", 3.0),
    ):
        field = backend.ensemble(replace(case, border=border), tokens, reduce="median")
        assert field.flatten().tolist() == [median] * 4
    far = replace(case, offsets=((10.0, 10.0),) * 3)
    assert not backend.ensemble(far, tokens, reduce="median").any()


# ---- memory -------------------------------------------------------------------------------------

MEMORY = """
import srt_ext

def field(tokens):
    offsets = srt_ext.views.grid(7).offsets[: len(tokens)]
    modes = dict(reduce="median", upsample="{upsample}")
    return srt_ext.ensemble(tokens, offsets, (14, 14), (16, 16), **modes)

field(torch.ones(2, 1, 196, 8))
tokens = torch.randn({views}, 1, 196, 64)
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("views", [49, 225])
def test_no_stack_of_maps_is_allocated(views: int, upsample: str) -> None:
    """A call allocates its output and cache-sized scratch, not a map per view."""
    setup = MEMORY.format(views=views, upsample=upsample)
    taken, output = peak_of(setup, "field(tokens)", "result.isfinite().all()")
    assert output <= taken < 1.25 * output
