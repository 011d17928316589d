"""The kernels of the gradients, of the mean and of shift: against autograd through the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from backends import Backend, CudaOnHost, Place, each_gpu
from bounds import EnsembleBounds, ShiftBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from oracle import check_containment, large_enough
from oracle import mean_gradient as mean_oracle
from oracle import shift_gradient as shift_oracle
from samples import (
    DTYPES,
    ENSEMBLES,
    FAR,
    NO_OFFSETS,
    Ensemble,
    Shift,
    each_border,
    each_dtype,
    each_ensemble,
    each_interpolation,
    each_padding,
    each_shift,
    ensembles,
    poison,
    random_views,
    shifts,
)

NAN = float("nan")


def gradient_of(case: Ensemble | Shift, dtype: torch.dtype) -> torch.Tensor:
    """Of the result, at random."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)


def oracle(
    case: Ensemble | Shift, grad: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return (shift_oracle if isinstance(case, Shift) else mean_oracle)(case, grad, dtype)


def backward(
    backend: Backend, case: Ensemble | Shift, grad: torch.Tensor, place: Place = "host"
) -> torch.Tensor:
    if isinstance(case, Shift):
        return backend.shift_backward(case, grad, place=place)
    return backend.mean_backward(case, grad, place=place)


@lru_cache(32)  # the same for every backend
def poisoned(case: Ensemble | Shift, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient with cells or pixels that are not finite, and the oracle's."""
    grad = poison(gradient_of(case, dtype)[..., None], 1)[..., 0]
    return grad, oracle(case, grad)


def bound_of(case: Ensemble | Shift, grad: torch.Tensor) -> torch.Tensor:
    if isinstance(case, Shift):
        return ShiftBounds(case, grad.dtype).gradient(grad)
    return EnsembleBounds(case, case.tokens(grad.dtype)).mean_gradient(grad)


def check(case: Ensemble | Shift, grad: torch.Tensor, actual: torch.Tensor) -> None:
    """By forward error bounds."""
    assert_within_rounding(actual, oracle(case, grad), bound_of(case, grad))


@lru_cache(128)  # the same for every backend
def expected_of(case: Ensemble | Shift, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    grad = gradient_of(case, dtype)
    return oracle(case, grad), bound_of(case, grad), oracle(case, grad, torch.float32).to(dtype)


def check_sample(
    case: Ensemble | Shift, dtype: torch.dtype, backend: Backend, place: Place = "host"
) -> None:
    """Of a fixed sample and its ``gradient_of``: by the oracle's own error, too."""
    actual = backward(backend, case, gradient_of(case, dtype), place)
    truth, bound, same = expected_of(case, dtype)
    assert_within_rounding(actual, truth, bound)
    if dtype != torch.float64:
        assert_within_budget(actual, truth, same)


# ---- mean ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("channels", [None, pytest.param(40, marks=pytest.mark.slow)])
@each_ensemble
def test_mean(case: Ensemble, channels: int | None, dtype: torch.dtype, backend: Backend) -> None:
    case = replace(case, channels=channels or case.channels)
    check_sample(large_enough(case, dtype), dtype, backend)


@given(
    ensembles(),
    st.sampled_from(DTYPES),
    st.sampled_from((None, 1, 3, 8, 33)),
    st.sampled_from(("host", "device")),
    st.sampled_from((1, 2, 132)),
)
def test_any_mean(
    backend: Backend,
    case: Ensemble,
    dtype: torch.dtype,
    channels: int | None,
    place: str,
    processors: int,
) -> None:
    if isinstance(backend, CudaOnHost):
        backend.gpu.processors = processors
    place = place if place in backend.places else "host"
    case = replace(case, channels=channels or case.channels)
    grad = gradient_of(case, dtype)
    check(case, grad, backend.mean_backward(case, grad, place=place))


@each_border
@pytest.mark.parametrize(
    ("upsample", "dtype"), [("nearest", torch.float32), ("bilinear", torch.bfloat16)]
)
@pytest.mark.parametrize("offsets", ["grid", "real"])
@each_gpu
def test_tokens_of_a_real_size(
    offsets: str, upsample: str, dtype: torch.dtype, border: str, backend: Backend
) -> None:
    """Several tiles along every axis, and windows of many cells."""
    case = replace(ENSEMBLES[offsets], grid=(3, 5), patch=(16, 16), batch=1, channels=40)
    case = replace(case, upsample=upsample, border=border)
    check_sample(case, dtype, backend)


@each_border
@pytest.mark.parametrize("processors", [1, 7, 1000])
@each_gpu
def test_segments(processors: int, border: str, backend: Backend) -> None:
    if isinstance(backend, CudaOnHost):
        backend.gpu.processors = processors
    case = replace(ENSEMBLES["grid"], grid=(13, 3), patch=(4, 4), channels=8, border=border)
    check_sample(case, torch.float32, backend)


@each_border
def test_windows_that_open_behind_others(border: str, backend: Backend) -> None:
    """Views so far apart that tokens are not read in their order, and not at one time."""
    offsets = tuple((y, x) for y in (-40.0, 0.0, 37.5) for x in (0.0, 100.0, -61.25))
    case = Ensemble((7, 6), (8, 16), offsets, channels=8, border=border)
    check_sample(case, torch.float32, backend)


@pytest.mark.parametrize("step", [2.0**-10, 2])
@pytest.mark.parametrize("views", [8, 50, 160])
def test_many_views(views: int, step: float, backend: Backend) -> None:
    """Several parts; more views of one dx than an entry has; more than the parameters hold."""
    weights = tuple(torch.rand(views, generator=torch.Generator().manual_seed(views)).tolist())
    for given_weights in (None, weights):
        case = Ensemble((2, 2), (4, 4), random_views(views, step), 8, 2, weights=given_weights)
        case = replace(case, value_dtype=torch.float64)
        for place in backend.places:
            check_sample(case, torch.float32, backend, place)


@each_dtype
def test_gradients_of_any_strides(dtype: torch.dtype, backend: Backend) -> None:
    for channels in (16, 19):
        case = replace(ENSEMBLES["stride"], channels=channels)
        grad = gradient_of(case, dtype).contiguous(memory_format=torch.channels_last)
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
        # What the gradient of a sum over pixels is expanded to.
        constant = grad[:1, :, :1, :1].expand(case.shape)
        check(case, constant, backend.mean_backward(case, constant))


@each_dtype
@each_gpu
def test_same_bits_wherever_offsets_and_weights_are(dtype: torch.dtype, backend: Backend) -> None:
    # float32 values, which both dtypes hold.
    weights = (1.0, 0.0, 2.5, 0.125, 7.0)
    case = replace(ENSEMBLES["real"], offsets=random_views(5), weights=weights, channels=16)
    grad = gradient_of(case, dtype)
    expected = backend.mean_backward(case, grad)
    for value_dtype in (torch.float32, torch.float64):
        case = replace(case, value_dtype=value_dtype)
        for place in ("device", ("host", "device")):
            assert torch.equal(backend.mean_backward(case, grad, place=place), expected)


@each_border
@each_gpu
def test_invalid_views_get_nothing(border: str, backend: Backend) -> None:
    good = replace(ENSEMBLES["real"], border=border, weights=(1.0, 3.0, 0.5, 2.0, 1.0), channels=16)
    good = replace(good, value_dtype=torch.float64)
    bad_weights = (NAN, -1.0, float("inf"), float("-inf"), 3.0 * 2.0**-81, 0.0)
    ordinary = ((0.0, 0.0),) * len(bad_weights)
    case = replace(
        good,
        offsets=NO_OFFSETS[:3] + good.offsets + NO_OFFSETS[3:] + ordinary,
        weights=(1.0,) * 3 + good.weights + (1.0,) * len(NO_OFFSETS[3:]) + bad_weights,
    )
    grad = gradient_of(good, torch.float32)
    actual = backend.mean_backward(case, grad, place="device")
    backend.assert_same(actual[3:8], backend.mean_backward(good, grad))
    actual[3:8] = 0
    assert not actual.any()
    none = replace(case, offsets=NO_OFFSETS, weights=None)
    assert not backend.mean_backward(none, grad, place="device").any()


@each_dtype
@each_ensemble
def test_containment_of_mean(case: Ensemble, dtype: torch.dtype, backend: Backend) -> None:
    """What is not finite reaches only the tokens that a cell reads, and changes no other one."""
    for channels in (16, case.channels):
        case = replace(case, channels=channels)
        run = partial(backend.mean_backward, case)
        check_containment(run, *poisoned(case, dtype), backend.assert_same)


# ---- shift --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("size", [None, (19, 70), (2, 300)], ids=str)
@each_shift
def test_shift(
    case: Shift, size: tuple[int, int] | None, dtype: torch.dtype, backend: Backend
) -> None:
    case = replace(case, size=size or case.size)
    check_sample(case, dtype, backend)


@each_padding
@each_interpolation
def test_every_mode_of_shift(interpolation: str, padding: str, backend: Backend) -> None:
    offsets = ((0.3, -0.6), (9.0, 2.0), (-31.4, 50.2), (FAR, 1.5), (0.0, -FAR), (-1.0, 36.0))
    sizes = ((7, 37), (1, 40), (40, 1), (2, 3), (1, 1))
    for size, dtype in zip(sizes, itertools.cycle(DTYPES), strict=False):
        case = Shift(size, offsets, padding=padding, interpolation=interpolation)
        case = replace(case, batch=max(2, 128 // (case.channels * size[0] * size[1])))
        check_sample(case, dtype, backend)


@given(
    shifts(),
    st.sampled_from(DTYPES),
    st.sampled_from(("host", "device")),
    st.sampled_from((0, 1)),
)
def test_any_shift(
    backend: Backend, case: Shift, dtype: torch.dtype, place: str, begin: int
) -> None:
    place = place if place in backend.places else "host"
    grad = gradient_of(case, dtype)
    # One that starts off 16 bytes, too.
    moved = torch.empty(begin + grad.numel(), dtype=dtype)[begin:].view(grad.shape).copy_(grad)
    check(case, grad, backend.shift_backward(case, moved, place=place))


@pytest.mark.parametrize("views", [127, 128, 129, 300])
def test_shift_of_many_views(views: int, backend: Backend) -> None:
    case = Shift((11, 40), random_views(views), value_dtype=torch.float64, batch=1)
    for place in backend.places:
        check_sample(case, torch.float32, backend, place)


@each_padding
@each_interpolation
def test_containment_of_shift(interpolation: str, padding: str, backend: Backend) -> None:
    for width in (21, 40):
        case = Shift((9, width), padding=padding, interpolation=interpolation)
        for dtype in DTYPES:
            run = partial(backend.shift_backward, case)
            check_containment(run, *poisoned(case, dtype), backend.assert_same)


@each_padding
@each_gpu
def test_refused_offsets_of_shift(padding: str, backend: Backend) -> None:
    good = Shift((6, 16), padding=padding, value_dtype=torch.float64)
    case = replace(good, offsets=good.offsets + NO_OFFSETS)
    for dtype in DTYPES:
        grad = gradient_of(case, dtype)
        expected = backend.shift_backward(good, grad[: len(good.offsets)])
        grad[len(good.offsets) :] = NAN
        backend.assert_same(backend.shift_backward(case, grad, place="device"), expected)
