"""``python -m benchmarks``: ours against every peer and the limits, in one run."""

from __future__ import annotations

import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import end_to_end, memory, report
from benchmarks.common import RESULTS, load, machine, save, slug
from benchmarks.suite import Bench, Clock, Step, ceilings, plan, title


class Extent(str, Enum):
    walk = "walk"
    main = "main"
    full = "full"
    core = "core"
    rest = "rest"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    extent: Annotated[
        Extent,
        typer.Option(
            help="main: what the README shows; full: all shapes, on the CPU; core: what to know "
            "first of a GPU, in a minute; rest: what that leaves out; walk: these two, tiny, for "
            "tests."
        ),
    ] = Extent.main,
    rounds: Annotated[int, typer.Option(help="Readings of each call.")] = 9,
    seconds: Annotated[
        float,
        typer.Option(
            help="From the start of the process. What there is no time for is left out: first what "
            "has to be compiled, then the slow loops, then everything."
        ),
    ] = float("inf"),
    commit: Annotated[str, typer.Option(help="Of the sources, where git cannot tell.")] = "",
    results: Annotated[Path, typer.Option(help="The folder that gets the JSON.")] = RESULTS,
    resume: Annotated[
        bool, typer.Option(help="Keep the rows of the JSON that is there; they name their commit.")
    ] = False,
) -> None:
    """Measures, writes the JSON after every row, prints the tables.

    The exit status is 1 if a result of ours is wrong, or if the device has failed.
    """
    clock = Clock(torch.device(device))
    walk = extent is Extent.walk
    bench = Bench(clock, 3 if walk else rounds, seconds, "aot_eager" if walk else "inductor")
    facts = {**machine(clock.device), **({"commit": commit} if commit else {})}
    part = "" if extent in (Extent.main, Extent.full) else f"-{extent.value}"
    path = results / f"{slug(facts)}{part}.json"
    found: dict[str, Any] = {
        "machine": facts,
        "extent": extent.value,
        "unit": "us",
        "rounds": bench.rounds,
        "ceilings": ceilings(clock, 2**22 if walk else 2**31 if clock.gpu else 2**28, bench.rounds),
        "rows": bench.rows,
        "end_to_end": bench.end_to_end,
        "memory": [],
        "wrong": bench.wrong,
        "left_out": [],
    }
    if resume:
        before = load(path)
        found["memory"] = before["memory"]
        bench.end_to_end += before["end_to_end"]
        bench.kept = [{"commit": before["machine"]["commit"], **row} for row in before["rows"]]

    def keep() -> None:
        found["seconds"] = round(bench.elapsed(), 1)
        save(found, path)

    bench.save = keep
    planned = steps(bench, extent)
    found["left_out"] = [title(step) for step in planned]  # until they are read
    keep()
    for step in planned:
        if bench.elapsed() > seconds:
            break
        found["left_out"].pop(0)
        try:
            step(bench)
        except Exception as error:  # the rows that were read are written all the same
            bench.wrong.append(f"{title(step)}: {type(error).__name__}: {error}"[:500])
            traceback.print_exc()
            keep()
        if not clock.works():
            bench.wrong.append("the device has failed: nothing more can be read from it")
            break
    keep()
    if extent is Extent.full and not found["memory"]:
        found["memory"] = memory.measure(device)
        keep()
    print(report.tables(found))
    if bench.wrong:
        print("WRONG:", *bench.wrong, sep="\n")
        raise SystemExit(1)


def steps(bench: Bench, extent: Extent) -> list[Step]:
    """The plan, and SRT around the small model before it, the large one behind it."""
    planned = plan(extent.value)
    if extent in (Extent.main, Extent.core):
        return planned
    small, *large = end_to_end.steps(extent.value, bench.clock.gpu)
    read = {row["model"] for row in bench.end_to_end}
    every = [small, *planned, *large]
    return [step for step in every if step.keywords.get("name") not in read]


if __name__ == "__main__":
    typer.run(main)
