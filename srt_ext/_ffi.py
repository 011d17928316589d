"""The handlers of csrc/xla as functions of JAX arrays: loading, argument checks, calls, vmap."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import version

from ._validation import stated_error

_HANDLERS = (
    "ensemble",
    "moments",
    "mean_weight",
    "mean_backward",
    "shift",
    "shift_backward",
    "windows",
    "windows_backward_image",
    "windows_backward_points",
)

platforms: list[str] = []  # with registered handlers: cpu, CUDA


# ---- the libraries -------------------------------------------------------------------------------


def _interface_of_jaxlib() -> tuple[int, int]:
    """The version of XLA's foreign function interface, from the headers of jaxlib."""
    path = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
    header = path.read_text() if path.exists() else ""
    major = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", header)
    minor = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)
    if major is None or minor is None:
        raise ImportError(
            f"srt_ext.jax is not available: {path} of jaxlib {version.__version__} does not state "
            "the version of XLA's foreign function interface"
        )
    return int(major[1]), int(minor[1])


def _check_interface(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    """Raises an ImportError if jaxlib does not support handlers for the interface ``ours``.

    Registering such handlers would make every later call of JAX fail.
    """
    if ours[0] != theirs[0] or ours[1] > theirs[1]:
        raise ImportError(
            "srt_ext.jax is not available: it was built for version {}.{} of XLA's foreign "
            f"function interface, but jaxlib {version.__version__} has version {{}}.{{}}. Install "
            "a newer jaxlib, or build srt_ext with pip's isolation (plain pip install), which uses "
            "the headers of the oldest supported jaxlib".format(*ours, *theirs)
        )


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        reason = f"srt_ext.jax is not available: {path} cannot be loaded: {error}"
        raise ImportError(reason) from error


def _load() -> ctypes.CDLL:
    """Registers the handlers and returns the library with the checks."""
    path = Path(__file__).with_name("_xla.so")
    if not path.exists():
        raise ImportError(
            f"srt_ext.jax is not available: {path} does not exist. Either Python imported the "
            "sources of srt_ext instead of the installed package (start Python in another folder, "
            "or run pip install -e . in the clone), or jaxlib was not found during the build "
            "(pip install -v . prints the reason)"
        )
    library = _opened(path)
    ours = ctypes.c_int64(), ctypes.c_int64()
    library.srt_interface_version(*map(ctypes.byref, ours))
    _check_interface((ours[0].value, ours[1].value), _interface_of_jaxlib())
    capsule: Any = jax.ffi.pycapsule  # untyped
    libraries = {"cpu": library}
    path = path.with_name("_xla_cuda.so")
    if path.exists():
        libraries["CUDA"] = _opened(path)
    for platform, handlers in libraries.items():
        for name in _HANDLERS:
            handler = capsule(getattr(handlers, f"srt_{name}"))
            jax.ffi.register_ffi_target(f"srt_{name}", handler, platform=platform)
        platforms.append(platform)
    return library


# ---- checks when a program is traced -------------------------------------------------------------


class _Array(ctypes.Structure):
    """As in csrc/xla/check.cpp."""

    _fields_ = (
        ("dtype", ctypes.c_char_p),
        ("element_size", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("values", ctypes.c_void_p),
    )


_library = _load()
for _name in ("ensemble", "shift", "windows"):
    getattr(_library, f"srt_check_{_name}").restype = ctypes.c_char_p


def described(*arrays: Any) -> ctypes.Array[_Array]:
    """The arguments for a check: arrays of the program; constants, as NumPy arrays; None."""
    described = (_Array * len(arrays))()
    for entry, array in zip(described, arrays, strict=True):
        if array is None:
            continue
        entry.dtype, entry.element_size = str(array.dtype).encode(), array.dtype.itemsize
        entry.rank, entry.shape = array.ndim, (ctypes.c_int64 * array.ndim)(*map(int, array.shape))
        if isinstance(array, np.ndarray):
            entry.values = array.ctypes.data
    return described


def check(op: str, *arguments: Any) -> None:
    """Raises the error of a wrong argument, by the rules of all bindings."""
    words = [a.encode() if isinstance(a, str) else a for a in arguments]
    message = getattr(_library, f"srt_check_{op}")(*words)
    if message is not None:
        text = message.decode(errors="replace")
        raise stated_error(text) or RuntimeError(text)


# ---- calls ---------------------------------------------------------------------------------------

# The name of the manual axes of jax.shard_map in a type, and of the parameter of ShapeDtypeStruct.
_MANUAL_AXES = (
    ("mat", "manual_axis_type") if hasattr(jax.sharding, "ManualAxisType") else ("vma",) * 2
)


def _varying(array: jax.Array) -> frozenset[Any]:
    """The manual axes of ``jax.shard_map`` along which the array varies."""
    axes = getattr(jax.typeof(array), _MANUAL_AXES[0])
    return frozenset(getattr(axes, "varying", axes))


def _cast(array: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):
        return cast(jax.Array, lax.pcast(array, axes, to="varying"))
    return cast(jax.Array, lax.pvary(array, axes))  # until jax 0.8


def gathered(array: jax.Array) -> jax.Array:
    """The array on every device, if its type is sharded (``AxisType.Explicit``)."""
    sharding: Any = jax.typeof(array).sharding
    if all(axes is None for axes in sharding.spec):
        return array
    module: Any = jax if hasattr(jax, "reshard") else jax.sharding  # until jax 0.7
    spec: Any = PartitionSpec  # untyped
    return cast(jax.Array, module.reshard(array, NamedSharding(sharding.mesh, spec())))


def same_axes(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying along the same manual axes of ``jax.shard_map``."""
    every = frozenset().union(*map(_varying, arrays))
    missing = [tuple(every - _varying(array)) for array in arrays]
    return [_cast(a, axes) if axes else a for a, axes in zip(arrays, missing, strict=True)]


def call_handler(
    handler: str,
    attributes: dict[str, Any],
    operands: Sequence[jax.Array],
    results: Sequence[tuple[tuple[int, ...], Any]],
) -> list[jax.Array]:
    """Calls a handler. ``results``: the shape and dtype of each result."""
    operands = same_axes(*operands)
    kind: Any = jax.typeof(operands[0])
    manual: dict[str, Any] = {}
    if _varying(operands[0]):
        own, parameter = _MANUAL_AXES
        spec: Any = PartitionSpec  # untyped
        sharding = NamedSharding(kind.sharding.mesh, spec())
        manual = {"sharding": sharding, parameter: getattr(kind, own)}
    if kind.sharding.mesh.manual_axes:  # inside of jax.shard_map
        attributes = {**attributes, "sharded": 1}
    result_type: Any = jax.ShapeDtypeStruct  # untyped
    described = [result_type(shape, dtype, **manual) for shape, dtype in results]
    return list(jax.ffi.ffi_call(f"srt_{handler}", described)(*operands, **attributes))


def batched(
    function: Callable[..., list[jax.Array]],
    dims: Sequence[int | None],
    out: Sequence[int | None],
    *arrays: jax.Array,
) -> list[jax.Array]:
    """Runs ``function``. ``jax.vmap`` folds the mapped dimension into the batch B of one call.

    ``dims`` and ``out``: the dimension of B in each array and in each result, or None. If an array
    without B is mapped, the call runs once for each element.
    """
    run = custom_vmap(function)

    def fold(array: jax.Array, dim: int | None, size: int, mapped: bool) -> jax.Array:
        if dim is None:
            return array
        if mapped:
            array = jnp.moveaxis(array, 0, dim)
        else:
            array = jnp.broadcast_to(
                jnp.expand_dims(array, dim), (*array.shape[:dim], size, *array.shape[dim:])
            )
        batch = size * array.shape[dim + 1]
        return array.reshape(*array.shape[:dim], batch, *array.shape[dim + 2 :])

    def unfold(array: jax.Array, dim: int | None, size: int) -> jax.Array:
        if dim is None:
            return array
        sizes = size, array.shape[dim] // size
        return jnp.moveaxis(
            array.reshape(*array.shape[:dim], *sizes, *array.shape[dim + 1 :]), dim, 0
        )

    @run.def_vmap
    def rule(size: int, mapped: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        if any(m and dim is None for m, dim in zip(mapped, dims, strict=True)):

            def one(elements: list[jax.Array]) -> list[jax.Array]:
                rest = iter(elements)
                given = [next(rest) if m else a for a, m in zip(arrays, mapped, strict=True)]
                return cast(list[jax.Array], run(*given))

            every = jax.lax.map(one, [a for a, m in zip(arrays, mapped, strict=True) if m])
            return every, [True] * len(out)
        folded = [fold(a, d, size, m) for a, d, m in zip(arrays, dims, mapped, strict=True)]
        results = [unfold(r, dim, size) for r, dim in zip(run(*folded), out, strict=True)]
        return results, [dim is not None for dim in out]

    return cast(list[jax.Array], run(*arrays))
