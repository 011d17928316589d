"""The small ViT on scenes with exact labels: its plain tokens against SRT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib.colors import to_rgb
from scipy.ndimage import maximum_filter, minimum_filter

from ..viz import Comparison, LayerTokens, Panel, color_map, enlarge
from .scenes import BOX, CLASSES, Scene, scene

if TYPE_CHECKING:
    from ..cli.common import Network

SIDE = 112  # pixels of a scene: the largest that the model was trained on
OUTLINE_RADIUS = 4  # pixels: half a patch
HELD_OUT = 2_000_000  # seeds from here on were neither trained on nor looked at in training
PHOTO = Path(__file__).with_name("astronaut.jpg")
METHODS = ("plain tokens", "tokens, bilinear", "SRT mean", "SRT median")


class Prediction(NamedTuple):
    """The output of the model's head for an image."""

    labels: np.ndarray  # [H, W] int64, of CLASSES
    segments: np.ndarray  # [H, W] int64, of background, floor and solids of all kinds
    nearness: np.ndarray  # [H, W] float32, 1 / metres


class Score(NamedTuple):
    """Over all pixels of all scenes. IoU: the mean over the classes in them."""

    segments: float  # IoU of background, floor and solids
    outlines: float  # the same within OUTLINE_RADIUS pixels of where they meet
    kinds: float  # IoU of CLASSES
    nearness: float  # root of the mean squared error, 1 / metres


def first_complete_seed(seed: int) -> int:
    """The first seed >= ``seed`` whose scene has each of CLASSES on at least 2 % of its pixels."""
    while True:
        counts = np.bincount(scene(seed, SIDE, SIDE).labels.ravel(), minlength=len(CLASSES))
        if counts.min() * 50 >= SIDE * SIDE:
            return seed
        seed += 1


def _truth(made: Scene) -> Prediction:
    labels = made.labels.astype(np.int64)
    return Prediction(labels, np.minimum(labels, BOX), made.nearness)


def _iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import jaccard_score

    present = np.unique(truth)
    return float(jaccard_score(truth.ravel(), predicted.ravel(), labels=present, average="macro"))


class Evaluation:
    """Scores the head of the small ViT on fields of its features."""

    def __init__(self, network: Network, views: str | None) -> None:
        self.network, self.views = network, views
        self._comparison = Comparison(network.backbone, views)

    @torch.no_grad()
    def predict(self, pixels: np.ndarray) -> list[Prediction]:
        """pixels [H, W, 3] uint8 -> a prediction for each of :data:`METHODS`."""
        (layer,) = self._comparison.tokens(self.network.image(pixels))
        return [self._predict(layer, method, pixels.shape[:2]) for method in METHODS]

    def _predict(self, layer: LayerTokens, method: str, size: tuple[int, ...]) -> Prediction:
        field, cell = layer.plain.map, layer.plain.patch
        if method != METHODS[0]:
            field, cell = self._comparison.field(layer, method.split()[-1]), (1, 1)
        # The head is linear: on a mean it gives the mean of its outputs for the views.
        found = self.network.model.head(field[0].permute(1, 2, 0)).numpy()
        found = enlarge(found, cell, size)
        logits = torch.from_numpy(found[..., :-1])
        solid = logits[..., BOX:].logsumexp(2, keepdim=True)
        segments = torch.cat([logits[..., :BOX], solid], 2).argmax(2)
        return Prediction(logits.argmax(2).numpy(), segments.numpy(), found[..., -1])

    def scores(
        self, scenes: Iterable[Scene], progress: Callable[[int], object] | None = None
    ) -> dict[str, Score]:
        """Of each of :data:`METHODS`; ``progress`` is called with the number of scenes done."""
        from sklearn.metrics import root_mean_squared_error

        found: list[list[Prediction]] = []  # for each scene: the truth, then of each method
        for done, made in enumerate(scenes, 1):
            found.append([_truth(made), *self.predict(made.pixels)])
            if progress is not None:
                progress(done)
        columns = zip(*found, strict=True)
        stacked = ([np.stack(part) for part in zip(*column, strict=True)] for column in columns)
        labels, segments, nearness = next(stacked)
        spread = (1, 2 * OUTLINE_RADIUS + 1, 2 * OUTLINE_RADIUS + 1)
        outlines = maximum_filter(segments, spread) != minimum_filter(segments, spread)
        scores = {}
        for method, (predicted, parts, near) in zip(METHODS, stacked, strict=True):
            scores[method] = Score(
                _iou(segments, parts),
                _iou(segments[outlines], parts[outlines]),
                _iou(labels, predicted),
                float(root_mean_squared_error(nearness.ravel(), near.ravel())),
            )
        return scores

    def rows(self, made: Scene, photo: np.ndarray) -> list[tuple[str, list[Panel]]]:
        """The rows of a figure, each of which begins with the input or the exact labels.

        Both images are square; photo: [H, H, 3] uint8.
        """
        near_colors = color_map(0, float(made.nearness.max()), "magma")
        segments, depth = [], []
        predictions = [_truth(made), *self.predict(made.pixels)]
        for title, prediction in zip(("exact", *METHODS), predictions, strict=True):
            segments.append(Panel(title, _CLASS_COLORS[prediction.labels]))
            depth.append(Panel(title, near_colors.to_rgba(prediction.nearness)[..., :3]))
        features = [
            Comparison(self.network.backbone, self.views)(self.network.image(pixels), pixels)[0]
            for pixels in (made.pixels, photo)
        ]
        names = ("features", "segments", "nearness", "features")
        return list(zip(names, (features[0], segments, depth, features[1]), strict=True))


# For each of CLASSES: dark, grey, and four that also differ in lightness.
_COLORS = ("#21212b", "#999999", "#cc4033", "#f2d94d", "#3366cc", "#59b366")
_CLASS_COLORS = np.array([to_rgb(color) for color in _COLORS], dtype=np.float32)
