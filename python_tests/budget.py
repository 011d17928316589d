"""Error budgets: the allowed difference between a kernel and the oracle."""

from __future__ import annotations

import torch


def assert_within_budget(
    actual: torch.Tensor, truth: torch.Tensor, same_precision: torch.Tensor, times: float = 2
) -> None:
    """Asserts an error of at most ``times`` that of the oracle's code in the kernel's precision.

    For fixed samples only: for random samples the oracle's error may be small by chance.

    Args:
        actual: the kernel's result.
        truth: the oracle in float64.
        same_precision: the oracle in float32, cast to the dtype of the kernel.
        times: the allowed ratio of both errors; 4 for the mean, which walks from pixel to pixel.
    """
    assert actual.shape == truth.shape
    assert same_precision.dtype == actual.dtype
    if actual.numel() == 0:
        return
    allowed = times * (same_precision.double() - truth).abs().max()
    # Where that code happens to be exact, one rounding of the result remains.
    info = torch.finfo(actual.dtype)
    unit = info.eps * truth.abs().clamp(min=info.smallest_normal)
    _assert_at_most(allowed + unit, actual, truth)


def _assert_at_most(bound: torch.Tensor, actual: torch.Tensor, truth: torch.Tensor) -> None:
    error = (actual.double() - truth).abs()
    worst = (error - bound).flatten().argmax() if error.numel() else 0
    assert (error <= bound).all(), (
        f"error {error.flatten()[worst]:.3g} at {truth.flatten()[worst]:.3g}; "
        f"bound {bound.flatten()[worst]:.3g}"
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gamma(roundings: int, dtype: torch.dtype) -> float:
    """The largest relative error after ``roundings`` roundings to ``dtype``."""
    u = roundings * torch.finfo(dtype).eps / 2
    assert u < 1
    return u / (1 - u)


def assert_within_rounding(actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    """Asserts an error within the bound of the sums (bounds.py) and one rounding of the result.

    Args:
        actual: the kernel's result.
        truth: the oracle in float64.
        bound: the bound of the sums in float64, expandable to the shape of ``truth``.
    """
    assert actual.shape == truth.shape
    assert truth.dtype == bound.dtype == torch.float64
    dtype = accumulator(actual.dtype)
    # A product that is too small for its type is off by half of the smallest number above 0. The
    # smallest normal number is 2^24 times that (float64: 2^53 times), more than a sum has products.
    bound = bound.expand_as(truth) + torch.finfo(dtype).smallest_normal
    if actual.dtype == torch.uint8:  # rounds to an integer, and saturates
        truth, bound = truth.clamp(0, 255), bound + 0.5
    elif actual.dtype != dtype:
        info = torch.finfo(actual.dtype)
        least = info.smallest_normal * info.eps  # above 0
        bound = bound + info.eps / 2 * (truth.abs() + bound) + least / 2
    _assert_at_most(bound, actual, truth)
