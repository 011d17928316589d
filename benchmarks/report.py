"""``python -m benchmarks.report``: tables and plots from the JSON of a run.

Writes NAME.md and its plots next to each JSON of ``python -m benchmarks``; prints the table of the
README. In the JSON, ``ours`` is srt_ext and ``published`` the published code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, load

Row = dict[str, Any]

FRESH, HUGE = "allocate + fill", "allocate + fill, huge pages"
LIMITS = ("fill", "copy", FRESH, HUGE, "allocate + copy", "fill, sum", "sum")
OUT = "ours, out="
GEMMS = ("GEMM", "GEMM, compiled", "GEMM, tf32")
SAMPLED = ("grid_sample", "grid_sample, contiguous")
OTHERS = (*GEMMS, "sliced loop", "slices", "slices, compiled", *SAMPLED)
PEERS = ("published", *OTHERS)


def median(row: Row, name: str, *, graph: bool = False) -> float | None:
    """Microseconds; None if the call was not timed."""
    entry = row["calls"].get(name, {})
    us: float | None = (entry.get("graph", {}) if graph else entry).get("median")
    return us


def steady(row: Row, name: str) -> float | None:
    """The median; None if the upper quartile is at least twice the lower one."""
    entry = row["calls"].get(name, {})
    return median(row, name) if "q1" in entry and entry["q3"] < 2 * entry["q1"] else None


def ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def over_limit(row: Row) -> float | None:
    """The time of srt_ext divided by the lower bound of the same run, of a mean, shift or windows.

    The bound of a mean is one ``fill`` of the result plus one read of the tokens. The bound of a
    shift or of windows is a copy of the bytes that it writes. The time with ``out=`` is used if it
    was measured.
    """
    writes, reads = median(row, "fill, sum") or median(row, "fill"), median(row, "read the tokens")
    limit = median(row, "copy") if row["op"].startswith(("shift", "windows")) else None
    if writes is not None and reads is not None:
        limit = writes + reads
    return ratio(median(row, OUT) or median(row, "ours"), limit)


def fastest(row: Row, names: Iterable[str]) -> float | None:
    read = [us for us in (median(row, name) for name in names) if us is not None]
    return min(read, default=None)


def milliseconds(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us / 1e3:.0f} ms" if us >= 1e5 else f"{us / 1e3:.3g} ms"


def label(call: str) -> str:
    """The name of a call in tables and plots."""
    if call == "published":
        return "published code"
    return call.replace("ours", "srt_ext", 1) if call.startswith("ours") else call


def number(value: float | None, suffix: str = "") -> str:
    if value is None:
        return "-"
    return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") + suffix


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- tables -------------------------------------------------------------------------------------


# 224 x 224, 16 pixels per token, 384 channels (ensembles): 49 views; the 16 views of `best:16`.
MAIN = ("224x224 P=16 C=384 V=49", "1x3x224x224 V=49 whole")
DEFAULT = ("best:16 224x224 P=16 C=384 V=16", "1x3x224x224 V=16 best:16")


SUMMARY = (
    "P = 16; C = 384, for `shift` 3 channels. The published loop upsamples the tokens of each "
    "view, shifts the map back with an affine warp and adds it; for the median it stacks the maps "
    "of all views and calls `torch.median`; for `shift` it warps the image once for each view. The "
    "best alternative is the fastest of: matrix products of the separable formula (eager and "
    "compiled), slices instead of the affine warp (eager and compiled), `grid_sample`. Times of "
    "gradients exclude the forward pass. Allocate + fill is the time that torch needs to allocate "
    "the output and write it once. Most of it is page faults of new memory, which `out=` with a "
    "reused buffer avoids."
)


def is_main(row: Row, shapes: tuple[str, ...] = MAIN) -> bool:
    return row["shape"] in shapes and not row.get("growth")


def find(results: Row, op: str, dtype: str = "float32", shape: str = "") -> Row | None:
    """The first row of an op with the main shape, or with a shape that starts with ``shape``."""
    for row in results["rows"]:
        right = row["shape"].startswith(shape) if shape else is_main(row)
        if row["op"] == op and row["dtype"] == dtype and right and not row.get("growth"):
            found: Row = row
            return found
    return None


def readme(results: Row) -> str:
    """The four rows of the README: float32, 224 x 224, P = 16, C = 384."""
    head = ["operation", "published loop", "best alternative in PyTorch", "srt_ext"]
    head += ["speed-up over the published loop", f"srt_ext / lower bound ({FRESH})"]
    lines = []
    for op, shapes in (
        ("mean, bilinear", DEFAULT),
        ("mean, bilinear", MAIN),
        ("median, bilinear", DEFAULT),
        ("shift, bilinear", DEFAULT),
    ):
        (row,) = (
            r
            for r in results["rows"]
            if r["op"] == op and r["dtype"] == "float32" and is_main(r, shapes)
        )
        ours, published = median(row, "ours"), median(row, "published")
        lines.append(
            [
                f"{op}, {row['views']} views",
                *map(three_digits, (published, fastest(row, OTHERS), ours)),
                number(ratio(published, ours), " x"),
                number(ratio(ours, median(row, FRESH))),
            ]
        )
    return markdown(head, lines)


def three_digits(us: float | None) -> str:
    """Milliseconds, rounded to three significant digits."""
    return "-" if us is None else f"{float(f'{us / 1e3:.3g}'):g} ms"


def summary(results: Row) -> str:
    """All float32 rows of the main shape, with 49 and with 16 views."""
    head = ["operation", "published loop", "best alternative in PyTorch", "srt_ext"]
    head += ["published loop / srt_ext", "best alternative / srt_ext", FRESH]
    head += [f"srt_ext / ({FRESH})", "with `out=`: srt_ext / fill"]
    lines = []
    for row in results["rows"]:
        if row["dtype"] != "float32" or not is_main(row, MAIN + DEFAULT):
            continue
        if row["op"].startswith(("Running", "circular")):
            continue
        if row["op"].startswith("gradient") and not is_main(row):
            continue  # in the section Gradients
        ours, published = median(row, "ours"), median(row, "published")
        other, limit = fastest(row, OTHERS), median(row, FRESH)
        lines.append(
            [
                f"{row['op']}, {row['views']} views",
                *map(milliseconds, (published, other, ours)),
                number(ratio(published, ours), " x"),
                number(ratio(other, ours), " x"),
                milliseconds(limit),
                number(ratio(ours, limit)),
                number(ratio(median(row, OUT), median(row, "fill"))),
            ]
        )
    return markdown(head, lines)


def table(rows: list[Row]) -> str:
    """Times of srt_ext, relative to each lower bound; times of each alternative, relative to it.

    The columns ``repeated`` are of the call repeated without pauses.
    """

    def read(name: str) -> bool:
        return any(median(row, name) is not None for row in rows)

    ours = [n for n in dict.fromkeys(n for r in rows for n in r["calls"]) if n.startswith("ours,")]
    limits = [name for name in (*LIMITS, "read the tokens", "read the gradient") if read(name)]
    peers = [*ours, *(name for name in PEERS if read(name))]
    graphs = any(median(row, "ours", graph=True) is not None for row in rows)
    bounded = any(over_limit(row) is not None for row in rows)
    head = ["op", "dtype", "shape", "srt_ext"]
    if bounded:
        head.append("with out=: srt_ext / bound" if OUT in ours else "srt_ext / bound")
    head += [f"srt_ext / {name}" for name in limits]
    head += [f"{label(name)} / srt_ext" for name in peers]
    if graphs:
        head += ["repeated: srt_ext", "repeated: srt_ext / fill"]
    lines = []
    for row in rows:
        us, repeated = median(row, "ours"), median(row, "ours", graph=True)
        line = [row["op"], row["dtype"], row["shape"], milliseconds(us)]
        if bounded:
            line.append(number(over_limit(row)))
        line += [number(ratio(us, median(row, name))) for name in limits]
        line += [number(ratio(median(row, name), us)) for name in peers]
        if graphs:
            line += [
                milliseconds(repeated),
                number(ratio(repeated, median(row, "fill", graph=True))),
            ]
        lines.append(line)
    return markdown(head, lines)


def over_coverage(row: Row) -> float | None:
    """The time with ``border="circular"`` divided by the time with ``border="coverage"``."""
    return ratio(median(row, "ours"), median(row, "ours, coverage"))


def borders(rows: list[Row]) -> str:
    head = ["op", "dtype", "shape", "coverage", "circular", "circular / coverage"]
    lines = [
        [
            *(row[key] for key in ("op", "dtype", "shape")),
            *(milliseconds(median(row, name)) for name in ("ours, coverage", "ours")),
            number(over_coverage(row)),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def end_to_end(results: Row) -> str:
    head = ["model", "dtype", "image", "views", "one forward pass", "all forward passes", "SRT"]
    head += ["shift", "ensemble"]
    head += ["(shift + ensemble) / SRT", "(SRT - forward passes) / SRT"]
    lines = []
    for row in results["end_to_end"]:
        calls = ("forward", "forwards of all views", "SRT", "shift", "ensemble")
        us = [median(row, call) for call in calls]
        share = ours_of_srt(row)
        cells = [row["model"], row["dtype"], "x".join(map(str, row["size"])), str(row["views"])]
        srt, forwards = median(row, "SRT"), median(row, "forwards of all views")
        rest = (srt - forwards) / srt if srt and forwards else 0
        shares = [f"{100 * part:.1f} %" for part in (share, rest)]
        lines.append([*cells, *map(milliseconds, us), *shares])
    return markdown(head, lines)


def ours_of_srt(row: Row) -> float:
    calls = {name: entry["median"] for name, entry in row["calls"].items()}
    return float((calls["shift"] + calls["ensemble"]) / calls["SRT"])


def peak_memory(results: Row) -> str:
    """Peak memory for the main shape, in multiples of the output."""
    rows = [r for r in results["memory"] if r["pixels"] == 224**2 and r["channels"] == 384]
    counts = sorted({row["views"] for row in rows})
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        line = [way]
        for count in counts:
            found = [r for r in rows if r["way"] == way and r["views"] == count and "bytes" in r]
            line.append(f"{found[0]['bytes'] / found[0]['output_bytes']:.1f}" if found else "-")
        lines.append(line)
    return markdown(["peak / output size", *(f"V = {count}" for count in counts)], lines)


# ---- targets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    text: str
    measured: float | None
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def circular_targets(results: Row) -> list[Target]:
    """One target for each op: its shape with the largest ratio."""
    worst: dict[str, tuple[float, str]] = {}
    for row in results["rows"]:
        measured = over_coverage(row)
        if row["op"].startswith("circular") and measured is not None:
            found = (measured, row["shape"])
            worst[row["op"]] = max(worst.get(row["op"], found), found)
    return [
        Target(f"{op}, worst shape ({shape}): circular / coverage", measured, 1.2)
        for op, (measured, shape) in worst.items()
    ]


def cpu_targets(results: Row) -> list[Target]:
    """The targets of this project on two cores with AVX-512; ratios within one run."""
    targets = []

    def add(
        text: str, over: float | None, under: float | None, bound: float, at_most: bool
    ) -> None:
        targets.append(Target(text, ratio(over, under), bound, at_most))

    for up, published in (("bilinear", 600), ("nearest", 350)):
        row = find(results, f"mean, {up}")
        if row is None:
            continue
        ours = median(row, "ours")
        add(f"mean, {up}: srt_ext / (allocate + fill)", ours, median(row, FRESH), 0.6, True)
        huge = f"mean, {up}: srt_ext / (allocate + fill, huge pages)"
        add(huge, ours, steady(row, HUGE), 1.5, True)
        out = median(row, OUT)
        add(f"mean, {up}: with out=, srt_ext / fill", out, median(row, "fill"), 2.5, True)
        loop = median(row, "published")
        add(f"mean, {up}: published loop / srt_ext", loop, ours, published, False)
        add(f"mean, {up}: sliced loop / srt_ext", median(row, "sliced loop"), ours, 100, False)
        add(f"mean, {up}: best GEMM / srt_ext", fastest(row, GEMMS), ours, 8, False)
        one = median(row, "ours, out=, one thread")
        add(f"mean, {up}: with out=, one thread / two", one, out, 1.7, False)
    for up in ("bilinear", "nearest"):
        row = find(results, f"gradient of mean, {up}")
        if row is not None:
            forward = median(row, "ours, forward")
            text = f"gradient of mean, {up}: srt_ext / forward pass"
            add(text, median(row, "ours"), forward, 3, True)
    for up, bound in (("nearest", 250), ("bilinear", 80)):
        row = find(results, f"median, {up}")
        if row is None:
            continue
        stack = median(row, "published")
        add(f"median, {up}: published loop / srt_ext", stack, median(row, "ours"), bound, False)
        avx2, out = median(row, "ours, out=, avx2"), median(row, OUT)
        text = f"median, {up}: with AVX2 and out=, published loop / srt_ext"
        add(text, stack, avx2, bound / 2, False)
        one = median(row, "ours, out=, one thread")
        add(f"median, {up}: with out=, one thread / two", one, out, 1.7, False)
    for up in ("bilinear", "nearest"):
        shape = "224x224 P=16 C=384 V={} stride 16"
        row = find(results, f"mean, {up}", shape=shape.format(49))
        if row is not None:
            read = median(row, "read the tokens")
            text = f"token scale, {up}, 49 views: srt_ext / sum()"
            add(text, median(row, "ours"), read, 2.5, True)
        row = find(results, f"mean, {up}", shape=shape.format(9))
        if row is not None:
            for how, us in (
                ("interleaved with the alternatives", median(row, "ours")),
                ("repeated", median(row, "ours", graph=True)),
            ):
                targets.append(Target(f"token scale, {up}, 9 views, {how}: µs", us, 100))
    for batch in (1, 8):
        row = find(results, "shift, bilinear", shape=f"{batch}x3x224x224 V=49 whole")
        if row is None:
            continue
        ours = median(row, "ours")
        published, copy = median(row, "published"), median(row, "allocate + copy")
        add(f"shift, batch {batch}: published loop / srt_ext", published, ours, 20, False)
        add(f"shift, batch {batch}: srt_ext / (allocate + copy)", ours, copy, 1.5, True)
    for op, bounds in (("windows", (50, 4)), ("windows and gradient of centers", (None, 4))):
        row = find(results, op, shape="32x3x224x224 N=25 P=16")
        if row is None:
            continue
        for name, bound in zip(("published", "grid_sample"), bounds, strict=True):
            if bound is not None:
                text = f"{op}: {label(name)} / srt_ext"
                add(text, median(row, name), median(row, "ours"), bound, False)
    targets += circular_targets(results)
    for op in ("mean", "median", "moments"):
        for up in ("bilinear", "nearest"):
            full = find(results, f"{op}, {up}")
            for dtype in ("bfloat16", "float16"):
                half = find(results, f"{op}, {up}", dtype)
                if full is not None and half is not None:
                    us = median(half, "ours")
                    add(f"{op}, {up}: {dtype} / float32", us, median(full, "ours"), 1, True)
    for row in results["end_to_end"]:
        if "small" in row["model"]:
            text = f"{row['model']}: shift + ensemble, % of the time of SRT"
            targets.append(Target(text, 100 * ours_of_srt(row), 3))
    return targets


def cuda_targets(results: Row) -> list[Target]:
    """The targets on an H100 or H200: device time, cold L2, within one run; P = 16, C = 384."""
    rows = {(row["op"], row["dtype"], row["shape"]): row for row in results["rows"]}
    targets = []

    def add(
        text: str,
        key: tuple[str, str, str],
        figure: Callable[[Row], float | None],
        bound: float,
        at_most: bool = True,
    ) -> None:
        row = rows.get(key)
        targets.append(Target(text, row and figure(row), bound, at_most))

    def published(row: Row) -> float | None:
        return ratio(median(row, "published"), median(row, "ours"))

    mean, davis = "mean, bilinear", "480x848 P=16 C=384 V={}"
    views = {"best:4 ": 4, "best:16 ": 16, "": 49, "grid:6:2 ": 49}
    for stride, bounds in (("", (1.25, 1.5)), (" stride 4", (2, 2))):
        for dtype, bound in zip(("float32", "bfloat16"), bounds, strict=True):
            for name, count in views.items():
                shape = name + davis.format(count) + stride
                text = f"mean, {dtype}, {shape}: srt_ext / (fill + read)"
                add(text, (mean, dtype, shape), over_limit, bound)
    for dtype in ("float32", "bfloat16"):
        for shape in ("1x3x480x848 V=16 best:16", "1x3x480x848 V=49 between"):
            key = ("shift, bilinear", dtype, shape)
            add(f"shift, {dtype}, {shape}: srt_ext / copy", key, over_limit, 1.25)
        for name, count in (("best:16 ", 16), ("", 49)):
            shape = f"{name}224x224 P=16 C=384 V={count} stride 16"
            add(
                f"token scale, {dtype}, {count} views: µs",
                (mean, dtype, shape),
                partial(median, name="ours"),
                30,
            )
        default = "best:16 " + davis.format(16)
        add(
            f"median, {dtype}, {default}: srt_ext / fill",
            ("median, bilinear", dtype, default),
            lambda row: ratio(median(row, "ours"), median(row, "fill")),
            12,
        )
        add(
            f"mean, {dtype}, {default}: best GEMM / srt_ext",
            (mean, dtype, default),
            lambda row: ratio(fastest(row, GEMMS), median(row, "ours")),
            3,
            at_most=False,
        )
    text = f"mean, {default}: published loop / srt_ext"
    add(text, (mean, "float32", default), published, 100, False)
    targets += circular_targets(results)
    for row in results["end_to_end"]:
        if "small" in row["model"]:
            text = f"{row['model']}, {row['views']} views: shift + ensemble, % of the time of SRT"
            targets.append(Target(text, 100 * ours_of_srt(row), 5))
    return targets


def target_table(targets: list[Target]) -> str:
    words = {
        True: "met",
        False: "**missed**",
        None: "not measured, or readings differ by more than 2 x",
    }
    return markdown(
        ["figure", "target", "measured", "result"],
        (
            [t.text, f"{'<=' if t.at_most else '>='} {t.bound:g}", number(t.measured), words[t.met]]
            for t in targets
        ),
    )


def tables(results: Row) -> str:
    """All tables of a run, as Markdown."""
    rows = [row for row in results["rows"] if not row.get("growth")]
    facts = results["machine"]
    gpu = f"{facts['gpu']}, " if "gpu" in facts else f"{facts['threads']} threads, "
    speed = {
        name: results["ceilings"][f"{name}_TB_per_s"]["median"] * 1e3 for name in ("fill", "copy")
    }
    parts = [
        f"{gpu}{facts['processor']}, {facts['kernels']} kernels, torch {facts['torch']}, commit "
        f"{facts['commit']}, {facts['date']}. Fill {speed['fill']:.1f} GB/s, copy "
        f"{speed['copy']:.1f} GB/s (read + written). Medians of {results['rounds']} interleaved "
        "readings (3 of calls over 0.5 s, 1 of calls over 5 s); the JSON has the quartiles. The "
        "[README](../README.md) of the benchmarks explains calls and bounds."
    ]
    earlier = Counter(row["commit"] for row in rows if "commit" in row)
    if earlier:
        counts = ", ".join(f"{count} of {commit}" for commit, count in earlier.items())
        total = sum(earlier.values())
        parts[0] += f" {total} of {len(rows)} rows are of interrupted runs, by commit: {counts}."
    targets = cuda_targets if "gpu" in facts else cpu_targets
    if "gpu" not in facts:
        parts += ["## Summary: 224 x 224, float32", SUMMARY, summary(results)]
    parts += ["## Targets", target_table(targets(results))]
    sections = {
        "Mean": ("mean",),
        "Shift": ("shift",),
        "Windows": ("windows",),
        "Points of a field": ("sample",),
        "Median, moments, streams": ("median", "moments", "Running"),
        "Gradients": ("gradient",),
        "Circular border": ("circular",),
    }
    for title, ops in sections.items():
        chosen = [row for row in rows if row["op"].startswith(ops)]
        if chosen:
            text = borders(chosen) if title == "Circular border" else table(chosen)
            parts += [f"## {title}", text]
    if results["end_to_end"]:
        parts += ["## SRT around a model", end_to_end(results)]
    if results["memory"]:
        parts += ["## Peak memory, tokens included", peak_memory(results)]
    failed = [
        f"- {row['op']}, {row['dtype']}, {row['shape']}: {name}: {entry['failed']}"
        for row in rows
        for name, entry in row["calls"].items()
        if "failed" in entry
    ]
    if failed:
        parts += ["## Not timed", "\n".join(failed)]
    if results.get("left_out"):
        left = [f"- {step}" for step in results["left_out"]]
        parts += ["## Not measured: the time limit was reached", "\n".join(left)]
    return "\n\n".join(parts)


def document(results: Row, name: str) -> str:
    """NAME.md."""
    plots = [
        f"![{text}]({name}-{plot}.svg)"
        for plot, text in (
            ("growth", "Time and memory against views, pixels and channels"),
            ("peers", "Times of srt_ext and of the alternatives"),
        )
        if plot == "peers" or has_growth(results)
    ]
    return "\n\n".join((f"# {name}", "\n\n".join(plots), tables(results))) + "\n"


# ---- plots --------------------------------------------------------------------------------------


def has_growth(results: Row) -> bool:
    return bool(results["memory"]) and any(row.get("growth") for row in results["rows"])


def plot_peers(results: Row, path: Path) -> None:
    """Milliseconds of every call of the main shape, on a logarithmic scale."""
    from matplotlib import pyplot

    rows = [r for r in results["rows"] if is_main(r) and r["dtype"] == "float32"]
    rows = [r for r in rows if not r["op"].startswith(("Running", "circular"))]
    names = ("ours", OUT, "fill", FRESH, *PEERS)
    colours = {n: pyplot.get_cmap("tab20")(i) for i, n in enumerate(names)}
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, row in zip(axes.flat, rows, strict=False):
        read = [(n, median(row, n)) for n in names if median(row, n) is not None]
        called, us = zip(*read, strict=True)
        colour = [colours[name] for name in called]
        axis.barh([label(name) for name in called], [value / 1e3 for value in us], color=colour)
        axis.invert_yaxis()
        axis.set(xscale="log", title=row["op"], xlabel="ms")
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    figure.suptitle("49 views, 224 x 224, P = 16, C = 384, float32")
    save_figure(figure, path)


def plot_growth(results: Row, path: Path) -> None:
    """Time and peak memory against the views, the pixels and the channels."""
    from matplotlib import pyplot

    main = {"views": 49, "pixels": 224**2, "channels": 384}

    def at(row: Row) -> dict[str, int]:
        if "pixels" in row:
            return {key: row[key] for key in main}
        pixels = row["grid"][0] * row["patch"][0] * row["grid"][1] * row["patch"][1]
        return {"views": row["views"], "pixels": pixels, "channels": row["channels"]}

    def along(rows: list[Row], axis: str) -> list[Row]:
        others = [key for key in main if key != axis]
        chosen = [row for row in rows if all(at(row)[key] == main[key] for key in others)]
        return sorted(chosen, key=lambda row: at(row)[axis])

    times = [row for row in results["rows"] if row.get("growth")]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for (time, space), axis in zip(axes.T, main, strict=True):
        rows = along(times, axis)
        for name in ("published", "GEMM", FRESH, "ours"):
            points = [(at(r)[axis], median(r, name)) for r in rows if median(r, name) is not None]
            at_points, ms = [p for p, _ in points], [us / 1e3 for _, us in points]
            time.plot(at_points, ms, "o-", label=label(name))
        for way in dict.fromkeys(row["way"] for row in results["memory"]):
            rows = [r for r in results["memory"] if r["way"] == way and "bytes" in r]
            points = [(at(row)[axis], row["bytes"] / 1e6) for row in along(rows, axis)]
            if len(points) > 1:
                space.plot(*zip(*points, strict=True), "o-", label=way)
        time.set(xscale="log", yscale="log", ylabel="ms", title=f"mean, bilinear: {axis}")
        space.set(xscale="log", yscale="log", ylabel="peak, MB", xlabel=axis)
        time.legend(fontsize="small")
        space.legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": path.name}):  # identical numbers, identical file
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON files of `python -m benchmarks`.")
    ] = None,
) -> None:
    """Write NAME.md and its plots next to each JSON; print the README's table."""
    for path in files or [*RESULTS.glob("cpu.json"), *RESULTS.glob("cuda-*.json")]:
        results = load(path)
        path.with_suffix(".md").write_text(document(results, path.stem))
        plot_peers(results, path.with_name(f"{path.stem}-peers.svg"))
        if has_growth(results):
            plot_growth(results, path.with_name(f"{path.stem}-growth.svg"))
        print(readme(results))


if __name__ == "__main__":
    typer.run(main)
