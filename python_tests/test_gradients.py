"""Gradients: against autograd through the oracle, and by gradcheck."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from backends import CPU, Ops, each_device
from bounds import EnsembleBounds, gradient
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from oracle import field_of
from process import needs_proc, peak_of
from samples import (
    DTYPES,
    ENSEMBLES,
    REDUCES,
    UPSAMPLES,
    Ensemble,
    each_dtype,
    each_interpolation,
    each_padding,
    each_reduce,
    ensembles,
    pairwise,
)
from torch.autograd import gradcheck, gradgradcheck

import srt_ext
from srt_ext import reference


def no_ties(case: Ensemble, dtype: torch.dtype) -> torch.Tensor:
    """Distinct tokens, so that the median is unique."""
    tokens = case.tokens(torch.float64)
    if torch.finfo(dtype).bits > 16:
        return tokens.to(dtype)
    views, batch, count, channels = tokens.shape
    assert views * count <= 256  # integers that bfloat16 represents
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.rand(batch, channels, views * count, generator=generator).argsort(-1)
    return order.unflatten(-1, (views, count)).permute(2, 0, 3, 1).contiguous().to(dtype)


def problem(case: Ensemble, reduce: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a gradient of the field."""
    tokens = no_ties(case, dtype) if reduce == "median" else case.tokens(dtype)
    shape = (2, *case.shape) if reduce == "moments" else case.shape
    return tokens, torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@cache  # independent of the instruction set
def oracle(case: Ensemble, reduce: str, of: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    field = field_of(reference, reduce, case, dtype=dtype)
    return gradient(field, *(t.to(dtype) for t in problem(case, reduce, of)))


def check_rounding(case: Ensemble, reduce: str, dtype: torch.dtype) -> None:
    """By forward error bounds; medians only where rounding cannot select another view."""
    tokens, grad = problem(case, reduce, dtype)
    bounds = EnsembleBounds(case.fit(reduce), tokens)
    if reduce == "median":
        grad = torch.where(bounds.clear(), grad, 0)
    bound = getattr(bounds, f"{reduce}_gradient")(*(grad if reduce == "moments" else [grad]))
    truth = gradient(field_of(reference, reduce, case), tokens.double(), grad.double())
    actual = gradient(field_of(srt_ext, reduce, case), tokens, grad)
    assert actual.dtype == dtype
    assert_within_rounding(actual, truth, bound)


@pytest.mark.parametrize(
    ("name", "dtype", "reduce", "backend"),
    [
        *pairwise(tuple(ENSEMBLES), DTYPES, REDUCES[1:], CPU),
        *(
            pytest.param(*case, "cuda", marks=pytest.mark.cuda)
            for case in pairwise(tuple(ENSEMBLES), DTYPES[:3], REDUCES[1:])
        ),
    ],
    indirect=["backend"],
)
def test_gradient_of_tokens(name: str, dtype: torch.dtype, reduce: str, backend: Ops) -> None:
    """The kernels of mean and shift are tested in test_kernels.py."""
    case = ENSEMBLES[name]
    if reduce == "median" and (backend.device == "cuda" or torch.finfo(dtype).bits == 16):
        case = replace(
            case, upsample="nearest", stride=(1, 1)
        )  # otherwise rounding may select another view
    if dtype == torch.float64:
        check_rounding(case, reduce, dtype)
        return
    tokens, grad = (backend.put(tensor) for tensor in problem(case, reduce, dtype))
    truth, same = (oracle(case, reduce, dtype, t) for t in (torch.float64, torch.float32))
    for place in backend.places:
        field = field_of(srt_ext, reduce, case, backend.device, place)
        actual = gradient(field, tokens, grad)
        assert actual.dtype == dtype
        assert_within_budget(actual.cpu(), truth, same.to(dtype))


def test_gradient_of_a_wide_field(cpu_kernels: str) -> None:
    """More offsets than a tile has, a row of tokens in segments, more tasks than threads.

    Checked by the definition of the transpose, because the oracle would take a minute.
    """
    offsets = tuple((y * 0.75 - 4, x - 5.0) for y in range(11) for x in range(0, 11, 2))
    case = Ensemble((4, 43), (5, 24), offsets=offsets, channels=131, batch=1)
    field, tokens = field_of(srt_ext, "mean", case), case.tokens(torch.float64)
    for seed in range(3):
        grad = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed)).double()
        grad[grad.abs() < seed] = 0
        expected = (field(tokens) * grad).sum()
        actual = (tokens * gradient(field, tokens, grad)).sum()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-6)


@each_reduce
@pytest.mark.cuda
def test_views_that_cover_nothing_get_no_gradient(reduce: str) -> None:
    good, nan, inf = ENSEMBLES["grid"], float("nan"), float("inf")
    bad = replace(good, offsets=((nan, 3.0), *good.offsets, (inf, inf)))
    tokens, grad = (t.to("cuda") for t in problem(bad, reduce, torch.float32))
    result = gradient(field_of(srt_ext, reduce, bad, "cuda", "device"), tokens, grad)
    assert not result[::10].any()
    expected = gradient(field_of(srt_ext, reduce, good, "cuda", "device"), tokens[1:-1], grad)
    torch.testing.assert_close(result[1:-1], expected)


@given(
    ensembles(),
    st.sampled_from(REDUCES[1:]),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_gradient_of_tokens_of_any_call(case: Ensemble, reduce: str, dtype: torch.dtype) -> None:
    dtype = torch.float32 if reduce == "median" else dtype
    check_rounding(case, reduce, dtype)


def test_the_gradient_of_a_tie_goes_to_the_first_view_by_dx() -> None:
    tokens, offsets = torch.zeros(3, 1, 1, 1), torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    call = partial(srt_ext.ensemble, offsets=offsets, grid=(1, 1), patch=(4, 4), border="clamp")
    result = gradient(lambda t: call(t, reduce="median"), tokens, torch.ones(1, 1, 4, 4))
    assert result.flatten().tolist() == [0, 16, 0]


@each_device
@pytest.mark.parametrize("upsample", UPSAMPLES)
@each_dtype
def test_gradients_of_a_median_sum_to_the_cotangent(
    dtype: torch.dtype, upsample: str, device: str, cpu_kernels: str
) -> None:
    """With ties, infinities and NaN; cells that no view covers contribute nothing."""
    lattice = tuple((y, x) for y in (-7.0, -4.0, 0.0, 3.0) for x in (-20.0, -6.0, 1.0, 2.0, 11.0))
    for offsets in (lattice[:1], lattice[:4], lattice):
        case = Ensemble(offsets=offsets, channels=21, upsample=upsample)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(-1, 2, case.tokens().shape, generator=generator).to(dtype)
        for value, share in ((torch.inf, 0.1), (-torch.inf, 0.1), (torch.nan, 0.03)):
            tokens[torch.rand(tokens.shape, generator=generator) < share] = value
        tokens, field = tokens.to(device), field_of(srt_ext, "median", case)
        # Sums of few numbers -1, 0 and 1 are exact in every dtype.
        grad = torch.randint(-1, 2, case.shape, generator=generator).to(tokens)
        counted = field(torch.ones_like(tokens)) > 0
        for grad_part in (grad, torch.where(field(tokens).isnan(), grad, 0)):
            result = gradient(field, tokens, grad_part).double()
            expected = torch.where(counted, grad_part, 0).double().sum((2, 3))
            size = 0 if upsample == "nearest" else 4 * torch.finfo(dtype).eps
            atol = size * grad_part.abs().double().sum((2, 3)).max().item()
            torch.testing.assert_close(result.sum((0, 2)), expected, rtol=0, atol=atol)
        if upsample == "nearest":  # the cotangents of NaN medians go to NaN tokens
            assert (result[~tokens.isnan()] == 0).all()


def weights_gradients(
    case: Ensemble, reduce: str, tokens: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of srt_ext, of the oracle, and of the oracle in float32."""
    shape = (2, *case.shape) if reduce == "moments" else case.shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(tokens.dtype)
    ours = field_of(srt_ext, reduce, case)
    found = [gradient(lambda w: ours(tokens, w), weights, grad)]
    for dtype in (torch.float64, torch.float32):
        field = field_of(reference, reduce, case, dtype=dtype)
        found.append(
            gradient(lambda w, f=field, t=dtype: f(tokens.to(t), w), weights, grad.to(dtype))
        )
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "reduce"),
    pairwise(("weights", "stride", "patch_1"), DTYPES, ("mean", "moments")),
)
def test_gradient_of_weights(name: str, dtype: torch.dtype, reduce: str) -> None:
    case = replace(ENSEMBLES[name], weights=(1.0, 0.5, 2.5, 0.25, 7.0))
    for level in (0.0, 100.0):  # the mean of the tokens; their spread is 1
        tokens = (case.tokens(torch.float64) + level).to(dtype)
        weights = torch.tensor(case.weights, dtype=torch.float64)
        actual, truth, same = weights_gradients(case, reduce, tokens, weights)
        if dtype == torch.float64:
            torch.testing.assert_close(actual, truth, rtol=1e-8, atol=1e-8)
        else:
            assert_within_budget(actual, truth, same)


@pytest.mark.parametrize("reduce", ["mean", "moments"])
def test_gradient_of_a_weight_of_zero(reduce: str) -> None:
    """It equals that of a tiny weight; the oracle does not read a view of weight 0."""
    case = replace(ENSEMBLES["weights"], weights=(1.0, 1e-9, 2.5, 0.25, 7.0))
    tokens = case.tokens(torch.float64)
    weights = torch.tensor(case.weights, dtype=torch.float64)
    _, truth, _ = weights_gradients(case, reduce, tokens, weights)
    weights[1] = 0
    actual, *_ = weights_gradients(case, reduce, tokens, weights)
    torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-6)
    # A value of that view affects only the gradient of its own weight.
    tokens[1] = float("nan")
    spoilt, *_ = weights_gradients(case, reduce, tokens, weights)
    assert spoilt[1].isnan()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(spoilt[others], actual[others], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce", ["mean", "moments"])
def test_gradient_of_the_weight_of_a_view_that_covers_nothing(reduce: str) -> None:
    case = replace(ENSEMBLES["beyond"], weights=(1.0, 2.0, 3.0))
    tokens = case.tokens(torch.float64)
    tokens[2] = float("nan")
    actual, truth, _ = weights_gradients(case, reduce, tokens, torch.ones(3, dtype=torch.float64))
    assert actual[2] == 0
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduce", REDUCES[1:])
def test_any_strides_of_a_gradient(reduce: str) -> None:
    case = ENSEMBLES["grid"]
    tokens, field = case.tokens(), field_of(srt_ext, reduce, case)
    grad = torch.randn(field(tokens).shape)
    strided = grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(gradient(field, tokens, strided), gradient(field, tokens, grad))
    ones = torch.ones(()).expand(grad.shape), torch.ones(grad.shape)
    assert torch.equal(*(gradient(field, tokens, one) for one in ones))


@pytest.mark.parametrize(
    ("name", "reduce", "value"),
    pairwise(
        ("grid", "real", "weights", "stride", "beyond"),
        ("moments", "median"),
        (torch.nan, torch.inf),
    ),
)
def test_a_non_finite_gradient_reaches_only_its_tokens(
    name: str, reduce: str, value: float
) -> None:
    case = replace(ENSEMBLES[name], batch=1, channels=3)
    tokens, field = case.tokens(torch.float64), field_of(srt_ext, reduce, case)
    cell = (..., 0, 1, -1, -1)
    grad = torch.zeros(field(tokens).shape, dtype=torch.float64)
    grad[cell] = 1.0
    touched = gradient(field, tokens, grad) != 0
    grad = torch.randn_like(grad)
    clean = gradient(field, tokens, grad)
    grad[cell] = value
    result = gradient(field, tokens, grad)
    assert torch.equal(result[~touched], clean[~touched])
    assert not result[touched].isfinite().any()


MEMORY = """
import srt_ext

def problem(views):
    tokens = torch.randn(views, 1, 196, 64, requires_grad=True)
    args = (tokens, srt_ext.views.grid(2).offsets[:views], (14, 14), (16, 16))
    return {field}.sum(), tokens

torch.autograd.grad(*problem(2))
problem = problem({views})
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    "field", ["srt_ext.ensemble(*args, reduce='median')", "srt_ext.ensemble_moments(*args)[1]"]
)
def test_memory_of_a_backward_does_not_grow_with_the_views(field: str) -> None:
    """In addition to the gradient, it takes the maps of some channels of a few views."""
    beside = []
    for views in (4, 16):
        setup = MEMORY.format(field=field, views=views)
        taken, gradient = peak_of(setup, "torch.autograd.grad(*problem)[0]", "result.any()")
        beside.append(taken - gradient)
    assert beside[1] < 1.1 * beside[0]


# ---- gradcheck -----------------------------------------------------------------------------------

EVERYTHING = {
    "check_forward_ad": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
}
PLAIN = Ensemble(
    grid=(2, 3),
    patch=(2, 3),
    offsets=((0.0, 0.0), (1.5, -2.0), (-3.0, 1.0), (0.3, 7.0)),
    channels=1,
    batch=1,
    value_dtype=torch.float64,
)
WEIGHTED = replace(PLAIN, weights=(1.0, 0.5, 2.0, 0.1))
SMALL = {
    "plain": PLAIN,
    "weights": replace(WEIGHTED, stride=(2, 3)),
    "zeros": replace(WEIGHTED, border="zeros"),
    "nearest": replace(PLAIN, upsample="nearest", border="clamp"),
}
each_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


@each_reduce
@each_small
def test_gradcheck(case: Ensemble, reduce: str) -> None:
    field = field_of(srt_ext, reduce, case)
    inputs = [case.tokens(torch.float64).requires_grad_()]
    if case.weights is not None and reduce != "median":
        inputs.append(torch.tensor(case.weights, dtype=torch.float64, requires_grad=True))
    assert gradcheck(field, inputs, **EVERYTHING)


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("zeros", "mean"),
        ("plain", "median"),
        ("nearest", "median"),
        pytest.param("weights", "moments", marks=pytest.mark.slow),
    ],
)
def test_gradgradcheck(name: str, reduce: str) -> None:
    case = replace(SMALL[name], grid=(2, 2))
    inputs = [case.tokens(torch.float64).requires_grad_()]
    if reduce == "moments":
        inputs.append(torch.tensor(case.weights, dtype=torch.float64, requires_grad=True))
    field = field_of(srt_ext, reduce, case)
    assert gradgradcheck(field, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@each_padding
@each_interpolation
def test_gradcheck_of_shift(padding: str, interpolation: str) -> None:
    offsets = torch.tensor([[0.0, 0.0], [1.5, -2.25], [-7.0, 9.5]], dtype=torch.float64)
    image = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def views(image: torch.Tensor) -> torch.Tensor:
        return srt_ext.shift(image, offsets, padding=padding, interpolation=interpolation)

    assert gradcheck(views, image, **EVERYTHING)
    assert gradgradcheck(views, image, check_fwd_over_rev=True)


def test_second_derivatives_that_do_not_exist_are_errors() -> None:
    case = SMALL["weights"]
    tokens = case.tokens(torch.float64).requires_grad_()
    weights = torch.tensor(case.weights, dtype=torch.float64, requires_grad=True)
    field = field_of(srt_ext, "mean", case)(tokens, weights)
    (grad,) = torch.autograd.grad(field.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative with respect to weights"):
        grad.sum().backward()


@each_dtype
def test_forward_mode_of_moments(dtype: torch.dtype) -> None:
    """Against the oracle; an infinite token affects only its cells; empty batches."""
    case = replace(ENSEMBLES["grid"], batch=1)
    field, tokens = field_of(srt_ext, "moments", case), case.tokens(dtype)
    tangent, tolerance = tokens.cos(), 64 * torch.finfo(dtype).eps
    truth = field_of(reference, "moments", case)
    _, expected = torch.func.jvp(truth, (tokens.double(),), (tangent.double(),))
    _, clean = torch.func.jvp(field, (tokens,), (tangent,))
    torch.testing.assert_close(clean.double(), expected, rtol=tolerance, atol=tolerance)
    spoilt = tokens.clone()
    spoilt[0, 0, 0] = torch.inf
    _, result = torch.func.jvp(field, (spoilt,), (tangent,))
    reached = ~field(spoilt).isfinite()
    assert 0 < reached[1].float().mean() < 0.5
    torch.testing.assert_close(result[~reached], clean[~reached], rtol=tolerance, atol=tolerance)
    empty = torch.empty(9, 0, 15, 3, dtype=dtype)
    assert torch.func.jvp(field, (empty,), (empty,))[1].shape == (2, 0, 3, 12, 30)


@pytest.mark.parametrize("border", ["coverage", "clamp"])
def test_reverse_and_forward_mode_select_the_same_view(border: str) -> None:
    """Also if values are equal."""
    case = replace(ENSEMBLES["grid"], upsample="nearest", border=border)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, case.tokens().shape, generator=generator).double()
    field = field_of(srt_ext, "median", case)
    tangent, grad = torch.randn_like(tokens), torch.randn(case.shape, dtype=torch.float64)
    _, forward = torch.func.jvp(field, (tokens,), (tangent,))
    back = gradient(field, tokens, grad)
    torch.testing.assert_close((forward * grad).sum(), (back * tangent).sum())
