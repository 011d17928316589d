"""Linear heads on frozen features, and edges of the features.

A head is trained on features at some pixels of each image, read bilinearly. It is applied to the
whole field, and its output is enlarged bilinearly. A linear head commutes with bilinear
interpolation, so plain tokens and bilinearly enlarged tokens give the same result.
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
    height: int  # of the images in pixels; 0: unchanged
    train: int  # images; 0: all
    test: int
    points: int  # training pixels of a head per image
    seed: int = 0

    def words(self) -> str:
        return (
            f"{self.height or 'full'} pixels high, {self.train or 'all'} pictures to train, "
            f"{self.test or 'all'} to test, {self.points} pixels of each, seed {self.seed}"
        )


def sampled(
    truth: np.ndarray, known: np.ndarray, count: int, seed: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Random points [P, 2], (y, x) in 0..1, at known pixels, and the truth [P] there."""
    at = np.argwhere(known)
    order = np.random.default_rng(seed).permutation(len(at))[:count]
    at = at[order]
    return torch.from_numpy((at + 0.5) / truth.shape).float(), truth[at[:, 0], at[:, 1]]


def weights_of(head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A pipeline of scaler and linear model as a matrix [K, C] and a bias [K]."""
    scaler, linear = head[0], head[-1]
    matrix = np.atleast_2d(linear.coef_) / scaler.scale_
    bias = np.atleast_1d(linear.intercept_) - matrix @ scaler.mean_
    return torch.from_numpy(matrix).float(), torch.from_numpy(bias).float()


def answer(head: Any, field: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The output of a head for a field [C, h, w], enlarged -> [K, H, W]."""
    matrix, bias = (part.to(field) for part in weights_of(head))
    return enlarged(torch.einsum("kc,chw->khw", matrix, field) + bias[:, None, None], size)


def learnt(
    fields: Fields,
    pictures: list[Picture],
    protocol: Protocol,
    known: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[], None],
) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """For each setting and image the features [P, C] at its points; and the truths [P]."""
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
    """[H, W]: the change of direction of a field [C, h, w] between neighbouring cells."""
    padded = torch.nn.functional.pad(unit(field)[None], (1, 1, 1, 1), mode="replicate")[0]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    strength = (down.square().sum(0) + right.square().sum(0)).sqrt()
    found: np.ndarray = enlarged(strength[None], size)[0].cpu().numpy()
    return found


def plain_of(settings: list[Setting], setting: Setting) -> int | None:
    """The index of the plain setting of the same layer; None if absent."""
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
    """``miou`` of a head trained on each setting; ``miou_plain_head`` of the head of plain tokens.

    ``edge_F``: F of the edges of the features against the outlines of the labels. If the settings
    have no plain one of the same layer, ``miou_plain_head`` uses the setting's own head.
    """
    fields = Fields(network, settings)
    features, truths = learnt(fields, train, protocol, lambda t: t < CLASSES, progress)
    truth = np.concatenate(truths)
    heads = []
    for parts in features:
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=150))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 150 steps for every setting
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
    """Errors of ridge regression. Without ``test``, leave-one-out over the training images."""
    fields = Fields(network, settings)
    features, truths = learnt(fields, train, protocol, np.isfinite, progress)
    found: list[list[np.ndarray]] = [[] for _ in settings]
    true: list[np.ndarray] = []
    heads: dict[tuple[int, int], Any] = {}  # by setting and excluded image (-1: none)
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
