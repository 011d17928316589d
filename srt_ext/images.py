"""Reads images from files and folders."""

from __future__ import annotations

import functools
import os
import re
import stat
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

import numpy as np

# Formats of Pillow that are measurements or videos, or that another program renders. EPS and WMF
# files are programs; Pillow recognises them even if the file is named .jpg.
_NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


class ImageError(ValueError):
    """An image or a folder cannot be used. The message states its name and the reason."""


@functools.cache
def formats() -> list[str]:
    """The names of the supported formats in Pillow."""
    from PIL import Image

    Image.init()
    return sorted(set(Image.OPEN) - _NO_IMAGES)


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of images in a folder. A file that is passed by name may have any suffix."""
    from PIL import Image

    known = {*formats(), "MPO"}  # MPO is read as JPEG
    found = {suffix for suffix, kind in Image.registered_extensions().items() if kind in known}
    return frozenset(found - {".pfm"})  # depth maps


def open_image(path: Path) -> Any:
    """Opens a file as an RGB image of Pillow, rotated by its EXIF orientation.

    The first frame of an animation is used. Transparent pixels become white; 16 bits per channel
    are reduced to 8. Raises an ImageError if the file does not exist or Pillow cannot read all of
    it.
    """
    try:
        # A pipe or a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(f"{path} is not a regular file")
        with path.open("rb") as file, quiet_decoders():
            return decode_image(file, str(path))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except OSError as error:
        raise ImageError(f"{path} is not a readable image: {error}") from None


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Ignores warnings about files that Pillow can still read. Not thread-safe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode_image(file: IO[bytes], name: str) -> Any:
    """:func:`open_image` for an open file; ``name`` is used in the ImageError."""
    try:
        return _to_rgb(_upright(file))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        reason = str(error).removesuffix(f" {file!r}")
        raise ImageError(f"{name} is not a readable image: {reason}") from None


def _upright(content: IO[bytes]) -> Any:
    from PIL import Image, ImageOps

    with Image.open(content, formats=formats()) as file:
        file.load()
        try:
            return ImageOps.exif_transpose(file)
        except MemoryError:
            raise
        except Exception:  # the EXIF data is broken, the pixels are not
            return file.copy()


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels must have 8 or 16 bits, got values up to {values.max():g}")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Any, size: int) -> np.ndarray:
    """[H, W, 3] uint8 from an image of Pillow, its longer side at most ``size`` (0: unchanged)."""
    from PIL import Image

    if size:
        image = image.copy()
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.array(image)


def utf8(name: str) -> str:
    """The name of a path for metadata. Bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---- folders ------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The content of a folder."""

    files: list[Path]
    skipped: Counter[str]  # number of ignored entries by kind
    errors: list[str]  # messages about folders that cannot be read

    def skipped_kinds(self) -> str:
        """For example ``3 .txt, 1 without a suffix``; empty if nothing was skipped."""
        common = self.skipped.most_common(5)
        kinds = [f"{count} {kind}" for kind, count in common]
        others = self.skipped.total() - sum(count for _, count in common)
        return ", ".join(kinds + ([f"{others} others"] if others else []))


def find_files(
    folder: Path, suffixes: Collection[str], *, nested: bool = True, without: Path | None = None
) -> Found:
    """The files of a folder with the given suffixes, in natural order (2.png before 10.png).

    Hidden files are ignored. ``nested``: subfolders are read, too, except hidden folders and the
    folder ``without``. Each folder is read once; linked folders are read last, and only if they
    were not reached before.
    """
    found = Found([], Counter(), [])
    seen = {_identity(without)} if without and without.exists() else set()
    waiting = deque([folder])
    while waiting:
        parent = waiting.popleft()
        identity = _identity(parent)
        if identity and identity in seen and parent != folder:
            if parent.is_symlink():
                found.skipped["linked twice"] += 1
            continue
        seen.add(identity)
        try:
            names = sorted(os.listdir(parent))
        except OSError as error:
            found.errors.append(f"{parent} cannot be read: {error.strerror}")
            continue
        for name in names:
            path = parent / name
            if name[0] == ".":
                found.skipped["hidden"] += 1
            elif os.path.isdir(path):  # False if the path cannot be accessed
                if not nested:
                    found.skipped["folders"] += 1
                elif path.is_symlink():
                    waiting.append(path)
                else:
                    waiting.appendleft(path)
            elif path.suffix.lower() in suffixes:
                found.files.append(path)
            else:
                found.skipped[path.suffix.lower() or "without a suffix"] += 1
    found.files.sort(key=natural_key)
    return found


def find_images(folder: Path, *, nested: bool = False, without: Path | None = None) -> Found:
    """:func:`find_files` for images. Raises an ImageError if no image is found."""
    found = find_files(folder, suffixes(), nested=nested, without=without)
    if not found.files:
        skipped = found.skipped_kinds()
        reasons = [f"ignored: {skipped}"] * bool(skipped) + found.errors
        raise ImageError("; ".join([f"{folder} has no images", *reasons]))
    return found


def _identity(folder: Path) -> tuple[int, int] | None:
    """Identifies a folder independently of its path; None if it does not exist."""
    try:
        state = folder.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def natural_key(path: PurePath) -> list[list[Any]]:
    """A sort key for natural order. Text and numbers alternate, so that keys are comparable."""
    return [_natural_part(name) for name in path.parts]


@functools.lru_cache(maxsize=1024)  # many files share their folders
def _natural_part(name: str) -> list[Any]:
    return [int(part) if i % 2 else part for i, part in enumerate(_NUMBER.split(name))]


_NUMBER = re.compile(r"(\d+)")
