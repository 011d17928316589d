"""Label propagation with the features of the small ViT, on scenes with exact labels.

Each solid has a label. The labels of a first frame are given. The camera moves sideways, and each
cell of the second frame receives the labels of the cell in the first frame with the most similar
features (cosine).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.colors import hsv_to_rgb
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

from ..srt import SRT
from ..viz import Panel, PCAColors, enlarge
from .scenes import Scene, scene
from .small import PATCH

if TYPE_CHECKING:
    from ..extraction import Network

SIDE = 112  # pixels of a frame: the largest size in training
STRIDE = 2  # pixels per cell
RODS = 4  # thin solids that are added to each scene
STEP = 0.4  # metres from the first camera to the second
VISIBLE = 8  # minimum pixels of a scored solid in both frames
SCALE = 2  # of the enlarged frames
HELD_OUT = 2_000_000  # seeds from here on were not used for training or validation
PHOTO = Path(__file__).with_name("astronaut.jpg")
METHODS = (
    "plain tokens",
    "tokens, bilinear",
    "SRT",
    f"scale {SCALE}, bilinear",
    f"scale {SCALE}, SRT",
)
DRAWN = (0, 1, 2, 4)  # indices of METHODS in the figure
UNMOVED = "labels not moved"  # the labels of the first frame are used for the second

Frames = tuple[Scene, Scene]


class Score(NamedTuple):
    """Scores of the propagated labels."""

    solids: float  # mean IoU of all solids of all scenes
    thin: float  # mean IoU of the solids that are not wider than a patch
    outlines: float  # mean over the scenes: F of the outlines of the labels, within one pixel
    milliseconds: float  # of model and SRT, per frame


def frames(seed: int) -> Frames:
    """A scene from both cameras."""
    first, second = (scene(seed, SIDE, SIDE, rods=RODS, step=step) for step in (0, STEP))
    return first, second


def solids_of(pair: Frames) -> dict[int, bool]:
    """The scored solids, and whether they are thin in the second frame."""
    numbers = np.flatnonzero(_pixels(pair)[1:] >= VISIBLE) + 1
    widths = [2 * distance_transform_edt(pair[1].solids == number).max() for number in numbers]
    return {int(n): bool(width <= PATCH) for n, width in zip(numbers, widths, strict=True)}


def first_with_rods(seed: int) -> Frames:
    """The frames of the first seed >= ``seed`` with three rods of at least 0.5 % of the pixels."""
    while (_pixels(pair := frames(seed))[1 : RODS + 1] * 200 >= SIDE * SIDE).sum() < 3:
        seed += 1
    return pair


def _pixels(pair: Frames) -> np.ndarray:
    """[256]: the smaller number of pixels of each solid in the two frames."""
    return np.minimum(*(np.bincount(made.solids.ravel(), minlength=256) for made in pair))


def propagate(first: torch.Tensor, second: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Features [1, C, h, w] of both frames, labels [H, W] of the first -> labels of the second."""
    given = F.one_hot(torch.from_numpy(labels).long()).movedim(2, 0)[None].float()
    shares = F.interpolate(given, first.shape[2:], mode="area")  # of each cell, [1, K, h, w]
    source, target = (F.normalize(field[0].flatten(1), dim=0) for field in (first, second))
    nearest = (target.T @ source).argmax(1)  # [h * w]
    found = shares.flatten(2)[:, :, nearest].view_as(shares)
    enlarged: np.ndarray = F.interpolate(found, labels.shape, mode="bilinear")[0].argmax(0).numpy()
    return enlarged


def iou(truth: np.ndarray, found: np.ndarray) -> float:
    return float((truth & found).sum() / (truth | found).sum())


def outline_f(truth: np.ndarray, found: np.ndarray) -> float:
    """Labels [H, W] -> harmonic mean of precision and recall of the outlines, within one pixel."""
    exact, drawn = (maximum_filter(m, 2) != minimum_filter(m, 2) for m in (truth, found))
    precise, recalled = exact & maximum_filter(drawn, 3), drawn & maximum_filter(exact, 3)
    precision, recall = recalled.sum() / max(1, drawn.sum()), precise.sum() / max(1, exact.sum())
    return float(2 * precision * recall / max(1e-9, precision + recall))


class Evaluation:
    """Scores and draws ``METHODS`` for the small ViT."""

    def __init__(self, network: Network, views: str | None) -> None:
        self.network = network
        model = network.backbone
        self._methods = (
            SRT(model, 1, stride=PATCH, upsample="nearest"),
            SRT(model, 1, stride=STRIDE),
            SRT(model, views, stride=STRIDE),
            SRT(model, 1, scale=SCALE, stride=STRIDE),
            SRT(model, views, scale=SCALE, stride=STRIDE),
        )
        self._seconds = np.zeros(len(METHODS))

    def fields(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """pixels [H, W, 3] uint8 -> features [1, C, h, w] of each method."""
        image = self.network.image(pixels)
        fields = []
        for i, srt in enumerate(self._methods):
            start = time.perf_counter()
            fields.append(srt(image).field)
            self._seconds[i] += time.perf_counter() - start
        return fields

    def propagated(self, pair: Frames) -> list[np.ndarray]:
        """The labels of the second frame, [H, W] int64, by each method."""
        fields = zip(*(self.fields(made.pixels) for made in pair), strict=True)
        return [propagate(first, second, pair[0].solids) for first, second in fields]

    def scores(
        self, scenes: Iterable[Frames], progress: Callable[[int], object] | None = None
    ) -> dict[str, Score]:
        """The scores of UNMOVED and METHODS.

        ``progress`` is called with the number of finished scenes.
        """
        methods = (UNMOVED, *METHODS)
        solids, thin, outlines = [], [], []  # lists of values for each method
        self._seconds[:] = 0
        for done, pair in enumerate(scenes, 1):
            truth, found = pair[1].solids, [pair[0].solids, *self.propagated(pair)]
            for number, is_thin in solids_of(pair).items():
                solids.append([iou(truth == number, labels == number) for labels in found])
                thin += solids[-1:] if is_thin else []
            outlines.append([outline_f(truth, labels) for labels in found])
            if progress is not None:
                progress(done)
        columns = (np.reshape(values, (-1, len(methods))) for values in (solids, thin, outlines))
        means = [column.mean(0) for column in columns]
        milliseconds = 1000 * np.array([0, *self._seconds]) / (2 * len(outlines))
        rows = zip(methods, *means, milliseconds, strict=True)
        return {method: Score(*map(float, row)) for method, *row in rows}

    def rows(self, pair: Frames, photo: np.ndarray) -> list[tuple[str, list[Panel]]]:
        """The rows of a figure of the methods in DRAWN; photo: [H, H, 3] uint8."""
        first, second = pair
        found = self.propagated(pair)
        labels = [Panel("second frame: exact", _painted(second, second.solids))]
        labels += [Panel(METHODS[i], _painted(second, found[i])) for i in DRAWN]
        y, x = _around(second.solids == _pixels(pair)[1 : RODS + 1].argmax() + 1)
        zoomed = [Panel(p.title, enlarge(p.rgb[y, x], (2, 2), p.rgb.shape)) for p in labels]
        given = Panel("first frame: labels given", _painted(first, first.solids))
        return [
            ("features", [given, *self._features(second.pixels)]),
            ("labels", labels),
            ("zoomed", zoomed),
            ("features", [Panel("input", photo.astype(np.float32) / 255), *self._features(photo)]),
        ]

    def _features(self, pixels: np.ndarray) -> list[Panel]:
        fields, size = self.fields(pixels), pixels.shape[:2]
        colors = PCAColors(fields[0])
        cells = [(size[0] // field.shape[2],) * 2 for field in fields]
        rgb = [enlarge(colors(f), c, size) for f, c in zip(fields, cells, strict=True)]
        return [Panel(METHODS[i], rgb[i]) for i in DRAWN]


def _painted(made: Scene, labels: np.ndarray) -> np.ndarray:
    """The frame in grey with the solids in colour, RGB [H, W, 3] in 0 .. 1."""
    grey = 0.15 + 0.7 * made.pixels.mean(2, keepdims=True) / 255
    hue = labels * 0.382 % 1  # hues of successive labels differ strongly
    colors = hsv_to_rgb(np.stack([hue, np.full(hue.shape, 0.75), np.full(hue.shape, 0.95)], 2))
    rgb: np.ndarray = np.where(labels[..., None] > 0, 0.2 * grey + 0.8 * colors, grey)
    return rgb


def _around(mask: np.ndarray) -> tuple[slice, slice]:
    """The quarter of an image [H, H] around the centre of a mask."""
    side = len(mask) // 2
    y, x = np.clip(np.argwhere(mask).mean(0).astype(int) - side // 2, 0, side)
    return slice(y, y + side), slice(x, x + side)
