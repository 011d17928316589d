"""The CUDA kernels, executed on the CPU: g++ compiles them with cuda_on_host/cuda_runtime.h.

Every buffer stands between guard zones of NaN: a read beyond it shows in the result, a write beyond
it in the guards. Every element of every output must be written once.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
    string_at,
)
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import EnsembleBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    BORDERS,
    DTYPES,
    FAR,
    INTERPOLATIONS,
    PADDINGS,
    UPSAMPLES,
    Ensemble,
    Shift,
    ensembles,
    sample_ensembles,
    sample_shifts,
    shifts,
)
from test_ensemble import check_budget, check_rounding, oracle, poison
from test_median import median_oracle
from test_shift import ALL_DTYPES, bits, padded_slice, special_image
from test_shift import check_budget as check_shift
from test_shift import check_rounding as check_shift_rounding
from test_shift import oracle as shift_oracle

from srt_ext import RunningMean, RunningMedian, RunningMoments, reference

ROOT = Path(__file__).resolve().parents[1]
STUB = Path(__file__).parent / "cuda_on_host"
SOURCES = ROOT / "csrc" / "srt"

NAN = float("nan")
GUARD = 512  # bytes on each side of a buffer; more than any access is wide
CODES = {t: i for i, t in enumerate((*DTYPES, torch.uint8))}  # srt::DType


class EnsembleArgs(Structure):
    _fields_ = (
        ("reduce", c_int32),
        ("dtype", c_int32),
        ("tokens", c_void_p),
        ("views", c_int64),
        ("batch", c_int64),
        ("channels", c_int64),
        ("token_strides", c_int64 * 3),
        ("offsets", c_void_p),
        ("weights", c_void_p),
        ("grid", c_int64 * 2),
        ("patch", c_int64 * 2),
        ("stride", c_int64 * 2),
        ("upsample", c_int32),
        ("border", c_int32),
        ("out", c_void_p),
        ("out_strides", c_int64 * 4),
        ("variance", c_void_p),
        ("seen", c_void_p),
        ("plane_stride", c_int64),
    )


class ShiftArgs(Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("image", c_void_p),
        ("planes", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("views", c_int64),
        ("offsets", c_void_p),
        ("padding", c_int32),
        ("interpolation", c_int32),
        ("out", c_void_p),
    )


class ViewNumbers(Structure):
    _fields_ = (("host", POINTER(c_double)), ("device", c_void_p), ("dtype", c_int32))


class HostDevice(Structure):
    _fields_ = (
        ("processors", c_int),
        ("max_grid", c_int),
        ("l2_bytes", c_int),
        ("stream", c_void_p),
        ("launches", c_int),
        ("failing_launch", c_int),
        ("watched", c_void_p),
        ("watched_bytes", c_int64),
        ("writes", c_void_p),
        ("outside", c_int64),
        ("evict_first", c_int64),
    )


class Guarded:
    """A flat buffer of ``count`` elements between guards; all bytes are 0xff, which is NaN."""

    def __init__(self, count: int, dtype: torch.dtype, skip: int = 0) -> None:
        size = dtype.itemsize
        self.bytes = torch.full((2 * GUARD + (count + skip) * size,), 0xFF, dtype=torch.uint8)
        misaligned = self.bytes.data_ptr() % 64
        assert misaligned == 0
        self.begin, self.end = GUARD + skip * size, GUARD + (skip + count) * size
        self.elements = self.bytes[self.begin : self.end].view(dtype) if count else None

    def intact(self) -> bool:
        guards = torch.cat([self.bytes[: self.begin], self.bytes[self.end :]])
        return bool((guards == 0xFF).all())

    def pointer(self) -> int:
        return self.bytes.data_ptr() + self.begin


class Numbers:
    """Offsets or weights, on the host or "on the device" in float32 or float64."""

    def __init__(self, values: torch.Tensor | None, place: str) -> None:
        self.struct = ViewNumbers()
        if values is None:
            return
        if place == "host":
            self.values = values.double().contiguous()
            self.struct.host = ctypes.cast(self.values.data_ptr(), POINTER(c_double))
            return
        dtype = torch.float32 if place == "device, float32" else torch.float64
        self.buffer = Guarded(values.numel(), dtype)
        self.buffer.elements.copy_(values.flatten())
        self.struct.device = self.buffer.pointer()
        self.struct.dtype = CODES[dtype]


class State:
    """Of a stream, between guards. What a kernel must not read before it has written it is NaN."""

    out: Guarded | None = None

    def allocate(self, count: int, dtype: torch.dtype, cells: int) -> None:
        if self.out is None:
            self.out, self.seen = Guarded(count, dtype), Guarded(cells, torch.float64)
            self.seen.elements.zero_()


class CudaOnHost:
    """The kernels, called as the glue calls them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.device.restype = POINTER(HostDevice)
        backward = (library.mean_backward, library.shift_backward)
        for function in (library.ensemble, library.shift, *backward):
            function.restype = c_char_p
        self.gaps: list[tuple[int, int]] = []  # of the workspace: address and bytes
        self._gap = CFUNCTYPE(None, c_void_p, c_int64)(lambda *gap: self.gaps.append(gap))
        library.watch_workspace(self._gap)
        self.reset()

    @property
    def device(self) -> Any:
        return self.library.device().contents

    def reset(self) -> None:
        self.device.processors = 1
        self.device.max_grid = 2**31 - 1
        self.device.l2_bytes = 0
        self.device.failing_launch = -1
        self.device.stream = 0x5EED

    def tiles(self, size: str) -> None:
        """Large tiles are chosen where they fill all processors."""
        self.device.processors = {"large": 0, "small": 2**20}[size]

    def _run(self, function: Any, args: Structure, numbers: list[Numbers], out: Guarded) -> None:
        structs = [byref(n.struct) for n in numbers]
        size = c_int64(-1)
        error = function(byref(args), *structs, None, byref(size))
        if error:
            raise RuntimeError(error.decode())
        workspace = Guarded(max(size.value, 1), torch.uint8)
        writes = torch.zeros(max(out.end - out.begin, 1), dtype=torch.uint8)
        device = self.device
        self.gaps.clear()
        device.launches = 0
        device.watched, device.watched_bytes = out.pointer(), out.end - out.begin
        device.writes, device.outside, device.evict_first = writes.data_ptr(), 0, 0
        error = function(byref(args), *structs, c_void_p(workspace.pointer()), byref(size))
        device.watched = None
        assert workspace.intact()
        assert all(string_at(*gap) == gap[1] * b"\xff" for gap in self.gaps)
        assert out.intact()
        assert device.outside == 0
        if error:
            raise RuntimeError(error.decode())
        self.writes = writes[: out.end - out.begin]

    def ensemble(
        self,
        case: Ensemble,
        tokens: torch.Tensor,
        *,
        place: str | tuple[str, str] = "host",
        layout: str = "channels_last",
        skip: int = 0,
        reduce: str = "mean",
        state: State | None = None,
    ) -> torch.Tensor:
        """tokens [V, B, N, C] with any outer strides; ``skip`` elements spoil the alignment.

        ``place``: of the offsets and of the weights, if they differ. With a ``state``, the tokens
        are a chunk of a stream. Moments are [2, B, C, H', W'], mean and variance; the state of a
        median is [8, B, C, H', W'].
        """
        (_, offsets, grid, patch, weights), modes = case.call(tokens)
        views, batch, _, channels = tokens.shape
        span = 1 + sum((n - 1) * s for n, s in zip(tokens.shape, tokens.stride(), strict=True))
        source = Guarded(span, tokens.dtype, skip)
        source.elements.copy_(tokens.as_strided((span,), (1,)))
        assert source.intact()

        b, c, h, w = case.shape
        sizes, strides = {
            "channels_last": (b * h * w * c, (h * w * c, 1, w * c, c)),
            "contiguous": (b * h * w * c, (c * h * w, h * w, w, 1)),
            # Rows and cells with gaps of 16 and 32 bytes, and of one element.
            "padded": (
                b * h * (w + 1) * (c + 16),
                (h * (w + 1) * (c + 16), 1, (w + 1) * (c + 16), c + 16),
            ),
            "steps": (
                b * h * w * (2 * c + 1),
                (h * w * (2 * c + 1), 2, w * (2 * c + 1), 2 * c + 1),
            ),
        }[layout]
        planes = {"mean": 1, "moments": 2, "median": 8 if state else 1}[reduce]
        dtype = tokens.dtype
        if state:
            dtype = torch.promote_types(dtype, torch.float32)
            state.allocate(planes * sizes, dtype, h * w)
        out = state.out if state else Guarded(planes * sizes, dtype, skip)
        args = EnsembleArgs(
            reduce=("mean", "median", "moments").index(reduce),
            dtype=CODES[tokens.dtype],
            tokens=source.pointer(),
            views=views,
            batch=batch,
            channels=channels,
            token_strides=(c_int64 * 3)(*tokens.stride()[:3]),
            grid=(c_int64 * 2)(*grid),
            patch=(c_int64 * 2)(*patch),
            stride=(c_int64 * 2)(*modes["stride"]),
            upsample=UPSAMPLES.index(modes["upsample"]),
            border=BORDERS.index(modes["border"]),
            out=out.pointer(),
            out_strides=(c_int64 * 4)(*strides),
            variance=out.pointer() + sizes * dtype.itemsize if reduce == "moments" else None,
            seen=state.seen.pointer() if state else None,
            plane_stride=sizes,
        )
        places = (place, place) if isinstance(place, str) else place
        numbers = [Numbers(v, p) for v, p in zip((offsets, weights), places, strict=True)]
        self._run(self.library.ensemble, args, numbers, out)
        if state:
            assert state.seen.intact()
        # Which bytes belong to an element, and were they written once and no other ones?
        size = dtype.itemsize
        expected = torch.zeros(planes * sizes, size, dtype=torch.uint8)
        places = ((planes, *case.shape), (sizes, *strides))
        expected.as_strided((*places[0], size), (*(s * size for s in places[1]), 1)).fill_(1)
        assert torch.equal(self.writes, expected.flatten())
        fields = out.elements.as_strided(*places)
        return fields[0] if planes == 1 else fields

    def shift(
        self, case: Shift, image: torch.Tensor, *, place: str = "host", skip: int = 0
    ) -> torch.Tensor:
        (image, offsets), modes = case.call(image)
        b, c, h, w = image.shape
        source = Guarded(image.numel(), image.dtype)
        source.elements.copy_(image.flatten())
        out = Guarded(len(offsets) * image.numel(), image.dtype, skip)
        args = ShiftArgs(
            dtype=CODES[image.dtype],
            image=source.pointer(),
            planes=b * c,
            height=h,
            width=w,
            views=len(offsets),
            padding=PADDINGS.index(modes["padding"]),
            interpolation=INTERPOLATIONS.index(modes["interpolation"]),
            out=out.pointer(),
        )
        self._run(self.library.shift, args, [Numbers(offsets, place)], out)
        assert (self.writes == 1).all()
        return out.elements.reshape(len(offsets), b, c, h, w)


def compiled(source: Path, to: Path, *flags: str) -> Path:
    usual = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Werror -Wno-unknown-pragmas"
    command = ["g++", *usual.split(), "-I", STUB, *flags, "-c", "-x", "c++", source, "-o", to]
    subprocess.run(command, check=True)
    return to


def linked(objects: Iterable[Path], to: Path, *flags: str) -> Path:
    subprocess.run(["g++", "-shared", *objects, *flags, "-o", to], check=True)
    return to


@functools.cache
def built() -> tempfile.TemporaryDirectory[str]:
    """The objects of the CUDA sources, by the sources' names, until this process ends."""
    if shutil.which("g++") is None or not SOURCES.is_dir():
        pytest.skip("needs g++ and the sources")
    sources = [
        *sorted((SOURCES / "cuda").glob("*.cu")),
        SOURCES / "validation.cpp",
        STUB / "host.cpp",
    ]
    folder = tempfile.TemporaryDirectory()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s: compiled(s, Path(folder.name, f"{s.name}.o"), "-O1"), sources))
    return folder


def objects(without: str = "") -> list[Path]:
    return [o for o in Path(built().name).iterdir() if o.name != f"{without}.o"]


@functools.cache
def host_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(linked(objects(), Path(folder, "host.so"))))


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return host_library()


@pytest.fixture
def cuda(library: ctypes.CDLL) -> Iterator[CudaOnHost]:
    kernels = CudaOnHost(library)
    yield kernels
    kernels.reset()


PLACES = ("host", "device, float64")
ENSEMBLES = sample_ensembles()
SHIFTS = sample_shifts()
each_ensemble = pytest.mark.parametrize("case", ENSEMBLES.values(), ids=ENSEMBLES.keys())
each_shift = pytest.mark.parametrize("case", SHIFTS.values(), ids=SHIFTS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_tile = pytest.mark.parametrize("tiles", ["large", "small"])
each_padding = pytest.mark.parametrize("padding", PADDINGS)
each_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)


# ---- ensemble -----------------------------------------------------------------------------------


@each_dtype
@each_tile
# 40: whole vectors in every dtype, and the last chunk of channels has idle lanes.
@pytest.mark.parametrize("channels", [40, None])
@each_ensemble
def test_ensemble(
    case: Ensemble, channels: int | None, tiles: str, dtype: torch.dtype, cuda: CudaOnHost
) -> None:
    cuda.tiles(tiles)
    case = replace(case, channels=channels or case.channels)
    tokens = case.tokens(dtype)
    check_budget(case, tokens, cuda.ensemble(case, tokens))


@given(
    ensembles(),
    st.sampled_from(DTYPES),
    st.sampled_from((None, 8, 16, 72)),
    st.sampled_from(("large", "small")),
    st.sampled_from(PLACES),
)
def test_any_ensemble(
    library: ctypes.CDLL,
    case: Ensemble,
    dtype: torch.dtype,
    channels: int | None,
    tiles: str,
    place: str,
) -> None:
    cuda = CudaOnHost(library)
    cuda.tiles(tiles)
    case = replace(case, channels=channels or case.channels)
    tokens = case.tokens(dtype)
    check_rounding(case, tokens, cuda.ensemble(case, tokens, place=place))


@each_tile
@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("offsets", ["grid", "real"])
def test_tiles_of_a_real_shape(offsets: str, upsample: str, tiles: str, cuda: CudaOnHost) -> None:
    """Several tiles along every axis, several rounds of columns, and long runs between breaks."""
    cuda.tiles(tiles)
    case = replace(ENSEMBLES[offsets], grid=(3, 5), patch=(16, 16), batch=1, channels=72)
    for border in BORDERS:
        case = replace(case, upsample=upsample, border=border)
        for dtype in (torch.float32, torch.bfloat16):
            tokens = case.tokens(dtype)
            check_budget(case, tokens, cuda.ensemble(case, tokens))
            check_containment(case, poison(tokens, 2), cuda)


@each_tile
@each_dtype
def test_same_bits_wherever_the_numbers_lie(
    dtype: torch.dtype, tiles: str, cuda: CudaOnHost
) -> None:
    cuda.tiles(tiles)
    for name in ("real", "weights"):
        # Numbers that float32 holds, so that it makes no difference.
        case = replace(ENSEMBLES[name], channels=16)
        case = replace(
            case, offsets=tuple((round(y * 8) / 8, round(x * 8) / 8) for y, x in case.offsets)
        )
        case = replace(case, weights=case.weights and (1.0, 0.0, 2.5, 0.125, 7.0))
        tokens = case.tokens(dtype)
        field = cuda.ensemble(case, tokens)
        for place in ("device, float32", "device, float64"):
            assert torch.equal(field, cuda.ensemble(case, tokens, place=place))


def check_containment(case: Ensemble, tokens: torch.Tensor, cuda: CudaOnHost) -> None:
    field, expected = cuda.ensemble(case, tokens), oracle(case, tokens)
    assert torch.equal(field.isfinite(), expected.isfinite())
    clean = cuda.ensemble(case, torch.where(tokens.isfinite(), tokens, 0))
    kept = expected.isfinite()
    assert torch.equal(field[kept], clean[kept])


@each_dtype
@each_tile
@each_ensemble
def test_containment(case: Ensemble, tiles: str, dtype: torch.dtype, cuda: CudaOnHost) -> None:
    cuda.tiles(tiles)
    for channels in (16, case.channels):
        case = replace(case, channels=channels)
        check_containment(case, poison(case.tokens(dtype), 1), cuda)


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "padded", "steps"])
def test_out_of_any_strides(layout: str, dtype: torch.dtype, cuda: CudaOnHost) -> None:
    for tiles in ("large", "small"):
        cuda.tiles(tiles)
        for channels in (16, 19):
            case = replace(ENSEMBLES["stride"], channels=channels)
            tokens = case.tokens(dtype)
            expected = cuda.ensemble(case, tokens)
            for skip in (0, 1):
                field = cuda.ensemble(case, tokens, layout=layout, skip=skip)
                assert torch.equal(field, expected)


@each_dtype
def test_tokens_of_any_strides(dtype: torch.dtype, cuda: CudaOnHost) -> None:
    case = replace(ENSEMBLES["grid"], channels=16)
    tokens = case.tokens(dtype)
    expected = cuda.ensemble(case, tokens)
    padded = torch.full((*tokens.shape[:3], 21), NAN, dtype=dtype)[..., 2:18].copy_(tokens)
    swapped = tokens.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    for strided in (padded, swapped):
        assert torch.equal(cuda.ensemble(case, strided), expected)
    same = tokens[:1].expand(len(case.offsets), -1, -1, -1)
    assert torch.equal(cuda.ensemble(case, same), cuda.ensemble(case, same.contiguous()))


@pytest.mark.parametrize("views", [160, 161, 200, 500])
@pytest.mark.parametrize("place", PLACES)
def test_many_views(place: str, views: int, cuda: CudaOnHost) -> None:
    """More numbers than the parameters of a kernel hold."""
    generator = torch.Generator().manual_seed(views)
    offsets = (torch.rand(views, 2, generator=generator) * 8 - 4).tolist()
    weights = tuple(torch.rand(views, generator=generator).tolist())
    case = Ensemble((2, 2), (4, 4), tuple(map(tuple, offsets)), channels=8, batch=2)
    for same in (case, replace(case, weights=weights)):
        tokens = same.tokens()
        check_budget(same, tokens, cuda.ensemble(same, tokens, place=place))


def test_numbers_in_different_places(cuda: CudaOnHost) -> None:
    few = replace(ENSEMBLES["weights"], value_dtype=torch.float64)
    many = replace(few, offsets=few.offsets * 40, weights=few.weights * 40)  # type: ignore[operator]
    for case in (few, many):
        tokens = case.tokens()
        expected = cuda.ensemble(case, tokens)
        for places in (("host", "device, float64"), ("device, float64", "host")):
            assert torch.equal(cuda.ensemble(case, tokens, place=places), expected)


NOTHING = (
    (NAN, 0.0),
    (0.0, NAN),
    (float("inf"), 1.0),
    (2.0, float("-inf")),
    (0.0, 2.0 * FAR),
    (-1e300, 0.0),
)


@pytest.mark.parametrize("border", BORDERS)
@each_tile
def test_numbers_that_the_host_refuses_cover_nothing(
    tiles: str, border: str, cuda: CudaOnHost
) -> None:
    cuda.tiles(tiles)
    good = replace(ENSEMBLES["real"], border=border, weights=(1.0, 3.0, 0.5, 2.0, 1.0), channels=16)
    bad_weights = (NAN, -1.0, float("inf"), float("-inf"), 3.0 * 2.0**-81, 0.0)
    ordinary = ((0.0, 0.0),) * len(bad_weights)
    case = replace(
        good,
        offsets=NOTHING[:3] + good.offsets + NOTHING[3:] + ordinary,
        weights=(1.0,) * 3 + good.weights + (1.0,) * 3 + bad_weights,  # type: ignore[operator]
    )
    tokens = torch.full((len(case.offsets), 2, 15, 16), NAN)
    tokens[3:8] = good.tokens()
    field = cuda.ensemble(case, tokens, place="device, float64")
    assert torch.equal(field, cuda.ensemble(good, good.tokens()))
    none = replace(case, offsets=NOTHING, weights=None)
    assert not cuda.ensemble(none, tokens[:6], place="device, float64").any()


@pytest.mark.parametrize("max_grid", [1, 3])
@each_tile
def test_a_grid_that_is_smaller_than_the_work(tiles: str, max_grid: int, cuda: CudaOnHost) -> None:
    cuda.tiles(tiles)
    for channels in (19, 136):
        case = replace(ENSEMBLES["grid"], channels=channels)
        tokens = case.tokens()
        cuda.device.max_grid = 2**31 - 1
        expected = cuda.ensemble(case, tokens)
        cuda.device.max_grid = max_grid
        assert torch.equal(cuda.ensemble(case, tokens), expected)
    shift = SHIFTS["real"]
    cuda.device.max_grid = 2**31 - 1
    views = cuda.shift(shift, shift.image())
    cuda.device.max_grid = max_grid
    assert torch.equal(cuda.shift(shift, shift.image()), views)


def test_empty(cuda: CudaOnHost) -> None:
    cuda.ensemble(replace(ENSEMBLES["grid"], batch=1, channels=4), torch.ones(9, 1, 15, 4))
    assert cuda.device.launches == 5
    for shape in ((9, 0, 15, 4), (9, 1, 15, 0)):
        case = replace(ENSEMBLES["grid"], batch=shape[1], channels=shape[3])
        args = EnsembleArgs(views=9, batch=shape[1], channels=shape[3])
        cuda.device.launches = 0
        numbers = ViewNumbers()
        size = c_int64(-1)
        for workspace in (None, c_void_p(1)):
            assert not cuda.library.ensemble(
                byref(args), byref(numbers), byref(numbers), workspace, byref(size)
            )
        assert size.value == 0
        assert cuda.device.launches == 0, case


@pytest.mark.parametrize("grid", [(3, 21), (5, 37)])
def test_positions_far_from_0_in_float64(grid: tuple[int, int], cuda: CudaOnHost) -> None:
    """Weights round in proportion to the position: cells between two of them would show it."""
    for seed in range(5):
        case = Ensemble(grid, (2, 26), ((0.3, 0.7),), channels=8, seed=seed)
        tokens = case.tokens(torch.float64)
        check_budget(case, tokens, cuda.ensemble(case, tokens))


def test_every_launch_is_checked(cuda: CudaOnHost) -> None:
    case = replace(ENSEMBLES["weights"], offsets=ENSEMBLES["weights"].offsets * 40)
    case = replace(case, weights=(1.0,) * 200)
    cuda.ensemble(case, case.tokens())
    count = cuda.device.launches
    assert count == 1 + 1 + 5  # offsets and weights go up, then the five kernels
    shift = replace(SHIFTS["real"], offsets=SHIFTS["real"].offsets * 60)
    for call, launches in (
        (lambda: cuda.ensemble(case, case.tokens()), count),
        (lambda: cuda.shift(shift, shift.image()), 3),
    ):
        for failing in range(launches):
            cuda.device.failing_launch = failing
            with pytest.raises(RuntimeError, match=r"srt::\w+: CUDA: unspecified launch failure"):
                call()
            assert cuda.device.launches == failing + 1
        cuda.device.failing_launch = launches
        call()
        assert cuda.device.launches == launches


@pytest.mark.parametrize("reduce", ["mean", "median", "moments"])
def test_what_fits_l2_stays_there(reduce: str, cuda: CudaOnHost) -> None:
    case = ENSEMBLES["grid"]
    planes = 2 if reduce == "moments" else 1
    size = planes * math.prod(case.shape) * torch.float32.itemsize + case.tokens().nbytes
    fields = []
    for l2_bytes in (size, size - 1):
        cuda.device.l2_bytes = l2_bytes
        fields.append(cuda.ensemble(case, case.tokens(), reduce=reduce).clone())
        assert (cuda.device.evict_first == 0) == (l2_bytes == size)
    assert torch.equal(*fields)


# ---- shift --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_views_that_fit_l2_stay_there(dtype: torch.dtype, cuda: CudaOnHost) -> None:
    case = SHIFTS["real"]
    image = case.image(dtype)
    size = (len(case.offsets) + 1) * image.nbytes
    views = []
    for l2_bytes in (size, size - 1):
        cuda.device.l2_bytes = l2_bytes
        views.append(cuda.shift(case, image).clone())
        assert (cuda.device.evict_first == 0) == (l2_bytes == size)
    assert torch.equal(*views)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("size", [None, (9, 32), (19, 272), (2, 300)], ids=str)
@each_shift
def test_shift(
    case: Shift, size: tuple[int, int] | None, dtype: torch.dtype, cuda: CudaOnHost
) -> None:
    case = replace(case, size=size or case.size)
    image = case.image(dtype)
    check_shift(case, image, cuda.shift(case, image))


@each_padding
@each_interpolation
def test_every_mode_of_shift(interpolation: str, padding: str, cuda: CudaOnHost) -> None:
    for dtype in ALL_DTYPES:
        for width in (37, 48):
            case = Shift(size=(7, width), padding=padding, interpolation=interpolation)
            image = case.image(dtype)
            check_shift(case, image, cuda.shift(case, image))


@given(shifts(), st.sampled_from(ALL_DTYPES), st.sampled_from(PLACES), st.sampled_from((0, 1)))
def test_any_shift(
    library: ctypes.CDLL, case: Shift, dtype: torch.dtype, place: str, skip: int
) -> None:
    cuda = CudaOnHost(library)
    image = case.image(dtype)
    check_shift_rounding(case, image, cuda.shift(case, image, place=place, skip=skip))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@each_padding
@each_interpolation
def test_whole_pixels_copy_bit_for_bit(
    interpolation: str, padding: str, dtype: torch.dtype, cuda: CudaOnHost
) -> None:
    offsets = ((0, 0), (1, -2), (-2, 1), (0, 36), (-7, -40), (300, -1000), (0, -1))
    for size in ((3, 37), (9, 32), (1, 1)):
        image = special_image(size, dtype)
        case = Shift(size, tuple((float(y), float(x)) for y, x in offsets), 2, 1)
        case = replace(case, padding=padding, interpolation=interpolation)
        views = cuda.shift(case, image)
        for view, (dy, dx) in zip(views, offsets, strict=True):
            assert torch.equal(bits(view), padded_slice(image, dy, dx, padding)), (size, dy, dx)


@each_padding
@each_interpolation
@each_dtype
def test_containment_of_shift(
    dtype: torch.dtype, interpolation: str, padding: str, cuda: CudaOnHost
) -> None:
    for width in (21, 32):
        case = Shift((9, width), padding=padding, interpolation=interpolation)
        image = case.image(dtype)
        for i, value in enumerate((NAN, float("inf"), float("-inf"))):
            image[i % 2, i, 2 * i, 5 * i] = value
        views = cuda.shift(case, image)
        assert torch.equal(views.isfinite(), shift_oracle(case, image).isfinite())


@pytest.mark.parametrize("views", [240, 241, 700])
@pytest.mark.parametrize("place", PLACES)
def test_shift_of_many_views(place: str, views: int, cuda: CudaOnHost) -> None:
    generator = torch.Generator().manual_seed(views)
    offsets = (torch.rand(views, 2, generator=generator) * 8 - 4).tolist()
    case = Shift((5, 8), tuple(map(tuple, offsets)), value_dtype=torch.float64)
    image = case.image()
    check_shift(case, image, cuda.shift(case, image, place=place))


@each_padding
@each_interpolation
def test_shift_by_what_the_host_refuses(interpolation: str, padding: str, cuda: CudaOnHost) -> None:
    good = Shift((6, 16), padding=padding, interpolation=interpolation, value_dtype=torch.float64)
    case = replace(good, offsets=good.offsets + NOTHING)
    for dtype in ALL_DTYPES:
        image = case.image(dtype)
        views = cuda.shift(case, image, place="device, float64")
        assert torch.equal(views[: len(good.offsets)], cuda.shift(good, image))
        assert not views[len(good.offsets) :].any()


def test_the_stub_sees_what_it_should(library: ctypes.CDLL, tmp_path: Path) -> None:
    """The checks of this file must find each of the faults below, and nothing without one."""
    faults: dict[str, tuple[str, str, str]] = {
        "a missing barrier": ("mean.cu", "if (__syncthreads_or(!finite))", "if (!finite)"),
        "a write beyond": (
            "mean.cu",
            "cell = row + cells.at",
            "cell = row + plan.cell_bytes + cells.at",
        ),
        "a row that is not written": ("mean.cu", "place > last) break", "place >= last) break"),
        "a run across a break": ("mean.cu", "if (breaks) plan", "if (breaks && cell % 7) plan"),
        "a weight of 0 that is multiplied": (
            "mean.cu",
            "kExact && weight.at[x] == 0",
            "kExact && false",
        ),
        "a token that is not finite": ("mean.cu", "return isfinite(check)", "return true"),
        "ends that are not finite": (
            "mean.cu",
            "if (!kFinite && !isfinite(slope))",
            "if (false)",
        ),
        "a piece of the workspace that is too small": (
            "mean.cu",
            "workspace.take<double>(args.views * rows)",
            "workspace.take<double>(args.views * rows - 1)",
        ),
        "a line that is too short": ("shift.cu", "at < columns + taps_x - 1", "at < columns"),
        "a missing barrier of a warp": (
            "shift.cu",
            "block.taps[0], own);\n      __syncwarp();",
            "block.taps[0], own);",
        ),
        "none": ("mean.cu", "if (breaks) plan", "if (breaks) plan"),
    }
    runs: dict[str, Callable[[CudaOnHost], None]] = {
        "mean.cu": lambda cuda: (
            test_ensemble(ENSEMBLES["real"], 40, "large", torch.float32, cuda),
            test_containment(ENSEMBLES["real"], "large", torch.float32, cuda),
        )[0],
        "shift.cu": lambda cuda: test_shift(SHIFTS["real"], (9, 32), torch.float32, cuda),
    }

    def broken(fault: str) -> Path:
        """The library with that fault."""
        folder = tmp_path / fault.replace(" ", "_")
        shutil.copytree(SOURCES, folder)
        name, good, bad = faults[fault]
        source = folder / "cuda" / name
        text = source.read_text()
        assert text.count(good) == 1, fault
        source.write_text(text.replace(good, bad))
        rest = objects(without=name)
        return linked([compiled(source, folder / "broken.o", "-O0"), *rest], folder / "broken.so")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault, library in zip(faults, pool.map(broken, faults), strict=True):
            with nullcontext() if fault == "none" else pytest.raises(AssertionError):
                runs[faults[fault][0]](CudaOnHost(ctypes.CDLL(str(library))))


# ---- median, moments, streams -------------------------------------------------------------------

each_place = pytest.mark.parametrize("place", PLACES)


def check_median(case: Ensemble, tokens: torch.Tensor, cuda: CudaOnHost, **options: Any) -> None:
    """Of a fixed sample."""
    field = check_median_rounding(case, tokens, cuda, **options)
    if tokens.dtype != torch.float64:
        same = median_oracle(case, tokens, torch.float32).to(tokens.dtype)
        assert_within_budget(field, median_oracle(case, tokens), same)


def check_median_rounding(
    case: Ensemble, tokens: torch.Tensor, cuda: CudaOnHost, **options: Any
) -> torch.Tensor:
    case = replace(case, weights=None)
    field = cuda.ensemble(case, tokens, reduce="median", **options)
    bound = EnsembleBounds(case, tokens).median()
    assert_within_rounding(field, median_oracle(case, tokens), bound)
    return field


@each_dtype
@each_place
@each_ensemble
def test_median(case: Ensemble, place: str, dtype: torch.dtype, cuda: CudaOnHost) -> None:
    check_median(case, case.tokens(dtype), cuda, place=place)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "steps"])
@pytest.mark.parametrize("reduce", ["median", "moments"])
def test_values_into_any_strides(reduce: str, layout: str, cuda: CudaOnHost) -> None:
    case = replace(ENSEMBLES["stride"], weights=None)
    tokens = case.tokens()
    expected = cuda.ensemble(case, tokens, reduce=reduce)
    assert torch.equal(cuda.ensemble(case, tokens, reduce=reduce, layout=layout, skip=1), expected)


@given(ensembles(), st.sampled_from(DTYPES), st.sampled_from(PLACES))
def test_any_median_and_moments(
    library: ctypes.CDLL, case: Ensemble, dtype: torch.dtype, place: str
) -> None:
    cuda = CudaOnHost(library)
    case = replace(case, channels=min(case.channels, 40))
    check_moments(case, case.tokens(dtype), cuda, place=place)
    check_median_rounding(case, case.tokens(dtype), cuda, place=place)


# Every network, the numbers beside its size, and the counting beyond the largest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("views", [1, 2, 9, 10, 25, 26, 49, 50, 51, 64, 65, 130])
def test_bits_of_torch_median(views: int, dtype: torch.dtype, cuda: CudaOnHost) -> None:
    """With infinities and, in a quarter of the channels, NaN."""
    generator = torch.Generator().manual_seed(views)
    case = Ensemble((1, 1), (2, 2), ((0.0, 0.0),) * views, channels=64, batch=1, border="clamp")
    tokens = case.tokens(dtype)
    share = torch.rand(tokens.shape, generator=generator)
    tokens[share < 0.4] = float("inf")
    tokens[share < 0.2] = -float("inf")
    tokens[:, :, :, :16][share[:, :, :, :16] > 1 - 1 / views] = float("nan")
    field = cuda.ensemble(case, tokens, reduce="median")
    expected = tokens[:, 0, 0].median(0).values
    assert expected.isnan().any()
    for pixel in field[0].flatten(1).T:
        assert torch.equal(pixel.nan_to_num(7e4), expected.nan_to_num(7e4))


@each_dtype
@each_ensemble
def test_median_containment(case: Ensemble, dtype: torch.dtype, cuda: CudaOnHost) -> None:
    case = replace(case, weights=None)
    tokens = poison(case.tokens(dtype), 1)
    actual, expected = cuda.ensemble(case, tokens, reduce="median"), median_oracle(case, tokens)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def check_moments(case: Ensemble, tokens: torch.Tensor, cuda: CudaOnHost, **options: Any) -> None:
    check_moments_rounding(case, tokens, *cuda.ensemble(case, tokens, reduce="moments", **options))


def check_moments_rounding(
    case: Ensemble, tokens: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
) -> None:
    args, modes = case.call(tokens)
    true_mean, true_var = reference.ensemble_moments(*args, **modes)
    bounds = EnsembleBounds(case, tokens)
    assert_within_rounding(mean, true_mean, bounds.mean())
    assert_within_rounding(var, true_var, bounds.variance())


@each_dtype
@each_place
@each_ensemble
def test_moments(case: Ensemble, place: str, dtype: torch.dtype, cuda: CudaOnHost) -> None:
    check_moments(case, case.tokens(dtype), cuda, place=place)


def test_variance_beside_a_large_mean(cuda: CudaOnHost) -> None:
    case = replace(ENSEMBLES["real"], upsample="nearest")
    tokens = 1e4 + case.tokens()
    args, modes = case.call(tokens)
    _, var = cuda.ensemble(case, tokens, reduce="moments")
    truth = reference.ensemble_moments(*args, **modes)[1]
    assert ((var - truth).abs() <= 1e-5 * (1 + truth)).all()
    tokens[1, 0, :, 3] = float("inf")
    mean, var = cuda.ensemble(case, tokens, reduce="moments")
    truth, _ = reference.ensemble_moments(tokens, *args[1:], **modes)
    assert torch.equal(mean.isinf(), truth.isinf())
    assert torch.equal(var.isnan(), truth.isinf())


STREAMS = {"mean": RunningMean, "moments": RunningMoments, "median": RunningMedian}


@each_dtype
@each_place
@pytest.mark.parametrize("reduce", STREAMS)
@each_ensemble
def test_streams_equal_those_of_the_cpu(
    case: Ensemble, reduce: str, place: str, dtype: torch.dtype, cuda: CudaOnHost
) -> None:
    """Chunks of 1, 3 and then 2 views; what each cell has got, and the state itself."""
    if reduce == "median":
        case = replace(case, weights=None)
    (tokens, offsets, grid, patch, weights), modes = case.call(case.tokens(dtype))
    running, state = STREAMS[reduce](grid, patch, **modes), State()
    ends = [0, 1, *range(4, len(offsets) + 2, 2)]
    for part in itertools.starmap(slice, itertools.pairwise(ends)):
        if part.start >= len(offsets):
            break
        chunk = [tokens[part], offsets[part]]
        piece = replace(case, offsets=case.offsets[part])
        if weights is not None:
            chunk.append(weights[part])
            piece = replace(piece, weights=case.weights[part])
        running.update(*chunk)
        fields = cuda.ensemble(piece, tokens[part], reduce=reduce, state=state, place=place)
    *expected, seen = running._state.values()
    counted = seen > 0
    torch.testing.assert_close(state.seen.elements.view_as(seen), seen, rtol=1e-6, atol=0)
    fields = fields if reduce == "median" else fields.reshape(len(expected), *case.shape)
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    )
    for field, right in zip(fields, expected[0] if reduce == "median" else expected, strict=True):
        torch.testing.assert_close(field[..., counted], right[..., counted], **close)


def test_what_the_host_would_refuse_adds_nothing(cuda: CudaOnHost) -> None:
    """Weights on the device that a stream cannot hold, and offsets that are not finite."""
    case = replace(ENSEMBLES["one_view"], value_dtype=torch.float64)
    tokens, state = case.tokens(), State()
    cuda.ensemble(case, tokens, state=state)
    before, seen = state.out.elements.clone(), state.seen.elements.clone()
    for changes in (
        {"weights": (1e200,)},
        {"weights": (1e-200,)},
        {"weights": (float("nan"),)},
        {"offsets": ((float("nan"), 0.0),)},
    ):
        cuda.ensemble(replace(case, **changes), tokens, state=state, place="device, float64")
        assert torch.equal(state.out.elements, before)
        assert torch.equal(state.seen.elements, seen)


# ---- the ops ------------------------------------------------------------------------------------

OPS = """
import ctypes, sys, warnings
import pytest, torch
import srt_ext, test_ensemble, test_median, test_shift, test_streams
from samples import DTYPES, sample_ensembles, sample_shifts
from test_cuda_on_host import ALL_DTYPES, NOTHING, HostDevice, check_moments_rounding

torch.ops.load_library(sys.argv[1])  # in the place of the CPU kernels
library = ctypes.CDLL(sys.argv[1])
library.device.restype = ctypes.POINTER(HostDevice)
device = library.device().contents
device.stream = 0x5EED

def launches():
    count, device.launches = device.launches, 0
    return count

for dtype in DTYPES:
    for case in sample_ensembles().values():
        launches()
        tokens = case.tokens(dtype)
        test_ensemble.check_budget(case, tokens, test_ensemble.run(case, tokens))
        assert launches() == 5
    test_ensemble.test_out("stride", dtype, "")
for dtype in ALL_DTYPES:
    for case in sample_shifts().values():
        launches()
        image = case.image(dtype)
        test_shift.check_budget(case, image, test_shift.run(case, image))
        assert launches() == 1
for case in sample_ensembles().values():
    launches()
    tokens = case.tokens()
    test_median.check_median(case, tokens)
    assert launches() == 4
    args, modes = case.call(tokens)
    check_moments_rounding(case, tokens, *srt_ext.ensemble_moments(*args, **modes))
    assert launches() == 4
    test_streams.check(case, torch.bfloat16, [2, 1])
test_streams.check_uncovered(test_streams.TORCH)
test_streams.test_weights_of_chunks_count_against_each_other("")
for size in test_ensemble.SIZES:
    test_ensemble.test_exact_strides(*size, (2, 3))
assert not srt_ext.shift(torch.ones(1, 1, 4, 4), torch.tensor(NOTHING)).any()

tokens, offsets = torch.ones(2, 1, 6, 16), torch.zeros(2, 2)
launches()
for wrong in ({"out": tokens}, {"weights": torch.ones(3)}, {"upsample": "cubic"}):
    with pytest.raises(ValueError):
        srt_ext.ensemble(tokens, offsets, (2, 3), (4, 4), **wrong)
assert launches() == 0
# Numbers of any strides and dtypes.
expected = srt_ext.ensemble(tokens, offsets, (2, 3), (4, 4))
strided = torch.zeros(4, 6, dtype=torch.float64)[::2, 1:4:2]
assert torch.equal(srt_ext.ensemble(tokens, strided, (2, 3), (4, 4)), expected)
for ensemble in (torch.ops.srt.ensemble, srt_ext.ensemble):
    device.failing_launch = 2
    launches()
    with pytest.raises(RuntimeError, match="srt::ensemble: CUDA: unspecified launch failure"):
        ensemble(tokens, offsets, [2, 3], [4, 4])
assert library.live_guards() == 0
print("done")
"""


def test_ops(tmp_path: Path) -> None:
    """The glue, through the dispatcher; every tensor counts as one on the device."""
    torch_path = Path(torch.__file__).parent
    kernels = objects(without="host.cpp")
    flags = ("-O1", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    glue = compiled(STUB / "glue.cpp", tmp_path / "glue.o", *flags, f"-isystem{torch_path}/include")
    link = ("-Wl,-Bsymbolic", "-L", f"{torch_path}/lib", "-ltorch_cpu")
    library = linked([glue, *kernels], tmp_path / "ops.so", *link)
    path = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))
    result = subprocess.run(
        [sys.executable, "-c", OPS, str(library)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "done\n", result.stderr
