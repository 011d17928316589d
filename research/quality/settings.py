"""The compared settings: each is a way to compute a field from the tokens of a frozen model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from srt_ext import views
from srt_ext.views import Views

if TYPE_CHECKING:
    import torch

IDENTITY = "grid:0"  # the unshifted image: no SRT
FLIP = "+flip"


class Shown(NamedTuple):
    """How the model sees an image. Settings with the same values share forward passes."""

    tokens: str
    scale: float
    block: int  # pixels; sides are padded to multiples: whole cells and whole enlarged patches


@dataclass(frozen=True)
class Setting:
    """A field of one layer. Options have the names and values of :class:`srt_ext.SRT`.

    Families: labels (ground truth, the best score on a grid), plain, bilinear, published, ours (SRT
    at scale 1), study; enlarged (without SRT), both (enlarged, SRT), flips, scales (mean of two
    scales), overlap, windows.
    """

    family: str
    views: str  # in pixels of the enlarged image; ``+flip`` adds the mirror image of each view
    layer: int
    stride: int  # pixels
    reduce: str = "mean"
    upsample: str = "bilinear"
    border: str = "coverage"
    unit: bool = False  # normalise tokens to length 1 before aggregation
    centre: bool = False  # read a cell at its centre instead of its mean
    scale: float = 1.0
    second: float = 0.0  # another scale; the field is the mean of both fields. 0: none
    tokens: str = "model"  # or overlap (stride of half a patch), windows (of the trained size)

    @property
    def scales(self) -> list[float]:
        return [self.scale, self.second] if self.second else [self.scale]

    @property
    def forwards(self) -> int:
        return len(self.scales) * len(self.design.offsets)

    @property
    def design(self) -> Views:
        return views.parse(self.views)

    def shown(self, patch: int) -> list[Shown]:
        """One value per scale."""
        blocks = (math.lcm(patch, self.step(scale)) / scale for scale in self.scales)
        return [
            Shown(self.tokens, scale, int(block))
            for scale, block in zip(self.scales, blocks, strict=True)
        ]

    def step(self, scale: float) -> int:
        """The stride in enlarged pixels."""
        if not (self.stride * scale).is_integer():
            raise ValueError(f"stride * scale must be whole; got {self.stride} * {scale}")
        return int(self.stride * scale)

    def row(self) -> dict[str, Any]:
        """The attributes that differ from their defaults, for the JSON."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def stored(self, field: torch.Tensor) -> torch.Tensor:
        """The field [C, h, w] for the tasks; :mod:`research.pca` overrides this to compress it."""
        return field


def settings(layers: list[int], patch: int, extent: str) -> list[Setting]:
    """All settings of an extent, for a model with square patches.

    Args:
        layers: of the model.
        patch: pixels. Strides are a patch, its half and its quarter, where these are whole.
        extent: ``quick`` has the families and a few views of SRT; ``main`` adds designs, counts,
            radii, medians and the stride of a quarter patch; ``study`` adds variants at token
            scale; ``rivals`` has all ways to finer tokens, last layer only; ``candidates`` has the
            settings among which presets are chosen.
    """
    if extent == "candidates":
        return candidates(layers[-1], patch)
    if extent == "rivals":
        return rivals(layers[-1], patch)
    half = patch // 2
    found = [Setting("labels", IDENTITY, layers[-1], stride) for stride in (patch, half)]
    for layer in layers:
        found += [
            Setting("plain", IDENTITY, layer, patch, upsample="nearest"),
            Setting("bilinear", IDENTITY, layer, half),
            Setting("published", "paper:3", layer, patch, upsample="nearest", border="zeros"),
            Setting("published", "paper:3", layer, half, upsample="nearest", border="zeros"),
            Setting("ours", "best:16:6", layer, patch),
            *(Setting("ours", f"best:{n}:6", layer, half) for n in (4, 9, 16)),
            Setting("ours", "best:16:3", layer, half),
        ]
        if extent == "quick":
            continue
        for design in (
            *(f"best:{n}:3" for n in (4, 9)),
            *(f"best:{n}:{radius}" for radius in (8, 12) for n in (4, 9, 16)),
            "grid:3",
            "grid:6:4",
            "grid:6:2",
        ):
            found.append(Setting("ours", design, layer, half))
        for design in ("best:9:6", "best:16:6"):
            found.append(Setting("ours", design, layer, half, "median"))
        found.append(
            Setting("published", "paper:3", layer, half, "median", "nearest", border="zeros")
        )
        for design in ("best:16:3", "best:16:8"):
            found.append(Setting("ours", design, layer, patch))
        if extent == "study":
            found += study(layer, patch)
    if extent != "quick" and patch % 4 == 0:
        # Propagation takes 16 times as long at a quarter patch: last layer only.
        quarter, layer = patch // 4, layers[-1]
        found += [
            Setting("bilinear", IDENTITY, layer, quarter),
            Setting("published", "paper:3", layer, quarter, upsample="nearest", border="zeros"),
            Setting("ours", "best:9:6", layer, quarter),
            Setting("ours", "best:16:6", layer, quarter),
            Setting("labels", IDENTITY, layer, quarter),
        ]
    return found


def study(layer: int, patch: int) -> list[Setting]:
    """Variants at token scale: cell reading, upsampling, border, token length, radius."""
    found = [
        Setting("study", IDENTITY, layer, patch),  # only the blur of the mean over a cell
        Setting("study", "paper:3", layer, patch, upsample="nearest"),
        Setting("study", "paper:3", layer, patch, upsample="nearest", unit=True),
        Setting("study", "grid:3", layer, patch, upsample="nearest"),
        Setting("study", "grid:3", layer, patch),
        Setting("study", "grid:3", layer, patch, centre=True),
    ]
    for radius in (1, 3, 6, 8):
        count = min(16, (2 * radius + 1) ** 2)
        design = f"best:{count}:{radius}"
        found.append(Setting("study", design, layer, patch, upsample="nearest"))
        found.append(Setting("study", design, layer, patch, centre=True))
        # Averages the views of a token without its neighbours: no blur.
        found.append(Setting("study", design, layer, patch, upsample="nearest", centre=True))
    found.append(Setting("study", "best:16:6", layer, patch // 2, unit=True))
    found.append(Setting("study", "best:16:6", layer, patch // 2, upsample="nearest"))
    return found


def rivals(layer: int, patch: int) -> list[Setting]:
    """All ways to finer tokens, with and without SRT. Offsets are up to 6 enlarged pixels."""
    half = patch // 2
    found = [
        Setting("plain", IDENTITY, layer, patch, upsample="nearest"),
        Setting("bilinear", IDENTITY, layer, half),
        Setting("published", "paper:3", layer, half, upsample="nearest", border="zeros"),
        *(Setting("ours", f"best:{n}:6", layer, half) for n in (2, 4, 8, 9, 16)),
        *(enlarged(scale, layer, half, patch) for scale in (1.25, 1.5, 2.0, 3.0)),
        Setting("overlap", IDENTITY, layer, half, "mean", "nearest", tokens="overlap"),
        Setting("overlap", "best:2:6", layer, half, tokens="overlap"),
    ]
    for scale, counts in ((1.25, (2, 4, 6, 9)), (1.5, (2, 3, 4, 5, 9)), (2.0, (2, 4, 5, 9))):
        found += [Setting("both", f"best:{n}:6", layer, half, scale=scale) for n in counts]
    for scale, designs in (
        (1.0, (IDENTITY, "best:2:6", "best:8:6")),
        (1.5, (IDENTITY, "best:2:6")),
    ):
        found += [Setting("flips", words + FLIP, layer, half, scale=scale) for words in designs]
    for scale in (1.5, 2.0):
        for words in (IDENTITY, "best:2:6"):
            found.append(Setting("scales", words, layer, half, second=scale))
    for scale, designs in (
        (1.0, (IDENTITY, "best:4:6")),
        (1.5, (IDENTITY, "best:2:6", "best:4:6")),
        (2.0, (IDENTITY, "best:2:6")),
    ):
        for words in designs:
            found.append(Setting("windows", words, layer, half, tokens="windows", scale=scale))
    for stride in (patch, patch // 4):
        found += [enlarged(scale, layer, stride, patch) for scale in (1.5, 2.0)]
        for scale in (1.5, 2.0):
            found += [Setting("both", f"best:{n}:6", layer, stride, scale=scale) for n in (2, 4)]
        found.append(Setting("ours", "best:4:6", layer, stride))
        found.append(Setting("overlap", IDENTITY, layer, stride, tokens="overlap"))
    return found + blur(layer, half)


def candidates(layer: int, patch: int) -> list[Setting]:
    """Settings that cost up to about 16 forward passes, at half a patch."""
    half = patch // 2
    found = [
        Setting("plain", IDENTITY, layer, patch, upsample="nearest"),
        Setting("bilinear", IDENTITY, layer, half),
        *(Setting("ours", f"best:{n}:6", layer, half) for n in (2, 4, 9, 16)),
        *(enlarged(scale, layer, half, patch) for scale in (1.25, 1.5, 2.0)),
        Setting("overlap", IDENTITY, layer, half, "mean", "nearest", tokens="overlap"),
    ]
    for scale, counts in ((1.25, (2, 4, 6)), (1.5, (2, 3, 4)), (2.0, (2, 4))):
        found += [Setting("both", f"best:{n}:6", layer, half, scale=scale) for n in counts]
    for words in (IDENTITY, "best:2:6"):
        found.append(Setting("flips", words + FLIP, layer, half))
        found += [Setting("scales", words, layer, half, second=s) for s in (1.5, 2.0)]
    for words in (IDENTITY, "best:4:6"):
        for scale in (1.0, 1.5):
            found.append(Setting("windows", words, layer, half, tokens="windows", scale=scale))
    return found


def enlarged(scale: float, layer: int, stride: int, patch: int) -> Setting:
    """An enlarged image without SRT. Nearest upsampling if each cell is one token."""
    upsample = "nearest" if stride * scale == patch else "bilinear"
    return Setting("enlarged", IDENTITY, layer, stride, upsample=upsample, scale=scale)


def blur(layer: int, stride: int) -> list[Setting]:
    """Variants that show the blur of the mean over a cell of bilinear tokens at each scale."""
    found = [Setting("study", IDENTITY, layer, stride, scale=2.0)]
    for scale in (1.0, 1.5, 2.0):
        for words in (IDENTITY, "best:2:6", "best:4:6"):
            found.append(Setting("study", words, layer, stride, centre=True, scale=scale))
    for words in ("best:2:6", "best:4:6", "best:2:3", "best:4:3"):
        found.append(Setting("study", words, layer, stride, upsample="nearest", scale=2.0))
    return [*found, Setting("study", "best:4:3", layer, stride, scale=2.0)]
