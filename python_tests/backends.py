"""Backends: every way to run the kernels, behind one interface that each test runs over.

- ``cpu-*``: the ops on the CPU, with the kernels of one instruction set.
- ``interp``: the CUDA sources, executed on the CPU. g++ compiles them with
  cuda_on_host/cuda_runtime.h.
- ``cuda``: the ops on a GPU.

Images, tokens, gradients and results are on the CPU. ``place`` selects where the offsets and
weights of a call are: "host" or "device", one value for both or a pair. Their dtype is that of the
case.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
    string_at,
)
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import (
    BORDERS,
    DTYPES,
    INTERPOLATIONS,
    PADDINGS,
    REDUCES,
    UPSAMPLES,
    Ensemble,
    Shift,
    Windows,
)

import srt_ext

ROOT = Path(__file__).resolve().parents[1]
STUB = Path(__file__).parent / "cuda_on_host"
SOURCES = ROOT / "csrc" / "srt"

Place = str | tuple[str, str]
Chunks = Sequence[tuple[Ensemble, torch.Tensor]]
PLANES = {"mean": 1, "moments": 2, "median": 8}  # in the state of a stream


def _placed(place: Place) -> tuple[str, str]:
    return (place, place) if isinstance(place, str) else place


# ---- the ops ------------------------------------------------------------------------------------


def buffer(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory filled with 7, and an output inside it with a guard on every side."""
    b, c, h, w = shape
    sizes, inner, order = {
        "contiguous": ((b + 2, c, h, w), (slice(1, -1),), (0, 1, 2, 3)),
        "channels_last": ((b + 2, h, w, c), (slice(1, -1),), (0, 3, 1, 2)),
        "padded": ((b + 2, h + 2, w + 2, c + 2), (slice(1, -1),) * 4, (0, 3, 1, 2)),
        # Strides of 2 and 3 elements, and a permuted order of the axes.
        "steps": (
            (3 * w + 3, b + 2, 2 * c + 2, h + 2),
            (slice(1, -2, 3), slice(1, -1), slice(1, -1, 2), slice(1, -1)),
            (1, 2, 3, 0),
        ),
    }[layout]
    whole = torch.full(sizes, 7.0, dtype=dtype, device=device)
    return whole, whole[inner].permute(order)


def empty_state(
    case: Ensemble, reduce: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The empty state of a stream.

    Returns:
        fields [planes, B, C, H', W'], weight or count [H', W'], and both as the arguments of an op.
    """
    fields = torch.zeros(PLANES[reduce], *case.shape, dtype=dtype, device=device)
    weight = torch.zeros(case.shape[2:], dtype=torch.float64, device=device)
    return fields, weight, [*([fields] if reduce == "median" else fields), weight]


LAYOUTS = ("contiguous", "channels_last", "padded", "steps")


class Ops:
    """The ops, on the CPU or on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.places = ("host",) if device == "cpu" else ("host", "device")

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor to the device; strides and storage offset are kept."""
        if self.device == "cpu":
            return tensor
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        storage = storage.to(self.device)
        return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def call(
        self, case: Ensemble | Shift | Windows, data: torch.Tensor, place: Place = "host"
    ) -> tuple[list[Any], dict[str, Any]]:
        """Returns the arguments and keyword arguments of an op."""
        (data, *rest), modes = case.call(data)
        places = dict(zip((0, len(rest) - 1), _placed(place), strict=False))
        for i, where in places.items():
            if where == "device" and rest[i] is not None:
                rest[i] = self.put(rest[i])
        return [self.put(data), *rest], modes

    def assert_same(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Asserts bitwise equality; on a GPU closeness, because the order of sums may differ."""
        if self.device == "cpu":
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, equal_nan=True)

    def ensemble(
        self,
        case: Ensemble,
        tokens: torch.Tensor,
        *,
        reduce: str = "mean",
        place: Place = "host",
        layout: str | None = None,
    ) -> torch.Tensor:
        """Returns [B, C, H', W'], for moments [2, B, C, H', W'].

        With a ``layout`` the result is written to an ``out=`` of that layout between guards.
        """
        args, modes = self.call(case.fit(reduce), tokens, place)
        if reduce == "moments":
            return torch.stack(srt_ext.ensemble_moments(*args, **modes)).cpu()
        modes["reduce"] = reduce
        if layout is None:
            return srt_ext.ensemble(*args, **modes).cpu()
        whole, out = buffer(case.shape, tokens.dtype, layout, self.device)
        assert srt_ext.ensemble(*args, **modes, out=out.fill_(torch.nan)) is out
        field = out.cpu().clone()
        out.fill_(7)
        assert (whole == 7).all()
        return field

    def shift(self, case: Shift, image: torch.Tensor, *, place: Place = "host") -> torch.Tensor:
        """Returns the views [V, B, C, H, W]."""
        args, modes = self.call(case, image, place)
        views = srt_ext.shift(*args, **modes)
        assert views.is_contiguous()
        return views.cpu()

    def mean_backward(
        self, case: Ensemble, grad: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """The gradient [V, B, N, C] of tokens, for ``grad`` [B, C, H', W'] of their mean."""
        args, modes = self.call(case, case.tokens(grad.dtype), place)
        args[0].requires_grad_()
        field = srt_ext.ensemble(*args, **modes)
        return torch.autograd.grad(field, args[0], self.put(grad))[0].cpu()

    def shift_backward(
        self, case: Shift, grad: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """The gradient [B, C, H, W] of an image, for ``grad`` [V, B, C, H, W] of its views."""
        args, modes = self.call(case, torch.zeros(grad.shape[1:], dtype=grad.dtype), place)
        args[0].requires_grad_()
        return torch.autograd.grad(srt_ext.shift(*args, **modes), args[0], self.put(grad))[0].cpu()

    def windows(self, case: Windows, image: torch.Tensor, *, place: Place = "host") -> torch.Tensor:
        """Returns the windows [B, N, C, Ph, Pw]."""
        args, modes = self.call(case, image, place)
        result = srt_ext.windows(*args, **modes)
        assert result.is_contiguous()
        return result.cpu()

    def windows_backward(
        self, case: Windows, grad: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """The gradient [B, C, H, W] of an image, for ``grad`` [B, N, C, Ph, Pw] of its windows."""
        args, modes = self.call(case, case.image(grad.dtype), place)
        args[0] = args[0].requires_grad_()
        result = srt_ext.windows(*args, **modes)
        return torch.autograd.grad(result, args[0], self.put(grad))[0].cpu()

    def windows_points(
        self, case: Windows, grad: torch.Tensor, image: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """Returns the gradients of centers and scales of all windows, [2, B, N, 2] in float64."""
        (image, centers, _, scale), modes = self.call(case, image, place)
        op = torch.ops.srt._windows_backward_points
        return torch.stack(op(self.put(grad), image, centers, scale, **modes)).cpu()

    def stream(
        self, chunks: Chunks, reduce: str, *, place: Place = "host"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the state: fields [planes, B, C, H', W'], and the weight or count [H', W']."""
        case, tokens = chunks[0]
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        fields, weight, state = empty_state(case, reduce, dtype, self.device)
        for case, tokens in chunks:
            args, modes = self.call(case.fit(reduce), tokens, place)
            args = args[:4] if reduce == "median" else args
            getattr(torch.ops.srt, f"accumulate_{reduce}_")(*state, *args, **modes)
        return fields.cpu(), weight.cpu()


# ---- the CUDA sources, executed on the CPU ------------------------------------------------------

GUARD = 512  # bytes on each side of a buffer; wider than any access
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
        ("total_weight", c_void_p),
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


class WindowsArgs(Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("image", c_void_p),
        ("batch", c_int64),
        ("channels", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("image_strides", c_int64 * 4),
        ("count", c_int64),
        ("size", c_int64 * 2),
        ("centers", c_void_p),
        ("scale", c_void_p),
        ("scale_of_each", c_bool),
        ("padding", c_int32),
        ("out", c_void_p),
    )


class ViewArray(Structure):
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
    """A flat buffer of ``count`` elements between guards; all bytes are 0xff, which is NaN.

    An out-of-bounds read shows in the result, an out-of-bounds write in the guards. ``skip``
    elements before the buffer misalign it.
    """

    def __init__(self, count: int, dtype: torch.dtype, skip: int = 0) -> None:
        size = dtype.itemsize
        self.bytes = torch.full((2 * GUARD + (count + skip) * size,), 0xFF, dtype=torch.uint8)
        assert self.bytes.data_ptr() % 64 == 0
        self.begin, self.end = GUARD + skip * size, GUARD + (skip + count) * size
        self.elements = self.bytes[self.begin : self.end].view(dtype) if count else None

    @classmethod
    def copy(cls, tensor: torch.Tensor) -> Guarded:
        """Copies the memory that ``tensor`` spans, at the alignment of its storage offset."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        guarded = cls(span, tensor.dtype, tensor.storage_offset() % 64)
        guarded.elements.copy_(tensor.as_strided((span,), (1,)))
        return guarded

    def intact(self) -> bool:
        guards = torch.cat([self.bytes[: self.begin], self.bytes[self.end :]])
        return bool((guards == 0xFF).all())

    def pointer(self) -> int:
        return self.bytes.data_ptr() + self.begin


class Values:
    """Offsets or weights: float64 on the host, or in their own dtype "on the device"."""

    def __init__(self, values: torch.Tensor | None, place: str) -> None:
        self.struct = ViewArray()
        if values is None:
            return
        if place == "host":
            self.values = values.double().contiguous()
            self.struct.host = ctypes.cast(self.values.data_ptr(), POINTER(c_double))
            return
        self.buffer = Guarded.copy(values.contiguous())
        self.struct.device = self.buffer.pointer()
        self.struct.dtype = CODES[values.dtype]


class CudaOnHost:
    """The CUDA kernels, called as csrc/torch calls them.

    Each call checks that every element of the output is written once.
    """

    device = "cpu"
    assert_same = Ops.assert_same
    places = ("host", "device")

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.device.restype = POINTER(HostDevice)
        windows = ("windows", "windows_backward_image", "windows_backward_points")
        for name in ("ensemble", "shift", "mean_backward", "shift_backward", *windows):
            getattr(library, name).restype = c_char_p
        self.gaps: list[tuple[int, int]] = []  # in the workspace: address and bytes
        self._gap = CFUNCTYPE(None, c_void_p, c_int64)(lambda *gap: self.gaps.append(gap))
        library.watch_workspace(self._gap)
        self.reset()

    @property
    def gpu(self) -> Any:
        """The properties of the simulated GPU."""
        return self.library.device().contents

    def reset(self) -> None:
        self.gpu.processors = 1
        self.gpu.max_grid = 2**31 - 1
        self.gpu.l2_bytes = 0
        self.gpu.failing_launch = -1
        self.gpu.stream = 0x5EED

    def _run(self, function: Any, args: Structure, values: list[Values], out: Guarded) -> None:
        structs = [byref(v.struct) for v in values]
        size = c_int64(-1)
        error = function(byref(args), *structs, None, byref(size))
        if error:
            raise RuntimeError(error.decode())
        workspace = Guarded(max(size.value, 1), torch.uint8)
        writes = torch.zeros(max(out.end - out.begin, 1), dtype=torch.uint8)
        gpu = self.gpu
        self.gaps.clear()
        gpu.launches = 0
        gpu.watched, gpu.watched_bytes = out.pointer(), out.end - out.begin
        gpu.writes, gpu.outside, gpu.evict_first = writes.data_ptr(), 0, 0
        error = function(byref(args), *structs, c_void_p(workspace.pointer()), byref(size))
        gpu.watched = None
        assert workspace.intact()
        assert all(string_at(*gap) == gap[1] * b"\xff" for gap in self.gaps)
        assert out.intact()
        assert gpu.outside == 0
        if error:
            raise RuntimeError(error.decode())
        self.writes = writes[: out.end - out.begin]

    def _arguments(self, case: Ensemble, reduce: str, tokens: torch.Tensor) -> EnsembleArgs:
        return EnsembleArgs(
            reduce=REDUCES.index(reduce),
            dtype=CODES[tokens.dtype],
            views=tokens.shape[0],
            batch=tokens.shape[1],
            channels=tokens.shape[3],
            token_strides=(c_int64 * 3)(*tokens.stride()[:3]),
            grid=(c_int64 * 2)(*case.grid),
            patch=(c_int64 * 2)(*case.patch),
            stride=(c_int64 * 2)(*case.stride),
            upsample=UPSAMPLES.index(case.upsample),
            border=BORDERS.index(case.border),
        )

    def _values(self, case: Ensemble, place: Place) -> list[Values]:
        (_, offsets, _, _, weights), _ = case.call(torch.empty(0))
        return [Values(v, p) for v, p in zip((offsets, weights), _placed(place), strict=True)]

    def ensemble(
        self,
        case: Ensemble,
        tokens: torch.Tensor,
        *,
        reduce: str = "mean",
        place: Place = "host",
        layout: str | None = None,
        state: tuple[Guarded, Guarded] | None = None,
    ) -> torch.Tensor:
        """As Ops.ensemble.

        "padded" has gaps of 16 elements after cells and rows. "padded" and "steps" are misaligned.
        With a ``state`` (fields and weight or count) the tokens are a chunk of a stream.
        """
        case = case.fit(reduce)
        b, c, h, w = case.shape
        cell = {"padded": c + 16, "steps": 2 * c + 1}.get(str(layout), c)
        row = cell * (w + (layout == "padded"))
        size, strides = b * h * row, (h * row, 2 if layout == "steps" else 1, row, cell)
        if layout == "contiguous":
            strides = (c * h * w, h * w, w, 1)
        source = Guarded.copy(tokens)
        if state:
            out, planes = state[0], PLANES[reduce]
        else:
            planes = 2 if reduce == "moments" else 1
            out = Guarded(planes * size, tokens.dtype, layout in ("padded", "steps"))
        dtype = out.elements.dtype
        args = self._arguments(case, reduce, tokens)
        args.tokens, args.out = source.pointer(), out.pointer()
        args.out_strides = (c_int64 * 4)(*strides)
        if reduce == "moments":
            args.variance = out.pointer() + size * dtype.itemsize
        args.total_weight = state[1].pointer() if state else None
        args.plane_stride = size
        self._run(self.library.ensemble, args, self._values(case, place), out)
        assert source.intact()
        # Every byte of an element must have been written once, and no other byte.
        shape, steps = (planes, *case.shape), (size, *strides)
        expected = torch.zeros(planes * size, dtype.itemsize, dtype=torch.uint8)
        steps_of_bytes = (*(s * dtype.itemsize for s in steps), 1)
        expected.as_strided((*shape, dtype.itemsize), steps_of_bytes).fill_(1)
        assert torch.equal(self.writes, expected.flatten())
        fields = out.elements.as_strided(shape, steps)
        return fields[0] if planes == 1 else fields

    def stream(
        self, chunks: Chunks, reduce: str, *, place: Place = "host"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Ops.stream. The state starts as NaN: a kernel must write it before it reads it."""
        case, tokens = chunks[0]
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        b, c, h, w = case.shape
        fields = Guarded(PLANES[reduce] * b * c * h * w, dtype)
        weight = Guarded(h * w, torch.float64)
        weight.elements.zero_()
        for case, tokens in chunks:
            result = self.ensemble(case, tokens, reduce=reduce, place=place, state=(fields, weight))
            assert weight.intact()
        return result.reshape(-1, *case.shape), weight.elements.view(h, w)

    def mean_backward(
        self, case: Ensemble, grad: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """As Ops.mean_backward."""
        if grad.stride(1) != 1:
            grad = grad.contiguous(memory_format=torch.channels_last)
        source = Guarded.copy(grad)
        views, (height, width) = len(case.offsets), case.grid
        tokens = torch.empty(views, case.batch, height * width, case.channels, dtype=grad.dtype)
        out = Guarded(tokens.numel(), grad.dtype, grad.storage_offset() % 64)
        args = self._arguments(case, "mean", tokens)
        args.out, args.out_strides = source.pointer(), (c_int64 * 4)(*grad.stride())
        call = functools.partial(self.library.mean_backward, c_void_p(out.pointer()))
        self._run(call, args, self._values(case, place), out)
        assert (self.writes == 1).all()
        return out.elements.reshape(tokens.shape)

    def _shift(
        self,
        call: Any,
        case: Shift,
        views: tuple[int, ...],
        place: Place,
        result: Guarded,
        **pointers: int,
    ) -> None:
        """``views``: the shape [V, B, C, H, W]."""
        offsets = torch.tensor(case.offsets, dtype=case.value_dtype)
        args = ShiftArgs(
            dtype=CODES[result.elements.dtype],
            planes=views[1] * views[2],
            height=views[3],
            width=views[4],
            views=views[0],
            padding=PADDINGS.index(case.padding),
            interpolation=INTERPOLATIONS.index(case.interpolation),
            **pointers,
        )
        self._run(call, args, [Values(offsets, _placed(place)[0])], result)
        assert (self.writes == 1).all()

    def shift(self, case: Shift, image: torch.Tensor, *, place: Place = "host") -> torch.Tensor:
        """As Ops.shift."""
        source = Guarded.copy(image.contiguous())
        shape = (len(case.offsets), *image.shape)
        out = Guarded(shape[0] * image.numel(), image.dtype, image.storage_offset() % 64)
        pointers = {"image": source.pointer(), "out": out.pointer()}
        self._shift(self.library.shift, case, shape, place, out, **pointers)
        return out.elements.reshape(shape)

    def shift_backward(
        self, case: Shift, grad: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """As Ops.shift_backward."""
        source = Guarded.copy(grad.contiguous())
        out = Guarded(grad[0].numel(), grad.dtype, grad.storage_offset() % 64)
        call = functools.partial(self.library.shift_backward, c_void_p(out.pointer()))
        self._shift(call, case, grad.shape, place, out, out=source.pointer())
        return out.elements.reshape(grad.shape[1:])

    def _windows(
        self,
        call: Any,
        case: Windows,
        given: torch.Tensor,
        place: Place,
        result: Guarded,
        **pointers: int,
    ) -> None:
        """``given``: an image [B, C, H, W] with the shape and strides of the call."""
        (_, centers, window, scale), _ = case.call(given)
        args = WindowsArgs(
            dtype=CODES[given.dtype],
            **dict(zip(("batch", "channels", "height", "width"), given.shape, strict=True)),
            image_strides=(c_int64 * 4)(*given.stride()),
            count=centers.shape[1],
            size=(c_int64 * 2)(*window),
            scale_of_each=scale is not None and scale.dim() == 3,
            padding=PADDINGS.index(case.padding),
            **pointers,
        )
        places = zip((centers, scale), _placed(place), strict=True)
        self._run(call, args, [Values(*values) for values in places], result)
        assert (self.writes == 1).all()

    def windows(self, case: Windows, image: torch.Tensor, *, place: Place = "host") -> torch.Tensor:
        """As Ops.windows."""
        source = Guarded.copy(image)
        out = Guarded(math.prod(case.shape), image.dtype, image.storage_offset() % 64)
        pointers = {"image": source.pointer(), "out": out.pointer()}
        self._windows(self.library.windows, case, image, place, out, **pointers)
        return out.elements.reshape(case.shape)

    def windows_backward(
        self, case: Windows, grad: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """As Ops.windows_backward."""
        source = Guarded.copy(grad.contiguous())
        image = torch.empty(case.batch, case.channels, *case.size, dtype=grad.dtype)
        out = Guarded(image.numel(), grad.dtype, grad.storage_offset() % 64)
        call = functools.partial(self.library.windows_backward_image, c_void_p(out.pointer()))
        self._windows(call, case, image, place, out, out=source.pointer())
        return out.elements.reshape(image.shape)

    def windows_points(
        self, case: Windows, grad: torch.Tensor, image: torch.Tensor, *, place: Place = "host"
    ) -> torch.Tensor:
        """As Ops.windows_points."""
        source, sources = Guarded.copy(image), Guarded.copy(grad.contiguous())
        shape = (2, *case.shape[:2], 2)
        out = Guarded(math.prod(shape), torch.float64)
        results = (c_void_p(out.pointer() + i * math.prod(shape[1:]) * 8) for i in (0, 1))
        call = functools.partial(self.library.windows_backward_points, *results)
        pointers = {"image": source.pointer(), "out": sources.pointer()}
        self._windows(call, case, image, place, out, **pointers)
        return out.elements.reshape(shape)


def compiled(source: Path, to: Path, *flags: str) -> Path:
    usual = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Werror -Wno-unknown-pragmas"
    command = ["g++", *usual.split(), "-I", STUB, *flags, "-c", "-x", "c++", source, "-o", to]
    subprocess.run(command, check=True)
    return to


def linked(objects: Iterable[Path], to: Path, *flags: str) -> Path:
    subprocess.run(["g++", "-shared", *objects, *flags, "-o", to], check=True)
    return to


@functools.cache
def objects() -> dict[str, Path]:
    """Compiles the CUDA sources and returns their object files by source name.

    The files are cached for the next run, in a folder named after the hash of the sources.
    """
    if shutil.which("g++") is None or not SOURCES.is_dir():
        pytest.skip("needs g++ and the sources")
    flag = "-O1"
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + flag.encode())
    for path in sorted(p for folder in (SOURCES, STUB) for p in folder.rglob("*") if p.is_file()):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir(), f"srt_ext-tests-{os.getuid()}")
    cache.mkdir(mode=0o700, exist_ok=True)
    assert cache.stat().st_uid == os.getuid()
    folder = cache / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    cuda = sorted((SOURCES / "cuda").glob("*.cu"))
    sources = [*cuda, SOURCES / "validation.cpp", STUB / "host.cpp"]
    built = {source.name: folder / f"{source.name}.o" for source in sources}
    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of pytest-xdist wait here
        if not (folder / "done").exists():
            list(pool.map(lambda source: compiled(source, built[source.name], flag), sources))
            (folder / "done").touch()
    return built


def compile_in_background() -> None:
    """Compiles the CUDA sources in a thread, while the first tests run."""

    def compile_() -> None:
        # A test that needs the objects compiles them again, and reports the error.
        with suppress(pytest.skip.Exception, subprocess.CalledProcessError):
            objects()

    threading.Thread(target=compile_).start()


@functools.cache
def host_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(linked(objects().values(), Path(folder, "host.so"))))


# ---- available backends -------------------------------------------------------------------------

Backend = Ops | CudaOnHost

CPU = [f"cpu-{name}" for name in torch.ops.srt._available_cpu_kernels().split(",")]
INTERP = pytest.param("interp", marks=pytest.mark.interp)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
ALL = [*map(pytest.param, CPU), INTERP, CUDA]


def each_kernel(*kernels: str, backends: Sequence[Any] = ALL) -> pytest.MarkDecorator:
    """Parametrises a test over all pairs of kernel and backend."""
    params = [
        pytest.param(kernel, *backend.values, marks=backend.marks)
        for kernel in kernels
        for backend in backends
    ]
    return pytest.mark.parametrize(("kernel", "backend"), params, indirect=["backend"])


GPU = [INTERP, CUDA]
each_gpu = pytest.mark.parametrize("backend", GPU, indirect=True)
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
each_place = pytest.mark.parametrize(
    ("device", "place"),
    [
        ("cpu", "host"),
        pytest.param("cuda", "host", marks=pytest.mark.cuda),
        pytest.param("cuda", "device", marks=pytest.mark.cuda),
    ],
)


@contextmanager
def opened(name: str) -> Iterator[Backend]:
    kind, _, variant = name.partition("-")
    if kind == "cpu":
        torch.ops.srt._force_cpu_kernels(variant)
        assert torch.ops.srt._cpu_kernels() == variant
        yield Ops("cpu")
        torch.ops.srt._force_cpu_kernels("auto")
    elif kind == "interp":
        kernels = CudaOnHost(host_library())
        yield kernels
        kernels.reset()
    else:
        yield Ops("cuda")
