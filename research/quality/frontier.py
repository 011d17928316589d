"""Quality against cost: the frontier, and the choice of the presets."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from research.quality.settings import Setting

Row = dict[str, Any]
Column = tuple[str, str]  # a task and its score

COLUMNS: tuple[Column, ...] = (
    ("davis", "J"),
    ("davis", "F"),
    ("camvid", "miou"),
    ("motorcycle", "rmse"),
    ("nyu", "rmse"),
    ("discovery", "IoU"),
    ("retrieval", "mAP"),
)
ERRORS = ("rmse",)  # lower is better
# Budget in plain forward passes at every image size, and the tasks that count (none: all).
PRESETS: dict[str, tuple[float, tuple[str, ...]]] = {
    "fast": (4, ()),
    "balanced": (16, ()),
    "outlines": (16, ("davis", "discovery")),
}


@dataclass
class Point:
    """A setting, its cost and its scores."""

    setting: Setting
    cost: list[float]  # plain forward passes, for each image size
    scores: dict[Column, float]
    gains: dict[Column, float] = field(default_factory=dict)  # shares of the best gain

    @property
    def tasks(self) -> dict[str, float]:
        """The mean gain of each task."""
        names = dict.fromkeys(task for task, _ in self.gains)
        return {
            name: float(np.mean([v for (task, _), v in self.gains.items() if task == name]))
            for name in names
        }

    @property
    def gain(self) -> float:
        """The mean gain over the tasks."""
        return self.gain_on(())

    def gain_on(self, tasks: Collection[str]) -> float:
        """The mean gain over some tasks; none: all."""
        return float(np.mean([v for name, v in self.tasks.items() if not tasks or name in tasks]))

    @property
    def in_library(self) -> bool:
        """Whether :class:`srt_ext.SRT` can compute it."""
        s = self.setting
        known = s.family in ("bilinear", "ours", "enlarged", "both", "flips")
        return known and s.upsample == "bilinear"


def compared(setting: Setting) -> bool:
    """Whether a setting is compared: only the default designs and radii are."""
    usual = re.fullmatch(r"grid:0|paper:3|best:[0-9]+:6", setting.views.removesuffix("+flip"))
    default = usual is not None and setting.reduce == "mean"
    return default and setting.family not in ("labels", "study")


def share_of_best(points: Sequence[Point], base: Point) -> None:
    """Set the gains: the improvement over ``base`` / the largest improvement, for each column."""
    for column in base.scores:
        sign = -1 if column[1] in ERRORS else 1
        above = [sign * (p.scores[column] - base.scores[column]) for p in points]
        for point, value in zip(points, above, strict=True):
            point.gains[column] = value / max(above) if max(above) > 0 else 0.0


def frontier(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """For each point, whether no other is as cheap and as good, and cheaper or better."""
    return [
        not any(
            (c <= cost and v > value) or (c < cost and v >= value)
            for c, v in zip(costs, values, strict=True)
        )
        for cost, value in zip(costs, values, strict=True)
    ]


def preset(points: Sequence[Point], budget: float, tasks: Collection[str] = ()) -> Point | None:
    """The library setting with the best mean gain on some tasks (none: all) within a budget.

    The budget is in plain forward passes. Settings that are below plain tokens on any column of
    these tasks are excluded.
    """
    chosen = [
        p
        for p in points
        if p.in_library
        and max(p.cost) <= budget
        and min(v for (task, _), v in p.gains.items() if not tasks or task in tasks) >= 0
    ]
    return max(chosen, key=lambda p: p.gain_on(tasks), default=None)
