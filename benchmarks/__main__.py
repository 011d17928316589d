"""``python -m benchmarks``: ours against every peer and the limits, in one run."""

from __future__ import annotations

import re
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import end_to_end, memory, report
from benchmarks.common import RESULTS, load, machine, output, save
from benchmarks.suite import Bench, Clock, ceilings, plan


class Extent(str, Enum):
    walk = "walk"
    main = "main"
    full = "full"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    extent: Annotated[
        Extent,
        typer.Option(help="main: what the README shows; full: all shapes; walk: tiny, for tests."),
    ] = Extent.main,
    rounds: Annotated[int, typer.Option(help="Readings of each call.")] = 9,
    seconds: Annotated[
        float,
        typer.Option(
            help="What there is no time for is left out: first what has to be compiled, then the "
            "slow loops, then everything."
        ),
    ] = float("inf"),
    commit: Annotated[str, typer.Option(help="Of the sources, where git cannot tell.")] = "",
    results: Annotated[Path, typer.Option(help="The folder that gets the JSON.")] = RESULTS,
    resume: Annotated[
        bool, typer.Option(help="Keep the rows of the JSON that is there; they name their commit.")
    ] = False,
) -> None:
    """Measures, writes the JSON after every row, prints the tables.

    The exit status is 1 if a result of ours is wrong.
    """
    clock = Clock(torch.device(device))
    walk = extent is Extent.walk
    bench = Bench(clock, 3 if walk else rounds, seconds, "aot_eager" if walk else "inductor")
    facts = {**machine(), **({"commit": commit} if commit else {})}
    slug = "cpu"
    if clock.gpu:
        properties = torch.cuda.get_device_properties(clock.device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": output(*query).partition("\n")[0],
            "cuda": torch.version.cuda,
        }
        slug = "cuda-" + re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    found: dict[str, Any] = {
        "machine": facts,
        "extent": extent.value,
        "unit": "us",
        "rounds": bench.rounds,
        "ceilings": ceilings(clock, 2**22 if walk else 2**31 if clock.gpu else 2**28, bench.rounds),
        "rows": bench.rows,
        "end_to_end": [],
        "memory": [],
        "wrong": bench.wrong,
    }
    path = results / f"{slug}.json"
    if resume:
        before = load(path)
        found |= {key: before[key] for key in ("end_to_end", "memory")}
        bench.kept = [{"commit": before["machine"]["commit"], **row} for row in before["rows"]]

    def keep() -> None:
        found["seconds"] = round(bench.elapsed(), 1)
        part = path.with_suffix(".part")
        save(found, part)
        part.replace(path)

    def whole_models(bench: Bench) -> None:
        found["end_to_end"] = end_to_end.measure(bench.clock, extent.value)

    steps = plan(clock.device, extent.value)
    if (clock.gpu or extent is not Extent.main) and not found["end_to_end"]:
        steps.insert(0, whole_models)
    for step in steps:
        try:
            step(bench)
        except Exception as error:  # the rows that were read are written all the same
            bench.wrong.append(f"{step}: {type(error).__name__}: {error}"[:500])
            traceback.print_exc()
        keep()
    if extent is Extent.full and not found["memory"]:
        found["memory"] = memory.measure(device)
        keep()
    print(report.tables(found))
    if bench.wrong:
        print("WRONG:", *bench.wrong, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
