"""From the pixels of a picture to tensors for a file: what every way of extracting shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .backbones import TimedBackbone, describe
from .hub import load_timm
from .srt import SRTOutput


class Network:
    """A frozen model and its image normalisation; ``backbone`` measures the model's seconds.

    ``mean`` and ``std`` are numbers a channel, for pixels in 0 .. 1. ``layers`` and errors are
    those of :func:`srt_ext.backbones.describe`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        mean: Sequence[float],
        std: Sequence[float],
        layers: int | list[int] | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.mean, self.std = tuple(mean), tuple(std)
        self.backbone = TimedBackbone(describe(model, layers))
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]
            for values in (mean, std)
        )

    @classmethod
    def load(
        cls, name: str, weights: Path | None = None, layers: int | list[int] | None = None
    ) -> Network:
        """Arguments and errors are those of :func:`srt_ext.hub.load_timm`, too."""
        model, config = load_timm(name, weights)
        return cls(name, model, config["mean"], config["std"], layers)

    def image(self, *pixels: np.ndarray) -> torch.Tensor:
        """[H, W, 3] uint8, B of one size -> [B, 3, H, W] float32, normalised."""
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        return (images - self._mean) / self._std

    def digest(self) -> str:
        """A hash of the weights, independent of the file that they came from."""
        sha256 = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha256.update(tensor.cpu().numpy().tobytes())
        return sha256.hexdigest()[:16]


def to_tensors(output: SRTOutput, dtype: torch.dtype, index: int = 0) -> dict[str, torch.Tensor]:
    """``field`` [C, H', W'] and ``prefix`` [K, C] of an image, dense, in the range of ``dtype``."""
    tensors = {}
    for name, tensor in output._asdict().items():
        if tensor is None:
            continue
        value = tensor[index]
        tensors[name] = value.to(dtype).contiguous()
        if dtype == torch.float16 and tensors[name].isinf().any() and not value.isinf().any():
            raise ValueError(
                f"float16 ends at 65504, {name} goes to {value.abs().max():g}: --dtype bfloat16"
            )
    return tensors
