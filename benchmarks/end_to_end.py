"""SRT around a real ViT: one forward, the forwards of all views, SRT, and what of it is ours."""

from __future__ import annotations

from typing import Any

import timm
import torch

import srt_ext
from benchmarks.common import quartiles
from benchmarks.suite import Clock, name_of

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
PATCH, VIEW_BATCH = (16, 16), 8


def measure(clock: Clock, extent: str) -> list[dict[str, Any]]:
    """Weights are random: time does not depend on them."""
    size = (480, 848) if clock.gpu else (224, 224)
    models: tuple[str, ...] = MODELS
    if extent == "walk":
        models, size = ("vit_tiny_patch16_224",), (32, 32)
    dtype = torch.bfloat16 if clock.gpu else torch.float32
    rows = []
    for name in models:
        vit = timm.create_model(name, dynamic_img_size=True, img_size=size).eval()
        vit.to(clock.device, dtype)
        rows.append(_of_model(clock, name, vit, size, dtype))
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def _of_model(
    clock: Clock, name: str, vit: torch.nn.Module, size: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    offsets = srt_ext.views.grid(3)
    image = torch.rand(1, 3, *size, device=clock.device).to(dtype)
    srt = srt_ext.SRT(vit, views=offsets, view_batch=VIEW_BATCH)
    features_of = srt.backbone.features
    field = srt(image)[0]
    views = srt_ext.shift(image, offsets)[:, 0]
    grid = (size[0] // PATCH[0], size[1] // PATCH[1])
    shape = (len(offsets), 1, grid[0] * grid[1], field.shape[1])
    tokens = torch.randn(shape, device=clock.device).to(dtype)

    def forwards() -> None:
        for part in views.split(VIEW_BATCH):
            features_of(part)

    calls = {
        "forward": lambda: features_of(image),
        "forwards of all views": forwards,
        "SRT": lambda: srt(image),
        "shift": lambda: srt_ext.shift(image, offsets),
        "ensemble": lambda: srt_ext.ensemble(tokens, offsets, grid, PATCH),
    }
    readings = clock.interleaved(calls, 5)
    return {
        "model": name,
        "size": size,
        "dtype": name_of(dtype),
        "views": len(offsets),
        "output_bytes": field.nbytes,
        "calls": {call: quartiles(us) for call, us in readings.items()},
    }
