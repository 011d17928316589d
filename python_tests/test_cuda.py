"""The CUDA kernels on a GPU: against the oracle and the CPU kernels, and as torch calls them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from bounds import EnsembleBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    BORDERS,
    DTYPES,
    FAR,
    INTERPOLATIONS,
    PADDINGS,
    UPSAMPLES,
    Call,
    Ensemble,
    Pairs,
    Shift,
    ensembles,
    sample_ensembles,
    sample_shifts,
    shifts,
)
from test_ensemble import buffer, check_budget, check_rounding, poison
from test_median import median_oracle
from test_shift import bits, padded_slice, special_image
from test_shift import check_budget as check_shift_budget
from test_shift import check_rounding as check_shift_rounding

import srt_ext
from srt_ext import reference

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NAN, INF = float("nan"), float("inf")
ALL_DTYPES = (*DTYPES, torch.uint8)
VALUES = ("host", "device")  # where offsets and weights are
SLEEP = 400_000_000  # clock cycles: some tenths of a second
REAL: Pairs = ((0.0, 0.0), (0.25, -0.625), (-3.3, 7.1), (2.5, 2.5), (-0.7, -5.9))

ENSEMBLES = sample_ensembles()
SHIFTS = sample_shifts()
each_ensemble = pytest.mark.parametrize("case", ENSEMBLES.values(), ids=ENSEMBLES.keys())
each_shift = pytest.mark.parametrize("case", SHIFTS.values(), ids=SHIFTS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_values = pytest.mark.parametrize("values", VALUES)


def place(tensor: torch.Tensor) -> torch.Tensor:
    """On the device, with the strides and the place in its storage that it has on the host."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def placed(call: Call, values: str) -> Call:
    (data, *rest), modes = call
    if values == "device":
        rest = [place(a) if isinstance(a, torch.Tensor) else a for a in rest]
    return (place(data), *rest), modes


def run(case: Ensemble | Shift, data: torch.Tensor, values: str = "host") -> torch.Tensor:
    """The op on the device; ``data`` and the result are on the host."""
    args, modes = placed(case.call(data), values)
    op = srt_ext.ensemble if isinstance(case, Ensemble) else srt_ext.shift
    return op(*args, **modes).cpu()


def oracle(
    case: Ensemble | Shift, data: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    args, modes = case.call(data)
    op = reference.ensemble if isinstance(case, Ensemble) else reference.shift
    return op(*args, **modes, dtype=dtype)


def many(views: int, seed: int = 0) -> Pairs:
    """Eighths of a pixel, so that some views share dy or dx."""
    generator = torch.Generator().manual_seed(seed)
    eighths = torch.randint(-80, 81, (views, 2), generator=generator)
    return tuple((y / 8, x / 8) for y, x in eighths.tolist())


def check_ensemble(case: Ensemble, dtype: torch.dtype, values: str = "host") -> None:
    """Of a fixed sample, with enough values that the oracle's largest error is not one of a few."""
    case = replace(case, batch=max(case.batch, 128 // case.channels))
    tokens = case.tokens(dtype)
    check_budget(case, tokens, run(case, tokens, values))


def check_shift(case: Shift, dtype: torch.dtype, values: str = "host") -> None:
    """As check_ensemble."""
    pixels = case.channels * case.size[0] * case.size[1]
    case = replace(case, batch=max(case.batch, 128 // pixels))
    image = case.image(dtype)
    check_shift_budget(case, image, run(case, image, values))


# ---- right --------------------------------------------------------------------------------------


@each_values
@each_dtype
@each_ensemble
def test_ensemble(case: Ensemble, dtype: torch.dtype, values: str) -> None:
    check_ensemble(case, dtype, values)


@given(ensembles(), st.sampled_from(DTYPES), st.sampled_from(VALUES))
def test_any_ensemble(case: Ensemble, dtype: torch.dtype, values: str) -> None:
    tokens = case.tokens(dtype)
    check_rounding(case, tokens, run(case, tokens, values))


@each_values
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@each_shift
def test_shift(case: Shift, dtype: torch.dtype, values: str) -> None:
    check_shift(case, dtype, values)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_mode_of_shift(interpolation: str, padding: str) -> None:
    for dtype in ALL_DTYPES:
        for width in (37, 48, 260, 272):
            check_shift(Shift((7, width), padding=padding, interpolation=interpolation), dtype)


@given(shifts(), st.sampled_from(ALL_DTYPES), st.sampled_from(VALUES))
def test_any_shift(case: Shift, dtype: torch.dtype, values: str) -> None:
    image = case.image(dtype)
    check_shift_rounding(case, image, run(case, image, values))


@each_dtype
@each_ensemble
def test_same_bits_wherever_the_offsets_are(case: Ensemble, dtype: torch.dtype) -> None:
    tokens = case.tokens(dtype)
    assert torch.equal(run(case, tokens, "host"), run(case, tokens, "device"))


@each_shift
def test_same_views_wherever_the_offsets_are(case: Shift) -> None:
    for dtype in ALL_DTYPES:
        image = case.image(dtype)
        assert torch.equal(run(case, image, "host"), run(case, image, "device"))


@given(ensembles(), st.sampled_from((torch.float32, torch.float64)))
def test_offsets_and_weights_of_any_stride(case: Ensemble, dtype: torch.dtype) -> None:
    # float32 values, which both types hold.
    views = len(case.offsets)
    case = replace(case, value_dtype=torch.float32, weights=case.weights or (1.0,) * views)
    (tokens, offsets, grid, patch, weights), modes = placed(case.call(case.tokens()), "device")
    expected = srt_ext.ensemble(tokens, offsets, grid, patch, weights, **modes)
    wide = torch.full((views, 3, 2), NAN, dtype=dtype, device=DEVICE)
    wide[:, 1], wide[:, 0, 1] = offsets, weights
    transposed = offsets.to(dtype).t().contiguous().t()
    for strided in (wide[:, 1], transposed):
        field = srt_ext.ensemble(tokens, strided, grid, patch, wide[:, 0, 1], **modes)
        assert torch.equal(field, expected)


SIZES_OF_USE = [  # grid, patch, channels, stride
    ((14, 14), (16, 16), 384, (1, 1)),
    ((14, 14), (16, 16), 384, (16, 16)),
    ((30, 53), (16, 16), 192, (4, 4)),
    ((37, 37), (14, 14), 100, (2, 2)),
]


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("grid", "patch", "channels", "stride"), SIZES_OF_USE)
def test_sizes_of_use(
    grid: tuple[int, int],
    patch: tuple[int, int],
    channels: int,
    stride: tuple[int, int],
    dtype: torch.dtype,
    upsample: str,
) -> None:
    """Against the CPU kernels, for the oracle would take minutes."""
    offsets = tuple((y + 0.25, x / 2) for y in range(-3, 4) for x in range(-3, 4))
    case = Ensemble(grid, patch, offsets, channels, 1, 1, stride=stride, upsample=upsample)
    tokens = case.tokens(dtype)
    assert_as_on_the_cpu(case, tokens, run(case, tokens))


def assert_as_on_the_cpu(case: Ensemble, tokens: torch.Tensor, field: torch.Tensor) -> None:
    def cpu(dtype: torch.dtype) -> torch.Tensor:
        args, modes = case.call(tokens.to(dtype))
        return srt_ext.ensemble(*args, **modes)

    assert_within_budget(field, cpu(torch.float64), cpu(torch.float32).to(tokens.dtype))


@each_values
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", ["grid", "nearest", "real", "beyond", "weights", "stride"])
def test_large_tiles(name: str, dtype: torch.dtype, values: str) -> None:
    """The samples with enough images and channels for the kernels that fill a device."""
    case = replace(ENSEMBLES[name], batch=5, channels=2112)
    tokens = case.tokens(dtype)
    field = run(case, tokens, values)
    assert_as_on_the_cpu(case, tokens, field)

    poisoned = poison(tokens, 1)
    actual = run(case, poisoned, values)
    args, modes = case.call(poisoned)
    expected = srt_ext.ensemble(*args, **modes).isfinite()
    assert torch.equal(actual.isfinite(), expected)
    assert torch.equal(actual[expected], field[expected])


def test_long_axes() -> None:
    offsets = ((0.25, -0.5), (0.0, 2.0**20 - 0.25))
    for grid, patch in (((1, 2**16), (1, 2**6)), ((2**16, 1), (2**6, 1))):
        case = Ensemble(grid, patch, offsets, channels=2, batch=1)
        tokens = case.tokens()
        assert_as_on_the_cpu(case, tokens, run(case, tokens))


@each_values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_views(dtype: torch.dtype, values: str) -> None:
    weights = tuple(v % 7 / 4 for v in range(1000))
    check_ensemble(Ensemble(offsets=many(1000), weights=weights, channels=9), dtype, values)


@each_values
def test_a_thousand_shifts(values: str) -> None:
    for dtype in ALL_DTYPES:
        check_shift(Shift((3, 20), many(1000), channels=1, batch=1), dtype, values)


@each_dtype
def test_same_bits_again(dtype: torch.dtype) -> None:
    """A result that changes from call to call is a race."""
    case = Ensemble((14, 14), (16, 16), many(49), channels=136, batch=1)
    tokens = case.tokens(dtype)
    args, modes = placed(case.call(tokens), "host")
    first = srt_ext.ensemble(*args, **modes)
    assert all(torch.equal(srt_ext.ensemble(*args, **modes), first) for _ in range(20))


@pytest.mark.parametrize("width", [1, 5, 64])
def test_uint8_rounds_half_to_even_and_saturates(width: int) -> None:
    pairs = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1, 1)
    image = torch.cat([pairs, pairs.flip(1) // 3], 2).expand(-1, -1, -1, width)
    views = srt_ext.shift(place(image), torch.tensor([[-0.5, 0.0]]), padding="border")
    exact = image.double().mean(2)
    assert (exact % 1 == 0.5).any()
    assert torch.equal(views[0, :, :, 0].cpu(), exact.round().to(torch.uint8))

    # Cubic convolution overshoots beside an edge, on both sides.
    edge = torch.tensor([0, 0, 255, 255], dtype=torch.uint8).reshape(1, 1, 4, 1)
    edge = edge.expand(-1, -1, -1, width)
    quarter = torch.tensor([[0.25, 0.0]])
    exact = reference.shift(edge, quarter, interpolation="bicubic")
    assert exact.min() < 0
    assert exact.max() > 255
    views = srt_ext.shift(place(edge), quarter, interpolation="bicubic")
    assert torch.equal(views.cpu(), exact.round().clamp(0, 255).to(torch.uint8))


# ---- whole pixels -------------------------------------------------------------------------------


@each_values
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_whole_pixels_copy_bit_for_bit(interpolation: str, padding: str, values: str) -> None:
    offsets = [(0, 0), (1, -2), (-2, 1), (2, 0), (0, 36), (-7, -40), (300, -1000), (0, -1)]
    moves = torch.tensor(offsets).float().to(DEVICE if values == "device" else "cpu")
    modes = {"padding": padding, "interpolation": interpolation}
    for dtype in ALL_DTYPES:
        for size in ((3, 37), (9, 64), (2, 272), (1, 1), (1, 6), (5, 1)):
            image = special_image(size, dtype)
            views = srt_ext.shift(place(image), moves, **modes).cpu()
            for view, (dy, dx) in zip(views, offsets, strict=True):
                assert torch.equal(bits(view), padded_slice(image, dy, dx, padding)), (size, dy, dx)


@each_values
@pytest.mark.parametrize("padding", PADDINGS)
def test_whole_pixels_up_to_the_largest_offset(padding: str, values: str) -> None:
    image = special_image((2, 3), torch.float32)
    offsets = [(2**20, -(2**20)), (-(2**20) + 1, 2**20 - 1)]
    moves = torch.tensor(offsets).double().to(DEVICE if values == "device" else "cpu")
    views = srt_ext.shift(place(image), moves, padding=padding).cpu()
    # One axis at a time, or numpy.pad would make terabytes; turning the other axis is exact.
    for view, (dy, dx) in zip(views, offsets, strict=True):
        moved = padded_slice(image, dy, 0, padding).view(torch.float32)
        assert torch.equal(bits(view), padded_slice(moved, 0, dx, padding))


# ---- containment --------------------------------------------------------------------------------


def check_containment(case: Ensemble, tokens: torch.Tensor, values: str) -> None:
    actual, expected = run(case, tokens, values), oracle(case, tokens)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    clean = run(case, torch.where(tokens.isfinite(), tokens, 0), values)
    touched = ~expected.isfinite()
    assert torch.equal(actual[~touched], clean[~touched])


@each_values
@each_dtype
@each_ensemble
def test_containment(case: Ensemble, dtype: torch.dtype, values: str) -> None:
    tokens = case.tokens(dtype)
    check_containment(case, poison(tokens, 1), values)
    if case.weights is not None:
        tokens = tokens.clone()
        tokens[1] = NAN
        assert case.weights[1] == 0
        assert run(case, tokens, values).isfinite().all()


@given(ensembles(), st.sampled_from(DTYPES), st.sampled_from(VALUES), st.integers(0, 2**16))
def test_containment_of_any_call(
    case: Ensemble, dtype: torch.dtype, values: str, seed: int
) -> None:
    check_containment(case, poison(case.tokens(dtype), seed), values)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_containment_of_shift(interpolation: str, padding: str) -> None:
    # Whole on one axis only, too: that axis reads one line of pixels.
    offsets = ((0.5, -1.25), (2.0, 0.75), (-0.3, -3.0), (-20.5, 60.1), (0.0, 1e-9), (-1e-17, 0.0))
    for width in (37, 48):
        case = Shift((7, width), offsets, padding=padding, interpolation=interpolation)
        for dtype in DTYPES:
            image = poison(case.image(dtype), 1)
            assert torch.equal(run(case, image).isfinite(), oracle(case, image).isfinite())


# ---- values that the host refuses ---------------------------------------------------------------

REFUSED = (NAN, INF, -INF, FAR + 0.125, -2 * FAR)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_refused_offsets_cover_nothing(border: str, value_dtype: torch.dtype) -> None:
    good = replace(ENSEMBLES["real"], border=border, value_dtype=value_dtype)
    refused = [pair for bad in REFUSED for pair in ((bad, 1.0), (-2.0, bad), (bad, bad))]
    tokens = torch.full((len(REAL) + len(refused), *good.tokens().shape[1:]), NAN).double()
    tokens[::4] = good.tokens(torch.float64)  # the others of their views are never read
    offsets = list(refused)
    for i, pair in enumerate(REAL):
        offsets.insert(4 * i, pair)
    assert [offsets[i] for i in range(0, 20, 4)] == list(REAL)

    field = run(replace(good, offsets=tuple(offsets)), tokens, "device")
    clean = tokens[::4]
    check_rounding(good, clean, field)
    nothing = replace(good, offsets=tuple(refused))
    no_view = torch.full((len(refused), *tokens.shape[1:]), NAN)
    assert torch.equal(run(nothing, no_view, "device"), torch.zeros(good.shape))
    for pair in refused:
        with pytest.raises(ValueError, match="offsets must be finite and at most 2\\^20 pixels"):
            run(replace(good, offsets=(pair,)), no_view[:1], "host")


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_refused_weights_count_nothing(border: str, value_dtype: torch.dtype) -> None:
    case = replace(ENSEMBLES["real"], border=border, value_dtype=value_dtype)
    tokens = case.tokens(torch.float64)
    for bad in (NAN, INF, -INF, -1.0, -1e-30, 2.0**-79 * 0.99):  # the largest is 2
        weights = (1.0, bad, 2.0, bad, 0.5)
        poisoned = tokens.clone()
        poisoned[1::2] = NAN
        field = run(replace(case, weights=weights), poisoned, "device")
        clean = replace(case, weights=(1.0, 0.0, 2.0, 0.0, 0.5))
        check_rounding(clean, tokens, field)
        with pytest.raises(ValueError, match="weights must be "):
            run(replace(case, weights=weights), tokens, "host")
    for bad in (NAN, INF, -1.0, 0.0):
        field = run(replace(case, weights=(bad,) * 5), torch.full_like(tokens, NAN), "device")
        assert torch.equal(field, torch.zeros(case.shape).double())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_refused_offsets_shift_to_zeros(padding: str, interpolation: str) -> None:
    refused = tuple(pair for bad in REFUSED for pair in ((bad, 1.0), (0.5, bad), (bad, bad)))
    case = Shift(offsets=REAL + refused, padding=padding, interpolation=interpolation)
    for width in (21, 32):
        for dtype in ALL_DTYPES:
            image = replace(case, size=(9, width)).image(dtype)
            views = run(case, image, "device")
            assert torch.equal(views[:5], run(replace(case, offsets=REAL), image, "device"))
            assert (views[5:] == 0).all()
    for pair in refused:
        with pytest.raises(ValueError, match="offsets must be finite and at most 2\\^20 pixels"):
            run(replace(case, offsets=(pair,)), image, "host")


# ---- layouts ------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 31, 32, 33, 64, 130, 384])
def test_unaligned_tokens(channels: int, dtype: torch.dtype) -> None:
    """Bases and strides that are no multiples of 16 bytes, of 4, or of 2 elements."""
    case = Ensemble(channels=channels, batch=1, patch=(2, 3))
    for begin, wide in ((0, 0), (1, 0), (1, 2), (4, 4), (3, 16), (8, 8)):
        shape = (9, 1, 3 + 15, begin + channels + wide)
        tokens = torch.randn(shape, dtype=torch.float64).to(dtype)
        tokens = tokens[:, :, 3:, begin : begin + channels]
        check_rounding(case, tokens, run(case, tokens))


@given(ensembles(), st.sampled_from(("expanded views", "expanded batch", "permuted", "steps")))
def test_strides_of_tokens(case: Ensemble, layout: str) -> None:
    tokens = case.tokens()
    if layout == "expanded views":
        tokens = tokens[:1].expand(tokens.shape)
    elif layout == "expanded batch":
        tokens = tokens[:, :1].expand(tokens.shape)
    elif layout == "permuted":
        tokens = tokens.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    else:
        v, b, n, c = tokens.shape
        wide = torch.full((2 * v, 3 * b, 2 * n + 1, c + 5), NAN)
        wide[::2, ::3, 1::2, 3:-2] = tokens
        tokens = wide[::2, ::3, 1::2, 3:-2]
    # Aligned and unaligned tokens may be summed by different kernels.
    for given_tokens in (tokens, tokens.contiguous()):
        check_rounding(case, tokens, run(case, given_tokens))


def test_one_channel_may_have_any_stride() -> None:
    case = replace(ENSEMBLES["grid"], channels=1)
    tokens = case.tokens()
    strided = torch.stack([tokens, tokens + 1], -1)[..., 0]
    assert strided.stride(3) == 2
    assert torch.equal(run(case, strided), run(case, tokens))


@each_dtype
@pytest.mark.parametrize("channels", [19, 32])
@pytest.mark.parametrize("name", ["grid", "stride", "token_scale", "one_token"])
def test_out(name: str, channels: int, dtype: torch.dtype) -> None:
    case = replace(ENSEMBLES[name], channels=channels, batch=8)
    tokens = case.tokens(dtype)
    args, modes = placed(case.call(tokens), "host")
    for layout in ("contiguous", "channels_last", "padded", "steps"):
        with torch.device(DEVICE):
            whole, out = buffer(case.shape, dtype, layout)
        for write in (srt_ext.ensemble, torch.ops.srt.ensemble.out):
            out.fill_(NAN)
            assert write(*args, **modes, out=out) is (out if write is srt_ext.ensemble else None)
            check_budget(case, tokens, out.cpu())
            assert (out.fill_(7) == 7).all()
            assert (whole == 7).all(), layout  # the guards around it


@pytest.mark.parametrize("grid", [(2, 3), (1, 3), (1, 1)])
@pytest.mark.parametrize("sizes", [(2, 5), (1, 1), (0, 5), (2, 0), (0, 0), (1, 64)])
def test_exact_strides(sizes: tuple[int, int], grid: tuple[int, int]) -> None:
    batch, channels = sizes
    for stride in ((1, 1), (2, 3), (grid[0] * 2, grid[1] * 3)):
        for values in VALUES:
            case = Ensemble(grid, (2, 3), batch=batch, channels=channels, stride=stride)
            tokens = torch.ones(9, batch, grid[0] * grid[1], channels)
            args, modes = placed(case.call(tokens), values)
            field = srt_ext.ensemble(*args, **modes)
            _, _, height, width = case.shape
            assert field.device.type == DEVICE
            assert tuple(field.shape) == case.shape
            assert field.stride() == (height * width * channels, 1, width * channels, channels)
            assert (field == 1).all()
            assert srt_ext.ensemble(*args, **modes, out=field.zero_()) is field
            assert (field == 1).all()


@each_values
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_views_of_no_elements(shape: tuple[int, ...], values: str) -> None:
    offsets = torch.zeros(2, 2, device=DEVICE if values == "device" else "cpu")
    views = srt_ext.shift(torch.ones(shape, device=DEVICE), offsets)
    assert views.shape == (2, *shape)
    assert views.stride() == torch.empty(2, *shape).stride()


@given(shifts(), st.sampled_from(ALL_DTYPES))
def test_strides_of_the_image(case: Shift, dtype: torch.dtype) -> None:
    image = case.image(dtype)
    expected = run(case, image.contiguous())
    assert torch.equal(run(case, image), expected)
    flipped = image.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(run(case, flipped), expected)
    for begin in (1, 2, 3):  # an image that starts off 16 bytes
        wide = torch.zeros(begin + image.numel(), dtype=dtype)
        wide[begin:] = image.flatten()
        assert torch.equal(run(case, wide[begin:].view(image.shape)), expected)


# ---- past 2^31 ----------------------------------------------------------------------------------


def needs(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of device memory; {free:.1f} are free")


@pytest.mark.serial
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("batch", "channels"), [(1, 520), (65, 8)])
def test_field_past_2_31(batch: int, channels: int, layout: str) -> None:
    needs(6)
    offsets = ((0.25, -3.5), (-7.0, 5.0))
    case = Ensemble((64, 64), (32, 32), offsets, channels, batch)
    tokens = case.tokens(torch.float16)
    args, modes = placed(case.call(tokens), "host")
    out = None
    if layout == "contiguous":
        out = torch.full(case.shape, NAN, dtype=torch.float16, device=DEVICE)
    field = srt_ext.ensemble(*args, **modes, out=out)
    assert field.numel() > 2**31
    images = [0, batch // 2, batch - 1] if batch > 1 else [0]
    picked = [0, 3, channels - 1]
    few = replace(case, batch=len(images), channels=len(picked))
    some = torch.stack([field[b, picked] for b in images]).cpu()
    assert_as_on_the_cpu(few, tokens[:, images][..., picked].contiguous(), some)


@pytest.mark.serial
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_tokens_past_2_31(dim: int) -> None:
    """Tokens whose neighbours along one dimension lie far apart."""
    needs(9)
    case = Ensemble(channels=24)
    tokens = case.tokens(torch.float16)
    strides = [0, 0, 0, 1]
    near = 24
    for d in (2, 1, 0):
        if d != dim:
            strides[d] = near
            near *= tokens.shape[d]
    strides[dim] = 2**31 // (tokens.shape[dim] - 1) + 8
    last = sum((n - 1) * s for n, s in zip(tokens.shape, strides, strict=True))
    assert last > 2**31
    storage = torch.full((last + 1,), NAN, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided(tokens.shape, strides)
    far.copy_(tokens)
    args, modes = case.call(tokens)
    check_budget(case, tokens, srt_ext.ensemble(far, *args[1:], **modes).cpu())


@pytest.mark.serial
def test_views_past_2_31() -> None:
    needs(6)
    offsets = (*many(720)[:-1], (-3.3, 7.1))
    case = Shift((1001, 1024), offsets, batch=1)
    image = case.image(torch.uint8)
    args, modes = placed(case.call(image), "host")
    views = srt_ext.shift(*args, **modes)
    assert views.numel() > 2**31
    for v in (0, 300, 699, 719):
        one = replace(case, offsets=(offsets[v],))
        assert torch.equal(views[v].cpu(), run(one, image)[0])
    check = (719, 0, slice(None), slice(-9, None), slice(-21, None))
    truth = oracle(replace(case, offsets=offsets[-1:]), image[..., -40:, -60:])[0, 0]
    inner = truth[:, -9:, -21:]
    assert ((views[check].cpu() - inner.clamp(0, 255)).abs() <= 0.501).all()


@pytest.mark.serial
def test_plane_past_2_31() -> None:
    needs(9)
    height, width = 2**11 + 1, 2**20 + 16
    image = torch.randint(0, 256, (1, 1, height, width), dtype=torch.uint8, device=DEVICE)
    assert image.numel() > 2**31
    view = srt_ext.shift(image, torch.tensor([[1.0, -2.0]]), padding="circular")[0, 0, 0]
    for begin in range(0, height, 64):  # a whole copy would double the memory
        rows = torch.arange(begin, min(begin + 64, height), device=DEVICE)
        expected = image[0, 0, (rows - 1) % height].roll(-2, 1)
        assert torch.equal(view[rows], expected)


# ---- errors -------------------------------------------------------------------------------------


def test_mixed_devices() -> None:
    case = ENSEMBLES["weights"]
    (tokens, offsets, grid, patch, weights), modes = case.call(case.tokens())
    on_device = place(tokens)
    image = torch.ones(1, 2, 5, 6)
    numbers = "{} must be on the CPU or on the device of the input"
    place_out = "out must be on the device of tokens"
    out = torch.empty(case.shape)

    def ensemble(*args: Any, **more: Any) -> tuple[Any, ...]:
        return "ensemble", args, {**modes, **more}

    for rule, (name, args, keywords) in (
        (numbers.format("offsets"), ensemble(tokens, place(offsets), grid, patch)),
        (numbers.format("offsets"), ensemble(tokens, place(offsets), grid, patch, place(weights))),
        (numbers.format("weights"), ensemble(tokens, offsets, grid, patch, place(weights))),
        (place_out, ensemble(on_device, offsets, grid, patch, out=out)),
        (place_out, ensemble(tokens, offsets, grid, patch, out=out.to(DEVICE))),
        (numbers.format("offsets"), ("shift", (image, place(offsets)), {})),
    ):
        with pytest.raises(ValueError, match=re.escape(f"srt::{name}: {rule}; got ")):
            getattr(srt_ext, name)(*args, **keywords)
        op = getattr(torch.ops.srt, name)
        op = op.out if "out" in keywords else op.default
        with pytest.raises(RuntimeError, match=re.escape(rule)):
            op(*args, **keywords)


def test_wrong_arguments() -> None:
    tokens, offsets = torch.ones(2, 1, 6, 3, device=DEVICE), torch.zeros(2, 2)
    flat = torch.ones(2000, device=DEVICE)
    overlap = flat[: 8 * 15 * 3].as_strided((1, 3, 8, 15), (360, 1, 3, 3))
    inside = flat[:36].view(2, 1, 6, 3)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("grid must hold the N = 6 tokens", (tokens, offsets, [2, 2], [4, 5]), {}),
        ("stride must divide", (tokens, offsets, [2, 3], [4, 5]), {"stride": [3, 1]}),
        ("grid must be two integers >= 1", (tokens, offsets, [], [4, 5]), {}),
        ("offsets must be [V, 2] with V = 2", (tokens, offsets[:1], [2, 3], [4, 5]), {}),
        ("offsets must be [V, 2]", (tokens, offsets[:1].to(DEVICE), [2, 3], [4, 5]), {}),
        ("tokens must be float32", (tokens.int(), offsets, [2, 3], [4, 5]), {}),
        ("offsets must be float32 or", (tokens, offsets.half(), [2, 3], [4, 5]), {}),
        ("offsets must be float32 or", (tokens, offsets.to(DEVICE).half(), [2, 3], [4, 5]), {}),
        ("border must be one of", (tokens, offsets, [2, 3], [4, 5]), {"border": "wrap"}),
        ("out must not overlap", (tokens, offsets, [2, 3], [4, 5]), {"out": overlap}),
        (
            "out must not share memory",
            (inside, offsets, [2, 3], [4, 5]),
            {"out": flat[:360].view(1, 3, 8, 15)},
        ),
    ]
    for rule, args, modes in cases:
        op = torch.ops.srt.ensemble.out if "out" in modes else torch.ops.srt.ensemble.default
        with pytest.raises(RuntimeError, match=re.escape(rule)):
            op(*args, **modes)
        with pytest.raises((ValueError, TypeError), match=re.escape(rule)):
            srt_ext.ensemble(*args, **modes)
    torch.cuda.synchronize()  # nothing was launched that fails later


# ---- as torch sees the ops ----------------------------------------------------------------------


@each_values
@each_ensemble
def test_opcheck_ensemble(case: Ensemble, values: str) -> None:
    args, modes = placed(case.call(case.tokens()), values)
    torch.library.opcheck(torch.ops.srt.ensemble.default, args, modes)


@each_values
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_ensemble_out(layout: torch.memory_format, values: str) -> None:
    case = ENSEMBLES["weights"]
    args, modes = placed(case.call(case.tokens()), values)
    out = torch.zeros(case.shape, device=DEVICE).contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.srt.ensemble.out, args, {**modes, "out": out})


@each_values
@each_shift
def test_opcheck_shift(case: Shift, values: str) -> None:
    args, modes = placed(case.call(case.image()), values)
    torch.library.opcheck(torch.ops.srt.shift.default, args, modes)


def check_compiled(values: str, **options: Any) -> None:
    case, views = ENSEMBLES["weights"], SHIFTS["bicubic"]
    args, modes = placed(case.call(case.tokens()), values)
    (image, offsets), shift_modes = placed(views.call(views.image()), values)
    out = torch.zeros(case.shape, device=DEVICE)

    def function(
        tokens: torch.Tensor, image: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        field = 2 * srt_ext.ensemble(tokens + 1, *args[1:], **modes)
        moved = srt_ext.shift(image * 2, offsets, **shift_modes) - 1
        srt_ext.ensemble(tokens, *args[1:], **modes, out=out)
        return field, moved, out + 1

    torch.compiler.reset()
    try:
        compiled = torch.compile(function, fullgraph=True, **options)
        expected = [result.clone() for result in function(args[0], image, out)]
        for _ in range(3):  # the first calls compile, warm up and capture
            results = compiled(args[0], image, out.zero_())
            for result, right in zip(results, expected, strict=True):
                assert torch.equal(result, right)
                assert result.stride() == right.stride()
    finally:
        torch.compiler.reset()


@pytest.mark.serial
@each_values
def test_compile(values: str) -> None:
    check_compiled(values, backend="aot_eager")


@pytest.mark.serial
def test_compile_by_inductor() -> None:
    pytest.importorskip("triton")
    check_compiled("device", mode="default")


@pytest.mark.serial
def test_compiled_calls_are_captured() -> None:
    """By inductor's own CUDA graphs, which it gives up where an input is written: no out= here."""
    pytest.importorskip("triton")
    case, views = ENSEMBLES["weights"], SHIFTS["bicubic"]
    args, modes = placed(case.call(case.tokens()), "device")
    (image, offsets), shift_modes = placed(views.call(views.image()), "device")

    def function(tokens: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        field = 2 * srt_ext.ensemble(tokens + 1, *args[1:], **modes)
        return field, srt_ext.shift(image * 2, offsets, **shift_modes) - 1

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        for seed in range(4):  # the first calls compile, warm up and capture
            inputs = place(replace(case, seed=seed).tokens()), image * (seed + 1)
            expected = function(*inputs)
            for result, right in zip(compiled(*inputs), expected, strict=True):
                assert torch.equal(result, right)
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    finally:
        torch.compiler.reset()


# ---- median, moments, streams of views ----------------------------------------------------------


def check_reductions(case: Ensemble, tokens: torch.Tensor, values: str) -> None:
    """Against the oracle: the median and the moments of one call."""
    plain = replace(case, weights=None)
    args, modes = placed(plain.call(tokens), values)
    field = srt_ext.ensemble(*args, reduce="median", **modes).cpu()
    bound = EnsembleBounds(plain, tokens).median()
    assert_within_rounding(field, median_oracle(case, tokens), bound)

    args, modes = placed(case.call(tokens), values)
    mean, var = srt_ext.ensemble_moments(*args, **modes)
    args, modes = case.call(tokens)
    true_mean, true_var = reference.ensemble_moments(*args, **modes)
    bounds = EnsembleBounds(case, tokens)
    assert_within_rounding(mean.cpu(), true_mean, bounds.mean())
    assert_within_rounding(var.cpu(), true_var, bounds.variance())


@each_values
@each_dtype
@each_ensemble
def test_median_and_moments(case: Ensemble, dtype: torch.dtype, values: str) -> None:
    check_reductions(case, case.tokens(dtype), values)


@pytest.mark.parametrize("views", [9, 10, 25, 26, 49, 50, 51, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_of_torch_median(views: int, dtype: torch.dtype) -> None:
    """With infinities and, in a quarter of the channels, NaN; every network and between them."""
    generator = torch.Generator().manual_seed(views)
    case = Ensemble((2, 3), (2, 2), ((0.0, 0.0),) * views, channels=64, batch=1, upsample="nearest")
    tokens = case.tokens(dtype)
    share = torch.rand(tokens.shape, generator=generator)
    tokens[share < 0.4] = INF
    tokens[share < 0.2] = -INF
    tokens[:, :, :, :16][share[:, :, :, :16] > 1 - 1 / views] = NAN
    args, modes = placed(case.call(tokens), "device")
    field = srt_ext.ensemble(*args, reduce="median", **modes).cpu()[0, :, ::2, ::2].flatten(1).T
    expected = tokens[:, 0].median(0).values
    assert torch.equal(field.nan_to_num(7e4), expected.nan_to_num(7e4))


@each_dtype
@each_values
@pytest.mark.parametrize(
    "kind", [srt_ext.RunningMean, srt_ext.RunningMoments, srt_ext.RunningMedian]
)
@each_ensemble
def test_streams_equal_those_of_the_cpu(
    case: Ensemble, kind: Any, values: str, dtype: torch.dtype
) -> None:
    if kind is srt_ext.RunningMedian:
        case = replace(case, weights=None)
    (tokens, offsets, grid, patch, weights), modes = case.call(case.tokens(dtype))
    on_cpu, on_gpu = kind(grid, patch, **modes), kind(grid, patch, **modes)
    for begin in range(0, len(offsets), 2):
        numbers = [offsets[begin : begin + 2]]
        if weights is not None:
            numbers.append(weights[begin : begin + 2])
        on_cpu.update(tokens[begin : begin + 2], *numbers)
        if values == "device":
            numbers = [place(number) for number in numbers]
        on_gpu.update(place(tokens[begin : begin + 2]), *numbers)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for here, there in zip(on_cpu._state.values(), on_gpu._state.values(), strict=True):
        counted = on_cpu._state[kind._seen] > 0
        torch.testing.assert_close(
            there.cpu()[..., counted], here[..., counted], rtol=close, atol=close
        )
    resumed = kind(grid, patch, **modes)
    resumed.load_state_dict(on_gpu.state_dict())
    for a, b in zip(resumed._fields(), on_gpu._fields(), strict=True):
        assert torch.equal(a, b)


# ---- streams and graphs -------------------------------------------------------------------------


def inputs(views: int, seed: int, values: str) -> list[torch.Tensor]:
    """tokens, image, offsets, weights: what the calls of this section take."""
    case = Ensemble((3, 5), (8, 8), many(views, seed), channels=40, seed=seed)
    weights = torch.rand(views, generator=torch.Generator().manual_seed(seed)) + 0.5
    image = Shift((24, 40), seed=seed).image()
    numbers = [torch.tensor(case.offsets), weights]
    if values == "device":
        numbers = [place(number) for number in numbers]
    return [place(case.tokens()), place(image), *numbers]


def calls(
    tokens: torch.Tensor, image: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    place = ((3, 5), (8, 8))
    out = torch.empty(2, 40, 24, 40, device=DEVICE)
    mean, var, window = (torch.zeros(n, 2, 40, 24, 40, device=DEVICE) for n in (1, 1, 8))
    weight, count = (torch.zeros(24, 40, dtype=torch.float64, device=DEVICE) for _ in range(2))
    for part in (slice(0, 2), slice(2, None)):
        chunk = (tokens[part], offsets[part], *place)
        torch.ops.srt.accumulate_moments_(mean[0], var[0], weight, *chunk, weights[part])
        torch.ops.srt.accumulate_median_(window, count, *chunk)
    return [
        srt_ext.ensemble(tokens, offsets, *place, weights),
        srt_ext.ensemble(tokens, offsets, *place, stride=8, border="zeros"),
        srt_ext.ensemble(tokens, offsets, *place, upsample="nearest", out=out),
        srt_ext.shift(image, offsets),
        srt_ext.ensemble(tokens, offsets, *place, reduce="median"),
        *srt_ext.ensemble_moments(tokens, offsets, *place, weights),
        *(mean, var, weight, window, count),
    ]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


each_count = pytest.mark.parametrize("views", [5, 49, 300])  # 300: more than one launch carries


@pytest.mark.serial
@each_count
@each_values
def test_graph(values: str, views: int) -> None:
    """A replay reads what its inputs hold then; numbers of the host stay as they were captured."""
    static = inputs(views, 0, values)
    calls(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls(*static)
    captured = [tensor.clone() for tensor in static]
    if values == "host":
        static[2].fill_(NAN), static[3].fill_(NAN)
    for seed in (1, 2, 3):
        fresh = inputs(views, seed, values)
        if values == "host":
            fresh[2:] = captured[2:]
        for old, new in zip(static, fresh, strict=True):
            if old.device.type == DEVICE:
                old.copy_(new)
        for result in results:
            result.fill_(NAN)
        graph.replay()
        assert_same(results, calls(*fresh))


@pytest.mark.serial
@each_count
@each_values
def test_current_stream(values: str, views: int) -> None:
    """What the stream holds before the call is done before it, and what follows waits for it."""
    fresh = inputs(views, 0, values)
    expected = calls(*fresh)
    stale = [torch.full_like(t, NAN) if t.device.type == DEVICE else t for t in fresh]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)  # other streams run ahead
        for old, new in zip(stale, fresh, strict=True):
            if old.device.type == DEVICE:
                old.copy_(new)
        results = calls(*stale)
        copies = [result.clone() for result in results]
        for tensor in (*stale, *results):
            if tensor.device.type == DEVICE:
                tensor.fill_(NAN)
    stream.synchronize()
    assert_same(copies, expected)


@pytest.mark.serial
def test_two_streams_at_once() -> None:
    seeds = range(6)
    expected = [calls(*inputs(49, seed, "device")) for seed in seeds]
    torch.cuda.synchronize()

    def work(first: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            arguments = [inputs(49, seed, VALUES[seed % 2]) for seed in seeds]
            for _ in range(10):
                results = [calls(*arguments[(first + i) % len(seeds)]) for i in seeds]
            stream.synchronize()
            for i in seeds:
                assert_same(results[i], expected[(first + i) % len(seeds)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 3)))


@pytest.mark.serial
@each_count
@each_values
def test_nothing_waits(values: str, views: int) -> None:
    arguments = inputs(views, 0, values)
    calls(*arguments)  # loads the kernels and fills the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP)
        results = calls(*arguments)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert_same(results, calls(*arguments))


def test_device_of_the_tokens() -> None:
    """Not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for values in VALUES:
        arguments = inputs(49, 0, values)
        expected = calls(*arguments)
        other = [t.to("cuda:1") if t.device.type == DEVICE else t for t in arguments]
        tokens, image, offsets, weights = other
        with torch.cuda.device(0):
            results = [
                srt_ext.ensemble(tokens, offsets, (3, 5), (8, 8), weights),
                srt_ext.shift(image, offsets),
            ]
            assert torch.cuda.current_device() == 0
        assert all(result.device == torch.device("cuda:1") for result in results)
        assert_same([r.to("cuda:0") for r in results], [expected[0], expected[3]])
        with pytest.raises(ValueError, match="on the CPU or on the device of the input; got cuda"):
            srt_ext.ensemble(tokens, arguments[2].to("cuda:0"), (3, 5), (8, 8))
