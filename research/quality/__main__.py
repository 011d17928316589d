"""``python -m research.quality --data DIR --weights FILE``: quality against cost.

``DIR`` contains ``davis``, ``camvid``, ``nyu``, ``ecssd``, ``duts``, ``omron`` and ``imagenet``,
each in the data set's own layout; absent ones are skipped. Writes research/results/quality.json,
quality.md, quality.svg and quality-readme.svg; without ``--data`` regenerates the last three from
the JSON. Rows that the JSON already has are not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.common import MODEL, load, machine, save
from research import RESULTS
from research.quality import classification, davis, discovery, probes, report, retrieval
from research.quality import data as sets
from research.quality.cost import operations, seconds
from research.quality.fields import Fields, Network
from research.quality.settings import Setting, settings

TASKS = ("cost", "davis", "camvid", "depth", "discovery", "retrieval", "classification")
SIZES = ((240, 432), (480, 848))  # image sizes for which operations are counted

Row = dict[str, Any]
Scores = dict[str, float]


class Extent(str, Enum):
    quick = "quick"
    main = "main"
    study = "study"
    rivals = "rivals"
    candidates = "candidates"


class Table:
    """The rows of the JSON. All fields except the scores are the key of a row."""

    def __init__(self, path: Path, facts: Row) -> None:
        self.path = path
        self.results: Row = load(path) if path.is_file() else {"rows": []}
        self.results["machine"] = facts

    @staticmethod
    def key(row: Row) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted((name, value) for name, value in row.items() if name != "scores"))

    def missing(self, wanted: list[Setting], about: Row) -> list[Setting]:
        done = {self.key(row) for row in self.results["rows"]}
        return [s for s in wanted if self.key({**about, **s.row()}) not in done]

    def add(self, found: list[Setting], about: Row, scores: list[Scores]) -> None:
        """Add rows and save the file atomically, so that an interrupted run keeps its results."""
        for setting, score in zip(found, scores, strict=True):
            rounded = {name: round(value, 5) for name, value in score.items()}
            self.results["rows"].append({**about, **setting.row(), "scores": rounded})
        save(self.results, self.path)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; yields a function that advances it by one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)


def run_davis(
    table: Table,
    network: Network,
    wanted: list[Setting],
    folder: Path,
    protocol: davis.Protocol,
    limit: int,
) -> None:
    sequences = sets.davis_sequences(folder)
    for name in sequences[:limit] if limit else sequences:
        about = {"task": "davis", "item": name, "protocol": protocol.words(), "model": network.name}
        if missing := table.missing(wanted, about):
            frames = len(sets.davis_frames(folder, name, protocol.frames))
            with bar(f"DAVIS {name}, {len(missing)} settings", frames) as progress:
                scores = davis.run(network, missing, folder, name, protocol, progress)
            table.add(missing, about, scores)


def run_probe(
    table: Table,
    network: Network,
    wanted: list[Setting],
    name: str,
    protocol: probes.Protocol,
    load_part: Callable[[str], list[sets.Picture]],
) -> None:
    about = {"task": name, "item": "", "protocol": protocol.words(), "model": network.name}
    missing = table.missing(wanted, about)
    if not missing:
        return
    train, test = load_part("train"), load_part("test")
    measure = probes.segmentation if name == "camvid" else probes.depth
    if name == "camvid":  # its scores include the head of the plain tokens
        layers = {s.layer for s in missing}
        missing += [
            s for s in wanted if s.family == "plain" and s.layer in layers and s not in missing
        ]
    with bar(f"{name}, {len(missing)} settings", len(train) + len(test or train)) as progress:
        scores = measure(network, missing, train, test, protocol, progress)
    new = table.missing(missing, about)
    table.add(new, about, [scores[missing.index(s)] for s in new])


def run_discovery(
    table: Table,
    network: Network,
    wanted: list[Setting],
    task: str,
    item: str,
    examples: list[tuple[Path, Path]],
    protocol: discovery.Protocol,
) -> None:
    about = {"task": task, "item": item, "protocol": protocol.words(), "model": network.name}
    if missing := table.missing(wanted, about):
        with bar(f"{task} {item}, {len(missing)} settings", len(examples)) as progress:
            scores = discovery.run(network, missing, examples, protocol, progress)
        table.add(missing, about, scores)


def run_retrieval(
    table: Table,
    network: Network,
    wanted: list[Setting],
    protocol: retrieval.Protocol,
    load_pictures: Callable[[], list[sets.Picture]],
) -> None:
    about = {"task": "retrieval", "protocol": protocol.words(), "model": network.name}
    rows = table.results["rows"]
    classes = {row["item"] for row in rows if all(row.get(k) == v for k, v in about.items())}
    missing = [
        s
        for s in wanted
        if not classes or any(table.missing([s], {**about, "item": item}) for item in classes)
    ]
    if missing:
        pictures = load_pictures()
        with bar(f"retrieval, {len(missing)} settings", len(pictures)) as progress:
            found = retrieval.run(network, missing, pictures, protocol, progress)
        for item, scores in found.items():
            new = table.missing(missing, {**about, "item": item})
            table.add(new, {**about, "item": item}, [scores[missing.index(s)] for s in new])


def run_classification(table: Table, network: Network, data: Path, pictures: int) -> None:
    """On unlabelled images, by source, and on the labelled images of ``data/imagenet``."""
    protocol = classification.protocol_of(network, pictures)
    about = {"protocol": protocol.words(), "model": network.name}
    shown: list[tuple[str, str, list[Any], Any]] = [
        ("classification", item, found, None)
        for item, found in classification.sources(data, pictures).items()
    ]
    if (data / "imagenet/val").is_dir():
        found, truth = classification.labelled(data / "imagenet", network, pictures)
        shown.append(("imagenet", "", found, truth))
    for task, item, found, truth in shown:
        of = {**about, "task": task, "item": item}
        if missing := table.missing(classification.settings(network), of):
            with bar(f"{task} {item}, {len(missing)} settings", len(found)) as progress:
                scores = classification.run(network, missing, found, truth, progress)
            table.add(missing, of, scores)


def run_costs(table: Table, network: Network, wanted: list[Setting], height: int) -> None:
    """Seconds for one 16:9 image: medians of three interleaved readings of all settings."""
    pixels = sets.resized(
        torch.zeros(360, 640, 3, dtype=torch.uint8).numpy(), height, network.patch
    )
    shape = f"{pixels.shape[0]} x {pixels.shape[1]}"
    words = f"{height or 'full'} pixels high"  # must match the protocols of the tasks
    about = {"task": "cost", "item": shape, "protocol": words, "model": network.name}
    missing = table.missing(wanted, about)
    missing = [s for s in missing if not (s.unit or s.centre)]  # SRT does not support these
    if not missing:
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, pixels.shape, dtype=torch.uint8, generator=generator).numpy()
    Fields(network, missing[:1]).of(noise)
    readings: list[list[float]] = [[] for _ in missing]
    with bar("cost", 3 * len(missing)) as progress:
        for turn in range(3):
            for setting, taken in zip(missing, readings, strict=True):
                taken.append(seconds(network, setting, noise, check=turn == 0))
                progress()
    table.add(missing, about, [{"seconds": median(taken)} for taken in readings])


def run_operations(table: Table, network: Network, wanted: list[Setting]) -> None:
    """Operations for images of two sizes, last layer."""
    last = max(network.layers)
    for height, width in SIZES:
        size = [network.patch * round(n / network.patch) for n in (height, width)]
        about = {
            "task": "operations",
            "item": f"{size[0]} x {size[1]}",
            "protocol": "",
            "model": network.name,
        }
        missing = [s for s in table.missing(wanted, about) if s.layer == last]
        if missing:
            scores = [{"flop": float(operations(network, s, size[0], size[1]))} for s in missing]
            table.add(missing, about, scores)


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with davis, camvid, ...")] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict (.safetensors).")] = None,
    model: Annotated[str, typer.Option(help="Name of a timm model.")] = MODEL,
    layers: Annotated[
        list[int], typer.Option("--layer", help="Layer, counted from 0; repeatable.")
    ] = [7, 11],  # noqa: B006
    extent: Annotated[Extent, typer.Option(help="Set of settings to measure.")] = Extent.main,
    tasks: Annotated[str, typer.Option(help=f"Comma-separated: {','.join(TASKS)}.")] = ",".join(
        TASKS
    ),
    height: Annotated[int, typer.Option(help="Height of the images in pixels; 0: unchanged.")] = 0,
    sequences: Annotated[int, typer.Option(help="Sequences of DAVIS; 0: all.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames scored per sequence; 0: all.")] = 0,
    pictures: Annotated[int, typer.Option(help="Images to train on, and to test on; 0: all.")] = 0,
    points: Annotated[int, typer.Option(help="Training pixels of a head per image.")] = 400,
    device: str = "cpu",
    output: Path = RESULTS / "quality.json",
) -> None:
    """Measure the rows that the JSON lacks; write the JSON, the tables and the plots."""
    if data is not None:
        torch.manual_seed(0)
        names = tasks.split(",")
        if unknown := set(names) - set(TASKS):
            raise typer.BadParameter(f"--tasks must be from {', '.join(TASKS)}; got {unknown}")
        network = Network(model, weights, layers, device)
        wanted = settings(layers, network.patch, extent.value)
        table = Table(output, machine())
        if "cost" in names:
            run_operations(table, network, [s for s in wanted if s.family != "labels"])
            run_costs(table, network, [s for s in wanted if s.family != "labels"], height)
        # A linear head gains nothing from a stride of a quarter patch: its output is interpolated.
        coarse = [s for s in wanted if s.stride >= network.patch // 2 and s.family != "labels"]
        if "davis" in names and (data / "davis").is_dir():
            protocol = davis.Protocol(height, frames)
            run_davis(table, network, wanted, data / "davis", protocol, sequences)
        head = probes.Protocol(height, pictures, pictures, points)

        def camvid(part: str) -> list[sets.Picture]:
            return sets.camvid(data / "camvid", part, pictures, height, network.patch)

        def nyu(part: str) -> list[sets.Picture]:
            return sets.nyu(data / "nyu", part, pictures, height, network.patch)

        def motorcycle(part: str) -> list[sets.Picture]:
            return sets.motorcycle(height, network.patch) if part == "train" else []

        if "camvid" in names and (data / "camvid").is_dir():
            run_probe(table, network, coarse, "camvid", head, camvid)
        if "depth" in names:
            whole = probes.Protocol(height, 0, 0, 5 * points)
            run_probe(table, network, coarse, "motorcycle", whole, motorcycle)
            if (data / "nyu").is_dir():
                run_probe(table, network, coarse, "nyu", head, nyu)
        if "discovery" in names:
            for case in discovery.cases(data, height, sequences, frames, pictures):
                run_discovery(table, network, coarse, *case)
        if "retrieval" in names and (data / "camvid").is_dir():
            searched = retrieval.Protocol(height, pictures)
            run_retrieval(table, network, coarse, searched, lambda: camvid("test"))
        if "classification" in names:
            run_classification(table, network, data, pictures)
    results = load(output)
    text = report.document(results)
    output.with_suffix(".md").write_text(text)
    report.plot(results, output.with_suffix(".svg"))
    report.plot_readme(results, output.with_name(f"{output.stem}-readme.svg"))
    print(text)


if __name__ == "__main__":
    typer.run(main)
