"""``srt-ext features --dry-run``: what a run would do, from a few pictures that are timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from statistics import median

from . import common

TIMED = 4  # pictures, after the first, which is slower


def print_plan(
    pictures: int, exact: bool, done: int, settings: dict[str, str], sizes: Iterator[int | None]
) -> None:
    """Prints the number of pictures, the settings, and the bytes and seconds to expect.

    Args:
        pictures: of the source, ``done`` of them already.
        exact: ``pictures`` is not an estimate.
        settings: as in the metadata of the output.
        sizes: extracts a picture at each step and yields the bytes of its features, or None if it
            failed.
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
        f"{about}{pictures} pictures, {done} of them done",
        ", ".join(f"{name} {value}" for name, value in settings.items()),
    )
    if not timed:
        raise common.fatal("none of the pictures that were tried could be read")
    seconds = median(second for second, _ in timed[1:] or timed)
    mean = sum(size for _, size in timed) / len(timed)
    left = max(0, pictures - done)
    common.echo(
        f"about {_bytes(mean)} a picture, {_bytes(mean * pictures)} in all",
        f"about {seconds:.2g} s a picture in one process on this machine: "
        f"{timedelta(seconds=round(seconds * left))} for the {left} that are left",
        f"from {len(timed)} pictures; nothing was written",
    )


def _bytes(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
