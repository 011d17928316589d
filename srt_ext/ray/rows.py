"""The rows that the stages of a job exchange.

A row has a ``key``, a ``reason`` if its field cannot be computed, the columns of the source, and
three internal columns that are not written: :data:`ID`, :data:`URI`, :data:`BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from ..data import NAMES

ID = "__id__"  # unique, for Ray's checkpoint: the key, unless it is repeated
URI = "__uri__"  # URL or path of an image, as bytes, because paths may not be UTF-8
BYTES = "__bytes__"  # content of the image file
INTERNAL = (ID, URI, BYTES)
SCHEMA = pa.schema(
    [
        (ID, pa.string()),
        ("key", pa.string()),
        (URI, pa.binary()),
        (BYTES, pa.large_binary()),
        ("reason", pa.string()),
    ]
)
_OURS = {*NAMES, *SCHEMA.names}

TABLE_ROWS = 256  # maximum rows of a table that a reader yields
TABLE_BYTES = 64 << 20  # approximate maximum bytes of images in it


def make_rows(values: Mapping[str, Any], others: Mapping[str, pa.Array] | None = None) -> pa.Table:
    """A table of ``values`` (:data:`SCHEMA`; only the key is required) and source columns."""
    values = {ID: values["key"], **values}
    count = len(values["key"])
    columns = {}
    for name, type in zip(SCHEMA.names, SCHEMA.types, strict=True):
        column = values.get(name)
        if column is None:
            column = pa.nulls(count, type)
        arrow = isinstance(column, (pa.Array, pa.ChunkedArray))
        columns[name] = column if arrow else pa.array(column, type)
    return pa.table({**columns, **(others or {})})


def error_row(key: str, reason: str) -> pa.Table:
    """A row for a file that cannot be read."""
    return make_rows({ID: [special_id(key, "")], "key": [key], "reason": [reason]})


def special_id(key: str | None, where: str) -> str:
    """An id for a row whose key is not unique: the key, a NUL and the place of the row."""
    return f"{key or ''}\0{where}"


def rename(columns: Iterable[str]) -> dict[str, str]:
    """Names of source columns in the output: source_NAME if NAME is a column of the output."""
    columns = list(columns)
    names = {name: f"source_{name}" if name in _OURS else name for name in columns}
    if len(set(names.values())) < len(columns):
        rule = "column names must be unique after NAME is renamed to source_NAME in the output"
        raise ValueError(f"{rule}; got {columns}")
    return names


def hashes(keys: Sequence[str | None], seed: int = 0) -> np.ndarray:
    """[n] uint64, hashes of the keys and the seed, the same in every run."""
    salt = seed.to_bytes(16, "little", signed=True)
    digests = (blake2b((key or "").encode(), digest_size=8, salt=salt).digest() for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)
