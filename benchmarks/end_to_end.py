"""SRT around a real ViT: one forward pass, the passes of all views, SRT, shift, ensemble."""

from __future__ import annotations

from functools import partial

import torch

import srt_ext
from benchmarks.common import quartiles
from benchmarks.suite import Bench, Pair, Step, name_of

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
PATCH, VIEW_BATCH = (16, 16), 8


def steps(extent: str, gpu: bool) -> list[Step]:
    size = (480, 848) if gpu else (224, 224)
    names: tuple[str, ...] = MODELS
    if extent == "walk":
        names, size = ("vit_tiny_patch16_224",), (32, 32)
    return [partial(measure_model, name=name, size=size) for name in names]


@torch.no_grad()
def measure_model(bench: Bench, name: str, size: Pair) -> None:
    """SRT with 16 views. Weights are random: time does not depend on them."""
    import timm  # takes seconds; not every run needs it

    clock = bench.clock
    dtype = torch.bfloat16 if clock.gpu else torch.float32
    vit = timm.create_model(name, dynamic_img_size=True, img_size=size).eval()
    vit.to(clock.device, dtype)
    image = torch.rand(1, 3, *size, device=clock.device).to(dtype)
    srt = srt_ext.SRT(vit, 16, view_batch=VIEW_BATCH)
    offsets = srt.views.offsets
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
    row = {
        "model": name,
        "size": size,
        "dtype": name_of(dtype),
        "views": len(offsets),
        "output_bytes": field.nbytes,
        "calls": {call: quartiles(us) for call, us in readings.items()},
    }
    bench.end_to_end.append(row)
    print(f"[{bench.elapsed():5.1f} s] {row}", flush=True)
    bench.save()
