"""Models with DINO's ``get_intermediate_layers``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from . import base
from .base import Backbone, Features, Model
from .wrappers import call_method, unwrap, warn_if_overridden


class DinoBackbone(Backbone):
    """Layers are blocks."""

    own_output = "forward_features"

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        inner = unwrap(model)
        blocks: Any = getattr(inner, "blocks", ())
        # Blocks may have been removed, so n_blocks can be stale. With FSDP, blocks are in chunks: a
        # chunk is a list that starts with one identity for each block of the earlier chunks.
        chunk = blocks[-1] if len(blocks) and isinstance(blocks[-1], nn.ModuleList) else blocks
        count = len(chunk) or getattr(inner, "n_blocks", 0)
        if not count:
            raise ValueError(
                "SRT: layers must be names of modules, with patch, for a model with "
                f"get_intermediate_layers but without blocks; got {type(inner).__name__}"
            )
        self.indices, self.count, self.norm = base.normalize_indices(layers, count), count, norm
        self.accepts = tuple(inspect.signature(inner.get_intermediate_layers).parameters)
        if not norm and "norm" not in self.accepts:
            raise ValueError(
                "SRT: norm must be True for a model whose get_intermediate_layers always "
                "normalises; got False"
            )
        self.prefix = base.resolve_prefix(prefix, None)
        names = [f"blocks.{i}" for i in self.indices] if len(blocks) == count else []
        super().__init__(model, base.resolve_patch(patch, base.declared_patch(inner)), names)
        warn_if_overridden(inner, "get_intermediate_layers")
        positions = ("interpolate_pos_encoding", "rope_embed")  # of DINO and DINOv2; of DINOv3
        self.any_size = any(hasattr(inner, name) for name in positions)

    def _features(self, images: torch.Tensor) -> list[Features]:
        wanted = sorted(set(self.indices))
        features = self._read(images, wanted)
        return [features[wanted.index(i)] for i in self.indices]

    def _read(self, images: torch.Tensor, indices: list[int]) -> list[Features]:
        grid, get = base.grid_of(images, self.patch), "get_intermediate_layers"
        if "return_class_token" not in self.accepts:  # the first DINO: the last n, normalised
            last = call_method(self.inner, get, images, self.count - indices[0])
            return [base.split_prefix(last[i - indices[0]], grid, self.prefix) for i in indices]
        arguments = {"reshape": False, "return_class_token": True, "norm": self.norm}
        if "return_extra_tokens" in self.accepts:  # DINOv3: registers, too
            arguments["return_extra_tokens"] = True
        arguments = {name: value for name, value in arguments.items() if name in self.accepts}
        features = []
        for tokens, *others in call_method(self.inner, get, images, n=indices, **arguments):
            prefix = torch.cat([t if t.dim() == 3 else t[:, None] for t in others], 1)
            tokens, _, _ = base.split_prefix(tokens, grid, 0)
            # Not _replace, which torch.compile of torch 2.11 (not 2.12) cannot trace.
            features.append(Features(tokens, grid, prefix))
        return features

    def _last_layer(self, images: torch.Tensor) -> tuple[torch.Tensor, Any] | None:
        if not self.norm or self.count - 1 not in self.indices:
            return None
        (features,) = self._read(images, [self.count - 1])
        own = self._own_output(images)
        if isinstance(own, dict):
            own = own.get("x_norm_patchtokens")
        elif isinstance(own, torch.Tensor) and own.dim() == 3:
            own = own[:, -features.tokens.shape[1] :]  # after class and register tokens
        return features.tokens, own
