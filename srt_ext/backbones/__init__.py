"""Adapters that read the features of a model: one module per interface of a library.

They do not modify the model, except for the hooks with which transformers records hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .._validation import is_integer
from .base import Backbone, CallableBackbone, Features, Layer, Model, TimedBackbone
from .dino import DinoBackbone
from .timm import TimmBackbone
from .transformers import TransformersBackbone, blocks_of, vision_encoder
from .wrappers import (
    FINAL_NORMS,
    contained,
    force_eager,
    is_dino,
    is_fsdp1,
    is_timm,
    is_transformers,
    unwrap,
)

__all__ = [
    "Backbone",
    "Features",
    "Layer",
    "Model",
    "TimedBackbone",
    "describe",
    "force_eager",
]


def describe(
    model: Model | Backbone,
    layers: Layer | Sequence[Layer] | None = None,
    *,
    norm: bool = True,
    patch: int | tuple[int, int] | None = None,
    prefix: int | None = None,
) -> Backbone:
    """The :class:`Backbone` of a model.

    Args:
        model, layers, norm, patch, prefix: as for :class:`srt_ext.SRT`. A ``Backbone`` is returned
            as it is.

    Returns:
        A :class:`Backbone` that can be passed to :class:`srt_ext.SRT` instead of the model.

    Raises:
        TypeError: ``model`` is not callable, or ``layers`` are neither indices nor names.
        ValueError: the model does not have a layer; the patch size is neither given nor declared by
            the model; ``patch`` or ``prefix`` contradicts the model.

    Example:
        >>> import torch
        >>> backbone = describe(torch.nn.Conv2d(3, 5, 8, stride=8), patch=8)
        >>> backbone.patch
        (8, 8)
        >>> (features,) = backbone.features(torch.rand(2, 3, 32, 24))
        >>> features.tokens.shape, features.grid
        (torch.Size([2, 12, 5]), (4, 3))
    """
    if isinstance(model, Backbone):
        settings = {"layers": layers, "patch": patch, "prefix": prefix}
        given = {name: value for name, value in settings.items() if value is not None}
        if given or not norm:
            raise ValueError(
                "SRT: layers, inject, norm, patch and prefix must be omitted for a Backbone, "
                f"which already has them; got {given or 'norm=False'}"
            )
        return model
    if not callable(model):
        raise TypeError(f"SRT: model must be callable; got {type(model).__name__}")
    if getattr(layers, "ndim", 0) == 1:  # an array
        layers = layers.tolist()  # type: ignore[union-attr]
    backbone = _backbone_of(model, _as_list(layers), norm, patch, prefix)
    backbone.returns_list = isinstance(layers, Sequence) and not isinstance(layers, str)
    return backbone


def _backbone_of(
    model: Model, layers: list[Layer], norm: bool, patch: Any, prefix: Any
) -> Backbone:
    indices = [layer for layer in layers if isinstance(layer, int)]
    names = [layer for layer in layers if isinstance(layer, str)]
    if names:
        if indices:
            raise TypeError(f"SRT: layers must be all indices or all names; got {layers!r}")
        from .hooks import HookBackbone

        return HookBackbone(model, names, patch, prefix)
    inner, settings = unwrap(model), (indices or [-1], norm, patch, prefix)
    if not is_fsdp1(inner):  # FSDP1 has the attributes of the wrapped model, but not its weights
        if is_timm(inner):
            return TimmBackbone(model, *settings)
        if is_transformers(inner):
            encoder = vision_encoder(inner)
            if blocks_of(encoder):
                return TransformersBackbone(model, *settings)
            raise ValueError(
                f"SRT: layers must be names of modules, with patch, for {type(encoder).__name__}, "
                "whose layers cannot be read by index; "
                f"got {indices or None}{_contained_hint(model)}"
            )
        if is_dino(inner):
            return DinoBackbone(model, *settings)
    rule = (
        "for a model without forward_intermediates (timm), get_intermediate_layers (DINO) or the "
        "interface of transformers"
    )
    if layers:
        raise ValueError(
            f"SRT: layers must be names of modules, with patch, {rule}; got {layers!r}"
            f"{_contained_hint(model)}"
        )
    if patch is None:
        got = f"None with {type(inner).__name__}{_contained_hint(model)}"
        raise ValueError(f"SRT: patch must be given {rule}; got {got}")
    return CallableBackbone(model, patch, prefix, _contained_hint)


def _contained_hint(model: Model) -> str:
    """A hint for models that are contained in another module; empty if there are none."""
    found: dict[str, Backbone] = {}
    for name, module in contained(model):
        if len(found) < 3 and not any(name.startswith(f"{outer}.") for outer in found):
            backbone = _without_settings(module, [])
            if backbone is not None:
                found[name] = backbone
    return "".join(_hint(model, name, backbone) for name, backbone in found.items())


def _hint(model: Any, name: str, backbone: Backbone) -> str:
    """The ways to read a contained model that need no settings."""
    ways = []
    if not any(map(is_fsdp1, model.modules())):  # its forward gathers the weights
        ways.append(f"pass model.get_submodule({name!r}) to run it alone")
    for layer in _last_layers(backbone):
        alone = _without_settings(backbone.model, [layer])
        within = _without_settings(model, [f"{name}.{layer}"])
        if alone and within and within.patch == backbone.patch:
            whole = type(unwrap(model)).__name__
            ways.append(f"layers={f'{name}.{layer}'!r} runs the whole {whole}")
            break
    return f". It contains a {type(backbone.model).__name__}: {'; '.join(ways)}" if ways else ""


def _without_settings(model: Model, layers: list[Layer]) -> Backbone | None:
    """The backbone of a model that needs no settings, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _backbone_of(model, layers, True, None, None)
    except (TypeError, ValueError):
        return None


def _last_layers(backbone: Backbone) -> Iterator[str]:
    """Names of modules that return the tokens of the last layer: the final norm, then the block."""
    modules = backbone.inner.named_modules()
    # An identity may never be called. CLIP's post_layernorm only receives the pooled token.
    known = {name for name, module in modules if not isinstance(module, nn.Identity)}
    block = (*backbone.modules, "")[0]
    places = [block[:i] for i, letter in enumerate(block) if letter == "."]
    for place in (*reversed(places), ""):
        for norm in FINAL_NORMS:
            name = f"{place}.{norm}".lstrip(".")
            if name in known and norm != "post_layernorm":
                yield name
    yield from backbone.modules


def _as_list(layers: Layer | Sequence[Layer] | None) -> list[Layer]:
    if layers is None:
        return []
    several = layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    if not all(isinstance(layer, str) or is_integer(layer) for layer in several):
        raise TypeError(f"SRT: layers must be indices or names of modules; got {layers!r}")
    if not several:
        raise ValueError("SRT: layers must not be empty; got []")
    return [layer if isinstance(layer, str) else int(layer) for layer in several]
