"""Pictures from files, and a model of timm to show them to."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# What is taken for a picture in a folder. One that is named can be of any kind that Pillow reads.
_KINDS = ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
SUFFIXES = tuple(f".{kind}" for kind in _KINDS)


class PictureError(ValueError):
    """A picture or a folder that cannot be used; the message says which, and why."""


def open_picture(path: Path) -> Any:
    """An RGB picture of Pillow, upright.

    What is transparent becomes white; 16 bits a pixel are reduced to 8.

    Raises:
        PictureError: no such file, or none that Pillow reads to its end.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist") from None
    except Exception as error:  # each decoder breaks in its own way on a broken file
        raise PictureError(f"{path} is no readable picture: {error}") from None
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        depth = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F" or depth.min() < 0 or depth.max() > 65535:
            raise PictureError(
                f"{path} is no picture of 8 or 16 bits: its values go to {depth.max():g}"
            )
        picture = Image.fromarray(np.rint(depth / 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def pixels_of(picture: Any, size: int) -> np.ndarray:
    """[H, W, 3] uint8 of a picture of Pillow, its longer side at most ``size`` (0: as it is)."""
    from PIL import Image

    if size:
        picture = picture.copy()
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.array(picture)


def find_pictures(folder: Path, *, nested: bool = False, without: Path | None = None) -> list[Path]:
    """The pictures of a folder by their suffixes: 2.png before 10.png, hidden ones left out.

    Args:
        folder: where to look.
        nested: in its folders, too, but in no hidden one.
        without: a folder in it that is left out.

    Raises:
        PictureError: there is none, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out in silence
        raise PictureError(f"{error.filename} cannot be read: {error.strerror}")

    found: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [
            name
            for name in folders
            if nested
            and not name.startswith(".")
            and (without is None or Path(here, name).resolve() != without.resolve())
        ]
        found += [
            Path(here, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not found:
        raise PictureError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[list[Any]]:
    """Numbers in names count as numbers; text and numbers take turns, so that lists compare."""
    return [
        [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
        for name in path.parts
    ]


class Network:
    """A frozen model, and pictures as it wants them.

    Args:
        name, weights: as for :func:`srt_ext.backbones.load_timm`.
        layers: as for :func:`srt_ext.backbones.describe`.

    Attributes:
        backbone: with the seconds that the model took.

    Raises:
        ModelError: the model cannot be had.
        ValueError: layers that it does not have.
    """

    def __init__(self, name: str, weights: Path | None, layers: int | list[int] | None) -> None:
        import torch

        from .backbones import Timed, describe, load_timm

        self.name = name
        self.model, config = load_timm(name, weights)
        self.backbone = Timed(describe(self.model, layers))
        self._mean, self._std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """pixels [H, W, 3] uint8 -> [1, 3, H, W] float32, normalised."""
        import torch

        return (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - self._mean) / self._std

    def digest(self) -> str:
        """Tells weights from others, wherever they came from."""
        hashed = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            hashed.update(tensor.numpy().tobytes())
        return hashed.hexdigest()[:16]
