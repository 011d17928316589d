"""Gradients: against autograd through the oracle, by gradcheck, and under torch's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch._inductor.config
from backends import CPU, each_device
from bounds import EnsembleBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    DTYPES,
    INTERPOLATIONS,
    PADDINGS,
    Ensemble,
    ensembles,
    sample_ensembles,
    sample_shifts,
)
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import srt_ext
from srt_ext import reference

ENSEMBLES = sample_ensembles()
SHIFTS = sample_shifts()
REDUCES = ("mean", "moments", "median")
each_reduce = pytest.mark.parametrize("reduce", REDUCES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Function = Callable[..., Any]


def pairwise(first: Sequence[Any], second: Sequence[Any], *others: Sequence[Any]) -> list[Any]:
    """Every pair of values of ``first`` and ``second``; values of up to two ``others`` rotate."""
    return [
        (a, b, *(other[(i + k * j) % len(other)] for k, other in enumerate(others, 1)))
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]


def field_of(module: Any, reduce: str, case: Ensemble, **more: Any) -> Function:
    """The field as a function of its tokens (and weights); all of it in one tensor."""
    (_, offsets, grid, patch, weights), modes = case.call(torch.empty(0))

    def field(tokens: torch.Tensor, weights: torch.Tensor | None = weights) -> torch.Tensor:
        if reduce == "moments":
            both = module.ensemble_moments(tokens, offsets, grid, patch, weights, **modes, **more)
            return torch.stack(both)
        weights = None if reduce == "median" else weights
        kind = {"reduce": reduce, **modes, **more}
        result: torch.Tensor = module.ensemble(tokens, offsets, grid, patch, weights, **kind)
        return result

    return field


def gradient(function: Function, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    value = value.detach().requires_grad_()
    field = function(value)
    if not field.requires_grad:  # the oracle does not read tokens that no view counts
        return torch.zeros_like(value)
    (result,) = torch.autograd.grad(field, value, grad)
    return result


def no_ties(case: Ensemble, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of which no two are alike, so that there is one median."""
    tokens = case.tokens(torch.float64)
    if torch.finfo(dtype).bits > 16:
        return tokens.to(dtype)
    views, batch, count, channels = tokens.shape
    assert views * count <= 256  # integers that bfloat16 holds
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.rand(batch, channels, views * count, generator=generator).argsort(-1)
    return order.unflatten(-1, (views, count)).permute(2, 0, 3, 1).contiguous().to(dtype)


def problem(case: Ensemble, reduce: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a gradient of the field."""
    tokens = no_ties(case, dtype) if reduce == "median" else case.tokens(dtype)
    shape = (2, *case.shape) if reduce == "moments" else case.shape
    return tokens, torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@cache  # the same for every instruction set
def oracle(case: Ensemble, reduce: str, of: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    field = field_of(reference, reduce, case, dtype=dtype)
    return gradient(field, *(t.to(dtype) for t in problem(case, reduce, of)))


def check_rounding(case: Ensemble, reduce: str, dtype: torch.dtype) -> None:
    """By forward error bounds; of a median where no rounding makes another view the median."""
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
    ("name", "dtype", "reduce", "cpu_kernels"),
    pairwise(tuple(ENSEMBLES), DTYPES, REDUCES, CPU),
    indirect=["cpu_kernels"],
)
def test_gradient_of_tokens(name: str, dtype: torch.dtype, reduce: str, cpu_kernels: str) -> None:
    case = ENSEMBLES[name]
    if reduce == "median" and torch.finfo(dtype).bits == 16:
        case = replace(case, upsample="nearest", stride=(1, 1))  # interpolated values can tie
    if dtype == torch.float64:
        check_rounding(case, reduce, dtype)
        return
    actual = gradient(field_of(srt_ext, reduce, case), *problem(case, reduce, dtype))
    assert actual.dtype == dtype
    truth, same = (oracle(case, reduce, dtype, t) for t in (torch.float64, torch.float32))
    assert_within_budget(actual, truth, same.to(dtype))


@given(ensembles(), st.sampled_from(REDUCES), st.sampled_from((torch.float32, torch.bfloat16)))
def test_gradient_of_tokens_of_any_call(case: Ensemble, reduce: str, dtype: torch.dtype) -> None:
    dtype = torch.float32 if reduce == "median" else dtype
    check_rounding(case, reduce, dtype)


@each_device
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@each_dtype
def test_gradients_of_a_median_sum_to_the_cotangent(
    dtype: torch.dtype, upsample: str, device: str, cpu_kernels: str
) -> None:
    """With ties, infinities and NaN; in cells that no view covers there is none."""
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
        nan = field(tokens).isnan()
        for grad_part in (grad, torch.where(nan, grad, 0)):
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
    """Of srt_ext, of the oracle, and of the oracle in float32."""
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
    for level in (0.0, 100.0):  # of the tokens, beside their spread of 1
        tokens = (case.tokens(torch.float64) + level).to(dtype)
        weights = torch.tensor(case.weights, dtype=torch.float64)
        actual, truth, same = weights_gradients(case, reduce, tokens, weights)
        if dtype == torch.float64:
            torch.testing.assert_close(actual, truth, rtol=1e-8, atol=1e-8)
        else:
            assert_within_budget(actual, truth, same)


@pytest.mark.parametrize("reduce", ["mean", "moments"])
def test_gradient_of_a_weight_of_zero(reduce: str) -> None:
    """It is that of a very small one: the oracle does not read a view of weight 0."""
    case = replace(ENSEMBLES["weights"], weights=(1.0, 1e-9, 2.5, 0.25, 7.0))
    tokens = case.tokens(torch.float64)
    weights = torch.tensor(case.weights, dtype=torch.float64)
    _, truth, _ = weights_gradients(case, reduce, tokens, weights)
    weights[1] = 0
    actual, *_ = weights_gradients(case, reduce, tokens, weights)
    torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-6)
    # What stands in that view reaches the gradient of its own weight alone.
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


@each_reduce
def test_any_strides_of_a_gradient(reduce: str) -> None:
    case = ENSEMBLES["grid"]
    tokens, field = case.tokens(), field_of(srt_ext, reduce, case)
    grad = torch.randn(field(tokens).shape)
    expected = gradient(field, tokens, grad)
    strided = torch.zeros(2, *grad.shape)[1].copy_(grad).transpose(-1, -2).contiguous()
    assert torch.equal(gradient(field, tokens, strided.transpose(-1, -2)), expected)
    one = torch.ones(())
    assert torch.equal(
        gradient(field, tokens, one.expand(grad.shape)),
        gradient(field, tokens, torch.ones(grad.shape)),
    )


@pytest.mark.parametrize(
    ("name", "reduce", "value"),
    pairwise(("grid", "real", "weights", "stride", "beyond"), REDUCES[1:], (torch.nan, torch.inf)),
)
def test_a_non_finite_gradient_reaches_what_it_touches(
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


@each_reduce
def test_a_gradient_does_not_depend_on_threads(reduce: str, threads: Callable[[int], None]) -> None:
    case = Ensemble((7, 9), (8, 8), channels=165)
    tokens, field = case.tokens(), field_of(srt_ext, reduce, case)
    image, offsets = torch.randn(2, 3, 65, 127), torch.randn(5, 2)
    grad = torch.linspace(-3, 2, field(tokens).numel()).reshape(field(tokens).shape)
    views = torch.linspace(-3, 2, 5 * image.numel()).reshape(5, *image.shape)
    results = []
    for count in (1, 2, 5):
        threads(count)
        of_image = gradient(lambda i: srt_ext.shift(i, offsets), image, views)
        results.append((gradient(field, tokens, grad), of_image))
    for more in results[1:]:
        assert all(map(torch.equal, results[0], more))


# ---- gradcheck -----------------------------------------------------------------------------------

EVERYTHING = {
    "check_forward_ad": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
}
SMALL = Ensemble((2, 3), (3, 4), channels=2, batch=1)


def small_cases() -> dict[str, Ensemble]:
    real = ((0.0, 0.0), (1.5, -2.0), (-3.0, 1.0), (0.3, 9.0))
    plain = replace(SMALL, offsets=real, value_dtype=torch.float64)
    return {
        "plain": plain,
        "weights": replace(plain, weights=(1.0, 0.5, 2.0, 0.1), stride=(3, 2)),
        "zeros": replace(plain, weights=(1.0, 0.5, 2.0, 0.1), border="zeros"),
        "nearest": replace(plain, upsample="nearest", border="clamp"),
    }


each_small = pytest.mark.parametrize("case", small_cases().values(), ids=small_cases().keys())


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
    [("zeros", "mean"), ("plain", "median"), ("nearest", "median"), ("weights", "moments")],
)
def test_gradgradcheck(name: str, reduce: str) -> None:
    case = replace(small_cases()[name], channels=1)
    inputs = [case.tokens(torch.float64).requires_grad_()]
    if reduce == "moments":
        inputs.append(torch.tensor(case.weights, dtype=torch.float64, requires_grad=True))
    field = field_of(srt_ext, reduce, case)
    assert gradgradcheck(field, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradcheck_of_shift(padding: str, interpolation: str) -> None:
    offsets = torch.tensor([[0.0, 0.0], [1.5, -2.25], [-7.0, 9.5]], dtype=torch.float64)
    image = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def views(image: torch.Tensor) -> torch.Tensor:
        return srt_ext.shift(image, offsets, padding=padding, interpolation=interpolation)

    assert gradcheck(views, image, **EVERYTHING)
    assert gradgradcheck(views, image, check_fwd_over_rev=True)


def test_second_derivatives_that_do_not_exist_are_errors() -> None:
    case = small_cases()["weights"]
    tokens = case.tokens(torch.float64).requires_grad_()
    weights = torch.tensor(case.weights, dtype=torch.float64, requires_grad=True)
    field = field_of(srt_ext, "mean", case)(tokens, weights)
    (grad,) = torch.autograd.grad(field.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative with respect to weights"):
        grad.sum().backward()


@each_dtype
def test_forward_mode_of_moments(dtype: torch.dtype) -> None:
    """Against the oracle; an infinite token reaches its cells alone; empty batches."""
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
    """Among equal values, too."""
    case = replace(ENSEMBLES["grid"], upsample="nearest", border=border)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, case.tokens().shape, generator=generator).double()
    field = field_of(srt_ext, "median", case)
    tangent, grad = torch.randn_like(tokens), torch.randn(case.shape, dtype=torch.float64)
    _, forward = torch.func.jvp(field, (tokens,), (tangent,))
    back = gradient(field, tokens, grad)
    torch.testing.assert_close((forward * grad).sum(), (back * tangent).sum())


# ---- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduce", "module"),
    [("mean", torch.ops.srt), ("moments", srt_ext), ("median", torch.ops.srt)],
    ids=REDUCES,
)
def test_torch_func(reduce: str, module: Any) -> None:
    case = small_cases()["plain"]
    field, truth = field_of(module, reduce, case), field_of(reference, reduce, case)
    tokens = case.tokens(torch.float64)
    tangent = torch.randn_like(tokens)

    def loss(field: Function) -> Function:
        return lambda tokens: field(tokens).square().sum()

    def right(transform: Callable[[Function], Any]) -> None:
        torch.testing.assert_close(transform(field), transform(truth))

    right(lambda f: torch.func.grad(loss(f))(tokens))
    right(lambda f: torch.func.jvp(f, (tokens,), (tangent,)))
    right(lambda f: torch.func.vjp(f, tokens)[1](torch.ones_like(f(tokens))))
    right(lambda f: torch.func.jacrev(f)(tokens))
    right(lambda f: torch.func.jacfwd(f)(tokens))
    both = torch.stack([tokens, 2 * tokens.flip(0)])
    expected = torch.stack([torch.func.grad(loss(truth))(t) for t in both])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss(field)))(both), expected)
    through = torch.func.grad(lambda t: torch.vmap(field)(t).square().sum())(both)
    torch.testing.assert_close(through, expected)
    # Derivatives of derivatives, each mode in the other.
    ones = torch.ones_like(tokens)

    def directional(f: Function) -> Function:
        return lambda tokens: torch.func.jvp(loss(f), (tokens,), (ones,))[1]

    right(lambda f: torch.func.jacfwd(torch.func.jacfwd(lambda t: loss(f)(t.sin())))(tokens))
    right(lambda f: torch.func.grad(lambda t: directional(f)(t.sin()))(tokens))
    right(lambda f: torch.func.hessian(loss(f))(tokens))
    right(lambda f: torch.func.jacrev(torch.func.grad(loss(f)))(tokens))
    right(lambda f: torch.func.grad(directional(f))(tokens))
    right(lambda f: torch.func.jvp(directional(f), (tokens,), (tangent,)))


def test_torch_func_of_shift() -> None:
    offsets = torch.tensor([[0.0, 1.0], [1.5, -2.25]], dtype=torch.float64)
    image = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        actual, expected = (
            transform(lambda image, m=module: m.shift(image, offsets))(image)
            for module in (torch.ops.srt, reference)
        )
        torch.testing.assert_close(actual, expected)


def each_of(function: Function, size: int, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    results = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    return torch.stack(results)


@each_reduce
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (2, None, None), (-1, 0, None), (None, 1, None), (1, None, 0)]
)
def test_vmap(in_dims: tuple[int | None, int | None, int | None], reduce: str) -> None:
    module = srt_ext if in_dims[0] == 0 else torch.ops.srt
    case = replace(ENSEMBLES["grid"], channels=3)
    grid, patch = case.grid, case.patch
    size = 4
    shapes = ((9, 2, 15, 3), (9, 2), (9,))
    args = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        mapped = list(shape)
        if dim is not None:
            mapped.insert(dim if dim >= 0 else len(shape) + 1 + dim, size)
        args.append(torch.rand(mapped) * 4)
    if in_dims[0] == -1:
        args[0] = args[0].movedim(-1, 0).contiguous().movedim(0, -1)  # dense channels in each

    def field(tokens: Any, offsets: Any, weights: Any) -> Any:
        if reduce == "moments":
            return torch.stack(module.ensemble_moments(tokens, offsets, grid, patch, weights))
        given = (weights,) if reduce == "mean" else ()
        return module.ensemble(tokens, offsets, grid, patch, *given, reduce=reduce)

    if reduce == "median" and in_dims == (1, None, 0):
        in_dims = (1, None, None)
        args[2] = args[2][0]
    actual = torch.vmap(field, in_dims)(*args)
    assert torch.equal(actual, each_of(field, size, in_dims, *args))


@pytest.mark.parametrize("in_dims", [(0, None), (4, None), (1, 2), (None, 0)])
def test_vmap_of_shift(in_dims: tuple[int | None, int | None]) -> None:
    shapes = [[2, 3, 5, 6], [7, 2]]
    for shape, dim in zip(shapes, in_dims, strict=True):
        if dim is not None:
            shape.insert(dim, 4)
    args = [torch.randn(shape) for shape in shapes]
    actual = torch.vmap(srt_ext.shift, in_dims)(*args)
    assert torch.equal(actual, each_of(srt_ext.shift, 4, in_dims, *args))


def test_vmap_of_vmap_and_of_an_empty_batch() -> None:
    offsets = torch.randn(3, 2)

    def field(tokens: torch.Tensor) -> torch.Tensor:
        return srt_ext.ensemble(tokens, offsets, (2, 3), (2, 2))

    tokens = torch.randn(4, 5, 3, 2, 6, 7)
    twice = torch.vmap(torch.vmap(field))(tokens)
    assert torch.equal(twice, torch.stack([torch.stack([field(t) for t in row]) for row in tokens]))
    assert torch.vmap(field)(torch.randn(4, 3, 0, 6, 7)).shape == (4, 0, 7, 4, 6)


# ---- opcheck, compile, export --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reduce"),
    [("weights", "mean"), ("stride", "median"), ("weights", "moments"), ("one_token", "moments")],
)
def test_opcheck_with_gradients(name: str, reduce: str) -> None:
    case = ENSEMBLES[name]
    (tokens, *args, weights), modes = case.call(case.tokens().requires_grad_())
    if weights is not None and reduce != "median":
        args.append(weights.requires_grad_())
    op = torch.ops.srt.ensemble_moments if reduce == "moments" else torch.ops.srt.ensemble
    modes |= {} if reduce == "moments" else {"reduce": reduce}
    torch.library.opcheck(op.default, (tokens, *args), modes)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_gradients(requires_grad: bool) -> None:
    case = replace(ENSEMBLES["weights"], channels=3, stride=(6, 10))
    (tokens, *place, weights), modes = case.call(case.tokens())
    grad, grad_var = torch.randn(2, *case.shape, requires_grad=requires_grad)
    opcheck, ops = torch.library.opcheck, torch.ops.srt
    opcheck(ops._mean_backward.default, (grad, *place, weights), modes)
    opcheck(ops._median_backward.default, (grad, None, tokens, *place, None), modes)
    opcheck(ops._moments_backward.default, (grad, grad_var, tokens, *place, weights), modes)
    for var in (None, grad_var):
        opcheck(ops._weights_backward.default, (grad, var, tokens, *place, weights), modes)


@pytest.mark.parametrize("name", ["bicubic", "strided"])
def test_opcheck_of_shift_and_its_gradient(name: str) -> None:
    case = SHIFTS[name]
    (image, offsets), modes = case.call(case.image().requires_grad_())
    torch.library.opcheck(torch.ops.srt.shift.default, (image, offsets), modes)
    grad = torch.randn(len(offsets), *image.shape, requires_grad=True)
    torch.library.opcheck(torch.ops.srt._shift_backward.default, (grad, offsets), modes)


def model(
    tokens: torch.Tensor, image: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every op that has a derivative, between others."""
    place = (offsets, (3, 5), (4, 6))
    mean = srt_ext.ensemble(2 * tokens, *place, weights)
    moments = srt_ext.ensemble_moments(tokens.sin(), *place, weights, stride=2)
    median = srt_ext.ensemble(tokens, *place, reduce="median", border="clamp")
    views = srt_ext.shift(image * 3, offsets)
    total: torch.Tensor = mean.square().mean() + moments[0].mean() + moments[1].square().mean()
    total = total + (median * mean).mean() + views.square().mean()
    return total


def model_inputs(views: int = 4, batch: int = 2, channels: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(views)
    return [
        torch.randn(views, batch, 15, channels, generator=generator),
        torch.randn(batch, 3, 7, 9, generator=generator),
        torch.randn(views, 2, generator=generator) * 3,
        torch.rand(views, generator=generator),
    ]


def with_gradients(function: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [t.clone().requires_grad_(i != 2) for i, t in enumerate(inputs)]
    result = function(*inputs)
    result.backward()
    return [result.detach(), *(t.grad for t in inputs if t.grad is not None)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_forward_and_backward(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = with_gradients(model, model_inputs())
    # The key of a cached graph does not contain the derivatives of custom ops.
    with torch._inductor.config.patch(force_disable_caches=True):
        actual = with_gradients(compiled, model_inputs())
    assert len(actual) == 4
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [True, None])
def test_other_sizes_do_not_compile_again(dynamic: bool | None) -> None:
    """Batches, views and channels are symbols, forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in ((4, 5, 6), (7, 3, 8)):  # without ``dynamic`` the second call finds the symbols
        with_gradients(compiled, model_inputs(*sizes))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in ((9, 5, 6), (3, 4, 9), (12, 3, 2)):
            expected = with_gradients(model, model_inputs(*sizes))
            torch.testing.assert_close(with_gradients(compiled, model_inputs(*sizes)), expected)
    torch.compiler.reset()


class Model(torch.nn.Module):
    def forward(self, tokens: Any, image: Any, offsets: Any, weights: Any) -> torch.Tensor:
        return model(tokens, image, offsets, weights)


def test_export() -> None:
    views, batch = torch.export.Dim("views", min=2), torch.export.Dim("batch", min=2)
    shapes = ({0: views, 1: batch}, {0: batch}, {0: views}, {0: views})
    program = torch.export.export(Model(), tuple(model_inputs()), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"srt.shift.default", "srt.ensemble.default", "srt.ensemble_moments.default"} <= targets
    for module in (program.module(), program.run_decompositions().module()):
        for sizes in ((4, 2, 5), (9, 3, 5)):
            inputs = model_inputs(*sizes)
            torch.testing.assert_close(module(*inputs), model(*inputs), rtol=1e-6, atol=0)


# ---- modes of torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype_of_tokens(dtype: torch.dtype) -> None:
    case = ENSEMBLES["grid"]
    (tokens, *args), modes = case.call(case.tokens(dtype).requires_grad_())
    expected = srt_ext.ensemble(tokens, *args, **modes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        field = srt_ext.ensemble(tokens, *args, **modes)
        views = srt_ext.shift(torch.randn(1, 3, 5, 6), torch.zeros(2, 2))
        (grad,) = torch.autograd.grad(field.square().mean(), tokens)
    assert field.dtype == grad.dtype == dtype
    assert torch.equal(field, expected)
    assert views.dtype == torch.float32


@pytest.mark.parametrize(("name", "shapes"), [("grid", [(9, 2)]), ("weights", [(5, 2), (5,)])])
def test_a_graph_keeps_no_tokens_of_a_mean(name: str, shapes: list[tuple[int, ...]]) -> None:
    """A mean is linear: its backward reads offsets and weights alone."""
    case = ENSEMBLES[name]
    args, modes = case.call(case.tokens().requires_grad_())
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        srt_ext.ensemble(*args, **modes)
    assert [t.shape for t in saved] == shapes


@each_reduce
def test_a_field_may_be_written_before_its_backward(reduce: str) -> None:
    case = ENSEMBLES["grid"]
    tokens = case.tokens().requires_grad_()
    (_, *place), modes = case.call(tokens)
    if reduce == "moments":
        field = srt_ext.ensemble_moments(tokens, *place, **modes)[1]
    else:
        field = srt_ext.ensemble(tokens, *place[:3], reduce=reduce, **modes)
    field.add_(1).sum().backward()
    assert tokens.grad is not None


def test_a_stream_takes_no_tokens_that_require_grad() -> None:
    case = ENSEMBLES["grid"]
    (tokens, offsets, grid, patch, _), modes = case.call(case.tokens())

    def mean(tokens: torch.Tensor) -> torch.Tensor:
        running = srt_ext.RunningMean(grid, patch, **modes)
        running.update(tokens, offsets)
        return running.result().sum()

    for call in (
        lambda: mean(tokens.clone().requires_grad_()),
        lambda: torch.func.grad(mean)(tokens),
        lambda: torch.func.jvp(mean, (tokens,), (tokens,)),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"not differentiable|in-?place"):
            call()


def test_no_graph_without_grad_mode() -> None:
    case = ENSEMBLES["grid"]
    args, modes = case.call(case.tokens())
    assert not srt_ext.ensemble(*args, **modes).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not srt_ext.ensemble(*args, **modes).requires_grad
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(srt_ext.ensemble(*args, **modes)).tangent is None
    with torch.inference_mode():
        assert srt_ext.ensemble(*args, **modes).is_inference()
