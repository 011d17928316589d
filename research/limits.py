"""``python -m research.limits``: the two numbers of the CUDA kernels, and what they predict.

Bytes that a call must move and operations that it must do, counted from the axis tables of each
shape, and the times that they imply on an H200. Beside them the work that the kernels of
csrc/srt/cuda really issue, counted by walking their tiles. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

import srt_ext
from srt_ext import reference

# H200: 4.3 TB/s copy, measured (benchmarks/NOTES.md); 132 processors of 4 schedulers at 1.755 GHz,
# 67 TFLOP/s of float32, data sheet.
COPY, FLOPS, ISSUES = 4.3e12, 67e12, 132 * 4 * 1.755e9
# Assumed: of the time, how much of it a kernel keeps the memory or the schedulers busy; and the
# microseconds in which a kernel starts and ends.
BUSY, LAUNCH = 0.8, 3


@dataclass(frozen=True)
class Code:
    """Instructions of a thread in the large tile of mean_kernel, read off the loops of its sm_90
    code, and how the tile is shared out."""

    tile: int
    round: int  # of 8 columns: what surrounds their loops
    fours: int  # of a column that a thread combines: 4 tokens, then pairs of them
    pair: int
    column: int  # that a thread filters
    turn: int  # of writing: a row in one of two passes
    line: int  # a row in a run of cells, with its two ends
    begin: int  # of the cells between them
    cell: float  # each of these
    combined: int  # rows that a thread combines
    cells: int  # that a thread filters


F32 = Code(420, 145, 87, 46, 81, 59, 42, 20, 12.5, combined=4, cells=8)
B16 = Code(420, 136, 120, 61, 82, 59, 74, 24, 20, combined=2, cells=4)
# Instructions of a warp for a row of 256 pixels in shift_kernel, what its block does once included,
# by offsets and bytes of a pixel; and the rows of a block.
SHIFT_ROW = {("whole", 4): 133, ("whole", 2): 122, ("between", 4): 196, ("between", 2): 200}
SHIFT_ROWS = 32
THREADS, COLUMNS, CELLS, SEGMENT, RESIDENT = 256, 8, 32, 64, 2 * 132
QUARTERS, LANES = 4, 8  # of a warp that combines; 4 rows of a warp that writes


@dataclass(frozen=True)
class Shape:
    name: str
    grid: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    stride: tuple[int, int] = (1, 1)


SHAPES = (
    Shape("224x224 P=16 C=384", (14, 14), (16, 16), 384),
    Shape("480x848 P=16 C=384", (30, 53), (16, 16), 384),
    Shape("518x518 P=14 C=1024", (37, 37), (14, 14), 1024),
    Shape("480x848 stride 4", (30, 53), (16, 16), 384, (4, 4)),
)
OF_ALL_VIEWS = (SHAPES[1], SHAPES[3], SHAPES[0])  # the others are counted for grid:3 alone


def reads(shape: Shape, axis: int, offsets: list[float], upsample: str) -> torch.Tensor:
    """[D, cells, tokens]: does the cell of the view with that offset read the token?"""
    tokens, patch, stride = shape.grid[axis], shape.patch[axis], shape.stride[axis]
    values, of_view = torch.tensor(offsets, dtype=torch.float64).unique(return_inverse=True)
    offsets = values.tolist()
    tables = torch.zeros(len(offsets), tokens * patch, tokens, dtype=torch.bool)
    for table, offset in zip(tables, offsets, strict=True):
        taps, seen, _ = reference._axis(offset, tokens, patch, upsample, "coverage")
        for token, weight in taps:
            table[torch.arange(tokens * patch), token] |= seen & (weight > 0)
    return tables.reshape(len(offsets), -1, stride, tokens).any(2)[of_view]


def runs(table: torch.Tensor, stride: int) -> list[tuple[int, int]]:
    """The runs of cells (first, last) that list_runs finds, for tables [D, cells, tokens]."""
    cells = table.shape[1]
    same = [False] + [
        stride == 1 and torch.equal(table[:, i], table[:, i - 1]) for i in range(1, cells)
    ]
    found, first = [], 0
    while first < cells:
        end = min(cells, first // SEGMENT * SEGMENT + SEGMENT)
        last = first
        while last + 1 < end and same[last + 1]:
            last += 1
        if last == first and first + 1 < end:
            last += 1
        found.append((first, last))
        first = last + 1
    return found


def blocks(table: torch.Tensor, ends: list[int], size: int) -> torch.Tensor:
    """[D, blocks] tokens that `size` ends of runs after each other span."""
    parts = [ends[i : i + size] for i in range(0, len(ends), size)]
    spans = []
    for part in parts:
        read = table[:, part].any(1).int()  # [D, tokens]
        first, last = read.argmax(1), read.shape[1] - 1 - read.flip(1).argmax(1)
        spans.append(torch.where(read.any(1), last - first + 1, 0))
    return torch.stack(spans, 1)


@dataclass(frozen=True)
class Tables:
    """The axis tables of a call of ensemble, by view: the views that share a dx are a group."""

    rows: torch.Tensor  # [V, cells, tokens], what each view reads
    columns: torch.Tensor  # [groups, cells, tokens]
    group: torch.Tensor  # [V], of each view

    @classmethod
    def of(cls, shape: Shape, offsets: torch.Tensor, upsample: str) -> Tables:
        dx, group = offsets[:, 1].unique(return_inverse=True)
        rows = reads(shape, 0, offsets[:, 0].tolist(), upsample)
        return cls(rows, reads(shape, 1, dx.tolist(), upsample), group)

    def by_group(self, of_views: torch.Tensor) -> torch.Tensor:
        """[V, ...] -> [groups, ...], sums."""
        sums = torch.zeros(len(self.columns), *of_views.shape[1:], dtype=of_views.dtype)
        return sums.index_add_(0, self.group, of_views)


def mean(shape: Shape, offsets: torch.Tensor, upsample: str, size: int) -> tuple[float, ...]:
    """Seconds: to write, to read and write, to do the operations; and to issue the instructions
    that combine, filter, write, and what surrounds them."""
    tables = Tables.of(shape, offsets, upsample)
    height, width = tables.rows.shape[1], tables.columns.shape[1]
    written = height * width * shape.channels * size
    read = len(offsets) * shape.grid[0] * shape.grid[1] * shape.channels * size
    # Rows of the views that share dx, summed for each token column; then a filter along the row.
    combine = shape.grid[1] * tables.rows.sum().item()
    filtered = height * tables.columns.sum().item()
    operations = 2 * (combine + filtered) * shape.channels
    return (
        written / COPY,
        (written + read) / COPY,
        operations / FLOPS,
        *issued(shape, tables, F32 if size == 4 else B16, ceil(shape.channels * size / 128)),
    )


def issued(shape: Shape, tables: Tables, code: Code, chunks: int) -> list[float]:
    """Seconds in which mean_kernel issues the parts of its work, summing at the ends of runs only.

    Any view breaks the runs of its axis for all of them.
    """
    runs_y = runs(tables.rows, shape.stride[0])
    runs_x = runs(tables.columns, shape.stride[1])
    ends_y, ends_x = ([i for run in r for i in run] for r in (runs_y, runs_x))
    tile_rows = QUARTERS * code.combined
    y_tiles, warps = ceil(len(ends_y) / tile_rows), THREADS / 32
    columns = blocks(tables.columns, ends_x, CELLS)  # [groups, tiles]
    tiles = columns.sum(0)
    # A group has its own list of inputs for each block of rows, filled up to pairs. The quarters of
    # a warp, which combines one column, take as long as the longest of theirs.
    pairs = (tables.by_group(blocks(tables.rows, ends_y, code.combined)) / 2).ceil()
    lists = pairs // 2 * code.fours + pairs % 2 * code.pair
    longest = sum(quarters.amax(1) for quarters in lists.split(QUARTERS, 1))  # [groups]
    combining = (columns.sum(1) * longest).sum().item() * chunks
    groups = blocks(tables.columns, ends_x, code.cells).sum().item()
    filtering = groups * code.column * warps / (CELLS / code.cells) * y_tiles * chunks
    rounds = (tiles / COLUMNS).ceil().sum().item() * code.round
    frame = (rounds + len(tiles) * code.tile) * warps * y_tiles * chunks
    # A warp takes 4 rows that follow each other at a time.
    heights = [
        part[-1][1] - part[0][0] + 1
        for part in (runs_y[i : i + tile_rows // 2] for i in range(0, len(runs_y), tile_rows // 2))
    ]
    turns = sum(ceil(h / (32 / LANES)) for h in heights)
    between = [max(0, last - first - 1) for first, last in runs_x]
    of_turn = len(tiles) * 2 * code.turn + len(runs_x) * code.line
    of_turn += sum(code.begin + n * code.cell for n in between if n)
    writing = turns * of_turn * chunks
    # The blocks that the processors hold at a time each take every 264th tile.
    share = y_tiles * len(tiles) * chunks / RESIDENT
    uneven = ceil(share) / share
    return [part * uneven / ISSUES for part in (combining, filtering, writing, frame)]


def mean_table(views: str, shapes: tuple[Shape, ...], upsamples: tuple[str, ...]) -> None:
    offsets = srt_ext.views.parse(views).offsets
    print(f"mean, {len(offsets)} views ({views}); microseconds\n")
    heads = ("shape", "dtype", "upsampling", "written", "moved", "operations")
    heads += ("combine", "filter", "write", "frame", "issued", "predicted")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for shape in shapes:
        for size, dtype in ((4, "float32"), (2, "bfloat16")):
            for upsample in upsamples:
                us = [1e6 * t for t in mean(shape, offsets, upsample, size)]
                total = sum(us[3:])
                us += [total, max(us[1], total) / BUSY]
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
