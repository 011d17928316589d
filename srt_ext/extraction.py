"""From the pixels of an image to the tensors of a file: shared by all commands and engines."""

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
    """A frozen model with its image normalisation.

    Args:
        name: the name of the model, for messages and metadata.
        model: as for :func:`srt_ext.backbones.describe`.
        mean, std: numbers per channel, for pixels in 0 .. 1.
        layers, settings: arguments of :func:`srt_ext.backbones.describe`, which also states the
            errors.

    Attributes:
        backbone: a :class:`srt_ext.backbones.TimedBackbone`, which measures the time of the model.
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
        """Loads a model with :func:`srt_ext.hub.load_timm`, which also states the errors."""
        model, config = load_timm(name, weights)
        return cls(name, model, config["mean"], config["std"], layers, **settings)

    def image(self, *pixels: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
        """B images [H, W, 3] uint8 of one size -> [B, 3, H, W] for the model, on ``device``.

        The result is normalised in float32 and has the dtype of the parameters of the model.
        """
        # Copied to the device as bytes, a quarter of the size of floats.
        images = torch.from_numpy(np.stack(pixels)).to(device or "cpu").permute(0, 3, 1, 2)
        mean, std = (values.to(images.device) for values in (self._mean, self._std))
        parameters = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return ((images.float() / 255 - mean) / std).to(next(parameters, torch.float32))

    def digest(self) -> str:
        """A hash of the weights, independent of the file from which they were loaded."""
        sha256 = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            data = tensor.cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
            sha256.update(data.numpy())
        return sha256.hexdigest()[:16]


class Extraction(NamedTuple):
    """The settings of an extraction. ``settings``: all that features depend on, for metadata."""

    network: Network
    srt: SRT
    size: int
    dtype: torch.dtype
    settings: dict[str, str]


def cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` in ``dtype``. Raises a ValueError if a finite value would become infinite."""
    result = value.to(dtype)
    if dtype == torch.float16:
        beyond = result.isinf() & value.isfinite()
        if beyond.any():
            largest = value[beyond].abs().max()
            raise ValueError(
                f"{name} must be at most 65504 in magnitude for float16; got {largest:g}: "
                "use dtype bfloat16"
            )
    return result


def to_tensors(output: SRTOutput, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``field`` [C, H', W'] and ``prefix`` [K, C] of one image, dense, in ``dtype``."""
    return {
        name: cast(name, tensor[0], dtype).contiguous()
        for name, tensor in output._asdict().items()
        if tensor is not None
    }
