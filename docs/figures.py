"""Draws the diagrams of the documentation, docs/images/*.svg: ``python docs/figures.py``."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

import srt_ext
from srt_ext.demo.small import load_small
from srt_ext.viz import PCAColors

IMAGES = Path(__file__).parent / "images"
PHOTO = Path(srt_ext.__file__).parent / "demo" / "astronaut.jpg"
SIDE, PATCH = 64, 8  # pixels
OFFSETS = torch.tensor([[3.0, -3.0], [0.0, 0.0], [-3.0, 3.0]])  # [V, 2], (dy, dx) in pixels
BLUE, GREY = "#1f5fa8", "#555555"
COLORS = ["#2f6fab", "#d1662a", "#3b8f5a", "#8a5aa8"]
PLOT = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw_view_path() -> Figure:
    """Image -> shifted views -> ViT -> tokens -> tokens moved back -> field."""
    model, _ = load_small()
    photo = Image.open(PHOTO).convert("RGB").crop((130, 15, 330, 215)).resize((SIDE, SIDE))
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
    views = srt_ext.shift(image, OFFSETS)  # [V, 1, 3, H, W]
    grid, patch = (SIDE // PATCH,) * 2, (PATCH,) * 2
    many = srt_ext.views.grid(4, 2).offsets  # the field is that of 25 views
    with torch.no_grad():
        tokens, others = (
            model.forward_features(srt_ext.shift(image, offsets).flatten(0, 1) * 2 - 1)[:, None]
            for offsets in (OFFSETS, many)
        )  # [V, 1, N, C]
    field = srt_ext.ensemble(others, many, grid, patch)
    colors = PCAColors(field)

    figure = plt.figure(figsize=(9.2, 4.3))
    height = 0.24
    width = height * 4.3 / 9.2
    rows = (0.61, 0.335, 0.06)
    x = {"image": 0.012, "views": 0.185, "vit": 0.345, "tokens": 0.475, "back": 0.665}

    def panel(
        left: float, bottom: float, picture: np.ndarray, w: float = width, h: float = height
    ) -> Axes:
        axes = figure.add_axes((left, bottom, w, h))
        axes.imshow(picture, interpolation="nearest", extent=(0, SIDE, SIDE, 0))
        axes.set(xticks=[], yticks=[], xlim=(0, SIDE), ylim=(SIDE, 0))
        return axes

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": GREY, "lw": 1.2}
        figure.add_artist(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))

    def title(left: float, text: str, bottom: float = 0.875) -> None:
        figure.text(left, bottom, text, ha="center", va="bottom", fontsize=10.5, linespacing=1.25)

    middle = rows[1] + height / 2
    panel(x["image"], rows[1], photo)
    title(x["image"] + width / 2, "image", rows[1] + height + 0.015)
    title(x["views"] + width / 2, "1. shift the image\nby (dy, dx) pixels")
    title(x["vit"] + 0.04, "2. run the\nfrozen ViT")
    title(x["tokens"] + width / 2, "3. tokens\nof each view")
    title(x["back"] + width / 2, "4. move them back\nby (-dy, -dx)")
    figure.add_artist(
        FancyBboxPatch(
            (x["vit"], rows[2]),
            0.08,
            rows[0] + height - rows[2],
            boxstyle="round,pad=0,rounding_size=0.012",
            fc="#e8eef6",
            ec=BLUE,
            lw=1.2,
        )
    )
    figure.text(x["vit"] + 0.04, middle, "ViT", ha="center", va="center", fontsize=13, color=BLUE)
    size = 0.16
    target = (0.992 - size, middle - size * 9.2 / 4.3 / 2)
    for i, y in enumerate(rows):
        center = y + height / 2
        view = panel(x["views"], y, views[i, 0].permute(1, 2, 0).numpy())
        dy, dx = (f"{n:+.0f}" if n else "0" for n in OFFSETS[i].tolist())
        style = {"fontsize": 9, "color": "white", "ha": "left", "va": "top"}
        box = {"fc": "black", "ec": "none", "alpha": 0.6, "pad": 1.5}
        view.text(2.5, 2.5, f"({dy}, {dx})", bbox=box, **style)
        plain = tokens[i].transpose(1, 2).reshape(1, -1, *grid)
        panel(x["tokens"], y, colors(plain))
        moved = srt_ext.ensemble(
            tokens[i : i + 1], OFFSETS[i : i + 1], grid, patch, upsample="nearest"
        )
        picture = colors(moved)
        picture[moved[0].abs().amax(0).numpy() == 0] = 0.82  # the view does not show these pixels
        axes = panel(x["back"], y, picture)
        axes.add_patch(Rectangle((0, 0), SIDE, SIDE, fill=False, ec=GREY, lw=1))
        arrow((x["image"] + width + 0.006, middle), (x["views"] - 0.006, center))
        arrow((x["views"] + width + 0.006, center), (x["vit"] - 0.004, center))
        arrow((x["vit"] + 0.084, center), (x["tokens"] - 0.006, center))
        arrow((x["tokens"] + width + 0.006, center), (x["back"] - 0.006, center))
        arrow((x["back"] + width + 0.006, center), (target[0] - 0.006, middle + 0.04 * (1 - i)))
    panel(*target, colors(field), size, size * 9.2 / 4.3)
    title(
        target[0] + size / 2,
        "5. average: one\nfeature per pixel",
        target[1] + size * 9.2 / 4.3 + 0.015,
    )
    return figure


DESIGNS = {
    "4": "4, or best:4:6",
    "9": "9, or best:9:6",
    "16": "16, or best:16:6",
    "grid:3": "grid:3 (49 views)",
    "lattice:9:6": "lattice:9:6",
    "sobol:16:6": "sobol:16:6",
    "ring:9:6": "ring:9:6 (weights)",
    "moore:2,4": "moore:2,4 (17 views)",
}


def draw_designs() -> Figure:
    """The offsets of designs, inside the square of a token of 16 x 16 pixels."""
    figure, panels = plt.subplots(2, 4, figsize=(9.2, 5.3), sharex=True, sharey=True)
    for axes, (words, name) in zip(panels.flat, DESIGNS.items(), strict=True):
        offsets, weights, _ = srt_ext.views.parse(words)
        area = 26 if weights is None else (26 * weights * len(weights)).clamp(min=6).numpy()
        axes.add_patch(Rectangle((-8, -8), 16, 16, fc="#f2f5f9", ec="#9aa7b8", lw=1, zorder=0))
        axes.axhline(0, color="#c8d0da", lw=0.7, zorder=1)
        axes.axvline(0, color="#c8d0da", lw=0.7, zorder=1)
        axes.scatter(offsets[:, 1], offsets[:, 0], s=area, color=BLUE, zorder=2, lw=0)
        axes.set_title(name, fontsize=10, family="monospace")
        axes.set(xlim=(-9, 9), ylim=(9, -9), aspect="equal", xticks=(-6, 0, 6), yticks=(-6, 0, 6))
        axes.tick_params(labelsize=9, length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("dx (pixels)", fontsize=9.5)
    for axes in panels[:, 0]:
        axes.set_ylabel("dy (pixels)", fontsize=9.5)
    figure.tight_layout()
    return figure


def along_x(values: np.ndarray, offset: float, patch: int) -> np.ndarray:
    """[W', C]: the field of one view of a row of tokens, values [w, C]."""
    tokens = torch.as_tensor(values, dtype=torch.float64)[None, None]
    offsets = torch.tensor([[0.0, offset]], dtype=torch.float64)
    grid, size = (1, len(values)), (1, patch)
    field = srt_ext.reference.ensemble(tokens, offsets, grid, size, border="zeros")
    return field[0, :, 0].T.numpy()


def draw_taps() -> Figure:
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
        top.add_patch(Rectangle((left, 0), patch, 1, facecolor=COLORS[j], alpha=0.25))
        top.add_patch(Rectangle((left, 0), patch, 1, fill=False, edgecolor=COLORS[j]))
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
        bottom.add_patch(Rectangle((cell * stride, 0), stride, 1.25, fill=False, edgecolor=GREY))
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
    return figure


def draw_walk() -> Figure:
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
    restarts = starts | stops
    lower.plot(x[restarts], total[restarts], "s", color=COLORS[0], markersize=7, label="restart")
    upper.set(ylabel="one view", ylim=(0, 4.4), yticks=[0, 1, 2, 3])
    upper.legend(loc="upper center", ncols=3, frameon=False)
    lower.set(
        ylabel="sum of three views", ylim=(0, 11), xlabel="pixel of a row", xlim=(-0.5, width + 0.5)
    )
    lower.set(xticks=range(0, width + 1, patch))
    lower.legend(loc="upper center", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.2)
    return figure


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    mpl.rcParams["savefig.facecolor"] = "white"
    figures = {"view-path": draw_view_path(), "designs": draw_designs()}
    with mpl.rc_context(PLOT):
        figures |= {"taps": draw_taps(), "walk": draw_walk()}
    for name, figure in figures.items():
        with mpl.rc_context({"svg.hashsalt": name}):  # the same file from the same drawing
            figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
