"""Tables and plot of quality.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.settings import IDENTITY, Setting
from benchmarks.report import _save, markdown

Row = dict[str, Any]
TITLES = {
    "davis": "DAVIS: labels propagated",
    "camvid": "CamVid: linear head, edges",
    "motorcycle": "Disparity of stereo_motorcycle: linear head",
    "nyu": "NYUv2: depth, linear head",
}
# Of each task: the columns, and whether less is better.
SCORES = {
    "davis": (("J", False), ("F", False)),
    "camvid": (("miou", False), ("miou_plain_head", False), ("edge_F", False)),
    "motorcycle": (("rmse", True), ("abs_rel", True), ("delta", False)),
    "nyu": (("rmse", True), ("abs_rel", True), ("delta", False)),
}
WORDS = {
    "miou": "mIoU",
    "miou_plain_head": "mIoU, head of plain tokens",
    "edge_F": "F of edges",
    "rmse": "RMSE",
    "abs_rel": "relative error",
    "delta": "within 1.25",
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


def runs(results: Row) -> list[tuple[str, str, str]]:
    """(task, protocol, model) of all rows, but for costs."""
    found = [(r["task"], r["protocol"], r["model"]) for r in results["rows"] if r["task"] != "cost"]
    return sorted(dict.fromkeys(found), key=lambda run: list(TITLES).index(run[0]))


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


def costs(results: Row, model: str) -> dict[Setting, float]:
    return {
        setting_of(row): row["scores"]["seconds"]
        for row in results["rows"]
        if row["task"] == "cost" and row["model"] == model and row["scores"]
    }


def against(found: dict[Setting, dict[str, Row]], setting: Setting) -> dict[str, Row] | None:
    """What has no SRT and the same grid: bilinear tokens, or, at token scale, plain ones."""
    for other, scores in found.items():
        same = (other.layer, other.stride) == (setting.layer, setting.stride)
        if same and other.family in ("bilinear", "plain"):
            return scores
    return None


def table(results: Row, run: tuple[str, str, str], layer: int) -> str:
    """All settings of one layer, by stride and forwards; the best of a column in each stride bold.

    Of DAVIS also in how many sequences J + F is above that of plain tokens on the same grid.
    """
    task, _, model = run
    found = {s: v for s, v in gathered(results, run).items() if s.layer == layer and v}
    taken = costs(results, model)
    order = sorted(found, key=lambda s: (-s.stride, s.forwards, words(s)))
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
        if task == "davis":
            control = against(found, s)
            if control is None or s.family in ("labels", "plain", "bilinear"):
                cells.append("")
            else:
                above = sum(
                    score["J"] + score["F"] > control[item]["J"] + control[item]["F"]
                    for item, score in found[s].items()
                )
                cells.append(f"{above} of {len(control)}")
        seconds = f"{taken[s]:.2f}" if s in taken else "-"
        forwards = "-" if s.family == "labels" else str(s.forwards)
        lines.append([words(s), str(s.stride), forwards, seconds, *cells])
    head = ["field", "stride", "forwards", "s", *(WORDS.get(n, n) for n, _ in SCORES[task])]
    return markdown(head + (["above plain"] if task == "davis" else []), lines)


def document(results: Row) -> str:
    """quality.md."""
    facts = results["machine"]
    sizes = sorted({r["item"] for r in results["rows"] if r["task"] == "cost"})
    parts = [
        "# quality",
        "![Quality against the number of forwards](quality.svg)",
        f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}. `s`: one picture of "
        f"{', '.join(sizes)} pixels by `srt_ext.SRT`, {facts['threads']} threads, one reading. "
        "`published`: views `paper:3`, nearest upsampling, border zeros; the others are bilinear, "
        "border coverage. Means over views where nothing else is said. The best of a column is "
        "bold, for each stride. Plain tokens at a stride of a patch are as the model gives them; "
        "at finer strides they are enlarged: SRT's grid without SRT.",
    ]
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
        if task == "davis":
            parts += ["### By sequence", by_sequence(found)]
    return "\n\n".join(parts) + "\n"


def by_sequence(found: dict[Setting, dict[str, Row]]) -> str:
    """J of each sequence: what has no SRT, what was published, and ours with as few views."""
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
            [words(s), str(s.stride), str(s.layer)] + [f"{found[s][i]['J']:.3f}" for i in items]
            for s in sorted(shown, key=lambda s: (s.layer, -s.stride, s.forwards))
        ),
    )


def curves(stride: int) -> list[tuple[str, str, Callable[[Setting], bool]]]:
    """What the plot shows at a stride: label, style, and which settings."""

    def of(
        family: str, reduce: str = "mean", radius: int | None = None
    ) -> Callable[[Setting], bool]:
        def keep(s: Setting) -> bool:
            design = radius is None or (
                s.views.startswith("best") and s.views.endswith(f":{radius}")
            )
            return (s.family, s.stride, s.reduce) == (family, stride, reduce) and design

        return keep

    return [
        ("plain tokens", "k^", lambda s: s.family == "plain"),
        ("bilinear", "ks", of("bilinear")),
        ("published, mean", "rD", of("published")),
        ("published, median", "rd", of("published", "median")),
        *((f"views.best, radius {r}", "o-", of("ours", radius=r)) for r in (3, 6, 8)),
        ("median, radius 6", "x--", of("ours", "median")),
        (
            "token scale, radius 6",
            "k+",
            lambda s: (s.family, s.views) == ("ours", "best:16:6") and s.stride > stride,
        ),
    ]


def plot(results: Row, path: Path) -> None:
    """The first score of each run against forwards, on the grid of half a patch."""
    from matplotlib import pyplot

    chosen = runs(results)
    figure, grid = pyplot.subplots(
        1, len(chosen), figsize=(5 * len(chosen), 4.5), layout="constrained", squeeze=False
    )
    for axis, run in zip(grid[0], chosen, strict=True):
        found = gathered(results, run)
        name = SCORES[run[0]][0][0]
        layer = best_layer(found, run[0])
        values = {s: mean(v, name) for s, v in found.items() if s.layer == layer}
        stride = sorted({s.stride for s in values}, reverse=True)[1]
        for label, style, keep in curves(stride):
            points = sorted((s.forwards, value) for s, value in values.items() if keep(s))
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(
            xscale="log",
            xlabel="forwards of the model",
            ylabel=WORDS.get(name, name),
            title=f"{TITLES[run[0]]}\nlayer {layer}, stride {stride}",
        )
        axis.set_xticks(ticks := [1, 4, 9, 16, 50], [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    grid[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def best_layer(found: dict[Setting, dict[str, Row]], task: str) -> int:
    """The layer that is best without SRT: nothing that SRT does has a say."""
    name, less = SCORES[task][0]
    plain = {s.layer: mean(v, name) for s, v in found.items() if s.family == "plain"}
    return (min if less else max)(plain, key=lambda layer: plain[layer])
