"""From the pixels of a picture to tensors for a file: what every way of extracting shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .backbones import Layer, TimedBackbone, describe
from .hub import load_timm
from .srt import SRT, SRTOutput


class Network:
    """A frozen model and its image normalisation; ``backbone`` measures the model's seconds.

    ``mean`` and ``std`` are numbers a channel, for pixels in 0 .. 1. ``layers``, ``settings`` and
    errors are those of :func:`srt_ext.backbones.describe`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        mean: Sequence[float],
        std: Sequence[float],
        layers: Layer | list[int] | None = None,
        **settings: Any,
    ) -> None:
        self.name, self.model = name, model
        self.mean, self.std = tuple(mean), tuple(std)
        self.backbone = TimedBackbone(describe(model, layers, **settings))
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]
            for values in (mean, std)
        )

    @classmethod
    def load(
        cls,
        name: str,
        weights: Path | None = None,
        layers: Layer | list[int] | None = None,
        **settings: Any,
    ) -> Network:
        """Arguments and errors are those of :func:`srt_ext.hub.load_timm`, too."""
        model, config = load_timm(name, weights)
        return cls(name, model, config["mean"], config["std"], layers, **settings)

    def image(self, *pixels: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
        """[H, W, 3] uint8, B of one size -> [B, 3, H, W] for the model, on ``device``.

        They are normalised in float32 and have the dtype of the model's parameters.
        """
        # Copied as bytes, a quarter of the floats.
        images = torch.from_numpy(np.stack(pixels)).to(device or "cpu").permute(0, 3, 1, 2)
        mean, std = (values.to(images.device) for values in (self._mean, self._std))
        parameters = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return ((images.float() / 255 - mean) / std).to(next(parameters, torch.float32))

    def digest(self) -> str:
        """A hash of the weights, independent of the file that they came from."""
        sha256 = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            data = tensor.cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
            sha256.update(data.numpy())
        return sha256.hexdigest()[:16]


class Extraction(NamedTuple):
    """What to extract; ``settings`` is everything that the features depend on, for metadata."""

    network: Network
    srt: SRT
    size: int
    dtype: torch.dtype
    settings: dict[str, str]


def cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` in ``dtype``; a ValueError with its name if a finite one would become infinite."""
    result = value.to(dtype)
    if dtype == torch.float16:
        beyond = result.isinf() & value.isfinite()
        if beyond.any():
            largest = value[beyond].abs().max()
            raise ValueError(
                f"float16 ends at 65504, {name} goes to {largest:g}: use dtype bfloat16"
            )
    return result


def to_tensors(output: SRTOutput, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``field`` [C, H', W'] and ``prefix`` [K, C] of an image, dense, in the range of ``dtype``."""
    return {
        name: cast(name, tensor[0], dtype).contiguous()
        for name, tensor in output._asdict().items()
        if tensor is not None
    }
