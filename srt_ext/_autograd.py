"""Derivatives of the ops: reverse and forward mode, vmap, torch.func.

Each op has a ``torch.autograd.Function`` at its Autograd key. Gradients are ops themselves, with
kernels of their own, and the linear ones have derivatives again: that of a mean is the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NoReturn

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_library = torch.library.Library("srt", "IMPL")
_ops = torch.ops.srt

Modes = dict[str, Any]


def _no_derivative(op: str, what: str) -> NoReturn:
    raise RuntimeError(f"srt::{op} has no {what}")


def _check_constant(op: str, **given: object) -> None:
    """Raises for those that are asked for: a flag that it is, or a tangent that is there."""
    for name, asked in given.items():
        if asked is not None and asked is not False:
            _no_derivative(op, f"derivative with respect to {name}: detach them")


# ---- what a cell counts --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where tokens belong: what these ops take besides numbers."""

    grid: Sequence[int]
    patch: Sequence[int]
    modes: Modes  # upsample, border, stride

    def counts(
        self, offsets: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counted pixels of each view in each row of cells [V, H'] and column [V, W']; float64."""
        found = []
        offsets = offsets.to(device)
        stride = self.modes["stride"]
        stride = (stride, stride) if isinstance(stride, int) else stride
        valid = (offsets.abs() <= 2**20).all(1)  # on a GPU nobody has looked
        for axis in (0, 1):
            pixels = self.grid[axis] * self.patch[axis]
            at = torch.arange(pixels, device=offsets.device, dtype=torch.float64) + 0.5
            at = at + offsets[:, axis].double()[:, None]
            counted = (at >= 0) & (at < pixels)
            if self.modes["border"] != "coverage":
                counted = torch.ones_like(counted)
            counted = counted & valid[:, None]
            cells = counted.reshape(offsets.shape[0], -1, stride[axis])
            found.append(cells.sum(2, dtype=torch.float64))
        return found[0], found[1]

    def weight(
        self, offsets: torch.Tensor, weights: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """The sum of weight * counted pixels over the views: [H', W'], float64."""
        rows, columns = self.counts(offsets, device)
        if weights is not None:
            rows = rows * torch.where(weights > 0, weights, 0).to(rows)[:, None]
        return rows.T @ columns

    def call(self, op: Any, tokens: torch.Tensor, offsets: torch.Tensor, *weights: Any) -> Any:
        tokens = tokens.contiguous()  # what takes the place of tokens may have any strides
        return op(tokens, offsets, self.grid, self.patch, *weights, **self.modes)

    def gradient(
        self,
        reduce: str,
        grad: torch.Tensor,
        grad_var: torch.Tensor | None,
        tokens: torch.Tensor | None,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        place = (offsets, self.grid, self.patch, weights)
        modes = {"reduce": reduce, **self.modes}
        tensor: torch.Tensor = _ops._ensemble_backward(grad, grad_var, tokens, *place, **modes)
        return tensor


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, and 0 where b is."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _doubles(*tensors: torch.Tensor | None) -> list[Any]:
    """What subtracts large sums from each other does so in float64, and from the start."""
    return [None if t is None else t.double() for t in tensors]


def _moments(
    place: _Place, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = place.call(_ops.ensemble_moments.default, tokens, offsets, weights)
    return mean, var


def _weights_gradient(
    place: _Place,
    grad: torch.Tensor,
    grad_var: torch.Tensor | None,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """[V]. With f_v the value and c_v the counted pixels of a view in a cell, and W their weight:

    d mean / d w_v = c_v (f_v - mean) / W and d var / d w_v = c_v ((f_v - mean)^2 - var) / W.
    The sums over cells of what has an f_v are products of tokens with gradients: these are taken
    for equal weights, since they must not vanish where w_v does.
    """
    grad, grad_var, tokens = _doubles(grad, grad_var, tokens)
    device = tokens.device
    total, plain = place.weight(offsets, weights, device), place.weight(offsets, None, device)
    equal = _divide(plain, total)  # equal weights are then divided by W
    if grad_var is None:
        mean = place.call(_ops.ensemble.default, tokens, offsets, weights)
        part, constant = grad, grad * mean
    else:
        mean, var = _moments(place, tokens, offsets, weights)
        part = grad - grad_var * mean
        constant = grad * mean + grad_var * (var - mean * mean)
    by_view = _product(tokens, place.gradient("mean", part * equal, None, None, offsets, None))
    if grad_var is not None:
        scaled = grad_var * equal
        counted = (weights > 0).to(device)[:, None, None, None]
        # What nobody counts stays away from the others.
        for some in (counted, ~counted):
            those = torch.where(some, tokens, 0)
            centre = place.call(_ops.ensemble.default, those, offsets)
            grad_mean = 2 * scaled * (centre - mean)
            squares = place.gradient("moments", grad_mean, scaled, those, offsets, None)
            by_view = by_view + _product(those, torch.where(some, squares, 0)) / 2
    rows, columns = place.counts(offsets, device)
    of_constant = ((rows @ _divide(constant.sum((0, 1)), total)) * columns).sum(1)
    return (by_view.sum((1, 2, 3)) - of_constant).to(weights)


def _product(tokens: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Of each token with its gradient, which is 0 where no cell reads it, whatever it is."""
    return torch.where(gradient != 0, tokens * gradient, 0)


def _weights_tangent(
    place: _Place,
    with_variance: bool,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    tangent: torch.Tensor,
) -> list[torch.Tensor]:
    """Of the mean, and the variance, for a change of the weights.

    What views of positive change say, in proportion, less what the others do.
    """
    (tokens,) = _doubles(tokens)

    def moments(weights: torch.Tensor) -> Sequence[torch.Tensor]:
        if with_variance:
            return _moments(place, tokens, offsets, weights)
        return [place.call(_ops.ensemble.default, tokens, offsets, weights)]

    mean, *var = moments(weights)
    total = place.weight(offsets, weights, tokens.device)
    changes = [torch.zeros_like(mean) for _ in (mean, *var)]
    for sign in (1, -1):
        part = (sign * tangent).clamp(min=0)
        part = torch.where(part >= part.max() * 2.0**-80, part, 0)  # smaller ones are refused
        share = _divide(sign * place.weight(offsets, part, tokens.device), total)
        of_part, *var_of_part = moments(part)
        apart = of_part - mean
        changes[0] = changes[0] + share * apart
        if with_variance:
            changes[1] = changes[1] + share * (var_of_part[0] - var[0] + apart * apart)
    return changes


def _variance_tangent(
    place: _Place,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    tangent: torch.Tensor,
) -> torch.Tensor:
    """A variance is quadratic: its derivative is a difference, of steps that need not be small.

    They are as large as the tokens, so that neither is lost beside the other.
    """
    tokens, tangent = _doubles(tokens, tangent)

    def largest(values: torch.Tensor) -> torch.Tensor:
        finite = torch.where(values.isfinite(), values.abs(), 0)
        return finite.amax() if finite.numel() else finite.sum()

    size = largest(tokens) / largest(tangent)
    size = torch.where((size > 2.0**-500) & (size < 2.0**500), size, 1)
    ahead, behind = (
        _moments(place, tokens + step * tangent, offsets, weights)[1] for step in (size, -size)
    )
    return (ahead - behind) / (2 * size)


def _selected(
    place: _Place, tokens: torch.Tensor, offsets: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """The value of ``others``, as of ``tokens`` [V, B, N, C], in the view that is the median.

    One view after the other: what forward mode, and derivatives of gradients, need.
    """
    args = (tokens, offsets, place.grid, place.patch)
    median = _ops.ensemble(*args, reduce="median", **place.modes)
    rows, columns = place.counts(offsets, tokens.device)
    nearest = torch.full_like(median, torch.inf)
    found = torch.zeros_like(median)
    # Of views that are alike the first by dx is taken: so the gradient does.
    for view in offsets[:, 1].argsort(stable=True).split(1):
        on = view.to(tokens.device)

        def of_view(tokens: torch.Tensor, view: torch.Tensor = view, on: Any = on) -> torch.Tensor:
            field: torch.Tensor = place.call(
                _ops.ensemble.default, tokens.index_select(0, on), offsets.index_select(0, view)
            )
            return field

        value = of_view(tokens)
        distance = torch.where(value == median, 0, (value - median).abs())
        distance = torch.where(value.isnan() & median.isnan(), 0, distance)
        counted = rows.index_select(0, on).T * columns.index_select(0, on) > 0
        closer = (distance < nearest) & counted
        nearest = torch.where(closer, distance, nearest)
        found = torch.where(closer, of_view(others), found)
    return found


# ---- vmap ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batching:
    """How an op is mapped: the new dimension becomes part of its batch B.

    ``dims``: where B lies in each argument, None in one that has none; ``out``: in the results.
    Where an argument without B is mapped, one call follows the other.
    """

    dims: tuple[int | None, ...]
    out: int

    def __call__(
        self, call: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]
    ) -> tuple[Any, Any]:
        mapped = [
            d if isinstance(a, torch.Tensor) else None for a, d in zip(args, in_dims, strict=True)
        ]
        arguments = list(zip(args, mapped, self.dims, strict=False))
        if any(dim is not None and b is None for _, dim, b in arguments):
            calls = [
                call(*(a if d is None else a.select(d, i) for a, d, _ in arguments))
                for i in range(size)
            ]
            if isinstance(calls[0], torch.Tensor):
                return torch.stack(calls), 0
            return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

        batches = []

        def fold(tensor: Any, dim: int | None, b: int | None) -> Any:
            if tensor is None or b is None:
                return tensor
            if dim is None:
                tensor = tensor.unsqueeze(b).expand(*tensor.shape[:b], size, *tensor.shape[b:])
            else:
                tensor = tensor.movedim(dim, b)
            batches.append(tensor.shape[b + 1])
            return tensor.reshape(
                *tensor.shape[:b], size * tensor.shape[b + 1], *tensor.shape[b + 2 :]
            )

        result = call(*(fold(*a) for a in arguments))

        def unfold(tensor: torch.Tensor) -> torch.Tensor:
            shape = tensor.shape
            return tensor.reshape(*shape[: self.out], size, batches[0], *shape[self.out + 1 :])

        if isinstance(result, torch.Tensor):
            return unfold(result), self.out
        return tuple(map(unfold, result)), (self.out,) * len(result)


# ---- the ops -------------------------------------------------------------------------------------


_ENABLED = "enabled"  # beside the modes of a node: reverse and forward mode, where it was made


class _Function(torch.autograd.function._SingleLevelFunction):
    """A node of ``op``; the modes come last, as one dict, and every argument is there.

    Of a single level: torch.func has chosen one before a kernel at the Autograd key runs, and goes
    on to the next below it. ``torch.autograd.Function`` would begin with the first level again.
    (Tried with torch 2.10, 2.13 and 2.15; to be replaced once torch.library has a public way that
    keeps forward mode.)
    """

    op: Any
    batching: _Batching

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Without derivatives, of this level."""
        *rest, modes = args
        with torch._C._AutoDispatchBelowAutograd():
            return cls.op(*rest, **modes)

    @classmethod
    def run_in_node(cls, *args: Any) -> Any:
        """The same in ``forward``, which switches derivatives off, for the levels below too."""
        *rest, modes = args
        reverse, forward = modes[_ENABLED]
        with torch.set_grad_enabled(reverse), forward_ad._set_fwd_grad_enabled(forward):
            return cls.run(*rest, _plain(modes))


def _plain(modes: Modes) -> Modes:
    return {name: value for name, value in modes.items() if name != _ENABLED}


def _saved(ctx: Any) -> list[Any]:
    """For a ``jvp``: the tensors that were saved, without the tangents that it gets anyway."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]


def _in_forward_mode(jvp: Callable[..., Any]) -> Any:
    """A ``jvp`` is called with forward mode switched off: the levels below would lose theirs."""

    @wraps(jvp)
    def switched(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(ctx.enabled[1]):
            return jvp(ctx, *tangents)

    return switched


class _Shift(_Function):
    op = _ops.shift.default
    batching = _Batching((0, None), 1)

    @staticmethod
    def forward(image: Any, offsets: Any, modes: Modes) -> Any:
        return _Shift.run_in_node(image, offsets, modes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        _, offsets, modes = inputs
        ctx.enabled, ctx.modes = modes[_ENABLED], _plain(modes)
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _check_constant("shift", offsets=ctx.needs_input_grad[1])
        if grads[0] is None:
            return None, None, None
        return _ops._shift_backward(grads[0], ctx.saved_tensors[0], **ctx.modes), None, None

    @staticmethod
    @_in_forward_mode
    def jvp(ctx: Any, *tangents: Any) -> Any:
        image, offsets, _ = tangents
        _check_constant("shift", offsets=offsets)
        return _ops.shift(image, _saved(ctx)[0], **ctx.modes)


class _ShiftBackward(_Function):
    op = _ops._shift_backward.default
    batching = _Batching((1, None), 0)

    @staticmethod
    def forward(grad: Any, offsets: Any, modes: Modes) -> Any:
        return _ShiftBackward.run_in_node(grad, offsets, modes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        _, offsets, modes = inputs
        ctx.enabled, ctx.modes = modes[_ENABLED], _plain(modes)
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _check_constant("shift", offsets=ctx.needs_input_grad[1])
        if grads[0] is None:
            return None, None, None
        return _ops.shift(grads[0], ctx.saved_tensors[0], **ctx.modes), None, None

    @staticmethod
    @_in_forward_mode
    def jvp(ctx: Any, *tangents: Any) -> Any:
        grad, offsets, _ = tangents
        _check_constant("shift", offsets=offsets)
        return _ops._shift_backward(grad, _saved(ctx)[0], **ctx.modes)


class _Ensemble(_Function):
    op = _ops.ensemble.default
    batching = _Batching((1, None, None, None, None), 0)

    @staticmethod
    def forward(
        tokens: Any, offsets: Any, grid: Any, patch: Any, weights: Any, modes: Modes
    ) -> Any:
        return _Ensemble.run_in_node(tokens, offsets, grid, patch, weights, modes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        tokens, offsets, grid, patch, weights, modes = inputs
        ctx.enabled, modes = modes[_ENABLED], _plain(modes)
        ctx.reduce = modes.pop("reduce")
        ctx.place = _Place(grid, patch, modes)
        # A mean is linear: only the derivatives with respect to weights read more than the offsets.
        reverse = ctx.reduce == "median" or ctx.needs_input_grad[4]
        forward = ctx.reduce == "median" or (weights is not None and ctx.enabled[1])
        ctx.save_for_backward(offsets, weights, tokens if reverse else None)
        ctx.save_for_forward(offsets, weights, tokens if forward else None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_tokens, of_offsets, _, _, of_weights, _ = ctx.needs_input_grad
        _check_constant("ensemble", offsets=of_offsets)
        offsets, weights, tokens = ctx.saved_tensors
        grad, place = grads[0], ctx.place
        result: list[Any] = [None] * 6
        if grad is None:
            return tuple(result)
        if of_tokens:
            given = tokens if ctx.reduce == "median" else None
            result[0] = place.gradient(ctx.reduce, grad, None, given, offsets, weights)
        if of_weights:
            result[4] = _weights_gradient(place, grad, None, tokens, offsets, weights)
        return tuple(result)

    @staticmethod
    @_in_forward_mode
    def jvp(ctx: Any, *tangents: Any) -> Any:
        of_tokens, of_offsets, _, _, of_weights, _ = tangents
        _check_constant("ensemble", offsets=of_offsets)
        offsets, weights, tokens = _saved(ctx)
        place = ctx.place
        if ctx.reduce == "median":
            return _selected(place, tokens, offsets, of_tokens)
        result: Any = 0
        if of_tokens is not None:
            result = place.call(_ops.ensemble.default, of_tokens, offsets, weights)
        if of_weights is not None:
            (change,) = _weights_tangent(place, False, tokens, offsets, weights, of_weights)
            result = result + change.to(tokens.dtype)
        return result


class _Moments(_Function):
    op = _ops.ensemble_moments.default
    batching = _Batching((1, None, None, None, None), 0)

    @staticmethod
    def forward(
        tokens: Any, offsets: Any, grid: Any, patch: Any, weights: Any, modes: Modes
    ) -> Any:
        return _Moments.run_in_node(tokens, offsets, grid, patch, weights, modes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        tokens, offsets, grid, patch, weights, modes = inputs
        ctx.enabled, ctx.place = modes[_ENABLED], _Place(grid, patch, _plain(modes))
        ctx.save_for_backward(tokens, offsets, weights)
        ctx.save_for_forward(tokens, offsets, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_tokens, of_offsets, _, _, of_weights, _ = ctx.needs_input_grad
        _check_constant("ensemble_moments", offsets=of_offsets)
        tokens, offsets, weights = ctx.saved_tensors
        result: list[Any] = [None] * 6
        given = [grad for grad in grads if grad is not None]
        if not given:
            return tuple(result)
        grad, grad_var = (torch.zeros_like(given[0]) if g is None else g for g in grads)
        if of_tokens:
            result[0] = ctx.place.gradient("moments", grad, grad_var, tokens, offsets, weights)
        if of_weights:
            result[4] = _weights_gradient(ctx.place, grad, grad_var, tokens, offsets, weights)
        return tuple(result)

    @staticmethod
    @_in_forward_mode
    def jvp(ctx: Any, *tangents: Any) -> Any:
        of_tokens, of_offsets, _, _, of_weights, _ = tangents
        _check_constant("ensemble_moments", offsets=of_offsets)
        tokens, offsets, weights = _saved(ctx)
        place = ctx.place
        changes: list[Any] = [0, 0]
        if of_tokens is not None:
            changes[0] = place.call(_ops.ensemble.default, of_tokens, offsets, weights)
            changes[1] = _variance_tangent(place, tokens, offsets, weights, of_tokens)
        if of_weights is not None:
            more = _weights_tangent(place, True, tokens, offsets, weights, of_weights)
            changes = [a + b for a, b in zip(changes, more, strict=True)]
        return tuple(change.to(tokens.dtype) for change in changes)


class _EnsembleBackward(_Function):
    op = _ops._ensemble_backward.default
    batching = _Batching((0, 0, 1, None, None, None, None), 1)

    @staticmethod
    def forward(
        grad: Any,
        grad_var: Any,
        tokens: Any,
        offsets: Any,
        grid: Any,
        patch: Any,
        weights: Any,
        modes: Modes,
    ) -> Any:
        return _EnsembleBackward.run_in_node(
            grad, grad_var, tokens, offsets, grid, patch, weights, modes
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        _, _, tokens, offsets, grid, patch, weights, modes = inputs
        ctx.enabled, modes = modes[_ENABLED], _plain(modes)
        ctx.reduce = modes.pop("reduce")
        ctx.place = _Place(grid, patch, modes)
        ctx.save_for_backward(tokens, offsets, weights)
        ctx.save_for_forward(tokens, offsets, weights)

    @staticmethod
    def linear(ctx: Any, change: torch.Tensor) -> torch.Tensor:
        """What the gradient of the tokens is the transpose of."""
        tokens, offsets, weights = ctx.saved_tensors
        place = ctx.place
        field: torch.Tensor
        if ctx.reduce == "mean":
            field = place.call(_ops.ensemble.default, change, offsets, weights)
            return field
        return _selected(place, tokens, offsets, change)

    @staticmethod
    def check(ctx: Any, offsets: Any, weights: Any) -> None:
        name = "ensemble" if ctx.reduce != "moments" else "ensemble_moments"
        if ctx.reduce == "moments":
            _no_derivative(name, "second derivative")
        if weights is not None and weights is not False:
            _no_derivative(name, "second derivative with respect to weights")
        _check_constant(name, offsets=offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_grad, _, _, of_offsets, _, _, of_weights, _ = ctx.needs_input_grad
        _EnsembleBackward.check(ctx, of_offsets, of_weights)
        field = None
        if of_grad and grads[0] is not None:
            field = _EnsembleBackward.linear(ctx, grads[0])
        return field, *([None] * 7)  # which view is the median changes nowhere but in jumps

    @staticmethod
    @_in_forward_mode
    def jvp(ctx: Any, *tangents: Any) -> Any:
        grad, _, _, offsets, _, _, weights, _ = tangents
        _EnsembleBackward.check(ctx, offsets, weights)
        tokens, offsets, weights = _saved(ctx)
        if grad is None:  # a change of the tokens of a median
            return torch.zeros_like(tokens)
        return ctx.place.gradient(ctx.reduce, grad, None, tokens, offsets, weights)


def _in_reverse(args: Sequence[Any]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return False


def _in_forward() -> bool:
    return forward_ad._current_level >= 0


def _node(function: type[_Function], *args: Any) -> Any:
    *rest, modes = args
    enabled = (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
    with enable_single_level_autograd_function():
        return function.apply(*rest, {**modes, _ENABLED: enabled})  # type: ignore[attr-defined]


# The arguments of a node from those of an op, as the schema has them.
def _of_shift(
    image: Any, offsets: Any, *, padding: str = "reflect", interpolation: str = "bilinear"
) -> Any:
    return image, offsets, {"padding": padding, "interpolation": interpolation}


def _of_ensemble(
    tokens: Any,
    offsets: Any,
    grid: Any,
    patch: Any,
    weights: Any = None,
    *,
    reduce: str = "mean",
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Any = (1, 1),
) -> Any:
    modes = {"reduce": reduce, "upsample": upsample, "border": border, "stride": stride}
    return tokens, offsets, grid, patch, weights, modes


def _of_moments(
    tokens: Any,
    offsets: Any,
    grid: Any,
    patch: Any,
    weights: Any = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Any = (1, 1),
) -> Any:
    modes = {"upsample": upsample, "border": border, "stride": stride}
    return tokens, offsets, grid, patch, weights, modes


def _of_gradient(*args: Any, **modes: Any) -> Any:
    return *args, modes


# ---- registration --------------------------------------------------------------------------------


def _implement(op: Any, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False) -> None:
    _library.impl(op.name().removeprefix("srt::"), kernel, key, with_keyset=with_keyset)


def _returning(function: type[_Function], arguments: Callable[..., Any]) -> None:
    op, below = function.op, torch._C._AutoDispatchBelowAutograd

    def kernel(*args: Any, **modes: Any) -> Any:
        if _in_forward() or _in_reverse(args):
            return _node(function, *arguments(*args, **modes))
        with below():  # without the price of a node
            return op(*args, **modes)

    _implement(op, kernel, "Autograd")

    def mapped(info: Any, in_dims: Any, *args: Any, **modes: Any) -> Any:
        return function.batching(partial(function.op, **modes), info.batch_size, in_dims, args)

    torch.library.register_vmap(function.op, mapped)


def _writing(op: Any, what: str) -> None:
    """Behaves as torch's own functions that write to an argument.

    No derivative, a new version of what is written (so that a backward that saved the old content
    fails), no lazy negation of the memory that is written. ``what`` names it in messages.
    """
    where = op.name().split(".")[0]
    arguments = op._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    names = [a.name for a in arguments if not a.kwarg_only]

    def targets(args: tuple[Any, ...], modes: dict[str, Any]) -> dict[str, torch.Tensor]:
        values = {**dict(zip(names, args, strict=False)), **modes}
        return {name: values[name] for name in written}

    def autograd(*args: Any, **modes: Any) -> None:
        tensors = [a for a in (*args, *modes.values()) if isinstance(a, torch.Tensor)]
        if _in_reverse(tensors) or (
            _in_forward() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        ):
            raise RuntimeError(
                f"{where}: {what} is not differentiable; got an argument that requires grad"
            )
        with torch._C._AutoDispatchBelowAutograd():
            op(*args, **modes)

    def version(keys: Any, *args: Any, **modes: Any) -> None:
        for name, tensor in targets(args, modes).items():
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{where}: {name} must be no inference tensor outside inference mode"
                )
            torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **modes)

    def negative(*args: Any, **modes: Any) -> None:
        for name, tensor in targets(args, modes).items():
            if tensor.is_neg() or tensor.is_conj():
                raise RuntimeError(
                    f"{where}: {name} must be no lazily negated or conjugated view; got one"
                )
        plain = [a.resolve_neg().resolve_conj() if isinstance(a, torch.Tensor) else a for a in args]
        op(*plain, **modes)

    _implement(op, autograd, "Autograd")
    _implement(op, version, "ADInplaceOrView", with_keyset=True)
    _implement(op, negative, "Negative")
    _implement(op, negative, "Conjugate")


_returning(_Shift, _of_shift)
_returning(_Ensemble, _of_ensemble)
_returning(_Moments, _of_moments)
_returning(_ShiftBackward, _of_gradient)
_returning(_EnsembleBackward, _of_gradient)
_writing(_ops.ensemble.out, "out=")
_writing(_ops.accumulate_mean_.default, "the state of a stream")
_writing(_ops.accumulate_moments_.default, "the state of a stream")
_writing(_ops.accumulate_median_.default, "the state of a stream")
