"""The fields of many pictures in Parquet files, and a data set of them.

``OUT/manifest.json`` has the settings; ``OUT/data/*.parquet`` one row a picture, with the columns
:data:`FIELDS` and those of the source; ``OUT/errors/*.parquet`` the pictures that have no field;
``OUT/pca.npz`` the basis, if the fields are projected on one. pyarrow is needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from ._validation import wrong

FORMAT = 1
ROW_GROUP_BYTES = 64 << 20  # of fields and prefixes: what a reader must hold

FIELDS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # cells of the field
        pa.field("width", pa.int32(), nullable=False),
        pa.field("stride", pa.int32(), nullable=False),  # pixels a cell
        pa.field("channels", pa.int32(), nullable=False),  # of the field
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("field", pa.large_binary(), nullable=False),  # C order [height, width, channels]
        pa.field("prefix", pa.large_binary()),  # C order [n, channels of the model]
        pa.field("image_height", pa.int32(), nullable=False),  # pixels, before --size
        pa.field("image_width", pa.int32(), nullable=False),
    ]
)
NAMES = tuple(FIELDS.names)
_BLOBS = ("field", "prefix")


def filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a local path or of a URL, and the path in it.

    URLs that pyarrow does not know are those of fsspec. Raises a ValueError for a scheme that
    neither knows or that needs a package, which the message names.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if not scheme:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(url)
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(url)
        return files, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        rule = f"the location must be a path or a URL: {error}"
    if scheme[1].lower() not in ("file", "local"):  # a relative one would be guessed
        try:
            import fsspec

            files, path = fsspec.core.url_to_fs(url)
            return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path
        except (ImportError, ValueError) as error:
            rule = f"{rule}; fsspec: {error}"
    raise wrong(ValueError, "srt_ext.data.filesystem", rule, url)


class Manifest(NamedTuple):
    """What all rows of an output have in common; ``channels``: of the model."""

    settings: dict[str, str]
    channels: int
    pca: int | None = None  # components

    @classmethod
    def read(cls, files: pyarrow.fs.FileSystem, out: str) -> Manifest | None:
        """That of the folder ``out``; None if it has none."""
        try:
            with files.open_input_stream(f"{out}/manifest.json") as file:
                values = json.loads(file.read())
        except FileNotFoundError:
            return None
        if values.pop("format", None) != FORMAT:
            rule = f"{out}/manifest.json must be of format {FORMAT}"
            raise wrong(ValueError, "srt_ext.data", rule, values)
        return cls(**values)

    def write(self, files: pyarrow.fs.FileSystem, out: str) -> None:
        """Replaces it as a whole, as far as the file system can."""
        path = f"{out}/manifest.json"
        # An object store shows no file before it is complete.
        local = isinstance(files, pyarrow.fs.LocalFileSystem)
        partial = f"{path}.partial" if local else path
        files.create_dir(out, recursive=True)
        with files.open_output_stream(partial) as file:
            file.write(json.dumps({"format": FORMAT, **self._asdict()}, indent=1).encode())
        if local:
            files.move(partial, path)


def write_rows(table: pa.Table, file: Any) -> None:
    """Writes rows to an open file: the columns of :data:`FIELDS` first, then all others.

    Row groups have at most :data:`ROW_GROUP_BYTES` of fields and prefixes; a larger row is alone.
    """
    others = [name for name in table.column_names if name not in NAMES]
    schema = pa.schema([*FIELDS, *(table.schema.field(name) for name in others)])
    table = table.select([*NAMES, *others]).cast(schema)
    small = [path for path in _leaves(schema) if path not in _BLOBS]
    writer = pq.ParquetWriter(
        file,
        schema,
        compression=dict.fromkeys(small, "zstd"),  # the others: none
        use_dictionary=small,
        write_statistics=small,
        write_batch_size=16,  # rows, after which a page may end: a page is held in memory
    )
    with writer:
        for start, count in _row_groups(table):
            writer.write_table(table.slice(start, count), row_group_size=count)


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns that Parquet has for a schema: several for a nested one."""
    sink = pa.BufferOutputStream()
    pq.write_metadata(schema, sink)
    columns = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [columns.column(i).path for i in range(len(columns))]


def _row_groups(table: pa.Table) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each."""
    sizes = (pc.fill_null(pc.binary_length(table[name]), 0).to_pylist() for name in _BLOBS)
    start = total = 0
    for row, size in enumerate(map(sum, zip(*sizes, strict=True))):
        if row > start and total + size > ROW_GROUP_BYTES:
            yield start, row - start
            start, total = row, 0
        total += size
    if start < table.num_rows:
        yield start, table.num_rows - start
