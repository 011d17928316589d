"""Designs of views: the offsets under which a model sees an image.

Every design is a :class:`Views`. The offsets of every design except :func:`patches` have mean 0, so
that features stay in place. Arguments of a wrong type raise a :class:`TypeError`, arguments out of
range a :class:`ValueError`.

Any real offsets are allowed, but a shift by a fraction of a pixel interpolates the image and blurs
it. Designs on whole pixels were better in nearly every measurement (research/README.md);
``offsets.round()`` rounds a design to whole pixels.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ._validation import (
    check_count,
    check_number,
    check_pair,
    check_string,
    check_tensor,
    is_integer,
    wrong,
)

MAX_VIEWS = 2**16  # a larger number is probably a mistake
MAX_RADIUS = 2**20  # pixels, the limit of the ops


class Views(NamedTuple):
    """The views of an image: each view is shifted, then mirrored.

    The tokens of a mirrored view are mirrored back before they are aggregated, with the same
    offset.

    Example:
        >>> Views(torch.tensor([[0.0, 0.0], [1.0, -1.0]])).take([1]).offsets
        tensor([[ 1., -1.]])
    """

    #: [V, 2], (dy, dx) in pixels, float32.
    offsets: torch.Tensor
    #: [V], float32, >= 0. None means equal weights.
    weights: torch.Tensor | None = None
    #: [V, 2], (y, x), bool. None means that no view is mirrored.
    mirror: torch.Tensor | None = None

    def take(self, index: torch.Tensor | slice | list[int]) -> Views:
        """Returns the views at ``index``, an index of the first dimension."""
        return Views(*(None if part is None else part[index] for part in self))  # type: ignore[arg-type]


def _check_radius(where: str, radius: float, least: int = 0) -> float:
    rule = f"radius must be from {least} to 2^20 pixels"
    value = check_number(f"views.{where}", rule, radius)
    if not least <= value <= MAX_RADIUS:  # also true for NaN
        raise wrong(ValueError, f"views.{where}", rule, radius)
    return value


def _check_views(where: str, n: int, least: int = 1, name: str = "n") -> int:
    count = check_count(f"views.{where}", name, n, least)
    if count > MAX_VIEWS:
        rule = f"the design must have at most {MAX_VIEWS} views"
        raise wrong(ValueError, f"views.{where}", rule, count)
    return count


# Designs are on the CPU and have a fixed dtype, whatever torch's defaults are.
def _indices(*bounds: int) -> torch.Tensor:
    return torch.arange(*bounds, device="cpu")


def _axis(n: int, radius: float) -> torch.Tensor:
    """[n], float64: evenly spaced values from -radius to radius, exactly symmetric."""
    return (2 * _indices(n) - (n - 1)).double() * radius / max(1, n - 1)


def _variance(radius: float) -> float:
    """The mean square of -radius, ..., radius, in pixels^2: one axis of :func:`grid`."""
    return radius * (radius + 1) / 3


def grid(radius: float, step: float = 1) -> Views:
    """Builds the full square grid: -radius, -radius + step, ..., radius on both axes.

    Args:
        radius: pixels, >= 0. A radius of half a patch covers every position within a token.
        step: pixels, > 0; it must divide 2 * radius (up to rounding), so that the grid is centred.

    Returns:
        (2 * radius / step + 1)^2 views, row by row.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range, ``step`` does not divide ``2 * radius``, or the
            grid has more than 65536 views.

    Example:
        >>> grid(1).offsets.shape, grid(0.5).offsets[0]
        (torch.Size([9, 2]), tensor([-0.5000, -0.5000]))
    """
    radius = _check_radius("grid", radius)
    rule = "step must be > 0 pixels, and finite"
    step = check_number("views.grid", rule, step)
    if not 0 < step < math.inf:
        raise wrong(ValueError, "views.grid", rule, step)
    steps, got = 2 * radius / step, f"radius {radius}, step {step}"
    if steps + 1 > MAX_VIEWS**0.5:
        raise ValueError(f"views.grid: the grid must have at most {MAX_VIEWS} views; got {got}")
    if abs(steps - round(steps)) > 1e-6 * round(steps):
        raise ValueError(f"views.grid: step must divide 2 * radius; got {got}")
    axis = _axis(round(steps) + 1, radius).float()
    return Views(torch.cartesian_prod(axis, axis))


def paper(radius: int) -> Views:
    """Builds the published design: the unshifted image, then the grid of whole pixels.

    The grid contains the unshifted image again, which therefore counts twice.

    Args:
        radius: pixels, a whole number >= 0.

    Returns:
        1 + (2 * radius + 1)^2 views, the unshifted image first.

    Raises:
        TypeError: ``radius`` is not an integer.
        ValueError: ``radius`` is negative or larger than 127.

    References:
        Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.

    Example:
        >>> paper(3).offsets.shape
        torch.Size([50, 2])
    """
    whole = grid(check_count("views.paper", "radius", radius, 0))
    return Views(torch.cat([whole.offsets.new_zeros(1, 2), whole.offsets]))


def _order(n: int, modulus: int, generator: int) -> torch.Tensor:
    """[n], int64: the index of the dx for each dy, by a rank-1 lattice rule.

    Modulo n, the rule is rotated to be symmetric about the centre. Modulo n + 1, it is already
    symmetric, and its point at the origin is dropped.
    """
    index = _indices(n)
    if modulus > n:
        return generator * (index + 1) % modulus - 1
    odd = generator % 2 == 1  # otherwise n is odd, because they have no common factor
    rotation = (generator - 1 if odd else generator - 1 + n) // 2
    return (generator * index + rotation) % n


def _lattice(n: int) -> torch.Tensor:
    """[n], int64: the order with the largest minimum distance between views."""
    found: list[tuple[int, int, int]] = []
    for modulus in (n, n + 1):
        generators = _indices(1, modulus)
        generators = generators[torch.gcd(generators, torch.full_like(generators, modulus)) == 1]
        least = torch.full_like(generators, 2 * modulus**2)
        # The shortest vector of a lattice with one point per m squares is at most 1.08 sqrt(m).
        for rows in range(1, math.isqrt(2 * modulus) + 1):
            columns = generators * rows % modulus
            least = least.minimum(rows**2 + columns.minimum(modulus - columns) ** 2)
        found += zip(least.tolist(), [modulus] * len(generators), generators.tolist(), strict=True)
    farthest = max(found)[0]
    orders = [_order(n, modulus, g) for least, modulus, g in found if least == farthest]
    place = 2 * _indices(n) - (n - 1)
    return min(orders, key=lambda order: abs(int((place * place[order]).sum())))


def _spread_evenly(n: int, radii: tuple[float, float]) -> torch.Tensor:
    """[n, 2], float32, sorted by dy: a lattice within ``radii``, (y, x) in pixels."""
    return torch.stack([_axis(n, radii[0]), _axis(n, radii[1])[_lattice(n)]], 1).float()


def lattice(n: int, radius: float) -> Views:
    """Builds a rank-1 lattice: n views, no two of which share a dy or a dx.

    Both coordinates use the n evenly spaced values from -radius to radius, paired by a
    multiplication modulo n or n + 1. The multiplier is the one with the largest distance between
    the closest two views, then the one with the least correlation of dy and dx. The design is
    symmetric: for every (dy, dx) it contains (-dy, -dx). Two or three views are on a diagonal.

    Args:
        n: number of views, >= 1. The offset of a single view is 0.
        radius: pixels, >= 0.

    Returns:
        n views, sorted by dy.

    Raises:
        TypeError: ``n`` is not an integer, or ``radius`` is not a number.
        ValueError: an argument is out of range.

    References:
        Sloan and Joe, "Lattice Methods for Multiple Integration", 1994.

    Example:
        >>> lattice(5, 2).offsets
        tensor([[-2.,  1.],
                [-1., -2.],
                [ 0.,  0.],
                [ 1.,  2.],
                [ 2., -1.]])
    """
    n, radius = _check_views("lattice", n), _check_radius("lattice", radius)
    return Views(_spread_evenly(n, (radius, radius)))


def sobol(n: int, radius: float, seed: int = 0) -> Views:
    """Draws n views from a scrambled Sobol sequence over the square, centred to mean 0.

    Centring may move some views slightly outside the square. The offsets are not whole pixels;
    after rounding to whole pixels the design is better than random views and worse than
    :func:`best`.

    Args:
        n: number of views, >= 1. Powers of two are distributed most evenly.
        radius: pixels, >= 0; half the side of the square.
        seed: seed of the scrambling, >= 0 and < 2^63.

    Returns:
        n views in the order of the sequence. The first views of it already cover the whole square.

    Raises:
        TypeError: ``n`` or ``seed`` is not an integer, or ``radius`` is not a number.
        ValueError: an argument is out of range.

    References:
        Sobol', "On the distribution of points in a cube and the approximate evaluation of
        integrals", 1967.

    Example:
        >>> sobol(8, 3).offsets.shape
        torch.Size([8, 2])
    """
    n, radius = _check_views("sobol", n), _check_radius("sobol", radius)
    seed = check_seed("views.sobol", seed)
    points = scrambled_sobol(n, seed)
    return Views(((points - points.mean(0)) * 2 * radius).float())


def check_seed(where: str, seed: object) -> int:
    value = check_count(where, "seed", seed, 0)
    if value >= 2**63:
        raise wrong(ValueError, where, "seed must be < 2^63", value)
    return value


def scrambled_sobol(n: int, seed: int) -> torch.Tensor:
    """Returns the first n points of a scrambled Sobol sequence, [n, 2] float64 in [0, 1]."""
    engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    # The engine keeps its first point in torch's default dtype, which may overflow.
    first = engine.quasi.float() / 2**engine.MAXBIT
    return torch.cat([first[None].double(), engine.draw(n, dtype=torch.float64)[1:]])


def ring(n: int, radius: float) -> Views:
    """Builds the unshifted image and n - 1 views on a circle around it.

    With the weights, dy and dx have the mean, variance and covariance of the whole
    ``grid(radius)``. The views on the circle share the weight 2 (radius + 1) / (3 radius) equally,
    which must not exceed 1: the radius is at least 2 pixels. :func:`best` has a smaller error with
    the same number of views.

    Args:
        n: number of views, >= 4: fewer than three views on a circle do not have the same variance
            along y and x.
        radius: radius of the circle in pixels, >= 2.

    Returns:
        n views with weights, the unshifted image first.

    Raises:
        TypeError: ``n`` is not an integer, or ``radius`` is not a number.
        ValueError: an argument is out of range.

    Example:
        >>> ring(5, 4).weights
        tensor([0.1667, 0.2083, 0.2083, 0.2083, 0.2083])
    """
    n, radius = _check_views("ring", n, 4), _check_radius("ring", radius, 2)
    angles = _indices(n - 1).double() * (2 * math.pi / (n - 1))
    # Rounded, so that a view on an axis has a coordinate of exactly 0.
    circle = radius * torch.stack([angles.sin(), angles.cos()], 1).round(decimals=12)
    share = 2 * _variance(radius) / radius**2
    weights = [1 - share] + [share / (n - 1)] * (n - 1)
    return Views(
        torch.cat([circle.new_zeros(1, 2), circle]).float(),
        torch.tensor(weights, dtype=torch.float32, device="cpu"),
    )


def radius_for(patch: int | tuple[int, int]) -> tuple[int, int]:
    """Returns the radius (y, x) of :func:`best` for a patch size: 3/8 of it, rounded, at least 1.

    Args:
        patch: (Ph, Pw), pixels per token, or one for both.

    Returns:
        (y, x) in whole pixels.

    Raises:
        TypeError: ``patch`` contains a value that is not an integer.
        ValueError: ``patch`` is not an integer or a pair of integers, each >= 1.

    Example:
        >>> radius_for(16), radius_for((14, 8))
        ((6, 6), (5, 3))
    """
    height, width = check_pair("views.radius_for", "patch", patch)
    return max(1, round(height * 3 / 8)), max(1, round(width * 3 / 8))


def best(count: int, radius: int | tuple[int, int] = 6) -> Views:
    """Builds ``count`` views that approximate the whole ``grid(radius)``.

    The design is a :func:`lattice` scaled to the variance of the whole grid, with each view rounded
    to whole pixels.

    The error is the distance to the field of the whole grid, divided by the distance of the
    unshifted image's field to it. On 20 photographs with a ViT-Ti/16, at three layers and radii
    from 2 to 8 pixels (research/README.md), it is 0.38 with 4 views, 0.24 with 7, 0.20 with 9 and
    0.13 with 16; the error of random views is 0.54, 0.41, 0.38 and 0.23. On average, no other
    design that was tested has a smaller error with these numbers of views, or with 5 or 13 (with
    25: 0.093, the best other design 0.090). Weights do not reduce the error.

    The quality of the whole grid depends on its radius. On real labels and a patch of 16 pixels, a
    radius of 6 was better than 3 for every count, and 8 and 12 were about as good as 6.
    :func:`radius_for` returns the same fraction, 3/8, of other patch sizes.

    Args:
        count: number of views, from 1 to (2 * radius + 1)^2, which yields the whole grid. If
            ``count`` is close to that, two views may coincide.
        radius: whole pixels, >= 0, (y, x) or one for both.

    Returns:
        ``count`` views without weights, so that they also support a median.

    Raises:
        TypeError: ``count`` or a value of ``radius`` is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> best(5).offsets
        tensor([[-5.,  3.],
                [-3., -5.],
                [ 0.,  0.],
                [ 3.,  5.],
                [ 5., -3.]])
    """
    count = _check_views("best", count, name="count")
    y, x = check_pair("views.best", "radius", radius, 0)
    _check_radius("best", max(y, x))
    whole = (2 * y + 1) * (2 * x + 1)
    if count > whole:
        raise ValueError(
            f"views.best: count must be <= {whole} at radius {radius}; got {count}. "
            "Increase the radius to use more views"
        )
    if count == whole:
        return Views(torch.cartesian_prod(*(_axis(2 * r + 1, r).float() for r in (y, x))))
    # The mean square of n values evenly spaced from -a to a is a^2 (n + 1) / (n - 1) / 3.
    share = 3 * (count - 1) / (count + 1)
    reach = (math.sqrt(_variance(y) * share), math.sqrt(_variance(x) * share))
    return Views(_spread_evenly(count, reach).round())


def _neighbours(where: str, distances: float | Sequence[float], steps: list[list[int]]) -> Views:
    """The unshifted image, then for each distance the views at ``distance * steps``."""
    rule = "distances must be one or more numbers > 0 and <= 2^20 pixels"
    several = isinstance(distances, Iterable) and getattr(distances, "shape", (1,)) != ()
    given: Any = distances if several else (distances,)
    reaches = [check_number(f"views.{where}", rule, distance) for distance in given]
    if not reaches or not all(0 < reach <= MAX_RADIUS for reach in reaches):
        raise wrong(ValueError, f"views.{where}", rule, reaches)
    _check_views(where, 1 + len(steps) * len(reaches))
    reach = torch.tensor(reaches, dtype=torch.float64, device="cpu")[:, None, None]
    offsets = (reach * torch.tensor(steps, device="cpu")).flatten(0, 1)
    return Views(torch.cat([offsets.new_zeros(1, 2), offsets]).float())


def moore(distances: float | Sequence[float]) -> Views:
    """Builds the unshifted image and its eight neighbours at each distance, as in HR-Dv2.

    The offsets are (-d, -d), (-d, 0), ..., (d, d): row by row, without (0, 0). HR-Dv2 shifts images
    circularly, as ``SRT(..., padding="circular", border="circular", upsample="nearest")`` does.

    Args:
        distances: distances in pixels, > 0, or a single number.

    Returns:
        The unshifted image, then 8 views per distance.

    Raises:
        TypeError: a distance is not a number.
        ValueError: a distance is out of range, or the list is empty.

    References:
        Docherty et al., "Upsampling DINOv2 features for unsupervised vision tasks and weakly
        supervised materials segmentation", 2024.

    Example:
        >>> moore((1, 2)).offsets.shape, moore(2).offsets[:4].tolist()
        (torch.Size([17, 2]), [[0.0, 0.0], [-2.0, -2.0], [-2.0, 0.0], [-2.0, 2.0]])
    """
    around = [[y, x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return _neighbours("moore", distances, [step for step in around if any(step)])


def neumann(distances: float | Sequence[float]) -> Views:
    """Builds the unshifted image and its four neighbours at each distance, as in HR-Dv2.

    The offsets are (-d, 0), (0, -d), (0, d) and (d, 0). See :func:`moore` for the reference.

    Args:
        distances: distances in pixels, > 0, or a single number.

    Returns:
        The unshifted image, then 4 views per distance.

    Raises:
        TypeError: a distance is not a number.
        ValueError: a distance is out of range, or the list is empty.

    Example:
        >>> neumann(1).offsets.tolist()
        [[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [1.0, 0.0]]
    """
    return _neighbours("neumann", distances, [[-1, 0], [0, -1], [0, 1], [1, 0]])


def patches(
    n: int,
    grid: int | tuple[int, int],
    fraction: float = 0.15,
    seed: int = 0,
    *,
    patch: int | tuple[int, int] = 16,
) -> Views:
    """Draws n views that are shifted by whole patches, as the teacher of PH-Reg.

    The first view is the unshifted image. The others are selected by farthest-point sampling from
    10 n different random offsets. Their mean is not 0, but with ``upsample="nearest"`` and
    ``stride=patch`` features stay in place because tokens move by whole tokens.

    PH-Reg fills the area outside the image with a colour ``fill`` [3, 1, 1], which is equivalent to
    ``SRT(lambda x: model(x + fill), ..., padding="zeros")(images - fill)``. It also mirrors each
    view except the first with probability 1/2; use ``Views(offsets, None, mirror)``.

    Args:
        n: number of views, >= 1 and at most (2 * ry + 1) * (2 * rx + 1).
        grid: (h, w), the number of tokens of an image, or one for both.
        fraction: the largest shift as a fraction of the grid, from 0 to 1: ry = round(fraction * h)
            patches up and down, rx = round(fraction * w) patches left and right.
        seed: seed of the draw, >= 0 and < 2^63.
        patch: (Ph, Pw), pixels per token, or one for both.

    Returns:
        n views with offsets in pixels, multiples of the patch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    References:
        Chen et al., "Vision Transformers with Self-Distilled Registers", 2025.

    Example:
        >>> (patches(10, grid=(37, 20), patch=14).offsets / 14).abs().amax(0)
        tensor([6., 3.])
    """
    n, seed = _check_views("patches", n), check_seed("views.patches", seed)
    grid = check_pair("views.patches", "grid", grid)
    rule = "fraction must be from 0 to 1"
    share = check_number("views.patches", rule, fraction)
    if not 0 <= share <= 1:  # also true for NaN
        raise wrong(ValueError, "views.patches", rule, fraction)
    height, width = (2 * round(share * tokens) + 1 for tokens in grid)
    if n > height * width:
        raise ValueError(
            f"views.patches: n must be <= {height * width}, the number of offsets within {share} "
            f"of a grid of {list(grid)}; got {n}"
        )
    middle = height * width // 2
    drawn = random.Random(seed).sample(range(height * width - 1), min(10 * n, height * width) - 1)
    pool = torch.tensor([middle, *(i + (i >= middle) for i in drawn)], device="cpu")
    steps = torch.stack([pool // width - height // 2, pool % width - width // 2], 1)
    side = torch.tensor(check_pair("views.patches", "patch", patch), device="cpu")
    return Views((steps[_farthest(steps, n)] * side).float())


def _farthest(points: torch.Tensor, n: int) -> list[int]:
    """Indices of n of the points [M, 2]: the first, then each time the farthest from all chosen."""
    found = [0]
    apart = torch.full((len(points),), 2**62, device="cpu")
    while len(found) < n:
        apart = apart.minimum((points - points[found[-1]]).square().sum(1))
        found.append(int(apart.argmax()))
    return found


def flipped(views: Views, axis: Literal["x", "y"] = "x") -> Views:
    """Doubles a design: the given views, then the mirror image of each.

    Args:
        views: a design. Weights are halved.
        axis: ``x`` mirrors left to right, ``y`` top to bottom. HR-Dv2 uses the views of both
            ``flipped(views)`` and ``flipped(views, "y")``, so it has each unmirrored view twice.

    Returns:
        2 V views with ``mirror``.

    Raises:
        TypeError: ``views`` is not a :class:`Views`.
        ValueError: ``axis`` is not ``x`` or ``y``.

    Example:
        >>> flipped(grid(0)).mirror
        tensor([[False, False],
                [False,  True]])
    """
    if not isinstance(views, Views):
        raise wrong(TypeError, "views.flipped", "views must be Views", type(views).__name__)
    if axis not in ("x", "y"):
        raise wrong(ValueError, "views.flipped", "axis must be 'x' or 'y'", repr(axis))
    offsets, weights, mirror = views
    given = torch.zeros_like(offsets, dtype=torch.bool) if mirror is None else mirror
    turned = torch.tensor([axis == "y", axis == "x"], device=given.device)
    return Views(
        torch.cat([offsets, offsets]),
        None if weights is None else torch.cat([weights, weights]) / 2,
        torch.cat([given, given ^ turned]),
    )


def spread(views: Views | torch.Tensor) -> Views:
    """Reorders views so that every consecutive part of them covers the whole design.

    The order steps through the list by the golden ratio. It is meant for
    :class:`srt_ext.RunningMedian`, whose error grows if consecutive views drift.

    Args:
        views: a design, or offsets [V, 2], (dy, dx) in pixels, in an order that drifts, such as the
            row order of a grid.

    Returns:
        The same V views in the new order.

    Raises:
        TypeError: the offsets are not a :class:`torch.Tensor`.

    Example:
        >>> spread(grid(1)).offsets[:3]
        tensor([[-1., -1.],
                [ 1.,  0.],
                [ 0.,  1.]])
    """
    design = views if isinstance(views, Views) else Views(views)
    check_tensor("views.spread", "offsets", design.offsets)
    return design.take(spread_order(len(design.offsets)))


def spread_order(count: int) -> list[int]:
    """Returns the order of :func:`spread` as indices of ``count`` views."""
    step = max(1, round(count * (5**0.5 - 1) / 2))
    while math.gcd(step, count) > 1:
        step += 1
    return [i * step % count for i in range(count)]


def _distances(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


# Converter of an argument: the pattern of its text.
_NUMBER = r"[0-9]+(\.[0-9]+)?"
_READERS: dict[Callable[[str], Any], str] = {
    int: "[0-9]+",
    float: _NUMBER,
    _distances: f"{_NUMBER}(,{_NUMBER})*",
    _size: "[0-9]+x[0-9]+",
}
# Name: function, converters of its arguments, number of required arguments.
_DESIGNS: dict[str, tuple[Callable[..., Views], tuple[Callable[[str], Any], ...], int]] = {
    "grid": (grid, (float, float), 1),
    "paper": (paper, (int,), 1),
    "lattice": (lattice, (int, float), 2),
    "sobol": (sobol, (int, float, int), 2),
    "ring": (ring, (int, float), 2),
    "best": (best, (int, int), 1),
    "moore": (moore, (_distances,), 1),
    "neumann": (neumann, (_distances,), 1),
    "patches": (patches, (int, _size, float, int), 2),
}
_FORMS = (
    "Designs: grid:RADIUS[:STEP], paper:RADIUS, lattice:N:RADIUS, sobol:N:RADIUS[:SEED], "
    "ring:N:RADIUS, best:N[:RADIUS], moore:D[,D...], neumann:D[,D...] (RADIUS, STEP and D in "
    "pixels), patches:N:HxW[:FRACTION[:SEED]] (H and W in tokens). The suffix +flip adds views "
    "mirrored left to right, +vflip top to bottom, +flip+vflip both"
)
_FLIPS: dict[str, tuple[Literal["x", "y"], ...]] = {
    "": (),
    "flip": ("x",),
    "vflip": ("y",),
    "flip+vflip": ("x", "y"),
}


def parse(text: str, patch: int | tuple[int, int] = 16, scale: float = 1) -> Views:
    """Builds a design from a string with its name and arguments.

    Args:
        text: ``grid:RADIUS[:STEP]``, ``paper:RADIUS``, ``lattice:N:RADIUS``,
            ``sobol:N:RADIUS[:SEED]``, ``ring:N:RADIUS``, ``best:N[:RADIUS]``, ``moore:D[,D...]``,
            ``neumann:D[,D...]`` or ``patches:N:HxW[:FRACTION[:SEED]]``. ``N`` alone means
            ``best:N``. Decimals are allowed where the function accepts them. The suffixes
            ``+flip``, ``+vflip`` and ``+flip+vflip`` add mirrored views (:func:`flipped`).
        patch: pixels per token of the enlarged image, (y, x) or one for both. It determines the
            radius of ``best:N`` (by :func:`radius_for`) and the shifts of ``patches``.
        scale: the factor by which the image is enlarged. Other radii and steps are in pixels of the
            original image; the returned offsets are rounded to whole pixels of the enlarged one.

    Returns:
        The views, with offsets in pixels of the enlarged image.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: ``text`` has none of these forms, or an argument is out of range.

    Example:
        >>> parse("grid:2.5").offsets.shape
        torch.Size([36, 2])
    """
    check_string("views.parse", "text", text)
    words, plus, suffix = text.partition("+")
    name, *numbers = words.split(":")
    if re.fullmatch("[0-9]+", words):
        name, numbers = "best", [words]
    reason = ""
    if name in _DESIGNS and suffix in _FLIPS and bool(plus) == bool(suffix):
        design, readers, least = _DESIGNS[name]
        given = list(zip(readers, numbers, strict=False))
        fits = all(re.fullmatch(_READERS[read], number) for read, number in given)
        if fits and least <= len(numbers) <= len(readers):
            try:
                values = [read(number) for read, number in given]
                if design is best and len(values) == 1:
                    found = best(values[0], radius_for(patch))
                elif design is patches:
                    found = patches(*values, patch=patch)
                else:
                    found = _enlarged(design(*values), scale)
                for axis in _FLIPS[suffix]:
                    found = flipped(found, axis)
                return found
            except ValueError as error:
                reason = f" ({error})"
    rule = "views must be a number of views, such as 4, or a design, such as grid:3"
    raise ValueError(f"{rule}; got {text!r}{reason}. {_FORMS}")


def _enlarged(design: Views, scale: float) -> Views:
    """Converts offsets in pixels to whole pixels of the image enlarged by ``scale``."""
    if scale == 1:
        return design
    return design._replace(offsets=(design.offsets.double() * scale).round().float())


def resolve(
    views: Views | torch.Tensor | str | int | tuple[torch.Tensor | None, ...],
    patch: int | tuple[int, int] = 16,
    scale: float = 1,
) -> Views:
    """Converts the ``views`` argument of :class:`srt_ext.SRT` to a design.

    Args:
        views: one of

            - a design (:class:`Views`);
            - offsets [V, 2], (dy, dx) in pixels;
            - a tuple (offsets, weights) or (offsets, weights, mirror) with weights [V] or None and
              mirror [V, 2] or None; ``offsets`` may also be a design without weights;
            - a string for :func:`parse`;
            - a number of views for :func:`best`.
        patch: pixels per token of the enlarged image, (y, x) or one for both.
        scale: the factor by which the image is enlarged. The offsets of strings and of
            :class:`Views` are rounded to whole pixels of the enlarged image; the offsets of tensors
            and tuples are not rounded.

    Returns:
        The views, with offsets in pixels of the enlarged image.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> resolve("ring:5:4").weights
        tensor([0.1667, 0.2083, 0.2083, 0.2083, 0.2083])
    """
    if isinstance(views, str):
        return parse(views, patch, scale)
    if is_integer(views):
        return best(views, radius_for(patch))  # type: ignore[arg-type]
    parts = views if isinstance(views, tuple) and len(views) in (2, 3) else (views, None)
    offsets, weights, mirror = (*parts, None)[:3]
    if isinstance(offsets, Views) and offsets[1:] == (None, None):  # a design with other weights
        return resolve(Views(offsets.offsets, weights, mirror), patch, scale)
    if not isinstance(offsets, torch.Tensor):
        raise TypeError(
            "SRT: views must be a design of srt_ext.views, a torch.Tensor, a tuple (offsets, "
            f"weights), a string or an integer; got {type(offsets).__name__}"
        )
    if offsets.dim() != 2 or offsets.shape[0] < 1 or offsets.shape[1] != 2:
        raise ValueError(f"SRT: views must be [V, 2] with V >= 1; got {list(offsets.shape)}")
    count = len(offsets)
    if weights is not None:
        check_tensor("SRT", "weights of views", weights)
        if weights.shape != (count,):
            rule = f"weights of views must be [V] with V = {count}"
            raise wrong(ValueError, "SRT", rule, list(weights.shape))
    if mirror is not None:
        check_tensor("SRT", "mirror of views", mirror)
        rule = f"mirror of views must be bool [V, 2], (y, x), with V = {count}"
        if mirror.dtype != torch.bool:
            raise wrong(TypeError, "SRT", rule, mirror.dtype)
        if mirror.shape != (count, 2):
            raise wrong(ValueError, "SRT", rule, list(mirror.shape))
    design = Views(offsets, weights, mirror)
    if isinstance(views, Views) or scale == 1:
        return _enlarged(design, scale)
    return design._replace(offsets=offsets * scale)
