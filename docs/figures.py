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
BLUE, ORANGE, GREY = "#1f5fa8", "#d1641c", "#555555"


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


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    mpl.rcParams["savefig.facecolor"] = "white"
    figures = {"view-path": draw_view_path(), "designs": draw_designs()}
    for name, figure in figures.items():
        with mpl.rc_context({"svg.hashsalt": name}):  # the same file from the same drawing
            figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
