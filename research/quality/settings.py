"""What is compared: each way to make a field of a frozen model's tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from srt_ext import views

IDENTITY = "grid:0"  # the untouched picture: no SRT


@dataclass(frozen=True)
class Setting:
    """One field of one layer. Its words are those of :class:`srt_ext.SRT`."""

    family: str  # labels (what a grid allows at best), plain, bilinear, published, ours, study
    views: str
    layer: int
    stride: int  # pixels
    reduce: str = "mean"
    upsample: str = "bilinear"
    border: str = "coverage"
    unit: bool = False  # tokens of each view brought to length 1 before they are aggregated
    centre: bool = False  # a cell is read in its middle, and is not the mean over it

    @property
    def forwards(self) -> int:
        return len(views.resolve(self.views).offsets)

    def row(self) -> dict[str, Any]:
        return asdict(self)


def settings(layers: list[int], patch: int, extent: str) -> list[Setting]:
    """All of them, for a model with square patches.

    Args:
        layers: of the model.
        patch: pixels. Strides are a patch, its half and its quarter, where these are whole.
        extent: ``quick`` has the families and a few views of ours; ``main`` adds designs, counts,
            radii, medians and the stride of a quarter patch; ``study`` what could be wrong at token
            scale.
    """
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
        # A field of a quarter patch costs the propagation 16 times as much: of the last layer only.
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
    """At token scale: how a cell is read, how views are upsampled, the border, lengths, radii."""
    found = [
        Setting("study", IDENTITY, layer, patch),  # the blur of the mean over a cell, alone
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
        # The views of a token averaged, and nothing of its neighbours: no blur at all.
        found.append(Setting("study", design, layer, patch, upsample="nearest", centre=True))
    found.append(Setting("study", "best:16:6", layer, patch // 2, unit=True))
    found.append(Setting("study", "best:16:6", layer, patch // 2, upsample="nearest"))
    return found
