"""Writes rows of features to Parquet files, with Ray's checkpoints."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem
from pyarrow.parquet import read_table, write_table
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, FilenameProvider

from ..data import NAMES, PARTIAL, write_file, write_rows
from .rows import ID, INTERNAL

PENDING = ".pending.parquet"  # Ray's suffix for the checkpoint of an unfinished write
FILE_BYTES = 2**28
REASONS = 3  # reasons of failures that a write task returns
COMPLETE = "complete.json"  # the source of a finished run


class Written(NamedTuple):
    """The result of one write task or of all. ``reasons``: the first failures."""

    pictures: int
    failed: int
    bytes: int
    reasons: list[str]


class _Names(FilenameProvider):
    """Like Ray's names, with more digits, because its recovery compares the starts of names."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{write_uuid}_{task_index:012}.parquet"


class FieldSink(BlockBasedFileDatasink):
    """Writes rows with a field to data/ and rows with a reason to errors/.

    Each write task writes at most one file to each folder, with the same name. Ray's checkpoint has
    this name, too, and commits both files: it is renamed after ``write`` has returned. ``total`` is
    set when all tasks have finished.
    """

    def __init__(self, path: str, filesystem: FileSystem, rows: int | None = None) -> None:
        """``path``: OUT, an existing folder.

        A write task gets at least ``rows`` rows, or FILE_BYTES bytes, unless fewer are left.
        """
        # Ray removes uncommitted files from this folder only, so it is not the folder OUT.
        super().__init__(
            posixpath.join(path, "data"),
            filesystem=filesystem,
            min_rows_per_file=rows,
            filename_provider=_Names(),
        )
        is_local = isinstance(filesystem, LocalFileSystem)
        self._files = filesystem if is_local else self.filesystem  # Ray's retries
        self._out = path
        self.total = Written(0, 0, 0, [])

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return Written(0, 0, 0, [])
        table = pa.concat_tables(tables, promote_options="permissive")
        name = self.filename_provider.get_filename_for_task(
            ctx.kwargs[WRITE_UUID_KWARG_NAME], ctx.task_idx
        )
        fields = _without(table.filter(pc.is_null(table["reason"])), [*INTERNAL, "reason"])
        errors = _without(table.filter(pc.is_valid(table["reason"])), [*INTERNAL, *NAMES[1:]])
        size = self._write(f"data/{name}", fields, write_rows)
        self._write(f"errors/{name}", errors, write_table)
        lines = errors.slice(0, REASONS).select(["key", "reason"]).to_pylist()
        reasons = [
            row["reason"] if row["key"] in row["reason"] else f"{row['key']}: {row['reason']}"
            for row in lines
        ]
        return Written(fields.num_rows, errors.num_rows, size, reasons)

    def _write(self, name: str, table: pa.Table, write: Callable[[pa.Table, Any], None]) -> int:
        """Returns the bytes of the file."""
        if not table.num_rows:
            return 0
        write_file(self._files, self._out, name, lambda file: write(table, file))
        return int(self._files.get_file_info(f"{self._out}/{name}").size or 0)

    @property
    def min_bytes_per_write(self) -> int | None:
        return FILE_BYTES if self.min_rows_per_write is None else None

    def on_write_complete(self, write_result: Any) -> None:
        results: list[Written] = write_result.write_returns
        self.total = Written(
            sum(result.pictures for result in results),
            sum(result.failed for result in results),
            sum(result.bytes for result in results),
            [reason for result in results for reason in result.reasons],
        )


def _without(table: pa.Table, columns: list[str]) -> pa.Table:
    return table.select([name for name in table.column_names if name not in columns])


def remove_uncommitted(files: FileSystem, out: str) -> None:
    """Removes the files of killed write tasks, except in data/, where Ray removes them."""
    names = set(_names(files, f"{out}/checkpoint"))
    for pending in (name for name in names if name.endswith(PENDING)):
        name = f"{pending.removesuffix(PENDING)}.parquet"
        if name in names:  # a task that was repeated after its commit: Ray would remove its data
            _delete(files, f"{out}/checkpoint/{pending}")
        else:
            _delete(files, f"{out}/errors/{name}")
    with suppress(FileNotFoundError):
        files.delete_dir(f"{out}/{PARTIAL}")


def forget_failures(files: FileSystem, out: str) -> None:
    """Removes the images in errors/ from the checkpoints, so that they are computed again."""
    _delete(files, f"{out}/{COMPLETE}")
    for name in _names(files, f"{out}/errors"):
        try:
            keys = read_table(f"{out}/data/{name}", columns=["key"], filesystem=files)
        except FileNotFoundError:
            _delete(files, f"{out}/checkpoint/{name}")
        else:
            done = keys.rename_columns([ID])  # the id of an image with a field is its key
            write_file(files, out, f"checkpoint/{name}", partial(write_table, done))
        _delete(files, f"{out}/errors/{name}")


def _names(files: FileSystem, folder: str) -> list[str]:
    found = files.get_file_info(FileSelector(folder, allow_not_found=True))
    return [file.base_name for file in found]


def _delete(files: FileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        files.delete_file(path)
