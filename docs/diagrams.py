"""Draws the diagrams of ops.md and kernels.md, docs/images/*.svg: ``python docs/diagrams.py``."""

from pathlib import Path

import matplotlib
import numpy as np
import torch

from srt_ext import reference

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent / "images"
COLORS = ["#2f6fab", "#d1662a", "#3b8f5a", "#8a5aa8"]
GREY = "#666666"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "srt_ext",
    "savefig.facecolor": "white",
}


def along_x(values, offset, patch, stride=1, border="zeros"):
    """[W', C]: the field of one view of a row of tokens, values [w, C]."""
    tokens = torch.as_tensor(values, dtype=torch.float64)[None, None]
    offsets = torch.tensor([[0.0, offset]], dtype=torch.float64)
    grid, size = (1, len(values)), (1, patch)
    field = reference.ensemble(tokens, offsets, grid, size, border=border, stride=(1, stride))
    return field[0, :, 0].T.numpy()


def taps(path):
    """One axis of one view: tokens, weights of the pixels, cells of 4 pixels."""
    count, patch, offset, stride = 4, 4, 2.5, 4
    width = count * patch
    weights = along_x(np.eye(count), offset, patch)  # [W, tokens]
    covered = np.arange(width) + 0.5 + offset < width
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(7.6, 5.4), sharex=True, height_ratios=(1.1, 2.2, 1.5), layout="constrained"
    )
    for j in range(count):
        left = j * patch - offset
        top.add_patch(plt.Rectangle((left, 0), patch, 1, facecolor=COLORS[j], alpha=0.25))
        top.add_patch(plt.Rectangle((left, 0), patch, 1, fill=False, edgecolor=COLORS[j]))
        centre = left + patch / 2
        top.plot(centre, 0.3, "o", color=COLORS[j])
        top.text(centre, 0.68, f"token {j}", ha="center", va="center", color=COLORS[j])
        x = np.arange(width)[covered] + 0.5
        weight = weights[covered, j]
        near = np.convolve(weight, np.ones(3), "same") > 0  # without the zeros farther away
        middle.plot(x[near], weight[near], "-o", color=COLORS[j], markersize=4)
        for cell in range(width // stride):
            part = weights[cell * stride : (cell + 1) * stride, j].sum()
            if part:
                reads = [i for i in range(count) if weights[cell * stride :][:stride, i].sum()]
                row = 0.62 - 0.26 * reads.index(j)
                place = (cell + 0.5) * stride
                bottom.text(
                    place, row, f"token {j}: {part:g}", ha="center", va="center", color=COLORS[j]
                )
    for cell in range(width // stride):
        bottom.add_patch(
            plt.Rectangle((cell * stride, 0), stride, 1.25, fill=False, edgecolor=GREY)
        )
        number = int(covered[cell * stride : (cell + 1) * stride].sum())
        bottom.text(
            (cell + 0.5) * stride, 1.03, f"cell {cell}, c = {number}", ha="center", va="center"
        )
    for axes in (top, middle):
        axes.axvspan(width - 3, width, color="#dddddd", zorder=0)
        for x in range(width + 1):
            axes.axvline(x, color="#eeeeee", linewidth=0.8, zorder=0)
    top.text(width - 1.4, 1.2, "not covered", ha="center", va="bottom", color=GREY)
    top.set(ylim=(0, 1.5), yticks=[], ylabel="view")
    middle.set(ylim=(0, 1.1), yticks=[0, 0.5, 1], ylabel="weight in a pixel")
    bottom.set(ylim=(-0.05, 1.3), yticks=[], ylabel="cells of 4 px")
    bottom.set(
        xlim=(-offset - 0.2, width + 0.2), xticks=range(0, width + 1, 4), xlabel="image, pixels"
    )
    for axes in (top, bottom):
        axes.spines["left"].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def walk(path):
    """The sum over three views along a row, with the pixels at which the walk takes a step."""
    values, patch, offsets = np.array([[1.0], [3.0], [1.5], [2.5]]), 8, [-3, 0, 2.5]
    width = len(values) * patch
    pixels = np.arange(width)
    x = pixels + 0.5
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7.6, 5.4), sharex=True, height_ratios=(1.3, 2), layout="constrained"
    )
    total, steps, stops = np.zeros(width), np.zeros(width, bool), np.zeros(width, bool)
    for offset, color in zip(offsets, COLORS, strict=False):
        value = along_x(values, offset, patch)[:, 0]
        p = x + offset
        covered = (p >= 0) & (p < width)
        # Between two centres of tokens a view is one line; -1 where it reads nothing.
        line = np.where(covered, np.clip(np.floor(p / patch - 0.5), -0.5, len(values) - 1), -1)
        steps[1:] |= line[1:] != line[:-1]
        stops[1:] |= (line[1:] == -1) & (line[:-1] != -1)
        total += value
        shown = np.where(covered, value, np.nan)
        upper.plot(x, shown, "-", color=color, label=f"dx = {offset:g}")
    starts = pixels % patch == 0
    for axes in (upper, lower):
        for start in pixels[starts | stops]:
            axes.axvline(start, color="#bbbbbb", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    lower.plot(x, total, "-", color="black", linewidth=1)
    plain = ~(steps | starts)
    lower.plot(x[plain], total[plain], "o", color="black", markersize=3.5, label="one multiply-add")
    kinks = steps & ~starts & ~stops
    lower.plot(
        x[kinks],
        total[kinks],
        "D",
        color=COLORS[1],
        markersize=7,
        label="step: new value and slope",
    )
    anew = starts | stops
    lower.plot(x[anew], total[anew], "s", color=COLORS[0], markersize=7, label="restart")
    upper.set(ylabel="one view", ylim=(0, 4.4), yticks=[0, 1, 2, 3])
    upper.legend(loc="upper center", ncols=3, frameon=False)
    lower.set(
        ylabel="sum of three views", ylim=(0, 11), xlabel="pixel of a row", xlim=(-0.5, width + 0.5)
    )
    lower.set(xticks=range(0, width + 1, patch))
    lower.legend(loc="upper center", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        taps(IMAGES / "taps.svg")
        walk(IMAGES / "walk.svg")
