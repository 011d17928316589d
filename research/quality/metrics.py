"""Metrics on arrays. Confusion matrices use scikit-learn."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize
from sklearn.metrics import confusion_matrix


def region(mask: np.ndarray, truth: np.ndarray) -> float:
    """J of DAVIS: intersection over union of two masks [H, W]; 1 if both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def outline(labels: np.ndarray) -> np.ndarray:
    """[H, W]: pixels whose label differs from the right, lower or diagonal neighbour.

    The outline of the DAVIS benchmark. The last row and column are repeated.
    """
    padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    here, right, below, across = (
        padded[:-1, :-1],
        padded[:-1, 1:],
        padded[1:, :-1],
        padded[1:, 1:],
    )
    return (here != right) | (here != below) | (here != across)


def matched(lines: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[int, int, int, int]:
    """Pixels of ``lines`` within ``tolerance`` of ``truth``, pixels of ``lines``; and vice versa.

    The distance to the nearest point is equivalent to a dilation by a disk.
    """
    a, b = np.argwhere(lines), np.argwhere(truth)
    if not len(a) or not len(b):
        return 0, len(a), 0, len(b)
    hits = [
        int(np.isfinite(cKDTree(to).query(of, distance_upper_bound=tolerance + 1e-6)[0]).sum())
        for of, to in ((a, b), (b, a))
    ]
    return hits[0], len(a), hits[1], len(b)


def f_score(hit: float, lines: float, found: float, truth: float) -> float:
    """F of the counts of :func:`matched`; 1 if both outlines are empty."""
    if not lines and not truth:
        return 1.0
    precision = hit / lines if lines else 1.0
    recall = found / truth if truth else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray, truth: np.ndarray, share: float = 0.008) -> float:
    """F of DAVIS for two masks; tolerance: ``share`` of the diagonal, rounded up."""
    tolerance = math.ceil(share * math.hypot(*mask.shape))
    return f_score(*matched(outline(mask), outline(truth), tolerance))


def confusion(labels: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """[classes, classes] counts, truth by row; void pixels of the truth are ignored."""
    known = (truth >= 0) & (truth < classes)
    if not known.any():
        return np.zeros((classes, classes), dtype=np.int64)
    counts: np.ndarray = confusion_matrix(truth[known], labels[known], labels=range(classes))
    return counts


def mean_iou(counts: np.ndarray) -> float:
    """mIoU of a confusion matrix, over classes present in truth or prediction."""
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    return float((np.diag(counts)[union > 0] / union[union > 0]).mean())


def edge_counts(
    strength: np.ndarray, truth: np.ndarray, shares: list[float], share: float = 0.0075
) -> np.ndarray:
    """[len(shares), 4]: counts of :func:`matched` for the strongest pixels of an image, thinned.

    Args:
        strength: [H, W], edge strength.
        truth: [H, W] bool, the true lines.
        shares: shares of the pixels that count as edges before thinning.
        share: tolerance as a share of the diagonal.
    """
    tolerance = share * math.hypot(*strength.shape)
    rows = []
    for part in shares:
        lines = skeletonize(strength > np.quantile(strength, 1 - part))
        rows.append(matched(lines, truth, tolerance))
    return np.array(rows)


def best_f(counts: np.ndarray) -> float:
    """The best F over the shares; counts [shares, 4] are summed over all images."""
    return max(f_score(*row) for row in counts.tolist())


def depth_errors(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Root mean square error, mean of |error| / truth, share within a factor of 1.25."""
    least = 1e-3 * float(np.median(truth))
    ratio = np.maximum(np.maximum(found, least) / truth, truth / np.maximum(found, least))
    return {
        "rmse": float(np.sqrt(np.mean((found - truth) ** 2))),
        "abs_rel": float(np.mean(np.abs(found - truth) / truth)),
        "delta": float(np.mean(ratio < 1.25)),
    }
