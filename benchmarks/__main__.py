"""``python -m benchmarks``: ours against the published loop and the limit, in one run.

Readings are interleaved (one of each in turn), the median and the interquartile range are kept, and
every result is compared before anything is timed. Writes benchmarks/results/cpu.json and prints the
table that stands in the README.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

import srt_ext
from benchmarks.common import RESULTS, machine, quartiles, save
from benchmarks.peers import published_ensemble, published_median, published_shift

GRID, PATCH, CHANNELS = (14, 14), (16, 16), 384


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call: the median and quartiles of ``rounds`` readings taken in turn.

    The published loop takes seconds: it is read three times only.
    """
    readings: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):  # the first round warms up
        for name, call in calls.items():
            if name == "published" and not 0 < i <= 3:
                continue
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            del result  # frees its memory outside the reading
            if i:
                readings[name].append(1e3 * elapsed)
    return {name: quartiles(ms) for name, ms in readings.items()}


def same(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"{name}: ours and the published loop differ by {error}")


def measure(rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    offsets = srt_ext.views.grid(3)
    tokens = torch.randn(len(offsets), 1, GRID[0] * GRID[1], CHANNELS)
    image = torch.rand(1, 3, GRID[0] * PATCH[0], GRID[1] * PATCH[1])
    rows = []

    for upsample in ("bilinear", "nearest"):

        def ours(border: str, out: torch.Tensor | None = None, up: str = upsample) -> torch.Tensor:
            return srt_ext.ensemble(
                tokens, offsets, GRID, PATCH, upsample=up, border=border, out=out
            )

        def loop(up: str = upsample) -> torch.Tensor:
            return published_ensemble(tokens, offsets, GRID, PATCH, up)

        field = ours("zeros")
        same(upsample, field, loop())
        warm = torch.empty_like(field)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda ours=ours: ours("coverage"),
            "ours, out=": lambda ours=ours, warm=warm: ours("coverage", warm),
            "published": loop,
            "limit": lambda shape=field.shape: torch.empty(shape).fill_(1.0),
            "limit, out=": lambda warm=warm: warm.fill_(1.0),
        }
        rows.append({"op": f"mean, {upsample}", **interleaved(calls, rounds)})

    for upsample in ("bilinear", "nearest"):

        def median(border: str, out: torch.Tensor | None = None, up: str = upsample) -> Any:
            modes: dict[str, Any] = {"reduce": "median", "upsample": up, "border": border}
            return srt_ext.ensemble(tokens, offsets, GRID, PATCH, **modes, out=out)

        # Taken once, and not in turn with the others: a reading and the check are one call.
        start = time.perf_counter()
        stack = published_median(tokens, offsets, GRID, PATCH, upsample)
        elapsed = 1e3 * (time.perf_counter() - start)
        same(f"median, {upsample}", median("zeros"), stack)
        del stack
        warm = torch.empty_like(field)
        medians: dict[str, Callable[[], object]] = {
            "ours": lambda median=median: median("coverage"),
            "ours, out=": lambda median=median, warm=warm: median("coverage", warm),
            "limit": lambda shape=field.shape: torch.empty(shape).fill_(1.0),
        }
        row = {"op": f"median, {upsample}", **interleaved(medians, rounds)}
        rows.append({**row, "published": quartiles([elapsed])})
    moments: dict[str, Callable[[], object]] = {
        "ours": lambda: srt_ext.ensemble_moments(tokens, offsets, GRID, PATCH),
        "limit": lambda: torch.empty(2, *field.shape).fill_(1.0),
    }
    rows.append({"op": "moments, bilinear", **interleaved(moments, rounds)})

    ours_views = srt_ext.shift(image, offsets, padding="zeros")
    same("shift", ours_views, published_shift(image, offsets))
    shift_calls: dict[str, Callable[[], object]] = {
        "ours": lambda: srt_ext.shift(image, offsets),
        "published": lambda: published_shift(image, offsets),
        "limit": lambda: torch.empty(ours_views.shape).fill_(1.0),
    }
    rows.append({"op": "shift", **interleaved(shift_calls, rounds)})
    return rows


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: milliseconds, and ratios of readings taken in one run."""
    lines = [
        "| 49 views, 224 x 224 | published loop | ours | ratio | allocate + fill | ours / it |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours, limit = (row[k]["median"] for k in ("ours", "limit"))
        published = row.get("published", {}).get("median")
        theirs = f"{published:.0f} ms" if published else "-"
        ratio = f"{published / ours:.0f} x" if published else "-"
        lines.append(
            f"| {row['op']} | {theirs} | {ours:.1f} ms | {ratio} "
            f"| {limit:.1f} ms | {ours / limit:.2f} |"
        )
    return "\n".join(lines)


def main(rounds: int = 15, output: Path = RESULTS / "cpu.json") -> None:
    """Measures, writes the JSON, prints the table."""
    results = {
        "machine": machine(),
        "shape": {"grid": GRID, "patch": PATCH, "channels": CHANNELS, "views": 49},
        "unit": "ms",
        "rounds": rounds,
        "rows": measure(rounds),
    }
    save(results, output)
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
