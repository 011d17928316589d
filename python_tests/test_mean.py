"""The mean: against the oracle, against the published code, and by its properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from backends import LAYOUTS, Backend, Ops, each_device, each_gpu_tile, each_tile
from bounds import EnsembleBounds
from budget import assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from oracle import check_containment, check_ensemble, check_sample, large_enough
from oracle import ensemble as oracle
from peak import needs_proc, peak_of
from samples import (
    BORDERS,
    DTYPES,
    NO_OFFSETS,
    UPSAMPLES,
    Ensemble,
    ensembles,
    poison,
    random_views,
    sample_ensembles,
)
from torch.nn import functional

import srt_ext

NAN = float("nan")
SAMPLES = sample_ensembles()
each_sample = pytest.mark.parametrize("case", SAMPLES.values(), ids=SAMPLES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_border = pytest.mark.parametrize("border", BORDERS)
# 40: whole vectors in every dtype, and the last chunk of channels has idle lanes.
CHANNELS = (None, 40)


def run(case: Ensemble, tokens: torch.Tensor) -> torch.Tensor:
    return Ops("cpu").ensemble(case, tokens)


@each_tile
@each_dtype
@pytest.mark.parametrize("channels", CHANNELS)
@each_sample
def test_error_budget(
    case: Ensemble, channels: int | None, dtype: torch.dtype, backend: Backend
) -> None:
    case = large_enough(replace(case, channels=channels or case.channels), dtype)
    check_sample(case, dtype, backend.ensemble(case, case.tokens(dtype)))


@each_tile
@given(
    ensembles(),
    st.sampled_from(DTYPES),
    st.sampled_from((None, 8, 16, 72)),
    st.sampled_from(("host", "device")),
)
def test_rounding_of_any_call(
    backend: Backend, case: Ensemble, dtype: torch.dtype, channels: int | None, place: str
) -> None:
    place = place if place in backend.places else "host"
    case = replace(case, channels=channels or case.channels)
    tokens = case.tokens(dtype)
    check_ensemble(case, tokens, backend.ensemble(case, tokens, place=place))


@pytest.mark.parametrize("name", ["mean_p16_r3", "mean_p14_r2x4", "fast_p16_r3"])
def test_golden(
    name: str, golden: Callable[[str], dict[str, torch.Tensor]], cpu_kernels: str
) -> None:
    file = golden(name)
    grid, patch = file["grid"].tolist(), file["patch"].tolist()
    field = srt_ext.ensemble(
        file["tokens"],
        file["offsets"],
        grid,
        patch,
        upsample="nearest",
        border="zeros",
        stride=patch,
    )
    # The published code sums in float32 in another order; DESIGN section 2 promises 1e-5.
    torch.testing.assert_close(field[0].permute(1, 2, 0), file["output"], rtol=0, atol=1e-5)


@each_gpu_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_border
@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("offsets", ["grid", "real"])
def test_tiles_of_a_real_shape(
    offsets: str, upsample: str, border: str, dtype: torch.dtype, backend: Backend
) -> None:
    """Several tiles along every axis, several rounds of columns, and long runs between breaks."""
    case = replace(SAMPLES[offsets], grid=(3, 5), patch=(16, 16), batch=1, channels=72)
    case = replace(case, upsample=upsample, border=border)
    tokens = case.tokens(dtype)
    check_sample(case, dtype, backend.ensemble(case, tokens))
    poisoned = poison(tokens, 2)
    check_containment(partial(backend.ensemble, case), poisoned, oracle(case, poisoned))


@pytest.mark.parametrize("grid", [(3, 21), (5, 37)])
def test_positions_far_from_0_in_float64(grid: tuple[int, int], backend: Backend) -> None:
    """Weights round in proportion to the position: cells between two of them would show it."""
    for seed in range(5):
        case = Ensemble(grid, (2, 26), ((0.3, 0.7),), channels=8, seed=seed)
        tokens = case.tokens(torch.float64)
        check_ensemble(case, tokens, backend.ensemble(case, tokens))


# ---- offsets and weights ------------------------------------------------------------------------


@pytest.mark.parametrize("views", [160, 161, pytest.param(500, marks=pytest.mark.slow)])
def test_many_views(views: int, backend: Backend) -> None:
    """More numbers than the parameters of a kernel hold."""
    weights = tuple(v % 7 / 4 for v in range(views))
    case = Ensemble((2, 2), (4, 4), random_views(views), channels=9)
    for same in (case, replace(case, weights=weights)):
        tokens = same.tokens()
        for place in backend.places:
            check_sample(same, tokens.dtype, backend.ensemble(same, tokens, place=place))


@each_dtype
@pytest.mark.parametrize("views", [5, 200])
@each_gpu_tile
def test_same_bits_wherever_the_numbers_lie(
    views: int, dtype: torch.dtype, backend: Backend
) -> None:
    # Numbers that float32 holds, so that it makes no difference.
    weights = (1.0, 0.0, 2.5, 0.125, 7.0) * (views // 5)
    case = replace(SAMPLES["real"], offsets=random_views(views), weights=weights, channels=16)
    tokens = case.tokens(dtype)
    field = backend.ensemble(case, tokens)
    for value_dtype in (torch.float32, torch.float64):
        case = replace(case, value_dtype=value_dtype)
        for place in ("device", ("host", "device"), ("device", "host")):
            assert torch.equal(backend.ensemble(case, tokens, place=place), field)


@each_border
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64], ids=str)
@each_gpu_tile
def test_refused_offsets_cover_nothing(
    value_dtype: torch.dtype, border: str, backend: Backend
) -> None:
    """On the device, where nobody reads them before the kernels do."""
    good = replace(SAMPLES["real"], border=border, channels=16, value_dtype=value_dtype)
    case = replace(good, offsets=NO_OFFSETS[:3] + good.offsets + NO_OFFSETS[3:])
    tokens = torch.full((len(case.offsets), 2, 15, 16), NAN, dtype=torch.float64)
    tokens[3:8] = good.tokens()  # the others of their views are never read
    field = backend.ensemble(case, tokens, place="device")
    check_ensemble(good, tokens[3:8], field)
    none = replace(case, offsets=NO_OFFSETS)
    assert not backend.ensemble(none, tokens[: len(NO_OFFSETS)] * NAN, place="device").any()


@each_border
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64], ids=str)
@each_gpu_tile
def test_refused_weights_count_nothing(
    value_dtype: torch.dtype, border: str, backend: Backend
) -> None:
    case = replace(SAMPLES["real"], border=border, channels=16, value_dtype=value_dtype)
    clean = replace(case, weights=(1.0, 0.0, 2.0, 0.0, 0.5))
    tokens = case.tokens(torch.float64)
    poisoned = tokens.clone()
    poisoned[1::2] = NAN
    infinity = float("inf")
    for bad in (NAN, infinity, -infinity, -1.0, -1e-30, 2.0**-79 * 0.99):  # the largest is 2
        refused = replace(case, weights=(1.0, bad, 2.0, bad, 0.5))
        check_ensemble(clean, tokens, backend.ensemble(refused, poisoned, place="device"))
    for bad in (NAN, infinity, -1.0, 0.0):
        none = replace(case, weights=(bad,) * 5)
        assert not backend.ensemble(none, tokens * NAN, place="device").any()


@each_device
@given(ensembles(), st.sampled_from((torch.float32, torch.float64)))
def test_offsets_and_weights_of_any_dtype_and_stride(
    device: str, case: Ensemble, dtype: torch.dtype
) -> None:
    # float32 values, which both types hold.
    views = len(case.offsets)
    case = replace(case, value_dtype=torch.float32, weights=case.weights or (1.0,) * views)
    args, modes = Ops(device).call(case, case.tokens(), "device")
    tokens, offsets, grid, patch, weights = args
    expected = srt_ext.ensemble(tokens, offsets, grid, patch, weights, **modes)
    wide = torch.full((views, 3, 2), NAN, dtype=dtype, device=device)
    wide[:, 1], wide[:, 0, 1] = offsets, weights
    transposed = offsets.to(dtype).t().contiguous().t()
    for strided in (wide[:, 1], transposed):
        field = srt_ext.ensemble(tokens, strided, grid, patch, wide[:, 0, 1], **modes)
        assert torch.equal(field, expected)


# ---- properties ---------------------------------------------------------------------------------


def bound(case: Ensemble, tokens: torch.Tensor) -> torch.Tensor:
    return EnsembleBounds(case, tokens).mean()


def counted(case: Ensemble) -> torch.Tensor:
    """[H', W'], whether some pixel of the cell is covered by a view of weight > 0."""
    seen = torch.zeros(case.pixels, dtype=torch.bool)
    for v, (dy, dx) in enumerate(case.offsets):
        if case.weights is not None and case.weights[v] == 0:
            continue
        y, x = (
            torch.arange(n, dtype=torch.float64) + 0.5 + d
            for n, d in zip(case.pixels, (dy, dx), strict=True)
        )
        inside_y, inside_x = (y >= 0) & (y < case.pixels[0]), (x >= 0) & (x < case.pixels[1])
        seen |= inside_y[:, None] & inside_x
    height, width = case.shape[2:]
    return seen.reshape(height, case.stride[0], width, case.stride[1]).any(3).any(1)


@given(ensembles(value_dtype=torch.float64), st.sampled_from(("coverage", "clamp")))
def test_constant_stays_constant(case: Ensemble, border: str) -> None:
    case = replace(case, border=border)
    value = -1.7
    ones = torch.ones_like(case.tokens(torch.float64))
    if border == "coverage":
        somewhere = counted(case)
    else:
        somewhere = torch.tensor(case.weights is None or max(case.weights) > 0)
    expected = (value * somewhere.double()).expand(case.shape)
    assert_within_rounding(run(case, value * ones), expected, bound(case, value * ones))


@given(ensembles())
def test_zero_where_no_view_counts(case: Ensemble) -> None:
    case = replace(case, border="coverage", value_dtype=torch.float64)
    field = run(case, case.tokens())
    empty = (~counted(case)).expand(case.shape)
    assert (field[empty] == 0).all()


@pytest.mark.parametrize("border", ["coverage", "zeros"])
@each_dtype
def test_zero_beyond_the_image(border: str, dtype: torch.dtype, backend: Backend) -> None:
    case = replace(SAMPLES["beyond"], border=border, offsets=((12.0, 0.0), (0.0, -30.0)))
    field = backend.ensemble(case, case.tokens(dtype))
    assert torch.equal(field, torch.zeros(case.shape, dtype=dtype))


@each_border
def test_zero_if_all_weights_are_zero(border: str, backend: Backend) -> None:
    case = replace(SAMPLES["one_view"], weights=(0.0,), border=border)
    assert not backend.ensemble(case, torch.full_like(case.tokens(), NAN)).any()


@given(ensembles())
def test_linear(case: Ensemble) -> None:
    a, b = case.tokens(torch.float64), replace(case, seed=case.seed + 1).tokens(torch.float64)
    expected = 2 * run(case, a) - 3 * run(case, b)
    # Both sides, of tokens of this size; once more for 2 a - 3 b and the difference of two fields.
    bounds = 3 * bound(case, 2 * a.abs() + 3 * b.abs())
    assert_within_rounding(run(case, 2 * a - 3 * b), expected, bounds)


@given(ensembles(), st.randoms(use_true_random=False))
def test_order_of_views(case: Ensemble, random: object) -> None:
    order = list(range(len(case.offsets)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = replace(
        case,
        offsets=tuple(case.offsets[v] for v in order),
        weights=case.weights and tuple(case.weights[v] for v in order),
    )
    tokens = case.tokens(torch.float64)
    bounds = 2 * bound(case, tokens)
    assert_within_rounding(run(permuted, tokens[order]), run(case, tokens), bounds)


@given(ensembles(border="zeros"), st.data())
def test_chunks_of_views_add_up(case: Ensemble, data: st.DataObject) -> None:
    """Under zeros every view counts everywhere, so means recombine by the chunks' total weights."""
    views = len(case.offsets)
    weights = case.weights or (1.0,) * views
    split = data.draw(st.integers(1, views - 1)) if views > 1 else 1
    tokens = case.tokens(torch.float64)
    total = torch.zeros(case.shape, dtype=torch.float64)
    for chunk in (slice(0, split), slice(split, views)):
        if chunk.start == views:
            continue
        part = replace(case, offsets=case.offsets[chunk], weights=weights[chunk])
        scale = torch.tensor(weights[chunk], dtype=case.value_dtype).double().sum()
        total += scale * run(part, tokens[chunk])
    scale = torch.tensor(weights, dtype=case.value_dtype).double().sum()
    expected = total / scale if scale > 0 else total
    # A chunk is a part of the call: it is rounded no more often. Once more for the sums of weights,
    # the product, the sum and the quotient: 2 * views + 3 roundings.
    assert_within_rounding(run(case, tokens), expected, 3 * bound(case, tokens))


@given(ensembles())
def test_stride_is_the_ratio_of_pooled_sums(case: Ensemble) -> None:
    tokens = case.tokens(torch.float64)
    sums = replace(
        case, stride=(1, 1), border="zeros" if case.border == "coverage" else case.border
    )

    def pooled(values: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(run(sums, values), case.stride)

    count = torch.ones(())
    if case.border == "coverage":
        count = pooled(torch.ones_like(tokens))
    expected = torch.where(count > 0, pooled(tokens) / count, 0)
    # Three fields, one of them of ones; once more for two sums over a cell, their quotients by its
    # size, and the quotient of both. The bound counts every pixel of a cell; ``sums`` has one.
    assert_within_rounding(run(case, tokens), expected, 4 * bound(case, tokens))


WHOLE_PATCHES = ((0, 0), (1, 0), (0, -1), (-2, 3), (4, 6))  # in patches; the grid is 3 x 5


@pytest.mark.parametrize("stride", [(1, 1), (4, 6)])
def test_rolled_tokens_come_back(stride: tuple[int, int], cpu_kernels: str) -> None:
    case = replace(
        SAMPLES["grid"],
        offsets=tuple((4.0 * y, 6.0 * x) for y, x in WHOLE_PATCHES),
        upsample="nearest",
        stride=stride,
    )
    maps = case.tokens(torch.float64)[0].reshape(2, 3, 5, -1)
    tokens = torch.stack([maps.roll(shift, (1, 2)) for shift in WHOLE_PATCHES]).flatten(2, 3)
    expected = maps.permute(0, 3, 1, 2)
    expected = expected.repeat_interleave(4 // stride[0], 2).repeat_interleave(6 // stride[1], 3)
    assert_within_rounding(run(case, tokens), expected, bound(case, tokens))


# ---- containment --------------------------------------------------------------------------------


@each_dtype
@each_sample
@each_tile
def test_containment(case: Ensemble, dtype: torch.dtype, backend: Backend) -> None:
    for channels in (16, case.channels):
        case = replace(case, channels=channels)
        tokens = poison(case.tokens(dtype), 1)
        check_containment(partial(backend.ensemble, case), tokens, oracle(case, tokens))
    if case.weights is not None:
        tokens = case.tokens(dtype).clone()
        tokens[1] = NAN
        assert case.weights[1] == 0
        assert backend.ensemble(case, tokens).isfinite().all()


@each_tile
@given(ensembles(), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_containment_of_any_call(
    backend: Backend, case: Ensemble, dtype: torch.dtype, seed: int
) -> None:
    tokens = poison(case.tokens(dtype), seed)
    check_containment(partial(backend.ensemble, case), tokens, oracle(case, tokens))


def test_containment_where_coordinates_round(backend: Backend) -> None:
    """y + 0.5 + d rounds up: a token lies between those that two pixels of a cell read."""
    case = Ensemble(
        grid=(4, 4),
        patch=(1, 1),
        offsets=((0.5 - 2.0**-53, 0.5 - 2.0**-53),),
        stride=(2, 2),
        upsample="nearest",
        value_dtype=torch.float64,
    )
    for token in range(16):
        tokens = case.tokens()
        tokens[:, :, token] = NAN
        check_containment(partial(backend.ensemble, case), tokens, oracle(case, tokens))


def test_a_token_reaches_the_cells_that_read_it(backend: Backend) -> None:
    """Spelled out, without the oracle: patch 4, one view moved by one pixel."""
    tokens = torch.zeros(1, 1, 4, 3)
    tokens[0, 0, 1] = float("inf")
    case = Ensemble((1, 4), (1, 4), ((0.0, 1.0),), channels=3, batch=1)
    # Bilinear: p / 4 - 0.5 lies in (0, 2) for x + 1.5 in (2, 10).
    for upsample, cells in (("nearest", [3, 4, 5, 6]), ("bilinear", list(range(1, 9)))):
        field = backend.ensemble(replace(case, upsample=upsample), tokens)
        assert (~field[0, 0, 0].isfinite()).nonzero().flatten().tolist() == cells


# ---- threads, layouts, memory -------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("stride", [1, 4])
def test_same_bits_over_threads(
    stride: int, dtype: torch.dtype, threads: Callable[[int], None], cpu_kernels: str
) -> None:
    # Large enough to be split over threads.
    case = Ensemble((7, 9), (8, 8), channels=133, stride=(stride, stride))
    tokens = case.tokens(dtype)
    fields = []
    for count in (1, 2, 3, 7):
        threads(count)
        fields.append(run(case, tokens))
    assert all(torch.equal(fields[0], field) for field in fields[1:])


def test_a_channel_that_is_nan_changes_no_bit_of_others(cpu_kernels: str) -> None:
    """Not even the sign of a zero, where products underflow."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 2, 36, 128, generator=generator).sign() * 2.0**-149
    tokens[torch.rand(tokens.shape, generator=generator) < 0.3] = 0
    case = Ensemble((6, 6), (5, 5), offsets=((0.3, -3.7), (2.1, 1.4), (-1.6, 3.9)), stride=(2, 2))
    clean = run(case, tokens)[:, :127]
    tokens[..., 127] = float("nan")
    field = run(case, tokens)
    assert field[:, 127].isnan().all()
    bits = field[:, :127].contiguous().view(torch.int32)
    assert torch.equal(bits, clean.contiguous().view(torch.int32))


@pytest.mark.parametrize("grid", [(2, 3), (1, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize(("batch", "channels"), [(2, 5), (1, 1), (0, 5), (2, 0), (0, 0), (1, 64)])
@each_device
def test_exact_strides(device: str, batch: int, channels: int, grid: tuple[int, int]) -> None:
    for stride in ((1, 1), (2, 3), (grid[0] * 2, grid[1] * 3)):
        case = Ensemble(grid, (2, 3), batch=batch, channels=channels, stride=stride)
        tokens = torch.ones(9, batch, grid[0] * grid[1], channels, device=device)
        args, modes = case.call(tokens)
        field = srt_ext.ensemble(*args, **modes)
        _, _, height, width = case.shape
        assert tuple(field.shape) == case.shape
        assert field.stride() == (height * width * channels, 1, width * channels, channels)
        assert (field == 1).all()
        assert srt_ext.ensemble(*args, **modes, out=field.zero_()) is field
        assert (field == 1).all()


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["grid", "stride", "one_token", "wide"])
@each_tile
def test_out(name: str, layout: str, dtype: torch.dtype, backend: Backend) -> None:
    for channels in (SAMPLES[name].channels, 16):
        case = replace(SAMPLES[name], channels=channels)
        tokens = case.tokens(dtype)
        field = backend.ensemble(case, tokens, layout=layout)
        backend.assert_same(field, backend.ensemble(case, tokens))


def test_a_result_that_gets_its_pages_first() -> None:
    """Of 34 MB and no whole number of pages: the same bits as in a buffer that has them."""
    tokens, offsets = torch.randn(3, 1, 10 * 10, 377), srt_ext.views.grid(1)[::4]
    field = srt_ext.ensemble(tokens, offsets, (10, 10), (15, 15))
    assert field.nbytes > 2**25
    assert field.nbytes % 4096
    out = torch.empty_like(field).fill_(float("nan"))
    assert torch.equal(srt_ext.ensemble(tokens, offsets, (10, 10), (15, 15), out=out), field)


@given(ensembles(), st.sampled_from(("expanded views", "expanded batch", "permuted", "steps")))
def test_strides_of_tokens(backend: Backend, case: Ensemble, layout: str) -> None:
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
    field = backend.ensemble(case, tokens)
    check_ensemble(case, tokens, field)
    backend.assert_same(field, backend.ensemble(case, tokens.contiguous()))


@each_dtype
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 31, 32, 33, 64, 130, 384])
@each_gpu_tile
def test_unaligned_tokens(channels: int, dtype: torch.dtype, backend: Backend) -> None:
    """Bases and strides that are no multiples of 16 bytes, of 4, or of 2 elements."""
    case = Ensemble(channels=channels, batch=1, patch=(2, 3))
    for begin, wide in ((0, 0), (1, 0), (1, 2), (4, 4), (3, 16), (8, 8)):
        tokens = torch.randn(9, 1, 3 + 15, begin + channels + wide).to(dtype)
        tokens = tokens[:, :, 3:, begin : begin + channels]
        check_ensemble(case, tokens, backend.ensemble(case, tokens))


@each_device
def test_one_channel_may_have_any_stride(device: str) -> None:
    case = replace(SAMPLES["grid"], channels=1)
    tokens = case.tokens()
    strided = torch.stack([tokens, tokens + 1], -1)[..., 0]
    assert strided.stride(3) == 2
    ops = Ops(device)
    assert torch.equal(ops.ensemble(case, strided), ops.ensemble(case, tokens))


def test_tokens_are_not_copied_when_expanded() -> None:
    """A dense copy would take terabytes. All but the first views have weight 0, to be quick."""
    views = 2**20
    full = torch.randn(1, 2, 5 + 12, 2**16).expand(views, -1, -1, -1)
    weights = torch.zeros(views)
    weights[:3] = 1
    tokens = full[:, :, 5:]
    assert tokens.numel() * tokens.element_size() > 2**40
    args = (torch.zeros(views, 2), (3, 4), (2, 2), weights)
    field = srt_ext.ensemble(tokens, *args, stride=(6, 8))
    dense = srt_ext.ensemble(tokens[:3].contiguous(), args[0][:3], *args[1:3], stride=(6, 8))
    assert torch.equal(field, dense)


STRIDED = """
import srt_ext
full = torch.ones({views}, 1, 1 + 1024, 1024, dtype=torch.{dtype})
offsets = torch.zeros({views}, 2)
call = lambda tokens, side: srt_ext.ensemble(tokens, offsets[:len(tokens)], (side, side), (2, 2),
                                             stride=2 * side)
call(full[:1, :, 1:5], 2)
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(("dtype", "views"), [("float16", 48), ("float32", 24)])
def test_strided_tokens_are_not_copied(dtype: str, views: int) -> None:
    """The peak of a process's memory grows by far less than ``full[:, :, prefix:]`` takes."""
    setup = STRIDED.format(dtype=dtype, views=views)
    taken, _ = peak_of(setup, "call(full[:, :, 1:], 32)", "(result == 1).all()")
    assert taken < views * 1024 * 1024 * getattr(torch, dtype).itemsize / 4
