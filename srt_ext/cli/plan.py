"""``srt-ext features --dry-run``: estimates a run from a few timed images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from statistics import median

from . import common

TIMED = 4  # images, after the first one, which is slower


def print_plan(
    images: int, exact: bool, done: int, settings: dict[str, str], sizes: Iterator[int | None]
) -> None:
    """Prints the number of images, the settings, and the expected bytes and seconds.

    Args:
        images: number of images in the source.
        exact: ``images`` is not an estimate.
        done: number of finished images.
        settings: as in the metadata of the output.
        sizes: an iterator that extracts one image per step and yields the bytes of its features, or
            None if it failed.
    """
    timed = []
    start = time.perf_counter()
    for size in sizes:
        now = time.perf_counter()
        if size is not None:
            timed.append((now - start, size))
        start = now
    about = "" if exact else "about "
    common.echo(
        f"images: {about}{images}, done: {done}",
        ", ".join(f"{name} {value}" for name, value in settings.items()),
    )
    if not timed:
        raise common.fatal("none of the tested images could be read")
    seconds = median(second for second, _ in timed[1:] or timed)
    mean = sum(size for _, size in timed) / len(timed)
    left = max(0, images - done)
    common.echo(
        f"about {_bytes(mean)} per image, {_bytes(mean * images)} in total",
        f"about {seconds:.2g} s per image in one process on this machine: "
        f"{timedelta(seconds=round(seconds * left))} for the {left} remaining images",
        f"measured in {len(timed)} runs; nothing was written",
    )


def _bytes(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
