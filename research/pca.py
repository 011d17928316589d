"""``python -m research.pca --data DIR --weights FILE``: quality of compressed stored fields.

Measures the tasks of :mod:`research.quality` on fields of the default preset that are stored as K
components instead of all channels, or in 16 bits. ``DIR`` contains ``davis`` and ``camvid``. Writes
research/results/pca.json and pca.md; without ``--data`` regenerates pca.md from the JSON.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from benchmarks.common import MODEL, load, machine, save
from benchmarks.report import markdown
from research import RESULTS
from research.quality import data as sets
from research.quality import davis, discovery, probes, retrieval
from research.quality.__main__ import bar
from research.quality.fields import Fields, Network
from research.quality.report import paired
from research.quality.settings import Setting
from srt_ext.srt import DEFAULT, PRESETS

STRIDE = 8  # pixels
COUNTS = (8, 16, 32, 64, 96, 128)  # of components
CENTERED = (16, 32, 64)  # components of a centered PCA, for comparison
HALVES = ("float16", "bfloat16")
CELLS = 256  # per image, to fit a basis
FRAMES = 5  # per sequence, to fit a basis

# Task and score of each column of the table: its heading.
SCORES = {
    ("davis", "J"): "DAVIS J",
    ("davis", "F"): "DAVIS F",
    ("camvid", "miou"): "CamVid mIoU",
    ("discovery", "IoU"): "discovery IoU",
    ("retrieval", "mAP"): "retrieval mAP",
}

Row = dict[str, Any]


class Key(NamedTuple):
    """The storage of a field, as in the rows of the JSON."""

    channels: int
    dtype: str
    centered: bool


class Basis(NamedTuple):
    """A basis for cells x [C]: the first K values of components @ (x - mean) are stored."""

    mean: torch.Tensor  # [C]
    components: torch.Tensor  # [C, C]: rows of length 1, the largest eigenvalue first

    def kept(self, cells: torch.Tensor) -> dict[int, float]:
        """By K, the share of the energy, sum |x - mean|^2 over cells [N, C], in K components."""
        energy = ((cells - self.mean) @ self.components.T).double().square().sum(0)
        shares = (energy.cumsum(0) / energy.sum()).tolist()
        return {k: round(shares[k - 1], 5) for k in counts(len(shares))}


def fit(cells: torch.Tensor, centered: bool = False) -> Basis:
    """Eigenvectors of cells^T cells, cells [N, C]; of the covariance if centered."""
    mean = cells.mean(0) if centered else torch.zeros_like(cells[0])
    x = (cells - mean).double()
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors  # columns, ascending
    return Basis(mean, vectors.T.flip(0).to(cells))


def counts(channels: int) -> list[int]:
    return [k for k in COUNTS if k < channels]


@dataclass(frozen=True)
class Stored(Setting):
    """A setting whose field is stored and read back."""

    channels: int = 0  # components; 0: all channels as they are
    dtype: str = "float32"
    centered: bool = False
    basis: Basis | None = field(default=None, compare=False, repr=False)

    def row(self) -> Row:
        return Key(self.channels, self.dtype, self.centered)._asdict()

    def stored(self, field: torch.Tensor) -> torch.Tensor:
        if self.channels:
            assert self.basis is not None
            mean, components = self.basis.mean[:, None, None], self.basis.components
            field = torch.einsum("kc,chw->khw", components[: self.channels], field - mean)
        return field.to(getattr(torch, self.dtype)).float()


def preset(patch: int, layer: int, **storage: Any) -> Stored:
    """The default preset of :class:`srt_ext.SRT`."""
    scale, views = PRESETS[DEFAULT]
    design = f"best:{views}:{3 * patch // 8}"
    return Stored("both", design, layer, STRIDE, scale=scale, **storage)


def storages(network: Network, cells: torch.Tensor) -> list[Setting]:
    """All compared storages, fitted on cells [N, C]; the first is the unchanged field."""
    of = partial(preset, network.patch, network.layers[-1], basis=fit(cells))
    kept = counts(cells.shape[1])
    found = [of(), *(of(dtype=half) for half in HALVES)]
    found += [of(channels=k) for k in kept]
    found += [of(channels=k, dtype=half) for k in kept if k == 64 for half in HALVES]
    basis = fit(cells, centered=True)
    found += [of(channels=k, centered=True, basis=basis) for k in kept if k in CENTERED]
    return [*found]


def sample(network: Network, pictures: list[np.ndarray], seed: int = 0) -> torch.Tensor:
    """Random cells [N, C] of the fields of images [H, W, 3] uint8, CELLS per image."""
    fields = Fields(network, [preset(network.patch, network.layers[-1])])
    generator = torch.Generator().manual_seed(seed)
    found = []
    with bar("basis", len(pictures)) as progress:
        for pixels in pictures:
            cells = fields.of(pixels)[0].flatten(1).T.cpu()
            found.append(cells[torch.randperm(len(cells), generator=generator)[:CELLS]])
            progress()
    return torch.cat(found).to(network.device)


# ---- measurements -------------------------------------------------------------------------------


def on_davis(network: Network, data: Path, height: int, frames: int) -> tuple[list[Row], list[Row]]:
    """Scores and energies. The basis for a sequence is fitted on the other sequences."""
    folder, rows, kept = data / "davis", [], []
    found = {case.item: case for case in discovery.cases(data, height, 0, frames, 0)}
    found = {name: case for name, case in found.items() if case.task == "discovery"}
    cells = {}
    for name in found:
        paths = sets.chosen([path for path, _ in sets.davis_frames(folder, name, 0)], FRAMES)
        cells[name] = sample(network, [sets.opened(p, height, network.patch) for p in paths])
    for name, case in found.items():
        others = torch.cat([part for other, part in cells.items() if other != name])
        kept += energy("DAVIS", name, others, cells[name])
        wanted, protocol = storages(network, others), davis.Protocol(height, frames)
        with bar(f"DAVIS {name}", frames + 1) as progress:
            scores = davis.run(network, wanted, folder, name, protocol, progress)
        rows += labelled("davis", name, wanted, scores)
        with bar(f"discovery {name}", len(case.examples)) as progress:
            scores = discovery.run(network, wanted, case.examples, case.protocol, progress)
        rows += labelled("discovery", name, wanted, scores)
    return rows, kept


def on_camvid(
    network: Network, data: Path, height: int, pictures: int, points: int
) -> tuple[list[Row], list[Row]]:
    """Scores and energies. The basis is fitted on the training images."""
    train, test = (
        sets.camvid(data / "camvid", part, pictures, height, network.patch)
        for part in ("train", "test")
    )
    cells = [sample(network, [picture.pixels for picture in part]) for part in (train, test)]
    wanted = storages(network, cells[0])
    head = probes.Protocol(height, pictures, pictures, points)
    with bar("CamVid", len(train) + len(test)) as progress:
        scores = probes.segmentation(network, wanted, train, test, head, progress)
    rows = labelled("camvid", "", wanted, scores)
    searched = retrieval.Protocol(height, pictures)
    with bar("retrieval", len(test)) as progress:
        for item, found in retrieval.run(network, wanted, test, searched, progress).items():
            rows += labelled("retrieval", item, wanted, found)
    return rows, energy("CamVid", "", *cells)


def energy(data: str, item: str, fitted: torch.Tensor, unseen: torch.Tensor) -> list[Row]:
    """Shares of energy in K components: cells [N, C] for the fit, and unseen cells."""
    basis = fit(fitted)
    return [
        {"data": f"{data}, {of}", "item": item, "shares": basis.kept(cells)}
        for of, cells in (("fitted", fitted), ("unseen", unseen))
    ]


def labelled(
    task: str, item: str, wanted: list[Setting], scores: list[dict[str, float]]
) -> list[Row]:
    shown = [name for of, name in SCORES if of == task]
    return [
        {"task": task, "item": item, **s.row(), "scores": {n: round(found[n], 5) for n in shown}}
        for s, found in zip(wanted, scores, strict=True)
    ]


# ---- tables -------------------------------------------------------------------------------------


def gathered(results: Row) -> dict[Key, dict[tuple[str, str], list[float]]]:
    """The values of the items, by storage, and by task and score."""
    found: dict[Key, dict[tuple[str, str], list[float]]] = {}
    for row in results["rows"]:
        key = Key(*(row[name] for name in Key._fields))
        scores = found.setdefault(key, {})
        for name, value in row["scores"].items():
            scores.setdefault((row["task"], name), []).append(value)
    return found


def words(key: Key) -> str:
    parts = [f"{key.channels} components" if key.channels else "all channels"]
    if key.centered:
        parts.append("centered")
    if key.dtype != "float32":
        parts.append(key.dtype)
    return ", ".join(parts)


def table(results: Row) -> str:
    """Bytes per cell and mean scores of each storage."""
    found = gathered(results)
    plain = found[Key(0, "float32", False)]["davis", "J"]
    lines = []
    for key, scores in found.items():
        size = 2 if key.dtype in HALVES else 4
        cells = [f"{np.mean(scores[name]):.3f}" for name in SCORES]
        differences = [a - b for a, b in zip(scores["davis", "J"], plain, strict=True)]
        over = paired(differences) if any(differences) else ""
        lines.append([words(key), str(size * (key.channels or results["channels"])), *cells, over])
    return markdown(["stored", "bytes per cell", *SCORES.values(), "J above all channels"], lines)


def shares(results: Row) -> str:
    """Share of the energy in K components, means over the items."""
    names = list(dict.fromkeys(row["data"] for row in results["energy"]))
    kept = counts(results["channels"])
    lines = []
    for name in names:
        found = [row["shares"] for row in results["energy"] if row["data"] == name]
        lines.append([name, *(f"{np.mean([of[str(k)] for of in found]):.3f}" for k in kept)])
    return markdown(["components", *map(str, kept)], lines)


def document(results: Row) -> str:
    """pca.md."""
    facts = results["machine"]
    parts = [
        "# pca",
        f"{results['model']}, {results['channels']} channels, preset `{DEFAULT}`, stride {STRIDE}; "
        f"{results['protocol'].replace('picture', 'image')}; torch {facts['torch']}, commit "
        f"{facts['commit']}, {facts['date']}, {results['seconds']} s.",
        "K components: a cell x is stored as `components @ x`, as by `srt-ext features --pca`. "
        "Centered: as `components @ (x - mean)`, a PCA, for comparison. J above all channels: mean "
        "difference over the sequences, its standard error, and in how many it is above 0.",
        table(results),
        "## Energy",
        "Share of the sum of `|x|^2` in K components, for the cells that they are fitted on and "
        "for unseen cells (of the measured images).",
        shares(results),
    ]
    return "\n\n".join(parts) + "\n"


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with davis and camvid.")] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict (.safetensors).")] = None,
    model: Annotated[str, typer.Option(help="Name of a timm model.")] = MODEL,
    layer: Annotated[int, typer.Option(help="Layer, counted from 0.")] = 11,
    height: Annotated[int, typer.Option(help="Height of the images in pixels.")] = 240,
    frames: Annotated[int, typer.Option(help="Frames measured per sequence of DAVIS.")] = 6,
    pictures: Annotated[int, typer.Option(help="Images per part of CamVid; 0: all.")] = 0,
    points: Annotated[int, typer.Option(help="Training pixels of a head per image.")] = 800,
    output: Path = RESULTS / "pca.json",
) -> None:
    """Measure; write the JSON and the tables."""
    if data is not None:
        torch.manual_seed(0)
        start = time.perf_counter()
        network = Network(model, weights, [layer], "cpu")
        rows, kept = on_davis(network, data, height, frames)
        more, others = on_camvid(network, data, height, pictures, points)
        facts = {
            "machine": machine(),
            "model": network.name,
            "channels": network.model.num_features,
            "protocol": f"{height} pixels high, {frames} frames of each sequence of DAVIS, "
            f"{pictures or 'all'} pictures of CamVid, {points} pixels of each",
            "seconds": round(time.perf_counter() - start),
        }
        save({**facts, "energy": kept + others, "rows": rows + more}, output)
    results = load(output)
    output.with_suffix(".md").write_text(document(results))
    print(document(results))


if __name__ == "__main__":
    typer.run(main)
