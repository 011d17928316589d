"""The ops at the dispatch keys of autograd. Asking for a derivative is an error: there is none yet.

Without kernels at these keys torch would only warn, forward-mode AD would lose a tangent in
silence, and a tensor that an op writes would keep its version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

_library = torch.library.Library("srt", "IMPL")


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, modes: dict[str, Any], *args: Any) -> Any:
        ctx.name = op.name()
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **modes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> NoReturn:
        raise RuntimeError(f"{ctx.name} has no derivative in this version")


def _implement(op: Any, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False) -> None:
    _library.impl(op.name().removeprefix("srt::"), kernel, key, with_keyset=with_keyset)


def _returning(op: Any) -> None:
    _implement(op, lambda *args, **modes: _NoDerivative.apply(op, modes, *args), "Autograd")


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
        if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors) or (
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
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


_ops = torch.ops.srt
_returning(_ops.shift.default)
_returning(_ops.ensemble.default)
_returning(_ops.ensemble_moments.default)
_writing(_ops.ensemble.out, "out=")
_writing(_ops.accumulate_mean_.default, "the state of a stream")
_writing(_ops.accumulate_moments_.default, "the state of a stream")
_writing(_ops.accumulate_median_.default, "the state of a stream")
