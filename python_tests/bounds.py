"""Forward error bounds for every op. They hold for all inputs.

A sum of products, each rounded at most n times on its way through weights, products and sums, is
within gamma(n) = n u / (1 - n u) times the sum of their absolute values (Higham, Accuracy and
Stability of Numerical Algorithms, lemma 3.1). The counts n follow from the code of the kernels.
They are upper bounds for both backends.

Each method returns a tensor: the largest distance of the sums from the oracle, before the sums are
rounded to the dtype of the output. ``assert_within_rounding`` adds that rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from unittest import mock

import torch
from budget import accumulator, gamma
from samples import Ensemble, Shift, Windows

from srt_ext import reference


def gradient(
    function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """The gradient of ``function`` at a tensor, for the gradient ``grad`` of its result."""
    at = at.detach().requires_grad_()
    result = function(at)
    if not result.requires_grad:  # the oracle does not read tokens that no view counts
        return torch.zeros_like(at)
    return torch.autograd.grad(result, at, grad)[0]


class EnsembleBounds:
    """Bounds for one call of ensemble or ensemble_moments, their streams and gradients.

    Args:
        case: the call.
        tokens: the tokens of the call, [V, B, N, C].
    """

    def __init__(self, case: Ensemble, tokens: torch.Tensor) -> None:
        self.case, self.tokens = case, tokens
        self.dtype = accumulator(tokens.dtype)
        self.views = len(case.offsets)
        # [B, C, 1, 1]. The value of a view is at most this: its weights add up to at most 1.
        self.largest = tokens.double().abs().amax((0, 2))[..., None, None]

        # Roundings to float64, of a kernel and the oracle together. A pixel adds 1 - f and f to the
        # weights of its cell. A view adds two products and a sum to the total. In the oracle: the
        # sum over the pixels of a cell; in its gradient two sums over the pixels of an axis, for
        # each of two taps; for each view a product and a sum in the mean and in the count. 20 cover
        # the rest: quotients, casts, four taps.
        (sy, sx), pixels = case.stride, sum(case.pixels)
        in_float64 = sy * sx + 2 * (sy + sx) + 4 * pixels + 5 * self.views + 20
        # Common to all results. Weights of both axes: a cast and the quotient by the count (4),
        # their product (1). The weight of a view: the quotient by the largest and a cast, in a
        # product and in the total (4). The total, or a share of it: casts and quotients (4).
        # Products with these (3). In float32, all roundings to float64 count as one more.
        self.fixed = 16 + (in_float64 if self.dtype == torch.float64 else 1)

        # The largest number of taps of a cell, as Axis::max_taps.
        more = 2 if case.border == "circular" else 0
        ty, tx = (
            min(n + more, 2 if s == 1 else (s - 1) // p + 3)
            for n, p, s in zip(case.grid, case.patch, case.stride, strict=True)
        )
        # The value of a view is a sum of at most ty * tx products, the mean of V values adds V.
        # The kernels of the mean sum the rows of the m views of one dx, then the columns of the g
        # different dx: m + g <= V + 1.
        self.count = self.fixed + ty * tx + (self.views + 1) * max(ty, tx)

    def _gamma(self, n: int) -> float:
        return gamma(n, self.dtype)

    # ---- results --------------------------------------------------------------------------------

    def mean(self) -> torch.Tensor:
        """[B, C, H', W'] for ensemble and for the mean of ensemble_moments."""
        args, modes = self.case.call(self.tokens.double().abs())
        bound = self._gamma(self.count) * reference.ensemble(*args, **modes)
        return bound + self._walk(self.views)

    def _walk(self, views: int) -> torch.Tensor:
        """[B, C, 1, 1]: the error that walks (csrc/srt/walk.h) over ``views`` add to the mean.

        Along y, where the kernel walks, and along x, whose weights of a sum add up to 1.

        In an interval the line of a view enters value and slope times t with weights of absolute
        values up to 2 and 1, since |t| slope <= 1/2; a step to its next line at a kink, of which
        there is one, adds (1, -2, 1) / patch times the distance of the kink, up to P/2, and t: 4.
        All of these belong to views that count. At most 5 taps a view, each rounded in its weight,
        product and sum; the product with t and its sum. On CUDA a cell adds up rounds, each of
        which has taps or adds zeros.
        """
        roundings = self.fixed + 5 * views + 2
        axes = sum(stride == 1 for stride in self.case.stride)
        return self._gamma(roundings) * 7 * axes * self.largest

    def median(self) -> torch.Tensor:
        """[B, C, 1, 1]: an order statistic has at most the largest error of the values."""
        return self.stream_mean(0)

    def stream_mean(self, joins: int) -> torch.Tensor:
        """[B, C, 1, 1] for the mean of a stream; with ``joins`` = 0 also for the value of any view.

        A join of the state with a chunk or another state is old + share * (new - old), or a sum
        of two products. The share is rounded at most ``fixed`` times, the distance and the product
        once each: for a size of up to 2 * largest. The sum is rounded once.
        """
        return self._gamma(self.count + 2 * joins * (self.fixed + 3)) * self.largest

    @cached_property
    def _values(self) -> torch.Tensor:
        """[1 + V', B, C, H', W']: NaN; values of views of weight > 0, NaN where uncounted."""
        args, modes = self.case.call(self.tokens.double())
        sums = reference._view_sums(*args, **modes, dtype=torch.float64)
        values = [total / count for _, total, count in sums]
        return torch.stack([torch.full(self.case.shape, torch.nan, dtype=torch.float64), *values])

    def variance(self, joins: int = 0) -> torch.Tensor:
        """[B, C, H', W'] for a variance; for that of a stream after ``joins`` joins.

        w: the width of a cell; no two computed values are farther apart. off: the error of a value,
        of a mean of values, and of the mean of a stream. V views; F = ``fixed``.

        - Values: the standard deviation is at most w / 2 and changes by at most off, so the
          variance changes by at most off * (w + off).
        - CPU: sum(s d^2) - sum(s d)^2, with d <= w + off the distances from the computed mean. Each
          sum is rounded at most F + V + 5 times, relative to sum(s |d|) or sum(s d^2). sum(s d)
          stands for the error of the mean, at most off.
        - CUDA (West): sum(w a b) / W, with a and b <= w the distances from a running mean. A step
          adds F + 3 roundings of size w to the error of that mean, which a and b both have: 2 V
          (F + 4). The product, the sum and the quotient: F + V + 5.
        - Joins: keep * old + share * new + keep * share * apart^2. 2 F + 8 roundings; apart, at
          most w, is off by 2 off, and keep * share <= 1 / 4: at most off * (w + off).

        In all gamma((2 (V + joins) + 1) (F + 5)) * w^2 + (4 + 2 joins) * off * (w + off). The
        factors 4 and 2 cover products of two errors and the error of the oracle's mean.
        """
        high = self._values.nan_to_num(-torch.inf).amax(0)
        low = self._values.nan_to_num(torch.inf).amin(0)
        width = (high - low).clamp(min=0) + 2 * self.stream_mean(0)
        off = self.stream_mean(joins)
        roundings = (2 * (self.views + joins) + 1) * (self.fixed + 5)
        return self._gamma(roundings) * width.square() + (4 + 2 * joins) * off * (width + off)

    def stream_weight(self, joins: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of the views of a stream and its bound, both [H', W'] in float64."""
        args, modes = self.case.call(self.tokens.double())
        weight = torch.zeros(self.case.shape[2:], dtype=torch.float64)
        for scale, _, count in reference._view_sums(*args, **modes, dtype=torch.float64):
            weight += scale * count
        # The quotient by the largest weight, products with it and with the pixels; V sums and the
        # joins; the oracle's product and V sums.
        return weight, gamma(2 * self.views + joins + 4, torch.float64) * weight

    # ---- gradients ------------------------------------------------------------------------------

    def _gradient(self, reduce: str, grad: torch.Tensor) -> torch.Tensor:
        """The oracle's gradient of the tokens."""

        def field(tokens: torch.Tensor) -> torch.Tensor:
            args, modes = self.case.call(tokens)
            return reference.ensemble(*args, reduce=reduce, **modes)

        return gradient(field, self.tokens.double(), grad.expand(self.case.shape))

    @cached_property
    def _cells(self) -> tuple[int, int]:
        """Along each axis, the largest number of cells of a view that read one token."""
        height, width = self.case.shape[2:]
        if self.case.border == "clamp":  # the edge token is read from any distance
            return height, width
        # A token is read by the pixels of its own patch and of half a patch at both ends.
        y, x = (2 * p // s + 2 for p, s in zip(self.case.patch, self.case.stride, strict=True))
        if self.case.border == "circular":  # a cell may read it twice
            return y, x
        return min(height, y), min(width, x)

    @property
    def _fold(self) -> int:
        """Roundings in the gradient of a mean: sums over rows, columns; on CUDA in two halves."""
        y, x = self._cells
        return self.fixed + y + x + 1

    def mean_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return self._gamma(self._fold) * self._gradient("mean", grad.double().abs())

    def clear(self) -> torch.Tensor:
        """[B, C, H', W']: True where rounding cannot make another view the median."""
        args, modes = self.case.call(self.tokens.double())
        median = reference.ensemble(*args, reduce="median", **modes)
        close = (self._values - median).abs() <= 2 * self.median()
        return close.sum(0) <= 1

    def median_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """As for the mean of one view."""
        return self._gamma(self._fold) * self._gradient("median", grad.double().abs())

    def moments_gradient(self, grad: torch.Tensor, grad_var: torch.Tensor) -> torch.Tensor:
        """For share * (grad + 2 * grad_var * (value - mean)), then as for the mean of one view.

        The term is rounded 5 times: a cast of the share, a difference, two products and a sum.
        Value and mean, which are means of one view and of all, are off by gamma(count) * largest
        each and by their walks. The gradient of the oracle's mean is the sum of share * grad.
        """
        grad, grad_var = grad.double().abs(), grad_var.double().abs()
        size = grad + 8 * grad_var * self.largest
        walks = 2 * grad_var * (self._walk(1) + self._walk(self.views))
        rounded = self._gamma(self._fold + 5 + self.count) * self._gradient("mean", size)
        return rounded + self._gradient("mean", walks)


class ShiftBounds:
    """Bounds for one call of shift and its gradient.

    Args:
        case: the call.
        dtype: the dtype of the image.
    """

    def __init__(self, case: Shift, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, accumulator(dtype)

    def _gamma(self, sums: int) -> float:
        # A weight in float64 is off by less than 8 u: outer taps are three products and twice
        # g = 1 - f, inner taps a product and a sum of at least 0.75 that is off by less than 7 u.
        # The oracle is rounded as often as a float64 kernel. In float32: a cast for each axis, and
        # one for all roundings to float64.
        n = 2 * (2 * 8 + sums) if self.dtype == torch.float64 else 2 + 1 + sums
        return gamma(n, self.dtype)

    def _sizes(self, image: torch.Tensor) -> torch.Tensor:
        """The oracle's views, computed with the absolute values of the weights."""
        args, modes = self.case.call(image)
        taps = reference._taps

        def sizes(f: torch.Tensor, interpolation: str) -> list[tuple[int, torch.Tensor]]:
            return [(k, weight.abs()) for k, weight in taps(f, interpolation)]

        with mock.patch.object(reference, "_taps", sizes):
            return reference.shift(*args, **modes)

    def views(self, image: torch.Tensor) -> torch.Tensor:
        """Up to four products and as many sums along each axis."""
        return self._gamma(2 * 4) * self._sizes(image.double().abs())

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Rows of a pixel, each by up to four taps, then columns, for each view.

        An axis of n pixels has n + 3 positions. A pixel is at 4 of them at most, with ``border``
        at all of them. In a view: a sum over the rows of a pixel with 4 taps each, over
        4 taps of a column, and over its columns. The sum over columns continues over all views.
        CUDA sums rows in the padding separately (4), and adds 8 shares of the views.
        """
        image = torch.zeros(grad.shape[1:], dtype=torch.float64)
        size = gradient(self._sizes, image, grad.double().abs())
        border = self.case.padding == "border"
        rows, columns = (n + 3 if border else 4 for n in self.case.size)
        sums = 4 * rows + (len(self.case.offsets) + 1) * (columns + 1) + 16
        return self._gamma(sums) * size


class WindowsBounds:
    """Bounds for one call of windows and its gradients.

    Args:
        case: the call.
        dtype: the dtype of the image.
    """

    def __init__(self, case: Windows, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, accumulator(dtype)
        # A position is center + sample * scale - 0.5, in float64; at scale 1 the kernels add whole
        # pixels to that of the first sample. In all at most five roundings in the kernel and five
        # in the oracle, of numbers up to this.
        (_, centers, window, scale), _ = case.call(torch.empty(0))
        step = 1.0 if scale is None else float(scale.abs().max())
        largest = float(centers.abs().max()) + max(window) * max(step, 1) + 1
        self.position = 10 * largest * 2.0**-53

    def _gamma(self, sums: int) -> float:
        # A weight is f or 1 - f, a product of two of them; a cast for each axis, the product with a
        # value. In float64 the oracle is rounded as often as the kernel.
        n = 2 * (6 + sums) if self.dtype == torch.float64 else 2 + 2 + 1 + sums
        return gamma(n, self.dtype)

    def _sizes(self, image: torch.Tensor) -> torch.Tensor:
        args, modes = self.case.call(image)
        return reference.windows(*args, **modes)

    def windows(self, image: torch.Tensor) -> torch.Tensor:
        """Sums of four products. Along an axis two pixels differ by at most twice the largest."""
        image = image.double().abs()
        return self._gamma(4) * self._sizes(image) + self._moved(2 * image.max())

    def _moved(self, slope: torch.Tensor) -> torch.Tensor:
        """The effect of an error of the position on a value with this slope along both axes."""
        return 2 * self.position * slope

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W]. With ``border`` a pixel may be read by all taps of all samples."""
        samples, grad = grad[0, :, 0].numel(), grad.double().abs()
        batch, _, channels, _, _ = grad.shape
        image = torch.zeros(batch, channels, *self.case.size, dtype=torch.float64)
        size = gradient(self._sizes, image, grad)
        moved = self._moved(grad.sum((1, 3, 4)))
        return self._gamma(4 * samples) * size + moved[..., None, None]

    def points(self, grad: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """[2, B, N, 2]: a sum over the samples and channels of grad * (pixel - pixel).

        Each difference is of two rows or columns, interpolated: it is at most twice the largest
        pixel, and changes by at most four times that over a pixel. For the scale it is multiplied
        by the distance of the sample from the center.
        """
        largest = image.double().abs().max()
        window = torch.tensor(self.case.window)
        total = grad.double().abs().sum((2, 3, 4))[..., None].expand(-1, -1, 2)
        slope = self._gamma(8 + grad[0, 0].numel()) * 2 * largest + self._moved(4 * largest)
        return torch.stack([total * slope, total * slope * window / 2])
