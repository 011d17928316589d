"""The principal components that all fields of a data set are projected on."""

from __future__ import annotations

import hashlib
import io
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs

from .features import Features

PICTURES = 128  # of the sample
CELLS = 512  # of each


class Basis(NamedTuple):
    """``mean`` [C] and ``components`` [K, C], float32: a cell x becomes components @ (x - mean)."""

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def read(cls, files: pyarrow.fs.FileSystem, path: str) -> Basis:
        with files.open_input_stream(path) as file, np.load(io.BytesIO(file.read())) as arrays:
            return cls(arrays["mean"], arrays["components"])

    def write(self, files: pyarrow.fs.FileSystem, path: str) -> None:
        content = io.BytesIO()
        np.savez(content, mean=self.mean, components=self.components)
        with files.open_output_stream(path) as file:
            file.write(content.getvalue())

    def digest(self) -> str:
        return hashlib.sha256(self.mean.tobytes() + self.components.tobytes()).hexdigest()[:16]


class Cells(Features):
    """Random cells of each field in place of the field, the same in every run."""

    def __call__(self, batch: Any) -> pa.Table:
        table = super().__call__(batch)
        rows = table.select(["key", "channels", "field", "reason"]).to_pylist()
        chosen = [_choose(row["key"], row["field"], row["channels"]) for row in rows]
        return pa.table(
            {
                "key": table["key"],
                "reason": table["reason"],
                "cells": pa.array(chosen, pa.large_binary()),
            }
        )


def _choose(key: str, field: bytes | None, channels: int) -> bytes | None:
    if field is None:
        return None
    cells = np.frombuffer(field, np.float32).reshape(-1, channels)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    index = np.random.default_rng(seed).integers(len(cells), size=CELLS)
    return cells[index].tobytes()


def fit(rows: list[dict[str, Any]], components: int) -> Basis:
    """The basis of the rows of :class:`Cells`; a ValueError for more components than they have."""
    from sklearn.decomposition import PCA

    found = sorted((row["key"], row["cells"]) for row in rows if row["cells"] is not None)
    if not found:
        raise ValueError(
            "--pca needs a picture that can be read, to fit the components on; the first of "
            f"{len(rows)}: {rows[0]['reason'] if rows else 'none'}"
        )
    cells = np.stack([np.frombuffer(cells, np.float32).reshape(CELLS, -1) for _, cells in found])
    cells = cells.reshape(-1, cells.shape[-1])
    if not 0 < components < cells.shape[1]:
        rule = f"between 1 and {cells.shape[1] - 1}, one less than the channels of the model"
        raise ValueError(f"--pca must be {rule}; got {components}")
    pca = PCA(components, svd_solver="full").fit(cells)
    return Basis(pca.mean_.astype(np.float32), pca.components_.astype(np.float32))
