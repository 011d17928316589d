"""``python -m research.views``: the error of designs with few views.

Compares the mean field of a design with the mean field of the full grid, all whole-pixel offsets up
to the same radius, on real frames with a pretrained ViT-Ti/16. The error is the distance to the
field of the full grid, divided by the distance of the unshifted image's field to it. Writes
research/results/views.json, views.md and views.svg; without ``--weights`` and ``--frames``
regenerates the latter two from the JSON.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import srt_ext
from benchmarks.common import MODEL, load, machine, quartiles, save
from benchmarks.report import markdown, save_figure
from research import RESULTS
from srt_ext import views
from srt_ext.views import Views

RADII = (2, 3, 5, 8)
COUNTS = (4, 5, 7, 9, 13, 16, 25)
# Sub-pixel views need forward passes of their own, so only these are measured.
SUBPIXEL_RADII, SUBPIXEL_COUNTS = (3, 8), (4, 7, 9, 16)
LAYERS = (3, 7, 11)  # of 12, from 0; each through the final norm
STRIDE = 4
BATCH = 16  # views per forward pass
INTERPOLATIONS = ("bilinear", "bicubic")

Design = torch.Tensor | Views
Row = dict[str, Any]


# ---- designs ------------------------------------------------------------------------------------
# Each approximates the full grid of a radius. A "matched" design has the variance of that grid.


def moments(radius: int) -> tuple[float, float]:
    """Means of d^2 and d^4 over -radius, ..., radius."""
    m2 = radius * (radius + 1) / 3
    return m2, m2 * (3 * radius**2 + 3 * radius - 1) / 5


def reach(count: int, radius: int) -> float:
    """The extent at which ``count`` evenly spaced values have the variance of the full grid."""
    return math.sqrt(3 * moments(radius)[0] * (count - 1) / (count + 1))


def square(nodes: Any) -> torch.Tensor:
    axis = torch.as_tensor(nodes, dtype=torch.float32)
    return torch.cartesian_prod(axis, axis)


def grid(count: int, radius: int, seed: int) -> torch.Tensor | None:
    k = math.isqrt(count)
    return square(np.linspace(-radius, radius, k)) if k**2 == count else None


def matched_grid(count: int, radius: int, seed: int) -> torch.Tensor | None:
    k = math.isqrt(count)
    return square(np.linspace(-1, 1, k) * reach(k, radius)) if k**2 == count else None


def gauss_grid(count: int, radius: int, seed: int) -> Views | None:
    """Three nodes per axis, close to Gaussian quadrature, with weights that match the variance."""
    if count != 9:
        return None
    m2, m4 = moments(radius)
    far = round(math.sqrt(m4 / m2))
    share = m2 / far**2
    weights = torch.tensor([share / 2, 1 - share, share / 2])
    return Views(square([-far, 0, far]), torch.outer(weights, weights).flatten())


def lattice(count: int, radius: int, seed: int) -> torch.Tensor:
    return views.lattice(count, radius).offsets


def matched_lattice(count: int, radius: int, seed: int) -> torch.Tensor:
    return views.lattice(count, reach(count, radius)).offsets


def modulo_n(count: int, radius: int, seed: int) -> torch.Tensor:
    """The matched lattice, without the rules modulo n + 1."""
    index = np.arange(count)
    best, offsets = 0.0, None
    for g in range(1, count):
        if math.gcd(g, count) == 1:
            turn = (g - 1 if g % 2 else g - 1 + count) // 2
            points = np.stack([index, (g * index + turn) % count], 1) * 2 - (count - 1)
            apart = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(count)
            if apart.min() > best + 1e-9:
                best, offsets = apart.min(), points * (reach(count, radius) / (count - 1))
    return torch.tensor(offsets, dtype=torch.float32)


def two_lattices(count: int, radius: int, seed: int) -> Design | None:
    """A lattice and its mirror image: dy and dx are uncorrelated. Common views occur once."""
    n = (count + 1) // 2
    if count % 2 and n % 2 == 0:
        return None
    one = views.lattice(n, reach(n, radius)).offsets
    two = one * torch.tensor([1.0, -1.0])
    if count % 2 == 0:
        return torch.cat([one, two])
    weights = torch.full((count,), 1 / (2 * n))
    weights[n // 2] *= 2
    return Views(torch.cat([one, two[torch.arange(n) != n // 2]]), weights)


def sobol(count: int, radius: int, seed: int) -> torch.Tensor:
    return views.sobol(count, radius, seed).offsets


def mirrored_sobol(count: int, radius: int, seed: int) -> torch.Tensor:
    """Half of the points and their mirror images, with the variance of the full grid."""
    engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    half = 2 * engine.draw(count // 2, dtype=torch.float64) - 1
    points = torch.cat([half, -half, torch.zeros(count % 2, 2, dtype=torch.float64)])
    return (points * (moments(radius)[0] / points.square().mean(0)).sqrt()).float()


def ring_of(count: int, distance: float, variance: float) -> Views:
    """The identity and a ring of count - 1 views, with weights that match the variance."""
    angles = torch.arange(count - 1, dtype=torch.float64) * (2 * math.pi / (count - 1))
    circle = (distance * torch.stack([angles.sin(), angles.cos()], 1)).round().float()
    share = min(1, 2 * variance / circle.square().sum(1).mean().item())
    weights = torch.tensor([1 - share] + [share / (count - 1)] * (count - 1))
    return Views(torch.cat([torch.zeros(1, 2), circle]), weights)


def ring(count: int, radius: int, seed: int) -> Views:
    """A ring with the variance of the continuous square."""
    return ring_of(count, radius, radius**2 / 3)


def matched_ring(count: int, radius: int, seed: int) -> Views:
    return ring_of(count, radius, moments(radius)[0])


def far_ring(count: int, radius: int, seed: int) -> Views:
    """Matched, at the distance that also has the fourth moment of the full grid."""
    m2, m4 = moments(radius)
    return ring_of(count, math.sqrt((m4 + m2**2) / m2), m2)


def equal_ring(count: int, radius: int, seed: int) -> torch.Tensor:
    """A ring with equal weights, matched by its distance."""
    m2 = moments(radius)[0]
    return ring_of(count, math.sqrt(2 * m2 * count / (count - 1)), m2).offsets


def radon(count: int, radius: int, seed: int) -> Views | None:
    """Seven views close to Radon's formula (1948), with weights that match the variance.

    Four at (+-v, +-u), two at (+-far, 0). Before rounding, all moments up to degree 5 are exact.
    """
    if count != 7:
        return None
    m2, m4 = moments(radius)
    far, u, v = (round(math.sqrt(n)) for n in ((m4 + m2**2) / m2, m4 / m2, m2))
    corner = m2 / (4 * u**2)
    end = (m2 - 4 * corner * v**2) / (2 * far**2)
    points = [(0, 0), (-far, 0), (far, 0), (-v, -u), (-v, u), (v, -u), (v, u)]
    weights = [1 - 2 * end - 4 * corner, end, end, *[corner] * 4]
    return Views(torch.tensor(points, dtype=torch.float32), torch.tensor(weights))


def random(count: int, radius: int, seed: int) -> torch.Tensor:
    """``count`` random offsets of the full grid."""
    whole = views.grid(radius).offsets
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return whole[order[:count]]


# Offsets are rounded to whole pixels, which need no interpolation. None: no design of this count.
DESIGNS: dict[str, Callable[[int, int, int], Design | None]] = {
    "lattice, matched": matched_lattice,
    "lattice to the edge": lattice,
    "lattice modulo n, matched": modulo_n,
    "two lattices, matched": two_lattices,
    "grid, matched": matched_grid,
    "grid to the edge": grid,
    "Gauss grid": gauss_grid,
    "Radon": radon,
    "ring": ring,
    "ring, matched": matched_ring,
    "ring, matched to degree 4": far_ring,
    "ring, equal weights": equal_ring,
    "Sobol": sobol,
    "Sobol, mirrored, matched": mirrored_sobol,
    "random": random,
}
SEEDS = {"Sobol": 5, "Sobol, mirrored, matched": 5, "random": 5}  # pooled
SUBPIXEL = {"lattice, matched": matched_lattice, "grid, matched": matched_grid}


PLOTTED = {
    "lattice, matched": "lattice, matched (views.best)",
    "lattice to the edge": "lattice to the edge",
    "two lattices, matched": "two lattices, matched",
    "ring, equal weights": "ring, equal weights",
    "ring, matched": "ring, matched by weights",
    "grid, matched": "grid, matched",
    "grid to the edge": "grid to the edge",
    "Sobol": "Sobol",
    "random": "random",
    "lattice, matched, between pixels, bilinear": "lattice between pixels, bilinear",
    "lattice, matched, between pixels, bicubic": "lattice between pixels, bicubic",
}


class Trial:
    """A design of one count and radius: its views and its errors."""

    def __init__(self, name: str, count: int, radius: int, design: Design, how: int) -> None:
        self.name, self.count, self.radius, self.how = name, count, radius, how
        self.offsets, self.weights, _ = views.resolve(design)
        self.index = torch.empty(0, dtype=torch.long)  # [V], into the views of all trials
        self.errors: list[list[float]] = []  # [frames][layers]


def plan() -> tuple[list[Trial], torch.Tensor]:
    """All trials, the full grids first, and their distinct views.

    A view is (interpolation, dy, dx), [U, 3]; for whole pixels the interpolation is 0.
    """
    trials = [Trial("whole", (2 * r + 1) ** 2, r, views.grid(r).offsets, 0) for r in RADII]
    for radius, count in itertools.product(RADII, COUNTS):
        if count >= (2 * radius + 1) ** 2:
            continue
        for name, make in DESIGNS.items():
            for seed in range(SEEDS.get(name, 1)):
                design = make(count, radius, seed)
                if isinstance(design, Views):
                    design = Views(design.offsets.round(), design.weights)
                if design is not None:
                    design = design if isinstance(design, Views) else design.round()
                    trials.append(Trial(name, count, radius, design, 0))
        if radius in SUBPIXEL_RADII and count in SUBPIXEL_COUNTS:
            for name, between in SUBPIXEL.items():
                offsets = between(count, radius, 0)
                for how, word in enumerate(INTERPOLATIONS):
                    if offsets is not None:
                        label = f"{name}, between pixels, {word}"
                        trials.append(Trial(label, count, radius, offsets, how))
    shown = [torch.zeros(1, 3)]  # the unshifted image
    for trial in trials:
        # Rounding errors of square roots may miss a whole pixel.
        offsets = trial.offsets.mul(2**16).round().div(2**16) + 0.0  # no -0
        between = (offsets != offsets.round()).any(1, keepdim=True)
        shown.append(torch.cat([trial.how * between, offsets], 1))
    every, index = torch.cat(shown).unique(dim=0, return_inverse=True)
    for trial, part in zip(trials, index[1:].split([len(s) for s in shown[1:]]), strict=True):
        trial.index = part
    return trials, every


# ---- measurement --------------------------------------------------------------------------------


def pictures(folders: list[Path], every: int, size: int) -> list[tuple[str, torch.Tensor]]:
    """Names and images [1, 3, H, W] in 0..1: the longer side about ``size``, in whole patches."""
    from PIL import Image

    found = []
    for folder in folders:
        paths = sorted(folder.rglob("*.jpg"))[::every]
        if not paths:
            raise typer.BadParameter(f"--frames must contain .jpg frames; got {folder}")
        for path in paths:
            picture = Image.open(path).convert("RGB")
            scale = size / max(picture.size)
            width, height = (max(16, 16 * round(n * scale / 16)) for n in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
            found.append((f"{path.parent.name}/{path.stem}", pixels))
    return found


def tokens_of(vit: Any, image: torch.Tensor, shown: torch.Tensor) -> list[torch.Tensor]:
    """Tokens [U, 1, N, C] of each layer, for the views ``shown`` [U, 3] of an image [1, 3, H, W].

    The views must be sorted by interpolation.
    """
    parts = []
    chunks = [
        (word, chunk)
        for how, word in enumerate(INTERPOLATIONS)
        for chunk in shown[shown[:, 0] == how, 1:].split(BATCH)
    ]
    for word, chunk in chunks:
        moved = srt_ext.shift(image, chunk, interpolation=word).flatten(0, 1)
        parts.append(
            vit.forward_intermediates(
                moved, indices=list(LAYERS), norm=True, output_fmt="NLC", intermediates_only=True
            )
        )
    return [torch.cat(layer)[:, None] for layer in zip(*parts, strict=True)]


def measure(weights: Path, folders: list[Path], every: int, size: int) -> dict[str, Any]:
    from srt_ext.hub import load_timm

    vit, config = load_timm(MODEL, weights)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    trials, shown = plan()
    offsets = shown[:, 1:]
    frames = pictures(folders, every, size)
    plain = (offsets == 0).all(1).nonzero()[0]
    effects: dict[int, list[list[float]]] = {radius: [] for radius in RADII}
    start = time.perf_counter()
    for done, (name, pixels) in enumerate(frames):
        with torch.inference_mode():
            layers = tokens_of(vit, (pixels - mean) / std, shown)
        shape = [n // 16 for n in pixels.shape[2:]]

        def field(
            tokens: torch.Tensor,
            index: torch.Tensor,
            share: torch.Tensor | None = None,
            shape: list[int] = shape,
        ) -> torch.Tensor:
            return srt_ext.ensemble(
                tokens[index], offsets[index], shape, (16, 16), share, stride=STRIDE
            )

        for trial in trials:
            trial.errors.append([])
        for tokens in layers:
            base = field(tokens, plain)
            wholes = {t.radius: field(tokens, t.index) for t in trials if t.name == "whole"}
            effect = {radius: (base - whole).norm().item() for radius, whole in wholes.items()}
            for radius, whole in wholes.items():
                if len(effects[radius]) == done:
                    effects[radius].append([])
                effects[radius][done].append(effect[radius] / whole.norm().item())
            for trial in trials:
                distance = field(tokens, trial.index, trial.weights) - wholes[trial.radius]
                trial.errors[done].append(distance.norm().item() / effect[trial.radius])
        print(f"{done + 1} of {len(frames)}: {name}, {time.perf_counter() - start:.0f} s")
    return {
        "frames": [name for name, _ in frames],
        "size": size,
        "layers": list(LAYERS),
        "stride": STRIDE,
        "seconds": round(time.perf_counter() - start),
        "effect": {str(radius): summary(errors) for radius, errors in effects.items()},
        "rows": rows(trials),
    }


def summary(errors: list[list[float]]) -> Row:
    """Quartiles over the frames, for each layer and for the mean of the layers."""
    table = np.array(errors)  # [F, L]
    columns = {str(layer): table[:, i] for i, layer in enumerate(LAYERS)}
    columns["mean"] = table.mean(1)
    return {
        name: {key: round(value, 5) for key, value in quartiles(column.tolist()).items()}
        for name, column in columns.items()
    }


def rows(trials: list[Trial]) -> list[Row]:
    """One row per design, count and radius; seeds count as frames."""
    found: dict[tuple[str, int, int], list[Trial]] = {}
    for trial in trials:
        if trial.name != "whole":
            found.setdefault((trial.name, trial.count, trial.radius), []).append(trial)
    return [
        {
            "design": name,
            "views": count,
            "radius": radius,
            "weighted": pooled[0].weights is not None,
            "error": summary([errors for trial in pooled for errors in trial.errors]),
        }
        for (name, count, radius), pooled in found.items()
    ]


# ---- tables and plot ----------------------------------------------------------------------------


def table(results: Row, count: int) -> str:
    """Median errors of the designs of one count by radius and layer, best design first."""
    chosen = [row for row in results["rows"] if row["views"] == count]
    radii = sorted({row["radius"] for row in chosen})
    at = {(row["design"], row["radius"]): row["error"] for row in chosen}
    columns = [(radius, layer) for radius in radii for layer in map(str, results["layers"])]

    def overall(name: str) -> float:
        errors = [at[name, r]["mean"]["median"] for r in radii if (name, r) in at]
        return sum(errors) / len(errors) if len(errors) == len(radii) else math.inf

    names = sorted(dict.fromkeys(row["design"] for row in chosen), key=overall)
    best = {
        (r, layer): min(at[name, r][layer]["median"] for name in names if (name, r) in at)
        for r, layer in columns
    }
    weighted = {row["design"] for row in chosen if row["weighted"]}
    lines = []
    for name in names:
        cells = []
        for r, layer in columns:
            value = at[name, r][layer]["median"] if (name, r) in at else None
            text = "-" if value is None else f"{value:.3f}"
            cells.append(f"**{text}**" if value == best[r, layer] else text)
        total = overall(name)
        mean = "-" if math.isinf(total) else f"{total:.3f}"
        lines.append([name + (" (weights)" if name in weighted else ""), mean, *cells])
    head = ["design", "mean", *(f"{radius} px, layer {layer}" for radius, layer in columns)]
    return markdown(head, lines)


def document(results: Row) -> str:
    """views.md."""
    facts, layers = results["machine"], results["layers"]
    parts = [
        "# views",
        "![Error against the number of views](views.svg)",
        f"ViT-Ti/16, {len(results['frames'])} frames, longer side {results['size']} pixels, "
        f"bilinear upsampling, stride {results['stride']}; "
        f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}, "
        f"{results['seconds']} s.",
        "Error: ||design - full|| / ||plain - full||, medians over the frames. Design: mean field "
        "of the views of the design. Full: mean field of all whole-pixel offsets up to the radius. "
        "Plain: field of the unshifted image. The JSON has the quartiles. All designs are rounded "
        'to whole pixels, except the rows that say "between pixels". The column mean is over '
        "radii and layers; the rows are ordered by it. Bold: the least of a column.",
        "## Effect of SRT: ||plain - full|| / ||full||",
        markdown(
            ["radius", *(f"layer {layer}" for layer in layers)],
            (
                [f"{radius} px", *(f"{effect[str(layer)]['median']:.3f}" for layer in layers)]
                for radius, effect in results["effect"].items()
            ),
        ),
    ]
    for count in COUNTS:
        parts += [f"## {count} views", table(results, count)]
    return "\n\n".join(parts) + "\n"


def plot(results: Row, path: Path) -> None:
    """The error (mean over the layers) against the number of views, at two radii."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    colours = pyplot.get_cmap("tab10")
    for axis, radius in zip(axes, SUBPIXEL_RADII, strict=True):
        for i, (name, label) in enumerate(PLOTTED.items()):
            chosen = [r for r in results["rows"] if (r["design"], r["radius"]) == (name, radius)]
            points = [(row["views"], row["error"]["mean"]["median"]) for row in chosen]
            best = i == 0
            style = {"color": "black", "linewidth": 2.5, "zorder": 3} if best else {}
            style = style or {
                "color": colours(i - 1),
                "linestyle": "--" if "between" in name else "-",
            }
            axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        axis.set(xscale="log", yscale="log", xlabel="views", title=f"radius {radius} pixels")
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.set_yticks(ticks := [0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.9], [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error / effect of SRT")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def main(
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the ViT-Ti/16 (.safetensors).")
    ] = None,
    frames: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with .jpg frames, searched recursively; repeatable."),
    ] = None,
    every: Annotated[int, typer.Option(help="Use every N-th frame of a folder.")] = 10,
    size: Annotated[int, typer.Option(help="Longer side of a frame in pixels.")] = 256,
    output: Path = RESULTS / "views.json",
) -> None:
    """Measure; write the JSON, the tables and the plot."""
    if (weights is None) != (not frames):
        raise typer.BadParameter("--weights and --frames must be given together")
    if weights and frames:
        found = measure(weights, frames, every, size)
        save({"machine": machine(), **found}, output)
    results = load(output)
    output.with_suffix(".md").write_text(document(results))
    plot(results, output.with_suffix(".svg"))
    print(document(results))


if __name__ == "__main__":
    typer.run(main)
