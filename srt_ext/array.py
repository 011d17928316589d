"""The ops on arrays of any framework: NumPy, CuPy, JAX, TensorFlow, PyTorch.

Each function takes an array with ``__dlpack__``, on the CPU or on a GPU, and gives back arrays of
the same kind on the same device. Memory is shared in both directions by the DLPack protocol, and on
a GPU streams wait for each other, not the caller.

These are no operations of the other framework: they have no derivative there, and are called
between compiled functions (``jax.jit``, ``tf.function``), not inside.
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
    raise ImportError(f"srt_ext.array is not available: {unavailable}")

import torch
from torch.utils.dlpack import DLDeviceType, from_dlpack

from . import ops
from .options import Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample

Array = TypeVar("Array")  # with __dlpack__ and __dlpack_device__

# Four things must not happen on a GPU:
# 1. We read what the producer has not written yet. torch.from_dlpack passes torch's current stream
#    to the array's __dlpack__, and the producer lets that stream wait for its own.
# 2. The consumer reads what we have not written yet. Its from_dlpack passes its stream to the
#    __dlpack__ of our result, which lets that stream wait for torch's current one.
# 3. The producer gives the memory of an input to somebody else while we read it. It knows nothing
#    of our stream and takes the memory back when the last reference is dropped, perhaps as soon as
#    we return. So inputs are kept here until an event behind our kernel has happened.
# 4. torch gives the memory of a result to somebody else while the consumer reads it. DLPack leaves
#    that to the consumer, who calls the deleter when it is done: its streams are not ours to watch.
_kept: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
_lock = threading.Lock()


def _keep(tensors: Sequence[torch.Tensor | None], arrays: Sequence[object]) -> None:
    """Keeps the CUDA tensors that were made of other frameworks' arrays.

    Until the current stream has done what it has to do now; the next call looks whether it has.
    """
    foreign = [
        tensor
        for tensor, array in zip(tensors, arrays, strict=True)
        if tensor is not None and tensor is not array and tensor.is_cuda
    ]
    if not foreign:
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(foreign[0].device))
    dropped = []  # after the lock: what a deleter does is not known
    with _lock:
        while _kept and _kept[0][0].query():
            dropped.append(_kept.popleft())
        _kept.append((event, foreign))


class _Writable:
    """The memory of a read-only ndarray. torch has no such tensors, and would warn."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        pointer, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def _from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Not by DLPack: NumPy exports no bfloat16 and, before 2.1, no read-only array."""
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return _from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))  # nothing here writes to an input
    return torch.from_numpy(array)


def _packages(array: object) -> set[str]:
    return {base.__module__.partition(".")[0] for base in type(array).__mro__}


def _has_memory(array: object) -> bool:
    if "tensorflow" in _packages(array):
        return True  # also before it had __dlpack__
    if isinstance(array, np.ma.MaskedArray):
        return False  # what it hides would be read
    # JAX's tracers have the first alone.
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def _error(op: str, rule: str, got: object) -> TypeError:
    return TypeError(f"srt::{op}: {rule}; got {type(got).__name__}")


def _tensor(op: str, name: str, array: Any) -> torch.Tensor:
    """On the memory of ``array``."""
    if isinstance(array, torch.Tensor):
        return array
    strides = getattr(array, "strides", None)
    if strides and min(strides) < 0:
        raise ValueError(f"srt::{op}: {name} must have strides >= 0; got {strides}")
    if isinstance(array, np.ndarray):
        tensor = _from_numpy(array)
    elif "tensorflow" in _packages(array):
        # Its __dlpack__, where it has one, refuses a stream. This waits for its work instead.
        tensor = from_dlpack(sys.modules["tensorflow"].experimental.dlpack.to_dlpack(array))
    else:
        kind, index = array.__dlpack_device__()
        # CuPy speaks for the current stream of the current device.
        with torch.cuda.device(index) if kind == DLDeviceType.kDLCUDA else nullcontext():
            tensor = from_dlpack(array)
    # Of an empty array NumPy says that all strides are 0.
    return tensor if tensor.numel() else tensor.new_empty(tensor.shape)


def _numbers(op: str, name: str, values: Any) -> torch.Tensor:
    """offsets or weights: arrays as they are, other numbers as float64 on the CPU."""
    if _has_memory(values):
        if isinstance(values, np.ndarray):
            return _from_numpy(values.copy())  # so few that a copy is simpler than rules
        return _tensor(op, name, values)
    if isinstance(values, Sequence):
        try:
            return torch.tensor(values, dtype=torch.float64)
        except (RuntimeError, TypeError, ValueError):
            pass
    raise _error(op, f"{name} must be an array or a sequence of numbers", values)


class _Kind:
    """The kind of an array, to make tensors into arrays of it."""

    def __init__(self, op: str, name: str, array: Any) -> None:
        self.like = array
        packages = _packages(array)
        self.tensorflow = "tensorflow" in packages
        # What every other framework gets is dense in the order of its dimensions. TensorFlow takes
        # nothing else. JAX depends on the version: 0.6 takes other strides and computes as if they
        # were not there, 0.7 refuses them, and so do compiled functions of 0.8 to 0.10.
        self.strides = bool(packages & {"cupy", "numpy", "torch"})
        if not _has_memory(array):
            raise _error(op, f"{name} must be an array with __dlpack__, without a mask", array)
        if isinstance(array, (torch.Tensor, np.ndarray)) or self.tensorflow:
            return
        if hasattr(array, "__array_namespace__"):
            self.namespace = array.__array_namespace__()
        elif "cupy" in packages:  # before version 14
            self.namespace = sys.modules["cupy"]
        else:
            rule = f"{name} must have __array_namespace__, which tells the way back"
            raise _error(op, rule, array)

    def array(self, tensor: torch.Tensor) -> Any:
        """On the memory of ``tensor``, which the current stream may still have to write."""
        if isinstance(self.like, torch.Tensor):
            return tensor
        if isinstance(self.like, np.ndarray):
            if tensor.dtype == torch.bfloat16:
                return tensor.view(torch.uint16).numpy().view(self.like.dtype)
            return tensor.numpy()
        if not self.strides:
            # Dense, and with the usual strides where a size is 1, too.
            tensor = tensor.reshape(-1).reshape(tensor.shape)
        with torch.cuda.device_of(tensor):  # __dlpack__ speaks for the stream of this device
            if not self.tensorflow:
                return self.namespace.from_dlpack(tensor)
            if tensor.is_cuda:
                torch.cuda.current_stream().synchronize()  # it tells no stream that could wait
            take = sys.modules["tensorflow"].experimental.dlpack.from_dlpack
            return take(tensor.__dlpack__())


def _written(op: str, out: Any) -> torch.Tensor:
    """On the memory of ``out``."""
    if _packages(out) & {"jax", "jaxlib", "tensorflow"} or (
        isinstance(out, np.ndarray) and not out.flags.writeable
    ):
        raise _error(op, "out must be an array that can be written to", out)
    return _tensor(op, "out", out)


def shift(
    image: Array,
    offsets: Any,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
) -> Array:
    """As :func:`srt_ext.shift`, for arrays of any framework.

    Args:
        image: [B, C, H, W], any array with ``__dlpack__``; float32, float16, bfloat16, float64 or
            uint8.
        offsets: [V, 2], (dy, dx) in pixels; an array of any framework, float32 or float64, on the
            CPU or on the device of ``image``, or nested sequences of numbers.
        padding, interpolation: as for :func:`srt_ext.shift`.

    Returns:
        [V, B, C, H, W], dense, an array of the kind, dtype and device of ``image``.

    Raises:
        TypeError: no array, or an argument of the wrong type or dtype.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> image = np.arange(4.0, dtype=np.float32).reshape(1, 1, 1, 4)
        >>> shift(image, [[0, 1], [0, 0.5]], padding="border")[:, 0, 0, 0]
        array([[0. , 0. , 1. , 2. ],
               [0. , 0.5, 1.5, 2.5]], dtype=float32)
    """
    op = "shift"
    kind = _Kind(op, "image", image)
    tensors = _tensor(op, "image", image), _numbers(op, "offsets", offsets)
    views = ops.shift(*tensors, padding=padding, interpolation=interpolation)
    _keep(tensors, (image, offsets))
    return cast(Array, kind.array(views))


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
        tokens: [V, B, N, C], any array with ``__dlpack__``; float32, float16, bfloat16 or float64.
            The last dimension is dense; other strides are free.
        offsets: [V, 2], (dy, dx) in pixels; an array of any framework, float32 or float64, on the
            CPU or on the device of ``tokens``, or nested sequences of numbers.
        weights: [V], as ``offsets``, finite and >= 0; None for equal weights.
        grid, patch, reduce, upsample, border, stride: as for :func:`srt_ext.ensemble`.
        out: [B, C, H / sh, W / sw], an array that can be written to, which JAX's and TensorFlow's
            cannot.

    Returns:
        [B, C, H / sh, W / sw], an array of the kind, dtype and device of ``tokens``, or ``out``.
        Its strides are those of channels_last; for JAX and TensorFlow it is dense in the order of
        its dimensions, which takes the kernel longer.

    Raises:
        TypeError: no array, or an argument of the wrong type or dtype.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> tokens = np.array([0, 4], dtype=np.float32).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, [[0, 0]], grid=(1, 2), patch=(1, 4))[0, 0, 0]
        array([0. , 0. , 0.5, 1.5, 2.5, 3.5, 4. , 4. ], dtype=float32)
    """
    op = "ensemble"
    kind = _Kind(op, "tokens", tokens)
    tensors = (
        _tensor(op, "tokens", tokens),
        _numbers(op, "offsets", offsets),
        None if weights is None else _numbers(op, "weights", weights),
    )
    call = *tensors[:2], grid, patch, tensors[2]
    modes: dict[str, Any] = {
        "reduce": reduce,
        "upsample": upsample,
        "border": border,
        "stride": stride,
    }
    if out is not None:
        kind = _Kind(op, "out", out)
        target = _written(op, out)
        ops.ensemble(*call, **modes, out=target)
        _keep((*tensors, target), (tokens, offsets, weights, out))
        kind.array(target)  # so that the stream of ``out`` waits for ours
        return out
    dense = None
    if not kind.strides:
        # The kernel itself writes the order that is asked for: slower, but not as slow as a copy.
        shape = ops.field_shape("ensemble", *call, stride=stride)
        ops.check_views("ensemble", *call, upsample=upsample, border=border, stride=stride)
        dense = tensors[0].new_empty(shape)
    field = ops.ensemble(*call, **modes, out=dense)
    _keep(tensors, (tokens, offsets, weights))
    return cast(Array, kind.array(field))


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

    Args:
        tokens, offsets, grid, patch, weights, upsample, border, stride: as for :func:`ensemble`.

    Returns:
        (mean, var), each as the result of :func:`ensemble`. For JAX and TensorFlow both are copied
        once: their order is not the kernel's.

    Raises:
        TypeError, ValueError: as :func:`ensemble`.

    Example:
        >>> tokens = np.array([1, 3], dtype=np.float32).reshape(2, 1, 1, 1)  # two views of a token
        >>> mean, var = ensemble_moments(tokens, [[0, 0], [0, 0]], grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    op = "ensemble_moments"
    kind = _Kind(op, "tokens", tokens)
    tensors = (
        _tensor(op, "tokens", tokens),
        _numbers(op, "offsets", offsets),
        None if weights is None else _numbers(op, "weights", weights),
    )
    mean, var = ops.ensemble_moments(
        *tensors[:2], grid, patch, tensors[2], upsample=upsample, border=border, stride=stride
    )
    _keep(tensors, (tokens, offsets, weights))
    return cast(Array, kind.array(mean)), cast(Array, kind.array(var))
