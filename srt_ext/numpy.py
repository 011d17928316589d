"""``shift``, ``windows``, ``ensemble`` and streams of views on NumPy arrays, without torch.

``import srt_ext.numpy`` works where torch is not installed, and gives bit for bit what
``torch.ops.srt.*`` gives on the CPU: the kernels are the same. ``merge`` uses NumPy's arithmetic
and agrees with torch within rounding error. Arrays are float32, float64, float16, or bfloat16 as
ml_dtypes has it, in the byte order of the machine; ``shift`` and ``windows`` take uint8, too.
Tokens are read in place, or refused: nothing large is copied. While a call computes, other Python
threads run.

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

from . import streaming
from ._validation import MAX_VIEWS, MAX_WINDOWS, check_count, check_pair, check_words, wrong
from .options import Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample

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
    "windows",
]

MAX_THREADS = 1024  # a slip of the keyboard asks for more

# What offsets, weights, centers and scale are made of: float32 or float64, or numbers in (nested)
# sequences.
Numbers: TypeAlias = NDArray[np.float32] | NDArray[np.float64] | Sequence[Any]


def _check_array(where: str, name: str, value: object) -> None:
    # A masked array is one, too: to read what it hides would be a wrong result.
    if not isinstance(value, np.ndarray) or hasattr(value, "mask"):
        rule = f"{name} must be a numpy.ndarray without a mask"
        raise wrong(TypeError, where, rule, type(value).__name__)


def _numbers(
    where: str,
    name: str,
    value: object,
    largest: int = 4 * MAX_VIEWS,
    limit: str = "must be of at most 2^20 views",
) -> NDArray[np.float64]:
    """A dense copy in float64, which no other thread changes while it is read."""
    rule = f"{name} must be float32 or float64, or numbers in sequences"
    if isinstance(value, np.ndarray):
        _check_array(where, name, value)
        if value.dtype.kind != "f" or value.dtype.itemsize not in (4, 8):
            raise wrong(TypeError, where, rule, value.dtype)
        if value.size > largest:  # before it is copied: strides may be 0
            raise wrong(ValueError, where, f"{name} {limit}", list(value.shape))
    elif isinstance(value, Sequence):
        try:
            value = np.asarray(value)
        except Exception:  # rows of different lengths, elements that cannot be numbers
            raise wrong(ValueError, where, rule, "rows that make no array") from None
        if value.dtype.kind not in "fiu":
            raise wrong(TypeError, where, rule, value.dtype)
    else:
        raise wrong(TypeError, where, rule, type(value).__name__)
    return np.array(value, dtype=np.float64, order="C", subok=False)


def _views(
    where: str, tokens: Any, offsets: Any, grid: Any, patch: Any, weights: Any = None, **modes: Any
) -> tuple[Any, ...]:
    """What a kernel takes, of the types that it takes."""
    _check_array(where, "tokens", tokens)
    stride = modes.pop("stride")
    check_words(where, **modes)
    offsets = _numbers(where, "offsets", offsets)
    grid, patch = check_pair(where, "grid", grid), check_pair(where, "patch", patch)
    weights = None if weights is None else _numbers(where, "weights", weights)
    stride = check_pair(where, "stride", stride)
    return (tokens, offsets, grid, patch, weights, modes["upsample"], modes["border"], stride)


def shift(
    image: NDArray[Any],
    offsets: Numbers,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
) -> NDArray[Any]:
    """As :func:`srt_ext.shift`: every translated view of a batch of images.

    An ``image`` that is not dense and aligned is copied first. ``offsets`` are an array of float32
    or float64, or sequences.
    """
    where = "srt::shift"
    _check_array(where, "image", image)
    check_words(where, padding=padding, interpolation=interpolation)
    return _numpy.shift(image, _numbers(where, "offsets", offsets), padding, interpolation)


def windows(
    image: NDArray[Any],
    centers: Numbers,
    size: Pair,
    scale: Numbers | None = None,
    *,
    padding: Padding = "border",
) -> NDArray[Any]:
    """As :func:`srt_ext.windows`: windows of a batch of images at any positions.

    ``image`` is read in place; its strides may be negative, and are whole elements. ``centers`` and
    ``scale`` are arrays of float32 or float64, or sequences.
    """
    where = "srt::windows"
    _check_array(where, "image", image)
    check_words(where, padding=padding)
    size = check_pair(where, "size", size)
    limit = 2 * MAX_WINDOWS, "must hold at most 2^26 windows"
    places = _numbers(where, "centers", centers, *limit)
    steps = None if scale is None else _numbers(where, "scale", scale, *limit)
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
    """As :func:`srt_ext.ensemble`: the tokens of all views in the frame of the image, aggregated.

    Args:
        tokens: as there, read in place, read-only or not; strides may be negative, and are whole
            elements.
        offsets, weights: as there, arrays of float32 or float64, or sequences.
        grid, patch, reduce, upsample, border, stride: as there.
        out: as there, of positive strides.

    Returns:
        [B, C, H / sh, W / sw] of the dtype of ``tokens``, which lies in memory as [B, H / sh,
        W / sw, C] (``result.transpose(0, 2, 3, 1)`` is dense), or ``out``.

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
    check_words(where, reduce=reduce)
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    views = _views(where, tokens, offsets, grid, patch, weights, **modes)
    if out is not None:
        _check_array(where, "out", out)
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
    """As :func:`srt_ext.ensemble_moments`: the mean over the views and their variance.

    Arguments and both results are those of :func:`ensemble`.
    """
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    views = ("srt::ensemble_moments", tokens, offsets, grid, patch, weights)
    return _numpy.ensemble_moments(_views(*views, **modes))


class _Arrays:
    """As ``_Tensors`` in srt_ext.streaming, for NumPy."""

    check_array, moveaxis = staticmethod(_check_array), staticmethod(np.moveaxis)
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
        return np.errstate(all="ignore")  # NaN and infinities are values


class RunningMean(streaming.MeanStream[NDArray[Any], Numbers]):
    """As :class:`srt_ext.RunningMean`: the mean of a stream of views.

    State: mean [B, C, H', W'], weight [H', W'].

    Example:
        >>> running = RunningMean(grid=(1, 2), patch=(1, 1))
        >>> for value in (1, 2, 6):
        ...     running.update(np.full((1, 1, 2, 1), value, np.float32), [(0, 0)])
        >>> running.result().ravel()
        array([3., 3.], dtype=float32)
    """

    _arrays = _Arrays()


class RunningMoments(RunningMean, streaming.MomentsStream[NDArray[Any], Numbers]):
    """As :class:`srt_ext.RunningMoments`: mean and variance of a stream of views.

    State: mean and var [B, C, H', W'], weight [H', W'].
    """


class RunningMedian(streaming.MedianStream[NDArray[Any], Numbers]):
    """As :class:`srt_ext.RunningMedian`: the lower median of a stream of views, approximately.

    State: window [8, B, C, H', W'], count [H', W'].
    """

    _arrays = _Arrays()


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


_affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # not on macOS
set_num_threads(min(len(_affinity(0)), MAX_THREADS))
