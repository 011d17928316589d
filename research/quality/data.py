"""The data sets, in their published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Picture(NamedTuple):
    """An image with ground truth, to train or test a head."""

    name: str
    pixels: np.ndarray  # [H, W, 3] uint8
    truth: np.ndarray  # [H', W']: classes int64, or depth float64 with NaN where unknown


def opened(path: Path, height: int, patch: int) -> np.ndarray:
    """[H, W, 3] uint8 of a file, resized to about ``height`` (0: unchanged), in whole patches."""
    from PIL import Image

    return resized(np.asarray(Image.open(path).convert("RGB")), height, patch)


def resized(pixels: np.ndarray, height: int, patch: int) -> np.ndarray:
    """pixels [H, W, 3] uint8 resized to whole patches, H about ``height`` (0: unchanged)."""
    from PIL import Image

    scale = height / pixels.shape[0] if height else 1.0
    size = [max(patch, patch * round(n * scale / patch)) for n in pixels.shape[1::-1]]
    if size == [*pixels.shape[1::-1]]:
        return pixels.copy()
    picture = Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return np.asarray(picture).copy()


def labels_of(path: Path) -> np.ndarray:
    """[H, W] int64: palette indices or grey values."""
    from PIL import Image

    picture = Image.open(path)
    return np.asarray(picture if picture.mode in ("P", "L") else picture.convert("L"), np.int64)


# ---- DAVIS --------------------------------------------------------------------------------------


def davis_sequences(folder: Path) -> list[str]:
    """Names in ImageSets/480p/val.txt (2016) or ImageSets/2017/val.txt; else all folders."""
    listed = [folder / "ImageSets" / year / "val.txt" for year in ("480p", "2017")]
    for path in listed:
        if path.is_file():
            # 2016 lists pairs of files, /JPEGImages/480p/NAME/00000.jpg /Annotations/...
            first = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            names = [Path(word).parent.name or word for word in first]
            return list(dict.fromkeys(names))
    return sorted(path.name for path in (folder / "JPEGImages/480p").iterdir())


def davis_frames(folder: Path, name: str, limit: int) -> list[tuple[Path, Path]]:
    """(frame, annotation) of the first, given frame and of ``limit`` scored ones (0: all).

    The last frame of a sequence is excluded, as in the benchmark.
    """
    frames = sorted((folder / "JPEGImages/480p" / name).glob("*.jpg"))[:-1]
    frames = frames[: limit + 1] if limit else frames
    annotations = folder / "Annotations/480p" / name
    return [(path, annotations / f"{path.stem}.png") for path in frames]


# ---- CamVid -------------------------------------------------------------------------------------


def camvid(folder: Path, part: str, limit: int, height: int, patch: int) -> list[Picture]:
    """``limit`` images of a part (0: all), evenly spread over its sorted list."""
    return [
        Picture(
            path.stem,
            opened(path, height, patch),
            labels_of(folder / f"{part}annot" / f"{path.stem}.png"),
        )
        for path in chosen([p for p in (folder / part).iterdir() if p.suffix != ".txt"], limit)
    ]


def chosen(paths: list[Path], limit: int) -> list[Path]:
    paths = sorted(paths)
    if not limit or limit >= len(paths):
        return paths
    return [paths[i] for i in np.linspace(0, len(paths) - 1, limit).round().astype(int)]


# ---- depth --------------------------------------------------------------------------------------


def motorcycle(height: int, patch: int) -> list[Picture]:
    """Six crops (2 x 3) of scikit-image's stereo_motorcycle, with the disparity in pixels."""
    from skimage.data import stereo_motorcycle

    left, _, disparity = stereo_motorcycle()
    truth: Any = np.where(np.isfinite(disparity), disparity, np.nan).astype(np.float64)
    side = 240
    found = []
    for y in (10, 250):
        for x in (10, 250, 490):
            place = (slice(y, y + side), slice(x, x + side))
            crop = resized(np.ascontiguousarray(left[place]), height, patch)
            found.append(Picture(f"{y}, {x}", crop, truth[place]))
    return found


def nyu(folder: Path, part: str, limit: int, height: int, patch: int) -> list[Picture]:
    """official_splits/PART/SCENE/rgb_*.jpg, and depth in metres of sync_depth_*.png (mm)."""
    from PIL import Image

    found = []
    for path in chosen(list((folder / "official_splits" / part).rglob("rgb_*.jpg")), limit):
        other = path.with_name(path.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
        depth = np.asarray(Image.open(other)).astype(np.float64) / 1000
        depth[depth == 0] = np.nan
        found.append(Picture(f"{path.parent.name}/{path.stem}", opened(path, height, patch), depth))
    return found
