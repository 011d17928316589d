"""Linear heads on frozen features, and the edges of the features themselves.

A head is trained on the features at some pixels of each picture, read bilinearly, and applied to
the whole field; its answer is enlarged bilinearly. Of tokens as they are that is the same as of
bilinearly enlarged tokens: a head commutes with the enlarging.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from research.quality import metrics
from research.quality.data import Picture
from research.quality.fields import Fields, Network, enlarged, read, unit
from research.quality.settings import Setting

CLASSES = 11  # of CamVid; 11 itself is void
EDGE_SHARES = [0.05, 0.1, 0.15, 0.2, 0.3]  # of the pixels


@dataclass(frozen=True)
class Protocol:
    height: int  # pixels, of the pictures that the model sees; 0: as they are
    train: int  # pictures; 0: all
    test: int
    points: int  # pixels of each picture that a head learns from
    seed: int = 0

    def words(self) -> str:
        return (
            f"{self.height or 'full'} pixels high, {self.train or 'all'} pictures to train, "
            f"{self.test or 'all'} to test, {self.points} pixels of each, seed {self.seed}"
        )


def sampled(
    truth: np.ndarray, known: np.ndarray, count: int, seed: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Points [P, 2], (y, x) from 0 to 1, at pixels that are known, and what is there."""
    at = np.argwhere(known)
    order = np.random.default_rng(seed).permutation(len(at))[:count]
    at = at[order]
    return torch.from_numpy((at + 0.5) / truth.shape).float(), truth[at[:, 0], at[:, 1]]


def weights_of(head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A pipeline of a scaler and a linear model as one matrix [K, C] and one bias [K]."""
    scaler, linear = head[0], head[-1]
    matrix = np.atleast_2d(linear.coef_) / scaler.scale_
    bias = np.atleast_1d(linear.intercept_) - matrix @ scaler.mean_
    return torch.from_numpy(matrix).float(), torch.from_numpy(bias).float()


def answer(head: Any, field: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What a head says of a field [C, h, w] -> [K, H, W]."""
    matrix, bias = (part.to(field) for part in weights_of(head))
    return enlarged(torch.einsum("kc,chw->khw", matrix, field) + bias[:, None, None], size)


def learnt(
    fields: Fields,
    pictures: list[Picture],
    protocol: Protocol,
    known: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[], None],
) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Of each setting and picture the features [P, C] at its points, and the truth [P] there."""
    features: list[list[np.ndarray]] = [[] for _ in fields.settings]
    truths = []
    for i, picture in enumerate(pictures):
        points, truth = sampled(
            picture.truth, known(picture.truth), protocol.points, protocol.seed + i
        )
        for into, field in zip(features, fields.of(picture.pixels), strict=True):
            into.append(read(field, points).cpu().numpy())
        truths.append(truth)
        progress()
    return features, truths


def edge_strength(field: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """[H, W]: how much the direction of a field [C, h, w] changes from a cell to the next ones."""
    padded = torch.nn.functional.pad(unit(field)[None], (1, 1, 1, 1), mode="replicate")[0]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    strength = (down.square().sum(0) + right.square().sum(0)).sqrt()
    found: np.ndarray = enlarged(strength[None], size)[0].cpu().numpy()
    return found


def plain_of(settings: list[Setting], setting: Setting) -> int | None:
    """Which of the settings is the plain one of the same layer."""
    for i, other in enumerate(settings):
        if other.family == "plain" and other.layer == setting.layer:
            return i
    return None


def segmentation(
    network: Network,
    settings: list[Setting],
    train: list[Picture],
    test: list[Picture],
    protocol: Protocol,
    progress: Callable[[], None],
) -> list[dict[str, float]]:
    """mIoU of heads trained on each setting's features (``miou``), and of the plain tokens' head
    on them (``miou_plain_head``); F of the features' edges against the labels' (``edge_F``).

    A setting without a plain one of its layer among the settings is given its own head for that.
    """
    fields = Fields(network, settings)
    features, truths = learnt(fields, train, protocol, lambda t: t < CLASSES, progress)
    truth = np.concatenate(truths)
    heads = []
    for parts in features:
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=150))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 150 steps for every setting alike
            heads.append(head.fit(np.concatenate(parts), truth))
        parts.clear()
    shape = (len(settings), CLASSES, CLASSES)
    own, plain = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    edges = np.zeros((len(settings), len(EDGE_SHARES), 4), dtype=np.int64)
    for picture in test:
        size = (picture.truth.shape[0], picture.truth.shape[1])
        lines = metrics.outline(picture.truth)
        for i, field in enumerate(fields.of(picture.pixels)):
            other = plain_of(settings, settings[i])
            other = i if other is None else other
            for head, counts in ((heads[i], own), (heads[other], plain)):
                index = answer(head, field, size).argmax(0).cpu().numpy()
                found = head[-1].classes_[index]
                counts[i] += metrics.confusion(found, picture.truth, CLASSES)
            edges[i] += metrics.edge_counts(edge_strength(field, size), lines, EDGE_SHARES)
        progress()
    return [
        {
            "miou": metrics.mean_iou(own[i]),
            "miou_plain_head": metrics.mean_iou(plain[i]),
            "edge_F": metrics.best_f(edges[i]),
        }
        for i in range(len(settings))
    ]


def depth(
    network: Network,
    settings: list[Setting],
    train: list[Picture],
    test: list[Picture],
    protocol: Protocol,
    progress: Callable[[], None],
) -> list[dict[str, float]]:
    """Errors of a ridge regression. Without ``test`` each picture is tested on the others' head."""
    fields = Fields(network, settings)
    features, truths = learnt(fields, train, protocol, np.isfinite, progress)
    found: list[list[np.ndarray]] = [[] for _ in settings]
    true: list[np.ndarray] = []
    heads: dict[tuple[int, int], Any] = {}  # by setting, and by the picture that is left out
    for i, picture in enumerate(test or train):
        known = np.isfinite(picture.truth)
        size = (known.shape[0], known.shape[1])
        true.append(picture.truth[known])
        without = -1 if test else i
        for s, field in enumerate(fields.of(picture.pixels)):
            if (s, without) not in heads:
                used = [j for j in range(len(train)) if j != without]
                head = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
                x = np.concatenate([features[s][j] for j in used])
                heads[s, without] = head.fit(x, np.concatenate([truths[j] for j in used]))
            found[s].append(answer(heads[s, without], field, size)[0].cpu().numpy()[known])
        progress()
    truth = np.concatenate(true)
    return [metrics.depth_errors(np.concatenate(parts), truth) for parts in found]
