"""``shift``, ``ensemble`` and streams of views on NumPy arrays: the kernels of the ops, no torch.

``import srt_ext.numpy`` works where torch is not installed, and gives bit for bit what
``torch.ops.srt.*`` gives on the CPU. ``merge`` uses NumPy's arithmetic and agrees with torch within
rounding error. Arrays are float32, float64, float16, or bfloat16 as ml_dtypes has it, in the byte
order of the machine; ``shift`` takes uint8, too. Tokens are read in place, or refused: nothing
large is copied. While a call computes, other Python threads run.

What there is not: gradients, GPUs, ``all_reduce`` of streams, designs of views (offsets are any
numbers [V, 2]).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _rules
from ._rules import (
    BORDERS,
    INTERPOLATIONS,
    PADDINGS,
    REDUCES,
    UPSAMPLES,
    check_count,
    check_word,
    wrong,
)
from ._streams import MeanStream, MedianStream, MomentsStream, Stream

try:
    from . import _numpy
except ImportError as _error:
    _folder = Path(__file__).parent
    _others = sorted(path.name for path in _folder.glob("_numpy.*.so"))
    if any((_folder / f"_numpy{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        _reason = f"srt_ext._numpy does not load: {_error}"
    elif _others:
        _reason = (
            f"it was built for another Python: {', '.join(_others)}. Install srt_ext for this one"
        )
    else:
        _reason = (
            f"{_folder} has no _numpy{EXTENSION_SUFFIXES[0]}: the package was not built, pybind11 "
            "or Python.h was not found when it was (pip install -v . tells), or this is its "
            "source folder and hides the installed one"
        )
    raise ImportError(f"srt_ext.numpy is not available: {_reason}") from _error

__all__ = [
    "RunningMean",
    "RunningMedian",
    "RunningMoments",
    "ensemble",
    "ensemble_moments",
    "get_num_threads",
    "set_num_threads",
    "shift",
]

FLOATING = ("float32", "float16", "bfloat16", "float64")
MAX_THREADS = 1024  # a slip of the keyboard asks for more

# What offsets and weights are made of: float32 or float64, or numbers in (nested) sequences.
Numbers: TypeAlias = NDArray[np.float32] | NDArray[np.float64] | Sequence[Any]
_Views: TypeAlias = tuple[
    NDArray[Any],
    NDArray[np.float64],
    tuple[int, int],
    tuple[int, int],
    NDArray[np.float64] | None,
    str,
    str,
    tuple[int, int],
]


def _check_array(where: str, name: str, value: object) -> None:
    # A masked array is one, too: to read what it hides would be a wrong result.
    if not isinstance(value, np.ndarray) or hasattr(value, "mask"):
        rule = f"{name} must be a numpy.ndarray without a mask"
        raise wrong(TypeError, where, rule, type(value).__name__)


def _pair(where: str, name: str, value: object) -> tuple[int, int]:
    y, x = _rules.check_pair(where, name, value, (int, np.integer))
    if max(y, x) >= 2**63:
        raise wrong(ValueError, where, f"{name} must be below 2^63", [y, x])
    return int(y), int(x)


def _numbers(where: str, name: str, value: object) -> NDArray[np.float64]:
    """A copy in float64, which nobody changes while it is read. Its shape is checked later."""
    rule = f"{name} must be float32 or float64, or numbers in sequences"
    if isinstance(value, np.ndarray):
        _check_array(where, name, value)
        if value.dtype.kind != "f" or value.dtype.itemsize not in (4, 8):
            raise wrong(TypeError, where, rule, value.dtype)
    elif isinstance(value, Sequence):
        try:
            value = np.asarray(value)
        except ValueError:  # rows of different lengths
            raise wrong(ValueError, where, rule, "rows that make no array") from None
        if value.dtype.kind not in "fiu":
            raise wrong(TypeError, where, rule, value.dtype)
    else:
        raise wrong(TypeError, where, rule, type(value).__name__)
    return np.array(value, dtype=np.float64, order="C", subok=False)


def _views(
    where: str,
    tokens: NDArray[Any],
    offsets: object,
    grid: object,
    patch: object,
    weights: object,
    upsample: str,
    border: str,
    stride: object,
) -> _Views:
    """What a kernel takes, of the types that it takes."""
    _check_array(where, "tokens", tokens)
    check_word(where, "upsample", upsample, UPSAMPLES)
    check_word(where, "border", border, BORDERS)
    return (
        tokens,
        _numbers(where, "offsets", offsets),
        _pair(where, "grid", grid),
        _pair(where, "patch", patch),
        None if weights is None else _numbers(where, "weights", weights),
        upsample,
        border,
        _pair(where, "stride", stride),
    )


def shift(
    image: NDArray[Any],
    offsets: Numbers,
    *,
    padding: str = "reflect",
    interpolation: str = "bilinear",
) -> NDArray[Any]:
    """Every translated view of a batch of images: ``view_v(y, x) = image(y - dy, x - dx)``.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8. One that is not dense
            and aligned is copied first.
        offsets: [V, 2], (dy, dx) in pixels, any real numbers up to 2^20 in size: an array of
            float32 or float64, or sequences of numbers. Content moves down and right by them.
        padding: what lies beyond the image: ``zeros``, ``border``, ``reflect`` (the edge is not
            repeated) or ``circular``.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic`` (a = -0.75). Whole-pixel offsets
            copy bit for bit under each, and offsets within 2^-40 of one count as it. uint8 results
            are rounded half to even and saturate.

    Returns:
        [V, B, C, H, W], dense, of the dtype of ``image``.

    Raises:
        TypeError: an argument of the wrong type, dtype or byte order.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> image = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
        >>> shift(image, [(0, 1), (0, 0.5)], padding="border")[:, 0, 0, 0]
        array([[0. , 0. , 1. , 2. ],
               [0. , 0.5, 1.5, 2.5]], dtype=float32)
    """
    where = "srt::shift"
    _check_array(where, "image", image)
    check_word(where, "padding", padding, PADDINGS)
    check_word(where, "interpolation", interpolation, INTERPOLATIONS)
    return _numpy.shift(image, _numbers(where, "offsets", offsets), padding, interpolation)


def ensemble(
    tokens: NDArray[Any],
    offsets: Numbers,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: Numbers | None = None,
    *,
    reduce: str = "mean",
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: int | Sequence[int] = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The tokens of all views, moved back into the frame of the image and aggregated.

    The image has ``H = h * Ph`` by ``W = w * Pw`` pixels. Each output cell is the mean, over the
    pixels of the cell and the views that cover them, of the upsampled and inversely translated
    tokens. No pixel-scale map of a view is ever made.

    Args:
        tokens: [V, B, N, C], N = h * w tokens in row order; float32, float16, bfloat16 or float64.
            Read in place, read-only or not: the last dimension is dense; other strides are free,
            also negative ones, in whole elements. Sums are kept in float32 (float64 for float64).
        offsets: [V, 2], (dy, dx) in pixels by which the content of each view moved, as given to
            :func:`shift`.
        grid: (h, w), tokens.
        patch: (Ph, Pw), pixels from token to token.
        weights: [V], finite and >= 0, none but 0 below 2^-80 of the largest; an array of float32 or
            float64, or a sequence of numbers; None for equal weights. A view of weight 0 is not
            read.
        reduce: ``mean`` or ``median``: the lower median over the views that cover the cell, exact,
            NaN where one of them is; it takes no weights.
        upsample: ``nearest`` or ``bilinear``.
        border: a pixel that a view does not cover is left out (``coverage``), counts as 0
            (``zeros``, as published), or reads the nearest edge token (``clamp``).
        stride: pixels per output cell, (sh, sw) or one for both; divides (H, W). 1 is pixel scale,
            ``patch`` is token scale.
        out: [B, C, H / sh, W / sw] of the dtype of ``tokens``, written in place; any positive
            strides that step over what the smaller ones span; channels last is the fast order.

    Returns:
        [B, C, H / sh, W / sw] of the dtype of ``tokens``, which lies in memory as [B, H / sh,
        W / sw, C] (``result.transpose(0, 2, 3, 1)`` is dense), or ``out``. 0 where no view counts.

    Raises:
        TypeError: an argument of the wrong type, dtype or byte order.
        ValueError: a wrong shape, mode word or value; arrays that are not aligned, that share
            memory, or a read-only ``out``.

    Example:
        >>> tokens = np.array([0, 4], dtype=np.float32).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, [(0, 0)], grid=(1, 2), patch=(1, 4))[0, 0, 0]
        array([0. , 0. , 0.5, 1.5, 2.5, 3.5, 4. , 4. ], dtype=float32)
    """
    where = "srt::ensemble"
    check_word(where, "reduce", reduce, REDUCES)
    views = _views(where, tokens, offsets, grid, patch, weights, upsample, border, stride)
    if out is not None:
        _check_array(where, "out", out)
    return _numpy.ensemble(*views, reduce, out)


def ensemble_moments(
    tokens: NDArray[Any],
    offsets: Numbers,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: Numbers | None = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: int | Sequence[int] = 1,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The mean over the views and their variance, from one reading of the tokens.

    The variance is the weighted population variance of what the views say about a cell: the norm of
    its root over the channels is the noise map of the paper. In float32, beside a mean of 1e4 times
    the spread, it is within 0.2 %: as far as the interpolated values themselves are rounded (1e-6
    where they are copies: ``nearest`` at stride 1).

    Args:
        tokens, offsets, grid, patch, weights, upsample, border, stride: as for :func:`ensemble`.

    Returns:
        (mean, var), each as the result of :func:`ensemble`. Both are 0 where no view counts.

    Raises:
        TypeError, ValueError: as :func:`ensemble`.

    Example:
        >>> tokens = np.array([1, 3], dtype=np.float32).reshape(2, 1, 1, 1)  # two views of a token
        >>> mean, var = ensemble_moments(tokens, [(0, 0), (0, 0)], grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    where = "srt::ensemble_moments"
    return _numpy.ensemble_moments(
        *_views(where, tokens, offsets, grid, patch, weights, upsample, border, stride)
    )


class _Arrays(Stream[NDArray[Any]]):
    """A stream whose arrays are those of NumPy."""

    _float32, _float64 = np.dtype(np.float32), np.dtype(np.float64)

    def update(
        self, tokens: NDArray[Any], offsets: Numbers, weights: Numbers | None = None
    ) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], weights [V], as for ``ensemble``.

        Weights count against those of the other chunks: 0, or between 2^-500 and 2^500; a median
        takes none. No views (V = 0) only allocate the state. Raises as ``ensemble``; then nothing
        was added.
        """
        self._update(tokens, offsets, weights)

    def _pair(self, name: str, value: object) -> tuple[int, int]:
        return _pair(type(self).__name__, name, value)

    def _arguments(
        self, where: str, tokens: NDArray[Any], offsets: object, weights: object
    ) -> _Views:
        places = (self.grid, self.patch, weights, self.upsample, self.border, self.stride)
        return _views(where, tokens, offsets, *places)

    def _check_array(self, where: str, name: str, value: object) -> None:
        _check_array(where, name, value)

    def _check_chunk(self, where: str, tokens: NDArray[Any], offsets: Any, weights: Any) -> None:
        _numpy.check_chunk(self._op, *self._arguments(where, tokens, offsets, weights))

    def _accumulate(self, tokens: NDArray[Any], offsets: Any, *weights: Any) -> None:
        (weight,) = weights or (None,)
        views = self._arguments(f"srt::{self._op}", tokens, offsets, weight)
        getattr(_numpy, self._op)(*self._state.values(), *views)

    def _is_floating(self, dtype: object) -> bool:
        return isinstance(dtype, np.dtype) and dtype.isnative and dtype.name in FLOATING

    def _is_array(self, value: object) -> bool:
        return isinstance(value, np.ndarray) and not hasattr(value, "mask")

    def _zeros(self, shape: Sequence[int], dtype: Any, like: NDArray[Any]) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def _dense(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.array(array, order="C", subok=False)

    def _cast(self, array: NDArray[Any], copy: bool) -> NDArray[Any]:
        with self._writing():
            return array.astype(self._dtype, copy=copy)

    def _ratio(self, part: NDArray[Any], total: NDArray[Any], dtype: Any) -> NDArray[Any]:
        ratio: NDArray[Any] = np.zeros(total.shape, total.dtype)
        np.divide(part, total, out=ratio, where=total > 0)
        return ratio.astype(dtype, copy=False)

    def _put(self, target: NDArray[Any], where: NDArray[Any], value: NDArray[Any]) -> None:
        np.copyto(target, value, where=where)

    def _writing(self) -> np.errstate:
        return np.errstate(all="ignore")  # NaN and infinities are values


class RunningMean(_Arrays, MeanStream[NDArray[Any]]):
    """The mean of a stream of views: ``ensemble`` in chunks, as :class:`srt_ext.RunningMean`.

    State, whatever the number of views: the mean [B, C, H', W'] in float32 (float64 for float64
    tokens) and the weight of each cell [H', W'] in float64.

    Args:
        grid, patch, upsample, border, stride: as for :func:`ensemble`.

    Example:
        >>> running = RunningMean(grid=(1, 2), patch=(1, 1))
        >>> for value in (1, 2, 6):
        ...     running.update(np.full((1, 1, 2, 1), value, np.float32), [(0, 0)])
        >>> running.result().ravel()
        array([3., 3.], dtype=float32)
    """


class RunningMoments(RunningMean, MomentsStream[NDArray[Any]]):
    """Mean and variance of a stream of views, as :class:`srt_ext.RunningMoments`.

    State, whatever the number of views: mean and population variance [B, C, H', W'] and the weight
    of each cell [H', W'].

    Args:
        grid, patch, upsample, border, stride: as for :func:`ensemble`.

    Example:
        >>> running = RunningMoments(grid=(1, 1), patch=(1, 1))
        >>> for value in (1, 3):
        ...     running.update(np.full((1, 1, 1, 1), value, np.float32), [(0, 0)])
        >>> running.result().item(), running.variance().item()
        (2.0, 1.0)
    """


class RunningMedian(_Arrays, MedianStream[NDArray[Any]]):
    """The lower median of a stream of views, approximately, as :class:`srt_ext.RunningMedian`.

    State, whatever the number of views: the 7 values around the median of each element, in order,
    with the place of the median among them, [8, B, C, H', W'] in float32 (float64 for float64
    tokens), and the number of views of each cell [H', W']. Exact up to 7 views; beyond them the
    order of the views matters: one that drifts, as that of a grid does, is the worst.

    Args:
        grid, patch, upsample, border, stride: as for :func:`ensemble`.

    Example:
        >>> running = RunningMedian(grid=(1, 1), patch=(1, 1))
        >>> for value in (5, 1, 9):
        ...     running.update(np.full((1, 1, 1, 1), value, np.float32), [(0, 0)])
        >>> running.result().item()
        5.0
    """


def get_num_threads() -> int:
    """How many threads share the work of a call, that of the caller among them."""
    return _numpy.get_threads()


def set_num_threads(n: int) -> None:
    """Sets how many threads share the work of a call; results do not depend on it.

    At first there are as many as this process may use CPUs, when srt_ext.numpy is imported. They
    are apart from torch's, start with the first call that is large enough, and a forked process
    starts its own.

    Raises:
        TypeError, ValueError: ``n`` is no integer between 1 and 1024.
    """
    where = "srt_ext.numpy.set_num_threads"
    if check_count(where, "n", n, 1) > MAX_THREADS:
        raise wrong(ValueError, where, f"n must be at most {MAX_THREADS}", n)
    _numpy.set_threads(n)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


set_num_threads(min(_cpus(), MAX_THREADS))
