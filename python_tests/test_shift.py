"""shift: against the oracle and NumPy's padding."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import Backend, each_device, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from oracle import check_containment, check_sample, dtypes_of
from oracle import shift as oracle
from samples import DTYPES, FAR, NUMPY_PADDINGS, Shift, each_interpolation, each_padding, shifts

import srt_ext

ALL_DTYPES = (*DTYPES, torch.uint8)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
each_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


@each_kernel("shift", "shift_backward")
@each_padding
@each_interpolation
def test_accuracy_and_containment_in_every_mode(
    kernel: str, interpolation: str, padding: str, backend: Backend
) -> None:
    offsets = ((0.3, -0.6), (9.0, 2.0), (-31.4, 50.2), (FAR, 1.5), (0.0, -FAR), (-1.0, 36.0))
    sizes = ((7, 37), (7, 48), (1, 40), (40, 1), (2, 3), (1, 1))
    for size, dtype in zip(sizes, itertools.cycle(dtypes_of(kernel)), strict=False):
        case = Shift(size, offsets, padding=padding, interpolation=interpolation)
        case = replace(case, batch=max(2, 128 // (case.channels * size[0] * size[1])))
        check_sample(kernel, backend, case, dtype)
    # Also whole on one axis only: that axis reads one line of pixels.
    offsets = ((0.5, -1.25), (2.0, 0.75), (-0.3, -3.0), (-20.5, 60.1), (0.0, 1e-9), (-1e-17, 0.0))
    for width, dtype in itertools.product((32, 37), DTYPES):
        case = Shift((7, width), offsets, padding=padding, interpolation=interpolation)
        check_containment(kernel, backend, case, dtype)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_uint8_rounds_half_to_even_and_saturates(width: int, backend: Backend) -> None:
    pairs = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1, 1)
    image = torch.cat([pairs, pairs.flip(1) // 3], 2).expand(-1, -1, -1, width)
    case = Shift((2, width), ((-0.5, 0.0),), 256, 1, padding="border")
    views = backend.shift(case, image)[0, :, :, 0]
    exact = image.double().mean(2)
    assert (exact % 1 == 0.5).any()
    assert torch.equal(views, exact.round().to(torch.uint8))

    # Cubic convolution overshoots on both sides of an edge.
    edge = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).reshape(1, 1, 4, 1)
    edge = edge.expand(-1, -1, -1, width)
    case = Shift((4, width), ((0.25, 0.0),), 1, 1, interpolation="bicubic")
    exact = oracle(case, edge)
    assert exact.min() < 0
    assert exact.max() > 255
    views = backend.shift(case, edge)
    assert torch.equal(views, exact.round().clamp(0, 255).to(torch.uint8))


# ---- whole pixels -------------------------------------------------------------------------------


def padded_slice(image: torch.Tensor, dy: int, dx: int, padding: str) -> torch.Tensor:
    """The view by numpy.pad, as the bits of ``image`` [B, C, H, W]; one axis at a time."""
    view = bits(image).numpy()
    for axis, d in ((2, dy), (3, dx)):
        margins = [(0, 0)] * 4
        margins[axis] = (abs(d), abs(d))
        first, length = abs(d) - d, view.shape[axis]
        padded = np.pad(view, margins, mode=NUMPY_PADDINGS[padding])  # type: ignore[call-overload]
        view = padded.take(range(first, first + length), axis)
    return torch.from_numpy(view)


def special_image(size: tuple[int, int], dtype: torch.dtype, channels: int = 2) -> torch.Tensor:
    """Half of the values are NaN (with payloads), Inf, -0.0 and subnormal numbers."""
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
    interpolation: str, padding: str, dtype: torch.dtype, backend: Backend
) -> None:
    offsets = ((0, 0), (1, -2), (-2, 1), (2, 0), (0, 36), (-7, -40), (300, -1000), (0, -1))
    for size in ((3, 37), (9, 64), (1, 1), (1, 6), (5, 1)):
        image = special_image(size, dtype)
        case = Shift(size, offsets, padding=padding, interpolation=interpolation)
        for place in backend.places:
            views = backend.shift(case, image, place=place)
            for view, (dy, dx) in zip(views, offsets, strict=True):
                expected = padded_slice(image, dy, dx, padding)
                assert torch.equal(bits(view), expected), (size, dy, dx)


@each_padding
def test_whole_pixels_up_to_the_largest_offset(padding: str, backend: Backend) -> None:
    image = special_image((2, 3), torch.float32)
    offsets = ((2**20, -(2**20)), (-(2**20) + 1, 2**20 - 1))
    case = Shift((2, 3), offsets, padding=padding, value_dtype=torch.float64)
    for view, offset in zip(backend.shift(case, image), offsets, strict=True):
        # 12 pixels are whole periods of both axes; far outside the image the padding is constant.
        periodic = padding in ("reflect", "circular")
        dy, dx = (d % 12 if periodic else max(-6, min(d, 6)) for d in offset)
        assert torch.equal(bits(view), padded_slice(image, dy, dx, padding))


@given(shifts(interpolation="nearest"), st.sampled_from(ALL_DTYPES))
def test_nearest_copies_bit_for_bit(backend: Backend, case: Shift, dtype: torch.dtype) -> None:
    """Reads pixel floor(y + 0.5 - dy), computed with exact integers."""
    image = special_image(case.size, dtype, case.channels)
    views = backend.shift(case, image)
    offsets = torch.tensor(case.offsets, dtype=case.value_dtype).double()
    for view, (dy, dx) in zip(views, torch.floor(0.5 - offsets).int().tolist(), strict=True):
        if max(abs(dy), abs(dx)) < 1000:
            assert torch.equal(bits(view), padded_slice(image, -dy, -dx, case.padding))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("hair", [1e-50, -1e-23, 2.0**-41, -(2.0**-41)])
def test_offsets_very_close_to_whole_pixels_are_whole_pixels(
    hair: float, interpolation: str, backend: Backend
) -> None:
    """Other taps would have weights that vanish in float32, and multiply Inf by 0."""
    image = torch.tensor([0.0, 1.0, 2.0, float("inf"), 4.0, -0.0, 6.0]).expand(1, 1, 1, 7)
    offsets = ((0.0, 1.0), (0.0, 1.0 + hair), (hair, 1.0))
    case = Shift((1, 7), offsets, 1, 1, interpolation=interpolation, value_dtype=torch.float64)
    whole, *views = backend.shift(case, image)
    assert all(torch.equal(bits(view), bits(whole)) for view in views)


# ---- containment --------------------------------------------------------------------------------


@each_interpolation
def test_containment_near_whole_pixels(interpolation: str, backend: Backend) -> None:
    """Weights that vanish, in float64 or after rounding to float32, are not taps."""
    tiny = (5e-324, 1e-300, 1e-45, 1e-42, 1e-30, 2.0**-70, 2.0**-59, 1e-17, 2.0**-52, 1e-9)
    steps = tuple(whole + sign * d for whole in (0.0, 3.0) for sign in (1, -1) for d in tiny)
    offsets = tuple((0.0, d) for d in steps) + tuple((d, -2.0) for d in steps)
    case = Shift((6, 11), offsets, interpolation=interpolation, value_dtype=torch.float64)
    for seed, dtype in enumerate(DTYPES):
        check_containment("shift", backend, case, dtype, seed)


# ---- layouts ------------------------------------------------------------------------------------


@given(shifts(), st.sampled_from(ALL_DTYPES), st.integers(1, 3))
def test_strides_of_the_image(
    backend: Backend, case: Shift, dtype: torch.dtype, begin: int
) -> None:
    image = case.image(dtype)
    expected = backend.shift(case, image.contiguous())
    assert torch.equal(backend.shift(case, image), expected)
    flipped = image.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(backend.shift(case, flipped), expected)
    one = image[:1].expand(3, -1, -1, -1)
    assert torch.equal(backend.shift(case, one)[:, 2], expected[:, 0])
    # An image that is misaligned to 16 bytes.
    wide = torch.cat([torch.zeros(begin, dtype=dtype), image.flatten()])
    assert torch.equal(backend.shift(case, wide[begin:].view(image.shape)), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@each_padding
@each_device
def test_no_pixels(device: str, padding: str, shape: tuple[int, ...]) -> None:
    for on in {"cpu", device}:
        offsets = torch.tensor([[0.5, 1.0]] * 6, device=on)
        views = srt_ext.shift(torch.empty(shape, device=device), offsets, padding=padding)
        assert tuple(views.shape) == (6, *shape)
        assert views.stride() == torch.empty(6, *shape).stride()
