"""Derivatives of the ops: reverse and forward mode, vmap, torch.func.

Mean, shift and windows have backward kernels, which a ``torch.autograd.Function`` at their Autograd
key calls. All other derivatives are composed of differentiable ops. They process one view after the
other, so that the size of their temporaries does not depend on the number of views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from ._validation import check_tensor

_library = torch.library.Library("srt", "FRAGMENT")
_ops = torch.ops.srt


# ---- one view after the other --------------------------------------------------------------------


@dataclass(frozen=True)
class _Views:
    """The arguments of an ensemble without its tokens."""

    modes: dict[str, Any]  # upsample, border, stride
    offsets: torch.Tensor  # [V, 2]
    grid: Sequence[int]
    patch: Sequence[int]
    weights: torch.Tensor | None  # [V]

    def ensemble(self, tokens: torch.Tensor, reduce: str = "mean") -> torch.Tensor:
        """Maps tokens [V, B, N, C] to a field [B, C, H', W']."""
        if tokens.stride(-1) != 1:  # possible for a tangent
            tokens = tokens.contiguous()
        field: torch.Tensor = _ops.ensemble(
            tokens, self.offsets, self.grid, self.patch, self.weights, reduce=reduce, **self.modes
        )
        return field

    def mean_backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Maps the gradient [B, C, H', W'] of a mean to [V, B, N, C]."""
        place = (self.offsets, self.grid, self.patch, self.weights)
        tokens_grad: torch.Tensor = _ops._mean_backward(grad, *place, **self.modes)
        return tokens_grad

    def split(self) -> list[_Views]:
        """Returns each view separately, without its weight."""
        return [replace(self, offsets=offsets, weights=None) for offsets in self.offsets.split(1)]

    def pixels(self, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[H', 1] and [W'] of each view, float64. Their product counts the pixels of each cell.

        The counts come from the kernels, which apply the border rule: the mean of a view of ones is
        1, and with ``zeros`` it is the covered fraction of the cell.
        """
        border = "zeros" if self.modes["border"] == "coverage" else "clamp"
        axes = []
        for axis, shape in enumerate(((-1, 1), (-1,))):
            sizes = (self.grid, self.patch, self.modes["stride"])
            grid, patch, stride = ([n[0], 1] if axis == 0 else [1, n[1]] for n in sizes)
            ones = torch.ones(1, 1, grid[axis], 1, dtype=torch.float64, device=device)
            own = torch.arange(2, device=self.offsets.device) == axis
            parts = [
                _ops.ensemble(ones, offsets, grid, patch, border=border, stride=stride)
                for offsets in torch.where(own, self.offsets, 0).split(1)
            ]
            axes.append([(part * stride[axis]).round().reshape(shape) for part in parts])
        return list(zip(*axes, strict=True))


def _values(
    views: _Views, tokens: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[_Views, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields each view, its value [B, C, H', W'], share [H', W'] and unit [H', W'] in ``dtype``.

    The mean is the sum of share * value. The unit is the share for a weight of 1.
    """
    pixels = views.pixels(tokens.device)
    weights = [torch.ones((), dtype=torch.float64, device="cpu")] * len(pixels)
    if views.weights is not None:  # views with invalid CUDA weights do not count
        given = torch.where((views.weights > 0) & views.weights.isfinite(), views.weights, 0)
        given = given.double()
        weights = list(torch.where(given >= given.amax() * 2.0**-80, given, 0).unbind())
    total: Any = sum(w * (y * x) for w, (y, x) in zip(weights, pixels, strict=True))
    total = torch.where(total > 0, total, torch.inf)
    for view, w, (y, x), chunk in zip(views.split(), weights, pixels, tokens.split(1), strict=True):
        unit = y * x / total
        yield view, view.ensemble(chunk.to(dtype)), (w * unit).to(dtype), unit.to(dtype)


def _scaled(share: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """share * values; 0 where the share is 0, even if the value is not finite."""
    return torch.where(share != 0, share * values, 0)


def _mean(views: _Views, tokens: torch.Tensor, dtype: torch.dtype) -> Any:
    if tokens.dtype == dtype:
        return views.ensemble(tokens)
    return sum(_scaled(share, value) for _, value, share, _ in _values(views, tokens, dtype))


def _variance(views: _Views, tokens: torch.Tensor, mean: torch.Tensor) -> Any:
    values = _values(views, tokens, mean.dtype)
    return sum(_scaled(share, (value - mean).square()) for _, value, share, _ in values)


def _median_views(views: _Views, tokens: torch.Tensor) -> Iterator[tuple[_Views, torch.Tensor]]:
    """Yields each view and the mask [B, C, H', W'] of the cells in which it is the median.

    The selected view is the counted view whose value is closest to the median; among equally close
    views, the one with the smallest dx. The median kernel also computes the value of a single view,
    so that the two are bitwise equal.
    """
    tokens = tokens.detach()
    median = views.ensemble(tokens, "median")
    singles, ranks = views.split(), views.offsets[:, 1].argsort(stable=True).argsort().int()
    numbers = ~median.isnan()  # a NaN median selects a view with a NaN value
    nearest = torch.full_like(median, torch.inf)
    selected = torch.full_like(median, len(singles), dtype=torch.int32)
    each = zip(singles, ranks, views.pixels(tokens.device), tokens.split(1), strict=True)
    for view, rank, (y, x), chunk in each:
        rank = selected.new_zeros(()) + rank  # a CPU scalar: no synchronisation
        value = view.ensemble(chunk, "median")
        distance = (value - median).abs().nan_to_num(0, posinf=torch.inf)  # equal infinities: 0
        closer = (distance < nearest) | ((distance == nearest) & (rank < selected))
        closer = closer & (numbers | value.isnan()) & (y * x > 0)
        nearest = torch.where(closer, distance, nearest)
        selected = torch.where(closer, rank, selected)
    for view, rank in zip(singles, ranks, strict=True):
        yield view, selected == rank


# ---- derivatives composed of other ops -----------------------------------------------------------

# Arguments of the backward functions: the gradient of the mean or median, the gradient of the
# variance or None, tokens, and ``place``: offsets, grid, patch, weights or None.


def _median_backward(
    grad: torch.Tensor, grad_var: None, tokens: torch.Tensor, *place: Any, **modes: Any
) -> torch.Tensor:
    """[V, B, N, C]. The gradient of a cell goes to the view that is its median."""
    views = _median_views(_Views(modes, *place), tokens)
    return torch.cat([view.mean_backward(torch.where(here, grad, 0)) for view, here in views])


def _moments_backward(
    grad: torch.Tensor, grad_var: torch.Tensor, tokens: torch.Tensor, *place: Any, **modes: Any
) -> torch.Tensor:
    """[V, B, N, C]. d mean / d value = share; d var / d value = 2 * share * (value - mean)."""
    views = _Views(modes, *place)
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    mean = _mean(views, tokens, dtype)
    grads = []
    for view, value, share, _ in _values(views, tokens, dtype):
        value_grad = _scaled(share, grad + grad_var * (2 * (value - mean)))
        grads.append(view.mean_backward(value_grad).to(tokens.dtype))
    return torch.cat(grads)


def _weights_backward(
    grad: torch.Tensor, grad_var: Any, tokens: torch.Tensor, *place: Any, **modes: Any
) -> torch.Tensor:
    """[V, B, C], float64. The sum over B and C is the gradient of the weights.

    d mean / d weight = unit * (value - mean); d var / d weight = unit * ((value - mean)^2 - var).
    """
    views = _Views(modes, *place)
    mean = _mean(views, tokens, torch.float64)
    var = None if grad_var is None else _variance(views, tokens, mean)
    grads = []
    for _, value, _, unit in _values(views, tokens, torch.float64):
        distance = value - mean
        terms = grad * distance
        if grad_var is not None:
            terms = terms + grad_var * (distance.square() - var)
        grads.append(_scaled(unit, terms).sum((2, 3)))
    return torch.stack(grads)


def _median_tangent(views: _Views, tokens: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """[B, C, H', W']. The tangent of the view that is the median."""
    result = tangent.new_zeros(())
    for (view, here), chunk in zip(_median_views(views, tokens), tangent.split(1), strict=True):
        result = torch.where(here, view.ensemble(chunk), result)
    return result


def _moments_tangents(
    views: _Views, tokens: torch.Tensor, tokens_tangent: Any, weights_tangent: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents [B, C, H', W'] of mean and variance."""
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
    """The vmap rule of an op: the mapped dimension is folded into its batch B.

    ``dims``: the dimension of B in each argument, or None; ``out``: the dimension of B in the
    results. If an argument without B is mapped, the op is called in a loop.
    """

    dims: tuple[int | None, ...]
    out: int

    def __call__(
        self, call: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]
    ) -> tuple[Any, Any]:
        arguments = [
            (a, d if isinstance(a, torch.Tensor) else None, b)
            for a, d, b in zip(args, in_dims, self.dims, strict=False)
        ]
        if any(dim is not None and b is None for _, dim, b in arguments):
            calls = [
                call(*(a if d is None else a.select(d, i) for a, d, _ in arguments))
                for i in range(size)
            ]
            return tree_map(lambda *results: torch.stack(results), *calls), 0

        batch = 0

        def fold(tensor: Any, dim: int | None, b: int | None) -> Any:
            nonlocal batch
            if tensor is None or b is None:
                return tensor
            if dim is None:
                tensor = tensor.unsqueeze(b).expand(*tensor.shape[:b], size, *tensor.shape[b:])
            else:
                tensor = tensor.movedim(dim, b)
            batch = tensor.shape[b + 1]
            return tensor.flatten(b, b + 1)

        result = call(*(fold(*a) for a in arguments))
        return tree_map(lambda tensor: tensor.unflatten(self.out, (size, batch)), result), self.out


# ---- the ops -------------------------------------------------------------------------------------


_ENABLED = "enabled"  # key in the modes of a node: whether reverse and forward mode were enabled


class _Function(torch.autograd.function._SingleLevelFunction):
    """The autograd node of ``op``. All arguments are passed; the modes are the last one, a dict.

    The function handles a single level: torch.func chooses the level before a kernel at the
    Autograd key runs and continues with the next level below it. ``torch.autograd.Function`` would
    start at the first level again. Tested with torch 2.10, 2.13 and 2.15. Replace this class once
    torch.library has a public API that supports forward mode.
    """

    op: Any
    name: str  # the public op's name in messages
    constant: ClassVar = {"offsets": "derivative with respect to offsets; detach them"}
    batching: _Batching
    gradients: Any  # (ctx, arguments, gradients of the results) -> gradients of the first arguments
    tangents: Any  # (ctx, arguments, their tangents) -> tangents of the results

    @classmethod
    def reads_first(cls, ctx: Any) -> bool:
        """Whether ``gradients`` reads the first argument. The others are always saved."""
        return False

    @classmethod
    def check(cls, values: Sequence[Any]) -> None:
        """``values``: for each argument, whether it needs a gradient, or its tangent."""
        for argument, value in zip(cls.op._schema.arguments, values, strict=False):
            if argument.name in cls.constant and value is not None and value is not False:
                raise RuntimeError(f"srt::{cls.name} has no {cls.constant[argument.name]}")

    @classmethod
    def forward(cls, *args: Any) -> Any:
        """Restores the gradient modes, which torch disables here but lower levels need."""
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
        cls.check(needs)
        found: tuple[Any, ...] = ()
        if any(grad is not None for grad in grads):
            found = cls.gradients(ctx, _arguments(ctx, ctx.saved_tensors), grads)
        return *found, *([None] * (len(needs) - len(found)))

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        """Restores forward mode, which torch disables here but lower levels need."""
        cls.check(tangents)
        # Without their tangents, which are passed separately.
        saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(ctx.enabled[1]):
            return cls.tangents(ctx, _arguments(ctx, saved), tangents)


def _arguments(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """Returns the inputs of a node in the order of the schema."""
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


@dataclass(frozen=True)
class _WindowsBatching(_Batching):
    """The rule for ops whose last argument is ``scale``, which has a batch only if [B, N, 2]."""

    def __call__(
        self, call: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]
    ) -> tuple[Any, Any]:
        dims = self.dims
        if len(args) == len(dims) and args[-1] is not None:
            mapped = in_dims[len(dims) - 1] is not None
            dims = (*dims[:-1], 0 if args[-1].dim() - mapped == 3 else None)
        return _Batching(dims, self.out)(call, size, in_dims, args)


class _Windows(_Function):
    """Linear in the image."""

    op, transpose = _ops.windows.default, _ops._windows_backward_image.default
    name = "windows"
    constant: ClassVar = {}
    batching = _WindowsBatching((0, 0, None, 0), 0)

    @classmethod
    def reads_first(cls, ctx: Any) -> bool:
        return bool(ctx.needs_input_grad[1] or ctx.needs_input_grad[3])

    @classmethod
    def setup_context(cls, ctx: Any, inputs: Any, output: Any) -> None:
        super().setup_context(ctx, inputs, output)
        ctx.size = inputs[0].shape[-2:]

    @classmethod
    def grad_and_image(cls, first: Any, grad: Any) -> tuple[Any, Any]:
        """Returns (gradient of the windows, image), given the first argument and the gradient."""
        return grad, first

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        first, centers, _, scale = args
        of_first = None
        if ctx.needs_input_grad[0]:
            of_first = cls.transpose(grads[0], centers, ctx.size, scale, **ctx.modes)
        pair = cls.grad_and_image(first, grads[0])
        return of_first, *_points_gradients(ctx, *pair, centers, scale)

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        _no_tangent(cls.name, centers=tangents[1], scale=tangents[3])
        return cls.op(tangents[0], *args[1:], **ctx.modes)


class _WindowsBackwardImage(_Windows):
    """Linear in the gradient of the windows: <x, op(grad)> = <windows(x), grad>."""

    op, transpose = _Windows.transpose, _Windows.op

    @classmethod
    def grad_and_image(cls, first: Any, grad: Any) -> tuple[Any, Any]:
        return first, grad


class _WindowsBackwardPoints(_Function):
    """Has no derivatives."""

    op, name = _ops._windows_backward_points.default, "windows"
    _second = "second derivative that involves centers or scale"
    constant: ClassVar = dict.fromkeys(("grad", "image", "centers", "scale"), _second)
    batching = _WindowsBatching((0, 0, 0, 0), 0)


def _points_gradients(
    ctx: Any, grad: Any, image: Any, centers: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Any, None, Any]:
    """Returns the gradients of (centers, size, scale), None where not needed."""
    _, needs_centers, _, needs_scale = ctx.needs_input_grad[:4]
    if not (needs_centers or needs_scale):
        return None, None, None
    places = (centers, scale)
    of_centers, of_scale = _ops._windows_backward_points(grad, image, *places, **ctx.modes)
    if scale is None or not needs_scale:
        of_scale = None
    else:
        of_scale = (of_scale if scale.dim() == 3 else of_scale.sum((0, 1))).to(scale)
    return of_centers.to(centers) if needs_centers else None, None, of_scale


def _no_tangent(op: str, **tangents: Any) -> None:
    for name, tangent in tangents.items():
        if tangent is not None:
            raise RuntimeError(f"srt::{op} has no forward-mode derivative with respect to {name}")


class _Ensemble(_Function):
    op, name = _ops.ensemble.default, "ensemble"
    batching = _Batching((1, None, None, None, None), 0)

    @classmethod
    def reads_first(cls, ctx: Any) -> bool:
        return ctx.modes.get("reduce") != "mean" or bool(ctx.needs_input_grad[4])

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        tokens, *place = args
        modes = dict(ctx.modes)
        reduce = modes.pop("reduce", "moments")
        given = next(grad for grad in grads if grad is not None)
        grads = [torch.zeros_like(given) if grad is None else grad for grad in grads]
        grad, grad_var = (*grads, None)[:2]
        tokens_grad = weights_grad = None
        if ctx.needs_input_grad[0] and reduce == "mean":
            tokens_grad = _Views(modes, *place).mean_backward(grad)
        elif ctx.needs_input_grad[0]:
            op = {"median": _ops._median_backward, "moments": _ops._moments_backward}[reduce]
            tokens_grad = op(grad, grad_var, tokens, *place, **modes)
        if ctx.needs_input_grad[4]:
            weights_grad = _ops._weights_backward(grad, grad_var, tokens, *place, **modes)
            weights_grad = weights_grad.sum((1, 2)).to(place[3])
        return tokens_grad, None, None, None, weights_grad

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        tokens, *place = args
        modes = dict(ctx.modes)
        reduce = modes.pop("reduce", "moments")
        views = _Views(modes, *place)
        tokens_tangent, weights_tangent = tangents[0], tangents[4]
        if reduce == "median":
            return _median_tangent(views, tokens, tokens_tangent)
        if reduce == "moments":
            return _moments_tangents(views, tokens, tokens_tangent, weights_tangent)
        assert reduce == "mean"
        result = 0 if tokens_tangent is None else views.ensemble(tokens_tangent)
        if weights_tangent is not None:
            result = result + _moments_tangents(views, tokens, None, weights_tangent)[0]
        return result


class _Moments(_Ensemble):
    op, name = _ops.ensemble_moments.default, "ensemble_moments"


class _MeanBackward(_Function):
    """Linear in the gradient of the mean."""

    op, name = _ops._mean_backward.default, "ensemble"
    constant: ClassVar = {
        **_Function.constant,
        "weights": "second derivative with respect to weights",
    }
    batching = _Batching((0, None, None, None, None), 1)

    @classmethod
    def gradients(cls, ctx: Any, args: list[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
        return (_Views(ctx.modes, *args[1:]).ensemble(grads[0]),)

    @classmethod
    def tangents(cls, ctx: Any, args: list[Any], tangents: Sequence[Any]) -> Any:
        return _Views(ctx.modes, *args[1:]).mean_backward(tangents[0])


# ---- registration --------------------------------------------------------------------------------


def _needs_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )


def _register(op: Any, derivative: Callable[..., Any], batching: _Batching) -> None:
    """Registers ``derivative``, which replaces the op when it is differentiated."""

    def kernel(*args: Any, **modes: Any) -> Any:
        if forward_ad._current_level >= 0 or _needs_gradient(args):
            return derivative(*args, **modes)
        with torch._C._AutoDispatchBelowAutograd():  # avoids the cost of a node
            return op(*args, **modes)

    def mapped(info: Any, in_dims: Any, *args: Any, **modes: Any) -> Any:
        return batching(partial(op, **modes), info.batch_size, in_dims, args)

    _library.impl(op, kernel, "Autograd")
    torch.library.register_vmap(op, mapped)


def _register_function(function: type[_Function]) -> None:
    op = function.op
    arguments = op._schema.arguments

    def node(*args: Any, **modes: Any) -> Any:
        # The dispatcher omits arguments that equal their defaults.
        missing = [a.default_value for a in arguments if not a.kwarg_only][len(args) :]
        defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
        enabled = (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
        with enable_single_level_autograd_function():
            return function.apply(  # type: ignore[attr-defined]
                *args, *missing, {**defaults, **modes, _ENABLED: enabled}
            )

    _register(op, node, function.batching)


def _register_composite(function: Callable[..., torch.Tensor], fake: Callable[..., Any]) -> None:
    """Registers ``function`` as an op, so that torch.compile does not unroll its loop over views.

    When the op is differentiated, ``function`` runs instead, which consists of differentiable ops.
    ``fake`` allocates the result for given tokens.
    """
    name = function.__name__
    _library.define(
        f"{name}(Tensor grad, Tensor? grad_var, Tensor tokens, Tensor offsets, int[2] grid, "
        "int[2] patch, Tensor? weights, *, str upsample, str border, int[2] stride) -> Tensor"
    )
    op = getattr(_ops, name).default

    def kernel(grad: Any, grad_var: Any, tokens: Any, *place: Any, **modes: Any) -> torch.Tensor:
        """Processes a few channels at a time, so that only the result has its full size."""
        batch, _, height, width = grad.shape
        channels = 16 * max(1, 2**17 // max(1, batch * height * width))
        variances = repeat(None) if grad_var is None else grad_var.split(channels, 1)
        parts = zip(grad.split(channels, 1), variances, tokens.split(channels, 3), strict=False)
        result: torch.Tensor = fake(tokens)
        for target, part in zip(result.split(channels, -1), parts, strict=True):
            target.copy_(function(*part, *place, **modes))
        return result

    _library.impl(op, kernel, "CompositeExplicitAutograd")
    _register(op, function, _Batching((0, 0, 1, None, None, None, None), 1))
    torch.library.register_fake(f"srt::{name}", lambda grad, var, tokens, *_, **modes: fake(tokens))


def _register_mutation(op: Any, subject: str) -> None:
    """Makes an op behave as torch's own functions that write to an argument.

    The op has no derivative, increments the version of the tensors that it writes (so that a
    backward pass that saved the old content fails) and resolves lazy negations. ``subject`` names
    the written argument in messages.
    """
    where = op.name().split(".")[0]
    arguments = op._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    names = [a.name for a in arguments if not a.kwarg_only]

    def targets(args: tuple[Any, ...], modes: dict[str, Any]) -> dict[str, torch.Tensor]:
        values = {**dict(zip(names, args, strict=False)), **modes}
        for name in written:  # the dispatcher accepts None as an undefined tensor
            check_tensor(where, name, values[name])
        return {name: values[name] for name in written}

    def autograd(*args: Any, **modes: Any) -> None:
        tensors = [a for a in (*args, *modes.values()) if isinstance(a, torch.Tensor)]
        if _needs_gradient(tensors) or (
            forward_ad._current_level >= 0
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
                    f"{where}: {name} must not be an inference tensor outside inference mode"
                )
            torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **modes)

    def negative(*args: Any, **modes: Any) -> None:
        for name, tensor in targets(args, modes).items():
            if tensor.is_neg() or tensor.is_conj():
                raise RuntimeError(
                    f"{where}: {name} must not be a lazily negated or conjugated view"
                )
        plain = [a.resolve_neg().resolve_conj() if isinstance(a, torch.Tensor) else a for a in args]
        op(*plain, **modes)

    _library.impl(op, autograd, "Autograd")
    _library.impl(op, version, "ADInplaceOrView", with_keyset=True)
    _library.impl(op, negative, "Negative")
    _library.impl(op, negative, "Conjugate")


for _function in (
    _Shift,
    _ShiftBackward,
    _Windows,
    _WindowsBackwardImage,
    _WindowsBackwardPoints,
    _Ensemble,
    _Moments,
    _MeanBackward,
):
    _register_function(_function)
_register_composite(_median_backward, lambda tokens: tokens.new_empty(tokens.shape))
_register_composite(_moments_backward, lambda tokens: tokens.new_empty(tokens.shape))
_register_composite(
    _weights_backward,
    lambda tokens: tokens.new_empty(*tokens.shape[:2], tokens.shape[3], dtype=torch.float64),
)
_register_mutation(_ops.ensemble.out, "out=")
for _op in (_ops.accumulate_mean_, _ops.accumulate_moments_, _ops.accumulate_median_):
    _register_mutation(_op.default, "the state of a stream")
