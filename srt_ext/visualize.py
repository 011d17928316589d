"""Pictures of features: one PCA basis to colours, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


class Colours:
    """Features to RGB by the first three principal components of the ones it is made from.

    Args:
        features: [1, C, h, w], any dtype. One basis and one range for every picture made with it,
            so that colours can be compared.
    """

    def __init__(self, features: torch.Tensor) -> None:
        from sklearn.decomposition import PCA

        rows = _rows(features)
        self._pca = PCA(n_components=3, svd_solver="full").fit(rows)
        self._low, self._high = np.percentile(self._pca.transform(rows), [2, 98], axis=0)

    def __call__(self, features: torch.Tensor) -> np.ndarray:
        """features [1, C, h, w] -> RGB [h, w, 3] in 0 .. 1."""
        projected = self._pca.transform(_rows(features))
        scaled = (projected - self._low) / np.maximum(self._high - self._low, 1e-12)
        rgb: np.ndarray = np.clip(scaled, 0, 1).reshape(*features.shape[-2:], 3)
        return rgb.astype(np.float32)


def _rows(features: torch.Tensor) -> np.ndarray:
    """[1, C, h, w] -> [h * w, C], float32."""
    return features[0].permute(1, 2, 0).flatten(0, 1).float().cpu().numpy()


def brightness(values: torch.Tensor) -> np.ndarray:
    """values [h, w], any range -> grey RGB [h, w, 3] in 0 .. 1, by the 2nd to 98th percentile."""
    array = values.cpu().numpy()
    low, high = np.percentile(array, [2, 98])
    scaled = np.clip((array - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    return np.repeat(scaled[..., None], 3, axis=-1)


def enlarge(picture: np.ndarray, cell: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """[h, w, 3] with cells of (y, x) pixels -> [H, W, 3], the padding to whole cells cut off."""
    return picture.repeat(cell[0], 0).repeat(cell[1], 1)[: size[0], : size[1]]


def side_by_side(panels: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Writes titled pictures [H, W, 3] in 0 .. 1, all of one size, as one picture."""
    from matplotlib.figure import Figure

    height, width = panels[0][1].shape[:2]
    inch = 4.0
    figure = Figure(figsize=(inch * len(panels), inch * height / width + 0.4), layout="constrained")
    for axes, (title, picture) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
