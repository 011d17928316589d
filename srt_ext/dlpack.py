"""The ops on arrays of any framework that supports DLPack: NumPy, CuPy, JAX, PyTorch.

Each function accepts arrays with ``__dlpack__``, on the CPU or on a GPU, and returns arrays of the
same framework on the same device. Memory is shared in both directions. On a GPU the streams
synchronise with each other; the calling thread does not wait.

The other framework cannot differentiate these functions or call them inside its compiled functions
(``jax.jit``).
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import numpy as np

from ._library import unavailable

if unavailable is not None:
    raise ImportError(f"srt_ext.dlpack is not available: {unavailable}")

import torch
from torch.utils.dlpack import DLDeviceType, from_dlpack

from . import ops
from .options import Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample

Array = TypeVar("Array")  # with __dlpack__ and __dlpack_device__

# Four possible races on a GPU, and why they cannot occur:
# 1. The kernel reads an input before the producer has written it. torch.from_dlpack passes torch's
#    current stream to the array's __dlpack__, and the producer makes that stream wait for its own.
# 2. The consumer reads a result before the kernel has written it. The consumer's from_dlpack passes
#    its stream to the __dlpack__ of the result, which makes that stream wait for torch's current
#    stream.
# 3. The producer reuses the memory of an input while the kernel reads it. It does not know torch's
#    stream and frees the memory with the last reference, possibly as soon as the function returns.
#    _in_use therefore holds inputs until an event after the kernel has completed.
# 4. torch reuses the memory of a result while the consumer reads it. DLPack makes the consumer
#    responsible: it calls the deleter when it has finished.
_in_use: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
_lock = threading.Lock()


def _hold(tensors: Sequence[torch.Tensor | None], arrays: Sequence[object]) -> None:
    """Holds CUDA tensors that share memory with foreign arrays until the current stream is done.

    Each call releases the tensors of earlier calls whose work has completed.
    """
    pairs = zip(tensors, arrays, strict=True)
    foreign = [t for t, array in pairs if t is not None and t is not array and t.is_cuda]
    if not foreign:
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(foreign[0].device))
    released = []  # freed outside the lock, because deleters are foreign code
    with _lock:
        while _in_use and _in_use[0][0].query():
            released.append(_in_use.popleft())
        _in_use.append((event, foreign))


class _Writable:
    """A writable view of a read-only ndarray. torch has no read-only tensors and would warn."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        pointer, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def _from_numpy(op: str, name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Without DLPack: NumPy does not export bfloat16 and, before 2.1, read-only arrays."""
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return _from_numpy(op, name, array.view(np.uint16)).view(torch.bfloat16)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biufc" or size > (16 if kind == "c" else 8) or not array.dtype.isnative:
        rule = f"{name} must have a dtype that torch supports, in native byte order"
        raise TypeError(f"srt::{op}: {rule}; got {array.dtype}")
    if array.size and any(stride % array.itemsize for stride in array.strides):
        size = f"its element size, {array.itemsize} bytes"
        rule = f"{name} must have strides that are multiples of {size}"
        raise ValueError(f"srt::{op}: {rule}; got strides of {list(array.strides)} bytes")
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))  # inputs are never written to
    return torch.from_numpy(array)


def _packages(array: object) -> set[str]:
    return {base.__module__.partition(".")[0] for base in type(array).__mro__}


def _has_dlpack(array: object) -> bool:
    if isinstance(array, np.ma.MaskedArray):
        return False  # its masked values would be read
    # JAX's tracers have only the first.
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def _error(op: str, rule: str, got: object) -> TypeError:
    return TypeError(f"srt::{op}: {rule}; got {type(got).__name__}")


def _to_tensor(op: str, name: str, array: Any) -> torch.Tensor:
    """Returns a tensor that shares the memory of ``array``."""
    if isinstance(array, torch.Tensor):
        return array
    strides = getattr(array, "strides", None)
    if strides and min(strides) < 0:
        raise ValueError(f"srt::{op}: {name} must have strides >= 0; got {strides}")
    if isinstance(array, np.ndarray):
        tensor = _from_numpy(op, name, array)
    else:
        kind, index = array.__dlpack_device__()
        # CuPy synchronises with the current stream of the current device.
        with torch.cuda.device(index) if kind == DLDeviceType.kDLCUDA else nullcontext():
            tensor = from_dlpack(array)
    # NumPy's empty arrays have strides of 0.
    return tensor if tensor.numel() else tensor.new_empty(tensor.shape)


def _values(op: str, name: str, values: Any) -> torch.Tensor:
    """Converts offsets or weights: arrays unchanged, sequences of numbers to float64 on the CPU."""
    if _has_dlpack(values):
        if isinstance(values, np.ndarray):
            return _from_numpy(op, name, values.copy())  # small: a copy supports every layout
        return _to_tensor(op, name, values)
    if isinstance(values, Sequence):
        try:
            return torch.tensor(values, dtype=torch.float64, device="cpu")
        except Exception:  # rows of different lengths, or elements other than numbers
            pass
    raise _error(op, f"{name} must be an array or a sequence of numbers", values)


class _Framework:
    """Creates arrays of the framework of ``array``."""

    def __init__(self, op: str, name: str, array: Any) -> None:
        self.like = array
        packages = _packages(array)
        # JAX needs contiguous results: 0.6 ignores other strides and computes wrong values, 0.7 and
        # compiled functions of 0.8 to 0.10 reject them.
        self.takes_strides = bool(packages & {"cupy", "numpy", "torch"})
        if not _has_dlpack(array):
            raise _error(op, f"{name} must be an array with __dlpack__, without a mask", array)
        if hasattr(array, "__array_namespace__"):
            self.namespace = array.__array_namespace__()
        elif "cupy" in packages:  # before version 14
            self.namespace = sys.modules["cupy"]
        elif not isinstance(array, (torch.Tensor, np.ndarray)):
            rule = f"{name} must have __array_namespace__, to convert the result"
            raise _error(op, rule, array)

    def from_tensor(self, tensor: torch.Tensor) -> Any:
        """An array on the memory of ``tensor``, which the kernel may not have written yet."""
        if isinstance(self.like, torch.Tensor):
            return tensor
        tensor = tensor.detach()  # a result requires grad if offsets or weights do
        if isinstance(self.like, np.ndarray):
            if tensor.dtype == torch.bfloat16:
                return tensor.view(torch.uint16).numpy().view(self.like.dtype)
            return tensor.numpy()
        if not self.takes_strides:
            # Contiguous, with the standard strides even if a size is 1.
            tensor = tensor.reshape(-1).reshape(tensor.shape)
        with torch.cuda.device_of(tensor):  # __dlpack__ uses the stream of the current device
            return self.namespace.from_dlpack(tensor)


def _view_tensors(op: str, tokens: Any, offsets: Any, weights: Any) -> tuple[Any, Any, Any]:
    scales = None if weights is None else _values(op, "weights", weights)
    return _to_tensor(op, "tokens", tokens), _values(op, "offsets", offsets), scales


def shift(
    image: Array,
    offsets: Any,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
) -> Array:
    """Translates a batch of images by each offset, as :func:`srt_ext.shift`.

    Args:
        image: [B, C, H, W], any array with ``__dlpack__``.
        offsets: [V, 2], (dy, dx) in pixels; an array of any framework, or sequences of numbers.
        padding: as for :func:`srt_ext.shift`.
        interpolation: as for :func:`srt_ext.shift`.

    Returns:
        [V, B, C, H, W], an array of the framework, dtype and device of ``image``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> image = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
        >>> shift(image, [[0, 1]], padding="border")[0, 0, 0, 0]
        array([0., 0., 1., 2.], dtype=float32)
    """
    op = "shift"
    framework = _Framework(op, "image", image)
    tensors = _to_tensor(op, "image", image), _values(op, "offsets", offsets)
    views = ops.shift(*tensors, padding=padding, interpolation=interpolation)
    _hold(tensors, (image, offsets))
    return cast(Array, framework.from_tensor(views))


def windows(
    image: Array,
    centers: Any,
    size: Pair,
    scale: Any = None,
    *,
    padding: Padding = "border",
) -> Array:
    """Samples windows of a batch of images at any positions, as :func:`srt_ext.windows`.

    Args:
        image: [B, C, H, W], any array with ``__dlpack__``.
        centers: [B, N, 2], (y, x) in pixels; an array of any framework, or sequences of numbers.
        size: (Ph, Pw), samples per window.
        scale: pixels between neighbouring samples, [2] or [B, N, 2]; an array of any framework, or
            sequences of numbers. None means 1.
        padding: as for :func:`srt_ext.windows`.

    Returns:
        [B, N, C, Ph, Pw], an array of the framework, dtype and device of ``image``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> image = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
        >>> windows(image, [[[0.5, 3.25]]], (1, 2))[0, 0, 0, 0]
        array([2.25, 3.25], dtype=float32)
    """
    op = "windows"
    framework = _Framework(op, "image", image)
    steps = None if scale is None else _values(op, "scale", scale)
    tensors = _to_tensor(op, "image", image), _values(op, "centers", centers), steps
    result = ops.windows(*tensors[:2], size, steps, padding=padding)
    _hold(tensors, (image, centers, scale))
    return cast(Array, framework.from_tensor(result))


def ensemble(
    tokens: Array,
    offsets: Any,
    grid: Pair,
    patch: Pair,
    weights: Any = None,
    *,
    reduce: Reduce = "mean",
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
    out: Array | None = None,
) -> Array:
    """Aggregates the tokens of all views in the frame of the image, as :func:`srt_ext.ensemble`.

    Args:
        tokens: [V, B, N, C], N = h * w, any array with ``__dlpack__``.
        offsets: [V, 2], (dy, dx) in pixels; an array of any framework, or sequences of numbers.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V], finite and >= 0; an array of any framework, or a sequence of numbers. None
            means equal weights.
        reduce: as for :func:`srt_ext.ensemble`.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.
        out: [B, C, H / sh, W / sw], a writable array. JAX arrays are not writable.

    Returns:
        [B, C, H / sh, W / sw], an array of the framework, dtype and device of ``tokens``, or
        ``out``. A new result is channels_last. For JAX it is contiguous, which the kernel writes
        more slowly.

    Raises:
        TypeError: an argument has the wrong type or dtype, or ``out`` is not writable.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> tokens = np.array([0, 4], dtype=np.float32).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, [[0, 0]], grid=(1, 2), patch=(1, 4))[0, 0, 0]
        array([0. , 0. , 0.5, 1.5, 2.5, 3.5, 4. , 4. ], dtype=float32)
    """
    op = "ensemble"
    framework = _Framework(op, "tokens", tokens)
    tensors = _view_tensors(op, tokens, offsets, weights)
    call = *tensors[:2], grid, patch, tensors[2]
    stride = ops.pair(op, "stride", stride)
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    target = dense = None
    if out is not None:
        framework = _Framework(op, "out", out)
        frozen = isinstance(out, np.ndarray) and not out.flags.writeable
        if frozen or _packages(out) & {"jax", "jaxlib"}:
            kind = type(out).__name__
            raise TypeError(f"srt::{op}: out must be a writable array; got a read-only {kind}")
        target = _to_tensor(op, "out", out)
    elif not framework.takes_strides:
        # The kernel writes this layout more slowly, but a copy would take longer.
        shape = ops.field_shape(op, *call, stride=stride)
        ops.check_views(op, *call, reduce=reduce, **modes)
        dense = tensors[0].new_empty(shape)
    field = ops.ensemble(*call, reduce=reduce, **modes, out=dense if target is None else target)
    _hold((*tensors, target), (tokens, offsets, weights, out))
    result = framework.from_tensor(field)  # makes the stream of ``out`` wait for torch's
    return cast(Array, result if out is None else out)


def ensemble_moments(
    tokens: Array,
    offsets: Any,
    grid: Pair,
    patch: Pair,
    weights: Any = None,
    *,
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
) -> tuple[Array, Array]:
    """Computes the mean and variance over the views, as :func:`srt_ext.ensemble_moments`.

    Args:
        tokens: [V, B, N, C], any array with ``__dlpack__``.
        offsets: [V, 2], (dy, dx) in pixels, as for :func:`ensemble`.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V] or None, as for :func:`ensemble`.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Returns:
        (mean, var), each [B, C, H / sh, W / sw] as the result of :func:`ensemble`. For JAX both are
        copied once to make them contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> tokens = np.array([1, 3], dtype=np.float32).reshape(2, 1, 1, 1)  # two views
        >>> mean, var = ensemble_moments(tokens, [[0, 0]] * 2, grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    op = "ensemble_moments"
    framework = _Framework(op, "tokens", tokens)
    tensors = _view_tensors(op, tokens, offsets, weights)
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    mean, var = ops.ensemble_moments(*tensors[:2], grid, patch, tensors[2], **modes)
    _hold(tensors, (tokens, offsets, weights))
    return cast(Array, framework.from_tensor(mean)), cast(Array, framework.from_tensor(var))
