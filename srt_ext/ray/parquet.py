"""Reads images, or their paths, from Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from .listing import join
from .rows import BYTES, ID, TABLE_BYTES, TABLE_ROWS, URI, make_rows, rename, special_id

_BUFFER = 8 << 20  # bytes of a column that are read at once


class Columns(NamedTuple):
    """The roles of the columns of a source."""

    picture: str  # bytes, paths, or both in a struct, as in data sets of Hugging Face
    key: str  # equals ``picture`` if the paths are the keys
    others: dict[str, tuple[str, pa.DataType]]  # name -> name in the output, and type
    has_bytes: bool  # False: only paths

    @classmethod
    def choose(cls, schemas: Sequence[pa.Schema], picture: str | None, key: str | None) -> Columns:
        """Chooses the columns of a source by the schema of its first file."""
        schema = schemas[0]
        pictures = [picture] if picture else ["bytes", "path", "image"]
        fits = [name for name in pictures if name in schema.names and _parts(schema, name)]
        if not fits:
            raise _no_column("images (bytes, paths, or a struct of both)", pictures, schema)
        parts = _parts(schema, fits[0])
        keys = [key] if key else ["key", "path"]
        found = [name for name in keys if name in schema.names]
        found += fits[:1] if "path" in parts and not key else []
        if not found:
            raise _no_column("keys", keys, schema)
        used = {found[0], *(fits[:1] if "bytes" in parts else [])}
        return cls(fits[0], found[0], _others(schemas, used), "bytes" in parts)


class Footer(NamedTuple):
    rows: int
    schema: pa.Schema


def read_footer(file: Any) -> Footer:
    with pq.ParquetFile(file) as parquet:
        return Footer(parquet.metadata.num_rows, parquet.schema_arrow.remove_metadata())


def read_keys(file: Any, columns: Columns, rows: int) -> list[str | None]:
    """The keys of the first ``rows``."""
    with pq.ParquetFile(file) as parquet:
        isolated = columns.key == columns.picture and columns.has_bytes
        name = f"{columns.key}.path" if isolated else columns.key
        table = parquet.read(columns=[name]).slice(0, rows)
    return _keys(table, columns)


def read_parquet(
    file: Any, uri: bytes, name: str, columns: Columns, rows: int, repeats: Mapping[int, str]
) -> Iterator[pa.Table]:
    """Yields tables of the first ``rows`` rows of a file.

    ``name``: the file, in messages. ``repeats``: for rows that repeat a key, the place of the first
    row with that key.
    """
    names = [columns.picture, columns.key, *columns.others]
    with pq.ParquetFile(file, buffer_size=_BUFFER) as parquet:
        missing = {columns.picture, columns.key}.difference(parquet.schema_arrow.names)
        if missing:
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        start = 0
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            size = TABLE_BYTES * group.num_rows // max(1, group.total_byte_size)
            size = min(TABLE_ROWS, max(1, size))
            for batch in parquet.iter_batches(size, row_groups=[i], columns=names):
                table = pa.Table.from_batches([batch.slice(0, rows - start)])
                if not table.num_rows:
                    return
                yield _rows(table, columns, uri, name, start, repeats)
                start += table.num_rows


def _rows(
    table: pa.Table,
    columns: Columns,
    uri: bytes,
    name: str,
    start: int,
    repeats: Mapping[int, str],
) -> pa.Table:
    parts = _parts(table.schema, columns.picture)
    picture = table[columns.picture].combine_chunks()
    nothing = pa.nulls(table.num_rows)
    contents = _part(picture, "bytes") if "bytes" in parts else nothing
    paths = _part(picture, "path") if "path" in parts else nothing
    rows = []
    for i, (key, path, empty) in enumerate(
        zip(_keys(table, columns), paths.to_pylist(), contents.is_null().to_pylist(), strict=True),
        start,
    ):
        row = {ID: key, "key": key, URI: join(uri, path) if empty and path else None}
        where = f"{name}, row {i}"
        if key is None:
            row |= {
                ID: special_id("", where),
                "key": where,
                "reason": "its key is null (--key names another column)",
            }
        elif i in repeats:
            row |= {ID: special_id(key, where), "reason": f"repeats the key of {repeats[i]}"}
        elif empty and not path:
            row["reason"] = "has neither bytes nor a path"
        rows.append(row)
    values: dict[str, Any] = {
        column: [row.get(column) for row in rows] for column in (ID, "key", URI, "reason")
    }
    return make_rows({**values, BYTES: contents.cast(pa.large_binary())}, _kept(table, columns))


def _kept(table: pa.Table, columns: Columns) -> dict[str, pa.Array]:
    """The other columns, with the types that are common to all files."""
    return {
        new: table[name].cast(type)
        if name in table.column_names
        else pa.nulls(table.num_rows, type)
        for name, (new, type) in columns.others.items()
    }


def _keys(table: pa.Table, columns: Columns) -> list[str | None]:
    keys = table[columns.key].combine_chunks()
    if types.is_struct(keys.type):
        keys = _part(keys, "path")
    found: list[str | None] = keys.cast(pa.string()).to_pylist()
    return found


def _others(schemas: Sequence[pa.Schema], used: set[str]) -> dict[str, tuple[str, pa.DataType]]:
    """All columns of all files except ``used``. Types that do not unify: from the first file."""
    merged = pa.schema([])
    for schema in schemas:
        for field in schema:
            if field.name not in used:
                # A type that does not unify is cast when the file is read, or is an error then.
                with suppress(pa.ArrowInvalid, pa.ArrowTypeError):
                    both = [merged, pa.schema([field])]
                    merged = pa.unify_schemas(both, promote_options="permissive")
    names = rename(merged.names)
    return {field.name: (names[field.name], field.type) for field in merged}


def _parts(schema: pa.Schema, name: str) -> set[str]:
    """Whether a column has bytes, path, or both; empty if it cannot contain images."""
    type = schema.field(name).type
    type = type.value_type if types.is_dictionary(type) else type
    if types.is_struct(type):
        return {"bytes", "path"}.intersection(field.name for field in type)
    if types.is_string(type) or types.is_large_string(type) or types.is_string_view(type):
        return {"path"}
    binary = types.is_binary(type) or types.is_large_binary(type) or types.is_binary_view(type)
    return {"bytes"} if binary else set()


def _part(column: pa.Array, name: str) -> pa.Array:
    part = pc.struct_field(column, name) if types.is_struct(column.type) else column
    return part.cast(pa.large_binary() if name == "bytes" else pa.string())


def _no_column(what: str, names: Sequence[str], schema: pa.Schema) -> ValueError:
    return ValueError(
        f"a Parquet source must have a column of {what} named {' or '.join(names)}; "
        f"got {', '.join(schema.names)}"
    )
