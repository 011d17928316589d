"""Fits the principal components on which all fields of a data set are projected."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from .features import Features

PICTURES = 128  # images in the sample
CELLS = 512  # cells per image


class Cells(Features):
    """Returns random cells instead of the fields, the same in every run."""

    def __call__(self, batch: Any) -> pa.Table:
        table = super().__call__(batch)
        rows = table.select(["key", "channels", "field"]).to_pylist()
        cells = [_choose(row["key"], row["field"], row["channels"]) for row in rows]
        kept = table.select(["key", "reason"])
        return kept.append_column("cells", pa.array(cells, pa.large_binary()))


def _choose(key: str, field: bytes | None, channels: int) -> bytes | None:
    if field is None:
        return None
    cells = np.frombuffer(field, np.float32).reshape(-1, channels)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    index = np.random.default_rng(seed).integers(len(cells), size=CELLS)
    return cells[index].tobytes()


def fit(rows: list[dict[str, Any]], count: int) -> np.ndarray:
    """[count, C] float32, orthonormal: the principal components of the rows of :class:`Cells`.

    The cells are not centred, so that the inner products and cosines of projected cells approximate
    those of the cells. Raises a ValueError if there are no cells, or if they have too few channels.
    """
    found = sorted((row["key"], row["cells"]) for row in rows if row["cells"] is not None)
    if not found:
        reason = rows[0]["reason"] if rows else "the source is empty"
        raise ValueError(f"--pca needs readable images to fit the components; {reason}")
    cells = np.stack([np.frombuffer(cells, np.float32).reshape(CELLS, -1) for _, cells in found])
    cells = cells.reshape(-1, cells.shape[-1]).astype(np.float64)
    cells = cells[np.isfinite(cells).all(1)]
    if not len(cells):
        raise ValueError(f"--pca needs finite features; got none from {len(found)} images")
    if not 0 < count < cells.shape[1]:
        rule = f"between 1 and {cells.shape[1] - 1}, one less than the channels of the model"
        raise ValueError(f"--pca must be {rule}; got {count}")
    components = np.linalg.eigh(cells.T @ cells)[1].T[: -count - 1 : -1]  # the largest first
    # The sign of an eigenvector is arbitrary: the largest element is made positive.
    largest = np.abs(components).argmax(axis=1)[:, None]
    components = components * np.sign(np.take_along_axis(components, largest, axis=1))
    return np.ascontiguousarray(components, np.float32)
