"""``python -m research.extraction``: ``srt-ext features --engine ray`` against one process.

Generates small images, extracts them with both engines, and prints images per second and the peak
memory of all processes. With ``--kill``, first a worker and then the driver is killed during a run,
and the run is resumed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from skimage import data as photographs

SIZE = 96  # pixels of a side
OPTIONS = ["--model=small", "--stride=8", "--dtype=float16"]
RAY = ["--engine=ray", "--actors=2", "--rows-per-file=100"]


def make_pictures(folder: Path, count: int) -> None:
    """Write ``count`` crops of a photograph."""
    photo, random = photographs.astronaut(), np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        y, x = random.integers(photo.shape[0] - SIZE, size=2)
        Image.fromarray(photo[y : y + SIZE, x : x + SIZE]).save(folder / f"{i:06}.jpg", quality=90)


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "srt_ext", "features", str(source), "-o", str(out)]
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *OPTIONS, *options], **output)


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Id and command of a process and of all its descendants."""
    children: dict[int, list[int]] = {}
    names = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, name = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except OSError:  # the process has ended
            continue
        children.setdefault(int(state.rpartition(")")[2].split()[1]), []).append(int(folder.name))
        names[int(folder.name)] = name
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        yield pid, names.get(pid, "")
        waiting += children.get(pid, [])


def memory(pid: int) -> int:
    """Proportional set size of a process and its descendants (shared pages count once), bytes."""
    total = 0
    for process, _ in descendants(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def run(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Seconds, and peak memory of all processes in MB."""
    began = time.perf_counter()
    process = start(source, out, *options)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(5)  # reading it often would slow the processes down

    watcher = threading.Thread(target=watch)
    watcher.start()
    text, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(text)
    return {"s": time.perf_counter() - began, "peak_mb": peak / 1e6}


def committed(out: Path) -> int:
    return sum(".pending" not in path.name for path in out.glob("checkpoint/*"))


def kill_in_the_middle(source: Path, out: Path, files: int, *, worker: bool) -> None:
    """Kill a worker (a process with the model) or the driver once ``files`` files are committed."""
    process = start(source, out, *RAY)
    while committed(out) < files:
        if process.poll() is not None:
            raise SystemExit(process.communicate()[0])
        time.sleep(0.05)
    actors = [pid for pid, name in descendants(process.pid) if name.startswith("ray::MapWorker")]
    os.kill(actors[0] if worker else process.pid, signal.SIGKILL)
    process.communicate()


def check(out: Path, count: int) -> None:
    from srt_ext import data

    keys = data.open(out).keys.to_pylist()
    if sorted(keys) != [f"{i:06}.jpg" for i in range(count)]:
        raise SystemExit(
            f"expected {count} rows with unique keys, got {len(keys)} rows, {len(set(keys))} keys"
        )


def main(
    counts: Annotated[list[int], typer.Argument(help="Numbers of images.")],
    kill: Annotated[bool, typer.Option("--kill", help="Kill a worker and the driver.")] = False,
) -> None:
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "pictures"), Path(folder, "out")
            make_pictures(source, count)
            if kill:
                kill_in_the_middle(source, out, max(1, count // 400), worker=True)
                check(out, count)
                print(f"{count} images, a worker killed: every image written once")
                again = Path(folder, "again")
                kill_in_the_middle(source, again, max(1, count // 200), worker=False)
                before = committed(again)
                run(source, again, *RAY)
                check(again, count)
                print(
                    f"{count} images, driver killed after {before} files: every image written once"
                )
                continue
            for name, options in {"one process": [], "ray, 2 actors": RAY}.items():
                found = run(source, Path(folder, name), *options)
                rate = count / found["s"]
                print(
                    f"{count} images, {name}: {found['s']:.1f} s, {rate:.1f} images/s, "
                    f"peak {found['peak_mb']:.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
