"""The rows between the stages of a job.

A row has a ``key``, a ``reason`` if it cannot have a field, the columns of the source, and three
columns that are never written: :data:`ID`, :data:`URI`, :data:`BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from ..data import NAMES

ID = "__id__"  # unique, by which Ray's checkpoint knows a row: the key, unless that is repeated
URI = "__uri__"  # the path, which may be no UTF-8, or the URL of a picture
BYTES = "__bytes__"  # of the picture's file
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

TABLE_ROWS = 256  # of a table that a reader makes of a file, and
TABLE_BYTES = 64 << 20  # of pictures in it, about


def make_rows(values: Mapping[str, Any], others: Mapping[str, pa.Array] | None = None) -> pa.Table:
    """``values``: of :data:`SCHEMA`; the key alone must be there. ``others``: of the source."""
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
    """The row of a file that cannot be read."""
    return make_rows({ID: [special_id(key, "")], "key": [key], "reason": [reason]})


def special_id(key: str | None, where: str) -> str:
    """For a row whose key does not identify it. No other key has a NUL and then its place."""
    return f"{key or ''}\0{where}"


def rename(columns: Iterable[str]) -> dict[str, str]:
    """What columns of a source are called in the output: source_NAME where NAME is ours."""
    columns = list(columns)
    names = {name: f"source_{name}" if name in _OURS else name for name in columns}
    if len(set(names.values())) < len(columns):
        raise ValueError(f"the names of columns must differ, as source_NAME, too; got {columns}")
    return names


def hashes(keys: Sequence[str | None], seed: int = 0) -> np.ndarray:
    """[n] uint64, which depend on nothing but each key and the seed."""
    salt = seed.to_bytes(16, "little", signed=True)
    digests = (blake2b((key or "").encode(), digest_size=8, salt=salt).digest() for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)
