"""The gradients of the CUDA kernels, executed on the CPU (see test_cuda_on_host.py).

Against autograd through the oracle. Every element of a gradient must be written once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_int64, c_void_p
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bounds import EnsembleBounds, ShiftBounds
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
    Ensemble,
    Shift,
    ensembles,
    sample_ensembles,
    sample_shifts,
    shifts,
)
from test_cuda_on_host import (
    CODES,
    NOTHING,
    PLACES,
    CudaOnHost,
    EnsembleArgs,
    Guarded,
    Numbers,
    ShiftArgs,
    library,  # noqa: F401  (a fixture)
)

from srt_ext import reference

NAN = float("nan")
REDUCES = ("mean",)  # median and moments have no kernels of their own


class Backward(CudaOnHost):
    """The kernels, called as the glue calls them."""

    def ensemble_gradient(
        self,
        case: Ensemble,
        reduce: str,
        tokens: torch.Tensor,
        *grads: torch.Tensor,
        place: str | tuple[str, str] = "host",
        layout: str = "channels_last",
        skip: int = 0,
    ) -> torch.Tensor:
        """Of tokens [V, B, N, C] with any outer strides; ``grads`` [B, C, H', W'], two of moments.

        ``skip`` elements spoil the alignment of everything.
        """
        (_, offsets, grid, patch, weights), modes = case.call(tokens)
        dtype = tokens.dtype
        span = 1 + sum((n - 1) * s for n, s in zip(tokens.shape, tokens.stride(), strict=True))
        source = Guarded(span, dtype, skip)
        source.elements.copy_(tokens.as_strided((span,), (1,)))
        b, c, h, w = case.shape
        strides = {
            "channels_last": (h * w * c, 1, w * c, c),
            "padded": (h * (w + 1) * (c + 16), 1, (w + 1) * (c + 16), c + 16),
            "constant": (0, 1, 0, 0),  # what the gradient of a sum over pixels is expanded to
        }[layout]
        size = 1 + sum((n - 1) * s for n, s in zip(case.shape, strides, strict=True))
        given = []
        for grad in grads:
            given.append(Guarded(size, dtype, skip))
            if layout == "constant":
                given[-1].elements.copy_(grad[0, :, 0, 0])
            else:
                given[-1].elements.as_strided(case.shape, strides).copy_(grad)
        out = Guarded(tokens.numel(), dtype, skip)
        args = EnsembleArgs(
            reduce=REDUCES.index(reduce),
            dtype=CODES[dtype],
            tokens=source.pointer() if reduce != "mean" else None,
            views=len(tokens),
            batch=b,
            channels=c,
            token_strides=(c_int64 * 3)(*tokens.stride()[:3]),
            grid=(c_int64 * 2)(*grid),
            patch=(c_int64 * 2)(*patch),
            stride=(c_int64 * 2)(*modes["stride"]),
            upsample=UPSAMPLES.index(modes["upsample"]),
            border=BORDERS.index(modes["border"]),
            out=given[0].pointer(),
            out_strides=(c_int64 * 4)(*strides),
            variance=given[-1].pointer() if reduce == "moments" else None,
        )
        places = (place, place) if isinstance(place, str) else place
        numbers = [Numbers(v, p) for v, p in zip((offsets, weights), places, strict=True)]
        call = partial(self.library.mean_backward, c_void_p(out.pointer()))
        self._run(call, args, numbers, out)
        assert (self.writes == 1).all()
        return out.elements.reshape(tokens.shape)

    def shift_gradient(
        self, case: Shift, grad: torch.Tensor, *, place: str = "host", skip: int = 0
    ) -> torch.Tensor:
        """Of an image [B, C, H, W]; ``grad`` [V, B, C, H, W]."""
        views, b, c, h, w = grad.shape
        offsets = torch.tensor(case.offsets, dtype=case.value_dtype)
        source = Guarded(grad.numel(), grad.dtype, skip)
        source.elements.copy_(grad.flatten())
        out = Guarded(grad[0].numel(), grad.dtype, skip)
        args = ShiftArgs(
            dtype=CODES[grad.dtype],
            planes=b * c,
            height=h,
            width=w,
            views=views,
            padding=PADDINGS.index(case.padding),
            interpolation=INTERPOLATIONS.index(case.interpolation),
            out=source.pointer(),
        )
        call = partial(self.library.shift_backward, c_void_p(out.pointer()))
        self._run(call, args, [Numbers(offsets, place)], out)
        assert (self.writes == 1).all()
        return out.elements.reshape(b, c, h, w)


@pytest.fixture
def cuda(library: ctypes.CDLL) -> Iterator[Backward]:  # noqa: F811
    kernels = Backward(library)
    yield kernels
    kernels.reset()


ENSEMBLES = sample_ensembles()
SHIFTS = sample_shifts()
each_ensemble = pytest.mark.parametrize("case", ENSEMBLES.values(), ids=ENSEMBLES.keys())
each_shift = pytest.mark.parametrize("case", SHIFTS.values(), ids=SHIFTS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduce = pytest.mark.parametrize("reduce", REDUCES)
each_padding = pytest.mark.parametrize("padding", PADDINGS)
each_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fitting(case: Ensemble, reduce: str) -> Ensemble:
    return replace(case, weights=None) if reduce == "median" else case


def oracle(
    case: Ensemble,
    reduce: str,
    tokens: torch.Tensor,
    *grads: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    leaf = tokens.to(dtype).detach().requires_grad_()
    args, modes = case.call(leaf)
    if reduce == "moments":
        fields = reference.ensemble_moments(*args, **modes, dtype=dtype)
    else:
        fields = (reference.ensemble(*args, **modes, reduce=reduce, dtype=dtype),)
    for field in fields:
        field.requires_grad_() if not field.requires_grad else None
    gradient: torch.Tensor | None
    (gradient,) = torch.autograd.grad(fields, leaf, [g.to(dtype) for g in grads], allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient


def gradients(case: Ensemble, reduce: str, dtype: torch.dtype) -> list[torch.Tensor]:
    count = 2 if reduce == "moments" else 1
    return [random(case.shape, dtype, case.seed + i) for i in range(count)]


def check(
    case: Ensemble, reduce: str, dtype: torch.dtype, cuda: Backward, **how: Any
) -> torch.Tensor:
    case = fitting(case, reduce)
    tokens = case.tokens(dtype)
    grads = gradients(case, reduce, dtype)
    if how.get("layout") == "constant":
        grads = [g[:1, :, :1, :1].expand(case.shape) for g in grads]
    actual = cuda.ensemble_gradient(case, reduce, tokens, *grads, **how)
    compare(case, reduce, tokens, actual, *grads)
    return actual


def compare(
    case: Ensemble, reduce: str, tokens: torch.Tensor, actual: torch.Tensor, *grads: torch.Tensor
) -> None:
    """Of a fixed sample."""
    if tokens.dtype == torch.float64:
        compare_rounding(case, reduce, tokens, actual, *grads)
    else:
        truth = oracle(case, reduce, tokens, *grads)
        same = oracle(case, reduce, tokens, *grads, dtype=torch.float32).to(tokens.dtype)
        assert_within_budget(actual, truth, same)


def compare_rounding(
    case: Ensemble, reduce: str, tokens: torch.Tensor, actual: torch.Tensor, *grads: torch.Tensor
) -> None:
    bound = getattr(EnsembleBounds(case, tokens), f"{reduce}_gradient")(*grads)
    assert_within_rounding(actual, oracle(case, reduce, tokens, *grads), bound)


# ---- ensemble -----------------------------------------------------------------------------------


@each_dtype
@each_reduce
# 40: whole vectors in every dtype, and the last chunk of channels has idle lanes.
@pytest.mark.parametrize("channels", [40, None])
@each_ensemble
def test_ensemble(
    case: Ensemble, channels: int | None, reduce: str, dtype: torch.dtype, cuda: Backward
) -> None:
    # The budget is the largest error of the oracle in float32: of a few values, that is luck.
    channels = channels or case.channels
    batch = max(case.batch, 128 // channels)
    check(replace(case, channels=channels, batch=batch), reduce, dtype, cuda)


@given(
    ensembles(),
    st.sampled_from(REDUCES),
    st.sampled_from(DTYPES),
    st.sampled_from((None, 1, 3, 8, 33)),
    st.sampled_from(PLACES),
    st.sampled_from((1, 2, 132)),
)
def test_any_ensemble(
    library: ctypes.CDLL,  # noqa: F811
    case: Ensemble,
    reduce: str,
    dtype: torch.dtype,
    channels: int | None,
    place: str,
    processors: int,
) -> None:
    cuda = Backward(library)
    cuda.device.processors = processors
    case = fitting(replace(case, channels=channels or case.channels), reduce)
    tokens, grads = case.tokens(dtype), gradients(case, reduce, dtype)
    actual = cuda.ensemble_gradient(case, reduce, tokens, *grads, place=place)
    compare_rounding(case, reduce, tokens, actual, *grads)


@each_reduce
@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("offsets", ["grid", "real"])
def test_tokens_of_a_real_size(offsets: str, upsample: str, reduce: str, cuda: Backward) -> None:
    """Several tiles along every axis, and windows of many cells."""
    case = replace(ENSEMBLES[offsets], grid=(3, 5), patch=(16, 16), batch=1, channels=40)
    for border in BORDERS:
        for dtype in (torch.float32, torch.bfloat16):
            check(replace(case, upsample=upsample, border=border), reduce, dtype, cuda)


@pytest.mark.parametrize("processors", [1, 7, 1000])
def test_segments(processors: int, cuda: Backward) -> None:
    cuda.device.processors = processors
    case = replace(ENSEMBLES["grid"], grid=(13, 3), patch=(4, 4), channels=8)
    for border in BORDERS:
        check(replace(case, border=border), "mean", torch.float32, cuda)


@pytest.mark.parametrize("border", BORDERS)
def test_windows_that_open_behind_others(border: str, cuda: Backward) -> None:
    """Views so far apart that tokens are not read in their order, and not at one time."""
    offsets = tuple((y, x) for y in (-40.0, 0.0, 37.5) for x in (0.0, 100.0, -61.25))
    case = Ensemble((7, 6), (8, 16), offsets, channels=8, border=border)
    for reduce in REDUCES:
        check(case, reduce, torch.float32, cuda)


@each_reduce
@pytest.mark.parametrize("views", [8, 50, 160])
@pytest.mark.parametrize("place", PLACES)
def test_many_views(place: str, views: int, reduce: str, cuda: Backward) -> None:
    """Several parts; more views of one dx than an entry has; more numbers than one kernel takes."""
    generator = torch.Generator().manual_seed(views)
    scattered = (torch.rand(views, 2, generator=generator) * 8 - 4).tolist()
    in_columns = [(y, round(x / 2) * 2) for y, x in scattered]
    weights = tuple(torch.rand(views, generator=generator).tolist())
    for offsets in (scattered, in_columns):
        case = Ensemble((2, 2), (4, 4), tuple(map(tuple, offsets)), channels=8, batch=2)
        case = replace(case, value_dtype=torch.float64)
        for same in (case, replace(case, weights=weights)):
            check(same, reduce, torch.float32, cuda, place=place)


@each_dtype
@each_reduce
def test_gradients_of_any_strides(reduce: str, dtype: torch.dtype, cuda: Backward) -> None:
    for channels in (16, 19):
        case = fitting(replace(ENSEMBLES["stride"], channels=channels, prefix=0), reduce)
        tokens = case.tokens(dtype)
        grads = gradients(case, reduce, dtype)
        expected = cuda.ensemble_gradient(case, reduce, tokens, *grads)
        for layout in ("channels_last", "padded"):
            for skip in (0, 1):
                actual = cuda.ensemble_gradient(
                    case, reduce, tokens, *grads, layout=layout, skip=skip
                )
                assert torch.equal(actual, expected)
        check(case, reduce, dtype, cuda, layout="constant")


@each_reduce
@each_dtype
def test_same_bits_wherever_the_numbers_lie(
    dtype: torch.dtype, reduce: str, cuda: Backward
) -> None:
    case = replace(ENSEMBLES["weights"], channels=16, weights=(1.0, 0.0, 2.5, 0.125, 7.0))
    # Numbers that float32 holds, so that it makes no difference.
    offsets = tuple((round(y * 8) / 8, round(x * 8) / 8) for y, x in case.offsets)
    case = fitting(replace(case, offsets=offsets), reduce)
    tokens = case.tokens(dtype)
    grads = gradients(case, reduce, dtype)
    expected = cuda.ensemble_gradient(case, reduce, tokens, *grads)
    places = ("device, float32", "device, float64", ("host", "device, float64"))
    for place in places:
        actual = cuda.ensemble_gradient(case, reduce, tokens, *grads, place=place)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("border", BORDERS)
@each_reduce
def test_views_that_the_host_refuses_get_nothing(reduce: str, border: str, cuda: Backward) -> None:
    good = replace(ENSEMBLES["real"], border=border, weights=(1.0, 3.0, 0.5, 2.0, 1.0), channels=16)
    bad_weights = (NAN, -1.0, float("inf"), float("-inf"), 3.0 * 2.0**-81, 0.0)
    ordinary = ((0.0, 0.0),) * len(bad_weights)
    case = replace(good, offsets=NOTHING[:3] + good.offsets + NOTHING[3:] + ordinary)
    if good.weights:
        case = replace(case, weights=(1.0,) * 3 + good.weights + (1.0,) * 3 + bad_weights)
    tokens = torch.full((len(case.offsets), 2, 15, 16), NAN)
    tokens[3:8] = good.tokens()
    grads = gradients(good, reduce, torch.float32)
    actual = cuda.ensemble_gradient(case, reduce, tokens, *grads, place="device, float64")
    expected = cuda.ensemble_gradient(good, reduce, good.tokens(), *grads)
    assert torch.equal(actual[3:8], expected)
    actual[3:8] = 0
    assert not actual.any()
    none = replace(case, offsets=NOTHING, weights=None)
    nothing = cuda.ensemble_gradient(none, reduce, tokens[:6], *grads, place="device, float64")
    assert not nothing.any()


def poisoned(grad: torch.Tensor) -> torch.Tensor:
    grad = grad.clone()
    flat = grad.flatten(2)
    for i, value in enumerate((NAN, float("inf"), float("-inf"))):
        flat[i % len(flat), i % flat.shape[1], (7 * i + 3) % flat.shape[2]] = value
    return flat.reshape(grad.shape)


@each_dtype
@each_reduce
@each_ensemble
def test_containment(case: Ensemble, reduce: str, dtype: torch.dtype, cuda: Backward) -> None:
    """What is not finite reaches only the tokens that a cell reads, and changes no other one."""
    case = fitting(case, reduce)
    for channels in (16, case.channels):
        case = replace(case, channels=channels)
        tokens = case.tokens(dtype)
        grads = [poisoned(g) for g in gradients(case, reduce, dtype)]
        actual = cuda.ensemble_gradient(case, reduce, tokens, *grads)
        expected = oracle(case, reduce, tokens, *grads)
        assert torch.equal(actual.isfinite(), expected.isfinite())
        clean = [torch.where(g.isfinite(), g, 0) for g in grads]
        kept = expected.isfinite()
        compare_clean = cuda.ensemble_gradient(case, reduce, tokens, *clean)
        assert torch.equal(actual[kept], compare_clean[kept])


@each_reduce
@pytest.mark.parametrize("max_grid", [1, 3])
def test_a_grid_that_is_smaller_than_the_work(max_grid: int, reduce: str, cuda: Backward) -> None:
    case = fitting(replace(ENSEMBLES["grid"], channels=72), reduce)
    tokens = case.tokens()
    grads = gradients(case, reduce, torch.float32)
    expected = cuda.ensemble_gradient(case, reduce, tokens, *grads)
    cuda.device.max_grid = max_grid
    assert torch.equal(cuda.ensemble_gradient(case, reduce, tokens, *grads), expected)


def test_every_launch_is_checked(cuda: Backward) -> None:
    case = replace(ENSEMBLES["grid"], channels=40, batch=1)
    shift = replace(SHIFTS["real"], offsets=SHIFTS["real"].offsets * 60)
    calls = [
        partial(cuda.ensemble_gradient, case, r, case.tokens(), *gradients(case, r, torch.float32))
        for r in REDUCES
    ]
    views = random((len(shift.offsets), *shift.image().shape), torch.float32)
    calls.append(partial(cuda.shift_gradient, shift, views))
    for call in calls:
        call()
        launches = cuda.device.launches
        assert launches > 2
        for failing in range(launches):
            cuda.device.failing_launch = failing
            with pytest.raises(RuntimeError, match=r"srt::\w+: CUDA: unspecified launch failure"):
                call()
            assert cuda.device.launches == failing + 1
        cuda.device.failing_launch = -1


def test_empty(cuda: Backward) -> None:
    for shape in ((9, 0, 15, 4), (9, 1, 15, 0)):
        args = EnsembleArgs(views=9, batch=shape[1], channels=shape[3])
        cuda.device.launches = 0
        numbers, size = Numbers(None, "host"), c_int64(-1)
        for workspace in (None, c_void_p(1)):
            assert not cuda.library.mean_backward(
                None,
                byref(args),
                byref(numbers.struct),
                byref(numbers.struct),
                workspace,
                byref(size),
            )
        assert size.value == 0
        assert cuda.device.launches == 0


# ---- shift --------------------------------------------------------------------------------------


def shift_oracle(
    case: Shift, grad: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    leaf = torch.zeros(grad.shape[1:], dtype=dtype, requires_grad=True)
    args, modes = case.call(leaf)
    reference.shift(*args, **modes, dtype=dtype).backward(grad.to(dtype))
    assert leaf.grad is not None
    return leaf.grad


def check_shift(case: Shift, dtype: torch.dtype, cuda: Backward, **how: Any) -> None:
    """Of a fixed sample."""
    grad = random((len(case.offsets), *case.image().shape), dtype, case.seed)
    actual = cuda.shift_gradient(case, grad, **how)
    truth = shift_oracle(case, grad)
    if dtype == torch.float64:
        assert_within_rounding(actual, truth, ShiftBounds(case, dtype).gradient(grad))
    else:
        assert_within_budget(actual, truth, shift_oracle(case, grad, torch.float32).to(dtype))


@each_dtype
@pytest.mark.parametrize("size", [None, (19, 70), (2, 300)], ids=str)
@each_shift
def test_shift(
    case: Shift, size: tuple[int, int] | None, dtype: torch.dtype, cuda: Backward
) -> None:
    check_shift(replace(case, size=size or case.size), dtype, cuda)


@each_padding
@each_interpolation
def test_every_mode_of_shift(interpolation: str, padding: str, cuda: Backward) -> None:
    offsets = ((0.3, -0.6), (9.0, 2.0), (-31.4, 50.2), (FAR, 1.5), (0.0, -FAR), (-1.0, 36.0))
    for dtype in DTYPES:
        for size in ((7, 37), (1, 40), (40, 1), (2, 3), (1, 1)):
            case = Shift(size, offsets, padding=padding, interpolation=interpolation)
            values = case.channels * size[0] * size[1]
            check_shift(replace(case, batch=max(2, 128 // values)), dtype, cuda)


@given(shifts(), st.sampled_from(DTYPES), st.sampled_from(PLACES), st.sampled_from((0, 1)))
def test_any_shift(
    library: ctypes.CDLL,  # noqa: F811
    case: Shift,
    dtype: torch.dtype,
    place: str,
    skip: int,
) -> None:
    cuda = Backward(library)
    grad = random((len(case.offsets), *case.image().shape), dtype, case.seed)
    actual = cuda.shift_gradient(case, grad, place=place, skip=skip)
    bound = ShiftBounds(case, dtype).gradient(grad)
    assert_within_rounding(actual, shift_oracle(case, grad), bound)


@pytest.mark.parametrize("views", [127, 128, 129, 300])
@pytest.mark.parametrize("place", PLACES)
def test_shift_of_many_views(place: str, views: int, cuda: Backward) -> None:
    generator = torch.Generator().manual_seed(views)
    offsets = (torch.rand(views, 2, generator=generator) * 8 - 4).tolist()
    case = Shift((11, 40), tuple(map(tuple, offsets)), value_dtype=torch.float64, batch=1)
    check_shift(case, torch.float32, cuda, place=place)


@each_padding
@each_interpolation
def test_containment_of_shift(interpolation: str, padding: str, cuda: Backward) -> None:
    for width in (21, 40):
        case = Shift((9, width), padding=padding, interpolation=interpolation)
        for dtype in DTYPES:
            grad = random((len(case.offsets), *case.image().shape), dtype)
            for i, value in enumerate((NAN, float("inf"), float("-inf"))):
                grad[i, i % 2, i, 2 * i, 5 * i] = value
            actual, expected = cuda.shift_gradient(case, grad), shift_oracle(case, grad)
            assert torch.equal(actual.isfinite(), expected.isfinite())
            clean = cuda.shift_gradient(case, torch.where(grad.isfinite(), grad, 0))
            assert torch.equal(actual[expected.isfinite()], clean[expected.isfinite()])


@each_padding
def test_shift_by_what_the_host_refuses(padding: str, cuda: Backward) -> None:
    good = Shift((6, 16), padding=padding, value_dtype=torch.float64)
    case = replace(good, offsets=good.offsets + NOTHING)
    for dtype in DTYPES:
        grad = random((len(case.offsets), *case.image().shape), dtype)
        grad[len(good.offsets) :] = NAN
        expected = cuda.shift_gradient(good, grad[: len(good.offsets)])
        actual = cuda.shift_gradient(case, grad, place="device, float64")
        assert torch.equal(actual, expected)


def test_a_grid_that_is_smaller_than_an_image(cuda: Backward) -> None:
    for views in (5, 300):
        case = replace(SHIFTS["real"], offsets=SHIFTS["real"].offsets * (views // 5), size=(20, 70))
        grad = random((views, *case.image().shape), torch.float32)
        cuda.device.max_grid = 2**31 - 1
        expected = cuda.shift_gradient(case, grad)
        for max_grid in (1, 3):
            cuda.device.max_grid = max_grid
            assert torch.equal(cuda.shift_gradient(case, grad), expected)
