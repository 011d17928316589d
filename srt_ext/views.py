"""Designs of views: which offsets a picture is shown under.

Every design is a tensor [V, 2] of (dy, dx) in pixels, float32.
"""

from __future__ import annotations

import math

import torch

from .checks import check_tensor

# More forwards than anybody waits for; a larger number is a slip of the keyboard.
MAX_VIEWS = 2**16


def grid(radius: int, step: int = 1) -> torch.Tensor:
    """All offsets of a square: -radius, -radius + step, ... up to radius, on both axes.

    Args:
        radius: pixels, >= 0. Half a patch reaches every position within a token.
        step: pixels, >= 1; divides 2 * radius, so that the grid is centred.

    Example:
        >>> grid(1).shape
        torch.Size([9, 2])
    """
    if radius < 0 or step < 1 or 2 * radius % step:
        raise ValueError(
            "views.grid: radius must be >= 0, and step >= 1 must divide 2 * radius; "
            f"got radius {radius}, step {step}"
        )
    if (2 * radius // step + 1) ** 2 > MAX_VIEWS:
        raise ValueError(f"views.grid: at most {MAX_VIEWS} views; got radius {radius}, step {step}")
    axis = torch.arange(-radius, radius + 1, step, dtype=torch.float32)
    return torch.cartesian_prod(axis, axis)


def paper(radius: int) -> torch.Tensor:
    """The published design: the untouched picture, then the grid of whole pixels up to ``radius``.

    The identity is thus counted twice. Source: Lao et al., ICML 2024.

    Example:
        >>> paper(3).shape
        torch.Size([50, 2])
    """
    return torch.cat([torch.zeros(1, 2), grid(radius)])


def spread(offsets: torch.Tensor) -> torch.Tensor:
    """The same views in an order in which any few that follow each other spread over all of them.

    Steps of the golden ratio through the list, for :class:`srt_ext.RunningMedian`, whose error
    grows where the views drift.

    Args:
        offsets: [V, 2], (dy, dx) in pixels, in any order that drifts, such as that of a grid.

    Raises:
        TypeError: no tensor.

    Example:
        >>> spread(grid(1))[:3]
        tensor([[-1., -1.],
                [ 1.,  0.],
                [ 0.,  1.]])
    """
    check_tensor("views.spread", "offsets", offsets)
    count = len(offsets)
    step = max(1, round(count * (5**0.5 - 1) / 2))
    while math.gcd(step, count) > 1:
        step += 1
    return offsets[torch.arange(count) * step % max(1, count)]


def parse(text: str) -> torch.Tensor:
    """A design from words: ``grid:RADIUS``, ``grid:RADIUS:STEP`` or ``paper:RADIUS``.

    Raises:
        ValueError: anything else.
    """
    designs = {"grid": (grid, (1, 2)), "paper": (paper, (1,))}
    name, *numbers = text.split(":")
    if name in designs:
        design, counts = designs[name]
        if len(numbers) in counts and all(n.isdecimal() for n in numbers):
            return design(*(int(n) for n in numbers))
    raise ValueError(
        "views must be grid:RADIUS, grid:RADIUS:STEP or paper:RADIUS with whole numbers, such as "
        f"grid:3; got {text!r}"
    )
