"""Wrappers of a model, other models that contain it, and hooks on its own call."""

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

# Names of the final norm in models of timm and transformers.
FINAL_NORMS = ("layernorm", "norm", "rms_norm", "post_layernorm")

# ---- wrappers -----------------------------------------------------------------------------------


def wrappers(model: Any) -> list[Any]:
    """The given model and the models inside of its wrappers, from the outermost to the innermost.

    Only wrappers that do not change the result of a forward pass: torch.compile, DataParallel,
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
    """The model without its wrappers."""
    return wrappers(model)[-1]


def is_transformers(model: object) -> bool:
    names = [(kind.__module__, kind.__name__) for kind in type(model).__mro__]
    return ("transformers.modeling_utils", "PreTrainedModel") in names


# By the type: a module that contains a model may forward its attributes.
def is_timm(model: object) -> bool:
    return hasattr(type(model), "forward_intermediates") and hasattr(model, "feature_info")


def is_dino(model: object) -> bool:
    return hasattr(type(model), "get_intermediate_layers")


def contained(model: Any) -> Iterator[tuple[str, Any]]:
    """The library models that a module contains, with their names in it."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, module in modules:
        if name and (is_timm(module) or is_transformers(module) or is_dino(module)):
            yield name, module


def warn_if_overridden(model: Any, method: str) -> None:
    """Warns if a subclass overrides ``forward`` but not ``method``."""
    definers = [kind for kind in type(model).__mro__ if {"forward", method} & set(vars(kind))]
    if definers and method not in vars(definers[0]):
        warnings.warn(
            f"SRT: features are read with {method}, which does not run the forward that "
            f"{type(model).__name__} overrides. Pass layers by name to run it",
            stacklevel=2,
        )


# ---- hooks --------------------------------------------------------------------------------------


def has_hooks(module: Any) -> bool:
    """Whether hooks run before or after a forward pass of the module."""
    own = module._forward_pre_hooks or module._forward_hooks
    every = _module._global_forward_pre_hooks or _module._global_forward_hooks
    return bool(own or every) or hasattr(module, "_hf_hook") or is_fsdp1(module)


def call_method(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """``model.method(...)`` with the hooks of the model's own call.

    PyTorch runs these hooks only if the module is called: hooks that change its input, gather its
    weights (FSDP2) or load them (accelerate).
    """
    if not isinstance(model, nn.Module) or not has_hooks(model):
        return getattr(model, method)(*args, **kwargs)
    loader = getattr(model, "_hf_hook", None)  # accelerate

    def forward(*args: Any, **kwargs: Any) -> Any:
        if loader is None:
            return getattr(twin, method)(*args, **kwargs)
        args, kwargs = loader.pre_forward(model, *args, **kwargs)
        return loader.post_forward(model, getattr(twin, method)(*args, **kwargs))

    with twin_of(model, forward=forward, _compiled_call_impl=None) as twin:
        return twin(*args, **kwargs)


@contextmanager
def twin_of(model: Any, **own: Any) -> Iterator[Any]:
    """A module that shares all attributes with the model, except the ``own`` attributes.

    The model is not modified, because other threads may run it at the same time; attributes that a
    forward pass or a hook stores are copied back to it. Not copy.copy, which FSDP2 overrides.
    """
    twin, before = object.__new__(type(model)), {**model.__dict__, **own}
    twin.__dict__.update(before)
    try:
        yield twin
    finally:
        changed = {k: v for k, v in twin.__dict__.items() if k not in before or v is not before[k]}
        model.__dict__.update(changed)


def check_hooks(model: Any, *, called: Any = None, through: Any = None) -> None:
    """Raises a ValueError if hooks would be bypassed.

    Args:
        model: the given model, with its wrappers.
        called: the module that is called; its hooks run.
        through: the module that :func:`call_method` runs: its pre-hooks run; hooks on the output
            are rejected, because the method has another output than the model.
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
        # accelerate sets a forward that loads weights. After removal, a bound copy of the class's
        # own forward remains.
        own = getattr(forward, "__func__", None) is type(module).forward
        if not (forward is None or own or hasattr(module, "_hf_hook") or _is_compiled(forward)):
            hooks.append(forward)
        if hooks:
            name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
            kind = type(module).__name__
            if module is unwrap(model):
                way = "Pass layers by name, which call the model itself"
            else:
                way = f"Register it on the {type(unwrap(model)).__name__} inside"
            raise ValueError(
                "SRT: the model must have no hooks if its features are read with another method, "
                f"which bypasses them; got {name} on {kind}. {way}"
            )


def _is_distributed(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _is_compiled(function: object) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def is_fsdp1(module: object) -> bool:
    return type(module).__name__ == "FullyShardedDataParallel"


# ---- compiled models ----------------------------------------------------------------------------


def force_eager(model: Any) -> AbstractContextManager[Any]:
    """Runs compiled models eagerly: compiled code does not call hooks that were added later."""
    compiled = any(
        hasattr(part, "dynamo_ctx") or getattr(part, "_compiled_call_impl", None)
        for part in wrappers(model)
    )
    return _eager_stance if compiled else nullcontext()


class _EagerStance:
    """torch's stance is per process: the first thread sets it, the last thread resets it."""

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


# Attributes of modules that drop features or patches by calling a function.
_DROPPED = ("drop_prob", "dropout", "dropout_prob", "attention_dropout", "prob")


def changes_in_training(model: Any) -> bool:
    """Whether a model is in training mode and this changes its features."""

    def changes(module: nn.Module) -> bool:
        shares: list[Any] = [module.p] if isinstance(module, _DropoutNd) else []
        shares += [getattr(module, name, None) for name in _DROPPED]
        drops = any(isinstance(share, float) and share > 0 for share in shares)
        return getattr(module, "training", False) and (isinstance(module, _BatchNorm) or drops)

    return any(map(changes, model.modules() if isinstance(model, nn.Module) else ()))
