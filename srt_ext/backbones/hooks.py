"""Reads and replaces the outputs of modules by name, in any model, with forward hooks.

Imported only when needed, because it imports torch's compiler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from . import transformers
from .base import Backbone, Features, Model, declared_patch, parse_output, resolve_prefix
from .timm import image_size_errors, patch_sides
from .wrappers import (
    check_hooks,
    contained,
    force_eager,
    has_hooks,
    is_dino,
    is_timm,
    is_transformers,
    unwrap,
)


class _StopForward(Exception):  # noqa: N818
    """Ends a forward pass as soon as every requested module has run."""


def _owner(inner: Any, layers: list[str]) -> tuple[str, Any]:
    """The library model that contains the layers and declares its patch, and its name in inner.

    It may be contained in another model of a library, such as TimmWrapperModel.
    """
    is_library = is_timm(inner) or is_transformers(inner) or is_dino(inner)
    for place, model in [*([("", inner)] if is_library else []), *contained(inner)]:
        if all(not place or name.startswith(f"{place}.") for name in layers):
            with suppress(ValueError):
                if not is_timm(model):  # timm declares it for each layer
                    declared_patch(model)
                return place, model
    return "", inner


def _check_is_called(modules: dict[str, Any], name: str) -> None:
    """Raises if the module is in traced, scripted or exported code, which calls no hooks."""
    for end in (0, *(i for i, letter in enumerate(name) if letter == "."), len(name)):
        module, inside = modules.get(name[:end]), name[end:].lstrip(".")
        if isinstance(module, torch.jit.ScriptModule):
            # Python code may call a traced module directly. A scripted module has no hooks.
            runs = not inside and isinstance(module, torch.jit._trace.TopLevelTracedModule)
        elif isinstance(module, torch.fx.GraphModule) and inside and name in modules:
            calls = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
            runs = any(f"{inside}.".startswith(f"{target}.") for target in calls)
        else:
            runs = True
        if not runs:
            raise ValueError(
                "SRT: inject and layers by name must be modules that Python code calls, not "
                "modules in traced, scripted or exported code, which does not call hooks; got "
                f"{name!r} with {type(module).__name__}. Pass the original model, or patch without "
                "layers to read the output of the model"
            )


class HookBackbone(Backbone):
    """Reads the outputs of named modules. The hooks are removed after each forward pass."""

    def __init__(self, model: Model, layers: list[str], patch: object, prefix: object):
        inner = unwrap(model)
        known = dict(inner.named_modules()) if isinstance(inner, torch.nn.Module) else {}
        # Names in the wrapper are accepted, too: `module.blocks.0` of DataParallel.
        outer = model.named_modules() if isinstance(model, torch.nn.Module) else ()
        path = next((f"{n}." for n, module in outer if n and module is inner), "")
        layers = [name if name in known else name.removeprefix(path) for name in layers]
        for name in layers:
            _check_is_called(known, name)
            if name not in known or name == "":
                rule = f"layers must be indices, or names of modules of {type(inner).__name__}"
                near = [n for n in known if n.endswith(".0")][:3]
                hint = f" (such as {', '.join(near)})" if near else ""
                raise ValueError(f"SRT: {rule}{hint}; got {name!r}")
        if is_transformers(inner) and transformers.accepts(inner, "input_ids"):
            raise ValueError(
                "SRT: model must have images as its only input for inject and for layers by name, "
                f"such as the vision_model of CLIP; got {type(inner).__name__}"
            )
        place, owner = _owner(inner, layers)
        if hasattr(owner, "reroll"):
            raise ValueError(
                "SRT: layers must be indices, and inject must be omitted, for Hiera, whose "
                f"modules reorder the tokens; got {layers}"
            )
        if patch is None:
            infos = getattr(owner, "feature_info", [])
            reductions = {i["module"]: i["reduction"] for i in infos}
            local = layers[0].removeprefix(place + ".")
            patch = reductions.get(local) if len(layers) == 1 else None
            patch = declared_patch(owner) if patch is None else patch_sides(owner, patch)
        declared = transformers.declared_prefix(owner) if prefix is None else prefix
        self.prefix = resolve_prefix(declared, None)
        self.arguments = transformers.any_size_arguments(inner)
        super().__init__(model, patch, layers)

    @classmethod
    def from_backbone(cls, backbone: Backbone) -> HookBackbone:
        """The same layers, by the names of their modules."""
        if isinstance(backbone, cls):
            return backbone
        if not backbone.modules:
            if hasattr(backbone.inner, "reroll"):
                raise ValueError(
                    "SRT: inject must be omitted for Hiera, whose modules reorder the tokens; got "
                    "an index"
                )
            raise ValueError(
                "SRT: inject must be the name of a module whose tokens are in row order, with "
                f"patch, for {type(backbone.inner).__name__}; got an index"
            )
        return cls(backbone.model, list(backbone.modules), backbone.patch, backbone.prefix)

    # Compiled code does not call hooks that were added later.
    @torch.compiler.disable(reason="SRT reads layers by name by hooks, which run eagerly")
    def features(self, images: torch.Tensor) -> list[Features]:
        return self._features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        found: dict[str, Features] = {}
        check_hooks(self.model, called=self.inner)
        # accelerate and FSDP run code after the forward of a module, which must not be skipped.
        parents = {"", *(name[:i] for name in self.modules for i, c in enumerate(name) if c == ".")}
        runs_to_end = any(has_hooks(self.inner.get_submodule(name)) for name in parents)
        # torch.export follows each call of a module to its end.
        runs_to_end = runs_to_end or torch.compiler.is_exporting()

        def keep(name: str, output: object) -> None:
            if name not in found:
                found[name] = parse_output(output, images, self.patch, self.prefix)[0]
            if len(found) == len(set(self.modules)) and not runs_to_end:
                raise _StopForward

        with suppress(_StopForward), self._hooks(keep):
            self._forward(images)
        missing = sorted(set(self.modules) - set(found))
        if missing:
            raise ValueError(
                "SRT: the forward pass of the model must call all modules in layers; it did not "
                f"call {missing}"
            )
        return [found[name] for name in self.modules]

    def _forward(self, images: torch.Tensor) -> Any:
        with image_size_errors(images, self.patch) if is_timm(self.inner) else nullcontext():
            return transformers.call_model(self.inner, images, self.patch, self.arguments)

    @contextmanager
    def _hooks(self, hook: Callable[[str, object], object]) -> Iterator[None]:
        """Calls ``hook`` with the name and output of each module; it may return another output.

        Only in this thread: another thread may run the same model at the same time.
        """
        thread = threading.get_ident()

        def call(name: str, _module: object, _input: object, output: object) -> object:
            return hook(name, output) if threading.get_ident() == thread else None

        with force_eager(self.model), ExitStack() as handles:  # each handle removes its hook
            for name in set(self.modules):
                module = self.inner.get_submodule(name)
                hooked = partial(call, name)
                handles.enter_context(module.register_forward_hook(hooked))
            yield

    @torch.compiler.disable(reason="SRT replaces features by hooks, which run eagerly")
    def forward_with(
        self, images: torch.Tensor, replace: Callable[[Features], tuple[torch.Tensor, Any]]
    ) -> Any:
        """Runs the model on images [B, 3, H, W] with replaced features at its only layer.

        ``replace`` is called with the original features and returns tokens [B, h * w, C] and prefix
        [B, K, C] or None. Returns the output of the model.
        """
        replaced = False

        def hook(_name: str, output: Any) -> Any:
            nonlocal replaced
            if replaced:
                raise ValueError(
                    "SRT: the forward pass of the model must call the layer of inject once; it "
                    f"called {self.modules[0]} again"
                )
            replaced = True
            features, layout = parse_output(output, images, self.patch, self.prefix)
            tokens, prefix = replace(features)
            if layout == "NLC":
                new = tokens if prefix is None else torch.cat([prefix, tokens], 1)
            else:
                new = tokens.unflatten(1, features.grid)
                new = new if layout == "NHWC" else new.permute(0, 3, 1, 2)
            if isinstance(output, torch.Tensor):
                return new
            if type(output) in (tuple, list):
                return type(output)([new, *output[1:]])
            raise ValueError(
                "SRT: inject must name a module that returns a tensor, or a tuple or list that "
                f"starts with one; {self.modules[0]} returns {type(output).__name__}"
            )

        check_hooks(self.model, called=self.inner)
        with self._hooks(hook):
            result = self._forward(images)
        if not replaced:
            raise ValueError(
                "SRT: the forward pass of the model must call the layer of inject; it did not "
                f"call {self.modules[0]}"
            )
        return result
