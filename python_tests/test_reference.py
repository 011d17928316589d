"""The oracle, checked by code that it shares nothing with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import UPSAMPLES, each_border, each_interpolation
from torch.nn import functional

from srt_ext import reference

EPS = torch.finfo(torch.float64).eps


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def as_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[B, N, C] -> [B, C, h, w]."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


each_upsample = pytest.mark.parametrize("upsample", UPSAMPLES)
ZERO = torch.zeros(1, 2)


@each_border
@pytest.mark.parametrize(("grid", "patch"), [((3, 5), (4, 6)), ((1, 4), (3, 5)), ((2, 1), (1, 2))])
def test_an_unmoved_view_is_interpolated(
    grid: tuple[int, int], patch: tuple[int, int], border: str
) -> None:
    tokens = random(1, 2, grid[0] * grid[1], 3)
    token_map = as_map(tokens[0], grid)
    bilinear = functional.interpolate(
        token_map, scale_factor=patch, mode="bilinear", align_corners=False
    )
    field = reference.ensemble(tokens, ZERO, grid, patch, border=border)
    torch.testing.assert_close(field, bilinear, rtol=8 * EPS, atol=8 * EPS)
    nearest = token_map.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    field = reference.ensemble(tokens, ZERO, grid, patch, border=border, upsample="nearest")
    assert torch.equal(field, nearest)


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
    expected = -1.7 * (covered | (border == "clamp")).double()
    torch.testing.assert_close(field[0, 0], expected, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("border", ["coverage", "zeros"])
@each_upsample
@pytest.mark.parametrize("offset", [(0, 0), (3, -5), (-11, 29), (12, 1), (0, 31)])
def test_whole_pixels_are_a_slice_of_the_upsampled_map(
    offset: tuple[int, int], upsample: str, border: str
) -> None:
    """The published loop: upsample a view, move it back, count where it is."""
    tokens = random(1, 1, 15, 2)
    modes = {} if upsample == "nearest" else {"align_corners": False}
    full = functional.interpolate(
        as_map(tokens[0], (3, 5)), scale_factor=(4, 6), mode=upsample, **modes
    )
    height, width = 12, 30
    dy, dx = offset
    expected = torch.zeros_like(full)
    y0, y1 = max(0, -dy), min(height, height - dy)
    x0, x1 = max(0, -dx), min(width, width - dx)
    if y0 < y1 and x0 < x1:
        expected[..., y0:y1, x0:x1] = full[..., y0 + dy : y1 + dy, x0 + dx : x1 + dx]
    field = reference.ensemble(
        tokens, torch.tensor([offset]).float(), (3, 5), (4, 6), upsample=upsample, border=border
    )
    torch.testing.assert_close(field, expected, rtol=8 * EPS, atol=8 * EPS)


def test_clamp_reads_the_edge_tokens() -> None:
    tokens = random(1, 1, 15, 2)
    field = reference.ensemble(
        tokens, torch.tensor([[100.0, -100.0]]), (3, 5), (4, 6), border="clamp"
    )
    assert torch.equal(field[0, :, 0, 0], tokens[0, 0, 10])  # bottom left
    assert (field == field[..., :1, :1]).all()


def test_border_and_weights_of_two_views() -> None:
    """By hand: two tokens of one pixel; the second view moved by one and covers pixel 0 only."""
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


def sampled(
    image: torch.Tensor, offset: torch.Tensor, interpolation: str, padding: str
) -> torch.Tensor:
    """The view by grid_sample, which also puts pixel centres at integer + 0.5."""
    y, x = (
        (2 * (torch.arange(n).double() - d) + 1) / n - 1
        for n, d in zip(image.shape[2:], offset, strict=True)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(image), -1, -1, -1)
    return functional.grid_sample(image, grid, interpolation, padding, align_corners=False)


def assert_sampled(view: torch.Tensor, expected: torch.Tensor, image: torch.Tensor) -> None:
    # grid_sample rounds coordinates of size up to 32 several times; an interpolated picture moves
    # by at most 6 times its range for each pixel of coordinate.
    bound = 8 * 32 * EPS * 6 * image.abs().max().item()
    torch.testing.assert_close(view, expected, rtol=0, atol=bound)


@each_interpolation
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_shift_is_grid_sample(padding: str, interpolation: str) -> None:
    image = random(2, 3, HEIGHT, WIDTH)
    views = reference.shift(image, OFFSETS, padding=padding, interpolation=interpolation)
    for view, offset in zip(views, OFFSETS, strict=True):
        assert_sampled(view, sampled(image, offset, interpolation, padding), image)


@each_interpolation
@pytest.mark.parametrize(("padding", "mode"), [("circular", "wrap"), ("reflect", "reflect")])
def test_shift_is_grid_sample_of_a_padded_image(
    padding: str, mode: str, interpolation: str
) -> None:
    image = random(1, 2, HEIGHT, WIDTH)
    margin = 11
    padded = torch.from_numpy(np.pad(image.numpy(), [(0, 0)] * 2 + [(margin, margin)] * 2, mode))  # type: ignore[call-overload]
    views = reference.shift(image, OFFSETS, padding=padding, interpolation=interpolation)
    for view, offset in zip(views, OFFSETS, strict=True):
        expected = sampled(padded, offset, interpolation, "zeros")
        expected = expected[..., margin : margin + HEIGHT, margin : margin + WIDTH]
        assert_sampled(view, expected, image)


def test_nearest_takes_the_floor_at_a_tie() -> None:
    image = torch.arange(4.0).reshape(1, 1, 1, 4)
    offsets = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    views = reference.shift(image, offsets, padding="border", interpolation="nearest")
    assert views[0].flatten().tolist() == [0, 1, 2, 3]
    assert views[1].flatten().tolist() == [1, 2, 3, 3]


def test_both_precisions_are_what_they_say() -> None:
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
        reference.ensemble(random(1, 1, 1, 1), ZERO, (1, 1), (1, 1), **modes)  # type: ignore[arg-type]
