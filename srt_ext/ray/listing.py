"""Lists the files of a source: a folder, a glob, or names; local or at a URL."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from .. import images
from ..data import filesystem
from ..images import Found, ImageError, utf8

# key: the path relative to the folder, or to the part of a glob before its first wildcard.
# changed: nanoseconds since 1970, if known. rows: number of rows to use; null: all.
FILES = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.binary()),
        ("size", pa.int64()),
        ("changed", pa.int64()),
        ("rows", pa.int64()),
    ]
)
_BUFFER = 8 << 20  # bytes of one request to an object store
_TARS = (".tar", ".tar.gz", ".tgz")
KIND_NAMES = {"pictures": "images", "parquet": ".parquet files", "tar": ".tar files"}


class Listing(NamedTuple):
    """The files of a source.

    ``kind``: pictures, parquet or tar. ``errors``: messages about folders that cannot be read.
    """

    kind: str
    files: pa.Table  # of FILES
    skipped: str  # such as "3 .txt, 1 hidden"
    errors: list[str]


class _Entry(NamedTuple):
    key: str
    uri: bytes
    size: int | None = None
    changed: int | None = None


def list_files(source: str, without: str | None = None) -> Listing:
    """The files of ``source`` in natural order, except those in the folder ``without``.

    Hidden files are ignored. Raises an ImageError if no file is found, a ValueError if the files
    are of several kinds.
    """
    found = Found([], Counter(), [])
    entries = list(_entries(_plain(source), without and _plain(without), found))
    kinds = Counter(kind_of(entry.key) for entry in entries)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {KIND_NAMES[kind]}" for kind, count in kinds.items())
        raise ValueError(
            "a source must contain only images, only .parquet or only .tar files; "
            f"{source} has {counts}: "
            f"select one kind with a glob, such as '{source.rstrip('/')}/**/*.tar'"
        )
    skipped = found.skipped_kinds()
    if not entries:
        reasons = [f"ignored: {skipped}"] * bool(skipped) + found.errors
        what = f"{source} has no images, .parquet or .tar files"
        raise ImageError("; ".join([what, *reasons]))
    columns = [list(column) for column in zip(*entries, strict=True)]
    files = pa.table([*columns, [None] * len(entries)], schema=FILES)
    return Listing(next(iter(kinds)), files, skipped, found.errors)


def kind_of(name: str) -> str:
    """The kind of a file by its suffix. Files with other suffixes are images."""
    name = name.lower()
    if name.endswith(_TARS):
        return "tar"
    return "parquet" if name.endswith(".parquet") else "pictures"


def _entries(source: str, without: str | None, found: Found) -> Iterator[_Entry]:
    """Yields the files of ``source``; adds ignored files and errors to ``found``."""
    exists = not is_url(source) and os.path.lexists(source)  # a file name may contain * or [
    names = [source] if exists else _numbered(source)
    if not exists and any(re.search(r"[*?[]", _split(name)[1]) for name in names):
        root, path, query = _split(source)
        base = re.sub(r"[^/]*[*?[{].*", "", path, flags=re.DOTALL)
        below = [_split(name)[1][len(base) :] for name in names]
        pattern = re.compile("|".join(map(glob_translate, below)))
        nested = any("/" in rest for rest in below)
        listed = _below(root + (base if root or base else ".") + query, nested, without, found)
    elif len(names) == 1 and _is_folder(source):
        pattern = re.compile("")
        listed = _below(source, True, without, found)
    else:
        yield from (entry for name in names for entry in _named(name, found))
        return
    for entry in listed:
        suffix = posixpath.splitext(entry.key.lower())[1]
        if kind_of(entry.key) == "pictures" and suffix not in images.suffixes():
            found.skipped[suffix or "without a suffix"] += 1
        elif pattern.match(entry.key):
            yield entry


def _numbered(name: str) -> list[str]:
    """The names that ``shard-{0000..0099}.tar`` stands for."""
    part = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not part:
        return [name]
    numbers = range(int(part[1]), int(part[2]) + 1)
    texts = (str(number).zfill(len(part[1])) for number in numbers)
    return [one for text in texts for one in _numbered(name.replace(part[0], text, 1))]


def _named(name: str, found: Found) -> Iterator[_Entry]:
    root, path, _ = _split(name)
    if root:
        files, place = _locate(name)
        info = files.get_file_info(place)
        entry = _Entry(posixpath.basename(path), name.encode(), info.size, info.mtime_ns)
        exists = info.type != pafs.FileType.NotFound
    else:
        path = os.path.abspath(path)
        entry, exists = _local(path, utf8(os.path.basename(path))), os.path.exists(path)
    if exists:
        yield entry
    else:
        found.errors.append(f"{utf8(name)} does not exist")


def _below(folder: str, nested: bool, without: str | None, found: Found) -> Iterator[_Entry]:
    if is_url(folder):
        yield from _below_url(folder, nested, without or "", found)
        return
    top = os.path.abspath(folder)
    out = Path(without) if without and not is_url(without) else None
    suffixes = images.suffixes() | {".parquet", ".tar", ".gz", ".tgz"}
    local = images.find_files(Path(top), suffixes, nested=nested, without=out)
    found.skipped.update(local.skipped)
    found.errors.extend(utf8(error) for error in local.errors)
    for path in map(str, local.files):
        yield _local(path, utf8(path[len(top.rstrip("/")) + 1 :]))


def _below_url(folder: str, nested: bool, without: str, found: Found) -> Iterator[_Entry]:
    root, path, query = _split(folder)
    files, top = _locate(folder)
    infos = files.get_file_info(pafs.FileSelector(top, recursive=nested))
    names = {info.path[len(top) :].strip("/"): info for info in infos}
    start = f"{root}{path}".rstrip("/") + "/"
    out = "".join(_split(without)[:2]).removeprefix(start).strip("/")
    for name in sorted(names, key=lambda name: images.natural_key(PurePosixPath(name))):
        info = names[name]
        if info.type == pafs.FileType.Directory or (out and f"{name}/".startswith(f"{out}/")):
            continue
        if any(part.startswith(".") for part in name.split("/")):
            found.skipped["hidden"] += 1
        else:
            yield _Entry(name, f"{start}{name}{query}".encode(), info.size, info.mtime_ns)


def _local(path: str, key: str) -> _Entry:
    try:
        state = os.stat(path)
    except OSError:  # reported in its row
        return _Entry(key, os.fsencode(path))
    return _Entry(key, os.fsencode(path), state.st_size, state.st_mtime_ns)


def _is_folder(source: str) -> bool:
    if not is_url(source):
        return os.path.isdir(source)
    files, path = _locate(source)
    return bool(files.get_file_info(path).type == pafs.FileType.Directory)


# ---- places --------------------------------------------------------------------------------------


def open_file(uri: bytes) -> Any:
    """Opens a file for random access. Raises an OSError or an ImageError."""
    name = _plain(os.fsdecode(uri))
    if is_url(name):
        files, path = _locate(name)
        return files.open_input_file(path)
    # A pipe or a device may never end.
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ImageError(f"{utf8(name)} is not a regular file")
    return open(name, "rb")


def open_stream(uri: bytes) -> Any:
    """:func:`open_file` for sequential reading, with few requests."""
    file = open_file(uri)
    return io.BufferedReader(file, _BUFFER) if is_url(uri) else file


def is_url(place: str | bytes) -> bool:
    """Whether a place is a URL, but not of a local file."""
    return bool(_split(_plain(os.fsdecode(place)))[0])


def join(file: bytes, path: str) -> bytes:
    """The place of ``path``. A relative path is relative to the folder of ``file``."""
    path = _plain(path)
    root, place, query = _split(os.fsdecode(file))
    if is_url(path) or path.startswith("/"):
        return os.fsencode(path)
    return os.fsencode(root + posixpath.join(posixpath.dirname(place), path) + query)


def _locate(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URL and the path in it.

    The part after the host or bucket is used literally: names may contain spaces, % and #.
    """
    root, path, query = _split(url)
    files, base = _root(root + query)
    return files, f"{base.rstrip('/')}/{path.strip('/')}".rstrip("/")


@functools.lru_cache(maxsize=64)
def _root(url: str) -> tuple[pafs.FileSystem, str]:
    return filesystem(url)


def _split(url: str) -> tuple[str, str, str]:
    """For example s3://bucket, /train/a.tar, ?region=eu. The first part is empty for a path."""
    parts = re.fullmatch(r"(?s)([A-Za-z][A-Za-z0-9+.-]*://[^/?]*)(.*?)(\?\w+=.*)?", url)
    if not parts:
        return "", url, ""
    root, path, query = parts[1], parts[2], parts[3] or ""
    # For http, the query is a part of the name.
    return (root, path + query, "") if root.startswith("http") else (root, path, query)


def _plain(url: str) -> str:
    """The path of a file:// URL."""
    return unquote(url[len("file://") :]) if url.startswith("file://") else url
