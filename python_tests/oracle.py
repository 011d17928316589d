"""What the oracle says of a case, and whether a result agrees with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from backends import Ops, Place
from bounds import EnsembleBounds, ShiftBounds, gradient
from budget import assert_within_budget, assert_within_rounding
from samples import Ensemble, Shift

from srt_ext import reference

Run = Callable[[torch.Tensor], torch.Tensor]


def ensemble(
    case: Ensemble,
    tokens: torch.Tensor,
    reduce: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[B, C, H', W'], of moments [2, B, C, H', W']."""
    args, modes = case.fit(reduce).call(tokens)
    if reduce == "moments":
        return torch.stack(reference.ensemble_moments(*args, **modes, dtype=dtype))
    return reference.ensemble(*args, reduce=reduce, **modes, dtype=dtype)


def shift(case: Shift, image: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    args, modes = case.call(image)
    return reference.shift(*args, **modes, dtype=dtype)


def mean_gradient(
    case: Ensemble, grad: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """[V, B, N, C]."""
    tokens = torch.zeros_like(case.tokens(dtype))
    return gradient(partial(ensemble, case, dtype=dtype), tokens, grad.to(dtype))


def shift_gradient(
    case: Shift, grad: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """[B, C, H, W]."""
    image = torch.zeros(grad.shape[1:], dtype=dtype)
    return gradient(partial(shift, case, dtype=dtype), image, grad.to(dtype))


def field_of(
    module: Any,
    reduce: str,
    case: Ensemble,
    device: str = "cpu",
    place: Place = "host",
    **more: Any,
) -> Callable[..., torch.Tensor]:
    """The field as a function of its tokens (and weights); all of it in one tensor."""
    (_, *views, weights), modes = Ops(device).call(case, torch.empty(0), place)

    def field(tokens: torch.Tensor, weights: torch.Tensor | None = weights) -> torch.Tensor:
        if reduce == "moments":
            return torch.stack(module.ensemble_moments(tokens, *views, weights, **modes, **more))
        weights = None if reduce == "median" else weights
        return module.ensemble(tokens, *views, weights, reduce=reduce, **modes, **more)

    return field


# ---- checks -------------------------------------------------------------------------------------


def _fields(result: torch.Tensor, reduce: str) -> list[torch.Tensor]:
    return list(result) if reduce == "moments" else [result]


def _bounds(case: Ensemble, tokens: torch.Tensor, reduce: str) -> list[torch.Tensor]:
    bounds = EnsembleBounds(case.fit(reduce), tokens)
    if reduce == "moments":
        return [bounds.mean(), bounds.variance()]
    return [bounds.mean() if reduce == "mean" else bounds.median()]


def check_ensemble(
    case: Ensemble, tokens: torch.Tensor, result: torch.Tensor, reduce: str = "mean"
) -> None:
    """By forward error bounds."""
    truth = ensemble(case, tokens, reduce)
    fields = (_fields(result, reduce), _fields(truth, reduce), _bounds(case, tokens, reduce))
    for field in zip(*fields, strict=True):
        assert_within_rounding(*field)


@lru_cache(128)  # the same for every backend
def _expected(
    case: Ensemble, dtype: torch.dtype, reduce: str
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each field: the oracle's, what its code says in float32, and the bound."""
    tokens = case.tokens(dtype)
    truth, same = (ensemble(case, tokens, reduce, t) for t in (torch.float64, torch.float32))
    fields = (_fields(truth, reduce), _fields(same.to(dtype), reduce))
    return list(zip(*fields, _bounds(case, tokens, reduce), strict=True))


def check_sample(
    case: Ensemble, dtype: torch.dtype, result: torch.Tensor, reduce: str = "mean"
) -> None:
    """Of a fixed sample, ``case.tokens(dtype)``: by the oracle's own error, too."""
    expected = _expected(case, dtype, reduce)
    for field, (truth, same, bound) in zip(_fields(result, reduce), expected, strict=True):
        assert_within_rounding(field, truth, bound)
        if dtype != torch.float64:
            assert_within_budget(field, truth, same)


def check_shift(case: Shift, image: torch.Tensor, views: torch.Tensor) -> None:
    """By forward error bounds."""
    assert views.dtype == image.dtype
    bound = ShiftBounds(case, image.dtype).views(image)
    assert_within_rounding(views, shift(case, image), bound)


@lru_cache(128)
def _expected_views(
    case: Shift, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle's, what its code says in float32, and the bound."""
    image = case.image(dtype)
    bound = ShiftBounds(case, dtype).views(image)
    return shift(case, image), shift(case, image, torch.float32).to(dtype), bound


def check_shift_sample(case: Shift, dtype: torch.dtype, views: torch.Tensor) -> None:
    """Of a fixed sample, ``case.image(dtype)``: by the oracle's own error, too."""
    truth, same, bound = _expected_views(case, dtype)
    assert views.dtype == dtype
    assert_within_rounding(views, truth, bound)
    if dtype not in (torch.float64, torch.uint8):
        assert_within_budget(views, truth, same)


def large_enough(case: Ensemble, dtype: torch.dtype, values: int = 128) -> Ensemble:
    """In float32, so many values in a cell that the oracle's largest error is not one of a few."""
    batch = values // case.channels if dtype == torch.float32 else 1
    return replace(case, batch=max(case.batch, batch))


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual, expected)


def check_containment(
    run: Run,
    values: torch.Tensor,
    truth: torch.Tensor,
    assert_same: Callable[[torch.Tensor, torch.Tensor], None] = assert_same_bits,
) -> None:
    """What is not finite reaches what reads it, and changes nothing else.

    Args:
        run: from values to a result.
        values: some are not finite.
        truth: the oracle's result.
    """
    result, reached = run(values), ~truth.isfinite()
    assert torch.equal(~result.isfinite(), reached)
    clean = run(torch.where(values.isfinite(), values, 0))
    assert_same(result[~reached], clean[~reached])
