"""The oracle, checked by independent code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import NUMPY_PADDINGS, UPSAMPLES, each_border, each_interpolation, each_padding
from torch.nn import functional

from srt_ext import reference

EPS = torch.finfo(torch.float64).eps


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


each_upsample = pytest.mark.parametrize("upsample", UPSAMPLES)


@each_border
@each_upsample
@pytest.mark.parametrize(
    ("grid", "patch", "offset"),
    [
        *(((3, 5), (4, 6), offset) for offset in [(0, 0), (3, -5), (-11, 29), (12, 1), (0, 31)]),
        ((1, 4), (3, 5), (0, 0)),
        ((2, 1), (1, 2), (0, 0)),
    ],
)
def test_whole_pixels_are_a_slice_of_the_upsampled_map(
    grid: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    upsample: str,
    border: str,
) -> None:
    """The published loop: upsample a view, pad it, move it back; 0 where it is uncovered."""
    tokens = random(1, 2, grid[0] * grid[1], 2)
    modes = {} if upsample == "nearest" else {"align_corners": False}
    token_map = tokens[0].unflatten(1, grid).permute(0, 3, 1, 2)
    if border == "circular":  # the tokens at both ends are neighbours
        token_map = functional.pad(token_map, (1, 1, 1, 1), mode="circular")
    full = functional.interpolate(token_map, scale_factor=patch, mode=upsample, **modes)
    dy, dx = offset
    if border == "circular":
        full = full[..., patch[0] : -patch[0], patch[1] : -patch[1]]
        expected = full.roll((-dy, -dx), (2, 3))
    else:
        height, width = full.shape[2:]
        margins = (abs(dx), abs(dx), abs(dy), abs(dy))
        mode = "replicate" if border == "clamp" else "constant"
        padded = functional.pad(full, margins, mode=mode)
        y, x = dy + abs(dy), dx + abs(dx)
        expected = padded[..., y : y + height, x : x + width]
    modes = {"upsample": upsample, "border": border}
    field = reference.ensemble(tokens, torch.tensor([offset]).float(), grid, patch, **modes)
    rounding = 0 if upsample == "nearest" else 16 * EPS
    torch.testing.assert_close(field, expected, rtol=rounding, atol=rounding)


REAL = torch.tensor([[0.0, 0.0], [1.5, -2.25], [-7.125, 20.0]])


@each_border
@pytest.mark.parametrize("stride", [(2, 3), (4, 2), (12, 30), (6, 1)])
def test_a_stride_is_the_ratio_of_pooled_sums(stride: tuple[int, int], border: str) -> None:
    tokens = random(3, 2, 15, 3)
    sums = "zeros" if border == "coverage" else border

    def pooled(tokens: torch.Tensor) -> torch.Tensor:
        fine = reference.ensemble(tokens, REAL, (3, 5), (4, 6), border=sums)
        return functional.avg_pool2d(fine, stride)

    coarse = reference.ensemble(tokens, REAL, (3, 5), (4, 6), border=border, stride=stride)
    count = pooled(torch.ones_like(tokens)) if border == "coverage" else torch.ones(())
    # Means of up to 360 values of size below 4, of three views.
    torch.testing.assert_close(coarse, pooled(tokens) / count, rtol=0, atol=3 * 4 * 360 * EPS)


@each_border
@each_upsample
@pytest.mark.parametrize("offset", REAL, ids=str)
def test_a_constant_stays_constant_where_it_is_covered(
    offset: torch.Tensor, upsample: str, border: str
) -> None:
    tokens, modes = torch.full((1, 1, 15, 1), -1.7, dtype=torch.float64), {"upsample": upsample}
    field = reference.ensemble(tokens, offset[None], (3, 5), (4, 6), border=border, **modes)
    y, x = (torch.arange(n) + 0.5 + d for n, d in zip((12, 30), offset, strict=True))
    covered = ((y >= 0) & (y < 12))[:, None] & (x >= 0) & (x < 30)
    expected = -1.7 * (covered | (border in ("clamp", "circular"))).double()
    torch.testing.assert_close(field[0, 0], expected, rtol=8 * EPS, atol=0)


def test_border_and_weights_of_two_views() -> None:
    """Two tokens of one pixel; the second view is shifted by one pixel and covers pixel 0."""
    tokens = torch.tensor([[1.0, 2.0], [10.0, 20.0]]).reshape(2, 1, 2, 1)
    offsets = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([1.0, 3.0])
    expected = {
        "coverage": [(1 + 3 * 20) / 4, 2.0],
        "zeros": [(1 + 3 * 20) / 4, 2 / 4],
        "clamp": [(1 + 3 * 20) / 4, (2 + 3 * 20) / 4],
    }
    for border, values in expected.items():
        field = reference.ensemble(tokens, offsets, (1, 2), (1, 1), weights, border=border)
        assert field.flatten().tolist() == values
    pooled = reference.ensemble(tokens, offsets, (1, 2), (1, 1), weights, stride=(1, 2))
    assert pooled.item() == (1 + 3 * 20 + 2) / 5


# ---- shift --------------------------------------------------------------------------------------

HEIGHT, WIDTH = 6, 9
OFFSETS = torch.tensor([[0.0, 0.0], [0.3, -1.7], [-4.2, 2.6], [5.55, -8.1], [2.0, 0.25]]).double()


def sampled(image: torch.Tensor, offset: torch.Tensor, interpolation: str) -> torch.Tensor:
    """The view by grid_sample, which also puts pixel centres at integer + 0.5."""
    y, x = (
        (2 * (torch.arange(n).double() - d) + 1) / n - 1
        for n, d in zip(image.shape[2:], offset, strict=True)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(image), -1, -1, -1)
    return functional.grid_sample(image, grid, interpolation, align_corners=False)


@each_interpolation
@each_padding
def test_shift_is_grid_sample_of_a_padded_image(padding: str, interpolation: str) -> None:
    image = random(2, 3, HEIGHT, WIDTH)
    margin = 11
    padded = np.pad(image.numpy(), [(0, 0)] * 2 + [(margin, margin)] * 2, NUMPY_PADDINGS[padding])  # type: ignore[call-overload]
    # grid_sample rounds coordinates of size up to 32 several times; an interpolated image
    # changes by at most 6 times its range per pixel of coordinate.
    bound = 8 * 32 * EPS * 6 * image.abs().max().item()
    views = reference.shift(image, OFFSETS, padding=padding, interpolation=interpolation)
    for view, offset in zip(views, OFFSETS, strict=True):
        expected = sampled(torch.from_numpy(padded), offset, interpolation)
        expected = expected[..., margin : margin + HEIGHT, margin : margin + WIDTH]
        torch.testing.assert_close(view, expected, rtol=0, atol=bound)


def test_nearest_takes_the_floor_at_a_tie() -> None:
    image = torch.arange(4.0).reshape(1, 1, 1, 4)
    offsets = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    views = reference.shift(image, offsets, padding="border", interpolation="nearest")
    assert views[0].flatten().tolist() == [0, 1, 2, 3]
    assert views[1].flatten().tolist() == [1, 2, 3, 3]


def test_results_have_the_requested_precision() -> None:
    tokens = random(3, 1, 4, 2)
    for dtype in (torch.float32, torch.float64):
        field = reference.ensemble(tokens, torch.zeros(3, 2), (2, 2), (2, 2), dtype=dtype)
        assert field.dtype == dtype
        views = reference.shift(random(1, 1, 2, 2), torch.zeros(3, 2), dtype=dtype)
        assert views.dtype == dtype


@pytest.mark.parametrize(
    "modes", [{"reduce": "moments"}, {"upsample": "cubic"}, {"border": "wrap"}]
)
def test_an_unknown_mode_raises(modes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(modes))} must be one of .*; got"):
        reference.ensemble(random(1, 1, 1, 1), torch.zeros(1, 2), (1, 1), (1, 1), **modes)  # type: ignore[arg-type]
