"""Models of DINO's repositories, by ``get_intermediate_layers``."""

from __future__ import annotations

import inspect

import torch

from . import base
from .base import Backbone, Features, Model


class DinoBackbone(Backbone):
    """Layers are blocks."""

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        inner = base.unwrap(model)
        count = getattr(inner, "n_blocks", None) or len(inner.blocks)
        self.indices, self.count, self.norm = base.normalize_indices(layers, count), count, norm
        self.accepts = tuple(inspect.signature(inner.get_intermediate_layers).parameters)
        if not norm and "norm" not in self.accepts:
            raise ValueError(
                "SRT: norm must be True for a model whose get_intermediate_layers always "
                "normalises; got False"
            )
        self.prefix = base.resolve_prefix(prefix, None)
        names = [f"blocks.{i}" for i in self.indices] if len(inner.blocks) == count else []
        super().__init__(model, base.resolve_patch(patch, base.declared_patch(inner)), names)
        positions = ("interpolate_pos_encoding", "rope_embed")  # of DINO and DINOv2; of DINOv3
        self.any_size = any(hasattr(inner, name) for name in positions)

    def _features(self, images: torch.Tensor) -> list[Features]:
        get, grid = self.inner.get_intermediate_layers, base.grid_of(images, self.patch)
        wanted = sorted(set(self.indices))
        if "return_class_token" not in self.accepts:  # the first DINO: the last n, normalised
            last = get(images, self.count - wanted[0])
            return [base.split_prefix(last[i - wanted[0]], grid, self.prefix) for i in self.indices]
        arguments = {"reshape": False, "return_class_token": True, "norm": self.norm}
        if "return_extra_tokens" in self.accepts:  # DINOv3: registers, too
            arguments["return_extra_tokens"] = True
        features = []
        for tokens, *others in get(images, n=wanted, **arguments):
            prefix = torch.cat([t if t.dim() == 3 else t[:, None] for t in others], 1)
            features.append(base.split_prefix(tokens, grid, 0)._replace(prefix=prefix))
        return [features[wanted.index(i)] for i in self.indices]
