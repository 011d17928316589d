"""``python -m research.spot``: classification with few sub-pixel tokens.

Measures agreement: the share of images for which a frozen ViT-Ti/16 predicts the same class from n
windows of :mod:`srt_ext.spot` as from all 196 patches. Compares the placements, positions found by
gradient (an oracle: it uses the predicted class), random patches, and the image resized to n
patches, which costs the model the same. Writes research/results/spot.json, spot.md and spot.svg;
without ``--weights`` and ``--frames`` regenerates the latter two from the JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn import functional as F  # noqa: N812

from benchmarks.common import MODEL, load, machine, save
from benchmarks.report import markdown, save_figure
from research import RESULTS
from research.quality.data import chosen
from srt_ext import spot
from srt_ext.cli.spot import gradient_magnitude

SIDE = 224  # pixels of a side of a crop
# Squares, so that a square image can have as many patches.
COUNTS = (9, 16, 25, 36, 49, 64, 100, 144, 196)
STEPS, RATE = 10, 3.0  # of the search (Adam; rate in pixels)
BATCH = 20  # images per forward pass

# Methods other than the placements, by their names in the JSON.
SEARCH, RESIZED = "search from isotropic", "reduced picture"
PATCHES, SALIENT = "random patches", "salient"
RANDOM = {"uniform", "gauss", "sobol", "edge", PATCHES, SALIENT}  # the mean of several seeds
METHODS = (SEARCH, RESIZED, *spot.PLACEMENTS, SALIENT, PATCHES)

Row = dict[str, Any]


def crops(folders: list[Path], count: int) -> tuple[list[str], torch.Tensor]:
    """Names and centre crops [count, 3, SIDE, SIDE] uint8 of images, evenly spread over all."""
    from PIL import Image

    paths = [path for folder in folders for path in sorted(folder.rglob("*.jpg"))]
    if not paths:
        raise typer.BadParameter(
            "--frames must contain .jpg frames; got " + ", ".join(map(str, folders))
        )
    found, names = [], []
    for path in chosen(paths, count):
        picture = Image.open(path).convert("RGB")
        if min(picture.size) < SIDE:
            raise typer.BadParameter(
                f"images must have at least {SIDE} x {SIDE} pixels; got {path}"
            )
        x, y = ((n - SIDE) // 2 for n in picture.size)
        found.append(np.array(picture.crop((x, y, x + SIDE, y + SIDE))))
        names.append(f"{path.parent.name}/{path.stem}")
    return names, torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


class Pictures:
    """Images, the predictions of the model from all patches, and the gradient magnitude.

    pixels [B, 3, H, W] uint8; images [B, 3, H, W], normalised.
    """

    def __init__(self, model: Any, pixels: torch.Tensor, images: torch.Tensor) -> None:
        self.vit, self.images, self.size = spot.Subpixel(model), images, tuple(images.shape[2:])
        self.labels = self.decide(lambda at: model(images[at]))
        self.masks = [
            torch.from_numpy(gradient_magnitude(picture.permute(1, 2, 0).numpy()))
            for picture in pixels
        ]

    def batches(self) -> Iterator[slice]:
        for first in range(0, len(self.images), BATCH):
            yield slice(first, first + BATCH)

    @torch.no_grad()
    def decide(self, logits: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """[B]: the classes of ``logits`` of each batch."""
        return torch.cat([logits(at).argmax(1) for at in self.batches()])

    def agreement(self, logits: Callable[[slice], torch.Tensor]) -> float:
        return (self.decide(logits) == self.labels).float().mean().item()

    def positions(self, method: str, n: int, seed: int) -> torch.Tensor:
        """[B, n, 2] in pixels; each image has its own seed."""
        drawn = []
        for i, mask in enumerate(self.masks):
            own = seed * len(self.masks) + i
            if method == SALIENT:
                drawn.append(spot.salient(mask, n, own))
            elif method == PATCHES:
                drawn.append(spot.grid(n, self.size, self.vit.patch, own))
            else:
                drawn.append(spot.PLACEMENTS[method](n, self.size, own))
        return torch.stack(drawn)

    def of_windows(self, method: str, n: int, seed: int) -> float:
        """The agreement for n windows of a placement."""
        centers = self.positions(method, n, seed)
        return self.agreement(lambda at: self.vit(self.images[at], centers[at]))

    def reduced(self, n: int) -> float:
        """The agreement for square images resized to n patches with antialiasing."""
        sides = [patch * math.isqrt(n) for patch in self.vit.patch]

        def logits(at: slice) -> torch.Tensor:
            small = F.interpolate(self.images[at], sides, mode="bicubic", antialias=True)
            output: torch.Tensor = self.vit.model(small)
            return output

        return self.agreement(logits)

    def search(self, n: int) -> Row:
        """The oracle: agreement at the positions of least loss, and loss and agreement per step."""
        parts = [
            spot.search(self.vit, self.images[at], self.labels[at], n, STEPS, RATE)
            for at in self.batches()
        ]
        losses = torch.cat([part.loss for part in parts], 1)
        agrees = torch.cat([part.agreement.float() for part in parts], 1)
        best = torch.cat([part.best for part in parts])
        return {
            "agreement": [agrees.gather(0, best[None]).mean().item()],
            "steps": {"agreement": agrees.mean(1).tolist(), "loss": losses.mean(1).tolist()},
        }


def measure(pictures: Pictures, counts: tuple[int, ...], seeds: int) -> list[Row]:
    """One row per method and number of tokens, with the agreement of each seed."""
    rows = []
    for n in counts:
        for method in METHODS:
            start = time.perf_counter()
            if method == SEARCH:
                row = pictures.search(n)
            elif method == RESIZED:
                row = {"agreement": [pictures.reduced(n)]}
            else:
                tries = range(seeds if method in RANDOM else 1)
                row = {"agreement": [pictures.of_windows(method, n, seed) for seed in tries]}
            rows.append({"method": method, "tokens": n, **row})
            share, seconds = np.mean(row["agreement"]), time.perf_counter() - start
            print(f"{n} tokens, {method}: {share:.3f}, {seconds:.0f} s", flush=True)
    return rows


# ---- tables and plot ----------------------------------------------------------------------------


def shares(results: Row) -> dict[tuple[str, int], float]:
    """The mean agreement of the seeds, by method and number of tokens."""
    return {
        (row["method"], row["tokens"]): float(np.mean(row["agreement"])) for row in results["rows"]
    }


def document(results: Row) -> str:
    """spot.md."""
    facts, share = results["machine"], shares(results)
    counts = sorted({n for _, n in share})
    count = len(results["pictures"])
    error = math.sqrt(0.25 / count)
    lines = [[label(name), *(f"{share[name, n]:.3f}" for n in counts)] for name in METHODS]
    parts = [
        "# spot",
        "![Agreement against the number of tokens](spot.svg)",
        f"ViT-Ti/16, {count} crops of {SIDE} x {SIDE} pixels; torch {facts['torch']}, commit "
        f"{facts['commit']}, {facts['date']}, {results['seconds']} s. Agreement: the share of "
        "crops for which the model predicts the same class as from all 196 patches. Random "
        f"placements: means of {results['seeds']} seeds. The standard error of a share is at most "
        f"{error:.3f}.",
        markdown(["windows", *(f"{n} tokens" for n in counts)], lines),
        f"## The search: {STEPS} steps of Adam, {RATE:g} pixels",
        "Agreement and loss (cross-entropy of that class) of all crops after each step. The table "
        "above uses the positions with the least loss of each crop.",
        search_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def label(method: str) -> str:
    """The name of a method in the table and the plot."""
    return method.replace("picture", "image")


def search_table(results: Row) -> str:
    lines = []
    for row in results["rows"]:
        if row["method"] == SEARCH:
            for name, values in row["steps"].items():
                digits = 3 if name == "agreement" else 2
                lines.append([str(row["tokens"]), name, *(f"{v:.{digits}f}" for v in values)])
    return markdown(["tokens", "score", *(f"step {i}" for i in range(STEPS + 1))], lines)


def plot(results: Row, path: Path) -> None:
    from matplotlib import pyplot

    share = shares(results)
    counts = sorted({n for _, n in share})
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for i, name in enumerate(METHODS):
        bold = name in (SEARCH, RESIZED)
        style: Any = {"color": colours(i), "linewidth": 2.5 if bold else 1.3}
        style["linestyle"] = "--" if name in (RESIZED, PATCHES) else "-"
        axis.plot(counts, [share[name, n] for n in counts], marker="o", label=label(name), **style)
    axis.set(xscale="log", xlabel="tokens", ylabel="agreement with all 196 patches", ylim=(0, 1.02))
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)


def main(
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the ViT-Ti/16 (.safetensors).")
    ] = None,
    frames: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with .jpg frames, searched recursively; repeatable."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Crops, evenly spread over all frames.")] = 120,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the random placements.")] = 3,
    output: Path = RESULTS / "spot.json",
) -> None:
    """Measure; write the JSON, the tables and the plot."""
    if (weights is None) != (not frames):
        raise typer.BadParameter("--weights and --frames must be given together")
    if weights and frames:
        from srt_ext.hub import load_timm

        start = time.perf_counter()
        model, config = load_timm(MODEL, weights)
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        names, pixels = crops(frames, count)
        rows = measure(Pictures(model, pixels, (pixels / 255 - mean) / std), COUNTS, seeds)
        seconds = round(time.perf_counter() - start)
        facts = {"machine": machine(), "pictures": names, "seeds": seeds, "seconds": seconds}
        save({**facts, "rows": rows}, output)
    results = load(output)
    output.with_suffix(".md").write_text(document(results))
    plot(results, output.with_suffix(".svg"))
    print(document(results))


if __name__ == "__main__":
    typer.run(main)
