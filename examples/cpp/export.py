"""Compiles a model that contains SRT to a package that a C++ program loads (aoti.cpp).

    python export.py FOLDER

writes the package model.pt2 and case.pt, which contains images and the field that eager PyTorch
computes from them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import srt_ext


class DenseViT(torch.nn.Module):
    """A small ViT that is applied to every shifted view, and the ensemble of its tokens."""

    def __init__(self, size: int = 64, patch: int = 16, channels: int = 32) -> None:
        super().__init__()
        self.patch = (patch, patch)
        self.grid = (size // patch, size // patch)
        self.embed = torch.nn.Conv2d(3, channels, patch, stride=patch)
        self.position = torch.nn.Parameter(torch.randn(self.grid[0] * self.grid[1], channels))
        self.block = torch.nn.TransformerEncoderLayer(
            channels, 4, 4 * channels, dropout=0, batch_first=True, norm_first=True
        )
        self.register_buffer("offsets", srt_ext.views.grid(2).offsets)  # [25, 2]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the field [B, C, H, W] of images [B, 3, H, W]."""
        views = torch.ops.srt.shift(images, self.offsets)  # [V, B, 3, H, W]
        maps = self.embed(views.flatten(0, 1))  # [V*B, C, h, w]
        tokens = maps.flatten(2).transpose(1, 2).contiguous()  # [V*B, N, C], channels dense
        tokens = self.block(tokens + self.position).unflatten(0, (len(self.offsets), -1))
        field: torch.Tensor = torch.ops.srt.ensemble(tokens, self.offsets, self.grid, self.patch)
        return field


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = DenseViT().eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.rand(2, 3, 64, 64),), dynamic_shapes={"images": {0: batch}}
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    images = torch.rand(3, 3, 64, 64)
    torch.save([images, model(images)], folder / "case.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
