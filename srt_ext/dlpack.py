"""The ops on arrays of any framework that speaks DLPack: NumPy, CuPy, JAX, PyTorch.

Each function takes arrays with ``__dlpack__``, on the CPU or on a GPU, and returns arrays of the
same kind on the same device. Memory is shared in both directions, and on a GPU streams wait for
each other, not the caller.

The other framework sees no derivative of these functions, and cannot call them inside its compiled
functions (``jax.jit``). Arguments of a wrong type or dtype raise a TypeError, those of a wrong
shape, word or value a ValueError.
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

# Four hazards on a GPU:
# 1. We read what the producer has not written yet. torch.from_dlpack passes torch's current stream
#    to the array's __dlpack__, and the producer makes that stream wait for its own.
# 2. The consumer reads what we have not written yet. Its from_dlpack passes its stream to the
#    __dlpack__ of our result, which makes that stream wait for torch's current one.
# 3. The producer reuses the memory of an input while we read it. It does not know our stream, and
#    frees the memory with the last reference, perhaps as soon as we return. So inputs are held here
#    until an event behind our kernel has happened.
# 4. torch reuses the memory of a result while the consumer reads it. DLPack leaves that to the
#    consumer, who calls the deleter when it is done.
_in_use: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
_lock = threading.Lock()


def _hold(tensors: Sequence[torch.Tensor | None], arrays: Sequence[object]) -> None:
    """Holds the CUDA tensors made from other frameworks' arrays while the current stream uses them.

    Each call releases those of earlier calls that are done.
    """
    pairs = zip(tensors, arrays, strict=True)
    foreign = [t for t, array in pairs if t is not None and t is not array and t.is_cuda]
    if not foreign:
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(foreign[0].device))
    released = []  # freed outside the lock: deleters are foreign code
    with _lock:
        while _in_use and _in_use[0][0].query():
            released.append(_in_use.popleft())
        _in_use.append((event, foreign))


class _Writable:
    """The memory of a read-only ndarray. torch has no read-only tensors, and would warn."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        pointer, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def _from_numpy(op: str, name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Not by DLPack: NumPy exports no bfloat16 and, before 2.1, no read-only array."""
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return _from_numpy(op, name, array.view(np.uint16)).view(torch.bfloat16)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biufc" or size > (16 if kind == "c" else 8) or not array.dtype.isnative:
        rule = f"{name} must be numbers as torch has them, in the byte order of this machine"
        raise TypeError(f"srt::{op}: {rule}; got {array.dtype}")
    if array.size and any(stride % array.itemsize for stride in array.strides):
        rule = f"{name} must have strides of whole elements, {array.itemsize} bytes each"
        raise ValueError(f"srt::{op}: {rule}; got strides of {list(array.strides)} bytes")
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))  # inputs are never written to
    return torch.from_numpy(array)


def _packages(array: object) -> set[str]:
    return {base.__module__.partition(".")[0] for base in type(array).__mro__}


def _has_dlpack(array: object) -> bool:
    if isinstance(array, np.ma.MaskedArray):
        return False  # the masked values would be read
    # JAX's tracers have the first alone.
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def _error(op: str, rule: str, got: object) -> TypeError:
    return TypeError(f"srt::{op}: {rule}; got {type(got).__name__}")


def _to_tensor(op: str, name: str, array: Any) -> torch.Tensor:
    """A tensor on the memory of ``array``."""
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
    # NumPy gives an empty array strides of 0.
    return tensor if tensor.numel() else tensor.new_empty(tensor.shape)


def _values(op: str, name: str, values: Any) -> torch.Tensor:
    """offsets or weights: arrays as they are, sequences of numbers as float64 on the CPU."""
    if _has_dlpack(values):
        if isinstance(values, np.ndarray):
            return _from_numpy(op, name, values.copy())  # so few that a copy is simpler than rules
        return _to_tensor(op, name, values)
    if isinstance(values, Sequence):
        try:
            return torch.tensor(values, dtype=torch.float64, device="cpu")
        except Exception:  # rows of different lengths, elements that cannot be numbers
            pass
    raise _error(op, f"{name} must be an array or a sequence of numbers", values)


class _Framework:
    """Makes arrays of the same framework as ``array``."""

    def __init__(self, op: str, name: str, array: Any) -> None:
        self.like = array
        packages = _packages(array)
        # JAX gets results that are contiguous: 0.6 ignores other strides and computes nonsense, 0.7
        # refuses them, and so do compiled functions of 0.8 to 0.10.
        self.takes_strides = bool(packages & {"cupy", "numpy", "torch"})
        if not _has_dlpack(array):
            raise _error(op, f"{name} must be an array with __dlpack__, without a mask", array)
        if hasattr(array, "__array_namespace__"):
            self.namespace = array.__array_namespace__()
        elif "cupy" in packages:  # before version 14
            self.namespace = sys.modules["cupy"]
        elif not isinstance(array, (torch.Tensor, np.ndarray)):
            rule = f"{name} must have __array_namespace__, which tells the way back"
            raise _error(op, rule, array)

    def from_tensor(self, tensor: torch.Tensor) -> Any:
        """An array on the memory of ``tensor``, which the current stream may yet write."""
        if isinstance(self.like, torch.Tensor):
            return tensor
        tensor = tensor.detach()  # others see no derivative: offsets may be a tensor that has one
        if isinstance(self.like, np.ndarray):
            if tensor.dtype == torch.bfloat16:
                return tensor.view(torch.uint16).numpy().view(self.like.dtype)
            return tensor.numpy()
        if not self.takes_strides:
            # Contiguous, and with the usual strides also where a size is 1.
            tensor = tensor.reshape(-1).reshape(tensor.shape)
        with torch.cuda.device_of(tensor):  # __dlpack__ is about the stream of this device
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
    """As :func:`srt_ext.shift`, for arrays of any framework.

    ``image`` is any array with ``__dlpack__``, ``offsets`` are an array of any framework, or nested
    sequences of numbers. The result is an array of the kind, dtype and device of ``image``.
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
    """As :func:`srt_ext.windows`, for arrays of any framework.

    ``image`` is any array with ``__dlpack__``, ``centers`` and ``scale`` are arrays of any
    framework, or nested sequences of numbers. The result is an array of the kind, dtype and device
    of ``image``.
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
    """As :func:`srt_ext.ensemble`, for arrays of any framework.

    Args:
        tokens: as there, any array with ``__dlpack__``.
        offsets, weights: as there, arrays of any framework, or (nested) sequences of numbers.
        grid, patch, reduce, upsample, border, stride: as there.
        out: [B, C, H / sh, W / sw], an array that can be written to (JAX's cannot).

    Returns:
        [B, C, H / sh, W / sw], an array of the kind, dtype and device of ``tokens``, or ``out``.
        Its strides are those of channels_last; for JAX it is contiguous, which takes the kernel
        longer.

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
            raise _error(op, "out must be an array that can be written to", out)
        target = _to_tensor(op, "out", out)
    elif not framework.takes_strides:
        # The kernel writes another layout slower, but faster than a copy.
        shape = ops.field_shape(op, *call, stride=stride)
        ops.check_views(op, *call, reduce=reduce, **modes)
        dense = tensors[0].new_empty(shape)
    field = ops.ensemble(*call, reduce=reduce, **modes, out=dense if target is None else target)
    _hold((*tensors, target), (tokens, offsets, weights, out))
    result = framework.from_tensor(field)  # the stream of ``out`` then waits for ours
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
    """As :func:`srt_ext.ensemble_moments`, for arrays of any framework.

    Arguments and both results are those of :func:`ensemble`. For JAX both are copied once, to be
    contiguous.
    """
    op = "ensemble_moments"
    framework = _Framework(op, "tokens", tokens)
    tensors = _view_tensors(op, tokens, offsets, weights)
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    mean, var = ops.ensemble_moments(*tensors[:2], grid, patch, tensors[2], **modes)
    _hold(tensors, (tokens, offsets, weights))
    return cast(Array, framework.from_tensor(mean)), cast(Array, framework.from_tensor(var))
