"""Derivatives of the ops: reverse and forward mode, vmap, torch.func.

Mean and shift have backward kernels: a ``torch.autograd.Function`` at their Autograd key calls
them. All other derivatives are composed of differentiable ops, one view after the other, so that
their temporaries do not grow with the number of views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_library = torch.library.Library("srt", "FRAGMENT")
_ops = torch.ops.srt

Modes = dict[str, Any]


def _no_derivative(op: str, kind: str) -> NoReturn:
    raise RuntimeError(f"srt::{op} has no {kind}")


def _check_constant(op: str, name: str, given: object) -> None:
    """``given``: whether the gradient of an argument is needed, or its tangent."""
    if given is not None and given is not False:
        _no_derivative(op, f"derivative with respect to {name}: detach them")


# ---- one view after the other --------------------------------------------------------------------


@dataclass(frozen=True)
class _Views:
    """The arguments of an ensemble without its tokens."""

    offsets: torch.Tensor  # [V, 2]
    grid: Sequence[int]
    patch: Sequence[int]
    weights: torch.Tensor | None  # [V]
    modes: Modes  # upsample, border, stride

    def ensemble(self, tokens: torch.Tensor, reduce: str = "mean") -> torch.Tensor:
        """[B, C, H', W'] of tokens [V, B, N, C]."""
        if tokens.stride(-1) != 1:  # of a tangent
            tokens = tokens.contiguous()
        place = (self.offsets, self.grid, self.patch, self.weights)
        field: torch.Tensor = _ops.ensemble(tokens, *place, reduce=reduce, **self.modes)
        return field

    def mean_backward(self, grad: torch.Tensor) -> torch.Tensor:
        """[V, B, N, C] of the gradient [B, C, H', W'] of a mean."""
        place = (self.offsets, self.grid, self.patch, self.weights)
        tokens_grad: torch.Tensor = _ops._mean_backward(grad, *place, **self.modes)
        return tokens_grad

    def split(self) -> list[_Views]:
        """Each view by itself, without its weight."""
        return [replace(self, offsets=offsets, weights=None) for offsets in self.offsets.split(1)]

    def pixels(self, device: torch.device) -> torch.Tensor:
        """[H', W'], float64: the pixels of each cell that count; of a single view.

        The kernels know the rule: with ``zeros`` a mean of ones is the covered part of a cell, with
        ``clamp`` it is 1 unless the offsets are invalid.
        """
        stride = self.modes["stride"]
        sy, sx = (stride, stride) if isinstance(stride, int) else stride
        border = "zeros" if self.modes["border"] == "coverage" else "clamp"
        ones = torch.ones(1, 1, self.grid[0] * self.grid[1], 1, dtype=torch.float64, device=device)
        parts = replace(self, modes={**self.modes, "border": border}).ensemble(ones)
        return (parts[0, 0] * (sy * sx)).round()


def _values(
    views: _Views, tokens: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[_Views, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields each view, its value [B, C, H', W'], share [H', W'] and unit [H', W'], in ``dtype``.

    The mean is the sum of share * value; unit is the share for a weight of 1.
    """
    singles, device = views.split(), tokens.device
    weights = [torch.ones((), dtype=torch.float64)] * len(singles)
    if views.weights is not None:
        weights = list(torch.where(views.weights > 0, views.weights, 0).double().unbind())
    total: Any = 0
    for view, weight in zip(singles, weights, strict=True):
        total = total + weight * view.pixels(device)
    for view, weight, chunk in zip(singles, weights, tokens.split(1), strict=True):
        unit = torch.where(total > 0, view.pixels(device) / torch.where(total > 0, total, 1), 0)
        yield view, view.ensemble(chunk.to(dtype)), (weight * unit).to(dtype), unit.to(dtype)


def _scaled(share: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """share * values, and 0 where the share is, whatever the values are."""
    return torch.where(share != 0, share * values, 0)


def _mean(views: _Views, tokens: torch.Tensor, dtype: torch.dtype) -> Any:
    return sum(_scaled(share, value) for _, value, share, _ in _values(views, tokens, dtype))


def _variance(views: _Views, tokens: torch.Tensor, mean: torch.Tensor) -> Any:
    values = _values(views, tokens, mean.dtype)
    return sum(_scaled(share, (value - mean).square()) for _, value, share, _ in values)


def _median_views(views: _Views, tokens: torch.Tensor) -> Iterator[tuple[_Views, torch.Tensor]]:
    """Yields each view and where it is the median, [B, C, H', W'].

    The median is the value of the nearest view that counts, the first by dx of equally near ones.
    The value of a single view comes from the same kernel as the median: they are equal bit for bit.
    """
    tokens = tokens.detach()
    median = views.ensemble(tokens, "median")
    singles, ranks = views.split(), views.offsets[:, 1].argsort(stable=True).argsort().int()
    nearest = torch.full_like(median, torch.inf)
    selected = torch.full_like(median, len(singles), dtype=torch.int32)
    for view, rank, chunk in zip(singles, ranks, tokens.split(1), strict=True):
        value = view.ensemble(chunk, "median")
        same = (value == median) | (value.isnan() & median.isnan())
        distance = torch.where(same, 0, (value - median).abs().nan_to_num(torch.inf, torch.inf))
        closer = (distance < nearest) | ((distance == nearest) & (rank < selected))
        closer = closer & (view.pixels(tokens.device) > 0)
        nearest = torch.where(closer, distance, nearest)
        selected = torch.where(closer, rank, selected)
    for view, rank in zip(singles, ranks, strict=True):
        yield view, selected == rank


# ---- derivatives composed of other ops -----------------------------------------------------------


def _median_backward(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    **modes: Any,
) -> torch.Tensor:
    """[V, B, N, C]: the gradient of a cell goes to the view that is its median."""
    views = _median_views(_Views(offsets, grid, patch, None, modes), tokens)
    return torch.cat([view.mean_backward(torch.where(here, grad, 0)) for view, here in views])


def _moments_backward(
    grad: torch.Tensor,
    grad_var: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None,
    **modes: Any,
) -> torch.Tensor:
    """[V, B, N, C]: d mean / d value = share, d var / d value = 2 * share * (value - mean)."""
    views = _Views(offsets, grid, patch, weights, modes)
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    mean = _mean(views, tokens, dtype)
    grads = []
    for view, value, share, _ in _values(views, tokens, dtype):
        value_grad = _scaled(share, grad + grad_var * (2 * (value - mean)))
        grads.append(view.mean_backward(value_grad).to(tokens.dtype))
    return torch.cat(grads)


def _weights_backward(
    grad: torch.Tensor,
    grad_var: torch.Tensor | None,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor,
    **modes: Any,
) -> torch.Tensor:
    """[V, B], float64: of the mean and, with ``grad_var``, of the variance.

    d mean / d weight = unit * (value - mean), d var / d weight = unit * ((value - mean)^2 - var).
    """
    views = _Views(offsets, grid, patch, weights, modes)
    mean = _mean(views, tokens, torch.float64)
    var = None if grad_var is None else _variance(views, tokens, mean)
    grads = []
    for _, value, _, unit in _values(views, tokens, torch.float64):
        distance = value - mean
        terms = grad * distance
        if grad_var is not None:
            terms = terms + grad_var * (distance.square() - var)
        grads.append(_scaled(unit, terms).sum((1, 2, 3)))
    return torch.stack(grads)


def _median_tangent(views: _Views, tokens: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """[B, C, H', W']: the tangent of the view that is the median."""
    result = tangent.new_zeros(())
    for (view, here), chunk in zip(_median_views(views, tokens), tangent.split(1), strict=True):
        result = torch.where(here, view.ensemble(chunk), result)
    return result


def _moments_tangents(
    views: _Views,
    tokens: torch.Tensor,
    tokens_tangent: torch.Tensor | None,
    weights_tangent: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C, H', W'] of mean and variance."""
    mean = _mean(views, tokens, torch.float64)
    var = None if weights_tangent is None else _variance(views, tokens, mean)
    mean_tangent, var_tangent = torch.zeros_like(mean), torch.zeros_like(mean)
    for v, (view, value, share, unit) in enumerate(_values(views, tokens, torch.float64)):
        distance = value - mean
        if tokens_tangent is not None:
            change = view.ensemble(tokens_tangent[v : v + 1].double())
            mean_tangent = mean_tangent + _scaled(share, change)
            var_tangent = var_tangent + _scaled(share, 2 * distance * change)
        if weights_tangent is not None:
            unit = weights_tangent[v].double() * unit
            mean_tangent = mean_tangent + _scaled(unit, distance)
            var_tangent = var_tangent + _scaled(unit, distance.square() - var)
    return mean_tangent.to(tokens.dtype), var_tangent.to(tokens.dtype)


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
    name: str  # of the public op, in messages
    batching: _Batching

    @classmethod
    def reads_first(cls, ctx: Any) -> bool:
        """Whether ``gradients`` reads the first argument; the others are always saved."""
        return False

    @classmethod
    def check(cls, given: dict[str, Any]) -> None:
        """Raises for arguments without a derivative: flags or tangents by name."""
        _check_constant(cls.name, "offsets", given["offsets"])

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        """Of the first arguments; those that follow have none."""
        raise NotImplementedError

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        """Of the results."""
        raise NotImplementedError

    @classmethod
    def forward(cls, *args: Any) -> Any:
        """Derivatives are switched off here; the levels below need theirs."""
        *rest, modes = args
        modes = dict(modes)
        reverse, forward = modes.pop(_ENABLED)
        with (
            torch.set_grad_enabled(reverse),
            forward_ad._set_fwd_grad_enabled(forward),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return cls.op(*rest, **modes)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        *args, modes = inputs
        ctx.modes = dict(modes)
        ctx.enabled = ctx.modes.pop(_ENABLED)
        tensors = [a if isinstance(a, torch.Tensor) else None for a in args]
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in args]
        ctx.save_for_forward(*tensors)
        ctx.save_for_backward(tensors[0] if cls.reads_first(ctx) else None, *tensors[1:])

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad
        cls.check(_by_name(cls.op, needs))
        found: tuple[Any, ...] = ()
        if any(grad is not None for grad in grads):
            found = cls.gradients(ctx, _arguments(ctx, ctx.saved_tensors), grads)
        return *found, *([None] * (len(needs) - len(found)))

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        """Forward mode is switched off here; the levels below need theirs."""
        cls.check(_by_name(cls.op, tangents))
        # Without the tangents that are given anyway.
        saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(ctx.enabled[1]):
            return cls.tangents(ctx, _arguments(ctx, saved), tangents)


def _by_name(op: Any, values: Sequence[Any]) -> dict[str, Any]:
    return {a.name: v for a, v in zip(op._schema.arguments, values, strict=False)}


def _arguments(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """Of a node, in the order of the schema."""
    return [o if t is None else t for t, o in zip(saved, ctx.others, strict=True)]


class _Shift(_Function):
    """Linear in the image."""

    op, transpose, name = _ops.shift.default, _ops._shift_backward.default, "shift"
    batching = _Batching((0, None), 1)

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        return (cls.transpose(grads[0], args[1], **ctx.modes),)

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        return cls.op(tangents[0], args[1], **ctx.modes)


class _ShiftBackward(_Shift):
    op, transpose = _ops._shift_backward.default, _ops.shift.default
    batching = _Batching((1, None), 0)


class _Ensemble(_Function):
    op, name = _ops.ensemble.default, "ensemble"
    batching = _Batching((1, None, None, None, None), 0)

    @classmethod
    def reads_first(cls, ctx: Any) -> bool:
        return ctx.modes["reduce"] == "median" or bool(ctx.needs_input_grad[4])

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        tokens, *place = args
        (grad,) = grads
        modes = dict(ctx.modes)
        median = modes.pop("reduce") == "median"
        of_tokens = of_weights = None
        if ctx.needs_input_grad[0] and median:
            of_tokens = _ops._median_backward(grad, tokens, *place[:3], **modes)
        elif ctx.needs_input_grad[0]:
            of_tokens = _Views(*place, modes).mean_backward(grad)
        if ctx.needs_input_grad[4]:
            of_weights = _ops._weights_backward(grad, None, tokens, *place, **modes)
            of_weights = of_weights.sum(1).to(place[3])
        return of_tokens, None, None, None, of_weights

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        tokens, *place = args
        of_tokens, _, _, _, of_weights, _ = tangents
        modes = dict(ctx.modes)
        reduce = modes.pop("reduce")
        views = _Views(*place, modes)
        if reduce == "median":
            return _median_tangent(views, tokens, of_tokens)
        result: Any = 0
        if of_tokens is not None:
            result = views.ensemble(of_tokens)
        if of_weights is not None:
            result = result + _moments_tangents(views, tokens, None, of_weights)[0]
        return result


class _Moments(_Function):
    op, name = _ops.ensemble_moments.default, "ensemble_moments"
    batching = _Batching((1, None, None, None, None), 0)

    @classmethod
    def reads_first(cls, ctx: Any) -> bool:
        return True

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        tokens, *place = args
        given = next(grad for grad in grads if grad is not None)
        both = [torch.zeros_like(given) if grad is None else grad for grad in grads]
        of_tokens = of_weights = None
        if ctx.needs_input_grad[0]:
            of_tokens = _ops._moments_backward(*both, tokens, *place, **ctx.modes)
        if ctx.needs_input_grad[4]:
            of_weights = _ops._weights_backward(*both, tokens, *place, **ctx.modes)
            of_weights = of_weights.sum(1).to(place[3])
        return of_tokens, None, None, None, of_weights

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        tokens, *place = args
        of_tokens, _, _, _, of_weights, _ = tangents
        return _moments_tangents(_Views(*place, ctx.modes), tokens, of_tokens, of_weights)


class _MeanBackward(_Function):
    """Linear in the gradient of the mean."""

    op, name = _ops._mean_backward.default, "ensemble"
    batching = _Batching((0, None, None, None, None), 1)

    @classmethod
    def check(cls, given: dict[str, Any]) -> None:
        if given["weights"] is not None and given["weights"] is not False:
            _no_derivative(cls.name, "second derivative with respect to weights")
        super().check(given)

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        return (cls.views(ctx, args).ensemble(grads[0]),)

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        return cls.views(ctx, args).mean_backward(tangents[0])

    @classmethod
    def views(cls, ctx: Any, args: list[Any]) -> _Views:
        return _Views(*args[1:], ctx.modes)


# ---- registration --------------------------------------------------------------------------------


def _needs_gradient(args: Sequence[Any]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return False


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _implement(op: Any, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False) -> None:
    _library.impl(op.name().removeprefix("srt::"), kernel, key, with_keyset=with_keyset)


def _register(op: Any, derivative: Callable[..., Any], batching: _Batching) -> None:
    """``derivative`` replaces the op where it is differentiated."""

    def kernel(*args: Any, **modes: Any) -> Any:
        if _in_forward_mode() or _needs_gradient(args):
            return derivative(*args, **modes)
        with torch._C._AutoDispatchBelowAutograd():  # without the cost of a node
            return op(*args, **modes)

    def mapped(info: Any, in_dims: Any, *args: Any, **modes: Any) -> Any:
        return batching(partial(op, **modes), info.batch_size, in_dims, args)

    _implement(op, kernel, "Autograd")
    torch.library.register_vmap(op, mapped)


def _register_function(function: type[_Function]) -> None:
    op = function.op
    arguments = op._schema.arguments

    def node(*args: Any, **modes: Any) -> Any:
        # The dispatcher leaves out arguments that equal their defaults.
        missing = [a.default_value for a in arguments if not a.kwarg_only][len(args) :]
        defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
        enabled = (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
        with enable_single_level_autograd_function():
            return function.apply(  # type: ignore[attr-defined]
                *args, *missing, {**defaults, **modes, _ENABLED: enabled}
            )

    _register(op, node, function.batching)


def _register_composite(schema: str, function: Callable[..., torch.Tensor], fake: Any) -> None:
    """An op that torch.compile does not trace: its loop over the views would be unrolled.

    Where it is differentiated it is the ``function``, made of ops that have derivatives.
    """
    name = function.__name__
    batched = {"grad": 0, "grad_var": 0, "tokens": 1}
    _library.define(f"{name}({schema}, *, str upsample, str border, int[2] stride) -> Tensor")
    op = getattr(_ops, name).default
    dims = tuple(batched.get(a.name) for a in op._schema.arguments if not a.kwarg_only)
    _implement(op, function, "CompositeExplicitAutograd")
    _register(op, function, _Batching(dims, 1))
    torch.library.register_fake(f"srt::{name}", fake)


def _register_mutation(op: Any, subject: str) -> None:
    """An op behaves as torch's own functions that write to an argument.

    It has no derivative, increments the version of what it writes (so that a backward that saved
    the old content fails), and resolves lazy negations. ``subject`` names it in messages.
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
        if _needs_gradient(tensors) or (
            _in_forward_mode()
            and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        ):
            raise RuntimeError(
                f"{where}: {subject} is not differentiable; got an argument that requires grad"
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


for _function in (_Shift, _ShiftBackward, _Ensemble, _Moments, _MeanBackward):
    _register_function(_function)
_VIEWS = "Tensor tokens, Tensor offsets, int[2] grid, int[2] patch"
_register_composite(
    f"Tensor grad, {_VIEWS}",
    _median_backward,
    lambda grad, tokens, *_, **modes: grad.new_empty(tokens.shape),
)
_register_composite(
    f"Tensor grad, Tensor grad_var, {_VIEWS}, Tensor? weights",
    _moments_backward,
    lambda grad, grad_var, tokens, *_, **modes: grad.new_empty(tokens.shape),
)
_register_composite(
    f"Tensor grad, Tensor? grad_var, {_VIEWS}, Tensor weights",
    _weights_backward,
    lambda grad, grad_var, tokens, *_, **modes: grad.new_empty(
        tokens.shape[:2], dtype=torch.float64
    ),
)
_register_mutation(_ops.ensemble.out, "out=")
_register_mutation(_ops.accumulate_mean_.default, "the state of a stream")
_register_mutation(_ops.accumulate_moments_.default, "the state of a stream")
_register_mutation(_ops.accumulate_median_.default, "the state of a stream")
