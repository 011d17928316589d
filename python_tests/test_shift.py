"""shift on the CPU: against the oracle, NumPy's padding and torch's interpolation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from bounds import ShiftBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, INTERPOLATIONS, PADDINGS, Shift, sample_shifts, shifts
from torch.nn import functional

import srt_ext
from srt_ext import reference

SAMPLES = sample_shifts()
ALL_DTYPES = (*DTYPES, torch.uint8)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
each_sample = pytest.mark.parametrize("case", SAMPLES.values(), ids=SAMPLES.keys())
each_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
each_padding = pytest.mark.parametrize("padding", PADDINGS)
each_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)


def run(case: Shift, image: torch.Tensor) -> torch.Tensor:
    args, modes = case.call(image)
    return srt_ext.shift(*args, **modes)


def oracle(case: Shift, image: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    args, modes = case.call(image)
    return reference.shift(*args, **modes, dtype=dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def check_rounding(case: Shift, image: torch.Tensor, views: torch.Tensor) -> None:
    assert views.dtype == image.dtype
    assert views.is_contiguous()
    bound = ShiftBounds(case, image.dtype).views(image)
    assert_within_rounding(views, oracle(case, image), bound)


def check_budget(case: Shift, image: torch.Tensor, views: torch.Tensor) -> None:
    """Of a fixed sample."""
    check_rounding(case, image, views)
    if image.is_floating_point() and image.dtype != torch.float64:
        same = oracle(case, image, torch.float32).to(image.dtype)
        assert_within_budget(views, oracle(case, image), same)


@each_dtype
@each_sample
def test_error_budget(case: Shift, dtype: torch.dtype, cpu_kernels: str) -> None:
    image = case.image(dtype)
    check_budget(case, image, run(case, image))


@each_padding
@each_interpolation
def test_error_budget_of_every_mode(interpolation: str, padding: str, cpu_kernels: str) -> None:
    case = Shift(size=(7, 37), padding=padding, interpolation=interpolation)
    for dtype in ALL_DTYPES:
        image = case.image(dtype)
        check_budget(case, image, run(case, image))


@given(shifts(), st.sampled_from(ALL_DTYPES))
def test_rounding_of_any_call(cpu_kernels: str, case: Shift, dtype: torch.dtype) -> None:
    image = case.image(dtype)
    check_rounding(case, image, run(case, image))


@pytest.mark.parametrize("width", [1, 5, 64])
def test_uint8_rounds_half_to_even_and_saturates(width: int, cpu_kernels: str) -> None:
    pairs = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1, 1)
    image = torch.cat([pairs, pairs.flip(1) // 3], 2).expand(-1, -1, -1, width)
    half = torch.tensor([[-0.5, 0.0]])
    views = srt_ext.shift(image, half, padding="border")[0, :, :, 0]
    exact = image.double().mean(2)
    assert (exact % 1 == 0.5).any()
    assert torch.equal(views, exact.round().to(torch.uint8))

    # Cubic convolution overshoots beside an edge, on both sides.
    edge = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).reshape(1, 1, 4, 1)
    edge = edge.expand(-1, -1, -1, width)
    quarter = torch.tensor([[0.25, 0.0]])
    exact = reference.shift(edge, quarter, interpolation="bicubic")
    assert exact.min() < 0
    assert exact.max() > 255
    views = srt_ext.shift(edge, quarter, interpolation="bicubic")
    assert torch.equal(views, exact.round().clamp(0, 255).to(torch.uint8))


# ---- whole pixels -------------------------------------------------------------------------------

NUMPY_MODES = {"zeros": "constant", "border": "edge", "reflect": "reflect", "circular": "wrap"}


def padded_slice(image: torch.Tensor, dy: int, dx: int, padding: str) -> torch.Tensor:
    """The view by numpy.pad, of the bits of ``image`` [B, C, H, W]."""
    height, width = image.shape[2:]
    margins = ((0, 0), (0, 0), (abs(dy),) * 2, (abs(dx),) * 2)
    padded = np.pad(bits(image).numpy(), margins, mode=NUMPY_MODES[padding])  # type: ignore[call-overload]
    top, left = abs(dy) - dy, abs(dx) - dx
    return torch.from_numpy(padded[:, :, top : top + height, left : left + width])


def special_image(size: tuple[int, int], dtype: torch.dtype, channels: int = 2) -> torch.Tensor:
    """Half of it NaN (with payloads), Inf, -0.0 and subnormals."""
    image = Shift(size=size, channels=channels).image(dtype)
    if dtype == torch.uint8:
        return image
    info = torch.finfo(dtype)
    values = [float("nan"), float("inf"), float("-inf"), -0.0, info.tiny / 4, info.max]
    pattern = bits(torch.tensor(values, dtype=dtype))
    pattern = torch.cat([pattern, pattern[:1] ^ 5, pattern[:1] ^ torch.iinfo(pattern.dtype).min])
    special = pattern.repeat(image.numel())[: image.numel()].reshape(image.shape)
    keep = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(keep, bits(image), special).view(dtype)


@each_dtype
@each_padding
@each_interpolation
def test_whole_pixels_copy_bit_for_bit(
    interpolation: str, padding: str, dtype: torch.dtype, cpu_kernels: str
) -> None:
    offsets = [(0, 0), (1, -2), (-2, 1), (2, 0), (0, 36), (-7, -40), (300, -1000), (0, -1)]
    for size in ((3, 37), (1, 1), (1, 6), (5, 1)):
        image = special_image(size, dtype)
        views = srt_ext.shift(
            image, torch.tensor(offsets).float(), padding=padding, interpolation=interpolation
        )
        for view, (dy, dx) in zip(views, offsets, strict=True):
            assert torch.equal(bits(view), padded_slice(image, dy, dx, padding)), (size, dy, dx)


@each_padding
def test_whole_pixels_up_to_the_largest_offset(padding: str) -> None:
    image = special_image((2, 3), torch.float32)
    offsets = [(2**20, -(2**20)), (-(2**20) + 1, 2**20 - 1)]
    views = srt_ext.shift(image, torch.tensor(offsets).double(), padding=padding)
    # One axis at a time, or numpy.pad would make terabytes; turning the other axis is exact.
    for view, (dy, dx) in zip(views, offsets, strict=True):
        moved = padded_slice(image, dy, 0, padding).view(torch.float32)
        assert torch.equal(bits(view), padded_slice(moved, 0, dx, padding))


@pytest.mark.parametrize(
    ("padding", "mode"),
    [
        ("zeros", "constant"),
        ("border", "replicate"),
        ("reflect", "reflect"),
        ("circular", "circular"),
    ],
)
def test_padding_is_that_of_torch(padding: str, mode: str) -> None:
    image = special_image((6, 8), torch.float32)
    padded = functional.pad(image, (5, 5, 5, 5), mode=mode)
    offsets = [(y, x) for y in (-5, -1, 0, 4, 5) for x in (-5, -2, 0, 3, 5)]
    views = srt_ext.shift(image, torch.tensor(offsets).float(), padding=padding)
    for view, (dy, dx) in zip(views, offsets, strict=True):
        assert torch.equal(bits(view), bits(padded[..., 5 - dy : 11 - dy, 5 - dx : 13 - dx]))


@given(shifts(interpolation="nearest"), st.sampled_from(ALL_DTYPES))
def test_nearest_copies_bit_for_bit(cpu_kernels: str, case: Shift, dtype: torch.dtype) -> None:
    """The pixel that floor(y + 0.5 - dy) names, in exact integers."""
    image = special_image(case.size, dtype, case.channels)
    views = run(case, image)
    offsets = torch.tensor(case.offsets, dtype=case.value_dtype).double()
    for view, (dy, dx) in zip(views, torch.floor(0.5 - offsets).int().tolist(), strict=True):
        if max(abs(dy), abs(dx)) < 1000:
            assert torch.equal(bits(view), padded_slice(image, -dy, -dx, case.padding))


# ---- containment --------------------------------------------------------------------------------


def check_containment(case: Shift, image: torch.Tensor, seed: int) -> None:
    image = image.clone()
    generator = torch.Generator().manual_seed(seed)
    for value in (float("nan"), float("inf"), float("-inf")):
        image[tuple(int(torch.randint(s, (), generator=generator)) for s in image.shape)] = value
    assert torch.equal(run(case, image).isfinite(), oracle(case, image).isfinite())


@each_padding
@each_interpolation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_containment(
    interpolation: str, padding: str, dtype: torch.dtype, cpu_kernels: str
) -> None:
    # Whole on one axis only, too: that axis reads one line of pixels.
    offsets = ((0.5, -1.25), (2.0, 0.75), (-0.3, -3.0), (-20.5, 60.1))
    case = Shift((7, 37), offsets, padding=padding, interpolation=interpolation)
    check_containment(case, case.image(dtype), 1)


@given(shifts(), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_containment_of_any_call(
    cpu_kernels: str, case: Shift, dtype: torch.dtype, seed: int
) -> None:
    check_containment(case, case.image(dtype), seed)


@each_interpolation
def test_containment_beside_whole_pixels(interpolation: str, cpu_kernels: str) -> None:
    """Weights that vanish, in double or once they are rounded to float, are no taps."""
    tiny = (5e-324, 1e-300, 1e-45, 1e-42, 1e-30, 2.0**-70, 2.0**-59, 1e-17, 2.0**-52, 1e-9)
    steps = tuple(whole + sign * d for whole in (0.0, 3.0) for sign in (1, -1) for d in tiny)
    offsets = tuple((0.0, d) for d in steps) + tuple((d, -2.0) for d in steps)
    case = Shift((6, 11), offsets, interpolation=interpolation, value_dtype=torch.float64)
    for dtype in DTYPES:
        for seed in range(3):
            check_containment(case, case.image(dtype), seed)


# ---- threads and layouts ------------------------------------------------------------------------


@each_dtype
@each_interpolation
def test_same_bits_over_threads(
    interpolation: str, dtype: torch.dtype, threads: Callable[[int], None], cpu_kernels: str
) -> None:
    # Large enough to be split over threads.
    case = Shift((67, 131), interpolation=interpolation)
    image = case.image(dtype)
    views = []
    for count in (1, 2, 3, 7):
        threads(count)
        views.append(run(case, image))
    assert all(torch.equal(views[0], other) for other in views[1:])


@given(shifts(), st.sampled_from(ALL_DTYPES))
def test_strides_of_the_image(case: Shift, dtype: torch.dtype) -> None:
    image = case.image(dtype)
    expected = run(case, image.contiguous())
    assert torch.equal(run(case, image), expected)
    flipped = image.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(run(case, flipped), expected)


def test_expanded_image() -> None:
    case = replace(SAMPLES["real"], batch=1)
    image = case.image().expand(4, -1, -1, -1)
    assert torch.equal(run(case, image), run(case, image.contiguous()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@each_padding
def test_no_pixels(shape: tuple[int, ...], padding: str) -> None:
    views = srt_ext.shift(torch.empty(shape), torch.tensor([[0.5, 1.0]] * 6), padding=padding)
    assert tuple(views.shape) == (6, *shape)


@given(shifts())
def test_offsets_of_any_dtype_and_stride(case: Shift) -> None:
    case = replace(case, value_dtype=torch.float32)
    (image, offsets), modes = case.call(case.image())
    expected = srt_ext.shift(image, offsets, **modes)
    transposed = offsets.double().t().contiguous().t()
    wide = torch.full((len(offsets), 5), float("nan"))
    wide[:, 1::2] = offsets
    for strided in (transposed, wide[:, 1::2]):
        assert torch.equal(srt_ext.shift(image, strided, **modes), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("hair", [1e-50, -1e-23, 2.0**-41, -(2.0**-41)])
def test_a_hair_off_a_whole_pixel_is_the_whole_pixel(
    hair: float, interpolation: str, cpu_kernels: str
) -> None:
    """Its other taps would vanish in float32 and multiply Inf by 0."""
    image = torch.tensor([0.0, 1.0, 2.0, float("inf"), 4.0, -0.0, 6.0]).expand(1, 1, 1, 7)
    offsets = torch.tensor([[0.0, 1.0], [0.0, 1.0 + hair], [hair, 1.0]], dtype=torch.float64)
    views = srt_ext.shift(image, offsets, interpolation=interpolation)
    assert torch.equal(
        views[1:].view(torch.int32), views[:1].expand_as(views[1:]).view(torch.int32)
    )
