"""Images from files and folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

# What counts as an image in a folder. A file that is named may be of any kind that Pillow reads.
_KINDS = ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
SUFFIXES = tuple(f".{kind}" for kind in _KINDS)


class ImageError(ValueError):
    """An image or a folder that cannot be used; the message says which, and why."""


def open_image(path: Path) -> Any:
    """An RGB image of Pillow, upright.

    Transparent pixels become white; 16 bits a channel are reduced to 8. Raises an ImageError if
    there is no such file, or none that Pillow reads to its end.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except Exception as error:  # decoders raise anything on a broken file
        raise ImageError(f"{path} is no readable picture: {error}") from None
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{path} is no picture of 8 or 16 bits: its values go to {values.max():g}"
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Any, size: int) -> np.ndarray:
    """[H, W, 3] uint8 of an image of Pillow, its longer side at most ``size`` (0: unchanged)."""
    from PIL import Image

    if size:
        image = image.copy()
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.array(image)


def find_images(folder: Path, *, nested: bool = False, without: Path | None = None) -> list[Path]:
    """The images of a folder by their suffixes, 2.png before 10.png; hidden files are skipped.

    ``nested``: in its folders, too, but in no hidden one, nor in ``without``. Raises an ImageError
    if there is none, or a folder cannot be read.
    """

    def fail(error: OSError) -> None:  # os.walk would skip the folder silently
        raise ImageError(f"{error.filename} cannot be read: {error.strerror}")

    found: list[Path] = []
    skipped = without and without.resolve()
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if nested and Path(parent, f).resolve() != skipped]
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ImageError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    return sorted(found, key=_natural_key)


def _natural_key(path: Path) -> list[list[Any]]:
    """Text and numbers alternate in each part, so that lists are comparable."""
    return [
        [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
        for name in path.parts
    ]
