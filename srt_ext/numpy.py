"""``shift``, ``windows``, ``ensemble`` and streams of views on NumPy arrays, without torch.

``import srt_ext.numpy`` does not need torch. The kernels are those of ``torch.ops.srt.*`` on the
CPU, so results are bitwise equal. ``merge`` uses NumPy's arithmetic and agrees with torch within
rounding error. Supported dtypes are float32, float64, float16 and the bfloat16 of ml_dtypes, in
native byte order; ``shift`` and ``windows`` also support uint8. Tokens are read in place and never
copied; an unsupported layout raises an error. The GIL is released during a call.

Gradients, GPUs, ``all_reduce`` of streams and designs of views are not available. Pass offsets as
numbers [V, 2].
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import streaming
from ._validation import (
    MAX_WINDOWS,
    check_count,
    check_ndarray,
    check_numbers,
    check_pair,
    check_words,
    wrong,
)
from .options import Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample

try:
    from . import _numpy
except ImportError as _error:
    _folder = Path(__file__).parent
    _others = sorted(path.name for path in _folder.glob("_numpy.*.so"))
    if any((_folder / f"_numpy{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        _reason = f"srt_ext._numpy cannot be loaded: {_error}"
    elif _others:
        _reason = (
            f"it was built for another Python: {', '.join(_others)}. Install it for this Python"
        )
    else:
        _reason = (
            f"{_folder} does not contain _numpy{EXTENSION_SUFFIXES[0]}. Either Python imported the "
            "sources of srt_ext instead of the installed package (start Python in another folder, "
            "or run pip install -e . in the clone), or pybind11 or Python.h was not found during "
            "the build (pip install -v . prints the reason)"
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
    "windows",
]

MAX_THREADS = 1024  # a larger number is probably a mistake

# The types of offsets, weights, centers and scale: float32 or float64 arrays, or (nested) sequences
# of numbers.
Numbers: TypeAlias = NDArray[np.float32] | NDArray[np.float64] | Sequence[Any]


def _views(
    where: str, tokens: Any, offsets: Any, grid: Any, patch: Any, weights: Any = None, **modes: Any
) -> tuple[Any, ...]:
    """Converts the arguments of an ensemble to the types of ``_numpy``."""
    check_ndarray(where, "tokens", tokens)
    stride = modes.pop("stride")
    check_words(where, **modes)
    offsets = check_numbers(where, "offsets", offsets)
    grid, patch = check_pair(where, "grid", grid), check_pair(where, "patch", patch)
    weights = None if weights is None else check_numbers(where, "weights", weights)
    stride = check_pair(where, "stride", stride)
    return (tokens, offsets, grid, patch, weights, modes["upsample"], modes["border"], stride)


def shift(
    image: NDArray[Any],
    offsets: Numbers,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
) -> NDArray[Any]:
    """Translates a batch of images by each offset, as :func:`srt_ext.shift`.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8. An image that is not
            contiguous and aligned is copied first.
        offsets: [V, 2], (dy, dx) in pixels; a float32 or float64 array, or sequences of numbers.
        padding: as for :func:`srt_ext.shift`.
        interpolation: as for :func:`srt_ext.shift`.

    Returns:
        [V, B, C, H, W], contiguous, in the dtype of ``image``.

    Raises:
        TypeError: an argument has the wrong type, dtype or byte order.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> image = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
        >>> shift(image, [(0, 1)], padding="border")[0, 0, 0, 0]
        array([0., 0., 1., 2.], dtype=float32)
    """
    where = "srt::shift"
    check_ndarray(where, "image", image)
    check_words(where, padding=padding, interpolation=interpolation)
    return _numpy.shift(image, check_numbers(where, "offsets", offsets), padding, interpolation)


def windows(
    image: NDArray[Any],
    centers: Numbers,
    size: Pair,
    scale: Numbers | None = None,
    *,
    padding: Padding = "border",
) -> NDArray[Any]:
    """Samples windows of a batch of images at any positions, as :func:`srt_ext.windows`.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8. It is read in place; its
            strides may be negative and must be multiples of the element size.
        centers: [B, N, 2], (y, x) in pixels; a float32 or float64 array, or sequences of numbers.
        size: (Ph, Pw), samples per window.
        scale: pixels between neighbouring samples, [2] or [B, N, 2]; a float32 or float64 array, or
            sequences of numbers. None means 1.
        padding: as for :func:`srt_ext.windows`.

    Returns:
        [B, N, C, Ph, Pw], contiguous, in the dtype of ``image``.

    Raises:
        TypeError: an argument has the wrong type, dtype or byte order.
        ValueError: an argument has a wrong shape or value, or ``image`` is not aligned.

    Example:
        >>> image = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
        >>> windows(image, [[(0.5, 3.25)]], (1, 2))[0, 0, 0, 0]
        array([2.25, 3.25], dtype=float32)
    """
    where = "srt::windows"
    check_ndarray(where, "image", image)
    check_words(where, padding=padding)
    size = check_pair(where, "size", size)
    limit = 2 * MAX_WINDOWS, "must hold at most 2^26 windows"
    places = check_numbers(where, "centers", centers, *limit)
    steps = None if scale is None else check_numbers(where, "scale", scale, *limit)
    return _numpy.windows(image, places, size, steps, padding)


def ensemble(
    tokens: NDArray[Any],
    offsets: Numbers,
    grid: Pair,
    patch: Pair,
    weights: Numbers | None = None,
    *,
    reduce: Reduce = "mean",
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Aggregates the tokens of all views in the frame of the image, as :func:`srt_ext.ensemble`.

    Args:
        tokens: [V, B, N, C], N = h * w tokens in row order; float32, float16, bfloat16 or float64.
            They are read in place and may be read-only. The last dimension must be contiguous;
            other strides may be negative and must be multiples of the element size.
        offsets: [V, 2], (dy, dx) in pixels; a float32 or float64 array, or sequences of numbers.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V], finite and >= 0; a float32 or float64 array, or a sequence of numbers. None
            means equal weights.
        reduce: as for :func:`srt_ext.ensemble`.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.
        out: [B, C, H / sh, W / sw] with positive strides, written in place.

    Returns:
        [B, C, H / sh, W / sw] in the dtype of ``tokens``, or ``out``. A new result is channels
        last: ``result.transpose(0, 2, 3, 1)`` is contiguous.

    Raises:
        TypeError: an argument has the wrong type, dtype or byte order.
        ValueError: an argument has a wrong shape or value, an array is not aligned, ``out`` is
            read-only, or ``out`` shares memory with ``tokens``.

    Example:
        >>> tokens = np.array([0, 4], dtype=np.float32).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, [(0, 0)], grid=(1, 2), patch=(1, 4))[0, 0, 0]
        array([0. , 0. , 0.5, 1.5, 2.5, 3.5, 4. , 4. ], dtype=float32)
    """
    where = "srt::ensemble"
    check_words(where, reduce=reduce)
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    views = _views(where, tokens, offsets, grid, patch, weights, **modes)
    if out is not None:
        check_ndarray(where, "out", out)
    return _numpy.ensemble(views, reduce, out)


def ensemble_moments(
    tokens: NDArray[Any],
    offsets: Numbers,
    grid: Pair,
    patch: Pair,
    weights: Numbers | None = None,
    *,
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Computes the mean and variance over the views, as :func:`srt_ext.ensemble_moments`.

    Args:
        tokens: [V, B, N, C], as for :func:`ensemble`.
        offsets: [V, 2], (dy, dx) in pixels, as for :func:`ensemble`.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V] or None, as for :func:`ensemble`.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Returns:
        (mean, var), each [B, C, H / sh, W / sw] as the result of :func:`ensemble`.

    Raises:
        TypeError: an argument has the wrong type, dtype or byte order.
        ValueError: an argument has a wrong shape or value, or ``tokens`` are not aligned.

    Example:
        >>> tokens = np.array([1, 3], dtype=np.float32).reshape(2, 1, 1, 1)  # two views
        >>> mean, var = ensemble_moments(tokens, [(0, 0), (0, 0)], grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    views = ("srt::ensemble_moments", tokens, offsets, grid, patch, weights)
    return _numpy.ensemble_moments(_views(*views, **modes))


class _Arrays:
    """The NumPy operations of a stream, as ``_Tensors`` in srt_ext.streaming."""

    check_array, moveaxis = staticmethod(check_ndarray), staticmethod(np.moveaxis)
    float32, float64 = np.dtype(np.float32), np.dtype(np.float64)

    def is_array(self, value: object) -> bool:
        return isinstance(value, np.ndarray) and not hasattr(value, "mask")

    def is_floating(self, dtype: object) -> bool:
        names = ("float32", "float16", "bfloat16", "float64")
        return isinstance(dtype, np.dtype) and dtype.isnative and dtype.name in names

    def check_chunk(self, op: str, *views: Any, **modes: Any) -> None:
        _numpy.check_chunk(op, _views(f"srt::{op}", *views, **modes))

    def accumulate(self, op: str, state: Sequence[Any], *views: Any, **modes: Any) -> None:
        _numpy.accumulate(op, state, _views(f"srt::{op}", *views, **modes))

    def zeros(self, shape: Sequence[int], dtype: Any, like: NDArray[Any]) -> NDArray[Any]:
        return np.broadcast_to(np.zeros((), dtype), shape)

    def dense(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.array(array, order="C", subok=False)

    def cast(self, array: NDArray[Any], dtype: Any, copy: bool = False) -> NDArray[Any]:
        with self.writing():
            return array.astype(dtype, copy=copy)

    def put(self, target: NDArray[Any], where: NDArray[Any], value: NDArray[Any]) -> None:
        np.copyto(target, value, where=where)

    def writing(self) -> np.errstate:
        return np.errstate(all="ignore")  # NaN and infinities are valid values


class RunningMean(streaming.MeanStream[NDArray[Any], Numbers]):
    """The mean of a stream of views, as :class:`srt_ext.RunningMean`.

    The state is mean [B, C, H', W'] and weight [H', W'].

    Args:
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> running = RunningMean(grid=(1, 2), patch=(1, 1))
        >>> for value in (1, 2, 6):
        ...     running.update(np.full((1, 1, 2, 1), value, np.float32), [(0, 0)])
        >>> running.result().ravel()
        array([3., 3.], dtype=float32)
    """

    _arrays = _Arrays()


class RunningMoments(RunningMean, streaming.MomentsStream[NDArray[Any], Numbers]):
    """The mean and variance of a stream of views, as :class:`srt_ext.RunningMoments`.

    The state is mean and var [B, C, H', W'] and weight [H', W'].

    Args:
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> running = RunningMoments(grid=(1, 1), patch=(1, 1))
        >>> for value in (1, 3):
        ...     running.update(np.full((1, 1, 1, 1), value, np.float32), [(0, 0)])
        >>> running.variance().item()
        1.0
    """


class RunningMedian(streaming.MedianStream[NDArray[Any], Numbers]):
    """The approximate lower median of a stream of views, as :class:`srt_ext.RunningMedian`.

    The state is window [8, B, C, H', W'] and count [H', W'].

    Args:
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> running = RunningMedian(grid=(1, 1), patch=(1, 1))
        >>> for value in (5, 1, 9):
        ...     running.update(np.full((1, 1, 1, 1), value, np.float32), [(0, 0)])
        >>> running.result().item()
        5.0
    """

    _arrays = _Arrays()


def get_num_threads() -> int:
    """Returns the number of threads that share the work of a call, including the caller's."""
    return _numpy.get_threads()


def set_num_threads(n: int) -> None:
    """Sets the number of threads that share the work of a call. Results do not depend on it.

    The default is the number of CPUs that the process may use when srt_ext.numpy is imported. The
    threads are separate from torch's. They start with the first call that is large enough; a forked
    process starts its own.

    Args:
        n: number of threads, from 1 to 1024, including the caller's.

    Raises:
        TypeError: ``n`` is not an integer.
        ValueError: ``n`` is not between 1 and 1024.
    """
    where = "srt_ext.numpy.set_num_threads"
    if check_count(where, "n", n, 1) > MAX_THREADS:
        raise wrong(ValueError, where, f"n must be at most {MAX_THREADS}", n)
    _numpy.set_threads(n)


_affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # not on macOS
set_num_threads(min(len(_affinity(0)), MAX_THREADS))
