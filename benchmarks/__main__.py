"""``python -m benchmarks``: srt_ext, its alternatives and the lower bounds, in one run."""

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
            help="main: the main shapes, on the CPU; full: all shapes, on the CPU; core: the most "
            "important rows of a GPU, in a minute; rest: the other rows of a GPU; walk: core and "
            "rest with tiny shapes, to test the code."
        ),
    ] = Extent.main,
    rounds: Annotated[int, typer.Option(help="Readings per call.")] = 9,
    seconds: Annotated[
        float,
        typer.Option(
            help="Time limit, from the start of the process. Near the limit, compiled calls are "
            "skipped first, then slow loops, then all remaining rows."
        ),
    ] = float("inf"),
    commit: Annotated[
        str, typer.Option(help="Commit of the sources, if git is not available.")
    ] = "",
    results: Annotated[Path, typer.Option(help="Folder for the JSON.")] = RESULTS,
    resume: Annotated[
        bool, typer.Option(help="Keep the rows of the existing JSON, with their commit.")
    ] = False,
) -> None:
    """Measure, write the JSON after every row, print the tables.

    The exit status is 1 if a result of srt_ext is wrong or if the device has failed.
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
    found["left_out"] = [title(step) for step in planned]  # until they are measured
    keep()
    for step in planned:
        if bench.elapsed() > seconds:
            break
        found["left_out"].pop(0)
        try:
            step(bench)
        except Exception as error:  # the measured rows are written all the same
            bench.wrong.append(f"{title(step)}: {type(error).__name__}: {error}"[:500])
            traceback.print_exc()
            keep()
        if not clock.works():
            bench.wrong.append("the device has failed: no further call can be measured")
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
    """The plan, with SRT around the small model before it and around the large one after it."""
    planned = plan(extent.value)
    if extent in (Extent.main, Extent.core):
        return planned
    small, *large = end_to_end.steps(extent.value, bench.clock.gpu)
    read = {row["model"] for row in bench.end_to_end}
    every = [small, *planned, *large]
    return [step for step in every if step.keywords.get("name") not in read]


if __name__ == "__main__":
    typer.run(main)
