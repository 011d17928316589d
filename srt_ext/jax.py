"""``shift``, ``windows``, ``ensemble`` and its variants inside JAX programs, without torch.

``import srt_ext.jax`` needs jax >= 0.6.2 and does not need torch. The functions run the kernels of
``torch.ops.srt.*`` as custom calls of XLA: on the CPU with the threads of XLA, on a GPU on the
stream of XLA with memory from its allocator. They can be called inside ``jax.jit``, ``jax.grad``,
``jax.vmap`` and ``jax.shard_map``.

Offsets, weights, centers and scale are constants or arrays. A NumPy array or (nested) sequences of
numbers are constants: they are validated when the program is traced and keep their float64 values.
A ``jax.Array`` is an argument of the program: the CPU validates its values when the program runs
(a wrong value raises JAX's error with the message of srt_ext), and a GPU does not validate them, as
described for :func:`srt_ext.ensemble`.

Fields have the shape [B, C, H', W'] and are channels last in memory inside a program:
``field.transpose(0, 2, 3, 1)`` costs nothing there. A program that returns the field itself copies
it to JAX's default layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from numpy.typing import NDArray

from ._ffi import batched, call_handler, check, described, gathered, same_axes
from ._validation import MAX_WINDOWS, check_numbers, check_pair, check_words, wrong
from .options import Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample

__all__ = ["ensemble", "ensemble_moments", "mean_sums", "shift", "windows"]

# The types of offsets, weights, centers and scale.
Numbers: TypeAlias = jax.Array | NDArray[np.float32] | NDArray[np.float64] | Sequence[Any]

# ---- arguments ---------------------------------------------------------------------------------


def _data(where: str, name: str, value: object) -> jax.Array:
    """Converts tokens or an image to an array of JAX."""
    if isinstance(value, jax.Array):
        return gathered(value)
    if not isinstance(value, np.ndarray) or hasattr(value, "mask"):
        rule = f"{name} must be a jax.Array or a numpy.ndarray without a mask"
        raise wrong(TypeError, where, rule, type(value).__name__)
    return jnp.asarray(value)


def _numbers(where: str, name: str, value: object, *limits: Any) -> Any:
    """Returns an array of the program as it is, and constants as a float64 array of NumPy."""
    if isinstance(value, Sequence) and any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)
    ):
        rule = f"{name} must not be sequences that contain arrays of the program; use jnp.array"
        raise wrong(TypeError, where, rule, "a tracer in a sequence")
    if isinstance(value, jax.Array):
        return gathered(value)
    return check_numbers(where, name, value, *limits)


# ---- calls of the handlers -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Static:
    """The arguments of a call that are known when it is traced, by the names of the handlers.

    Constants are the bytes of a float64 array. Arguments that are None are arrays of the program,
    or not given.
    """

    def call(self, handler: str, operands: Sequence[jax.Array], results: Any) -> list[jax.Array]:
        """Calls a handler. ``results``: the shape and dtype of each result."""
        found: dict[str, Any] = {}
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if isinstance(value, tuple):
                found[name] = np.array(value, np.int64)
            elif isinstance(value, bytes):
                found[name] = np.frombuffer(value)
            elif value is not None:
                found[name] = value
        return call_handler(handler, found, operands, results)


@dataclass(frozen=True)
class _Ensemble(_Static):
    reduce: str  # mean, median or moments
    grid: tuple[int, int]
    patch: tuple[int, int]
    stride: tuple[int, int]
    upsample: str
    border: str
    offsets: bytes | None  # [V, 2]
    weights: bytes | None  # [V]

    def field(self, batch: int, channels: int) -> tuple[int, ...]:
        """[B, H', W', C], the shape of a field in the handlers."""
        sizes = zip(self.grid, self.patch, self.stride, strict=True)
        return batch, *(g * p // s for g, p, s in sizes), channels


@dataclass(frozen=True)
class _Shift(_Static):
    padding: str
    interpolation: str
    offsets: bytes | None  # [V, 2]


@dataclass(frozen=True)
class _Windows(_Static):
    padding: str
    size: tuple[int, int]
    pixels: tuple[int, int]  # (H, W)
    layout: str  # of the image: channels_first or channels_last
    scales: str  # one [2], or each [B, N, 2]
    centers: bytes | None  # [B, N, 2]
    scale: bytes | None


def _channels_last(array: jax.Array) -> jax.Array:
    """[B, H, W, C] of [B, C, H, W]. XLA removes a transposition that follows the opposite one."""
    return array.transpose(0, 2, 3, 1)


def _channels_first(array: jax.Array) -> jax.Array:
    return array.transpose(0, 3, 1, 2)


# Arrays of the program by the name of the argument, such as "offsets".
_Arrays: TypeAlias = dict[str, jax.Array]


def _values(numbers: _Arrays) -> list[jax.Array]:
    return [numbers[name] for name in sorted(numbers)]


def _view_count(static: Any, numbers: _Arrays) -> int:
    return len(static.offsets) // 16 if static.offsets is not None else numbers["offsets"].shape[0]


def _accumulator(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


# ---- derivatives ---------------------------------------------------------------------------------

# The arguments of each function: what is static, the data, and arrays by name. A backward function
# computes the gradients of the data and of the arrays; XLA removes those that are not used.


def _differentiable(function: Callable[..., Any]) -> Any:
    return partial(jax.custom_vjp, nondiff_argnums=(0,))(function)


def _plain(numbers: dict[str, Any], where: str, *constant: str) -> _Arrays:
    """The values of primals. Raises an error if a name in ``constant`` is differentiated."""
    for name in constant:
        if name in numbers and numbers[name].perturbed:
            raise ValueError(
                f"{where}: {name} must not be differentiated here, because this derivative is not "
                f"available; apply jax.lax.stop_gradient to {name}"
            )
    return {name: primal.value for name, primal in numbers.items()}


def _zeros(numbers: _Arrays) -> _Arrays:
    return {name: jnp.zeros_like(array) for name, array in numbers.items()}


def _instantiate(grads: Any) -> list[jax.Array]:
    return [
        jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g
        for g in jax.tree.leaves(grads, is_leaf=lambda g: isinstance(g, SymbolicZero))
    ]


@_differentiable
def _shift(static: _Shift, image: jax.Array, numbers: _Arrays) -> jax.Array:
    def call(image: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        shape = (_view_count(static, numbers), *image.shape)
        return static.call("shift", (image, *rest), [(shape, image.dtype)])

    return batched(call, (0, *[None] * len(numbers)), (1,), image, *_values(numbers))[0]


@_differentiable
def _shift_backward(static: _Shift, grad: jax.Array, numbers: _Arrays) -> jax.Array:
    def call(grad: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        return static.call("shift_backward", (grad, *rest), [(grad.shape[1:], grad.dtype)])

    return batched(call, (1, *[None] * len(numbers)), (0,), grad, *_values(numbers))[0]


def _define_linear(function: Any, transpose: Any, where: str, *constant: str) -> None:
    """Defines the derivative of ``function``, which is linear in its data."""

    def forward(static: Any, data: Any, numbers: Any) -> tuple[Any, Any]:
        plain = _plain(numbers, where, *constant)
        return function(static, data.value, plain), plain

    def backward(static: Any, numbers: _Arrays, grad: Any) -> tuple[Any, Any]:
        return transpose(static, *_instantiate(grad), numbers), _zeros(numbers)

    function.defvjp(forward, backward, symbolic_zeros=True)


_define_linear(_shift, _shift_backward, "srt::shift", "offsets")
_define_linear(_shift_backward, _shift, "srt::shift", "offsets")


def _windows_dims(static: _Windows, numbers: _Arrays, arrays: int = 1) -> list[int | None]:
    """The dimension of B in ``arrays`` arrays and in the numbers.

    None if there are constants [B, N, 2]: the batch of the constants cannot grow.
    """
    each = {"centers": static.centers}
    if static.scales == "each":
        each["scale"] = static.scale
    if any(constant is not None for constant in each.values()):
        return [None] * (arrays + len(numbers))
    return [0] * arrays + [0 if name in each else None for name in sorted(numbers)]


def _window_image(static: _Windows, image: jax.Array) -> jax.Array:
    return _channels_last(image) if static.layout == "channels_last" else image


@_differentiable
def _windows(static: _Windows, image: jax.Array, numbers: _Arrays) -> jax.Array:
    def call(image: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        batch, channels = image.shape[:2]
        if static.centers is not None:
            count = len(static.centers) // 16 // batch
        else:
            count = rest[0].shape[1]
        results = [((batch, count, channels, *static.size), image.dtype)]
        return static.call("windows", (_window_image(static, image), *rest), results)

    dims = _windows_dims(static, numbers)
    return batched(call, dims, (0,), image, *_values(numbers))[0]


@_differentiable
def _windows_backward_image(static: _Windows, grad: jax.Array, numbers: _Arrays) -> jax.Array:
    def call(grad: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        results = [((grad.shape[0], grad.shape[2], *static.pixels), grad.dtype)]
        return static.call("windows_backward_image", (grad, *rest), results)

    dims = _windows_dims(static, numbers)
    return batched(call, dims, (0,), grad, *_values(numbers))[0]


@_differentiable
def _windows_points(
    static: _Windows, grad: jax.Array, image: jax.Array, numbers: _Arrays
) -> _Arrays:
    """The gradients of ``numbers``, for the gradient of the windows and their image."""

    def call(grad: jax.Array, image: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        operands = (grad, _window_image(static, image), *rest)
        dtype = rest[0].dtype  # float32 or float64
        results = [((*grad.shape[:2], 2), dtype)] * 2
        return static.call("windows_backward_points", operands, results)

    dims = _windows_dims(static, numbers, arrays=2)
    centers, scale = batched(call, dims, (0, 0), grad, image, *_values(numbers))
    found = {}
    for name, array in numbers.items():
        grads = (centers if name == "centers" else scale).astype(array.dtype)
        found[name] = grads if grads.shape == array.shape else grads.sum((0, 1))
    return found


def _define_windows(function: Any, transpose: Any, swap: bool) -> None:
    """Defines the derivative of ``function``. ``swap``: its data is the gradient of the windows."""

    def forward(static: _Windows, data: Any, numbers: Any) -> tuple[Any, Any]:
        kept = data.value if any(primal.perturbed for primal in numbers.values()) else None
        plain = _plain(numbers, "srt::windows")
        return function(static, data.value, plain), (kept, plain)

    def backward(static: _Windows, residuals: Any, grad: Any) -> tuple[Any, Any]:
        data, numbers = residuals
        (grad,) = _instantiate(grad)
        of_numbers = _zeros(numbers)
        if data is not None:
            pair = (data, grad) if swap else (grad, data)
            of_numbers = _windows_points(static, *pair, numbers)
        return transpose(static, grad, numbers), of_numbers

    function.defvjp(forward, backward, symbolic_zeros=True)


def _windows_points_forward(static: _Windows, grad: Any, image: Any, numbers: Any) -> Any:
    raise ValueError(
        "srt::windows: second derivatives with respect to centers or scale are not available; "
        "apply jax.lax.stop_gradient to them"
    )


_define_windows(_windows, _windows_backward_image, swap=False)
_define_windows(_windows_backward_image, _windows, swap=True)
_windows_points.defvjp(_windows_points_forward, lambda *_: (), symbolic_zeros=True)


@_differentiable
def _aggregate(static: _Ensemble, tokens: jax.Array, numbers: _Arrays) -> list[jax.Array]:
    """[mean], [median] or [mean, variance]"""
    count, handler = (2, "moments") if static.reduce == "moments" else (1, "ensemble")

    def call(tokens: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        shape = static.field(tokens.shape[1], tokens.shape[3])
        results = static.call(handler, (tokens, *rest), [(shape, tokens.dtype)] * count)
        return [_channels_first(field) for field in results]

    return batched(call, (1, *[None] * len(numbers)), (0,) * count, tokens, *_values(numbers))


@_differentiable
def _mean_backward(static: _Ensemble, grad: jax.Array, numbers: _Arrays) -> jax.Array:
    """Maps the gradient [B, C, H', W'] of a mean to [V, B, N, C]."""

    def call(grad: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        shape = (_view_count(static, numbers), grad.shape[0], static.grid[0] * static.grid[1])
        results = [((*shape, grad.shape[1]), grad.dtype)]
        return static.call("mean_backward", (_channels_last(grad), *rest), results)

    return batched(call, (0, *[None] * len(numbers)), (1,), grad, *_values(numbers))[0]


def _mean(static: _Ensemble, tokens: jax.Array, numbers: _Arrays) -> jax.Array:
    return cast(jax.Array, _aggregate(replace(static, reduce="mean"), tokens, numbers)[0])


_define_linear(_mean_backward, _mean, "srt::ensemble", "offsets", "weights")


def _aggregate_forward(static: _Ensemble, tokens: Any, numbers: Any) -> tuple[Any, Any]:
    plain = _plain(numbers, "srt::ensemble", "offsets")
    weighted = "weights" in numbers and numbers["weights"].perturbed
    kept = tokens.value if weighted or static.reduce != "mean" else None
    return _aggregate(static, tokens.value, plain), (kept, plain)


def _aggregate_backward(static: _Ensemble, residuals: Any, grads: Any) -> tuple[Any, Any]:
    tokens, numbers = residuals
    grads, of_numbers = _instantiate(grads), _zeros(numbers)
    if static.reduce == "mean":
        of_tokens = _mean_backward(static, grads[0], numbers)
    elif static.reduce == "median":
        of_tokens = _median_backward(static, grads[0], tokens, numbers)
    else:
        of_tokens = _moments_backward(static, grads[0], grads[1], tokens, numbers)
    if "weights" in numbers and tokens is not None:
        of_weights = _weights_backward(static, grads, tokens, numbers)
        of_numbers["weights"] = of_weights.astype(numbers["weights"].dtype)
    return of_tokens, of_numbers


_aggregate.defvjp(_aggregate_forward, _aggregate_backward, symbolic_zeros=True)


# The gradients of the median, of the moments and of weights are recomputed view by view, as in
# srt_ext/_autograd.py.


def _split(static: _Ensemble, numbers: _Arrays) -> list[tuple[_Ensemble, _Arrays]]:
    """Returns each view separately, without its weight."""
    every = []
    for v in range(_view_count(static, numbers)):
        constant = static.offsets and static.offsets[16 * v : 16 * v + 16]
        view = replace(static, reduce="mean", offsets=constant, weights=None)
        every.append((view, {} if constant else {"offsets": numbers["offsets"][v : v + 1]}))
    return every


def _pixels(static: _Ensemble, numbers: _Arrays) -> list[tuple[jax.Array, jax.Array]]:
    """[H', 1] and [W'] of each view. Their product counts the pixels of each cell.

    The counts come from the kernels, which apply the border rule: the mean of a view of ones is 1,
    and with ``zeros`` it is the covered fraction of the cell.
    """
    border = "zeros" if static.border == "coverage" else "clamp"
    counts = []
    for view, offset in _split(static, numbers):
        axes = []
        for axis, shape in enumerate(((-1, 1), (-1,))):
            own = np.arange(2) == axis
            sizes: dict[str, Any] = {
                name: tuple(int(n) for n in np.where(own, getattr(static, name), 1))
                for name in ("grid", "patch", "stride")
            }
            constant = view.offsets and np.where(own, np.frombuffer(view.offsets), 0.0).tobytes()
            line = replace(view, border=border, offsets=constant, **sizes)
            values = {name: jnp.where(own, value, 0) for name, value in offset.items()}
            ones = jnp.ones((1, 1, static.grid[axis], 1), jnp.float32)
            part = _aggregate(line, ones, values)[0] * static.stride[axis]
            axes.append(jnp.round(part).reshape(shape))
        counts.append((axes[0], axes[1]))
    return counts


def _shares(
    static: _Ensemble, tokens: jax.Array, numbers: _Arrays
) -> Iterator[tuple[_Ensemble, _Arrays, jax.Array, jax.Array, jax.Array]]:
    """Yields each view, its value [B, C, H', W'], share [H', W'] and unit [H', W'].

    The mean is the sum of share * value. The unit is the share for a weight of 1.
    """
    pixels = _pixels(static, numbers)
    weights: Any = np.ones(len(pixels))
    factor: Any = 1  # the sum of the weights, times the factor, is a normal number in float32
    if static.weights is not None:
        weights = np.frombuffer(static.weights)
        factor = 1 / (weights.max() or 1)
    elif "weights" in numbers:  # on a GPU, views with invalid weights do not count
        given = numbers["weights"]
        given = jnp.where((given > 0) & jnp.isfinite(given), given, 0)
        weights = jnp.where(given >= given.max() * 2.0**-80, given, 0)
        factor = jnp.minimum(2.0**20 / given.max(), 2.0**100)
    weights = jnp.asarray(weights * factor, tokens.dtype)
    total: Any = sum(w * (y * x) for w, (y, x) in zip(weights, pixels, strict=True))
    total = jnp.where(total > 0, total, jnp.inf)
    for v, (view, offset) in enumerate(_split(static, numbers)):
        y, x = pixels[v]
        part = y * x / total
        value = _aggregate(view, tokens[v : v + 1], offset)[0]
        yield view, offset, value, weights[v] * part, part * factor


def _scaled(share: jax.Array, values: jax.Array) -> jax.Array:
    """share * values; 0 where the share is 0, even if the value is not finite."""
    return jnp.where(share != 0, share * values, 0)


def _median_backward(
    static: _Ensemble, grad: jax.Array, tokens: jax.Array, numbers: _Arrays
) -> jax.Array:
    """[V, B, N, C]. The gradient of a cell goes to the view that is its median.

    That is the counted view whose value is closest to the median; among equally close views, the
    one with the smallest dx. The median kernel also computes the value of a single view, so that
    the two are bitwise equal.
    """
    tokens = jax.lax.stop_gradient(tokens)
    median = _aggregate(static, tokens, numbers)[0]
    columns: Any = numbers.get("offsets")
    if static.offsets is not None:
        columns = np.frombuffer(static.offsets).reshape(-1, 2)
    ranks = jnp.argsort(jnp.argsort(columns[:, 1], stable=True))
    views = _split(static, numbers)
    nearest = jnp.full_like(median, jnp.inf)
    selected = jnp.full(median.shape, len(views), ranks.dtype)
    for v, ((view, offset), (y, x)) in enumerate(zip(views, _pixels(static, numbers), strict=True)):
        value = _aggregate(replace(view, reduce="median"), tokens[v : v + 1], offset)[0]
        distance = jnp.nan_to_num(jnp.abs(value - median), nan=0, posinf=jnp.inf)
        closer = (distance < nearest) | ((distance == nearest) & (ranks[v] < selected))
        closer &= (~jnp.isnan(median) | jnp.isnan(value)) & (y * x > 0)
        nearest = jnp.where(closer, distance, nearest)
        selected = jnp.where(closer, ranks[v], selected)
    grads = [
        _mean_backward(view, jnp.where(selected == rank, grad, 0), offset)
        for (view, offset), rank in zip(views, ranks, strict=True)
    ]
    return jnp.concatenate(grads)


def _moments_backward(
    static: _Ensemble, grad: jax.Array, grad_var: jax.Array, tokens: jax.Array, numbers: _Arrays
) -> jax.Array:
    """[V, B, N, C]. d mean / d value = share; d var / d value = 2 * share * (value - mean)."""
    wide = tokens.astype(_accumulator(tokens.dtype))
    mean = _mean(static, wide, numbers)
    grads = []
    for view, offset, value, share, _ in _shares(static, wide, numbers):
        of_value = _scaled(share, grad + grad_var * (2 * (value - mean)))
        grads.append(_mean_backward(view, of_value, offset).astype(tokens.dtype))
    return jnp.concatenate(grads)


def _weights_backward(
    static: _Ensemble, grads: Sequence[jax.Array], tokens: jax.Array, numbers: _Arrays
) -> jax.Array:
    """[V].

    d mean / d weight = unit * (value - mean); d var / d weight = unit * ((value - mean)^2 - var).
    """
    wide = tokens.astype(_accumulator(tokens.dtype))
    mean = _mean(static, wide, numbers)
    var: Any = 0
    if len(grads) == 2:
        shares = _shares(static, wide, numbers)
        var = sum(_scaled(s, jnp.square(value - mean)) for _, _, value, s, _ in shares)
    sums = []
    for _, _, value, _, unit in _shares(static, wide, numbers):
        distance = value - mean
        terms = grads[0] * distance
        if len(grads) == 2:
            terms += grads[1] * (jnp.square(distance) - var)
        sums.append(_scaled(unit, terms).sum())
    return jnp.stack(sums)


@_differentiable
def _mean_sums(static: _Ensemble, tokens: jax.Array, numbers: _Arrays) -> list[jax.Array]:
    """[sum [B, C, H', W'], count [H', W']]"""
    dtype = _accumulator(tokens.dtype)

    def call(tokens: jax.Array, *rest: jax.Array) -> list[jax.Array]:
        shape = static.field(tokens.shape[1], tokens.shape[3])
        results = [(shape, dtype), (shape[1:3], dtype)]
        mean, count = static.call("mean_weight", (tokens, *rest), results)
        return [jnp.where(count == 0, 0, _channels_first(mean) * count), count]

    dims = (1, *[None] * len(numbers))
    return batched(call, dims, (0, None), tokens, *_values(numbers))


def _mean_sums_forward(static: _Ensemble, tokens: Any, numbers: Any) -> tuple[Any, Any]:
    plain = _plain(numbers, "srt::mean_sums", "offsets", "weights")
    total, count = _mean_sums(static, tokens.value, plain)
    return [total, count], (count, jnp.zeros((), tokens.value.dtype), plain)


def _mean_sums_backward(static: _Ensemble, residuals: Any, grads: Any) -> tuple[Any, Any]:
    count, like, numbers = residuals
    grad = _instantiate(grads)[0] * count  # the gradient of the mean
    return _mean_backward(static, grad, numbers).astype(like.dtype), _zeros(numbers)


_mean_sums.defvjp(_mean_sums_forward, _mean_sums_backward, symbolic_zeros=True)


# ---- the functions -------------------------------------------------------------------------------

# Compiled once for each set of static arguments and shapes, if called outside of a program.
_jit = partial(jax.jit, static_argnums=0)
_run_shift, _run_windows = _jit(_shift), _jit(_windows)
_run_aggregate, _run_mean_sums = _jit(_aggregate), _jit(_mean_sums)


def _constants(**given: Any) -> tuple[dict[str, bytes | None], _Arrays]:
    """Separates constants, as bytes, from arrays of the program."""
    constants = {
        name: value.tobytes() if isinstance(value, np.ndarray) else None
        for name, value in given.items()
    }
    return constants, {name: v for name, v in given.items() if isinstance(v, jax.Array)}


def _checked(
    op: str,
    tokens: Any,
    offsets: Any,
    grid: Any,
    patch: Any,
    weights: Any,
    reduce: str,
    upsample: Any,
    border: Any,
    stride: Any,
) -> tuple[_Ensemble, jax.Array, _Arrays]:
    where = f"srt::{op}"
    tokens = _data(where, "tokens", tokens)
    check_words(where, upsample=upsample, border=border)
    offsets = _numbers(where, "offsets", offsets)
    grid, patch = check_pair(where, "grid", grid), check_pair(where, "patch", patch)
    weights = None if weights is None else _numbers(where, "weights", weights)
    stride = check_pair(where, "stride", stride)
    pairs = (ctypes.c_int64 * 6)(*grid, *patch, *stride)
    arrays = described(tokens, offsets, weights)
    check("ensemble", op, arrays, pairs, reduce, upsample, border)
    constants, numbers = _constants(offsets=offsets, weights=weights)
    reduce = "moments" if op == "ensemble_moments" else reduce
    static = _Ensemble(reduce, grid, patch, stride, upsample, border, **constants)
    tokens, *values = same_axes(tokens, *_values(numbers))
    return static, tokens, dict(zip(sorted(numbers), values, strict=True))


def _empty_field(static: _Ensemble, tokens: jax.Array) -> jax.Array:
    shape = static.field(tokens.shape[1], tokens.shape[3])
    return _channels_first(jnp.zeros(shape, tokens.dtype))


def shift(
    image: jax.Array,
    offsets: Numbers,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
) -> jax.Array:
    """Translates a batch of images by each offset, as :func:`srt_ext.shift`.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8.
        offsets: [V, 2], (dy, dx) in pixels; a constant or a float32 or float64 array.
        padding: as for :func:`srt_ext.shift`.
        interpolation: as for :func:`srt_ext.shift`.

    Returns:
        [V, B, C, H, W] in the dtype of ``image``. Differentiable with respect to ``image`` in
        reverse mode, to any order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> image = jnp.arange(4.0).reshape(1, 1, 1, 4)
        >>> jax.jit(lambda x: shift(x, [(0, 1)], padding="border"))(image)[0, 0, 0, 0]
        Array([0., 0., 1., 2.], dtype=float32)
    """
    where = "srt::shift"
    image = _data(where, "image", image)
    check_words(where, padding=padding, interpolation=interpolation)
    shifts = _numbers(where, "offsets", offsets)
    check("shift", described(image, shifts), padding, interpolation)
    constants, numbers = _constants(offsets=shifts)
    if image.size == 0:
        return jnp.zeros((shifts.shape[0], *image.shape), image.dtype)
    image, *values = same_axes(image, *_values(numbers))
    static = _Shift(padding, interpolation, **constants)
    return cast(jax.Array, _run_shift(static, image, dict(zip(numbers, values, strict=True))))


def windows(
    image: jax.Array,
    centers: Numbers,
    size: Pair,
    scale: Numbers | None = None,
    *,
    padding: Padding = "border",
) -> jax.Array:
    """Samples windows of a batch of images at any positions, as :func:`srt_ext.windows`.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8.
        centers: [B, N, 2], (y, x) in pixels; a constant or a float32 or float64 array.
        size: (Ph, Pw), samples per window.
        scale: pixels between neighbouring samples, [2] or [B, N, 2]; a constant or a float32 or
            float64 array. None means 1.
        padding: as for :func:`srt_ext.windows`.

    Returns:
        [B, N, C, Ph, Pw] in the dtype of ``image``. Differentiable in reverse mode with respect to
        ``image``, ``centers`` and ``scale``; the gradient with respect to ``image`` is
        differentiable again.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> image = jnp.arange(6.0).reshape(1, 1, 1, 6)
        >>> windows(image, jnp.array([[(0.5, 3.25)]]), (1, 2))[0, 0, 0, 0]
        Array([2.25, 3.25], dtype=float32)
    """
    where = "srt::windows"
    image = _data(where, "image", image)
    check_words(where, padding=padding)
    size = check_pair(where, "size", size)
    limit = 2 * MAX_WINDOWS, "must hold at most 2^26 windows"
    places = _numbers(where, "centers", centers, *limit)
    steps = None if scale is None else _numbers(where, "scale", scale, *limit)
    pair = (ctypes.c_int64 * 2)(*size)
    check("windows", described(image, places, steps), pair, padding)
    shape = (*places.shape[:2], image.shape[1], *size)
    if 0 in shape:
        return jnp.zeros(shape, image.dtype)
    constants, numbers = _constants(centers=places, scale=steps)
    scales = "each" if steps is not None and steps.ndim == 3 else "one"
    # The kernels read an image with many channels, such as a field, fastest channels last.
    layout = "channels_last" if image.shape[1] > 4 else "channels_first"
    height, width = image.shape[2:]
    static = _Windows(padding, size, (height, width), layout, scales, **constants)
    image, *values = same_axes(image, *_values(numbers))
    numbers = dict(zip(sorted(numbers), values, strict=True))
    return cast(jax.Array, _run_windows(static, image, numbers))


def ensemble(
    tokens: jax.Array,
    offsets: Numbers,
    grid: Pair,
    patch: Pair,
    weights: Numbers | None = None,
    *,
    reduce: Reduce = "mean",
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
) -> jax.Array:
    """Aggregates the tokens of all views in the frame of the image, as :func:`srt_ext.ensemble`.

    Args:
        tokens: [V, B, N, C], N = h * w tokens in row order; float32, float16, bfloat16 or float64.
        offsets: [V, 2], (dy, dx) in pixels; a constant or a float32 or float64 array.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V], finite and >= 0; a constant or a float32 or float64 array. None means equal
            weights.
        reduce: as for :func:`srt_ext.ensemble`.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Returns:
        [B, C, H / sh, W / sw] in the dtype of ``tokens``; inside a program, channels last in
        memory. Differentiable with respect to ``tokens`` and ``weights`` in reverse mode. The
        gradient of the mean has a kernel. The gradients of the median and of weights are recomputed
        view by view.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> tokens = jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, [(0, 0)], grid=(1, 2), patch=(1, 4))[0, 0, 0]
        Array([0. , 0. , 0.5, 1.5, 2.5, 3.5, 4. , 4. ], dtype=float32)
    """
    check_words("srt::ensemble", reduce=reduce)
    views = (tokens, offsets, grid, patch, weights)
    static, tokens, numbers = _checked("ensemble", *views, reduce, upsample, border, stride)
    if tokens.size == 0:
        return _empty_field(static, tokens)
    return cast(jax.Array, _run_aggregate(static, tokens, numbers)[0])


def ensemble_moments(
    tokens: jax.Array,
    offsets: Numbers,
    grid: Pair,
    patch: Pair,
    weights: Numbers | None = None,
    *,
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
) -> tuple[jax.Array, jax.Array]:
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
        (mean, var), each [B, C, H / sh, W / sw] as the result of :func:`ensemble`. The gradients
        are recomputed view by view.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> tokens = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)  # two views
        >>> mean, var = ensemble_moments(tokens, [(0, 0), (0, 0)], grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    views = (tokens, offsets, grid, patch, weights)
    modes = ("mean", upsample, border, stride)
    static, tokens, numbers = _checked("ensemble_moments", *views, *modes)
    if tokens.size == 0:
        return _empty_field(static, tokens), _empty_field(static, tokens)
    mean, var = _run_aggregate(static, tokens, numbers)
    return mean, var


def mean_sums(
    tokens: jax.Array,
    offsets: Numbers,
    grid: Pair,
    patch: Pair,
    weights: Numbers | None = None,
    *,
    reduce: Literal["mean"] = "mean",
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
) -> tuple[jax.Array, jax.Array]:
    """Computes the sum and the count of a mean, for views that are spread over devices.

    Each device calls this function for its views. The sums of both results over all devices
    (``jax.lax.psum``) yield the mean over all views: ``sum / count``, and 0 where the count is 0.

    Args:
        tokens: [V, B, N, C], the views of this device, as for :func:`ensemble`.
        offsets: [V, 2], (dy, dx) in pixels, as for :func:`ensemble`.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V] or None, as for :func:`ensemble`. Each weight is 0 or between 2^-60 and 2^60.
        reduce: must be ``mean``. A median cannot be combined from parts of the views.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Returns:
        (sum, count): sum [B, C, H / sh, W / sw]; count [H / sh, W / sw], the sum over the views of
        their weight times the number of pixels of the cell that they cover. Both are float32
        (float64 for float64 tokens). The sum is differentiable with respect to ``tokens`` in
        reverse mode.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> tokens = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)  # two views
        >>> total, count = mean_sums(tokens, [(0, 0), (0, 0)], grid=(1, 1), patch=(1, 1))
        >>> total.item(), count.item()
        (4.0, 2.0)
    """
    if reduce != "mean":
        rule = "reduce must be 'mean', because a median cannot be combined from parts of the views"
        raise wrong(ValueError, "srt::mean_sums", rule, repr(reduce))
    views = (tokens, offsets, grid, patch, weights)
    static, tokens, numbers = _checked("mean_sums", *views, reduce, upsample, border, stride)
    if tokens.size == 0:
        ones = jnp.ones((tokens.shape[0], 1, tokens.shape[2], 1), _accumulator(tokens.dtype))
        return _empty_field(static, tokens), _run_mean_sums(static, ones, numbers)[1]
    total, count = _run_mean_sums(static, tokens, numbers)
    return total, count
