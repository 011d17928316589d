"""Models of transformers, with ``output_hidden_states``."""

from __future__ import annotations

import copy
import inspect
from importlib.metadata import version
from typing import Any

import torch

from . import base
from .base import Backbone, Features, Model
from .wrappers import FINAL_NORMS, check_hooks, is_transformers, twin_of, unwrap

_PREFIX_PARAMETERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


class TransformersBackbone(Backbone):
    """Layers are the layers of the encoder."""

    own_output = "last_hidden_state"

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        encoder = vision_encoder(unwrap(model))
        install_recording_hooks(encoder)
        config, modules = encoder.config, dict(encoder.named_modules())
        blocks, depth = blocks_of(encoder), config.num_hidden_layers
        self.indices = base.normalize_indices(layers, depth)
        self.last = depth - 1
        # The norm of the encoder, not of its patch embedding or pooling: the last, least nested.
        outside = [n for n in modules if not n.startswith(blocks + ".")]
        norms = [n for n in outside if n.rpartition(".")[2] in FINAL_NORMS]
        final_norm = min(reversed(norms), key=lambda name: name.count("."), default="")
        self.norm = final_norm if norm else ""
        self.normalizes = norm
        self.neck = norm and any(n.rpartition(".")[2] == "neck" for n in modules)
        is_tied = ties_last_hidden_state(encoder)
        self.unties = is_tied and reads_tie_setting()
        self.is_normalized = is_tied and not self.unties  # the last of the hidden_states
        self.arguments = {"output_hidden_states": True, **any_size_arguments(encoder)}
        if accepts(encoder, "return_dict") or accepts(encoder, "kwargs"):
            self.arguments["return_dict"] = True  # overrides the configuration
        path = next((n for n, m in unwrap(model).named_modules() if m is encoder), "")
        names = [".".join(filter(None, (path, blocks, str(i)))) for i in self.indices]
        is_norm = final_norm and not isinstance(modules[final_norm], torch.nn.Identity)
        if self.is_normalized and is_norm and not norm and self.last in self.indices:
            raise ValueError(
                f"SRT: norm must be True for the last layer of {type(encoder).__name__}, which "
                f"transformers before 5.18 returns after its norm; got norm=False with "
                f"transformers {version('transformers')}. "
                f"layers={names[self.indices.index(self.last)]!r} reads it before its norm"
            )
        super().__init__(model, base.resolve_patch(patch, config.patch_size), names)
        self.prefix = base.resolve_prefix(prefix, declared_prefix(encoder))
        self.any_size = takes_any_size(encoder)

    def _run(self, encoder: Any, images: torch.Tensor) -> Any:
        if not self.unties:
            return call_model(encoder, images, self.patch, self.arguments)
        config = copy.copy(encoder.config)
        config.tie_last_hidden_states = False
        with twin_of(encoder, config=config) as untied:
            return call_model(untied, images, self.patch, self.arguments)

    def _features(self, images: torch.Tensor) -> list[Features]:
        encoder = vision_encoder(self.inner)
        output, features = self._run(encoder, images), []
        if output.hidden_states is None:  # a class derived from the model's, such as FSDP2's
            raise ValueError(
                f"SRT: {type(encoder).__name__} must return hidden_states for layers by index; got "
                f"None. layers={self.modules[-1]!r} reads a layer by name"
            )
        for i in self.indices:
            tokens = output.hidden_states[i + 1]  # the first is the patch embedding
            if self.neck and i == self.last:
                features.append(base.from_map(output.last_hidden_state))
                continue
            if self.norm and not (self.is_normalized and i == self.last):
                tokens = encoder.get_submodule(self.norm)(tokens)
            # SAM's tokens are NHWC.
            features.append(base.parse_output(tokens, images, self.patch, self.prefix)[0])
        return features

    def _check_hooks(self) -> None:
        check_hooks(self.model, called=vision_encoder(self.inner))

    def _last_layer(self, images: torch.Tensor) -> tuple[torch.Tensor, Any] | None:
        if self.neck or not self.normalizes or self.last not in self.indices:
            return None
        encoder = vision_encoder(self.inner)
        output = self._run(encoder, images)
        tokens, own = output.hidden_states[self.last + 1], output.last_hidden_state
        if not self.norm or self.is_normalized:
            return tokens, own
        last = encoder.get_submodule(self.norm)(tokens)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and torch.equal(own, tokens) and not torch.equal(own, last):
            return last[:, 0], pooled  # CLIP only normalises the pooled token
        return last, own


def install_recording_hooks(encoder: Any) -> None:
    """Installs the hooks with which transformers records hidden states.

    The library would install them in the first recording call: once for each twin that runs at the
    same time, and under a lock that torch.export cannot trace. They are local functions, which
    cannot be pickled; each is replaced by a picklable hook.
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # older releases do not use hooks
        return
    maybe_install_capturing_hooks(encoder)
    for module in encoder.modules():
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__module__", "") == maybe_install_capturing_hooks.__module__:
                module._forward_hooks[key] = _RecordingHook(hook)


class _RecordingHook:
    """A picklable hook of transformers."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        return self.hook(*args)

    def __reduce__(self) -> Any:
        settings = inspect.getclosurevars(self.hook).nonlocals
        names = ("key", "index", "capture_initial_hidden_state")
        return _recording_hook, tuple(settings[name] for name in names)


def _recording_hook(*settings: Any) -> _RecordingHook:
    from transformers.utils.output_capturing import install_output_capuring_hook

    module = torch.nn.Module()
    install_output_capuring_hook(module, *settings)
    (hook,) = module._forward_hooks.values()
    return _RecordingHook(hook)


def blocks_of(encoder: Any) -> str:
    """Name of the list of the layers; empty if their tokens differ in size."""
    config = encoder.config
    # The stages of Swin and ConvNeXt differ in token spacing, layout and norm.
    if not hasattr(config, "patch_size") or hasattr(config, "depths"):
        return ""
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return str(name)
    return ""


def vision_encoder(model: Any) -> Any:
    """The part of a model of transformers that turns an image into tokens, without its head."""
    encoder = model.base_model
    if not accepts(encoder, "pixel_values"):  # DINOv3: only the layers, without the embedding
        encoder = model
    for tower, other in (
        ("vision_model", "text_model"),
        ("vision_model", "classifier"),
        ("vision_encoder", "mask_decoder"),
    ):
        if hasattr(encoder, tower) and hasattr(encoder, other):
            return getattr(encoder, tower)
    return encoder


def reads_tie_setting() -> bool:
    """Whether transformers reads ``tie_last_hidden_states`` from the configuration of a model.

    Since 5.18; to be removed when that version is required.
    """
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 18)


def ties_last_hidden_state(encoder: Any) -> bool:
    """Whether the last of ``hidden_states`` is replaced by ``last_hidden_state``."""
    configured = getattr(encoder.config, "tie_last_hidden_states", None)
    if configured is not None and reads_tie_setting():
        return bool(configured)
    if hasattr(encoder, "out_features"):  # the output of these models has no last_hidden_state
        return False
    function: Any = type(encoder).forward
    while function is not None:  # the setting is an argument of a decorator
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if "tie_last_hidden_states" in names:
            cell = function.__closure__[names.index("tie_last_hidden_states")]
            return bool(cell.cell_contents)
        function = getattr(function, "__wrapped__", None)
    return False


def accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def takes_any_size(encoder: Any) -> bool:
    """Whether the position embeddings are interpolated or rotary."""
    if any_size_arguments(encoder):
        return True
    names = ("interpolate_pos_encoding", "rope_embeddings")
    return any(hasattr(module, name) for module in encoder.modules() for name in names)


def any_size_arguments(model: Any) -> dict[str, Any]:
    """Arguments of ``forward`` that allow images of any size; may be empty."""
    name = "interpolate_pos_encoding"
    return {name: True} if accepts(model, name) else {}


def call_model(
    model: Any, images: torch.Tensor, patch: tuple[int, int], arguments: dict[str, Any]
) -> Any:
    """``model(images)``; transformers by keyword, unless a hook expects positional arguments."""
    arguments = {**arguments, **mask_arguments(model, images, patch)}
    if is_transformers(model):
        by_name = model._forward_pre_hooks_with_kwargs
        if all(hook in by_name for hook in model._forward_pre_hooks):
            return model(pixel_values=images, **arguments)
    return model(images, **arguments)


def mask_arguments(model: Any, images: torch.Tensor, patch: tuple[int, int]) -> dict[str, Any]:
    """Arguments of ``forward`` that prevent ViTMAE from shuffling its patches."""
    ratio = getattr(getattr(model, "config", None), "mask_ratio", None)
    if ratio is None or not accepts(model, "noise"):
        return {}
    if ratio:
        raise ValueError(
            "SRT: mask_ratio in the configuration of the model must be 0, because masking drops "
            f"patches; got {ratio}"
        )
    height, width = base.grid_of(images, patch)
    return {"noise": torch.arange(height * width, device=images.device).expand(images.shape[0], -1)}


def declared_prefix(model: Any) -> int | None:
    """The number of prefix tokens that a model declares, or None."""
    if not is_transformers(model):
        count = getattr(model, "num_prefix_tokens", None)  # timm's
        return count if isinstance(count, int) else None
    count = 0
    for name, parameter in vision_encoder(model).named_parameters():
        place, _, last = name.rpartition(".")
        if last in _PREFIX_PARAMETERS and "embed" in place:  # not the query of a pooling head
            count += parameter.shape[-2] if parameter.dim() > 1 else 1
    return count or None
