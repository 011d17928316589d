"""The pure-JAX formulations that srt_ext.jax is compared with.

A mean reads float32 maps [V, B, h, w, C] and returns sums over the views, [B, H', W', C]. The axis
tables are constants of the program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.peers import Pair, _axis_matrix

Program = Callable[..., jax.Array]


class Tables:
    """The axis tables of all views, bilinear with border="coverage"; float32."""

    def __init__(self, offsets: np.ndarray, grid: Pair, patch: int, stride: int) -> None:
        axes = []
        for axis, tokens in enumerate(grid):
            entries = [
                _axis_matrix(float(d), tokens, patch, stride, "bilinear", "coverage")
                for d in offsets[:, axis]
            ]
            axes += map(np.stack, zip(*entries, strict=True))
        rows, count_y, columns, count_x = (np.asarray(table, np.float32) for table in axes)
        self.offsets, self.patch, self.stride = offsets, patch, stride
        self.rows, self.columns = rows, columns  # [V, H', h], [V, W', w]
        self.counts = np.einsum("vy,vx->vyx", count_y, count_x)
        # Views that share dx, and their table along x.
        self.sharing = [np.flatnonzero(offsets[:, 1] == dx) for dx in np.unique(offsets[:, 1])]
        self.columns_of_dx = columns[[views[0] for views in self.sharing]]  # [D, W', w]


def _taps(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[V, cells, tokens] -> the index and weight of the tokens that are read, [V, cells, K]."""
    most = int((tables != 0).sum(2).max())
    index = np.argsort(tables == 0, axis=2, kind="stable")[..., :most]
    return index.astype(np.int32), np.take_along_axis(tables, index, 2)


def _gather(x: jax.Array, index: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """x [..., tokens, ...], index and weight [cells, K] -> [..., cells, ...]."""
    along = (-1,) + (1,) * (x.ndim - axis - 1)
    before = (slice(None),) * axis
    return sum(
        x.at[(*before, index[:, k])].get(mode="promise_in_bounds") * weight[:, k].reshape(along)
        for k in range(index.shape[1])
    )


def _block(height: int) -> int:
    """Rows per block of the formulations that process blocks of rows."""
    return max(n for n in range(1, 65) if height % n == 0)


def _joined(blocks: jax.Array) -> jax.Array:
    """Blocks of rows [n, B, R, W', C] -> [B, n * R, W', C]."""
    return jnp.concatenate(blocks, 1)


def _combine(maps: jax.Array, rows: np.ndarray, tables: Tables) -> list[jax.Array]:
    """The product along y, summed over the views that share dx: D arrays [B, R, w, C]."""
    equation = "vyi,vbijc->byjc"
    return [jnp.einsum(equation, rows[views], maps[views]) for views in tables.sharing]


def einsum(maps: jax.Array, tables: Tables) -> jax.Array:
    """The separable formula as dense products: along y, sum of views that share dx, along x."""
    combined = jnp.stack(_combine(maps, tables.rows, tables), 2)
    return jnp.einsum("dxj,bydjc->byxc", tables.columns_of_dx, combined)


def einsum_in_tiles(maps: jax.Array, tables: Tables, side: int = 4) -> jax.Array:
    """The same in tiles, whose products along x contain only tokens near ``side`` patches."""
    width, height = tables.columns.shape[1], tables.rows.shape[1]
    step = side * tables.patch // tables.stride
    block = _block(height)

    def rows_of(rows: jax.Array) -> jax.Array:  # [V, block, h] -> [B, block, W', C]
        combined = jnp.stack(_combine(maps, rows, tables), 2)
        tiles = []
        for x in range(0, width, step):
            part = tables.columns_of_dx[:, x : x + step]
            read = np.flatnonzero(part.any((0, 1)))
            near = slice(read[0], read[-1] + 1)
            tiles.append(jnp.einsum("dxj,bydjc->byxc", part[..., near], combined[:, :, :, near]))
        return jnp.concatenate(tiles, 2)

    views, _, h = tables.rows.shape
    return _joined(lax.map(rows_of, tables.rows.reshape(views, -1, block, h).swapaxes(0, 1)))


def gather(maps: jax.Array, tables: Tables) -> jax.Array:
    """Gathers rows, then columns of each view; a scan over the views adds the results."""

    def add(total: jax.Array, view: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        tokens, (y, x) = view[0], (view[1:3], view[3:5])
        return total + _gather(_gather(tokens, *y, axis=1), *x, axis=2), None

    return _scan(add, (maps, *_taps(tables.rows), *_taps(tables.columns)), maps, tables)


def gather_columns(maps: jax.Array, tables: Tables) -> jax.Array:
    """Products along y as in ``einsum``; a scan over the distinct dx gathers the columns."""

    def add(total: jax.Array, views: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _gather(*views, axis=2), None

    combined = jnp.stack(_combine(maps, tables.rows, tables))
    return _scan(add, (combined, *_taps(tables.columns_of_dx)), maps, tables)


def scale_and_translate(maps: jax.Array, tables: Tables) -> jax.Array:
    """``jax.image.scale_and_translate`` to pixels, then sums over cells; a scan over the views."""
    patch, stride = float(tables.patch), tables.stride
    batch, h, w, channels = maps.shape[1:]
    size = (batch, h * tables.patch, w * tables.patch, channels)

    def add(total: jax.Array, view: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        scale, shift = jnp.full(2, patch), -view[1]
        warp = partial(jax.image.scale_and_translate, method="linear", antialias=False)
        return total + warp(view[0], size, (1, 2), scale, shift), None

    pixels = lax.scan(add, jnp.zeros(size), (maps, jnp.asarray(tables.offsets)))[0]
    if stride == 1:
        return pixels
    return pixels.reshape(batch, size[1] // stride, stride, -1, stride, channels).sum((2, 4))


def _scan(add: Program, views: tuple[jax.Array, ...], maps: jax.Array, tables: Tables) -> jax.Array:
    size = (maps.shape[1], tables.rows.shape[1], tables.columns.shape[1], maps.shape[4])
    return lax.scan(add, jnp.zeros(size), views)[0]


def mean(sums: Program, tables: Tables, tokens: jax.Array) -> jax.Array:
    """tokens [V, B, N, C] -> [B, H', W', C] in their dtype, by one of the functions above."""
    grid = tables.rows.shape[2], tables.columns.shape[2]
    maps = tokens.astype(jnp.float32).reshape(*tokens.shape[:2], *grid, tokens.shape[3])
    count = tables.counts.sum(0)[..., None]
    return (sums(maps, tables) / np.where(count > 0, count, 1)).astype(tokens.dtype)


MEANS = (einsum, einsum_in_tiles, gather, gather_columns, scale_and_translate)


def sort(values: list[jax.Array]) -> jax.Array:
    """The values in order, [V, ...]."""
    return jnp.sort(jnp.stack(values), axis=0)


def min_max_network(values: list[jax.Array]) -> list[jax.Array]:
    """The values in order by Batcher's odd-even merge sort, which XLA fuses into one loop."""
    values, n, run = list(values), len(values), 1
    while run < n:
        step = run
        while step > 0:
            for first in range(step % run, n - step, 2 * step):
                for i in range(first, min(first + step, n - step)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        a, b = values[i], values[i + step]
                        values[i], values[i + step] = jnp.minimum(a, b), jnp.maximum(a, b)
            step //= 2
        run *= 2
    return values


def median(order: Program, tables: Tables, tokens: jax.Array) -> jax.Array:
    """The lower median of the views that cover a cell, in blocks of rows: memory is bounded."""
    views, height, h = tables.rows.shape
    maps = tokens.reshape(*tokens.shape[:2], h, -1, tokens.shape[3])
    block = _block(height)
    columns = list(zip(*_taps(tables.columns), strict=True))

    def rows_of(part: tuple[jax.Array, ...]) -> jax.Array:
        index, weight, counts = part  # [V, block, K], [V, block, K], [V, block, W']
        values = []
        for v in range(views):
            cells = _gather(_gather(maps[v], index[v], weight[v], 1), *columns[v], 2)
            count = counts[v][..., None]
            values.append(jnp.where(count > 0, cells / jnp.where(count > 0, count, 1), jnp.inf))
        middle = ((counts > 0).sum(0) - 1)[..., None] // 2
        ordered = order(values)
        return sum(jnp.where(middle == i, ordered[i], 0) for i in range((views + 1) // 2))

    parts = (*_taps(tables.rows), tables.counts)
    parts = tuple(x.reshape(views, -1, block, x.shape[2]).swapaxes(0, 1) for x in parts)
    return _joined(lax.map(rows_of, parts))


MEDIANS = (min_max_network, sort)


def dynamic_slices(image: jax.Array, offsets: np.ndarray) -> jax.Array:
    """image [B, C, H, W], whole-pixel offsets -> [V, B, C, H, W]: pads once, then slices."""
    margin = int(np.abs(offsets).max())
    pads = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    padded = jnp.pad(image, pads, mode="reflect")

    def view(start: jax.Array) -> jax.Array:
        return lax.dynamic_slice(padded, (0, 0, start[0], start[1]), image.shape)

    return jax.vmap(view)(jnp.asarray(margin - offsets, jnp.int32))


def map_coordinates(image: jax.Array, offsets: np.ndarray) -> jax.Array:
    """``jax.scipy.ndimage.map_coordinates``, under ``vmap`` over views, images and channels."""
    y, x = (jnp.arange(n, dtype=jnp.float32) for n in image.shape[2:])

    def warp(channel: jax.Array, offset: jax.Array) -> jax.Array:
        places = jnp.meshgrid(y - offset[0], x - offset[1], indexing="ij")
        return jax.scipy.ndimage.map_coordinates(channel, places, order=1, mode="mirror")

    over_channels = jax.vmap(jax.vmap(warp, (0, None)), (0, None))
    return jax.vmap(over_channels, (None, 0))(image, jnp.asarray(offsets))


SHIFTS = (dynamic_slices, map_coordinates)
