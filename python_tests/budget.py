"""How far a kernel may be from the truth (DESIGN section 6)."""

from __future__ import annotations

import torch


def assert_within_budget(
    actual: torch.Tensor, truth: torch.Tensor, same_precision: torch.Tensor
) -> None:
    """At most twice the error of the oracle's own code run in the kernel's precision.

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


def assert_same_sum(
    actual: torch.Tensor,
    expected: torch.Tensor,
    magnitude: torch.Tensor,
    terms: int,
    eps: float = torch.finfo(torch.float64).eps,
) -> None:
    """Two sums of the same ``terms`` products, in any order; float64 unless ``eps`` says otherwise.

    Each is within terms * eps of the sum of the products' sizes (``magnitude``), to first order; a
    few roundings more lie in the weights, in the count and in the division by it.
    """
    assert expected.dtype == torch.float64
    assert torch.finfo(actual.dtype).eps <= eps
    assert actual.shape == expected.shape
    bound = 2 * (terms + 8) * eps * magnitude.abs()
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, bound {bound.max():.3g}"
