"""The small ViT on scenes whose labels are known: its plain tokens against SRT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.ndimage import maximum_filter, minimum_filter

from ..visualize import Comparison, Panel, Shades, Tokens, enlarge
from .scenes import BOX, CLASSES, Scene, scene

if TYPE_CHECKING:
    from ..pictures import Network

SIDE = 112  # pixels of a scene: the largest that the model was trained on
REACH = 4  # pixels: half a patch
HELD_OUT = 2_000_000  # seeds from here on were neither trained on nor looked at in training
PHOTO = Path(__file__).with_name("astronaut.jpg")
WAYS = ("plain tokens", "tokens, bilinear", "SRT mean", "SRT median")


class Answer(NamedTuple):
    """What the model's head says of a picture."""

    labels: np.ndarray  # [H, W] int64, of CLASSES
    segments: np.ndarray  # [H, W] int64, of background, floor and solids of all kinds
    nearness: np.ndarray  # [H, W] float32, 1 / metres


class Score(NamedTuple):
    """Of all pixels of all scenes. IoU: intersection over union, the mean of what is in them."""

    segments: float  # IoU of background, floor and solids
    outlines: float  # the same within REACH pixels of where they meet
    kinds: float  # IoU of CLASSES
    nearness: float  # root of the mean squared error, 1 / metres


def telling(seed: int) -> int:
    """The first seed from this one on whose scene has all of CLASSES, each on a fiftieth of it."""
    while True:
        counts = np.bincount(scene(seed, SIDE, SIDE).labels.ravel(), minlength=len(CLASSES))
        if counts.min() * 50 >= SIDE * SIDE:
            return seed
        seed += 1


def _truth(made: Scene) -> Answer:
    labels = made.labels.astype(np.int64)
    return Answer(labels, np.minimum(labels, BOX), made.nearness)


def _iou(truth: np.ndarray, said: np.ndarray) -> float:
    from sklearn.metrics import jaccard_score

    there = np.unique(truth)
    return float(jaccard_score(truth.ravel(), said.ravel(), labels=there, average="macro"))


def _silent(_done: int) -> None:
    pass


class Judge:
    """Applies the head of the small ViT to fields of its features.

    Args:
        network: the small ViT.
        views: words for :func:`srt_ext.views.parse`.
    """

    def __init__(self, network: Network, views: str) -> None:
        self.network, self.views = network, views
        self._comparison = Comparison(network.backbone, views)

    @torch.no_grad()
    def answers(self, pixels: np.ndarray) -> list[Answer]:
        """Of pixels [H, W, 3] uint8, one for each of :data:`WAYS`."""
        (tokens,) = self._comparison.tokens(self.network.image(pixels), _silent)
        return [self._answer(tokens, way, pixels.shape[:2]) for way in WAYS]

    def _answer(self, tokens: Tokens, way: str, size: tuple[int, ...]) -> Answer:
        height, width = size
        if way == WAYS[0]:
            field = tokens.map
        else:
            field = self._comparison.field(tokens, way.split()[-1], (height, width))
        # The head is linear, so of a mean it is the mean of what it says of the views.
        found = self.network.model.head(field[0].permute(1, 2, 0)).numpy()
        if way == WAYS[0]:
            found = enlarge(found, tokens.patch, (height, width))
        logits = torch.from_numpy(found[..., :-1])
        solid = logits[..., BOX:].logsumexp(2, keepdim=True)
        segments = torch.cat([logits[..., :BOX], solid], 2).argmax(2)
        return Answer(logits.argmax(2).numpy(), segments.numpy(), found[..., -1])

    def scores(
        self, scenes: Iterable[Scene], progress: Callable[[int], object] = _silent
    ) -> dict[str, Score]:
        """Of each of :data:`WAYS`; ``progress`` is told the scenes done."""
        from sklearn.metrics import root_mean_squared_error

        truth: list[Answer] = []
        found: list[list[Answer]] = []
        for done, made in enumerate(scenes, 1):
            truth.append(_truth(made))
            found.append(self.answers(made.pixels))
            progress(done)
        labels, segments, nearness = (np.stack(part) for part in zip(*truth, strict=True))
        spread = (1, 2 * REACH + 1, 2 * REACH + 1)
        outlines = maximum_filter(segments, spread) != minimum_filter(segments, spread)
        scores = {}
        for way, answers in zip(WAYS, zip(*found, strict=True), strict=True):
            said, parts, near = (np.stack(part) for part in zip(*answers, strict=True))
            scores[way] = Score(
                _iou(segments, parts),
                _iou(segments[outlines], parts[outlines]),
                _iou(labels, said),
                float(root_mean_squared_error(nearness.ravel(), near.ravel())),
            )
        return scores

    def rows(self, made: Scene, photo: np.ndarray) -> list[tuple[str, list[Panel]]]:
        """A drawing: each row begins with what is shown or true, then come :data:`WAYS`.

        Args:
            made: square.
            photo: [H, H, 3] uint8.
        """
        shades = Shades(0, float(made.nearness.max()), "magma")
        segments, depth = [], []
        for title, answer in zip(
            ("exact", *WAYS), [_truth(made), *self.answers(made.pixels)], strict=True
        ):
            segments.append(Panel(title, _COLOURS[answer.labels]))
            depth.append(Panel(title, shades(torch.from_numpy(answer.nearness))))
        return [
            ("features", self._features(made.pixels)),
            ("segments", segments),
            ("nearness", depth),
            ("features", self._features(photo)),
        ]

    def _features(self, pixels: np.ndarray) -> list[Panel]:
        """In a basis of their own."""
        comparison = Comparison(self.network.backbone, self.views)
        return comparison(self.network.image(pixels), pixels, _silent)[0]


# One colour for each of CLASSES: dark, grey, and four that also differ in lightness.
_COLOURS = np.array(
    [
        [0.13, 0.13, 0.17],
        [0.60, 0.60, 0.60],
        [0.80, 0.25, 0.20],
        [0.95, 0.85, 0.30],
        [0.20, 0.40, 0.80],
        [0.35, 0.70, 0.40],
    ],
    dtype=np.float32,
)
