"""Models of timm, with ``forward_intermediates``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import base
from .base import Backbone, Features, Model
from .wrappers import call_method, unwrap, warn_if_overridden


class TimmBackbone(Backbone):
    """Layers are blocks, or the stages of a hierarchical model."""

    own_output = "forward_features"

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        inner = unwrap(model)
        info = layers_of(inner)
        self.indices, self.count = base.normalize_indices(layers, len(info)), len(info)
        parameters = inspect.signature(inner.forward_intermediates).parameters
        self.returns_tokens = "return_prefix_tokens" in parameters  # not maps
        declared = patch_sides(inner, max(info[i]["reduction"] for i in self.indices))
        self.prefix = getattr(inner, "num_prefix_tokens", 0) if self.returns_tokens else 0
        # timm raises for norm=True if the model has no norm (Hiera).
        self.norm = norm and (hasattr(inner, "norm") or hasattr(inner, "neck"))
        names = [info[i]["module"] for i in self.indices]
        super().__init__(model, base.resolve_patch(patch, declared), names)
        self.any_size = takes_any_size(inner)
        warn_if_overridden(inner, "forward_intermediates")
        base.resolve_prefix(prefix, self.prefix)
        # Hiera's modules permute the tokens; some models declare modules that do not exist.
        if hasattr(inner, "reroll") or not set(names) <= {n for n, _ in inner.named_modules() if n}:
            self.modules = ()

    def features(self, images: torch.Tensor) -> list[Features]:
        with image_size_errors(images, self.patch):
            return super().features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        wanted = sorted(set(self.indices))
        features = self._read(images, wanted)
        return [features[wanted.index(i)] for i in self.indices]

    def _read(self, images: torch.Tensor, indices: list[int]) -> list[Features]:
        layout: dict[str, Any] = {"output_fmt": "NCHW"}
        if self.returns_tokens:
            layout = {"output_fmt": "NLC", "return_prefix_tokens": bool(self.prefix)}
        layout |= {"stop_early": True, "intermediates_only": True}
        settings = {"indices": indices, "norm": self.norm, **layout}
        features = []
        for output in call_method(self.inner, "forward_intermediates", images, **settings):
            if not self.returns_tokens:
                features.append(base.from_map(output))
                continue
            tokens, prefix = output if isinstance(output, (tuple, list)) else (output, None)
            tokens, grid, _ = base.split_prefix(tokens, base.grid_of(images, self.patch), 0)
            # Not _replace, which torch.compile of torch 2.11 (not 2.12) cannot trace.
            features.append(Features(tokens, grid, prefix))
        return features

    def _last_layer(self, images: torch.Tensor) -> tuple[torch.Tensor, Any] | None:
        last = self.count - 1
        if not self.norm or last not in self.indices:
            return None
        (features,) = self._read(images, [last])
        tokens = features.tokens
        if features.prefix is not None:
            tokens = torch.cat([features.prefix, tokens], 1)
        return tokens, self._own_output(images)


def layers_of(model: Any) -> list[dict[str, Any]]:
    """``feature_info`` of the existing layers: the last ones may have been removed."""
    existing = {name for name, _ in model.named_modules(remove_duplicate=False)}
    info: list[dict[str, Any]] = list(model.feature_info)
    while info and info[-1]["module"] not in existing:
        info.pop()
    return info or list(model.feature_info)  # some models declare modules that never exist


_SIZE = re.compile(r"Input (height|width|size|image|img)[^\n]*?\([^\n]*?\)[^\n]*?\([^\n]*?\)")


@contextmanager
def image_size_errors(images: torch.Tensor, patch: tuple[int, int]) -> Iterator[None]:
    """Explains how to change the image size if a model of timm rejects it."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:  # RuntimeError from compiled code
        found, words = _SIZE.search(str(error)), str(error).lower()
        about_sizes = not words or any(w in words for w in ("height", "width", "size", "divisible"))
        if found is None and (isinstance(error, RuntimeError) or not about_sizes):
            raise
        reason = found[0] if found else str(error).rstrip(".")
        raise ValueError(
            f"SRT: the model must accept images of {list(images.shape[2:])} pixels, the size after "
            f"scale and padding to whole tokens of {list(patch)} pixels; it raised: {reason}. "
            "timm's create_model(..., dynamic_img_size=True) or model.set_input_size(...) change "
            "the accepted size, if the model supports it"
        ) from error


def takes_any_size(model: Any) -> bool:
    """Whether a model was created with ``dynamic_img_size``, or is convolutional."""
    if hasattr(model, "patch_embed"):
        return getattr(model.patch_embed, "strict_img_size", True) is False
    return not getattr(model, "pretrained_cfg", {}).get("fixed_input_size", True)


def patch_sides(model: Any, reduction: Any) -> Any:
    """(Ph, Pw), if ``reduction``, one number, is the longer side of the patch embedding."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio") and embed.feat_ratio() == reduction:
        return tuple(embed.feat_ratio(as_scalar=False))
    return reduction
