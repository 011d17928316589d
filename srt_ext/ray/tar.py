"""Reads the samples of WebDataset's tar shards in one pass over the stream."""

from __future__ import annotations

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa

from ..images import suffixes, utf8
from .rows import (
    BYTES,
    ID,
    SCHEMA,
    TABLE_BYTES,
    TABLE_ROWS,
    URI,
    error_row,
    make_rows,
    rename,
    special_id,
)

_Row = tuple[dict[str, Any], dict[str, bytes | None]]  # rows.SCHEMA; other members by extension
_TEXT = {"txt", "text", "json", "cls"}


class _NoEnd(tarfile.ReadError):
    """The file ends after a member, without the blocks of zeros that end an archive."""


class _Member(tarfile.TarInfo):
    """Raises a ReadError for a damaged header, which tarfile treats as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            kind = type(error).__name__  # tarfile does not export these
            if kind == "EOFHeaderError":
                raise
            if kind == "EmptyHeaderError":
                raise _NoEnd("the end-of-archive marker is missing") from None
            raise tarfile.ReadError(str(error)) from None


class _Sample(NamedTuple):
    name: str
    members: dict[str, bytes | None]  # by extension; None: a link, or not read

    @property
    def picture(self) -> str | None:
        """The extension of the first member that is an image."""
        known = suffixes()
        return next((e for e in self.members if "." + e.rpartition(".")[2] in known), None)


def count_samples(file: IO[bytes], most: int | None, size: int | None = None) -> tuple[int, bool]:
    """The number of samples of a shard, at most ``most``, and whether the shard ends there.

    Stops after ``size`` bytes of the file. A shard ends at damage.
    """
    count = 0
    try:
        for _ in _samples(file, contents=False):
            count += 1
            if count == most or (size is not None and file.tell() > size):
                return count, False
    except (MemoryError, OSError):
        raise
    except Exception:  # as in read_tar
        pass
    return count, True


def read_tar(file: IO[bytes], shard: str, rows: int | None = None) -> Iterator[pa.Table]:
    """Yields tables of a shard: the first ``rows`` samples, and a row with a reason for damage.

    ``shard``: its key, the start of the keys of the samples. Raises the OSErrors of ``file``.
    """
    seen: dict[str, int] = {}
    held: list[_Row] = []
    size, i = 0, -1
    damage = None
    try:
        for i, sample in enumerate(itertools.islice(_samples(file), rows)):
            held.append(_row(sample, shard, i, seen))
            size += sum(len(value) for value in sample.members.values() if value)
            if len(held) == TABLE_ROWS or size >= TABLE_BYTES:
                yield _table(held)
                held, size = [], 0
    except (MemoryError, OSError):
        raise
    except Exception as error:  # such as zlib.error and tarfile.ReadError
        damage = error_row(shard, f"the shard is damaged after {i + 1} samples: {error}")
    if held:
        yield _table(held)
    if damage is not None:
        yield damage


def _samples(file: IO[bytes], contents: bool = True) -> Iterator[_Sample]:
    """Groups adjacent members by their name up to the first dot of the file name."""
    sample = _Sample("", {})
    try:
        for path, data in _members(file, contents):
            folder, name = posixpath.split(path)
            stem, dot, extension = name.partition(".")
            if not dot:
                continue
            name, extension = posixpath.join(folder, stem), utf8(extension.lower())
            if name != sample.name or extension in sample.members:
                if sample.members:
                    yield sample
                sample = _Sample(name, {})
            sample.members[extension] = data.read() if data else None
    except _NoEnd:
        if sample.members:
            yield sample
        raise
    if sample.members:
        yield sample


def _members(file: IO[bytes], contents: bool) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Relative names and contents of members; None for a link, which cannot be followed."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would grow
            path = posixpath.normpath(member.name)
            if member.isdir() or any(part.startswith(".") for part in path.split("/")):
                continue
            yield path, archive.extractfile(member) if contents and member.isreg() else None


def _row(sample: _Sample, shard: str, i: int, seen: dict[str, int]) -> _Row:
    """Row ``i`` of a shard. Adds the sample to ``seen``, which maps keys to indices."""
    picture, key = sample.picture, f"{shard}/{utf8(sample.name)}"
    first = seen.setdefault(key, i)
    row: dict[str, Any] = {ID: key, "key": key}
    if first != i:
        row[ID] = special_id(key, str(i))
        row["reason"] = f"repeats the key of sample {first} of the shard; this is sample {i}"
    elif picture is None:
        row["reason"] = f"has no image, only {', '.join(sample.members)}"
    elif sample.members[picture] is None:
        row["reason"] = f"{utf8(sample.name)}.{picture} is not a regular file"
    else:
        row[BYTES] = sample.members[picture]
    others = {name: data for name, data in sample.members.items() if name != picture}
    return row, others


def _table(rows: list[_Row]) -> pa.Table:
    values = {name: [row.get(name) for row, _ in rows] for name in SCHEMA.names if name != URI}
    names = rename(dict.fromkeys(name for _, others in rows for name in others))
    columns = {
        new: _column(name, [others.get(name) for _, others in rows]) for name, new in names.items()
    }
    return make_rows(values, columns)


def _column(extension: str, values: list[bytes | None]) -> pa.Array:
    """Has the same type in all shards: bytes that are not UTF-8 are escaped in texts."""
    if extension not in _TEXT:
        return pa.array(values, pa.large_binary())
    texts = [None if v is None else v.decode("utf-8", "backslashreplace") for v in values]
    return pa.array(texts, pa.string())
