"""How far roundings can take a result: a forward error bound for every op, none of which is luck.

A sum of products that are each rounded n times at most, on their way through weights, products and
sums, is within gamma(n) times the sum of their sizes (Higham, Accuracy and Stability of Numerical
Algorithms, lemma 3.1). What is counted here is read off the kernels of both backends; where they
differ it is the larger number. A bound is a list of such parts, (size, roundings), for
``assert_within_rounding``.

A truth is rounded, too: the oracle adds its own roundings to float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from budget import Part, accumulator, gamma
from samples import Ensemble, Shift

from srt_ext import reference

# What float64 has beside float32: as many roundings to it are one to float32.
_DOUBLES = 2**29


@dataclass(frozen=True)
class AxisFacts:
    """Of one axis, the largest over its views."""

    taps: int  # tokens that a cell reads
    cells: int  # cells that read a token
    pixels: int  # pixels that read a token
    run: int  # cells that follow each other and are alike in every view


def _alike(rows: torch.Tensor) -> int:
    """The most rows [n, ...] that follow each other and may be equal as float32."""
    longest = length = 1
    for before, row in pairwise(rows):
        length = length + 1 if torch.allclose(before, row, rtol=2.0**-22, atol=0) else 1
        longest = max(longest, length)
    return longest


def _axis_facts(case: Ensemble, axis: int) -> AxisFacts:
    tokens, patch, stride = case.grid[axis], case.patch[axis], case.stride[axis]
    values = torch.tensor(case.offsets, dtype=case.value_dtype).double()[:, axis].tolist()
    weights = case.weights or [1.0] * len(values)
    offsets = {d for d, weight in zip(values, weights, strict=True) if weight > 0} or set(values)
    tables, pixels = [], 0
    for d in sorted(offsets):
        reads, seen, counted = reference._axis(d, tokens, patch, case.upsample, case.border)
        table = torch.zeros(tokens * patch, tokens + 1, dtype=torch.float64)
        for token, weight in reads:
            rows = torch.arange(len(token))
            table.index_put_((rows, token), torch.where(seen, weight, 0), accumulate=True)
        table[:, tokens] = counted.double()
        pixels = max(pixels, int((table[:, :tokens] > 0).sum(0).max()))
        tables.append(table.unflatten(0, (-1, stride)).sum(1))
    cells = torch.stack(tables, 1)  # [cells, offsets, tokens and the count]
    reading = cells[..., :tokens] > 0
    return AxisFacts(int(reading.sum(2).max()), int(reading.sum(0).max()), pixels, _alike(cells))


class EnsembleBounds:
    """The roundings of ensemble, of moments, of their streams and gradients, for one call.

    Args:
        case: the call.
        tokens: [V, B, N, C], of the call.
    """

    def __init__(self, case: Ensemble, tokens: torch.Tensor) -> None:
        self.case, self.tokens = case, tokens
        self.double = accumulator(tokens.dtype) == torch.float64
        self.views = len(case.offsets)
        self.y, self.x = (_axis_facts(case, axis) for axis in (0, 1))

    # ---- roundings ------------------------------------------------------------------------------

    def _in_double(self, n: int) -> int:
        """n roundings to float64, as roundings to the type of the sums."""
        return n if self.double else -(-n // _DOUBLES)

    def _axis_weight(self, axis: int) -> int:
        # 1 - f and a sum, both in double, for each pixel of the cell; a cast.
        return self._in_double(2 * self.case.stride[axis]) + 1

    @property
    def _weight(self) -> int:
        # Of a view: the quotient by the largest, a cast. It stands above and below in a mean.
        return 2

    @property
    def _total(self) -> int:
        # The weight of a cell, in double: two products and a sum for each view, the scale, what was
        # seen before; a quotient with it; a cast. And the weights in it.
        return self._in_double(self.views + 5) + 1 + self._weight

    @property
    def _of_oracle(self) -> int:
        # A value: the weight of a pixel, its product, the sum of 4, the sum over the pixels of a
        # cell, the quotient. Their mean: a product, V sums, the same of the counts, a quotient.
        height, width = self.case.stride
        return self._in_double(7 + height * width + 2 * self.views + 3)

    @property
    def mean(self) -> int:
        """Of a mean that is summed over the views of a dx, then along the row."""
        (_, offsets, *_), _ = self.case.call(self.tokens[:, :0])
        groups = Counter(offsets[:, 1].tolist())
        # Rows: the weight of the axis and of the view, their product, as many products and sums as
        # a column has inputs. Columns: a weight, and as many again. The inverse of the total.
        rows = self._axis_weight(0) + self._weight + 1 + max(groups.values()) * self.y.taps
        columns = self._axis_weight(1) + len(groups) * self.x.taps
        return rows + columns + self._total + 1 + self._of_oracle

    @property
    def value(self) -> int:
        """Of the value of one view: the weights are divided by the counts."""
        # Two sums, of rows and columns, or one over all taps, of products of three.
        weights = self._axis_weight(0) + 1 + self._axis_weight(1) + 1
        return weights + self.y.taps * self.x.taps + 1 + self._of_oracle

    @property
    def share(self) -> int:
        """Of the share that a view has of a cell, or of the views up to it (values.cu)."""
        # Above two products in double, a cast, and the weight; below their total.
        return self._in_double(2) + 1 + self._weight + self._total + 1

    @property
    def mean_of_values(self) -> int:
        """Of the mean of values, for values that are exact: a product and V - 1 sums."""
        return self.share + self.views + self._of_oracle

    # ---- sizes ----------------------------------------------------------------------------------

    def _values_of(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args, modes = self.case.call(tokens)
        stride = modes.pop("stride")
        fields, counts = [], []
        for scale, sums, count in reference._view_sums(
            *args, *modes.values(), stride, torch.float64
        ):
            fields.append(reference._ratio(sums, count))
            counts.append(scale * count)
        if not fields:
            empty = torch.zeros(1, *self.case.shape, dtype=torch.float64)
            return empty + 0 * tokens.sum(), torch.zeros(1, *self.case.shape[2:]).double()
        return torch.stack(fields), torch.stack(counts)

    @cached_property
    def _fields(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._values_of(self.tokens.double())

    @property
    def values(self) -> torch.Tensor:
        """[V', B, C, H', W'] of the views of weight > 0; 0 where one does not count."""
        return self._fields[0]

    @cached_property
    def shares(self) -> torch.Tensor:
        """[V', 1, 1, H', W'] of each of them of its cell."""
        counts = self._fields[1]
        return reference._ratio(counts, counts.sum(0).expand_as(counts))[:, None, None]

    @cached_property
    def sizes(self) -> torch.Tensor:
        """As ``values``, of the products' sizes: weights are not negative."""
        return self._values_of(self.tokens.double().abs())[0]

    @cached_property
    def size(self) -> torch.Tensor:
        """[B, C, H', W'] of a mean."""
        return (self.shares * self.sizes).sum(0)

    @cached_property
    def largest(self) -> torch.Tensor:
        """[B, C, H', W'] of a view that counts."""
        return torch.where(self.shares > 0, self.sizes, 0).amax(0)

    @cached_property
    def width(self) -> torch.Tensor:
        """[B, C, H', W'], not less than any two computed values of a cell are apart."""
        counts = self.shares > 0
        high = torch.where(counts, self.values, -torch.inf).amax(0)
        low = torch.where(counts, self.values, torch.inf).amin(0)
        apart = torch.where(counts.any(0), high - low, 0)
        return apart + 2 * self._gamma(self.value) * self.largest

    def _gamma(self, n: int) -> float:
        return gamma(n, accumulator(self.tokens.dtype))

    # ---- results --------------------------------------------------------------------------------

    def of_mean(self) -> list[Part]:
        return [(self.size, self.mean)]

    def of_mean_on_cuda(self) -> list[Part]:
        """The ends of runs are sums; between them a value is fma(t, last - first, first)."""
        if self.case.stride != (1, 1) or self.case.upsample == "nearest":
            # Every cell is an end, or both ends are the same sum.
            return self.of_mean()
        # t has 2 roundings, the difference 1, of a size up to that of both ends; the fma 1. Along
        # both axes.
        ends = self.size.amax((2, 3), keepdim=True).expand_as(self.size)
        parts: list[Part] = [(self.size, self.mean), (ends, 2 * (3 * 2 + 1) + 1)]
        # The oracle does not interpolate but takes each position by itself: 3 roundings of up to
        # the number of tokens, here and at the ends, and as much of the tokens on both sides.
        largest = self.tokens.double().abs().amax((0, 2))[..., None, None].expand_as(self.size)
        return [*parts, (largest, self._in_double(2 * 3 * 2 * sum(self.case.grid)))]

    def of_median(self) -> list[Part]:
        """No value of a view that counts is farther from its own: so is the median, of all."""
        return [(self.largest, self.value)]

    def of_moments_mean(self) -> list[Part]:
        return [(self.size, self.value + self.mean_of_values)]

    def of_variance(self, var: torch.Tensor, *, cuda: bool = False) -> list[Part]:
        """``var``: the true one."""
        squares = (self.shares * self.sizes.square()).sum(0).sqrt()
        return [(self._variance(var.clamp(min=0).sqrt(), squares, cuda), None)]

    def _variance(self, spread: torch.Tensor, size: torch.Tensor, cuda: bool) -> torch.Tensor:
        """``spread``: sqrt of the variance; ``size``: sqrt(sum s |f|^2); or not less than they are.

        The spread of computed values is within sqrt(sum s e^2) of the true one, with e what a value
        is off by.
        """
        off = self._gamma(self.value) * size
        if cuda:
            off = off + self._gamma(1) * self.width  # distances from the first value are rounded
        by_values = (2 * spread + off) * off  # (spread + off)^2 - spread^2
        spread = spread + off
        # What a mean of the values is off by: the kernel's, and the oracle's.
        shift = self._gamma(self.mean_of_values) * (size + off)
        return by_values + (self._of_west if cuda else self._of_two_passes)(spread, shift)

    def _of_two_passes(self, spread: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """sum s d^2 - (sum s d)^2 of the distances d from the computed mean.

        R = sum s d^2 is the variance and the square of what the mean is off by. The first sum is
        within gamma of R; what is subtracted, and should be, is the square of at most ``rest``.
        """
        # A difference on both sides of a square, a product, V products and sums, the subtraction.
        sums = self._gamma(self.share + self.views + 4 + self._of_oracle)
        rest = shift + self._gamma(self.share + self.views + 2) * (spread + shift)
        # Twice the last: the oracle does not subtract it.
        return sums * (spread + shift).square() + 2 * rest.square()

    def _of_west(self, spread: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """West's sum of w a b / W, with a = x - d before and b = x - d after d has got x.

        x are distances from the first value, so a, b and d are within the width of the values.
        Each step leaves d off by its own roundings: of the share, a, their product and the sum.
        """
        drift = self._gamma(self.views * (self.share + 3) + 1) * self.width
        # The weight, two products and a sum for each view; the total, its cast and the quotient.
        sums = self._gamma(self.share + self.views + 3 + self._total + 2 + self._of_oracle)
        by_drift = (1 + sums) * (2 * self.width + drift) * drift
        return sums * spread.square() + by_drift + shift.square()

    # ---- streams --------------------------------------------------------------------------------

    # Of the share of a chunk or a state in both of them: weights, sums in double, a cast.
    @property
    def _join(self) -> int:
        return 2 * self._weight + self._in_double(self.views + 6) + 1

    def of_stream_weight(self, joins: int) -> tuple[torch.Tensor, list[Part]]:
        """[H', W'] what the views of a stream weigh in a cell; in double, whatever the tokens."""
        weight = self._fields[1].sum(0)
        # The quotient by the largest weight, its product with that and with the pixels, V sums, the
        # states; the oracle's product and sums.
        return weight, [(weight, 3 + self.views + joins + 1 + self.views)]

    def of_stream_mean(self, joins: int) -> list[Part]:
        """``joins``: of the state with a chunk or another state.

        A join is old + share * (new - old), of which the distance, the product, the sum and the
        share are rounded: the distance to twice the size of any value. Or it is a sum of two
        products, which is less.
        """
        chunk = max(self.mean, self.value + self.mean_of_values)
        return [(self.size, chunk), (self.largest, joins * (2 * (self._join + 2) + 1) + 1)]

    def of_stream_variance(self, joins: int, *, cuda: bool = False) -> list[Part]:
        """Of a chunk, whose variance is at most a quarter of the squared width, and of joins.

        keep * old + share * new + keep * share * apart^2, where ``apart`` is off by as much as both
        means and keep * share is at most a quarter.
        """
        half = self.width / 2
        chunk = self._variance(half, self.largest, cuda)
        means = sum(self._gamma(n or 0) * size for size, n in self.of_stream_mean(joins))
        by_means = (self.width + means) * means
        joined = self._gamma(joins * (2 * self._join + 3 + 2 + 2))
        joined = joined * (chunk + (half + means).square())
        return [(chunk + joins * by_means + joined, None)]

    # ---- gradients ------------------------------------------------------------------------------

    def _folded(self, of_values: torch.Tensor) -> torch.Tensor:
        """What the tokens get of gradients [V', B, C, H', W'] of the values."""
        leaf = torch.zeros_like(self.tokens, dtype=torch.float64).requires_grad_()
        values, _ = self._values_of(leaf)
        (gradient,) = torch.autograd.grad(values, leaf, of_values.expand_as(values))
        return gradient

    @property
    def _gradient_of_oracle(self) -> int:
        # As forward, and a sum over the pixels that read a token along each axis, for two reads.
        return self._of_oracle + self._in_double(2 * (self.y.pixels + self.x.pixels))

    def of_mean_gradient(self, grad: torch.Tensor) -> list[Part]:
        """Weights as forward, products of three with the inverse and the view's, sums of cells."""
        weights = self._axis_weight(0) + self._axis_weight(1) + self._total + self._weight
        sums = self.y.cells + self.x.cells + 1  # on CUDA in two halves
        parts = self._folded(self.shares * grad.double().abs())
        return [(parts, weights + 3 + sums + self._gradient_of_oracle)]

    @property
    def _fold(self) -> int:
        """From the gradients of values to those of tokens."""
        # Weights divided by the counts, and their products; cells that are alike are summed first,
        # then columns, then rows. On CUDA a row of cells in parts of 16 or more, and three columns.
        weights = self._axis_weight(0) + 1 + self._axis_weight(1) + 1 + 2
        alike = min(self.y.run, self.y.cells) * min(self.x.run, self.x.cells)
        parts = -(-self.case.shape[3] // 16)
        sums = alike + self.x.cells + 4 + self.y.cells * parts
        return weights + sums + self._gradient_of_oracle

    def clear(self) -> torch.Tensor:
        """[B, C, H', W'] where no roundings make another view the median."""
        off = self._gamma(self.value) * self.sizes
        counts = (self.shares > 0).expand_as(self.values)
        ordered = torch.where(counts, self.values, torch.inf).sort(0)
        rank = ((counts.sum(0, keepdim=True) - 1).clamp(min=0)) // 2
        index = ordered.indices.gather(0, rank)
        median, own = self.values.gather(0, index), off.gather(0, index)
        close = ((self.values - median).abs() <= off + own) & counts
        return close.sum(0) <= 1

    def of_median_gradient(self, magnitude: torch.Tensor) -> list[Part]:
        """``magnitude``: the oracle's gradient for the sizes of the given one."""
        return [(magnitude, self._fold)]

    def of_moments_gradient(
        self, grad: torch.Tensor, grad_var: torch.Tensor, *, cuda: bool = False
    ) -> list[Part]:
        """Of share * (grad + 2 * grad_var * (value - mean)), folded.

        What is rounded beside the fold: the share, the difference, a product and a sum (on CUDA
        five more, of the inverse and of what is the same for all views). And the value and the mean
        are, which stand in the difference. One more covers roundings of roundings.
        """
        grad, grad_var = grad.double().abs(), 2 * grad_var.double().abs()
        mean = (self.shares * self.values).sum(0)
        fold = self._fold + self.share + 4
        mean_off = self.value + self.mean_of_values + 3 * self._of_oracle
        if not cuda:
            apart = (self.values - mean).abs()
            return [
                (self._folded(self.shares * (grad + grad_var * apart)), fold),
                (self._folded(self.shares * grad_var * self.sizes), self.value + 1),
                (self._folded(self.shares * grad_var * self.size), mean_off + 1),
            ]
        # There the values and the mean are taken relative to the mean of some cell nearby, and the
        # mean relative to some value: two distances, of two sizes each.
        largest = self.tokens.double().abs().amax((0, 2))[..., None, None].expand_as(self.size)
        rest = self._axis_weight(0) + self._axis_weight(1) + self._total + self._weight + 5
        return [
            (self._folded(self.shares * (grad + 4 * grad_var * largest)), fold + rest),
            (self._folded(self.shares * grad_var * largest), self.value + 1),
            (self._folded(self.shares * grad_var * 3 * largest), mean_off + 2 + 1),
        ]


# ---- shift --------------------------------------------------------------------------------------

# A weight of a pixel, in double; the fraction f is the same number here and in the kernels. The
# outer taps have three products, and g = 1 - f twice. In g * (0.75 + g * (1.5 - 1.25 * g)) the
# difference is off by up to 2.75 u beside a sum of 0.75 to 1.2: in all by less than 7 u.
_WEIGHT = 8


def _positions(d: float, n: int, padding: str, interpolation: str) -> torch.Tensor:
    """[taps, n] the pixel that each pixel reads by each tap, -1 for a padded zero."""
    first, weights = _taps(d, interpolation)
    places = torch.arange(n) + first + torch.arange(len(weights))[:, None]
    index, inside = reference._pad_index(places, n, padding)
    return torch.where(inside, index, -1)


def _taps(d: float, interpolation: str) -> tuple[int, list[float]]:
    """As shift_taps: the first position and the weights."""
    delta = torch.tensor(d, dtype=torch.float64)
    whole, nearest = torch.floor(-delta), torch.floor(0.5 - delta)
    if interpolation == "nearest" or (nearest + delta).abs() < 2.0**-40:
        return int(nearest), [1.0]
    taps = reference._taps(-delta - whole, interpolation)
    return int(whole) + taps[0][0], [float(weight) for _, weight in taps]


def _sizes(d: float, n: int, padding: str, interpolation: str) -> torch.Tensor:
    """[n, n] the sum of the sizes of the weights with which a pixel reads another one."""
    sizes = torch.zeros(n, n + 1, dtype=torch.float64)
    _, weights = _taps(d, interpolation)
    for weight, pixels in zip(
        weights, _positions(d, n, padding, interpolation) % (n + 1), strict=True
    ):
        size = torch.tensor(abs(weight), dtype=torch.float64)
        sizes.index_put_((torch.arange(n), pixels), size, accumulate=True)
    return sizes[:, :n]


class ShiftBounds:
    """The roundings of shift and of its gradient, for one call."""

    def __init__(self, case: Shift, dtype: torch.dtype) -> None:
        self.case = case
        self.double = accumulator(dtype) == torch.float64
        self.offsets = torch.tensor(case.offsets, dtype=case.value_dtype).double().tolist()

    def _matrices(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        modes = self.case.padding, self.case.interpolation
        for offset in self.offsets:
            y, x = (_sizes(d, n, *modes) for d, n in zip(offset, self.case.size, strict=True))
            yield y, x

    @property
    def _weights(self) -> int:
        # Of both axes, with a cast each; the oracle's own.
        of_axis = _WEIGHT if self.double else 1
        return 2 * (of_axis + 1) + (2 * of_axis if self.double else 1)

    def of_views(self, image: torch.Tensor) -> list[Part]:
        """A product for each tap and a sum for each but the first, along columns, then rows."""
        size = image.double().abs()
        views = torch.stack([y @ size @ x.T for y, x in self._matrices()])
        taps = {"nearest": 1, "bilinear": 2, "bicubic": 4}[self.case.interpolation]
        return [(views, self._weights + 2 * taps * (2 if self.double else 1))]

    def of_gradient(self, grad: torch.Tensor) -> list[Part]:
        """Rows of a pixel and its taps, then every position of its columns, then the views.

        A pixel of the border has as many positions as stand in the padding. On CUDA each of 8 warps
        sums its views, and rows in the padding by themselves.
        """
        sizes = grad.double().abs()
        total = torch.zeros(grad.shape[1:], dtype=torch.float64)
        for size, (y, x) in zip(sizes, self._matrices(), strict=True):
            total += y.T @ size @ x
        rows, columns = (
            [self._most(offset[axis], self.case.size[axis]) for offset in self.offsets]
            for axis in (0, 1)
        )
        in_view = max(4 + c + 4 + r for r, c in zip(rows, columns, strict=True))
        sums = in_view + sum(c + 1 for c in columns) + 8
        return [(total, self._weights + sums * (2 if self.double else 1))]

    def _most(self, d: float, n: int) -> int:
        """Positions at which one pixel stands, times the taps that read each (rows), at most."""
        pixels = _positions(d, n, self.case.padding, self.case.interpolation)
        counts = pixels[pixels >= 0].bincount(minlength=1)
        return int(counts.max())
