"""Retrieval of image regions from other sequences by cosine similarity.

The descriptor of a region is the mean of the field over it: cells normalised to length 1, weighted
by the share of the cell that the region covers (a region may be smaller than a cell). Each region
is a query. The connected regions of all images of other sequences are ranked by cosine; regions of
the same class are relevant. Classes, not objects, recur across the sequences of CamVid (the same
street by day and at dusk).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score

from research.quality.data import Picture
from research.quality.davis import one_hot
from research.quality.fields import Fields, Network, unit
from research.quality.settings import Setting

CLASSES = (  # of CamVid; 11 is void
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)


@dataclass(frozen=True)
class Protocol:
    height: int  # of the images in pixels; 0: unchanged
    pictures: int  # of the test set, evenly spread; 0: all
    least: float = 0.0005  # share of the pixels of an image; smaller regions are ignored

    def words(self) -> str:
        return (
            f"{self.height or 'full'} pixels high, {self.pictures or 'all'} pictures, connected "
            f"regions of at least {self.least} of a picture, ranked over other sequences"
        )


def regions(truth: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The connected regions of each class in truth [H, W].

    Returns:
        Labels [H, W] int64, 1 to R (0: none); classes [R] int64.
    """
    known = np.where(truth < len(CLASSES), truth, -1)
    connected, kept, classes = label(known, background=-1), np.zeros_like(truth), []
    for found in regionprops(connected):
        if found.area >= least * truth.size:
            y, x = found.coords.T
            classes.append(int(truth[y[0], x[0]]))
            kept[y, x] = len(classes)
    return kept, np.array(classes, dtype=np.int64)


def descriptors(field: torch.Tensor, labels: np.ndarray, count: int) -> np.ndarray:
    """[count, C] float32, length 1: descriptors of the regions 1 to count of labels [H, W]."""
    shares = one_hot(labels, list(range(1, count + 1)), field.shape[1:])[1:].to(field)
    means = torch.einsum("rhw,chw->rc", shares, unit(field))
    found: np.ndarray = F.normalize(means, dim=1).cpu().numpy()
    return found


def sequence(name: str) -> str:
    """The sequence of a CamVid image: 0001TP for 0001TP_008550."""
    return name.rpartition("_")[0]


def precisions(vectors: np.ndarray, classes: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """[R] float64: the average precision of each region as a query.

    NaN if no other sequence has its class.

    Args:
        vectors: [R, C], length 1.
        classes: [R].
        sources: [R], the sequence of each region.
    """
    likeness = vectors @ vectors.T
    found = np.full(len(vectors), np.nan)
    for i in range(len(vectors)):
        others = sources != sources[i]
        relevant = classes[others] == classes[i]
        if relevant.any():
            found[i] = average_precision_score(relevant, likeness[i, others])
    return found


def run(
    network: Network,
    settings: list[Setting],
    pictures: list[Picture],
    protocol: Protocol,
    progress: Callable[[], None],
) -> dict[str, list[dict[str, float]]]:
    """``mAP`` by class for each setting: the mean average precision of the regions of a class.

    Classes that occur in only one sequence are excluded.
    """
    fields = Fields(network, settings)
    vectors: list[list[np.ndarray]] = [[] for _ in settings]
    kinds: list[np.ndarray] = []
    sources: list[str] = []
    for picture in pictures:
        labels, classes = regions(picture.truth, protocol.least)
        progress()
        if not len(classes):
            continue
        kinds.append(classes)
        sources += [sequence(picture.name)] * len(classes)
        for into, field in zip(vectors, fields.of(picture.pixels), strict=True):
            into.append(descriptors(field, labels, len(classes)))
    every = np.concatenate(kinds)
    found = [precisions(np.concatenate(v), every, np.array(sources)) for v in vectors]
    queried = [i for i in range(len(CLASSES)) if np.isfinite(found[0][every == i]).any()]
    return {
        CLASSES[i]: [{"mAP": float(np.nanmean(scores[every == i]))} for scores in found]
        for i in queried
    }
