"""Types of the options shared by the functions, the streams and :class:`srt_ext.SRT`.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Reduce: TypeAlias = Literal["mean", "median"]
Upsample: TypeAlias = Literal["nearest", "bilinear"]
Border: TypeAlias = Literal["coverage", "zeros", "clamp", "circular"]
Padding: TypeAlias = Literal["zeros", "border", "reflect", "circular"]
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]
Anchor: TypeAlias = Literal["phase", "full"]
Quality: TypeAlias = Literal["fast", "balanced", "outlines"]

Pair: TypeAlias = Sequence[int]  # (y, x)
Stride: TypeAlias = int | Pair  # one integer applies to both axes

# The allowed values of each option, by argument name.
OPTIONS = {
    "reduce": Reduce,
    "upsample": Upsample,
    "border": Border,
    "padding": Padding,
    "interpolation": Interpolation,
    "anchor": Anchor,
    "quality": Quality,
}
