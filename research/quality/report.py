"""Tables and plot of quality.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import markdown, save_figure
from research.quality.settings import IDENTITY, Setting

Row = dict[str, Any]
TITLES = {
    "davis": "DAVIS: labels propagated",
    "camvid": "CamVid: linear head, edges",
    "motorcycle": "Disparity of stereo_motorcycle: linear head",
    "nyu": "NYUv2: depth, linear head",
    "discovery": "DAVIS: objects by a normalised cut",
    "ecssd": "ECSSD: objects by a normalised cut",
    "duts": "DUTS: objects by a normalised cut",
    "omron": "DUT-OMRON: objects by a normalised cut",
    "retrieval": "CamVid: regions retrieved from other sequences",
    "classification": "Classes of the model's own head",
    "imagenet": "ImageNet: classes of the model's own head",
}
CUTS = ("discovery", "ecssd", "duts", "omron")
CUT = ("IoU", "accuracy", "F", "CorLoc", "IoU_more", "IoU_published")
HEAD = ("agreement", "confidence")
# Of each task: the columns, and whether less is better.
SCORES = {
    "davis": (("J", False), ("F", False)),
    "camvid": (("miou", False), ("miou_plain_head", False), ("edge_F", False)),
    "motorcycle": (("rmse", True), ("abs_rel", True), ("delta", False)),
    "nyu": (("rmse", True), ("abs_rel", True), ("delta", False)),
    **dict.fromkeys(CUTS, tuple((n, False) for n in CUT)),
    "retrieval": (("mAP", False),),
    "classification": tuple((n, False) for n in HEAD),
    "imagenet": tuple((n, False) for n in ("top1", "top5", *HEAD)),
}
# What the first table and the plot have. Views injected into a head make no field: not there.
SHOWN = {
    "davis": ("J", "F"),
    "camvid": ("miou",),
    "motorcycle": ("rmse",),
    "nyu": ("rmse",),
    **dict.fromkeys(CUTS, ("IoU",)),
    "retrieval": ("mAP",),
    "classification": (),
    "imagenet": (),
}
SHORT = {
    "davis": "DAVIS",
    "camvid": "CamVid",
    "motorcycle": "disparity",
    "nyu": "NYUv2",
    "discovery": "DAVIS, cut",
    "ecssd": "ECSSD",
    "duts": "DUTS",
    "omron": "DUT-OMRON",
    "retrieval": "CamVid, retrieval",
}
# Of tasks with items the score whose differences to plain tokens are of pairs, and the items.
PAIRED = {
    "davis": ("J", "sequence"),
    "discovery": ("IoU", "sequence"),
    "retrieval": ("mAP", "class"),
}
RADII = ((0, 3), (2, 6), (1, 8), (3, 12))  # colours and pixels, of the plot
WORDS = {
    "miou": "mIoU",
    "miou_plain_head": "mIoU, head of plain tokens",
    "edge_F": "F of edges",
    "rmse": "RMSE",
    "abs_rel": "relative error",
    "delta": "within 1.25",
    "IoU_more": "IoU, more edges",
    "IoU_published": "IoU, published threshold",
    "top1": "top 1",
    "top5": "top 5",
}


def setting_of(row: Row) -> Setting:
    return Setting(**{name: row[name] for name in Setting.__dataclass_fields__})


def words(setting: Setting) -> str:
    """One line for a table, without layer and stride."""
    if setting.family == "labels":
        return "the labels themselves"
    if setting.family == "plain":
        return "plain tokens"
    if setting.family == "bilinear":
        return "plain tokens, bilinear"
    parts = ["published" if setting.family == "published" else f"`{setting.views}`"]
    if setting.views == IDENTITY:
        parts = ["one view"]
    if setting.reduce == "median":
        parts.append("median")
    if setting.family == "study":
        parts += [setting.upsample]
    if setting.unit:
        parts.append("unit tokens")
    if setting.centre:
        parts.append("middle of cells")
    return ", ".join(parts)


def place(setting: Setting) -> tuple[Any, ...]:
    """Where it stands in a table: by stride, forwards, and numbers by their size."""
    text = words(setting)
    return -setting.stride, setting.forwards, re.sub("[0-9]+", lambda n: n[0].zfill(3), text)


def runs(results: Row) -> list[tuple[str, str, str]]:
    """(task, protocol, model) of all rows, but for costs."""
    found = [(r["task"], r["protocol"], r["model"]) for r in results["rows"] if r["task"] != "cost"]
    # By task; of one task what was measured most comes first.
    return sorted(
        dict.fromkeys(found), key=lambda run: (list(TITLES).index(run[0]), -found.count(run))
    )


def gathered(results: Row, run: tuple[str, str, str]) -> dict[Setting, dict[str, Row]]:
    """Of a run the scores of each setting, by item: sequences, or one that has no name.

    Of a run that was ended, only the sequences that all settings have: means can be compared.
    """
    found: dict[Setting, dict[str, Row]] = {}
    for row in results["rows"]:
        if (row["task"], row["protocol"], row["model"]) == run:
            found.setdefault(setting_of(row), {})[row["item"]] = row["scores"]
    common = set.intersection(*(set(scores) for scores in found.values()))
    return {
        setting: {item: score for item, score in scores.items() if item in common}
        for setting, scores in found.items()
    }


def mean(scores: dict[str, Row], name: str) -> float:
    return float(np.mean([score[name] for score in scores.values()]))


def costs(results: Row, run: tuple[str, str, str]) -> dict[Setting, float]:
    """Seconds of each setting, of a picture as high as those of a run."""
    _, protocol, model = run
    return {
        setting_of(row): row["scores"]["seconds"]
        for row in results["rows"]
        if row["task"] == "cost"
        and row["model"] == model
        and protocol.startswith(row["protocol"] + ",")
    }


def against(found: dict[Setting, dict[str, Row]], setting: Setting) -> dict[str, Row] | None:
    """What has no SRT and the same grid: bilinear tokens, or, at token scale, plain ones."""
    for other, scores in found.items():
        same = (other.layer, other.stride) == (setting.layer, setting.stride)
        if same and other.family in ("bilinear", "plain"):
            return scores
    return None


def paired(differences: list[float]) -> str:
    """Mean and its standard error, and how many are above 0."""
    count, above = len(differences), sum(d > 0 for d in differences)
    error = f" ± {np.std(differences, ddof=1) / count**0.5:.3f}" if count > 1 else ""
    return f"{np.mean(differences):+.3f}{error}, {above} of {count}"


def table(results: Row, run: tuple[str, str, str], layer: int) -> str:
    """All settings of one layer, by stride and forwards; the best of a column in each stride bold.

    With a score of PAIRED also that above plain tokens on the same grid, item by item.
    """
    task = run[0]
    found = {s: v for s, v in gathered(results, run).items() if s.layer == layer and v}
    taken = costs(results, run)
    order = sorted(found, key=place)
    best: dict[tuple[int, str], float] = {}
    for name, less in SCORES[task]:
        choose: Callable[..., float] = min if less else max
        for stride in {s.stride for s in order}:
            values = [
                round(mean(found[s], name), 3)
                for s in order
                if s.stride == stride and s.family != "labels"
            ]
            best[stride, name] = choose(values, default=0.0)
    lines = []
    for s in order:
        cells = []
        for name, _ in SCORES[task]:
            value = round(mean(found[s], name), 3)
            text = f"{value:.3f}"
            cells.append(f"**{text}**" if value == best[s.stride, name] else text)
        if task in PAIRED:
            first = PAIRED[task][0]
            control = against(found, s)
            if control is None or s.family in ("labels", "plain", "bilinear"):
                cells.append("")
            else:
                cells.append(
                    paired([v[first] - control[item][first] for item, v in found[s].items()])
                )
        seconds = f"{taken[s]:.2f}" if s in taken else "-"
        forwards = "-" if s.family == "labels" else str(s.forwards)
        lines.append([words(s), str(s.stride), forwards, seconds, *cells])
    head = ["field", "stride", "forwards", "s", *(WORDS.get(n, n) for n, _ in SCORES[task])]
    return markdown(head + ([f"{PAIRED[task][0]} above plain"] if task in PAIRED else []), lines)


def document(results: Row) -> str:
    """quality.md."""
    facts = results["machine"]
    sizes = sorted({r["item"] for r in results["rows"] if r["task"] == "cost"})
    parts = [
        "# quality",
        "![Quality against the number of forwards](quality.svg)",
        f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}. `s`: one picture of "
        f"{', '.join(sizes)} pixels by `srt_ext.SRT`, {facts['threads']} threads, median of 3. "
        "`published`: views `paper:3`, nearest upsampling, border zeros; the others are bilinear, "
        "border coverage. Means over views where nothing else is said. The best of a column is "
        "bold, for each stride. Plain tokens at a stride of a patch are as the model gives them; "
        "at finer strides they are enlarged: SRT's grid without SRT.",
    ]
    parts += ["## All of them: the last layer", summary(results)]
    for run in runs(results):
        task, protocol, model = run
        found = gathered(results, run)
        items = sorted({item for scores in found.values() for item in scores if item})
        parts += [
            f"## {TITLES[task]}",
            f"{model}; {protocol}" + (f"; {len(items)}: {', '.join(items)}." if items else "."),
        ]
        for layer in sorted({s.layer for s in found}):
            parts += [f"### Layer {layer}", table(results, run, layer)]
        if task in PAIRED:
            score, of_what = PAIRED[task]
            parts += [f"### By {of_what}", by_item(found, score)]
    return "\n\n".join(parts) + "\n"


def by_item(found: dict[Setting, dict[str, Row]], score: str) -> str:
    """A score by item: what has no SRT, what was published, and ours with as few views."""
    shown = [
        s
        for s in found
        if s.reduce == "mean"
        and (s.family in ("plain", "bilinear", "published") or s.views in ("best:9:6", "best:16:6"))
    ]
    items = sorted({item for s in shown for item in found[s]})
    return markdown(
        ["field", "stride", "layer", *items],
        (
            [words(s), str(s.stride), str(s.layer)] + [f"{found[s][i][score]:.3f}" for i in items]
            for s in sorted(shown, key=lambda s: (s.layer, -s.stride, s.forwards))
        ),
    )


def summary(results: Row) -> str:
    """Each way to make a field of the last layer, over all runs; without the study."""
    chosen = [run for run in runs(results) if SHOWN[run[0]]]
    values: dict[Setting, dict[tuple[int, str], float]] = {}
    taken: dict[Setting, float] = {}
    for i, run in enumerate(chosen):
        found = gathered(results, run)
        layer = max(s.layer for s in found)
        for s, scores in found.items():
            if s.layer == layer and s.family not in ("labels", "study"):
                row = values.setdefault(replace(s, layer=-1), {})
                row |= {(i, name): mean(scores, name) for name, _ in SCORES[run[0]]}
                if s in costs(results, run):
                    taken.setdefault(replace(s, layer=-1), costs(results, run)[s])
    columns = [(i, name) for i, run in enumerate(chosen) for name in SHOWN[run[0]]]
    lines = []
    for s in sorted(values, key=place):
        cells = [f"{values[s][at]:.3f}" if at in values[s] else "" for at in columns]
        seconds = f"{taken[s]:.2f}" if s in taken else "-"
        lines.append([words(s), str(s.stride), str(s.forwards), seconds, *cells])
    heads = [f"{SHORT[chosen[i][0]]} {height(chosen[i])}: {WORDS.get(n, n)}" for i, n in columns]
    return markdown(["field", "stride", "forwards", "s", *heads], lines)


def height(run: tuple[str, str, str]) -> str:
    """The first word of a protocol: pixels, or full."""
    return run[1].split()[0]


def of(family: str, stride: int, radius: int = 0) -> Callable[[Setting], bool]:
    """Which settings a curve has: means; with a radius ``views.best``, and the 49 of a grid."""
    design = re.compile(f"best:[0-9]+:{radius}|grid:{radius}(:2)?" if radius else ".*")

    def keep(s: Setting) -> bool:
        same = (s.family, s.stride, s.reduce) == (family, stride, "mean")
        return same and design.fullmatch(s.views) is not None

    return keep


def plot(results: Row, path: Path) -> None:
    """The first score of each run against forwards, of the last layer; up is better."""
    from matplotlib import pyplot

    chosen = [run for run in runs(results) if SHOWN[run[0]]]
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(4.2 * columns, 3.2 * rows + 0.8),
        layout="constrained",
        squeeze=False,
    )
    for axis in grid.flat[len(chosen) :]:
        axis.remove()
    shown: dict[str, Any] = {}
    for axis, run in zip(grid.flat, chosen, strict=False):
        found = gathered(results, run)
        name, less = SCORES[run[0]][0]
        layer = max(s.layer for s in found)
        values = {s: mean(v, name) for s, v in found.items() if s.layer == layer}
        patch, half = sorted({s.stride for s in values}, reverse=True)[:2]
        for label, family, style in (
            (f"no SRT, stride {patch}", "plain", ":"),
            (f"no SRT, stride {half}", "bilinear", "--"),
        ):
            (level,) = (v for s, v in values.items() if s.family == family and s.stride >= half)
            shown[label] = axis.axhline(level, color="0.4", linestyle=style, label=label)
        for label, style, keep in (
            (f"published, stride {patch}", "kx", of("published", patch)),
            (f"published, stride {half}", "kD", of("published", half)),
            *((f"radius {r}, stride {half}", f"C{i}o-", of("ours", half, r)) for i, r in RADII),
            (f"radius 6, stride {patch}", "C2x", of("ours", patch, 6)),
            (f"radius 6, stride {half // 2}", "C2^--", of("ours", half // 2, 6)),
        ):
            points = sorted((s.forwards, value) for s, value in values.items() if keep(s))
            if points:
                (shown[label],) = axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(
            xscale="log",
            xlabel="forwards of the model",
            ylabel=f"{WORDS.get(name, name)}{', reversed' if less else ''}",
            title=f"{TITLES[run[0]]}\n{height(run)} pixels high, layer {layer}",
        )
        axis.title.set_fontsize("medium")
        if less:
            axis.invert_yaxis()
        axis.set_xticks(ticks := [4, 9, 16, 50], [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize="small"
    )
    save_figure(figure, path)
