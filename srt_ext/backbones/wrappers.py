"""What lies around a model: wrappers, other models that contain it, and hooks on its own call."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# Names of the final norm in the models of libraries.
FINAL_NORMS = ("layernorm", "norm", "rms_norm", "post_layernorm")

# ---- wrappers -----------------------------------------------------------------------------------


def wrappers(model: Any) -> list[Any]:
    """The model as it was given, and what its wrappers hold, down to the model itself.

    Only wrappers that leave the result of a forward as it is: those of torch.compile, DataParallel,
    DistributedDataParallel and PEFT.
    """
    found = [model]
    while True:
        model = found[-1]
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            found.append(model.module)
        elif hasattr(model, "_orig_mod"):
            found.append(model._orig_mod)
        elif callable(getattr(model, "get_base_model", None)):
            found.append(model.get_base_model())
        elif type(model).__name__ == "PeftMixedModel":
            found.append(model.base_model.model)
        else:
            return found


def unwrap(model: Any) -> Any:
    """The model itself, without its wrappers."""
    return wrappers(model)[-1]


def is_transformers(model: object) -> bool:
    names = [(kind.__module__, kind.__name__) for kind in type(model).__mro__]
    return ("transformers.modeling_utils", "PreTrainedModel") in names


# By the type: a module around a model may pass attributes on.
def is_timm(model: object) -> bool:
    return hasattr(type(model), "forward_intermediates") and hasattr(model, "feature_info")


def is_dino(model: object) -> bool:
    return hasattr(type(model), "get_intermediate_layers")


def contained(model: Any) -> Iterator[tuple[str, Any]]:
    """The models of libraries inside of another module, and their names there."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, module in modules:
        if name and (is_timm(module) or is_transformers(module) or is_dino(module)):
            yield name, module


def warn_if_overridden(model: Any, method: str) -> None:
    """Warns of a subclass whose ``forward`` does what ``method`` does not know."""
    definers = [kind for kind in type(model).__mro__ if {"forward", method} & set(vars(kind))]
    if definers and method not in vars(definers[0]):
        warnings.warn(
            f"SRT: features are read by {method}, which does not run the forward that "
            f"{type(model).__name__} overrides. Layers by name run it",
            stacklevel=2,
        )


# ---- hooks --------------------------------------------------------------------------------------


def has_hooks(module: Any) -> bool:
    """Whether something is to run before or after a forward of the module."""
    own = module._forward_pre_hooks or module._forward_hooks
    every = _module._global_forward_pre_hooks or _module._global_forward_hooks
    return bool(own or every) or hasattr(module, "_hf_hook") or is_fsdp1(module)


def call_method(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """``model.method(...)`` with the hooks of the model's own call.

    PyTorch runs them only for a call of the module: those that change its input, that gather its
    weights (FSDP2) or that load them (accelerate).
    """
    if not isinstance(model, nn.Module) or not has_hooks(model):
        return getattr(model, method)(*args, **kwargs)
    loader = getattr(model, "_hf_hook", None)  # of accelerate

    def forward(*args: Any, **kwargs: Any) -> Any:
        if loader is None:
            return getattr(twin, method)(*args, **kwargs)
        args, kwargs = loader.pre_forward(model, *args, **kwargs)
        return loader.post_forward(model, getattr(twin, method)(*args, **kwargs))

    with twin_of(model, forward=forward, _compiled_call_impl=None) as twin:
        return twin(*args, **kwargs)


@contextmanager
def twin_of(model: Any, **own: Any) -> Iterator[Any]:
    """A module that shares all parts with the model but for its ``own`` attributes.

    The model is left as it is, for other threads may run it meanwhile; but what a forward or a hook
    stores is stored there, too. Not copy.copy, which FSDP2 overrides.
    """
    twin, before = object.__new__(type(model)), {**model.__dict__, **own}
    twin.__dict__.update(before)
    try:
        yield twin
    finally:
        changed = {k: v for k, v in twin.__dict__.items() if k not in before or v is not before[k]}
        model.__dict__.update(changed)


def check_hooks(model: Any, *, called: Any = None, through: Any = None) -> None:
    """Refuses hooks that would be bypassed.

    Args:
        model: as it was given, with its wrappers.
        called: the module that is called; its hooks run.
        through: the module that :func:`call_method` runs: hooks on its output, which is another
            than the model's, do not fit.
    """
    for module in wrappers(model):
        if module is called or not isinstance(module, nn.Module):
            continue
        hooks: list[Callable[..., Any]] = list(module._forward_hooks.values())
        if module is through:
            hooks = [hook for hook in hooks if not _is_distributed(hook)]
        else:
            hooks += module._forward_pre_hooks.values()
        forward = module.__dict__.get("forward")
        # accelerate loads weights by such a forward; what it leaves behind is the module's own.
        own = getattr(forward, "__func__", None) is type(module).forward
        if not (forward is None or own or hasattr(module, "_hf_hook") or _is_compiled(forward)):
            hooks.append(forward)
        if hooks:
            name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
            kind = type(module).__name__
            if module is unwrap(model):
                way = "Give layers by name, which call the model itself"
            else:
                way = f"Register it on the {type(unwrap(model)).__name__} inside"
            raise ValueError(
                "SRT: the model's own call must have no hooks where its features are read by "
                f"another method, which bypasses them; got {name} on {kind}. {way}"
            )


def _is_distributed(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _is_compiled(function: object) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def is_fsdp1(module: object) -> bool:
    return type(module).__name__ == "FullyShardedDataParallel"


# ---- compiled models ----------------------------------------------------------------------------


def force_eager(model: Any) -> AbstractContextManager[Any]:
    """Runs compiled models eagerly: compiled code does not call new hooks."""
    compiled = any(
        hasattr(part, "dynamo_ctx") or getattr(part, "_compiled_call_impl", None)
        for part in wrappers(model)
    )
    return _eager_stance if compiled else nullcontext()


class _EagerStance:
    """torch's stance is per process: the first thread in sets it, the last one out resets it."""

    def __init__(self) -> None:
        self.lock, self.threads = threading.Lock(), 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.threads == 0:
                self.stance = torch.compiler.set_stance("force_eager")
            self.threads += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                self.stance.__exit__(None, None, None)


_eager_stance = _EagerStance()


# ---- training -----------------------------------------------------------------------------------


# Attributes of modules that drop features or patches by a function.
_DROPPED = ("drop_prob", "dropout", "dropout_prob", "attention_dropout", "prob")


def changes_in_training(model: Any) -> bool:
    """Whether a model is in training mode, and this changes its features."""

    def changes(module: nn.Module) -> bool:
        shares: list[Any] = [module.p] if isinstance(module, _DropoutNd) else []
        shares += [getattr(module, name, None) for name in _DROPPED]
        drops = any(isinstance(share, float) and share > 0 for share in shares)
        return getattr(module, "training", False) and (isinstance(module, _BatchNorm) or drops)

    return any(map(changes, model.modules() if isinstance(model, nn.Module) else ()))
