"""``python -m research.pca --data DIR --weights FILE``: what smaller stored fields cost in quality.

The tasks of :mod:`research.quality` on fields of the default preset, stored as K components in
place of all channels, or in 16 bits. ``DIR`` holds ``davis`` and ``camvid``. Writes
research/results/pca.json and pca.md beside it; without ``--data`` the latter again from the JSON.
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
CENTERED = (16, 32, 64)  # of those of a PCA, to compare
HALVES = ("float16", "bfloat16")
CELLS = 256  # of each picture that a basis is fitted on
FRAMES = 5  # of each sequence that a basis is fitted on

# Of each task the score of the table, and its heading.
SCORES = {
    ("davis", "J"): "DAVIS J",
    ("davis", "F"): "DAVIS F",
    ("camvid", "miou"): "CamVid mIoU",
    ("discovery", "IoU"): "discovery IoU",
    ("retrieval", "mAP"): "retrieval mAP",
}

Row = dict[str, Any]


class Key(NamedTuple):
    """A storage, as its rows have it."""

    channels: int
    dtype: str
    centered: bool


class Basis(NamedTuple):
    """Of cells x [C]: stored are the first K of components @ (x - mean)."""

    mean: torch.Tensor  # [C]
    components: torch.Tensor  # [C, C]: rows of length 1, the largest eigenvalue first

    def kept(self, cells: torch.Tensor) -> dict[int, float]:
        """By K, the share of the energy, sum |x - mean|^2 over cells [N, C], in K components."""
        energy = ((cells - self.mean) @ self.components.T).double().square().sum(0)
        shares = (energy.cumsum(0) / energy.sum()).tolist()
        return {k: round(shares[k - 1], 5) for k in counts(len(shares))}


def fit(cells: torch.Tensor, centered: bool = False) -> Basis:
    """The eigenvectors of cells^T cells, cells [N, C]; the covariance's where centered."""
    mean = cells.mean(0) if centered else torch.zeros_like(cells[0])
    x = (cells - mean).double()
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors  # columns, ascending
    return Basis(mean, vectors.T.flip(0).to(cells))


def counts(channels: int) -> list[int]:
    return [k for k in COUNTS if k < channels]


@dataclass(frozen=True)
class Stored(Setting):
    """A field that is stored and read again."""

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
    """All that are compared, fitted on cells [N, C]; the first is the field as it is."""
    of = partial(preset, network.patch, network.layers[-1], basis=fit(cells))
    kept = counts(cells.shape[1])
    found = [of(), *(of(dtype=half) for half in HALVES)]
    found += [of(channels=k) for k in kept]
    found += [of(channels=k, dtype=half) for k in kept if k == 64 for half in HALVES]
    basis = fit(cells, centered=True)
    found += [of(channels=k, centered=True, basis=basis) for k in kept if k in CENTERED]
    return [*found]


def sample(network: Network, pictures: list[np.ndarray], seed: int = 0) -> torch.Tensor:
    """Random cells [N, C] of the fields of pictures [H, W, 3] uint8, CELLS of each."""
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
    """Scores and energy kept. The basis of a sequence is fitted on the other sequences."""
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
    """Scores and energy kept. The basis is fitted on the pictures to train on."""
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
    """The energy that components keep of the cells [N, C] they are fitted on, and of others."""
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
    """Of each storage, by task and score, the values of the items."""
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
    """Each storage: bytes of a cell, and the means of its scores."""
    found = gathered(results)
    plain = found[Key(0, "float32", False)]["davis", "J"]
    lines = []
    for key, scores in found.items():
        size = 2 if key.dtype in HALVES else 4
        cells = [f"{np.mean(scores[name]):.3f}" for name in SCORES]
        differences = [a - b for a, b in zip(scores["davis", "J"], plain, strict=True)]
        over = paired(differences) if any(differences) else ""
        lines.append([words(key), str(size * (key.channels or results["channels"])), *cells, over])
    return markdown(["stored", "bytes a cell", *SCORES.values(), "J above all channels"], lines)


def shares(results: Row) -> str:
    """The energy that K components keep, means over the items."""
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
        f"{results['protocol']}; torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date']}, {results['seconds']} s.",
        "K components: `components @ x` of a cell x, as `--pca` stores it. Centered: "
        "`components @ (x - mean)`, of a PCA, to compare. J above all channels: mean of the "
        "differences of the sequences, its standard error, in how many it is above 0.",
        table(results),
        "## Energy",
        "The share of the sum of `|x|^2` in K components: of the cells that they are fitted on, "
        "and of unseen cells, those of the measured pictures.",
        shares(results),
    ]
    return "\n\n".join(parts) + "\n"


def main(
    data: Annotated[Path | None, typer.Option(help="Holds davis and camvid.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A .safetensors state dict.")] = None,
    model: Annotated[str, typer.Option(help="A model of timm.")] = MODEL,
    layer: Annotated[int, typer.Option(help="From 0.")] = 11,
    height: Annotated[int, typer.Option(help="Pixels of pictures.")] = 240,
    frames: Annotated[int, typer.Option(help="Measured in each sequence of DAVIS.")] = 6,
    pictures: Annotated[int, typer.Option(help="Of CamVid, each part; 0: all.")] = 0,
    points: Annotated[int, typer.Option(help="Pixels of each that a head learns from.")] = 800,
    output: Path = RESULTS / "pca.json",
) -> None:
    """Measures, writes the JSON and the tables."""
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
