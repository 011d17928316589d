"""What ours is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine


def _translate(image: torch.Tensor, dy: float, dx: float) -> torch.Tensor:
    """image [B, C, H, W] moved by whole pixels, zeros beyond the border, as torchvision does it."""
    return affine(
        image,
        angle=0.0,
        translate=[int(dx), int(dy)],
        scale=1.0,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.NEAREST,
    )


def published_ensemble(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: tuple[int, int],
    patch: tuple[int, int],
    upsample: str,
) -> torch.Tensor:
    """The published way to the mean: upsample each view to pixels, move it back, add.

    tokens [V, B, N, C], offsets [V, 2] whole pixels -> [B, C, H, W]. Pixels that a view does not
    cover count as zeros.
    """
    size = (grid[0] * patch[0], grid[1] * patch[1])
    mode = {"mode": "nearest"} if upsample == "nearest" else {"mode": "bilinear"}
    total = torch.zeros(())
    for view, (dy, dx) in zip(tokens, offsets.tolist(), strict=True):
        # Dense first: torch upsamples the transposed map several times slower.
        tokens_map = view.transpose(1, 2).reshape(*view.shape[::2], *grid).contiguous()
        pixels = F.interpolate(tokens_map, size, **mode)
        total = total + _translate(pixels, -dy, -dx)
    return total / len(tokens)


def published_shift(image: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """image [B, C, H, W] -> its views [V, B, C, H, W], one affine transform each, zeros outside."""
    return torch.stack([_translate(image, dy, dx) for dy, dx in offsets.tolist()])
