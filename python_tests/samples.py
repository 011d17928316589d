"""Cases of the ops: descriptions of calls, named samples, and hypothesis strategies.

They are the inputs of all tests of properties that hold for every call, such as opcheck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import strategies as st

from srt_ext.options import Border, Interpolation, Padding, Reduce, Upsample

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# In the order of the enumerators of csrc/srt/types.h.
UPSAMPLES, BORDERS = get_args(Upsample), get_args(Border)
PADDINGS, INTERPOLATIONS = get_args(Padding), get_args(Interpolation)
REDUCES = (*get_args(Reduce), "moments")
NUMPY_PADDINGS = dict(zip(PADDINGS, ("constant", "edge", "reflect", "wrap"), strict=True))
FAR = 2.0**20  # the largest offset

Pairs = tuple[tuple[float, float], ...]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# Views with these offsets cover nothing: not finite, or too large.
NO_OFFSETS: Pairs = (
    (float("nan"), 0.0),
    (0.0, float("nan")),
    (float("inf"), 1.0),
    (2.0, float("-inf")),
    (0.0, 2.0 * FAR),
    (-FAR - 0.125, 1.0),
    (-1e30, -1e30),
)

_GRID: Pairs = tuple((float(y), float(x)) for y in (-2, 0, 2) for x in (-3, 0, 3))
_REAL: Pairs = ((0.0, 0.0), (0.25, -0.625), (-3.3, 7.1), (2.5, 2.5), (-0.7, -5.9))
_PLACES: Pairs = ((4.0, 10.5), (5.25, 8.625), (3.3, 17.1), (-1.5, 2.5), (8.9, 30.0), (4.0, 11.3))


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


def _image(
    shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """[B, C, H, W]; ``layout``: dense, channels_last or sliced."""
    batch, channels, height, width = shape
    if layout == "sliced":
        shape = (batch, channels + 1, height + 2, 2 * width + 1)
    if dtype == torch.uint8:
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    else:
        image = _random(shape, dtype, seed)
    if layout == "channels_last":
        return image.contiguous(memory_format=torch.channels_last)
    return image[:, 1:, 2:, 1::2] if layout == "sliced" else image


@dataclass(frozen=True)
class Ensemble:
    """One call of ensemble."""

    grid: tuple[int, int] = (3, 5)
    patch: tuple[int, int] = (4, 6)
    offsets: Pairs = _GRID
    channels: int = 19
    batch: int = 2
    prefix: int = 0  # tokens before the grid in the model's output; they are sliced off
    weights: tuple[float, ...] | None = None
    stride: tuple[int, int] = (1, 1)
    upsample: str = "bilinear"
    border: str = "coverage"
    value_dtype: torch.dtype = torch.float32  # of offsets and weights
    seed: int = 0

    @property
    def pixels(self) -> tuple[int, int]:
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        height, width = (n // s for n, s in zip(self.pixels, self.stride, strict=True))
        return self.batch, self.channels, height, width

    def tokens(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        count = self.grid[0] * self.grid[1]
        shape = (len(self.offsets), self.batch, self.prefix + count, self.channels)
        return _random(shape, dtype, self.seed)[:, :, self.prefix :]

    def fit(self, reduce: str) -> Ensemble:
        """Drops the weights for the median, which does not support them."""
        return replace(self, weights=None) if reduce == "median" else self

    def call(self, tokens: torch.Tensor) -> Call:
        """Returns the arguments and keyword arguments of the op and the function."""
        weights = self.weights and torch.tensor(self.weights, dtype=self.value_dtype)
        offsets = torch.tensor(self.offsets, dtype=self.value_dtype)
        modes = {"upsample": self.upsample, "border": self.border, "stride": self.stride}
        return (tokens, offsets, self.grid, self.patch, weights), modes


@dataclass(frozen=True)
class Shift:
    """One call of shift."""

    size: tuple[int, int] = (9, 21)
    offsets: Pairs = _REAL
    channels: int = 3
    batch: int = 2
    layout: str = "dense"  # or channels_last, sliced
    padding: str = "reflect"
    interpolation: str = "bilinear"
    value_dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return len(self.offsets), self.batch, self.channels, *self.size

    def image(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return _image((self.batch, self.channels, *self.size), self.layout, dtype, self.seed)

    def call(self, image: torch.Tensor) -> Call:
        offsets = torch.tensor(self.offsets, dtype=self.value_dtype)
        return (image, offsets), {"padding": self.padding, "interpolation": self.interpolation}


@dataclass(frozen=True)
class Windows:
    """One call of windows."""

    size: tuple[int, int] = (9, 21)  # of the image
    window: tuple[int, int] = (4, 5)
    centers: Pairs = _PLACES  # of image 0; those of image 1 start at the second
    scale: tuple[float, float] | Pairs | None = None  # for all windows, or one for each center
    channels: int = 3
    batch: int = 2
    layout: str = "dense"  # or channels_last, sliced
    padding: str = "border"
    value_dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, len(self.centers), self.channels, *self.window

    def image(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return _image((self.batch, self.channels, *self.size), self.layout, dtype, self.seed)

    def _of_images(self, pairs: Pairs) -> torch.Tensor:
        index = torch.arange(self.batch)[:, None] + torch.arange(len(pairs))
        return torch.tensor(pairs, dtype=self.value_dtype)[index % len(pairs)]

    def call(self, image: torch.Tensor) -> Call:
        scale = None
        if self.scale is not None:
            pair = isinstance(self.scale[0], float)
            scale = torch.tensor(self.scale, dtype=self.value_dtype)
            scale = scale if pair else self._of_images(self.scale)  # type: ignore[arg-type]
        centers = self._of_images(self.centers)
        return (image, centers, self.window, scale), {"padding": self.padding}


_ENSEMBLE, _SHIFT, _WINDOWS = Ensemble(), Shift(), Windows()

ENSEMBLES = {
    "grid": _ENSEMBLE,
    "nearest": replace(_ENSEMBLE, upsample="nearest", border="zeros"),
    "real": replace(_ENSEMBLE, offsets=_REAL, border="clamp", value_dtype=torch.float64),
    "beyond": replace(_ENSEMBLE, offsets=((12.0, 0.0), (0.5, -30.0), (FAR, -FAR))),
    "one_view": replace(_ENSEMBLE, offsets=((0.75, -1.5),), prefix=2),
    "weights": replace(_ENSEMBLE, offsets=_REAL, weights=(1.0, 0.0, 2.5, 1e-3, 7.0)),
    "token_scale": replace(_ENSEMBLE, stride=(4, 6), upsample="nearest", border="zeros"),
    "stride": replace(_ENSEMBLE, stride=(6, 10), offsets=_REAL, prefix=1),
    "whole": replace(_ENSEMBLE, stride=(12, 30), border="zeros"),
    "patch_1": replace(_ENSEMBLE, patch=(1, 1), offsets=_REAL, stride=(3, 1)),
    "one_token": replace(_ENSEMBLE, grid=(1, 1), patch=(3, 2), channels=1, batch=1),
    "wide": replace(_ENSEMBLE, channels=151, batch=1, border="clamp"),
    "circular": replace(
        _ENSEMBLE, offsets=(*_REAL, (30.0, -45.25)), border="circular", value_dtype=torch.float64
    ),
}

SHIFTS = {
    "real": _SHIFT,
    "whole": replace(_SHIFT, offsets=_GRID, padding="zeros"),
    "bicubic": replace(_SHIFT, interpolation="bicubic", padding="circular"),
    "nearest": replace(_SHIFT, interpolation="nearest", padding="border"),
    "beyond": replace(_SHIFT, offsets=((40.5, -100.25), (FAR, -FAR)), value_dtype=torch.float64),
    "strided": replace(_SHIFT, layout="sliced"),
    "channels_last": replace(_SHIFT, layout="channels_last", interpolation="bicubic"),
    "one_pixel": replace(_SHIFT, size=(1, 1)),
}

_SCALES: Pairs = ((1.0, 1.0), (0.5, -2.0), (1.3, 0.7), (0.0, 1.0), (-1.0, 1.0625), (3.0, 1.0))
WINDOWS = {
    "real": _WINDOWS,
    "grid": replace(_WINDOWS, window=(3, 6), centers=((1.5, 3.0), (4.5, 15.0), (7.5, 22.0))),
    "scale": replace(_WINDOWS, scale=(1.0625, 0.75), padding="zeros", value_dtype=torch.float64),
    "scales": replace(_WINDOWS, scale=_SCALES, padding="reflect", layout="sliced"),
    "beyond": replace(_WINDOWS, centers=((40.5, -100.25), (FAR, -FAR)), padding="circular"),
    "wide": replace(_WINDOWS, size=(5, 70), window=(2, 39), centers=((2.3, 40.9), (2.0, 22.25))),
    "points": replace(_WINDOWS, window=(1, 1), channels=37, layout="channels_last"),
    "channels_last": replace(_WINDOWS, channels=19, layout="channels_last", scale=(1.0, 2.0)),
    "one_pixel": replace(_WINDOWS, size=(1, 1), padding="circular"),
}

each_ensemble = pytest.mark.parametrize("case", ENSEMBLES.values(), ids=ENSEMBLES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduce = pytest.mark.parametrize("reduce", REDUCES)
each_border = pytest.mark.parametrize("border", BORDERS)
each_padding = pytest.mark.parametrize("padding", PADDINGS)
each_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)
each_value_dtype = pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64], ids=str)


def pairwise(first: Sequence[Any], second: Sequence[Any], *others: Sequence[Any]) -> list[Any]:
    """All pairs of values of ``first`` and ``second``; values of up to two ``others`` rotate."""
    return [
        (a, b, *(other[(i + k * j) % len(other)] for k, other in enumerate(others, 1)))
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]


def random_views(views: int, step: float = 0.125, seed: int = 0) -> Pairs:
    """Offsets of up to 4 pixels in multiples of ``step``: some views share dy or dx."""
    generator = torch.Generator().manual_seed(views + 1000 * seed)
    steps = torch.randint(-int(4 / step), int(4 / step) + 1, (views, 2), generator=generator)
    return tuple((y * step, x * step) for y, x in steps.tolist())


def poison(values: torch.Tensor, seed: int) -> torch.Tensor:
    """A copy where a few rows (along the last axis) and a few elements are NaN, Inf and -Inf."""
    values = values.clone()
    generator = torch.Generator().manual_seed(seed)
    for value in (float("nan"), float("inf"), float("-inf")):
        *row, last = (int(torch.randint(s, (), generator=generator)) for s in values.shape)
        values[tuple(row)] = value
        row[-1] -= 1
        values[(*row, last)] = value
    return values


def _offset(pixels: int) -> st.SearchStrategy[float]:
    return st.one_of(
        st.integers(-pixels - 1, pixels + 1).map(float),
        st.integers(-8 * pixels, 8 * pixels).map(lambda eighths: eighths / 8),
        st.floats(-2.0 * pixels, 2.0 * pixels),
        st.sampled_from((FAR, -FAR, 0.25 - FAR, FAR - 0.5)),
    )


@st.composite
def _offsets(draw: st.DrawFn, pixels: tuple[int, int]) -> Pairs:
    # From small pools, so that some views share dy or dx.
    dy, dx = (draw(st.lists(_offset(n), min_size=1, max_size=3)) for n in pixels)
    pair = st.tuples(st.sampled_from(dy), st.sampled_from(dx))
    return tuple(draw(st.lists(pair, min_size=1, max_size=6)))


def _divisors(n: int) -> list[int]:
    return [s for s in range(1, n + 1) if n % s == 0]


_VALUE_DTYPES = st.sampled_from((torch.float32, torch.float64))


@st.composite
def ensembles(draw: st.DrawFn, **fixed: Any) -> Ensemble:
    """Draws any valid call; ``fixed`` fields keep their values."""
    grid = fixed.pop("grid", None) or draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    patch = fixed.pop("patch", None) or draw(st.tuples(st.integers(1, 6), st.integers(1, 9)))
    pixels = (grid[0] * patch[0], grid[1] * patch[1])
    offsets = draw(_offsets(pixels))
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 8.0))
    weights = st.lists(weight, min_size=len(offsets), max_size=len(offsets)).map(tuple)
    case = Ensemble(
        grid=grid,
        patch=patch,
        offsets=offsets,
        channels=draw(st.integers(1, 70)),
        batch=draw(st.integers(1, 2)),
        prefix=draw(st.integers(0, 2)),
        weights=draw(st.none() | weights),
        stride=draw(st.tuples(*(st.sampled_from(_divisors(n)) for n in pixels))),
        upsample=draw(st.sampled_from(UPSAMPLES)),
        border=draw(st.sampled_from(BORDERS)),
        value_dtype=draw(_VALUE_DTYPES),
        seed=draw(st.integers(0, 2**16)),
    )
    return replace(case, **fixed)


@st.composite
def shifts(draw: st.DrawFn, **fixed: Any) -> Shift:
    size = fixed.pop("size", None) or draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    case = Shift(
        size=size,
        offsets=draw(_offsets(size)),
        channels=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 2)),
        layout=draw(st.sampled_from(("dense", "channels_last", "sliced"))),
        padding=draw(st.sampled_from(PADDINGS)),
        interpolation=draw(st.sampled_from(INTERPOLATIONS)),
        value_dtype=draw(_VALUE_DTYPES),
        seed=draw(st.integers(0, 2**16)),
    )
    return replace(case, **fixed)


@st.composite
def windows(draw: st.DrawFn, **fixed: Any) -> Windows:
    size = fixed.pop("size", None) or draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    place = st.tuples(*(_offset(n) for n in size))
    centers = tuple(draw(st.lists(place, min_size=1, max_size=5)))
    steps = st.sampled_from((1.0, 1.0, 0.5, 0.0, -1.0, 2.0, 16 / 15)) | st.floats(-3.0, 3.0)
    pair = st.tuples(steps, steps)
    each = st.lists(pair, min_size=len(centers), max_size=len(centers)).map(tuple)
    case = Windows(
        size=size,
        window=draw(st.tuples(st.integers(1, 5), st.integers(1, 36))),
        centers=centers,
        scale=draw(st.none() | pair | each),
        channels=draw(st.integers(1, 3) | st.integers(1, 40)),
        batch=draw(st.integers(1, 2)),
        layout=draw(st.sampled_from(("dense", "channels_last", "sliced"))),
        padding=draw(st.sampled_from(PADDINGS)),
        value_dtype=draw(_VALUE_DTYPES),
        seed=draw(st.integers(0, 2**16)),
    )
    return replace(case, **fixed)
