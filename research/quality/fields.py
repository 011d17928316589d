"""From a picture to the fields of all settings, with each view through the model once."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import srt_ext
from research.quality.settings import Setting
from srt_ext import views
from srt_ext.backbones import describe
from srt_ext.hub import load_timm

BATCH = 8  # views in one forward


class Network:
    """A frozen model of timm, and how it wants its pictures."""

    def __init__(self, name: str, weights: Path | None, layers: list[int], device: str) -> None:
        self.model, config = load_timm(name, weights)
        self.model.to(device)
        self.layers, self.device = layers, device
        self.backbone = describe(self.model, layers)
        if self.backbone.patch[0] != self.backbone.patch[1]:
            raise ValueError(f"quality: patches must be square; got {self.backbone.patch}")
        self.patch = self.backbone.patch[0]
        self.mean, self.std = (
            torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        self.name = name
        if weights is not None:  # which file it was, not where it lay
            self.name += f" {hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """pixels [H, W, 3] uint8, whole patches -> [1, 3, H, W], normalised."""
        image = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)[None] / 255
        return (image - self.mean) / self.std


class Fields:
    """The fields of settings, of one picture after the other."""

    def __init__(self, network: Network, settings: list[Setting]) -> None:
        self.network, self.settings = network, settings
        designs = {s.views: views.resolve(s.views) for s in settings}
        every = torch.cat([design.offsets for design in designs.values()]) + 0.0  # no -0
        self.offsets, index = every.unique(dim=0, return_inverse=True)
        self.srt = srt_ext.SRT(network.backbone, self.offsets, view_batch=BATCH)
        parts = index.split([len(design.offsets) for design in designs.values()])
        self.designs = {
            name: (part, design.weights)
            for (name, design), part in zip(designs.items(), parts, strict=True)
        }

    @torch.inference_mode()
    def of(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """pixels [H, W, 3] uint8 -> for each setting its field [C, H / stride, W / stride]."""
        image = self.network.image(pixels)
        batches = [[layer.tokens for layer in batch.layers] for batch in self.srt.tokens(image)]
        layers = [torch.cat(layer) for layer in zip(*batches, strict=True)]
        tokens = dict(zip(self.network.layers, layers, strict=True))  # [U, 1, N, C]
        shape = [n // self.network.patch for n in pixels.shape[:2]]
        return [self._field(s, tokens[s.layer], shape) for s in self.settings]

    def _field(self, setting: Setting, tokens: torch.Tensor, shape: list[int]) -> torch.Tensor:
        index, weights = self.designs[setting.views]
        chosen, patch = tokens[index.to(tokens.device)], self.network.patch
        if setting.unit:
            chosen = F.normalize(chosen, dim=3)
        how: dict[str, Any] = {
            "reduce": setting.reduce,
            "upsample": setting.upsample,
            "border": setting.border,
            # The middle of a cell is where four pixels meet: the mean of those.
            "stride": 1 if setting.centre else setting.stride,
        }
        field = srt_ext.ensemble(
            chosen, self.offsets[index], shape, (patch, patch), weights, **how
        )[0]
        if setting.centre:
            half, step = setting.stride // 2, setting.stride
            field = (
                field[:, half - 1 :: step, half - 1 :: step]
                + field[:, half - 1 :: step, half::step]
                + field[:, half::step, half - 1 :: step]
                + field[:, half::step, half::step]
            ) / 4
        return field.contiguous()


def seconds(network: Network, setting: Setting, pixels: np.ndarray, check: bool = True) -> float:
    """Of one picture by :class:`srt_ext.SRT`; ``check``: its field must be that of Fields."""
    srt = srt_ext.SRT(
        network.model,
        setting.views,
        layers=setting.layer,
        reduce=setting.reduce,
        stride=setting.stride,
        upsample=setting.upsample,
        border=setting.border,
        view_batch=BATCH,
    )
    image = network.image(pixels)
    start = time.perf_counter()
    field = srt(image).field[0]
    if field.is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    if check:
        (other,) = Fields(network, [setting]).of(pixels)
        torch.testing.assert_close(field, other, rtol=1e-3, atol=1e-3)
    return taken


def unit(field: torch.Tensor) -> torch.Tensor:
    """field [C, h, w] with every cell brought to length 1."""
    return F.normalize(field, dim=0)


def enlarged(field: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """field [C, h, w] -> [C, H, W], bilinear."""
    return F.interpolate(field[None], size=size, mode="bilinear", align_corners=False)[0]


def read(field: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The field [C, h, w] at points [P, 2], (y, x) from 0 to 1 -> [P, C], bilinear."""
    at = (2 * points.flip(1) - 1)[None, None].to(field)
    return F.grid_sample(field[None], at, padding_mode="border", align_corners=False)[0, :, 0].T
