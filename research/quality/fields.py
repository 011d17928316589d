"""The fields of all settings for an image; the model sees each distinct view once."""

from __future__ import annotations

import copy
import hashlib
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import srt_ext
from research.quality.settings import Setting, Shown
from srt_ext.backbones import Backbone, Features, describe
from srt_ext.backbones.base import grid_of
from srt_ext.backbones.timm import TimmBackbone
from srt_ext.hub import load_timm
from srt_ext.views import Views

BATCH = 8  # views per forward pass


class Network:
    """A frozen timm model and its normalisation of images."""

    def __init__(self, name: str, weights: Path | None, layers: list[int], device: str) -> None:
        self.model, config = load_timm(name, weights)
        self.model.to(device)
        self.layers, self.device = layers, device
        self._backbones = {"model": describe(self.model, layers)}
        sides = self.backbone("model").patch
        if sides[0] != sides[1]:
            raise ValueError(f"quality: patches must be square; got {sides}")
        self.patch = sides[0]
        self.mean, self.std = (
            torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        self.name = name
        if weights is not None:  # identifies the file by its contents, not its path
            self.name += f" {hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"

    def backbone(self, tokens: str) -> Backbone:
        """The backbone for a value of ``Setting.tokens``."""
        if tokens not in self._backbones:
            self._backbones[tokens] = (
                describe(overlapping(self.model), self.layers)
                if tokens == "overlap"
                else Windows(self.model, self.layers, norm=True, patch=None, prefix=None)
            )
        return self._backbones[tokens]

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """pixels [H, W, 3] uint8, whole patches -> [1, 3, H, W], normalised."""
        image = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)[None] / 255
        return (image - self.mean) / self.std


class Windows(TimmBackbone):
    """Applies a model to windows of the size that it was trained on.

    The windows are spread evenly over the grid of patches and overlap by at least a third; tokens
    in several windows are averaged.
    """

    def _features(self, images: torch.Tensor) -> list[Features]:
        side, grid = self.inner.patch_embed.grid_size, grid_of(images, self.patch)
        starts = [
            np.linspace(0, n - k, math.ceil(1.5 * (n - k) / k) + 1).round().astype(int)
            for n, k in zip(grid, side, strict=True)
        ]
        totals: list[torch.Tensor] = []
        counts = images.new_zeros(*grid, 1)
        for y, x in product(*starts):
            rows, columns = slice(y, y + side[0]), slice(x, x + side[1])
            top, left = y * self.patch[0], x * self.patch[1]
            window = images[:, :, top : top + side[0] * self.patch[0]]
            found = super()._features(window[..., left : left + side[1] * self.patch[1]])
            shape = (len(images), *grid, found[0].tokens.shape[2])
            totals = totals or [images.new_zeros(shape) for _ in found]
            for total, feature in zip(totals, found, strict=True):
                total[:, rows, columns] += feature.tokens.unflatten(1, side)
            counts[rows, columns] += 1
        return [Features((total / counts).flatten(1, 2), grid, None) for total in totals]


def overlapping(model: Any) -> Any:
    """A copy of a timm ViT with half-overlapping patches, one token per half patch.

    The image is padded by a quarter patch on every side: the centre of token k is at (k + 1/2) half
    patches. timm resamples the position embeddings to the grid.
    """
    model = copy.deepcopy(model)
    old = model.patch_embed.proj
    step = old.stride[0] // 2
    new = torch.nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        step,
        padding=step // 2,
        padding_mode="replicate",
        bias=old.bias is not None,
    )
    new.load_state_dict(old.state_dict())
    model.patch_embed.proj = new.to(old.weight.device).eval()
    model.patch_embed.patch_size = (step, step)
    for stage in model.feature_info:
        stage["reduction"] = step
    return model


class Shots:
    """The forward passes of one :class:`Shown`, for the views of several designs."""

    def __init__(self, network: Network, how: Shown, designs: dict[str, Views]) -> None:
        every = [
            torch.cat(
                [d.offsets, torch.zeros(len(d.offsets), 2) if d.mirror is None else d.mirror], 1
            )
            for d in designs.values()
        ]
        rows, index = (torch.cat(every) + 0.0).unique(dim=0, return_inverse=True)  # no -0
        self.index = dict(zip(designs, index.split([len(part) for part in every]), strict=True))
        self.offsets = rows[:, :2]  # enlarged pixels
        views = Views(self.offsets / how.scale, None, rows[:, 2:].bool())
        backbone = network.backbone(how.tokens)
        self.srt = srt_ext.SRT(backbone, views, stride=how.block, scale=how.scale, view_batch=BATCH)

    def tokens(self, image: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, int]]:
        """image [1, 3, H, W] -> tokens [U, 1, N, C] for each layer, and their grid."""
        batches = [batch.layers for batch in self.srt.tokens(image)]
        layers = [torch.cat([of.tokens for of in parts]) for parts in zip(*batches, strict=True)]
        return layers, batches[0][0].grid


class Fields:
    """Computes the fields of settings, image by image."""

    def __init__(self, network: Network, settings: list[Setting]) -> None:
        self.network, self.settings = network, settings
        self.designs = {s.views: s.design for s in settings}
        wanted: dict[Shown, dict[str, Views]] = {}
        for s in settings:
            for how in s.shown(network.patch):
                wanted.setdefault(how, {})[s.views] = self.designs[s.views]
        self.shots = {how: Shots(network, how, designs) for how, designs in wanted.items()}

    @torch.inference_mode()
    def of(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """pixels [H, W, 3] uint8 -> for each setting its field [C, H / stride, W / stride]."""
        image = self.network.image(pixels)
        tokens = {how: shots.tokens(image) for how, shots in self.shots.items()}
        found = []
        for s in self.settings:
            height, width = (math.ceil(n / s.stride) for n in pixels.shape[:2])
            parts = [
                self._field(s, how, *tokens[how])[:, :height, :width]
                for how in s.shown(self.network.patch)
            ]
            found.append(s.stored((sum(parts[1:], parts[0]) / len(parts)).contiguous()))
        return found

    def _field(
        self, setting: Setting, how: Shown, layers: list[torch.Tensor], grid: tuple[int, int]
    ) -> torch.Tensor:
        shots, weights = self.shots[how], self.designs[setting.views].weights
        index = shots.index[setting.views]
        tokens = layers[self.network.layers.index(setting.layer)][index.to(layers[0].device)]
        if setting.unit:
            tokens = F.normalize(tokens, dim=3)
        step = setting.step(how.scale)
        modes: dict[str, Any] = {
            "reduce": setting.reduce,
            "upsample": setting.upsample,
            "border": setting.border,
            # The centre of a cell is the mean of the four pixels that meet there.
            "stride": 1 if setting.centre else step,
        }
        patch = shots.srt.backbone.patch
        field = srt_ext.ensemble(tokens, shots.offsets[index], grid, patch, weights, **modes)[0]
        if setting.centre:
            half = step // 2
            field = (
                field[:, half - 1 :: step, half - 1 :: step]
                + field[:, half - 1 :: step, half::step]
                + field[:, half::step, half - 1 :: step]
                + field[:, half::step, half::step]
            ) / 4
        return field


def unit(field: torch.Tensor) -> torch.Tensor:
    """field [C, h, w] with every cell normalised to length 1."""
    return F.normalize(field, dim=0)


def enlarged(field: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """field [C, h, w] -> [C, H, W], bilinear."""
    return F.interpolate(field[None], size=size, mode="bilinear", align_corners=False)[0]


def read(field: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """field [C, h, w] at points [P, 2], (y, x) in 0..1 -> [P, C], bilinear."""
    at = (2 * points.flip(1) - 1)[None, None].to(field)
    return F.grid_sample(field[None], at, padding_mode="border", align_corners=False)[0, :, 0].T
