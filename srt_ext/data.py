"""Reads and writes the fields of many images in Parquet files; requires pyarrow.

A folder OUT contains:

- ``manifest.json``: the settings of the extraction;
- ``data/*.parquet``: one row per image, with the columns :data:`FIELDS` and the columns of the
  source;
- ``errors/*.parquet``: the images that have no field, with the reason;
- ``pca.npy``: the basis, if the fields are projected;
- ``checkpoint``: the keys that Ray has committed.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from ._validation import is_integer, wrong

T = TypeVar("T")

FORMAT = 1
COMPONENTS = "pca.npy"
PARTIAL = "partial"  # folder of unfinished files
THREADS = 16  # for footers and keys: requests to an object store have a long latency
ROW_GROUP_BYTES = 64 << 20  # of fields and prefixes: a reader holds one row group

#: The columns of a file of fields.
FIELDS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # cells of the field
        pa.field("width", pa.int32(), nullable=False),
        pa.field("stride", pa.int32(), nullable=False),  # pixels per cell
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
    """The file system of a local path or a URL, and the path in it.

    URLs with a scheme that pyarrow does not support are passed to fsspec. Raises a ValueError for a
    scheme that neither supports, or whose package is not installed; the message names the package.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(::[^:/]+)*://", url)  # fsspec chains with ::
    if not scheme:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(url)
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(url)
        return files, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        rule = f"the URL must be supported by pyarrow ({error})"
    if scheme[1].lower() not in ("file", "local"):  # fsspec would guess a relative path
        try:
            import fsspec

            files, path = fsspec.core.url_to_fs(url)
            return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path
        except (ImportError, ValueError) as error:
            rule = f"{rule} or fsspec ({error})"
    raise wrong(ValueError, "srt_ext.data.filesystem", rule, url)


def read_settings(files: pyarrow.fs.FileSystem, out: str) -> dict[str, str] | None:
    """The settings in the manifest of the folder ``out``; None if there is no manifest."""
    try:
        with files.open_input_stream(f"{out}/manifest.json") as file:
            manifest = json.loads(file.read())
    except FileNotFoundError:
        return None
    if manifest.get("format") != FORMAT:
        rule = f"{out}/manifest.json must have format {FORMAT}"
        raise wrong(ValueError, "srt_ext.data", rule, manifest)
    settings: dict[str, str] = manifest["settings"]
    return settings


def write_settings(settings: dict[str, str], files: pyarrow.fs.FileSystem, out: str) -> None:
    """Writes the manifest of the folder ``out``."""
    text = json.dumps({"format": FORMAT, "settings": settings}, indent=1)
    write_file(files, out, "manifest.json", lambda file: file.write(text.encode()))


def read_components(files: pyarrow.fs.FileSystem, path: str) -> np.ndarray:
    """The basis of projected fields, [K, C] float32, from a .npy file.

    Raises a ValueError if the file has another content.
    """
    with files.open_input_stream(path) as file:
        content = file.read()
    try:
        components: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (EOFError, ValueError) as error:
        rule = f"{path} must be a .npy file of components [K, C]"
        raise wrong(ValueError, "srt_ext.data", rule, "another format") from error
    if not isinstance(components, np.ndarray):
        rule = f"{path} must be a .npy file of components [K, C]"
        raise wrong(ValueError, "srt_ext.data", rule, "a .npz file")
    if components.ndim != 2 or components.dtype != np.float32:
        rule = f"{path} must contain components [K, C] in float32"
        got = f"{list(components.shape)} in {components.dtype}"
        raise wrong(ValueError, "srt_ext.data", rule, got)
    return components


def write_components(components: np.ndarray, files: pyarrow.fs.FileSystem, out: str) -> None:
    """Writes the basis [K, C] of projected fields to ``pca.npy`` in the folder ``out``."""
    content = io.BytesIO()
    np.save(content, components)
    write_file(files, out, COMPONENTS, lambda file: file.write(content.getvalue()))


def write_file(
    files: pyarrow.fs.FileSystem, out: str, name: str, write: Callable[[Any], object]
) -> None:
    """Writes ``out/name`` with ``write``, a function of an open file.

    A reader never sees an incomplete file. A local file is moved from ``out/partial``. An object
    store publishes a file when it is closed, also after an error, so all bytes are computed before.
    On other file systems with folders, the folder must exist.
    """
    path = f"{out}/{name}"
    if not isinstance(files, pyarrow.fs.LocalFileSystem):
        content = pa.BufferOutputStream()
        write(content)
        with files.open_output_stream(path) as file:
            file.write(content.getvalue())
        return
    partial = f"{out}/{PARTIAL}/{posixpath.basename(name)}"
    for place in (path, partial):
        files.create_dir(posixpath.dirname(place), recursive=True)
    with files.open_output_stream(partial) as file:
        write(file)
    files.move(partial, path)


def write_rows(table: pa.Table, file: Any) -> None:
    """Writes rows to an open file: the columns of :data:`FIELDS` first, then all others.

    Row groups have at most ``ROW_GROUP_BYTES`` of fields and prefixes; a larger row has its own row
    group.
    """
    others = [name for name in table.column_names if name not in NAMES]
    schema = pa.schema([*FIELDS, *(table.schema.field(name) for name in others)])
    table = table.select([*NAMES, *others]).cast(schema)
    small = [path for path in _leaves(schema) if path not in _BLOBS]
    writer = pq.ParquetWriter(
        file,
        schema,
        compression=dict.fromkeys(small, "zstd"),  # fields and prefixes are not compressed
        use_dictionary=small,
        write_statistics=small,
    )
    with writer:
        for start, count in _row_groups(table):
            writer.write_table(table.slice(start, count), row_group_size=count)


def _leaves(schema: pa.Schema) -> list[str]:
    """The Parquet columns of a schema: a nested column has several."""
    sink = pa.BufferOutputStream()
    pq.write_metadata(schema, sink)
    columns = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [columns.column(i).path for i in range(len(columns))]


def _row_groups(table: pa.Table) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each row group."""
    sizes = (pc.fill_null(pc.binary_length(table[name]), 0).to_pylist() for name in _BLOBS)
    start = total = 0
    for row, size in enumerate(map(sum, zip(*sizes, strict=True))):
        if row > start and total + size > ROW_GROUP_BYTES:
            yield start, row - start
            start, total = row, 0
        total += size
    if start < table.num_rows:
        yield start, table.num_rows - start


# ---- reading ------------------------------------------------------------------------------------


def open(out: str | Path, columns: Sequence[str] | None = None) -> Fields:
    """Opens the output of ``srt-ext features --engine ray`` as a data set.

    Only footers of files are read. Files of a killed run without a checkpoint are ignored.

    Args:
        out: a local path, or a URL of pyarrow or fsspec.
        columns: the columns to read: any of ``field``, ``prefix`` and the columns of the source.
            None: all of them. The sizes of an image are always read.

    Returns:
        :class:`Fields`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the folder has no manifest or no images; no file has a requested column.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp()
        >>> files, path = filesystem(out)
        >>> write_settings({"model": "small"}, files, path)
        >>> row = {"key": "a.jpg", "height": 2, "width": 3, "stride": 8, "channels": 2}
        >>> row |= {"dtype": "float16", "field": np.zeros((2, 3, 2), np.float16).tobytes()}
        >>> row |= {"image_height": 16, "image_width": 24}
        >>> files.create_dir(f"{path}/data")
        >>> with files.open_output_stream(f"{path}/data/0.parquet") as file:
        ...     write_rows(pa.Table.from_pylist([row], FIELDS), file)
        >>> fields = open(out)
        >>> len(fields), fields["a.jpg"]["field"].shape, fields.settings
        (1, torch.Size([2, 2, 3]), {'model': 'small'})
    """
    return Fields(out, columns)


class Fields(Dataset[dict[str, Any]]):
    """A map-style data set, returned by :func:`open`, in the order of the file names.

    ``fields[i]`` or ``fields[key]`` is a dict with

    - ``key``; ``stride``, ``image_height`` and ``image_width`` in pixels;
    - ``field`` [C, H', W'], channels last in memory, and ``prefix`` [n, C] if the model has prefix
      tokens;
    - the columns of the source; None if its file does not have the column.

    Each process keeps the last row group that it read, about 64 MB. In sequential order each row
    group is read once; in random order one is read for each image. Shuffle the row groups instead::

        first = fields.row_groups
        order = [i for g in torch.randperm(len(first) - 1) for i in range(first[g], first[g + 1])]
        loader = DataLoader(fields, sampler=order, batch_size=None)

    Attributes:
        settings: the settings of the extraction, by name.
        columns: the columns that are read, in addition to the sizes of an image.
        row_groups: [G + 1], the index of the first image of each row group, then ``len(fields)``.
    """

    def __init__(self, out: str | Path, columns: Sequence[str] | None = None) -> None:
        if not isinstance(out, str | Path):
            raise wrong(TypeError, "srt_ext.data.open", "out must be a path or a URL", repr(out))
        self._url = str(out)
        files, self._out = filesystem(self._url)
        self._process: tuple[int, pyarrow.fs.FileSystem] = os.getpid(), files
        self._last: tuple[int, pa.Table] = -1, None
        settings = read_settings(files, self._out)
        if settings is None:
            rule = "out must be an output of srt-ext features --engine ray, with a manifest.json"
            raise wrong(ValueError, "srt_ext.data.open", rule, out)
        self.settings = settings
        self._paths = self._committed("data")
        footers = self._map(self._footer, self._paths)
        groups = [
            (file, group, rows)
            for file, (_, counts) in enumerate(footers)
            for group, rows in enumerate(counts)
        ]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self.row_groups = np.concatenate([[0], self._groups[:, 2].cumsum()])
        if not len(self):
            rule = "out must have at least one image"
            raise wrong(ValueError, "srt_ext.data.open", rule, f"none in {out}")
        names = dict.fromkeys(name for columns_of_file, _ in footers for name in columns_of_file)
        found = [name for name in names if name in _BLOBS or name not in NAMES]
        self.columns = found if columns is None else list(columns)
        if isinstance(columns, str) or not set(self.columns) <= set(found):
            rule = f"columns must be a sequence of names from {found}"
            raise wrong(ValueError, "srt_ext.data.open", rule, repr(columns))

    def __len__(self) -> int:
        return int(self.row_groups[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | str) -> dict[str, Any]:
        i = self._find(index) if isinstance(index, str) else self._position(index)
        group = int(self.row_groups.searchsorted(i, "right")) - 1
        last = self._last
        if last[0] != group:
            last = self._last = -1, None  # frees it before the next one is read
            last = self._last = group, self._read(group)
        table, row = last[1], i - int(self.row_groups[group])
        blobs = {name: _value(table[name], row) for name in _BLOBS if name in table.column_names}
        return self._image(table.drop_columns([*blobs]).slice(row, 1).to_pylist()[0], blobs)

    @cached_property
    def keys(self) -> pa.Array:
        """The key of each image, as pyarrow strings. Reads only the key columns."""
        tables = self._map(lambda path: self._file(path).read(["key"]), self._paths)
        return pa.concat_tables(tables)["key"].cast(pa.large_string()).combine_chunks()

    @property
    def errors(self) -> pa.Table:
        """``key`` and ``reason`` of each image that has no field."""
        schema = pa.schema({"key": pa.string(), "reason": pa.string()})
        paths = self._committed("errors")
        tables = self._map(lambda path: self._file(path).read(schema.names), paths)
        return pa.concat_tables([schema.empty_table(), *tables])

    @cached_property
    def pca(self) -> torch.Tensor | None:
        """[K, C] float32, the basis of projected fields ``pca @ field``; None if not projected."""
        if self.settings.get("pca", "none") == "none":
            return None
        try:
            return torch.from_numpy(read_components(self._files, f"{self._out}/{COMPONENTS}"))
        except FileNotFoundError:
            return None

    # A worker of a DataLoader shares neither connections nor rows with its parent.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": (0, None), "_last": (-1, None)}

    @property
    def _files(self) -> pyarrow.fs.FileSystem:
        if self._process[0] != os.getpid():
            self._process = os.getpid(), filesystem(self._url)[0]
        return self._process[1]

    def _committed(self, folder: str) -> list[str]:
        """Paths of the Parquet files with a committed checkpoint, a file of the same name."""

        def names(folder: str) -> set[str]:
            place = pyarrow.fs.FileSelector(f"{self._out}/{folder}", allow_not_found=True)
            found = (file.base_name for file in self._files.get_file_info(place))
            return {name for name in found if name.endswith(".parquet")}

        found = names(folder)
        checkpoint = self._files.get_file_info(f"{self._out}/checkpoint")
        if checkpoint.type != pyarrow.fs.FileType.NotFound:
            found &= names("checkpoint")
        return [f"{self._out}/{folder}/{name}" for name in sorted(found)]

    def _map(self, call: Callable[[str], T], paths: list[str]) -> list[T]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(call, paths))

    def _file(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self._files, pre_buffer=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"srt_ext.data.open: {path} is damaged: {error}") from None

    def _footer(self, path: str) -> tuple[list[str], list[int]]:
        """The columns of a file, and the rows of each row group."""
        with self._file(path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            return file.schema_arrow.names, [group.num_rows for group in groups]

    def _read(self, group: int) -> pa.Table:
        index, part, _ = self._groups[group]
        # Closed at once: an open file keeps the bytes of a row group in addition to its table.
        with self._file(self._paths[index]) as file:
            wanted = {*NAMES, *self.columns} - ({*_BLOBS} - {*self.columns})
            names = [name for name in file.schema_arrow.names if name in wanted]
            return file.read_row_group(int(part), names)

    def _image(self, row: dict[str, Any], blobs: dict[str, bytearray | None]) -> dict[str, Any]:
        image = {name: row[name] for name in ("key", "stride", "image_height", "image_width")}
        dtype = getattr(torch, row["dtype"])
        shapes = {
            "field": (row["height"], row["width"], row["channels"]),
            "prefix": (-1, row["channels"] if self.pca is None else self.pca.shape[1]),
        }
        for name, blob in blobs.items():
            if blob is not None:
                image[name] = torch.frombuffer(blob, dtype=dtype).view(shapes[name])
        if "field" in image:
            image["field"] = image["field"].permute(2, 0, 1)
        return image | {name: row.get(name) for name in self.columns if name not in _BLOBS}

    def _position(self, index: int) -> int:
        where, count = "srt_ext.data.Fields", len(self)
        if not is_integer(index):
            raise wrong(TypeError, where, "index must be an integer or a key", repr(index))
        if not -count <= index < count:
            raise IndexError(f"{where}: index must be in {-count} .. {count - 1}; got {index}")
        return int(index) % count

    @cached_property
    def _order(self) -> np.ndarray:
        """The indices that sort the keys. A dict would need ten times the memory."""
        order: np.ndarray = pc.sort_indices(self.keys).to_numpy()
        return order

    def _find(self, key: str) -> int:
        place = bisect_left(self._order, key, key=lambda i: self.keys[i].as_py())
        if place == len(self) or self.keys[self._order[place]].as_py() != key:
            raise KeyError(f"srt_ext.data.Fields: key must be the key of an image; got {key!r}")
        return int(self._order[place])


def _value(column: pa.ChunkedArray, row: int) -> bytearray | None:
    """A writable copy, which does not keep its row group alive.

    Read from the buffers, because ``column[row]`` would be a second copy.
    """
    array = column.slice(row, 1).chunk(0)
    if array.null_count:
        return None
    _, offsets, content = array.buffers()
    start, end = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2].tolist()
    return bytearray(content.slice(start, end - start))
