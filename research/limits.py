"""``python -m research.limits``: predicted times of the CUDA kernels (benchmarks/NOTES.md).

Counts the bytes that a call must move and the instructions that the kernels of csrc/srt/cuda issue,
and prints the times that both imply on an H200. The instructions follow from the tables of the
kernels, which are rebuilt here (border ``coverage``), and from the lengths of the loops in their
code. Nothing is measured. The predictions of the mean exclude the time to launch kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

import srt_ext
from srt_ext import reference
from srt_ext.options import Upsample

# H200: 4.3 TB/s copy, measured (benchmarks/NOTES.md); 132 SMs at 1.755 GHz, each with 4 schedulers
# and one path to shared memory and L1.
COPY, CLOCK, PROCESSORS = 4.3e12, 1.755e9, 132
ISSUES = 4 * PROCESSORS * CLOCK
# Assumed: share of the time in which a kernel keeps the memory or the schedulers busy;
# microseconds to start and end a kernel.
BUSY, LAUNCH = 0.8, 3
# Instructions of a warp per row of 256 pixels in shift_kernel, including those that a block
# executes once, by kind of offsets and bytes per pixel; rows of a block.
SHIFT_ROW = {("whole", 4): 133, ("whole", 2): 122, ("between", 4): 196, ("between", 2): 200}
SHIFT_ROWS = 32

# The tile of mean_kernel: rows, strips, cells per strip; columns per round; warps; channels.
ROWS, STRIPS, CELLS, ROUND, WARPS, CHANNELS = 8, 4, 16, 44, 8, 32
RESIDENT = 2 * PROCESSORS


@dataclass(frozen=True)
class Code:
    """Instructions of a warp in mean_kernel (vector accesses), counted in its sm_90 code."""

    tile: int  # to locate a tile
    round: int  # to begin a round
    columns: int  # columns that a warp computes at once
    column: int  # these columns without their inputs
    inputs: tuple[int, ...]  # 0, 1, ... inputs, up to the number loaded at once
    cell: int  # per cell of a round
    step: int  # in addition, for a cell with taps
    tap: int  # per tap
    write: int  # per cell that is written
    # The alternative, per column: dense filter into the cells of a strip (64 multiply-adds, 5
    # loads, address computation).
    filter: int = 76

    def of_list(self, inputs: torch.Tensor) -> torch.Tensor:
        """Instructions for columns with these numbers of inputs."""
        most = len(self.inputs) - 1
        return (
            self.column
            + inputs // most * self.inputs[most]
            + torch.tensor(self.inputs)[inputs % most]
        )


F32 = Code(215, 70, 2, 52, (0, 50, 84, 84), 12, 17, 16, 13)
B16 = Code(215, 70, 4, 67, (0, 76, 116), 12, 17, 16, 18)
# Cycles in which the loads and stores of a warp occupy L1 or shared memory, 128 bytes each: per
# input and its weights; per sums of the columns computed at once; per tap and the sums that it
# reads; per cell that is written; per column of the dense filter.
INPUT, COLUMN, TAP, WRITE, FILTER = 4, 17, 5, 4, 8


@dataclass(frozen=True)
class Shape:
    name: str
    grid: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    stride: tuple[int, int] = (1, 1)

    def cells(self, axis: int) -> int:
        return self.grid[axis] * self.patch[axis] // self.stride[axis]

    def spans(self, axis: int, offset: float, cells: int, upsample: Upsample) -> torch.Tensor:
        """[blocks]: the span of tokens that a view reads in each block of ``cells`` cells."""
        size = cells * self.stride[axis]
        first = torch.arange(0, self.cells(axis) * self.stride[axis], size, dtype=torch.float64)
        ends = torch.stack([first, first + size - 1]) + 0.5 + offset
        q = ends / self.patch[axis] - (0.5 if upsample == "bilinear" else 0)
        q = q.clamp(0, self.grid[axis] - 1)
        last = q[1].ceil() if upsample == "bilinear" else q[1].floor()
        return (last - q[0].floor() + 1).long()


SHAPES = (
    Shape("224x224 P=16 C=384", (14, 14), (16, 16), 384),
    Shape("480x848 P=16 C=384", (30, 53), (16, 16), 384),
    Shape("518x518 P=14 C=1024", (37, 37), (14, 14), 1024),
    Shape("480x848 stride 4", (30, 53), (16, 16), 384, (4, 4)),
)
OF_ALL_VIEWS = (SHAPES[1], SHAPES[3], SHAPES[0])  # the other shapes only with grid:3


def walk(shape: Shape, offsets: list[float], upsample: Upsample) -> tuple[int, torch.Tensor, int]:
    """Cells per strip; taps of the steps along x [groups, cells]; columns of all strips."""
    tokens, patch, stride = shape.grid[1], shape.patch[1], shape.stride[1]
    pixels, interval = tokens * patch, min(patch, CELLS)
    x = torch.arange(pixels)
    position = x % interval - (interval - 1) / 2
    # [groups, pixels, tokens]: the weight of a token, and its change from pixel to pixel.
    weight = torch.zeros(len(offsets), pixels, tokens, dtype=torch.float64)
    slope = torch.zeros_like(weight)
    token = torch.full((len(offsets), pixels), -1)
    for group, offset in enumerate(offsets):
        taps, seen, _ = reference._axis(offset, tokens, patch, upsample, "coverage")
        token[group, seen] = taps[0][0][seen]
        q = (x + 0.5 + offset) / patch - 0.5
        inside = seen & (q >= 0) & (q < tokens - 1) & torch.tensor(upsample == "bilinear")
        for (read, of_read), sign in zip(taps, (-1, 1), strict=False):
            weight[group, x, read] += of_read * seen
            slope[group, x, read] += sign * inside / patch
    reads = weight.reshape(len(offsets), -1, stride, tokens).gt(0).any(2)
    cells = CELLS if stride > 1 else CELLS // interval * interval
    columns = sum(part.any(1).sum().item() for part in reads.split(cells, 1))
    if stride > 1:  # cells are summed independently
        return cells, reads.sum(2), int(columns)
    value = weight - position[:, None] * slope
    starts = x % interval == 0
    starts[1:] |= ((token[:, 1:] < 0) & (token[:, :-1] >= 0)).any(0)
    taps_anew = ((value != 0) | (slope != 0)).sum(2)
    kinks = (token[:, 1:] != token[:, :-1]) | (slope[:, 1:] != slope[:, :-1]).any(2)
    changed = (value[:, 1:] != value[:, :-1]) | (slope[:, 1:] != slope[:, :-1])
    steps = torch.zeros(len(offsets), pixels, dtype=torch.int64)
    steps[:, 1:] = (changed & kinks[..., None]).sum(2)
    return cells, torch.where(starts, taps_anew, steps), int(columns)


def mean(shape: Shape, offsets: torch.Tensor, upsample: Upsample, size: int) -> tuple[float, ...]:
    """Predicted seconds.

    In order: to write the output; to write the output and read the tokens; to issue the
    instructions of the sums along y, of the walk along x, of the stores, of everything else; for
    loads and stores in L1 and shared memory. For the dense filter along x: to issue its
    instructions; for all loads and stores.
    """
    code = F32 if size == 4 else B16
    dx, group = offsets[:, 1].unique(return_inverse=True)
    cells, steps, filtered = walk(shape, dx.tolist(), upsample)
    height, width = shape.cells(0), shape.cells(1)
    blocks, tiles = ceil(height / ROWS), ceil(width / (STRIPS * cells))
    chunks = ceil(shape.channels / CHANNELS)
    every = blocks * chunks  # tiles with the same cells along x
    # Along y: [groups, tiles] columns, [groups, blocks] inputs of each.
    part = STRIPS * cells
    columns = torch.stack([shape.spans(1, d, part, upsample) for d in dx.tolist()])
    inputs = torch.zeros(len(dx), blocks, dtype=torch.int64)
    for g, dy in zip(group.tolist(), offsets[:, 0].tolist(), strict=True):
        inputs[g] += shape.spans(0, dy, ROWS, upsample)
    per_warp = columns.sum(1) * chunks / code.columns
    vertical = (per_warp * code.of_list(inputs).sum(1)).sum().item()
    # Along x: a warp computes 4 of the 8 rows of a strip, so two warps process each strip. Groups
    # are assumed to be spread evenly over the rounds.
    of_tile = (columns.sum(0) / ROUND).ceil()
    taps = steps.sum().item()
    stepped = sum((part > 0).any(0).sum().item() for part in steps.chunk(int(of_tile.max()), 0))
    rounds = every * of_tile.sum().item() * WARPS
    horizontal = 2 * every * (taps * code.tap + stepped * code.step) + rounds * CELLS * code.cell
    dense = 2 * every * filtered * code.filter
    write = 2 * every * width * code.write
    frame = every * tiles * WARPS * code.tile + rounds * code.round
    loads = (per_warp * (COLUMN * blocks + INPUT * inputs.sum(1))).sum().item()
    loads += 2 * every * width * WRITE
    # Tiles in multiples of the resident blocks; the last wave leaves some SMs idle.
    share = every * tiles / RESIDENT
    uneven = ceil(share) / share
    written = height * width * shape.channels * size
    read = len(offsets) * shape.grid[0] * shape.grid[1] * shape.channels * size
    return (
        written / COPY,
        (written + read) / COPY,
        *(uneven * part / ISSUES for part in (vertical, horizontal, write, frame)),
        uneven * (loads + 2 * every * taps * TAP) / (PROCESSORS * CLOCK),
        uneven * dense / ISSUES,
        uneven * (loads + 2 * every * filtered * FILTER) / (PROCESSORS * CLOCK),
    )


def mean_table(views: str, shapes: tuple[Shape, ...], upsamples: tuple[Upsample, ...]) -> None:
    offsets = srt_ext.views.parse(views).offsets
    print(f"mean, {len(offsets)} views ({views}); microseconds\n")
    heads = ["shape", "dtype", "upsampling", "written", "moved", "along y", "along x", "write"]
    heads += ["frame", "issued", "loads", "predicted", "dense x", "dense predicted"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for shape in shapes:
        for size, dtype in ((4, "float32"), (2, "bfloat16")):
            for upsample in upsamples:
                us = [1e6 * t for t in mean(shape, offsets, upsample, size)]
                _, moved, y, x, write, frame, loads, dense, dense_loads = us
                issued, other = y + x + write + frame, y + dense + write + frame
                us = [*us[:6], issued, loads, max(moved, issued, loads) / BUSY]
                us += [dense, max(moved, other, dense_loads) / BUSY]
                cells = (shape.name, dtype, upsample, *(f"{t:.0f}" for t in us))
                print(f"| {' | '.join(cells)} |")
    print()


def shift_table() -> None:
    print("shift, bilinear; microseconds\n")
    heads = ("image", "views", "dtype", "offsets", "moved", "issued", "predicted", "copy")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for batch, height, width in ((1, 224, 224), (8, 224, 224), (1, 480, 848)):
        for views in (16, 49):
            for (offsets, size), row in SHIFT_ROW.items():
                planes = 3 * batch
                image = planes * height * width * size
                lines = views * planes * ceil(height / SHIFT_ROWS) * SHIFT_ROWS * ceil(width / 256)
                moved, issued = 1e6 * (views + 1) * image / COPY, 1e6 * lines * row / ISSUES
                predicted = LAUNCH + max(moved, issued) / BUSY
                us = (moved, issued, predicted, LAUNCH + 1e6 * 2 * views * image / COPY)
                dtype = "float32" if size == 4 else "bfloat16"
                cells = (f"{batch}x3x{height}x{width}", str(views), dtype, offsets)
                print(f"| {' | '.join((*cells, *(f'{t:.1f}' for t in us)))} |")


def main() -> None:
    mean_table("grid:3", SHAPES, ("bilinear", "nearest"))
    for views in ("best:4", "best:16", "grid:6:2"):
        mean_table(views, OF_ALL_VIEWS, ("bilinear",))
    shift_table()


if __name__ == "__main__":
    main()
