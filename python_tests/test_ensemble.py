"""ensemble and the gradient of its mean: golden outputs, shapes that kernels split, layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backends import (
    GPU,
    LAYOUTS,
    Backend,
    CudaOnHost,
    Ops,
    each_device,
    each_gpu,
    each_kernel,
)
from budget import assert_within_rounding
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    Spoilt,
    bound_of,
    check,
    check_contained,
    check_containment,
    check_rounding,
    check_sample,
    values_of,
)
from oracle import ensemble as oracle
from samples import (
    DTYPES,
    ENSEMBLES,
    UPSAMPLES,
    Ensemble,
    Pairs,
    each_border,
    each_dtype,
    ensembles,
    pairwise,
)

import srt_ext

NAN = float("nan")


@pytest.mark.parametrize("name", ["mean_p16_r3", "mean_p14_r2x4", "fast_p16_r3", "median_p16_r6"])
def test_golden(name: str, cpu_kernels: str) -> None:
    """Outputs of the published code."""
    path = SHARED / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"evaluation data, not in the repository: {path.name}")
    file = {key: torch.from_numpy(values) for key, values in np.load(path).items()}
    grid, patch = file["grid"].tolist(), file["patch"].tolist()
    median = name.startswith("median")
    modes = {"reduce": "median"} if median else {"stride": patch}
    args = (file["tokens"], file["offsets"], grid, patch)
    field = srt_ext.ensemble(*args, upsample="nearest", border="zeros", **modes)
    # The published code sums in float32 in another order.
    atol = 0 if median else 1e-5
    torch.testing.assert_close(field[0].permute(1, 2, 0), file["output"], rtol=0, atol=atol)


@each_kernel("mean", "mean_backward", backends=GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_border
@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("offsets", ["grid", "real"])
def test_tiles_of_a_real_shape(
    offsets: str, upsample: str, border: str, dtype: torch.dtype, kernel: str, backend: Backend
) -> None:
    """Several tiles along every axis, several rounds of columns, several kinks per interval.

    In the gradient, windows of many cells.
    """
    case = replace(ENSEMBLES[offsets], grid=(3, 5), patch=(16, 16), batch=1, channels=72)
    case = replace(case, upsample=upsample, border=border)
    check_sample(kernel, backend, case, dtype)
    check_containment(kernel, backend, case, dtype, 2)


@pytest.mark.parametrize("grid", [(3, 21), (5, 37)])
def test_positions_far_from_0_in_float64(grid: tuple[int, int], backend: Backend) -> None:
    """An error of weights that grows with the position would show in cells between tokens."""
    for seed in range(5):
        case = Ensemble(grid, (2, 26), ((0.3, 0.7),), channels=8, seed=seed)
        tokens = case.tokens(torch.float64)
        check("mean", case, tokens, backend.ensemble(case, tokens))


@each_border
def test_zero_if_all_weights_are_zero(border: str, backend: Backend) -> None:
    case = replace(ENSEMBLES["one_view"], weights=(0.0,), border=border)
    assert not backend.ensemble(case, torch.full_like(case.tokens(), NAN)).any()


# ---- the walk of the mean from pixel to pixel ---------------------------------------------------

_FAR_VIEWS: Pairs = ((-25.0, 24.9), (7.1, -20.7), (0.3, 15.4), (-14.6, -3.9), (20.0, 8.2))
_WHOLE_VIEWS: Pairs = ((-7.0, 6.0), (-3.0, 1.0), (0.0, 0.0), (5.0, -8.0), (8.0, -3.0))


@pytest.mark.parametrize("offsets", [_FAR_VIEWS, _WHOLE_VIEWS], ids=["far", "whole"])
@pytest.mark.parametrize("patch", [(14, 14), (16, 16), (32, 32), (20, 3)], ids=str)
def test_error_budget_of_real_patches(
    patch: tuple[int, int], offsets: Pairs, backend: Backend
) -> None:
    case = Ensemble((2, 3), patch, offsets, channels=40, batch=1)
    for upsample in UPSAMPLES:
        check_sample("mean", backend, replace(case, upsample=upsample), torch.float32)


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("patch", [(14, 14), (16, 16), (32, 32)], ids=str)
def test_a_large_token_stays_with_its_cells(
    patch: tuple[int, int], upsample: str, backend: Backend
) -> None:
    """Cells that do not read it change by at most 2^-22 of it: the rounding of a sum near it."""
    case = Ensemble((2, 5), patch, _FAR_VIEWS, channels=8, batch=1, upsample=upsample)
    tokens = case.tokens()
    without = tokens.clone()
    without[:, :, 7] = 0
    tokens[:, :, 7] *= 1000
    beyond = oracle(case, (tokens != without).double()) == 0
    change = backend.ensemble(case, tokens) - backend.ensemble(case, without)
    assert beyond.any()
    assert change[beyond].abs().max() <= 2.0**-22 * tokens[:, :, 7].abs().max()


@pytest.mark.parametrize(("patch", "dx"), [(5, (3.0, 4.0)), (16, (8.5, 7.5))])
def test_a_large_token_stays_with_its_interval(
    patch: int, dx: tuple[float, float], backend: Backend
) -> None:
    """Also where a view passes the centre of a token in the last pixel of an interval.

    A token above 2^63 is excluded: near it the CPU computes the sums again, in another order.
    """
    case = Ensemble((1, 24), (4, patch), tuple((0.0, x) for x in dx), channels=8, batch=1)
    tokens = case.tokens()
    clean = backend.ensemble(case, tokens)
    for token in range(0, 24, 5):
        large = tokens.clone()
        large[1, :, token] = 1e15
        change = backend.ensemble(case, large) != clean
        assert not change[..., : max(0, token - 2) * patch].any()
        assert not change[..., (token + 3) * patch :].any()


def test_a_view_that_ends_leaves_no_rounding_error(backend: Backend) -> None:
    """It would exceed the value of the other view, whose weight is 2^-70 of that of the first."""
    case = Ensemble((1, 3), (16, 16), ((0.0, 5.0), (0.0, -3.0)), weights=(1.0, 2.0**-70))
    tokens = case.tokens()
    alone = replace(case, weights=(0.0, 1.0))
    field = backend.ensemble(case, tokens)[..., -5:]
    bound = bound_of("mean", alone, tokens).expand(case.shape)[..., -5:]
    assert_within_rounding(field, oracle(alone, tokens)[..., -5:], bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e19, 1e30])
def test_values_above_2_to_the_63(size: float, dtype: torch.dtype, backend: Backend) -> None:
    case = ENSEMBLES["real"]
    tokens = (size * case.tokens()).to(dtype)
    check("mean", case, tokens, backend.ensemble(case, tokens))


def test_values_near_the_largest_number(backend: Backend) -> None:
    """The field is finite although its steps exceed the largest number."""
    case = Ensemble((2, 4), (16, 16), ((0.0, 0.0),), channels=8, batch=1)
    tokens = case.tokens().sign() * torch.finfo(torch.float32).max
    assert backend.ensemble(case, tokens).isfinite().all()


# ---- the variance -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.5, 1e-3, 7.0)])
def test_variance_with_a_large_mean(weights: tuple[float, ...] | None, backend: Backend) -> None:
    """The mean is 1e4 times the spread: in float32, E[x^2] - E[x]^2 would lose all digits."""
    case = replace(ENSEMBLES["real"], weights=weights, upsample="nearest")
    tokens = 1e4 + case.tokens()
    mean, var = backend.ensemble(case, tokens, reduce="moments")
    true_mean, true_var = oracle(case, tokens, "moments")
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=0)
    # The tokens themselves are exact; the mean of 1e4 is rounded by 6e-4.
    assert ((var - true_var).abs() <= 1e-4 * true_var + 1e-5).all()


def test_one_view_has_no_variance(backend: Backend) -> None:
    case = ENSEMBLES["one_view"]
    _, var = backend.ensemble(case, case.tokens(), reduce="moments")
    assert torch.equal(var, torch.zeros(case.shape))


# ---- containment --------------------------------------------------------------------------------


def test_containment_where_coordinates_round(backend: Backend) -> None:
    """y + 0.5 + d rounds up: two pixels of a cell read tokens that are not neighbours."""
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
        check_contained("mean", backend, case, Spoilt.of("mean", case, tokens))


def test_a_token_reaches_the_cells_that_read_it(backend: Backend) -> None:
    """Expected cells written out, without the oracle: patch 4, one view shifted by a pixel."""
    tokens = torch.zeros(1, 1, 4, 3)
    tokens[0, 0, 1] = float("inf")
    case = Ensemble((1, 4), (1, 4), ((0.0, 1.0),), channels=3, batch=1)
    # Bilinear: p / 4 - 0.5 lies in (0, 2) for x + 1.5 in (2, 10).
    for upsample, cells in (("nearest", [3, 4, 5, 6]), ("bilinear", list(range(1, 9)))):
        field = backend.ensemble(replace(case, upsample=upsample), tokens)
        assert (~field[0, 0, 0].isfinite()).nonzero().flatten().tolist() == cells


# ---- threads, layouts, memory -------------------------------------------------------------------


def test_a_channel_that_is_nan_changes_no_bit_of_others(cpu_kernels: str) -> None:
    """Not even the sign of a zero where products underflow."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 2, 36, 128, generator=generator).sign() * 2.0**-149
    tokens[torch.rand(tokens.shape, generator=generator) < 0.3] = 0
    case = Ensemble((6, 6), (5, 5), offsets=((0.3, -3.7), (2.1, 1.4), (-1.6, 3.9)), stride=(2, 2))
    clean = Ops("cpu").ensemble(case, tokens)[:, :127]
    tokens[..., 127] = float("nan")
    field = Ops("cpu").ensemble(case, tokens)
    assert field[:, 127].isnan().all()
    bits = field[:, :127].contiguous().view(torch.int32)
    assert torch.equal(bits, clean.contiguous().view(torch.int32))


@each_dtype
def test_large_results_are_equal_at_any_alignment(dtype: torch.dtype, cpu_kernels: str) -> None:
    """Aligned results of at least 32 MB are written with non-temporal stores."""
    channels = 960 // dtype.itemsize
    case = Ensemble((2, 10), (16, 16), ((0.0, 0.0), (3.0, -5.5)), channels=channels, batch=7)
    tokens = case.tokens().to(dtype)
    field = Ops("cpu").ensemble(case, tokens)
    assert field.data_ptr() % 64 == 0
    assert field.nbytes >= 2**25
    assert torch.equal(field, Ops("cpu").ensemble(case, tokens, layout="padded"))


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


@each_kernel("mean", "median")
@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    pairwise(("grid", "stride", "one_token", "wide", "nearest"), LAYOUTS, DTYPES),
)
def test_out(name: str, layout: str, dtype: torch.dtype, backend: Backend, kernel: str) -> None:
    for channels in (ENSEMBLES[name].channels, 16):
        case = replace(ENSEMBLES[name], channels=channels)
        tokens = case.tokens(dtype)
        field = backend.ensemble(case, tokens, reduce=kernel, layout=layout)
        backend.assert_same(field, backend.ensemble(case, tokens, reduce=kernel))


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
    check("mean", case, tokens, field)
    backend.assert_same(field, backend.ensemble(case, tokens.contiguous()))


@each_dtype
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 31, 32, 33, 64, 130, 384])
def test_unaligned_tokens(channels: int, dtype: torch.dtype, backend: Backend) -> None:
    """Addresses and strides that are not multiples of 16 bytes, of 4 or of 2 elements."""
    case = Ensemble(channels=channels, batch=1, patch=(2, 3))
    for begin, wide in ((0, 0), (1, 0), (1, 2), (4, 4), (3, 16), (8, 8)):
        whole = torch.full((9, 1, 3 + 15, begin + channels + wide), NAN, dtype=dtype)
        tokens = whole[:, :, 3:, begin : begin + channels].copy_(case.tokens(dtype))
        check_rounding("mean", case, dtype, backend.ensemble(case, tokens))


@each_device
def test_one_channel_may_have_any_stride(device: str) -> None:
    case = replace(ENSEMBLES["grid"], channels=1)
    tokens = case.tokens()
    strided = torch.stack([tokens, tokens + 1], -1)[..., 0]
    assert strided.stride(3) == 2
    ops = Ops(device)
    assert torch.equal(ops.ensemble(case, strided), ops.ensemble(case, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tokens_are_not_copied(dtype: torch.dtype) -> None:
    """A dense copy would take terabytes. Most views have weight 0, which keeps the test fast."""
    views = 2**20
    full = torch.randn(1, 2, 5 + 12, 2**16).to(dtype).expand(views, -1, -1, -1)
    weights = torch.zeros(views)
    weights[:3] = 1
    tokens = full[:, :, 5:]
    assert tokens.numel() * tokens.element_size() >= 2**40
    args = (torch.zeros(views, 2), (3, 4), (2, 2), weights)
    field = srt_ext.ensemble(tokens, *args, stride=(6, 8))
    dense = srt_ext.ensemble(tokens[:3].contiguous(), args[0][:3], *args[1:3], stride=(6, 8))
    assert torch.equal(field, dense)


# ---- the gradient of the mean -------------------------------------------------------------------


@each_border
@pytest.mark.parametrize("processors", [1, 7, 1000])
@each_gpu
def test_gradients_for_any_number_of_processors(
    processors: int, border: str, backend: Backend
) -> None:
    if isinstance(backend, CudaOnHost):
        backend.gpu.processors = processors
    case = replace(ENSEMBLES["grid"], grid=(13, 3), patch=(4, 4), channels=8, border=border)
    check_sample("mean_backward", backend, case, torch.float32)


@each_border
def test_gradients_of_distant_views(border: str, backend: Backend) -> None:
    """Views so far apart that the windows of tokens neither overlap nor follow in order."""
    offsets = tuple((y, x) for y in (-40.0, 0.0, 37.5) for x in (0.0, 100.0, -61.25))
    case = Ensemble((7, 6), (8, 16), offsets, channels=8, border=border)
    check_sample("mean_backward", backend, case, torch.float32)


@each_dtype
def test_gradients_of_any_strides(dtype: torch.dtype, backend: Backend) -> None:
    for channels in (16, 19):
        case = replace(ENSEMBLES["stride"], channels=channels)
        grad = values_of("mean_backward", case, dtype)
        grad = grad.contiguous(memory_format=torch.channels_last)
        expected = backend.mean_backward(case, grad)
        b, c, h, w = case.shape
        wide = torch.full((b, h, w + 1, c + 16), NAN, dtype=dtype).permute(0, 3, 1, 2)
        shifted = torch.empty(1 + grad.numel(), dtype=dtype)[1:]
        for strided in (
            wide[:, :c, :, :w],
            wide[:, 1 : c + 1, :, 1:],  # not aligned
            shifted.view(b, h, w, c).permute(0, 3, 1, 2),
        ):
            backend.assert_same(backend.mean_backward(case, strided.copy_(grad)), expected)
        # An expanded gradient, as that of a sum over pixels.
        constant = grad[:1, :, :1, :1].expand(case.shape)
        check("mean_backward", case, constant, backend.mean_backward(case, constant))
