"""``python -m benchmarks.views``: what is lost with fewer views.

The mean field of a design of few views against that of the grid of all whole pixels of the same
radius, on real frames through a real ViT-Ti/16. The error is a share of what SRT changes at all:
the distance from the field of the whole grid, over that of the plain picture's field. Writes
benchmarks/results/views.json, and views.md and views.svg beside it; without ``--weights`` and
``--frames`` the latter two again from the JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import srt_ext
from benchmarks.common import RESULTS, load, machine, quartiles, save
from benchmarks.report import _save, markdown
from srt_ext import views
from srt_ext.views import Weighted

RADII = (2, 3, 5, 8)
# Of each radius, and of the two that are plotted.
COUNTS, MORE_COUNTS, PLOTTED = (4, 7, 9, 16), (4, 5, 7, 9, 13, 16, 25), (3, 8)
LAYERS = (3, 7, 11)  # of 12, from 0; each through the last normalisation
STRIDE = 4
BATCH = 16  # views in one forward

Offsets = torch.Tensor | Weighted
Row = dict[str, Any]


# ---- designs ------------------------------------------------------------------------------------
# Each stands for the grid of whole pixels of a radius; None where it has no design of that count.


def moments(radius: int) -> tuple[float, float]:
    """Means of d^2 and d^4 over -radius, ..., radius."""
    m2 = radius * (radius + 1) / 3
    return m2, m2 * (3 * radius**2 + 3 * radius - 1) / 5


def side(count: int) -> int | None:
    root = math.isqrt(count)
    return root if root**2 == count else None


def evenly(count: int, radius: int) -> float:
    """How far ``count`` values evenly spaced must reach to have the variance of the whole grid."""
    return math.sqrt(3 * moments(radius)[0] * (count - 1) / (count + 1))


def product(nodes: Iterable[float], weights: Iterable[float] | None = None) -> Offsets:
    axis = torch.tensor(list(nodes), dtype=torch.float32)
    offsets = torch.cartesian_prod(axis, axis)
    if weights is None:
        return offsets
    share = torch.tensor(list(weights), dtype=torch.float32)
    return Weighted(offsets, torch.outer(share, share).flatten())


def grid(count: int, radius: int, seed: int) -> Offsets | None:
    k = side(count)
    return product(np.linspace(-radius, radius, k)) if k else None


def matched_grid(count: int, radius: int, seed: int) -> Offsets | None:
    k = side(count)
    return product(np.linspace(-1, 1, k) * evenly(k, radius)) if k else None


def whole_grid(count: int, radius: int, seed: int) -> Offsets | None:
    """The matched grid, each line moved to the nearest whole pixel: nothing is interpolated."""
    k = side(count)
    return product(np.rint(np.linspace(-1, 1, k) * evenly(k, radius))) if k else None


def chebyshev_grid(count: int, radius: int, seed: int) -> Offsets | None:
    """Equal weights, and on each axis the second and fourth moment of the whole grid."""
    k = side(count)
    if k is None or k not in (4, 5):
        return None
    m2, m4 = moments(radius)
    mean, square = k * m2 / 4, k * m4 / 4  # of the two squared nodes, and of their squares
    far, near = (mean + sign * math.sqrt(square - mean**2) for sign in (1, -1))
    if near < 0:
        return None
    positive = [math.sqrt(near), math.sqrt(far)]
    return product([-n for n in positive] + [0.0] * (k - 4) + positive)


def gauss_grid(count: int, radius: int, seed: int) -> Offsets | None:
    """Gauss's rule for sums over -radius, ..., radius: exact to degree 2 k - 1 on each axis."""
    k, n = side(count), 2 * radius + 1
    if k is None or k >= n:
        return None
    j = np.arange(1, k)  # the recurrence of the polynomials of Gram
    beside = np.sqrt(j**2 * (n**2 - j**2) / (4 * (4 * j**2 - 1)))
    nodes, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return product(nodes, vectors[0] ** 2)


def lattice(count: int, radius: int, seed: int) -> Offsets:
    return views.lattice(count, radius)


def matched_lattice(count: int, radius: int, seed: int) -> torch.Tensor:
    return views.lattice(count, evenly(count, radius))


def whole_lattice(count: int, radius: int, seed: int) -> Offsets:
    """The matched lattice, each view moved to the nearest whole pixel: nothing is interpolated."""
    return matched_lattice(count, radius, seed).round()


def modulo_n(count: int, radius: int, seed: int) -> Offsets | None:
    """The lattice without the moduli n + 1."""
    index = np.arange(count)
    best, offsets = 0.0, None
    for g in range(1, count):
        odd = g % 2 == 1
        if math.gcd(g, count) == 1:
            order = (g * index + (g - 1 if odd else g - 1 + count) // 2) % count
            points = np.stack([index, order], 1) * 2 - (count - 1)
            apart = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(count)
            if apart.min() > best + 1e-9:
                best, offsets = apart.min(), points * (evenly(count, radius) / (count - 1))
    return torch.tensor(offsets, dtype=torch.float32)


def two_lattices(count: int, radius: int, seed: int) -> Offsets | None:
    """A lattice and its mirror image: dy and dx do not correlate. What both have is run once."""
    n = (count + 1) // 2
    if count % 2 and n % 2 == 0:
        return None
    one = views.lattice(n, evenly(n, radius))
    two = one * torch.tensor([1.0, -1.0])
    if count % 2 == 0:
        return torch.cat([one, two])
    apart = two[torch.arange(n) != n // 2]
    weights = torch.full((count,), 1 / (2 * n))
    weights[n // 2] *= 2
    return Weighted(torch.cat([one, apart]), weights)


def sobol(count: int, radius: int, seed: int) -> Offsets:
    return views.sobol(count, radius, seed)


def mirrored_sobol(count: int, radius: int, seed: int) -> Offsets:
    """Half of the points, and their mirror images, at the variance of the whole grid."""
    engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    half = 2 * engine.draw(count // 2, dtype=torch.float64) - 1
    points = torch.cat([half, -half, torch.zeros(count % 2, 2, dtype=torch.float64)])
    return (points * (moments(radius)[0] / points.square().mean(0)).sqrt()).float()


def ring_of(count: int, square: float, share: float, turn: float = 0) -> Weighted:
    """The picture, and count - 1 views at the root of ``square`` that have ``share`` of the sum."""
    n = count - 1
    angles = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n) + turn
    circle = math.sqrt(square) * torch.stack([angles.sin(), angles.cos()], 1)
    offsets = torch.cat([torch.zeros(1, 2), circle.float()])
    return Weighted(offsets, torch.tensor([1 - share] + [share / n] * n))


def ring(count: int, radius: int, seed: int) -> Offsets:
    """At the radius, with the variance of the continuous square."""
    return ring_of(count, radius**2, 2 / 3)


def ring_of_grid(count: int, radius: int, seed: int) -> Offsets:
    """At the radius, with the variance of the whole grid."""
    return ring_of(count, radius**2, 2 * moments(radius)[0] / radius**2)


def ring_to_degree_4(count: int, radius: int, seed: int) -> Offsets:
    """Second and fourth moments of the distance from the middle are those of the whole grid."""
    m2, m4 = moments(radius)
    second, fourth = 2 * m2, 2 * m4 + 2 * m2**2
    return ring_of(count, fourth / second, second**2 / fourth)


def equal_ring(count: int, radius: int, seed: int) -> Offsets:
    """Equal weights at the variance of the whole grid, so that a median can use it."""
    return ring_of(count, 2 * moments(radius)[0] * count / (count - 1), 1 - 1 / count).offsets


def radon(count: int, radius: int, seed: int) -> Offsets | None:
    """Seven views with all moments of the whole grid up to degree 5 (Radon, 1948)."""
    if count != 7:
        return None
    m2, m4 = moments(radius)
    corner = m2**2 / (4 * m4)  # four at (+-sqrt(m2), +-sqrt(m4 / m2))
    y2, y4 = m2 - 4 * corner * m2, m4 - 4 * corner * m2**2  # what two on an axis must add
    far, u, v = math.sqrt(y4 / y2), math.sqrt(m2), math.sqrt(m4 / m2)
    end = y2 / (2 * far**2)
    points = [(0, 0), (-far, 0), (far, 0), (-u, -v), (-u, v), (u, -v), (u, v)]
    weights = [1 - 2 * end - 4 * corner, end, end, *[corner] * 4]
    return Weighted(torch.tensor(points), torch.tensor(weights))


def random(count: int, radius: int, seed: int) -> Offsets:
    """As many of the whole grid, without putting back."""
    whole = views.grid(radius)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return whole[order[:count]]


# Name: the design, and how many seeds of it are pooled.
DESIGNS: dict[str, tuple[Callable[[int, int, int], Offsets | None], int]] = {
    "grid to the edge": (grid, 1),
    "grid, matched": (matched_grid, 1),
    "grid, matched, whole pixels": (whole_grid, 1),
    "Chebyshev grid": (chebyshev_grid, 1),
    "Gauss grid": (gauss_grid, 1),
    "lattice to the edge": (lattice, 1),
    "lattice, matched": (matched_lattice, 1),
    "lattice, matched, whole pixels": (whole_lattice, 1),
    "lattice modulo n, matched": (modulo_n, 1),
    "two lattices, matched": (two_lattices, 1),
    "Sobol": (sobol, 2),
    "Sobol, mirrored, matched": (mirrored_sobol, 2),
    "ring": (ring, 1),
    "ring, grid's variance": (ring_of_grid, 1),
    "ring, to degree 4": (ring_to_degree_4, 1),
    "ring, equal weights": (equal_ring, 1),
    "Radon": (radon, 1),
    "random": (random, 3),
}


class Trial:
    """One design of one count and radius: which of all offsets it has, and what it loses."""

    def __init__(self, name: str, count: int, radius: int, design: Offsets) -> None:
        self.name, self.count, self.radius = name, count, radius
        weighted = isinstance(design, Weighted)
        self.offsets, self.weights = design if weighted else (design, None)
        self.index = torch.empty(0, dtype=torch.long)  # [V], into the offsets of all trials
        self.errors: list[list[float]] = []  # of a frame: of each layer


def plan() -> tuple[list[Trial], torch.Tensor]:
    """All trials, the whole grids first, and their offsets [U, 2], each once."""
    trials = [Trial("whole", (2 * r + 1) ** 2, r, views.grid(r)) for r in RADII]
    for radius in RADII:
        for count in MORE_COUNTS if radius in PLOTTED else COUNTS:
            for name, (make, seeds) in DESIGNS.items():
                for seed in range(seeds):
                    design = make(count, radius, seed)
                    if design is not None:
                        trials.append(Trial(name, count, radius, design))
                        assert len(trials[-1].offsets) == count, (name, count, radius)
    plain = torch.zeros(1, 2)
    # Whole pixels that come out of a square root count as whole ones; and no -0.
    every = [trial.offsets.mul(2**16).round().div(2**16) + 0.0 for trial in trials]
    offsets, index = torch.cat([plain, *every]).unique(dim=0, return_inverse=True)
    parts = index[1:].split([len(trial.offsets) for trial in trials])
    for trial, part in zip(trials, parts, strict=True):
        trial.index = part
    return trials, offsets


# ---- measurement --------------------------------------------------------------------------------


def pictures(folders: list[Path], every: int, size: int) -> list[tuple[str, torch.Tensor]]:
    """Names, and values [1, 3, H, W] from 0 to 1: the longer side ``size``, whole patches."""
    from PIL import Image

    found = []
    for folder in folders:
        paths = sorted(folder.rglob("*.jpg"))[::every]
        if not paths:
            raise typer.BadParameter(f"--frames must hold .jpg frames; got {folder}")
        for path in paths:
            picture = Image.open(path).convert("RGB")
            scale = size / max(picture.size)
            width, height = (max(16, 16 * round(n * scale / 16)) for n in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
            found.append((f"{path.parent.name}/{path.stem}", pixels))
    return found


def tokens_of(vit: Any, image: torch.Tensor, offsets: torch.Tensor, how: str) -> list[torch.Tensor]:
    """Of each layer the tokens [U, 1, N, C] of the views of one image [1, 3, H, W]."""
    parts = []
    for chunk in offsets.split(BATCH):
        shown = srt_ext.shift(image, chunk, interpolation=how).flatten(0, 1)
        parts.append(
            vit.forward_intermediates(
                shown, indices=list(LAYERS), norm=True, output_fmt="NLC", intermediates_only=True
            )
        )
    return [torch.cat(layer)[:, None] for layer in zip(*parts, strict=True)]


def measure(
    weights: Path, folders: list[Path], every: int, size: int, interpolation: str
) -> dict[str, Any]:
    from srt_ext.backbones import load_timm
    from srt_ext.command import DEFAULT_MODEL

    vit, config = load_timm(DEFAULT_MODEL, weights)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    trials, offsets = plan()
    frames = pictures(folders, every, size)
    plain = (offsets == 0).all(1).nonzero()[0]
    effects: dict[int, list[list[float]]] = {radius: [] for radius in RADII}
    start = time.perf_counter()
    for done, (name, pixels) in enumerate(frames):
        with torch.inference_mode():
            layers = tokens_of(vit, (pixels - mean) / std, offsets, interpolation)
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
        "interpolation": interpolation,
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
    """One for each design, count and radius; seeds count as frames."""
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
    """Designs of one count, the best first: the median error of each radius and layer."""
    chosen = [row for row in results["rows"] if row["views"] == count]
    radii = RADII if count in COUNTS else PLOTTED
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
        f"{results['interpolation']} shifts, bilinear upsampling, stride {results['stride']}; "
        f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}, "
        f"{results['seconds']} s. Medians over the frames of ||design - whole|| / ||plain - "
        "whole||, where whole is the mean over all whole pixels up to the radius and plain the "
        "untouched picture; quartiles are in the JSON. The column mean is over radii and layers, "
        "and orders the rows. The least of a column is bold.",
        "## What SRT changes at all: ||plain - whole|| / ||whole||",
        markdown(
            ["radius", *(f"layer {layer}" for layer in layers)],
            (
                [f"{radius} px", *(f"{effect[str(layer)]['median']:.3f}" for layer in layers)]
                for radius, effect in results["effect"].items()
            ),
        ),
    ]
    for count in MORE_COUNTS:
        parts += [f"## {count} views", table(results, count)]
    return "\n\n".join(parts) + "\n"


def plot(results: Row, path: Path) -> None:
    """The error (mean of the layers) against the number of views, at two radii."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    colours = pyplot.get_cmap("tab20")
    for axis, radius in zip(axes, PLOTTED, strict=True):
        for i, name in enumerate(DESIGNS):
            chosen = [r for r in results["rows"] if (r["design"], r["radius"]) == (name, radius)]
            points = [(row["views"], row["error"]["mean"]["median"]) for row in chosen]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=name, color=colours(i % 20))
        axis.set(xscale="log", yscale="log", xlabel="views", title=f"radius {radius} pixels")
        axis.set_xticks(MORE_COUNTS, [str(count) for count in MORE_COUNTS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error, as a share of what SRT changes")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def main(
    weights: Annotated[Path | None, typer.Option(help="ViT-Ti/16 weights, .safetensors.")] = None,
    frames: Annotated[
        list[Path] | None, typer.Option(help="A folder with .jpg frames in or below it; repeat.")
    ] = None,
    every: Annotated[int, typer.Option(help="Take each so-many-th frame of a folder.")] = 10,
    size: Annotated[int, typer.Option(help="Longer side of a frame, pixels.")] = 256,
    interpolation: str = "bilinear",
    output: Path = RESULTS / "views.json",
) -> None:
    """Measures, writes the JSON, the tables and the plot."""
    if (weights is None) != (not frames):
        raise typer.BadParameter("--weights and --frames must be given together")
    if weights and frames:
        found = measure(weights, frames, every, size, interpolation)
        save({"machine": machine(), **found}, output)
    results = load(output)
    output.with_suffix(".md").write_text(document(results))
    plot(results, output.with_suffix(".svg"))
    print(document(results))


if __name__ == "__main__":
    typer.run(main)
