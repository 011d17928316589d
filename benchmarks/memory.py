"""Peak memory of each way to a field, in a process of its own, above its memory before the call."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

PATCH, CHUNK = 16, 8
MOST = 2**33  # bytes of a stack of views; larger stacks are skipped

# grid (n x n tokens), channels, radius of the grid of views
POINT = (14, 384, 3)
WAYS = (
    "mean",
    "median",
    "moments",
    "RunningMean",
    "RunningMoments",
    "RunningMedian",
    "published mean",
    "published median",
)

PROCESS = """
import sys, torch, srt_ext
from benchmarks.memory import CHUNK, PATCH
from benchmarks.peers import published_ensemble, published_median

way, device = sys.argv[1:3]
n, channels, radius = map(int, sys.argv[3:])
grid, patch = (n, n), (PATCH, PATCH)

def peak():
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def tokens(views):  # as a model returns them
    return torch.randn(views, 1, n * n, channels, device=device)

def field(offsets):
    if way.startswith("published"):
        call = published_median if "median" in way else published_ensemble
        return call(tokens(len(offsets)), offsets, grid, patch, "nearest")
    if way.startswith("Running"):
        running = getattr(srt_ext, way)(grid, patch)
        for at in offsets.split(CHUNK):
            running.update(tokens(len(at)), at)
        return running._fields()
    if way == "moments":
        return srt_ext.ensemble_moments(tokens(len(offsets)), offsets, grid, patch)
    return srt_ext.ensemble(tokens(len(offsets)), offsets, grid, patch, reduce=way)

field(torch.zeros(1, 2))  # loads the libraries
if device != "cpu":
    torch.cuda.reset_peak_memory_stats()
else:
    with open("/proc/self/clear_refs", "w") as file:  # resets the peak
        file.write("5")
before = peak()
result = field(srt_ext.views.grid(radius).offsets)
print(peak() - before)
"""


def measure(device: str) -> list[dict[str, Any]]:
    """Peak bytes above the start, including tokens, against views, pixels and channels."""
    n, channels, radius = POINT
    points = [(way, n, channels, r) for way in WAYS for r in (1, 3, 7)]
    for way in ("mean", "RunningMean", "published mean"):
        points += [(way, size, channels, radius) for size in (7, 28, 37)]
        points += [(way, n, size, radius) for size in (96, 192, 768, 1536)]
    rows = []
    for way, n, channels, radius in points:
        views, output = (2 * radius + 1) ** 2, 4 * channels * (n * PATCH) ** 2
        row: dict[str, Any] = {"way": way, "views": views, "pixels": (n * PATCH) ** 2}
        row |= {"channels": channels, "output_bytes": output}
        if way == "published median" and views * output > MOST:
            rows.append({**row, "failed": f"skipped: a stack of {views * output} bytes"})
            continue
        command = [sys.executable, "-c", PROCESS, way, device, *map(str, (n, channels, radius))]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({**row, "bytes": int(result.stdout)})
        print(rows[-1], flush=True)
    return rows
