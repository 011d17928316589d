"""Object discovery without labels, by a normalised cut of the graph of a field's cells.

TokenCut (Wang et al., CVPR 2022): two cells are connected if the cosine of their features exceeds a
threshold. The second generalised eigenvector of the graph's Laplacian splits the cells at its mean;
the side with its largest absolute value is the foreground. Differences from TokenCut: features are
tokens, not the keys of the last attention; the mask is enlarged bilinearly instead of by repeating
cells, so that coarse grids have smooth outlines; there is no bilateral solver.

The published threshold, 0.2, was chosen for DINO. Cosines differ between models and between fields
of one model. The scores therefore use the median cosine of each image as threshold, which gives the
graphs of all fields the same number of edges. IoU is also given with edges for three quarters of
the pairs, and with the published threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from skimage.measure import label, regionprops
from torchvision.ops import box_iou

from research.quality.data import chosen, davis_frames, davis_sequences, labels_of, opened
from research.quality.fields import Fields, Network, enlarged, unit
from research.quality.metrics import region
from research.quality.settings import Setting

# For each data set the folders of images (.jpg) and masks (.png), as published.
FOLDERS = {
    "ecssd": ("images", "ground_truth_mask"),
    "duts": ("DUTS-TE-Image", "DUTS-TE-Mask"),
    "omron": ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
}
LEVELS = 256  # of a saliency map


@dataclass(frozen=True)
class Protocol:
    height: int  # of the images in pixels; 0: unchanged
    pictures: int  # per DAVIS sequence or data set, evenly spread; 0: all
    share: float = 0.5  # share of the pairs of cells with an edge
    more: float = 0.75
    published: float = 0.2  # threshold of cosines
    weight: float = 1e-5  # of an edge below the threshold
    beta2: float = 0.3  # weight of recall in F (beta^2)

    def words(self) -> str:
        return (
            f"{self.height or 'full'} pixels high, {self.pictures or 'all'} pictures of each, "
            f"edges for {self.share} or {self.more} of the pairs, or above cosine "
            f"{self.published}, weight {self.weight} of the others, beta^2 {self.beta2}"
        )


class Case(NamedTuple):
    """The data of one row of the results."""

    task: str  # discovery (DAVIS), or a key of FOLDERS
    item: str  # the sequence
    examples: list[tuple[Path, Path]]  # (image, mask)
    protocol: Protocol


def cases(data: Path, height: int, sequences: int, frames: int, pictures: int) -> Iterator[Case]:
    """The cases of all data sets in a folder.

    Args:
        data: contains ``davis`` and the keys of FOLDERS.
        height: of the images in pixels; 0: unchanged.
        sequences: of DAVIS; 0: all.
        frames: per sequence, evenly spread; 0: all.
        pictures: per other data set, evenly spread; 0: all.
    """
    davis = data / "davis"
    names = davis_sequences(davis) if davis.is_dir() else []
    for name in names[:sequences] if sequences else names:
        masks = dict(davis_frames(davis, name, 0))
        examples = [(path, masks[path]) for path in chosen(list(masks), frames)]
        yield Case("discovery", name, examples, Protocol(height, frames))
    for name, (images, truth) in FOLDERS.items():
        paths = chosen(list((data / name / images).glob("*.jpg")), pictures)
        if paths:
            examples = [(path, data / name / truth / f"{path.stem}.png") for path in paths]
            yield Case(name, "", examples, Protocol(height, pictures))


def foreground(path: Path) -> np.ndarray:
    """[H, W] bool of a mask file: object indices, or grey levels with possibly soft outlines."""
    labels = labels_of(path)
    found: np.ndarray = labels > (127 if labels.max() > 127 else 0)
    return found


def cosines(field: torch.Tensor) -> np.ndarray:
    """[N, N] float32: cosines of all pairs of cells of a field [C, h, w], N = h * w."""
    cells = unit(field).flatten(1)
    found: np.ndarray = (cells.T @ cells).cpu().numpy()
    return found


def cut(likeness: np.ndarray, threshold: float, weight: float) -> np.ndarray:
    """[N] float64: the second generalised eigenvector, above its mean on the foreground.

    Args:
        likeness: [N, N], cosines.
        threshold: edges of pairs with a larger cosine have weight 1.
        weight: of all other edges.
    """
    edges = np.where(likeness > threshold, 1.0, weight)
    scale = edges.sum(0) ** -0.5
    # (D - A) y = a D y is, with y = D^-1/2 x, D^-1/2 A D^-1/2 x = (1 - a) x.
    edges *= scale
    edges *= scale[:, None]
    start = np.random.default_rng(0).standard_normal(len(edges))
    values, vectors = eigsh(edges, k=2, which="LA", v0=start)
    vector: np.ndarray = vectors[:, values.argmin()] * scale
    return vector if vector[np.abs(vector).argmax()] > 0 else -vector


class Found(NamedTuple):
    mask: np.ndarray  # [H, W] bool, the foreground
    saliency: np.ndarray  # [H, W] float64


def search(field: torch.Tensor, protocol: Protocol, size: tuple[int, ...]) -> list[Found]:
    """Masks from a field [C, h, w], for the thresholds ``share``, ``more`` and ``published``."""
    likeness, found = cosines(field), []
    quantiles = np.quantile(likeness, [1 - protocol.share, 1 - protocol.more]).tolist()
    for threshold in (*quantiles, protocol.published):
        vector = cut(likeness, threshold, protocol.weight)
        # Enlarge the mask, not the vector, for the outline: the mean of the vector is close to the
        # values of the larger side.
        both = torch.from_numpy(np.stack([vector > vector.mean(), vector]))
        mask, saliency = enlarged(both.unflatten(1, field.shape[1:]), (size[0], size[1])).numpy()
        found.append(Found(mask > 0.5, saliency))
    return found


def box(mask: np.ndarray) -> tuple[int, ...]:
    """(top, left, bottom, right) of all pixels of a mask [H, W]."""
    (found,) = regionprops(mask.astype(np.uint8))
    corners: tuple[int, ...] = found.bbox
    return corners


def located(found: Found, truth: np.ndarray) -> bool:
    """Whether the box of the most salient region has IoU >= 0.5 with the box of the truth."""
    if not found.mask.any():
        return False
    regions = label(found.mask)
    seed = np.where(found.mask, found.saliency, -np.inf).argmax()
    shown = box(regions == regions.flat[seed])
    overlap = box_iou(torch.tensor([shown]).float(), torch.tensor([box(truth)]).float())
    return bool(overlap >= 0.5)


def f_curve(shown: np.ndarray, truth: np.ndarray, beta2: float) -> np.ndarray:
    """[LEVELS]: F of the pixels at or above each saliency level, in ascending order.

    Args:
        shown: [H, W], any range.
        truth: [H, W] bool, not empty.
        beta2: the weight of recall.
    """
    limits = (float(shown.min()), float(shown.max()))
    hits, marked = (
        np.histogram(values, LEVELS, limits)[0][::-1].cumsum()[::-1]
        for values in (shown[truth], shown)
    )
    precision, recall = hits / marked, hits / truth.sum()
    total = beta2 * precision + recall
    curve: np.ndarray = (1 + beta2) * precision * recall / np.where(total > 0, total, 1)
    return curve


def run(
    network: Network,
    settings: list[Setting],
    examples: list[tuple[Path, Path]],
    protocol: Protocol,
    progress: Callable[[], None],
) -> list[dict[str, float]]:
    """Mean scores of each setting over the examples (image, mask) with non-empty masks.

    ``IoU``, ``accuracy`` (of pixels), ``F`` (at the best level, one for all examples) and
    ``CorLoc``; ``IoU_more`` with more edges, ``IoU_published`` with the published threshold.
    """
    fields = Fields(network, settings)
    scores: list[list[list[float]]] = [[] for _ in settings]
    curves: list[list[np.ndarray]] = [[] for _ in settings]
    for path, mask in examples:
        truth = foreground(mask)
        progress()
        if not truth.any():
            continue
        for i, field in enumerate(fields.of(opened(path, protocol.height, network.patch))):
            half, *others = search(field, protocol, truth.shape)
            ious = [region(found.mask, truth) for found in (half, *others)]
            scores[i].append([*ious, (half.mask == truth).mean(), located(half, truth)])
            curves[i].append(f_curve(half.saliency, truth, protocol.beta2))
    names = ("IoU", "IoU_more", "IoU_published", "accuracy", "CorLoc")
    return [
        dict(zip(names, np.mean(score, 0).tolist(), strict=True))
        | {"F": float(np.mean(curve, 0).max())}
        for score, curve in zip(scores, curves, strict=True)
    ]
