"""The images of a source as rows: image files, Parquet files, or tar shards of WebDataset."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from ..data import THREADS
from ..images import ImageError, utf8
from .listing import KIND_NAMES, is_url, list_files, open_file, open_stream
from .parquet import Columns, Footer, read_footer, read_keys, read_parquet
from .rows import BYTES, ID, SCHEMA, URI, error_row, hashes, make_rows, special_id
from .tar import count_samples, read_tar

ATTEMPTS = 4  # to read a remote file
SHARDS = 4  # for estimates and samples, chosen by their hashes
SCANNED = 64 << 20  # bytes of a shard whose samples are counted for an estimate
TASK_ROWS = 4096  # images of a read task
TASK_BYTES = 64 << 20  # of small files in a read task

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Source:
    """A source to read. ``skipped``: ignored files. ``errors``: folders that cannot be read."""

    kind: str  # pictures, parquet or tar
    files: pa.Table  # of listing.FILES, in natural order
    limit: int | None
    skipped: str  # such as "3 .txt, 1 hidden"
    errors: list[str]
    columns: Columns | None = None  # of Parquet

    def fingerprint(self) -> str:
        """A hash of the files, their sizes and times, the limit and the columns."""
        columns = (self.files[name].to_pylist() for name in ("key", "size", "changed", "rows"))
        digest = sha256(repr((self.kind, self.limit, self.columns)).encode())
        for row in zip(*columns, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def count(self) -> tuple[int, bool]:
        """The number of images, and whether it is exact; for tar shards it is an estimate."""
        if self.kind == "pictures":
            return self.files.num_rows, True
        if self.kind == "parquet" or self.limit is not None:
            return pc.sum(self.files["rows"]).as_py() or 0, True
        return _estimate(self.files)

    def sample(self, n: int, seed: int, *, quick: bool = False) -> pa.Table:
        """``n`` rows with their bytes, as rows.SCHEMA: the rows with the smallest hashes of keys.

        If images are in large files, only a few files are used, chosen by their hashes; with
        ``quick``, the first rows of as few files as possible.
        """
        order = np.argsort(hashes(self.files["key"].to_pylist(), seed), kind="stable")
        if self.kind == "pictures":
            return read_bytes(_rows_of_pictures(self.files.take(order[:n]), 0, {}))
        large = self.columns is None or self.columns.has_bytes
        few = 1 if quick else SHARDS if large else self.files.num_rows
        found = SCHEMA.empty_table()
        for i, file in enumerate(self.file(index, {}) for index in order.tolist()):
            if i >= few and found.num_rows >= n:
                break
            for table in file.tables():
                rows = pa.concat_tables([found, table.select(SCHEMA.names)])
                rows = rows.filter(pc.is_null(rows["reason"]))
                least = np.argsort(hashes(rows["key"].to_pylist(), seed), kind="stable")
                found = rows.take(least[:n])
                if quick and found.num_rows == n:
                    break
        return read_bytes(found)

    def file(self, index: int, repeats: Mapping[int, str]) -> _File:
        row = self.files.slice(index, 1).to_pylist()[0]
        return _File(row["key"], row["uri"], row["rows"], self.columns, repeats)

    def repeats(self) -> dict[int, dict[int, str]]:
        """By file and row: for repeated keys, the place of the first row. For tar: see read_tar."""
        if self.kind == "tar":
            return {}
        if self.kind == "pictures":  # escaped names that are not UTF-8 may be equal to others
            return _repeats([lambda: self.files["key"].to_pylist()], lambda _, i: f"image {i}")
        files = [self.file(index, {}) for index in range(self.files.num_rows)]
        return _repeats([file.keys for file in files], lambda i, row: f"{files[i].key}, row {row}")


def find(
    source: str,
    limit: int | None = None,
    without: str | None = None,
    *,
    column: str | None = None,
    key: str | None = None,
) -> Source:
    """The images of a folder, a glob, Parquet files or tar shards; paths or URLs.

    Args:
        source: a path, a glob or a URL.
        limit: use only the first images. None: all.
        without: a folder to ignore.
        column, key: columns of Parquet files, as for ``srt-ext features``.

    Raises:
        ImageError: no image is found.
        ValueError: the files are of several kinds, or their columns do not fit.
    """
    kind, files, skipped, errors = list_files(source, without)
    if kind != "parquet" and (column or key):
        raise ValueError(f"column and key require .parquet files; got {KIND_NAMES[kind]}: {source}")
    found = Source(kind, files, limit, skipped, errors)
    if kind == "pictures":
        return replace(found, files=files if limit is None else files.slice(0, limit))
    if kind == "tar":
        return found if limit is None else replace(found, files=_limited(files, _scan, limit))
    with ThreadPoolExecutor(THREADS) as pool:
        uris = files["uri"].to_pylist()
        footers = dict(zip(uris, pool.map(_footer, uris), strict=True))
    readable = [footer for footer in footers.values() if isinstance(footer, Footer)]
    if not readable:
        raise ImageError(next(iter(footers.values())))
    columns = Columns.choose([footer.schema for footer in readable], column, key)

    def count(uri: bytes, _: int) -> int | None:
        footer = footers[uri]
        return footer.rows if isinstance(footer, Footer) else None

    files = _limited(files, count, 2**62 if limit is None else limit)
    return replace(found, files=files, columns=columns)


def read_bytes(table: pa.Table) -> pa.Table:
    """Adds the contents of the files of the rows, or the reasons why they cannot be read."""
    missing = pc.and_(pc.is_valid(table[URI]), pc.is_null(table[BYTES]))
    missing = pc.and_(missing, pc.is_null(table["reason"]))
    if not pc.any(missing).as_py():
        return table
    uris = pc.if_else(missing, table[URI], pa.scalar(None, pa.binary())).to_pylist()
    with ThreadPoolExecutor(THREADS) as pool:
        contents, reasons = zip(*pool.map(_read, uris), strict=True)
    for name, values in ((BYTES, contents), ("reason", reasons)):
        i = table.column_names.index(name)
        values = pa.array(values, SCHEMA.field(name).type)
        table = table.set_column(i, name, pc.coalesce(table[name], values))
    return table


class Pictures(Datasource):
    """The rows of a source, for ``ray.data.read_datasource``; rows of image files have no bytes."""

    def __init__(self, source: Source) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source, self._repeats = source, source.repeats()

    def estimate_inmemory_data_size(self) -> int | None:
        files = self._source.files
        of_rows = self._source.kind == "pictures"
        return int(files.nbytes if of_rows else pc.sum(files["size"]).as_py() or 0)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """Tasks of adjacent files: at least ``parallelism``, unless the files are tiny."""
        files = self._source.files
        if self._source.kind == "pictures":
            sizes, most = np.ones(files.num_rows, np.int64), TASK_ROWS
        else:
            sizes = pc.fill_null(files["size"], 0).to_numpy().astype(np.int64)
            most = TASK_BYTES
        target = min(most, max(1, -(-int(sizes.sum()) // parallelism)))
        part = (sizes.cumsum() - sizes) // target
        starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
        bounds = itertools.pairwise([*starts, files.num_rows])
        return [self._task(start, stop, per_task_row_limit) for start, stop in bounds]

    def _task(self, start: int, stop: int, row_limit: int | None) -> ReadTask:
        """A task that only holds its part of the source."""
        rows: int | None
        # take() copies: a slice would be serialised with the whole table.
        files = self._source.files.take(np.arange(start, stop))
        if self._source.kind == "pictures":
            repeats = {i: text for i, text in self._repeats.get(0, {}).items() if start <= i < stop}
            rows, size = stop - start, files.nbytes

            def read() -> Iterable[pa.Table]:
                yield _rows_of_pictures(files, start, repeats)
        else:
            parts = [self._source.file(i, self._repeats.get(i, {})) for i in range(start, stop)]
            # An unreadable file yields a row, too.
            known = files["rows"].null_count == 0
            rows = pc.sum(files["rows"]).as_py() if known else None
            size = pc.sum(files["size"]).as_py()

            def read() -> Iterable[pa.Table]:
                for file in parts:
                    yield from file.tables()

        metadata = BlockMetadata(num_rows=rows, size_bytes=size, input_files=None, exec_stats=None)
        return ReadTask(read, metadata, per_task_row_limit=row_limit)


class _File(NamedTuple):
    """A Parquet file or a shard. ``rows``: the number of rows to use; None: all."""

    key: str
    uri: bytes
    rows: int | None
    columns: Columns | None
    repeats: Mapping[int, str]

    def tables(self) -> Iterator[pa.Table]:
        """Tables with rows.SCHEMA and the columns of the source. The last may be an error row."""
        try:
            yield from _retried(self._read, self.uri)
        except Exception as error:  # a damaged file does not end the job
            yield error_row(self.key, _reason(error, self.key))

    def _read(self) -> Iterator[pa.Table]:
        if self.columns is None:
            with open_stream(self.uri) as file:
                yield from read_tar(file, self.key, self.rows)
        else:
            rows = 2**62 if self.rows is None else self.rows
            with open_file(self.uri) as file:
                yield from read_parquet(file, self.uri, self.key, self.columns, rows, self.repeats)

    def keys(self) -> list[str | None]:
        """The keys of a Parquet file; empty if it cannot be read, which its rows report."""
        assert self.columns is not None
        try:
            with open_file(self.uri) as file:
                return read_keys(file, self.columns, self.rows or 0)
        except Exception:
            return []


def _rows_of_pictures(files: pa.Table, start: int, repeats: Mapping[int, str]) -> pa.Table:
    """``start``: the index of the first file in the source."""
    keys = files["key"].to_pylist()
    ids = list(keys)
    reasons: list[str | None] = [None] * len(keys)
    for i, first in repeats.items():
        ids[i - start] = special_id(keys[i - start], str(i))
        reasons[i - start] = f"repeats the key of {first}"
    uris = files["uri"]
    return make_rows({ID: ids, "key": files["key"], URI: uris, "reason": reasons})


def _repeats(
    files: list[Callable[[], list[str | None]]], place: Callable[[int, int], str]
) -> dict[int, dict[int, str]]:
    """``files``: functions that return the keys of each file.

    Memory: 8 bytes per key, and the keys of THREADS files.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        hashed = list(pool.map(lambda keys: hashes(keys()), files))
    ordered = np.sort(np.concatenate(hashed))
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    firsts: dict[str, str] = {}
    repeats: dict[int, dict[int, str]] = {}
    for i, values in enumerate(hashed if len(twice) else []):
        rows = np.flatnonzero(np.isin(values, twice)).tolist()
        keys = files[i]() if rows else []
        for row in rows:
            key = keys[row]
            if key in firsts:
                repeats.setdefault(i, {})[row] = firsts[key]
            elif key is not None:
                firsts[key] = place(i, row)
    return repeats


def _limited(files: pa.Table, count: Callable[[bytes, int], int | None], limit: int) -> pa.Table:
    """The files of the first ``limit`` rows, with the number of rows to use from each."""
    rows: list[int | None] = []
    for uri in files["uri"].to_pylist():
        if limit <= 0:
            break
        found = count(uri, limit)
        rows.append(found if found is None else min(found, limit))
        limit -= rows[-1] or 0
    index = files.column_names.index("rows")
    return files.slice(0, len(rows)).set_column(index, "rows", pa.array(rows, pa.int64()))


def _scan(uri: bytes, most: int) -> int | None:
    try:
        with open_stream(uri) as file:
            return count_samples(file, most)[0]
    except (OSError, ImageError):
        return None


def _estimate(files: pa.Table) -> tuple[int, bool]:
    """Estimates the number of samples from the first bytes of a few shards."""
    order = np.argsort(hashes(files["key"].to_pylist()), kind="stable")[:SHARDS]
    samples = read = 0
    exact = len(order) == files.num_rows
    for row in files.take(order).to_pylist():
        try:
            with open_stream(row["uri"]) as file:
                count, ended = count_samples(file, None, SCANNED)
                samples, read = samples + count, read + ((ended and row["size"]) or file.tell())
        except (OSError, ImageError):
            ended = False
        exact = exact and ended
    total = pc.sum(files["size"]).as_py() or 0
    return samples if exact else round(total * samples / max(1, read)), exact


def _footer(uri: bytes) -> Footer | str:
    """The footer, or the reason why it cannot be read."""
    try:
        with open_file(uri) as file:
            return read_footer(file)
    except Exception as error:
        return _reason(error, utf8(os.fsdecode(uri)))


def _read(uri: bytes | None) -> tuple[bytes | None, str | None]:
    """The content of a file, or the reason why it cannot be read."""

    if uri is None:
        return None, None

    def read(uri: bytes = uri) -> Iterator[bytes]:
        with open_file(uri) as file:
            yield file.read()

    try:
        return next(_retried(read, uri)), None
    except Exception as error:
        return None, _reason(error, utf8(os.fsdecode(uri)))


def _retried(read: Callable[[], Iterator[_Item]], uri: bytes) -> Iterator[_Item]:
    """Retries reading a remote file after an error, and skips items that were already yielded."""
    attempts = ATTEMPTS if is_url(uri) else 1
    done = 0
    for attempt in range(attempts):
        try:
            for item in itertools.islice(read(), done, None):
                done += 1
                yield item
            return
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            if attempt + 1 == attempts:
                raise
            time.sleep(random.uniform(0.5, 1) * 2**attempt)


def _reason(error: Exception, name: str) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"{name} does not exist"
    if isinstance(error, PermissionError):
        return f"{name} cannot be read: no permission"
    return f"{name} cannot be read: {error or type(error).__name__}"
