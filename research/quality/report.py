"""Tables and plots of quality.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import markdown, save_figure
from research.quality.frontier import (
    COLUMNS,
    ERRORS,
    PRESETS,
    Point,
    compared,
    frontier,
    preset,
    share_of_best,
)
from research.quality.settings import FLIP, IDENTITY, Setting

Row = dict[str, Any]
TITLES = {
    "davis": "DAVIS: label propagation",
    "camvid": "CamVid: segmentation with a linear head, edges",
    "motorcycle": "stereo_motorcycle: disparity with a linear head",
    "nyu": "NYUv2: depth with a linear head",
    "discovery": "DAVIS: object discovery by a normalised cut",
    "ecssd": "ECSSD: object discovery by a normalised cut",
    "duts": "DUTS: object discovery by a normalised cut",
    "omron": "DUT-OMRON: object discovery by a normalised cut",
    "retrieval": "CamVid: region retrieval across sequences",
    "classification": "Classification with the model's own head",
    "imagenet": "ImageNet: classification with the model's own head",
}
CUTS = ("discovery", "ecssd", "duts", "omron")
CUT = ("IoU", "accuracy", "F", "CorLoc", "IoU_more", "IoU_published")
HEAD = ("agreement", "confidence")
# The columns of each task, and whether lower is better.
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
# The scores of the table of all settings. Classification (views injected into a head) has no field.
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
    "discovery": "discovery",
    "ecssd": "ECSSD",
    "duts": "DUTS",
    "omron": "DUT-OMRON",
    "retrieval": "retrieval",
}
# For tasks with items: the score that is compared with plain tokens item by item, and the items.
PAIRED = {
    "davis": ("J", "sequence"),
    "discovery": ("IoU", "sequence"),
    "retrieval": ("mAP", "class"),
}
READ = {  # in the summary and in the README
    "davis": "label propagation, DAVIS",
    "camvid": "segmentation with a linear head, CamVid",
    "motorcycle": "disparity with a linear head",
    "nyu": "depth with a linear head, NYUv2",
    "discovery": "object discovery, DAVIS",
    "retrieval": "region retrieval, CamVid",
}
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
    return Setting(**{name: row[name] for name in Setting.__dataclass_fields__ if name in row})


def words(setting: Setting) -> str:
    """The name of a setting in the tables, without layer and stride."""
    named = {
        "labels": "ground-truth labels",
        "plain": "plain tokens",
        "bilinear": "plain tokens, bilinear",
    }
    if setting.family in named:
        return named[setting.family]
    parts = []
    if setting.second:
        parts.append(f"mean of scales {setting.scale:g} and {setting.second:g}")
    elif setting.scale != 1:
        parts.append(f"scale {setting.scale:g}")
    if setting.tokens != "model":
        parts.append({"overlap": "overlapping patches", "windows": "windows"}[setting.tokens])
    name = setting.views.removesuffix(FLIP)
    views = "published" if setting.family == "published" else f"`{name}`"
    if name != IDENTITY:
        parts.append(views)
    elif setting.family in ("enlarged", "windows"):
        parts.append("no SRT")
    elif not parts:
        parts.append("one view")
    if setting.views != name:
        parts.append("flips")
    if setting.reduce == "median":
        parts.append("median")
    token_scale = setting.family in ("enlarged", "both") and setting.upsample == "nearest"
    if setting.family == "study" or token_scale:
        parts += [setting.upsample]
    if setting.unit:
        parts.append("unit tokens")
    if setting.centre:
        parts.append("middle of cells")
    return ", ".join(parts)


def place(setting: Setting) -> tuple[Any, ...]:
    """Sort key: stride, forward passes, then the name with numbers in numerical order."""
    text = words(setting)
    return -setting.stride, setting.forwards, re.sub("[0-9]+", lambda n: n[0].zfill(3), text)


def runs(results: Row) -> list[tuple[str, str, str]]:
    """(task, protocol, model) of all rows except costs."""
    rows = [r for r in results["rows"] if r["task"] in TITLES]
    found = [(r["task"], r["protocol"], r["model"]) for r in rows]
    # By task, then the run with the most rows first.
    return sorted(
        dict.fromkeys(found), key=lambda run: (list(TITLES).index(run[0]), -found.count(run))
    )


def gathered(results: Row, run: tuple[str, str, str]) -> dict[Setting, dict[str, Row]]:
    """The scores of each setting of a run, by item (a sequence; "" for tasks without items).

    Only items that all settings have are included, so that means of an interrupted run are
    comparable.
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
    """Seconds of each setting, for an image of the height of a run."""
    _, protocol, model = run
    return {
        setting_of(row): row["scores"]["seconds"]
        for row in results["rows"]
        if row["task"] == "cost"
        and row["model"] == model
        and protocol.startswith(row["protocol"] + ",")
    }


def against(found: dict[Setting, dict[str, Row]], setting: Setting) -> dict[str, Row] | None:
    """The control without SRT on the same grid: bilinear tokens, at token scale plain tokens."""
    for other, scores in found.items():
        same = (other.layer, other.stride) == (setting.layer, setting.stride)
        if same and other.family in ("bilinear", "plain"):
            return scores
    return None


def paired(differences: list[float]) -> str:
    """The mean, its standard error, and the number of differences above 0."""
    count, above = len(differences), sum(d > 0 for d in differences)
    error = f" ± {np.std(differences, ddof=1) / count**0.5:.3f}" if count > 1 else ""
    return f"{np.mean(differences):+.3f}{error}, {above} of {count}"


def operations(results: Row, model: str) -> dict[Setting, dict[str, float]]:
    """Operations of the model for each setting, by image size."""
    found: dict[Setting, dict[str, float]] = {}
    for row in results["rows"]:
        if (row["task"], row["model"]) == ("operations", model):
            found.setdefault(setting_of(row), {})[row["item"]] = row["scores"]["flop"]
    return found


def sizes(results: Row) -> list[str]:
    """The image sizes for which operations are counted, smallest first."""
    found = {r["item"] for r in results["rows"] if r["task"] == "operations"}
    return sorted(found, key=lambda size: int(size.split()[0]))


def seconds(results: Row) -> dict[tuple[Setting, str], float]:
    """Seconds by setting and image size."""
    rows = [row for row in results["rows"] if row["task"] == "cost"]
    return {(setting_of(row), row["item"]): row["scores"]["seconds"] for row in rows}


def first_of(results: Row, task: str) -> tuple[str, str, str] | None:
    """The run of a task for the frontier: with all images if there is one, else with most rows."""
    found = [run for run in runs(results) if run[0] == task]
    return min(found, key=lambda run: "all pictures" not in run[1], default=None)


def points(results: Row, stride: int) -> list[Point]:
    """Settings of one stride with all scores that plain tokens have, ordered by cost."""
    (model,) = {run[2] for run in runs(results)}
    counted = operations(results, model)
    (plain,) = (s for s in counted if s.family == "plain")
    scores: dict[Setting, dict[tuple[str, str], float]] = {}
    for task, name in COLUMNS:
        if run := first_of(results, task):
            for s, found in gathered(results, run).items():
                scores.setdefault(s, {})[task, name] = mean(found, name)
    chosen = [
        Point(s, [counted[s][z] / counted[plain][z] for z in sizes(results)], scores[s])
        for s in counted
        if s.stride == stride and s in scores and compared(s)
    ]
    (base,) = (p for p in chosen if p.setting.family in ("plain", "bilinear"))
    chosen = [p for p in chosen if p.scores.keys() == base.scores.keys()]
    share_of_best(chosen, base)
    return sorted(chosen, key=lambda p: p.cost)


def ratios(values: list[float], digits: int = 1) -> str:
    return " / ".join(f"{round(value, digits) + 0.0:.{digits}f}" for value in values)  # no -0


def described(p: Point) -> list[str]:
    """The cells of a point: name, cost, scores and gains."""
    scores = [f"{v:.{1 if c[1] in ERRORS else 3}f}" for c, v in p.scores.items()]
    gains = ratios([100 * gain for gain in p.tasks.values()], 0)
    return [words(p.setting), ratios(p.cost), *scores, gains, f"{100 * p.gain:.0f}"]


def headings(p: Point) -> list[str]:
    """The headings of :func:`described`."""
    scores = [f"{SHORT[task]} {WORDS.get(name, name)}" for task, name in p.scores]
    return [
        "field",
        "cost",
        *scores,
        f"gain, %: {' / '.join(SHORT[task] for task in p.tasks)}",
        "mean gain, %",
    ]


def frontier_table(results: Row, stride: int) -> str:
    """All compared settings; those on the frontier of mean gain against cost are marked."""
    shown, taken = points(results, stride), seconds(results)
    best = frontier([p.cost[0] for p in shown], [p.gain for p in shown])
    lines = []
    for p, marked in zip(shown, best, strict=True):
        read = [taken[p.setting, size] for size in sizes(results) if (p.setting, size) in taken]
        lines.append([*described(p), ratios(read, 2), "x" if marked else ""])
    return markdown([*headings(shown[0]), "s", "frontier"], lines)


def presets(results: Row, stride: int) -> str:
    """The setting that each budget selects."""
    shown = points(results, stride)
    lines = []
    for name, (budget, tasks) in PRESETS.items():
        if p := preset(shown, budget, tasks):
            counted = ", ".join(SHORT[task] for task in tasks) or "all"
            lines.append([name, str(budget), counted, *described(p)])
    return markdown(["preset", "budget", "tasks", *headings(shown[0])], lines)


# The settings of the summary: (scale, views) of each. Those of FOUR are the rows of the README.
SUMMARISED = {
    "plain tokens, interpolated": (1.0, IDENTITY),
    "input enlarged by 1.5": (1.5, IDENTITY),
    "SRT, 4 views (`fast`)": (1.0, "best:4:6"),
    "SRT, 9 views": (1.0, "best:9:6"),
    "both: 1.25, 4 views (`balanced`, the default)": (1.25, "best:4:6"),
    "both: 1.5, 4 views (`outlines`)": (1.5, "best:4:6"),
}
NAMED = {name: name.split("`")[1] for name in SUMMARISED if "`" in name}  # presets
FOUR = ("plain tokens", "input enlarged", "SRT, 4 views", "both: 1.25")


def readme(results: Row) -> str:
    """The table of the README: four settings, cost at the larger of the two image sizes."""
    size = sizes(results)[-1]
    names = [name for name in SUMMARISED if name.startswith(FOUR)]
    return overview(results, names, f"cost in plain forward passes, {size.replace(' ', '')}", -1)


def overview(results: Row, names: list[str], cost: str, at: int | None = None) -> str:
    """Scores of settings of :class:`srt_ext.SRT` at stride 8; the best of a column is bold.

    Args:
        results: of quality.json.
        names: keys of SUMMARISED, the rows of the table.
        cost: heading of the column of costs.
        at: index of the one image size whose cost is shown; None: the costs at all sizes.
    """
    own = {(p.setting.scale, p.setting.views): p for p in points(results, 8) if p.in_library}
    shown = {name: own[SUMMARISED[name]] for name in names}
    columns = list(shown[names[0]].scores)
    best = {
        (task, name): (min if name in ERRORS else max)(p.scores[task, name] for p in shown.values())
        for task, name in columns
    }
    lines = []
    for label, p in shown.items():
        costs = p.cost if at is None else [p.cost[at]]
        cells = []
        for column in columns:
            digits = 1 if column[1] in ERRORS else 3
            text = f"{p.scores[column]:.{digits}f}"
            cells.append(f"**{text}**" if text == f"{best[column]:.{digits}f}" else text)
        lines.append([label, ratios(costs, 0), *cells])
    heads = [
        f"{READ[task]}: {WORDS.get(name, name)} {'↓' if name in ERRORS else '↑'}"
        for task, name in columns
    ]
    return markdown(["setting", cost, *heads], lines)


def windows(results: Row) -> str:
    """Resampled position embeddings against windows of the trained size."""
    davis, camvid = (first_of(results, task) for task in ("davis", "camvid"))
    if davis is None or camvid is None:
        return ""
    found, other = gathered(results, davis), gathered(results, camvid)
    shown = [s for s in found if s.family == "windows" and s in other]
    if not shown:
        return ""
    counted = operations(results, davis[2])
    (plain,) = (s for s in counted if s.family == "plain")
    lines = []
    for window in sorted(shown, key=lambda s: (s.scale, s.forwards)):
        same = [
            s
            for s in found
            if (s.scale, s.views, s.stride, s.layer)
            == (window.scale, window.views, window.stride, window.layer)
            and (s.tokens, s.reduce, s.upsample, s.second) == ("model", "mean", "bilinear", 0)
            and s.family not in ("labels", "study")
            and s in other
        ]
        for label, s in (*(("resampled", s) for s in same), ("windows", window)):
            cost = ratios([counted[s][z] / counted[plain][z] for z in sizes(results)])
            values = [mean(found[s], "J"), mean(found[s], "F"), mean(other[s], "miou")]
            views = len(s.design.offsets)
            lines.append([f"{s.scale:g}", label, str(views), cost, *(f"{v:.3f}" for v in values)])
    head = ["scale", "positions", "views", "cost", "DAVIS J", "DAVIS F", "CamVid mIoU"]
    return markdown(head, lines)


def table(results: Row, run: tuple[str, str, str], layer: int) -> str:
    """All settings of one layer, by stride and cost; bold: the best of a column for each stride.

    Tasks in PAIRED also have the difference to plain tokens on the same grid, item by item.
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
    head = ["field", "stride", "passes", "s", *(WORDS.get(n, n) for n, _ in SCORES[task])]
    control = [f"{PAIRED[task][0]} above plain tokens"] if task in PAIRED else []
    return markdown(head + control, lines)


def document(results: Row) -> str:
    """quality.md."""
    facts = results["machine"]
    measured = sorted({r["item"] for r in results["rows"] if r["task"] == "cost"})
    parts = [
        "# quality",
        "![Quality against operations](quality.svg)",
        f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}. "
        "[research/README.md](../README.md#quality-against-cost) describes "
        "the tasks.",
        "- Field: views are written as in `srt_ext.SRT(views=...)`; the result is their mean "
        "unless a row says median. Scale: factor by which the image is enlarged. `published`: "
        'views `paper:3`, nearest upsampling, `border="zeros"`. All other rows use bilinear '
        'upsampling and `border="coverage"`, unless a row says nearest.\n'
        "- Plain tokens: the output of the model, without SRT; bilinear: the same, interpolated to "
        "a finer stride.\n"
        "- Passes: forward passes of the model per image. s: seconds on one core for an image of "
        f"{' or '.join(measured)} pixels, median of 3.\n"
        "- Bold: the best of a column for each stride.",
    ]
    counted = operations(results, runs(results)[0][2])
    if counted:
        stride = max(s.stride for s in counted) // 2
        parts += [
            "## Summary",
            "Last layer, stride 8; plain tokens are interpolated to the same grid. Cost: "
            "operations of the model, as a multiple of one forward pass on the plain image, for "
            f"images of {' and '.join(sizes(results))} pixels. ↑: higher is better; ↓: lower is "
            "better; bold: the best of a column.",
            overview(results, list(SUMMARISED), "cost in plain forward passes"),
            "## The best quality for a given cost",
            f"Last layer, stride {stride}. Cost: operations of the model in plain forward passes, "
            f"for images of {' and '.join(sizes(results))} pixels. Gain: improvement over plain "
            "tokens on the same grid, as a percentage of the largest improvement of any setting; "
            "the mean gain is over the tasks. x: on the frontier (no setting of at most this cost "
            "has a larger mean gain).",
            frontier_table(results, stride),
            "### Presets",
            "Each preset is the setting of `srt_ext.SRT` with the largest mean gain on the listed "
            "tasks, among the settings that are below plain tokens on none of these tasks and "
            "within the budget (plain forward passes) at both image sizes.",
            presets(results, stride),
        ]
    if fixed := windows(results):
        parts += [
            "### Position embeddings: resampled, or windows of the trained size",
            "Resampled: the position embeddings are interpolated to the token grid of the image. "
            "Windows: the model sees windows of its training size, which overlap by at least a "
            "third; overlapping tokens are averaged.",
            fixed,
        ]
    parts += ["## All settings, last layer", summary(results)]
    for run in runs(results):
        task, protocol, model = run
        found = gathered(results, run)
        items = sorted({item for scores in found.values() for item in scores if item})
        parts += [
            f"## {TITLES[task]}",
            f"{model}; {protocol.replace('picture', 'image')}"
            + (f"; {len(items)}: {', '.join(items)}." if items else "."),
        ]
        for layer in sorted({s.layer for s in found}):
            parts += [f"### Layer {layer}", table(results, run, layer)]
        if task in PAIRED:
            score, of_what = PAIRED[task]
            parts += [f"### By {of_what}", by_item(found, score)]
    return "\n\n".join(parts) + "\n"


def by_item(found: dict[Setting, dict[str, Row]], score: str) -> str:
    """A score by item, for plain tokens, the published setting, and SRT with 9 and 16 views."""
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
    """All settings of the last layer, over all runs; without the family ``study``."""
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
    return markdown(["field", "stride", "passes", "s", *heads], lines)


def height(run: tuple[str, str, str]) -> str:
    """The height of a protocol: pixels, or full; and whether all images are used."""
    words = run[1].split()[0]
    return f"{words}, all" if run[0] == "camvid" and "all pictures" in run[1] else words


def curve(p: Point) -> str:
    """The curve of a point in the plot."""
    s = p.setting
    if s.family in ("bilinear", "ours", "enlarged", "both"):
        return "not enlarged" if s.scale == 1 else f"enlarged by {s.scale:g}"
    return {
        "flips": "flips",
        "scales": "two scales",
        "overlap": "overlapping patches",
        "windows": f"windows, enlarged by {s.scale:g}",
        "published": "published",
    }[s.family]


STYLES = {
    "not enlarged": "C0o-",
    "enlarged by 1.25": "C1o-",
    "enlarged by 1.5": "C2o-",
    "enlarged by 2": "C3o-",
    "enlarged by 3": "C4o-",
    "windows, enlarged by 1": "C0^--",
    "windows, enlarged by 1.5": "C2^--",
    "windows, enlarged by 2": "C3^--",
    "flips": "kx",
    "two scales": "k+",
    "overlapping patches": "kD",
    "published": "ks",
}


# Style and label of each curve in the plot of the README.
FAMILIES = {
    "enlarged": ("C1o--", "input enlarged (by 1.25, 1.5, 2)"),
    "ours": ("C0o-", "SRT (2, 4, 9, 16 views)"),
    "both": ("C2D", "both (2 to 6 views of an enlarged input)"),
    "bilinear": ("ks", "plain tokens, interpolated"),
}


def plot_readme(results: Row, path: Path) -> None:
    """Two scores at stride 8 against cost, small enough for the README: outlines and classes."""
    from matplotlib import pyplot

    found = points(results, 8)
    size = sizes(results)[-1].replace(" ", "")
    names = {SUMMARISED[name]: preset for name, preset in NAMED.items()}
    with pyplot.rc_context({"font.size": 10}):
        figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
        for axis, (task, name) in zip(axes, (("davis", "J"), ("camvid", "miou")), strict=True):
            base = next(p for p in found if p.setting.family == "bilinear")
            for family, (style, label) in FAMILIES.items():
                shown = [p for p in found if p.setting.family == family]
                if family in ("enlarged", "ours"):  # scale 1 and one view are the plain tokens
                    shown.insert(0, base)
                at = [(p.cost[-1], p.scores[task, name]) for p in shown]
                axis.plot(*zip(*at, strict=True), style, markersize=5, label=label)
                for p, (cost, value) in zip(shown, at, strict=True):
                    if preset := names.get((p.setting.scale, p.setting.views)):
                        axis.annotate(
                            preset,
                            (cost, value),
                            xytext=(-24, -14) if preset == "balanced" else (6, -11),
                            textcoords="offset points",
                            fontsize="small",
                        )
            axis.set(xscale="log", xlabel=f"cost in plain forward passes, {size}")
            task_name = READ[task].replace(" with a linear head", "")
            axis.set_title(f"{task_name}: {WORDS.get(name, name)} ↑", fontsize="medium")
            axis.set_xticks(ticks := [1, 2, 4, 8, 16, 32], [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="medium")
        save_figure(figure, path)


def plot(results: Row, path: Path) -> None:
    """Each score at half a patch against cost; upwards is better."""
    from matplotlib import pyplot

    patch = max(s.stride for s in operations(results, runs(results)[0][2]))
    found = points(results, patch // 2)
    columns = list(found[0].scores)
    figure, grid = pyplot.subplots(
        -(-len(columns) // 2), 2, figsize=(9, 7.4), layout="constrained", squeeze=False
    )
    shown: dict[str, Any] = {}
    for axis, (task, name) in zip(grid.flat, columns, strict=False):
        less = name in ERRORS
        values = [(p.cost[0], p.scores[task, name]) for p in found]
        best = frontier(*zip(*((c, -v if less else v) for c, v in values), strict=True))
        line = [at for at, keep in zip(values, best, strict=True) if keep]
        (shown["frontier"],) = axis.step(
            *zip(*line, strict=True), where="post", color="0.8", linewidth=6, zorder=0
        )
        for label, style in STYLES.items():
            line = [at for p, at in zip(found, values, strict=True) if curve(p) == label]
            if line:
                (shown[label],) = axis.plot(*zip(*line, strict=True), style, markersize=5)
        axis.set(
            xscale="log",
            xlabel=f"cost in plain forward passes, {sizes(results)[0]}",
            ylabel=f"{WORDS.get(name, name)}{', reversed' if less else ''}",
            title=f"{TITLES[task]}",
        )
        axis.title.set_fontsize("medium")
        if less:
            axis.invert_yaxis()
        axis.set_xticks(ticks := [1, 2, 4, 8, 16, 32, 64], [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in grid.flat[len(columns) :]:
        axis.remove()
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize="small"
    )
    save_figure(figure, path)
