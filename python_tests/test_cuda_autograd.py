"""Derivatives on a GPU: against the oracle, on torch's streams, in CUDA graphs and compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, PADDINGS, Ensemble, Shift, ensembles, shifts
from test_gradients import (
    ENSEMBLES,
    EVERYTHING,
    REDUCES,
    SHIFTS,
    Function,
    check_image_rounding,
    check_rounding,
    each_dtype,
    each_ensemble,
    each_reduce,
    each_shift,
    field_of,
    gradient,
    image_problem,
    model,
    model_inputs,
    oracle,
    problem,
    small_cases,
    with_gradients,
)
from torch.autograd import gradcheck

import srt_ext

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_values = pytest.mark.parametrize("values", ["host", "device"])


def check_tokens_gradient(
    case: Ensemble, reduce: str, dtype: torch.dtype, values: str = "host"
) -> None:
    tokens, grad = problem(case, reduce, dtype)
    on = DEVICE if values == "device" else None
    field = field_of(srt_ext, reduce, case, values=on)
    actual = gradient(field, tokens.to(DEVICE), grad.to(DEVICE))
    assert torch.equal(actual, gradient(field, tokens.to(DEVICE), grad.to(DEVICE)))
    if dtype == torch.float64:
        check_rounding(case, reduce, dtype, field, DEVICE)
    else:
        truth = oracle(case, reduce, dtype, torch.float64)
        same = oracle(case, reduce, dtype, torch.float32)
        assert_within_budget(actual.cpu(), truth, same.to(dtype))


@each_values
@each_dtype
@each_reduce
@each_ensemble
def test_gradient_of_tokens(case: Ensemble, reduce: str, dtype: torch.dtype, values: str) -> None:
    if reduce == "median" and torch.finfo(dtype).bits == 16:
        case = replace(case, upsample="nearest", stride=(1, 1))  # what is blended can tie
    check_tokens_gradient(case, reduce, dtype, values)


@given(ensembles(), st.sampled_from(REDUCES), st.sampled_from((torch.float32, torch.bfloat16)))
def test_gradient_of_tokens_of_any_call(case: Ensemble, reduce: str, dtype: torch.dtype) -> None:
    dtype = torch.float32 if reduce == "median" else dtype
    check_rounding(case, reduce, dtype, field_of(srt_ext, reduce, case), DEVICE)


def check_image_gradient(case: Shift, dtype: torch.dtype, values: str = "host") -> None:
    """Of a fixed sample."""
    on = DEVICE if values == "device" else "cpu"
    if dtype == torch.float64:
        check_image_rounding(case, dtype, DEVICE, on)
        return
    (image, offsets, modes, grad), truth, same = image_problem(case, dtype)
    views = lambda i: srt_ext.shift(i, offsets.to(on), **modes)  # noqa: E731
    actual = gradient(views, image.to(DEVICE), grad.to(DEVICE)).cpu()
    assert_within_budget(actual, truth, same.to(dtype))


@each_values
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_shift
def test_gradient_of_an_image(case: Shift, dtype: torch.dtype, values: str) -> None:
    check_image_gradient(case, dtype, values)


@pytest.mark.parametrize("padding", PADDINGS)
@given(case=shifts())
def test_gradient_of_an_image_of_any_call(padding: str, case: Shift) -> None:
    check_image_rounding(replace(case, padding=padding), torch.float32, DEVICE)


@each_reduce
def test_gradcheck(reduce: str) -> None:
    for case in small_cases().values():
        field = field_of(srt_ext, reduce, case)
        inputs = [case.tokens(torch.float64).to(DEVICE).requires_grad_()]
        if case.weights is not None and reduce != "median":
            weights = torch.tensor(case.weights, dtype=torch.float64, device=DEVICE)
            inputs.append(weights.requires_grad_())
        assert gradcheck(field, inputs, **EVERYTHING)


@each_reduce
def test_views_that_cover_nothing_get_no_gradient(reduce: str) -> None:
    case = replace(ENSEMBLES["grid"], weights=None)
    (tokens, offsets, grid, patch, _), modes = case.call(case.tokens().to(DEVICE))
    offsets = offsets.to(DEVICE)
    bad = offsets.clone()
    bad[2, 0], bad[5] = float("nan"), float("inf")
    kept = [v for v in range(len(offsets)) if v not in (2, 5)]

    def field(tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if reduce == "moments":
            return torch.stack(srt_ext.ensemble_moments(tokens, offsets, grid, patch, **modes))
        return srt_ext.ensemble(tokens, offsets, grid, patch, reduce=reduce, **modes)

    grad = torch.randn_like(field(tokens, offsets))
    result = gradient(lambda t: field(t, bad), tokens, grad)
    assert (result[[2, 5]] == 0).all()
    expected = gradient(lambda t: field(t, offsets[kept]), tokens[kept], grad)
    torch.testing.assert_close(result[kept], expected)


@pytest.mark.serial
def test_a_backward_runs_on_the_stream_of_its_forward() -> None:
    case = ENSEMBLES["grid"]
    tokens, grad = (t.to(DEVICE) for t in problem(case, "mean", torch.float32))
    field = field_of(srt_ext, "mean", case)
    expected = gradient(field, tokens, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work of another stream would overtake this
        late = tokens.clone().requires_grad_()
        (result,) = torch.autograd.grad(field(late), late, grad.clone())
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.serial
@each_reduce
def test_a_captured_backward(reduce: str) -> None:
    case = ENSEMBLES["weights" if reduce != "median" else "grid"]
    tokens, grad = (t.to(DEVICE) for t in problem(case, reduce, torch.float32))
    field = field_of(srt_ext, reduce, case, values=DEVICE)
    static, static_grad = tokens.clone().requires_grad_(), grad.clone()

    def step() -> torch.Tensor:
        return torch.autograd.grad(field(static), static, static_grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for factor in (1.0, -2.0):
        with torch.no_grad():
            static.copy_(tokens * factor)
        static_grad.copy_(grad + factor)
        graph.replay()
        assert torch.equal(result, gradient(field, tokens * factor, grad + factor))


@pytest.mark.serial
def test_compiled_training_steps_are_captured() -> None:
    """By inductor's CUDA graphs, forward and backward."""
    pytest.importorskip("triton")
    inputs = [t.to(DEVICE) for t in model_inputs()]
    expected = with_gradients(model, inputs)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # the first calls compile, warm up and capture
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(with_gradients(compiled, inputs), expected)
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("name", ["real", "bicubic"])
def test_vmap_and_torch_func(name: str) -> None:
    case = SHIFTS[name]
    (image, offsets), modes = case.call(case.image(torch.float64).to(DEVICE))

    def loss(image: torch.Tensor) -> torch.Tensor:
        return srt_ext.shift(image, offsets, **modes).square().sum()

    def on_the_cpu(function: Function) -> Any:
        return function(image.cpu())

    images = torch.stack([image, 2 * image])
    expected = torch.stack(
        [on_the_cpu(torch.func.grad(loss)), 2 * on_the_cpu(torch.func.grad(loss))]
    )
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(images).cpu(), expected)
