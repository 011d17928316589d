"""How far a kernel may be from the truth (DESIGN section 6)."""

from __future__ import annotations

import torch

# The size of a sum's terms and how often each of them is rounded; or a bound, and None.
Part = tuple[torch.Tensor, int | None]


def assert_within_budget(
    actual: torch.Tensor, truth: torch.Tensor, same_precision: torch.Tensor
) -> None:
    """At most twice the error of the oracle's own code run in the kernel's precision.

    For fixed samples: of random ones the oracle's error may happen to be small.

    Args:
        actual: the kernel's result.
        truth: the oracle in float64.
        same_precision: the oracle in float32, cast to the dtype of the kernel.
    """
    assert actual.shape == truth.shape
    assert same_precision.dtype == actual.dtype
    if actual.numel() == 0:
        return
    allowed = 2 * (same_precision.double() - truth).abs().max()
    # Where that code happens to be exact, one rounding of the result remains.
    info = torch.finfo(actual.dtype)
    unit = info.eps * truth.abs().clamp(min=info.smallest_normal)
    error = (actual.double() - truth).abs()
    worst = (error - allowed - unit).argmax()
    assert (error <= allowed + unit).all(), (
        f"error {error.flatten()[worst]:.3g} at {truth.flatten()[worst]:.3g}; "
        f"allowed {allowed:.3g} + {unit.flatten()[worst]:.3g}"
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of this dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gamma(roundings: int, dtype: torch.dtype) -> float:
    """By how much, relative to itself, so many roundings to ``dtype`` change a number."""
    u = roundings * torch.finfo(dtype).eps / 2
    assert u < 1
    return u / (1 - u)


def assert_within_rounding(actual: torch.Tensor, truth: torch.Tensor, parts: list[Part]) -> None:
    """Within a bound that no input exceeds: of the sums' roundings, and of the one to the result.

    Args:
        actual: the kernel's result.
        truth: the oracle in float64.
        parts: what the bound of the sums is the sum of (bounds.py).
    """
    assert actual.shape == truth.shape
    assert truth.dtype == torch.float64
    dtype = accumulator(actual.dtype)
    sums = torch.finfo(dtype)
    bound = torch.zeros_like(truth)
    for size, roundings in parts:
        assert size.shape == truth.shape
        if roundings is None:
            bound += size
        else:
            # A product may also be too small for its type: then it is off by half of the least. A
            # sum of sums of n has no more than n^2 products.
            bound += gamma(roundings, dtype) * size + roundings**2 * _least(sums)
    if actual.dtype == torch.uint8:  # rounds to an integer, and saturates
        truth, bound = truth.clamp(0, 255), bound + 0.5
    elif actual.dtype != dtype:
        info = torch.finfo(actual.dtype)
        bound = bound + info.eps / 2 * (truth.abs() + bound) + _least(info)
    error = (actual.double() - truth).abs()
    worst = (error - bound).flatten().argmax() if error.numel() else 0
    assert (error <= bound).all(), (
        f"error {error.flatten()[worst]:.3g} at {truth.flatten()[worst]:.3g}; "
        f"bound {bound.flatten()[worst]:.3g}"
    )


def _least(info: torch.finfo) -> float:
    """Half of the smallest number above 0."""
    return info.smallest_normal * info.eps / 2
