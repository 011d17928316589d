"""The oracle's results, and checks of a kernel's result against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from backends import Backend, Ops, Place
from bounds import EnsembleBounds, ShiftBounds, WindowsBounds, gradient
from budget import assert_within_budget, assert_within_rounding
from samples import (
    DTYPES,
    ENSEMBLES,
    REDUCES,
    SHIFTS,
    WINDOWS,
    Ensemble,
    Shift,
    Windows,
    poison,
)

from srt_ext import reference

KERNELS = (
    *REDUCES,
    "mean_backward",
    "shift",
    "shift_backward",
    "windows",
    "windows_backward",
)
Case = Ensemble | Shift | Windows


def ensemble(
    case: Ensemble,
    tokens: torch.Tensor,
    reduce: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The oracle's result [B, C, H', W'], for moments [2, B, C, H', W']."""
    args, modes = case.fit(reduce).call(tokens)
    if reduce == "moments":
        return torch.stack(reference.ensemble_moments(*args, **modes, dtype=dtype))
    return reference.ensemble(*args, reduce=reduce, **modes, dtype=dtype)


def shift(case: Shift, image: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    args, modes = case.call(image)
    return reference.shift(*args, **modes, dtype=dtype)


def windows(case: Windows, image: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    args, modes = case.call(image)
    return reference.windows(*args, **modes, dtype=dtype)


def windows_points(case: Windows, grad: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """[2, B, N, 2]: the gradients of the centers and of the scale of each window."""
    (image, centers, window, scale), modes = case.call(image)
    centers = centers.double().requires_grad_()
    steps = torch.ones(2) if scale is None else scale
    steps = steps.double().expand(centers.shape).clone().requires_grad_()
    result = reference.windows(image, centers, window, steps, **modes)
    return torch.stack(torch.autograd.grad(result, (centers, steps), grad.double()))


def field_of(
    module: Any,
    reduce: str,
    case: Ensemble,
    device: str = "cpu",
    place: Place = "host",
    **more: Any,
) -> Callable[..., torch.Tensor]:
    """The field as a function of tokens (and weights); moments are stacked in one tensor."""
    (_, *views, weights), modes = Ops(device).call(case, torch.empty(0), place)

    def field(tokens: torch.Tensor, weights: torch.Tensor | None = weights) -> torch.Tensor:
        if reduce == "moments":
            return torch.stack(module.ensemble_moments(tokens, *views, weights, **modes, **more))
        weights = None if reduce == "median" else weights
        return module.ensemble(tokens, *views, weights, reduce=reduce, **modes, **more)

    return field


# ---- kernels by name ----------------------------------------------------------------------------


def samples_of(kernel: str) -> dict[str, Any]:
    if kernel.startswith("windows"):
        return WINDOWS
    return SHIFTS if kernel.startswith("shift") else ENSEMBLES


def dtypes_of(kernel: str) -> tuple[torch.dtype, ...]:
    return (*DTYPES, torch.uint8) if kernel in ("shift", "windows") else DTYPES


def values_of(kernel: str, case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Tokens, an image, or a random gradient of the result."""
    if kernel.endswith("backward"):
        generator = torch.Generator().manual_seed(case.seed + 1)
        return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)
    return case.tokens(dtype) if isinstance(case, Ensemble) else case.image(dtype)


def poisoned(kernel: str, case: Case, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """``values_of``, not all finite: rows of tokens, or pixels or cells of the others."""
    values = values_of(kernel, case, dtype)
    return poison(values, seed) if kernel in REDUCES else poison(values[..., None], seed)[..., 0]


def run(
    backend: Backend, kernel: str, case: Case, values: torch.Tensor, place: Place = "host"
) -> torch.Tensor:
    if kernel in REDUCES:
        return backend.ensemble(case, values, reduce=kernel, place=place)
    return getattr(backend, kernel)(case, values, place=place)


def truth(
    kernel: str, case: Case, values: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The oracle's result."""
    if kernel in REDUCES:
        return ensemble(case, values, kernel, dtype)
    if kernel == "shift":
        return shift(case, values, dtype)
    if kernel == "windows":
        return windows(case, values, dtype)
    if kernel == "windows_backward":
        function, shape = partial(windows, case, dtype=dtype), case.image(dtype).shape
    elif kernel == "shift_backward":
        function, shape = partial(shift, case, dtype=dtype), values.shape[1:]
    else:
        function, shape = partial(ensemble, case, dtype=dtype), case.tokens(dtype).shape
    return gradient(function, torch.zeros(shape, dtype=dtype), values.to(dtype))


def bound_of(kernel: str, case: Case, values: torch.Tensor) -> torch.Tensor:
    if kernel == "shift":
        return ShiftBounds(case, values.dtype).views(values)
    if kernel == "shift_backward":
        return ShiftBounds(case, values.dtype).gradient(values)
    if kernel == "windows":
        return WindowsBounds(case, values.dtype).windows(values)
    if kernel == "windows_backward":
        return WindowsBounds(case, values.dtype).gradient(values)
    if kernel == "mean_backward":
        return EnsembleBounds(case, case.tokens(values.dtype)).mean_gradient(values)
    bounds = EnsembleBounds(case.fit(kernel), values)
    if kernel == "moments":
        return torch.stack([bounds.mean(), bounds.variance()])
    return bounds.mean() if kernel == "mean" else bounds.median()


def check(kernel: str, case: Case, values: torch.Tensor, result: torch.Tensor) -> None:
    """Checks a result by forward error bounds."""
    assert_within_rounding(result, truth(kernel, case, values), bound_of(kernel, case, values))


# The oracle's results for fixed samples are computed once for all backends.
once = lru_cache(128)


@once
def _expected(kernel: str, case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's result and the bound, for ``values_of`` the case."""
    values = values_of(kernel, case, dtype)
    return truth(kernel, case, values), bound_of(kernel, case, values)


@once
def _in_float32(kernel: str, case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The result of the oracle's code in float32."""
    return truth(kernel, case, values_of(kernel, case, dtype), torch.float32).to(dtype)


def check_rounding(kernel: str, case: Case, dtype: torch.dtype, result: torch.Tensor) -> None:
    """Checks the result for ``values_of`` the case by forward error bounds."""
    assert result.dtype == dtype
    assert_within_rounding(result, *_expected(kernel, case, dtype))


def check_result(kernel: str, case: Case, dtype: torch.dtype, result: torch.Tensor) -> None:
    """Checks the result for ``values_of`` a fixed sample, also by the oracle's own error."""
    check_rounding(kernel, case, dtype, result)
    if dtype in (torch.float64, torch.uint8):
        return
    exact, same = _expected(kernel, case, dtype)[0], _in_float32(kernel, case, dtype)
    fields = (
        zip(result, exact, same, strict=True) if kernel == "moments" else [(result, exact, same)]
    )
    for field in fields:
        assert_within_budget(*field, times=4 if kernel == "mean" else 2)


def check_sample(
    kernel: str, backend: Backend, case: Case, dtype: torch.dtype, place: Place = "host"
) -> None:
    result = run(backend, kernel, case, values_of(kernel, case, dtype), place)
    check_result(kernel, case, dtype, result)


class Spoilt(NamedTuple):
    """Values that are not all finite, and the results of the oracle."""

    values: torch.Tensor
    expected: torch.Tensor
    clean: torch.Tensor  # values with 0 instead of non-finite values
    of_clean: tuple[torch.Tensor, ...]  # for the mean: the oracle's result and the bound

    @classmethod
    def of(cls, kernel: str, case: Case, values: torch.Tensor) -> Spoilt:
        clean = torch.where(values.isfinite(), values, 0)
        of_clean = (truth, bound_of) if kernel == "mean" else ()
        parts = (function(kernel, case, clean) for function in of_clean)
        return cls(values, truth(kernel, case, values), clean, tuple(parts))


@once
def _poisoned(kernel: str, case: Case, dtype: torch.dtype, seed: int) -> Spoilt:
    return Spoilt.of(kernel, case, poisoned(kernel, case, dtype, seed))


def check_containment(
    kernel: str, backend: Backend, case: Case, dtype: torch.dtype, seed: int = 1
) -> None:
    """As check_contained, for ``poisoned`` values."""
    check_contained(kernel, backend, case, _poisoned(kernel, case, dtype, seed))


def check_contained(kernel: str, backend: Backend, case: Case, spoilt: Spoilt) -> None:
    """Asserts that a non-finite value reaches the outputs that read it and changes no others.

    Near it, a mean that walks is summed in another order (on CUDA at every stride), so the other
    outputs are within the error bound there, but not bitwise equal.
    """
    values, expected, clean, of_clean = spoilt
    result, reached = run(backend, kernel, case, values), ~expected.isfinite()
    assert torch.equal(~result.isfinite(), reached)
    if kernel in ("median", "moments"):
        # An infinite value that is not the median does not show. A variance may be Inf or NaN.
        first = 0 if kernel == "moments" else ...
        assert torch.equal(result[first].isinf(), expected[first].isinf())
        return
    on_cpu = isinstance(backend, Ops) and backend.device == "cpu"
    if kernel == "mean" and not (on_cpu and min(case.stride) > 1):
        known = torch.where(reached, of_clean[0].to(result.dtype), result)
        assert_within_rounding(known, *of_clean)
    else:
        backend.assert_same(result[~reached], run(backend, kernel, case, clean)[~reached])


def large_enough(case: Ensemble, dtype: torch.dtype, values: int = 304) -> Ensemble:
    """Enlarges the batch in float32, so that the oracle's largest error is one of many values."""
    batch = values // case.channels if dtype == torch.float32 else 1
    return replace(case, batch=max(case.batch, batch))
