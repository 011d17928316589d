"""``python -m research.streaming``: the error of running medians.

Measures the mean distance of ``RunningMedian``, and of other estimators with small state, from the
exact median, in units of the mean spread of the elements: on random values and, if ``--weights``
and ``--frames`` are given, on features of a pretrained ViT. Writes research/results/streaming.json
and prints the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import srt_ext
from benchmarks.common import MODEL, machine, save
from benchmarks.peers import p_square, step_halving
from research import RESULTS
from srt_ext import views

RADII = {9: 1, 49: 3, 225: 7}  # views of a whole-pixel grid: its radius
ELEMENTS = 20000


# ---- accuracy -----------------------------------------------------------------------------------


def window(values: torch.Tensor) -> torch.Tensor:
    """RunningMedian, one view at a time: values [V, E] -> [E]."""
    running = srt_ext.RunningMedian((1, 1), (1, 1))
    for value in values:
        running.update(value.reshape(1, 1, 1, -1), torch.zeros(1, 2))
    return running.result().flatten()


# Name: the estimator, and the float32 numbers of its state per element.
METHODS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "window of 7 (RunningMedian)": (window, 8),
    "P-square": (p_square, 8),
    "step halving": (step_halving, 2),
    "mean": (lambda values: values.mean(0), 1),
}


def random_values(kind: str, count: int) -> torch.Tensor:
    """[V, E], independent, so that their order does not matter."""
    values = torch.randn(count, ELEMENTS)
    if kind == "10 % outliers":
        return torch.where(torch.rand(values.shape) < 0.1, 10 * values, values)
    if kind == "bimodal":
        return 0.5 * values + torch.where(torch.rand(values.shape) < 0.5, -1.5, 1.5)
    if kind == "ReLU, 40 % zeros":
        return (values + 0.2533).clamp(min=0)
    if kind == "rounded, ties":
        return (2 * values).round() / 2
    return values


def real_values(weights: Path, frames: Path) -> dict[int, torch.Tensor]:
    """Features [V, E] for each number of views, in raster order; elements are from stride-4 cells.

    Last layer of a ViT-Ti/16, first frames of two sequences, 224 x 224 pixels.
    """
    from PIL import Image

    from srt_ext.backbones import describe
    from srt_ext.hub import load_timm

    vit, config = load_timm(MODEL, weights)
    backbone = describe(vit)
    sequences = sorted({path.parent for path in frames.glob("*/*.jpg")})[:2]
    if not sequences:
        raise typer.BadParameter(f"--frames must contain folders of .jpg frames; got {frames}")
    pictures = [
        Image.open(sorted(path.glob("*.jpg"))[0]).convert("RGB").resize((224, 224))
        for path in sequences
    ]
    pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in pictures])
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    found = {}
    for count, radius in RADII.items():
        offsets = views.grid(radius).offsets
        fields = []
        for at in offsets.split(1):
            with torch.no_grad():
                tokens = backbone.features(srt_ext.shift(images, at)[0])[0].tokens[None]
            place: Any = ((14, 14), (16, 16))
            fields.append(srt_ext.ensemble(tokens, at, *place, border="clamp", stride=4).flatten())
        found[count] = torch.stack(fields)[:, :: fields[0].numel() // ELEMENTS]
    return found


def accuracy(weights: Path | None, frames: Path | None) -> list[dict[str, Any]]:
    rows = []
    real = real_values(weights, frames) if weights and frames else {}
    kinds = ["Gaussian", "10 % outliers", "bimodal", "ReLU, 40 % zeros", "rounded, ties"]
    kinds += ["features, spread", "features, random", "features, raster"] if real else []
    for kind in kinds:
        for count in RADII:
            if kind.startswith("features"):
                values = real[count]
                index = torch.arange(count, dtype=torch.float32)
                order = views.spread(torch.stack([index, index], 1)).offsets[:, 0].long()
                orders = {"spread": order, "random": torch.randperm(count), "raster": index.long()}
                values = values[orders[kind.split(", ")[1]]]
            else:
                values = random_values(kind, count)
            exact, spread = values.median(0).values, values.std(0, correction=0).mean()
            for name, (method, state) in METHODS.items():
                start = time.perf_counter()
                estimate = method(values)
                seconds = time.perf_counter() - start
                error = ((estimate - exact).abs().mean() / spread).item()
                rows.append(
                    {
                        "values": kind,
                        "views": count,
                        "method": name,
                        "state": state,
                        "error": error,
                        "ns": 1e9 * seconds / values.numel(),
                    }
                )
    return rows


# ---- table --------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    counts = list(RADII)
    head = " | ".join(f"V = {count}" for count in counts)
    lines = [f"| values | method | state | {head} | ns per update |", "|---" * 7 + "|"]
    rows = results["accuracy"]
    for kind in dict.fromkeys(row["values"] for row in rows):
        for name, (_, state) in METHODS.items():
            found = [r for r in rows if r["values"] == kind and r["method"] == name]
            errors = " | ".join(f"{r['error']:.4f}" for r in found)
            lines.append(f"| {kind} | {name} | {state} | {errors} | {found[-1]['ns']:.1f} |")
    return "\n".join(lines)


def main(
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the ViT-Ti/16 (.safetensors).")
    ] = None,
    frames: Annotated[
        Path | None, typer.Option(help="Folder with one folder of .jpg frames per sequence.")
    ] = None,
    output: Path = RESULTS / "streaming.json",
) -> None:
    """Measure; write the JSON; print the table."""
    if (weights is None) != (frames is None):
        raise typer.BadParameter("--weights and --frames must be given together")
    torch.manual_seed(0)
    results = {"machine": machine(), "accuracy": accuracy(weights, frames)}
    save(results, output)
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
