"""srt_ext.numpy: the bits of the ops, the arrays it takes and refuses, threads, forks, no torch."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_errors
import torch
from bounds import EnsembleBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, Ensemble, Shift, ensembles, sample_ensembles, sample_shifts, shifts
from test_errors import TABLE, Wrong

import srt_ext
from srt_ext import reference

srt = pytest.importorskip("srt_ext.numpy", exc_type=ImportError)
PACKAGE = Path(srt_ext.__file__).parent
try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

ENSEMBLES, SHIFTS = sample_ensembles(), sample_shifts()
HERE = DTYPES if bfloat16 else tuple(d for d in DTYPES if d != torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", HERE, ids=str)
each_ensemble = pytest.mark.parametrize("case", ENSEMBLES.values(), ids=ENSEMBLES.keys())
each_shift = pytest.mark.parametrize("case", SHIFTS.values(), ids=SHIFTS.keys())


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory, with the same strides."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(bfloat16)
    return tensor.numpy()


def tensor(values: np.ndarray[Any, Any]) -> torch.Tensor:
    if bfloat16 is not None and values.dtype == bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def assert_same_bits(actual: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == array(expected).dtype
    assert actual.tobytes() == array(expected).tobytes()


def arrays(values: Any) -> Any:
    """Tensors among arguments, as arrays."""
    if isinstance(values, torch.Tensor):
        return array(values)
    if isinstance(values, dict):
        return {key: arrays(value) for key, value in values.items()}
    return tuple(map(arrays, values)) if isinstance(values, tuple) else values


@pytest.fixture(params=srt._numpy.available_cpu_kernels().split(","))
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set, for the ops of torch and here."""
    assert srt._numpy.force_cpu_kernels(request.param)
    torch.ops.srt._force_cpu_kernels(request.param)
    yield request.param
    srt._numpy.force_cpu_kernels("auto")
    torch.ops.srt._force_cpu_kernels("auto")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = srt.get_num_threads()
    yield srt.set_num_threads
    srt.set_num_threads(before)


# ---- the bits of the ops ------------------------------------------------------------------------


def check_ensemble(case: Ensemble, dtype: torch.dtype) -> None:
    tokens = case.tokens(dtype)
    args, modes = case.call(tokens)
    field = srt.ensemble(*arrays(args), **modes)
    expected = srt_ext.ensemble(*args, **modes)
    assert_same_bits(field, expected)
    if field.size:  # otherwise NumPy makes all of them 0
        assert field.strides == tuple(s * field.itemsize for s in expected.stride())
    for ours, theirs in zip(
        srt.ensemble_moments(*arrays(args), **modes),
        srt_ext.ensemble_moments(*args, **modes),
        strict=True,
    ):
        assert_same_bits(ours, theirs)
    (*args, _), modes = case.call(tokens)
    median = srt.ensemble(*arrays(tuple(args)), **modes, reduce="median")
    assert_same_bits(median, srt_ext.ensemble(*args, **modes, reduce="median"))


def check_shift(case: Shift, dtype: torch.dtype) -> None:
    args, modes = case.call(case.image(dtype))
    views = srt.shift(*arrays(args), **modes)
    assert_same_bits(views, srt_ext.shift(*args, **modes))
    assert views.flags.c_contiguous


@each_dtype
@each_ensemble
def test_ensemble_has_the_bits_of_the_op(case: Ensemble, dtype: torch.dtype, kernels: str) -> None:
    check_ensemble(case, dtype)


@given(ensembles(), st.sampled_from(HERE))
def test_any_ensemble_has_the_bits_of_the_op(case: Ensemble, dtype: torch.dtype) -> None:
    check_ensemble(case, dtype)


@pytest.mark.parametrize("dtype", [*HERE, torch.uint8], ids=str)
@each_shift
def test_shift_has_the_bits_of_the_op(case: Shift, dtype: torch.dtype, kernels: str) -> None:
    check_shift(case, dtype)


@given(shifts(), st.sampled_from([*HERE, torch.uint8]))
def test_any_shift_has_the_bits_of_the_op(case: Shift, dtype: torch.dtype) -> None:
    check_shift(case, dtype)


@each_dtype
@each_ensemble
def test_ensemble_against_the_oracle(case: Ensemble, dtype: torch.dtype) -> None:
    tokens = case.tokens(dtype)
    args, modes = case.call(tokens)
    field = tensor(srt.ensemble(*arrays(args), **modes))
    truth = reference.ensemble(*args, **modes)
    if dtype == torch.float64:
        assert_within_rounding(field, truth, EnsembleBounds(case, tokens).mean())
    else:
        float32 = reference.ensemble(*args, **modes, dtype=torch.float32)
        assert_within_budget(field, truth, float32.to(dtype))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_sizes_0_and_1(shape: tuple[int, int]) -> None:
    case = Ensemble((2, 1), (2, 3), ((0.0, 0.5),), channels=shape[1], batch=shape[0])
    check_ensemble(case, torch.float32)
    out = np.empty(case.shape, np.float32)
    args, modes = arrays(case.call(case.tokens()))
    assert srt.ensemble(*args, **modes, out=out) is out
    for size in ((0, 4), (4, 0), (1, 1)):
        check_shift(Shift(size, batch=shape[0], channels=shape[1]), torch.float32)


def test_a_result_that_gets_its_pages_first(threads: Callable[[int], None]) -> None:
    """Of 34 MB and no whole number of pages: the same bits as in a buffer that has them."""
    tokens = torch.randn(3, 1, 100, 377)
    args = (tokens, torch.tensor([[0.0, 1.0], [2.5, -1.0], [-1.0, 0.25]]), (10, 10), (15, 15))
    expected = srt_ext.ensemble(*args)
    for count in (1, 3):
        threads(count)
        field = srt.ensemble(*arrays(args))
        assert field.nbytes > 2**25
        assert field.nbytes % 4096
        assert_same_bits(field, expected)


# ---- offsets and weights ------------------------------------------------------------------------


def test_numbers_of_every_kind() -> None:
    case = replace(ENSEMBLES["weights"], offsets=((0.0, 1.0), (2.0, -3.0), (-1.0, 0.0), (0.0, 0.0)))
    case = replace(case, weights=(1.0, 0.0, 2.0, 3.0))
    (tokens, *_), modes = arrays(case.call(case.tokens()))
    place = (case.grid, case.patch)
    expected = srt.ensemble(tokens, case.offsets, *place, case.weights, **modes)
    offsets, weights = np.array(case.offsets), np.array(case.weights)
    wide = np.zeros((8, 6))
    wide[::2, 1:4:2] = offsets
    packed = np.zeros(4, np.dtype([("byte", "u1"), ("pair", "f4", 2)]))
    packed["pair"] = offsets
    read_only = offsets.astype(np.float32)
    read_only.flags.writeable = False
    for numbers in (
        offsets,
        read_only,
        offsets.astype(">f4"),
        np.asfortranarray(offsets),
        wide[::2, 1:4:2],
        offsets[::-1].copy()[::-1],
        packed["pair"],
        [[int(y), int(x)] for y, x in case.offsets],
        list(map(list, case.offsets)),
        [(np.float64(y), int(x)) for y, x in case.offsets],
    ):
        for shares in (weights, weights.astype(">f8"), list(case.weights), [1, 0, 2, 3]):
            field = srt.ensemble(tokens, numbers, *place, shares, **modes)
            assert field.tobytes() == expected.tobytes()


NUMBERS = "must be float32 or float64, or numbers in sequences"


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (np.zeros((2, 2), np.int64), TypeError, "int64"),
        (np.zeros((2, 2), np.float16), TypeError, "float16"),
        (np.zeros((2, 2), np.longdouble), TypeError, str(np.dtype(np.longdouble))),
        (np.zeros((2, 2), object), TypeError, "object"),
        ([["1", "2"]], TypeError, "<U1"),
        ("12", TypeError, "<U2"),
        ([[True, False]], TypeError, "bool"),
        ([[1j, 0]], TypeError, "complex128"),
        ([[10**30, 0]], TypeError, "object"),
        ([[None, 0]], TypeError, "object"),
        ([[0, 1], [0]], ValueError, "rows that make no array"),
        (None, TypeError, "NoneType"),
        (1.5, TypeError, "float"),
        ({(0, 0)}, TypeError, "set"),
        (torch.zeros(2, 2), TypeError, "Tensor"),
    ],
    ids=str,
)
def test_what_is_no_number(value: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=re.escape(f"srt::shift: offsets {NUMBERS}; got {got}")):
        srt.shift(np.zeros((1, 1, 2, 2)), value)
    if value is not None:
        with pytest.raises(error, match=re.escape(f"srt::ensemble: weights {NUMBERS}; got {got}")):
            srt.ensemble(np.zeros((2, 1, 1, 1)), [(0, 0)] * 2, (1, 1), (1, 1), value)


# ---- arrays of tokens ---------------------------------------------------------------------------


@given(
    ensembles(),
    st.sampled_from(HERE),
    st.tuples(*(st.sampled_from((1, 2, -1, -3)) for _ in range(3))),
    st.permutations(range(3)),
    st.booleans(),
)
def test_strides_of_tokens(
    case: Ensemble, dtype: torch.dtype, steps: tuple[int, ...], order: list[int], one_view: bool
) -> None:
    """Any order of V, B and N, forwards and backwards, with gaps; all views from one memory."""
    tokens = array(case.tokens(dtype).contiguous())
    if one_view:
        tokens = np.broadcast_to(tokens[:1], tokens.shape)
    sizes = [abs(step) * size for step, size in zip(steps, tokens.shape, strict=False)]
    wide = np.full([*(sizes[d] for d in order), case.channels + 3], np.nan, tokens.dtype)
    strided = wide.transpose([*np.argsort(order), 3])
    strided = strided[tuple(slice(None, None, step) for step in steps)][..., 1:-2]
    strided[...] = tokens
    if one_view:
        strided = np.broadcast_to(strided[:1], tokens.shape)
    strided.flags.writeable = False
    (_, *rest), modes = arrays(case.call(case.tokens()))
    expected = srt.ensemble(np.ascontiguousarray(tokens), *rest, **modes)
    assert srt.ensemble(strided, *rest, **modes).tobytes() == expected.tobytes()


def test_tokens_are_read_in_place() -> None:
    """40 MB of them, of which a copy would show; and a file, read through the memory."""
    tokens = np.ones((10, 1, 16 * 17, 4096), np.float32)[:, :, 16:]
    tokens.flags.writeable = False
    args = (tokens, [(0, 0)] * 10, (16, 16), (4, 4))
    running = srt.RunningMean((16, 16), (4, 4), stride=64)
    running.update(*args[:2])  # allocates its state
    calls = (
        lambda: srt.ensemble(*args, stride=64),
        lambda: srt.ensemble(*args, stride=64, reduce="median"),
        lambda: srt.ensemble_moments(*args, stride=64),
        lambda: running.update(*args[:2]),
    )
    for call in calls:
        tracemalloc.start()
        call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


def test_a_memory_map(tmp_path: Path) -> None:
    case = ENSEMBLES["grid"]
    args, modes = case.call(case.tokens())
    array(args[0]).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", np.float32, "r", shape=args[0].shape)
    assert_same_bits(
        srt.ensemble(tokens, *arrays(args)[1:], **modes), srt_ext.ensemble(*args, **modes)
    )


def unaligned(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


def packed(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """float32 rows of the last dimension, a byte before each."""
    *lead, last = shape
    return np.zeros(lead, np.dtype([("byte", "u1"), ("row", "f4", last)]))["row"]


TOKENS, OUT = (2, 1, 6, 3), (1, 3, 8, 15)  # of call()
ORDER = "must have the byte order of this machine; got >f4"


def call(**changes: Any) -> dict[str, Any]:
    usual = {
        "tokens": np.ones(TOKENS, np.float32),
        "offsets": [(0, 0)] * 2,
        "grid": (2, 3),
        "patch": (4, 5),
    }
    return {**usual, **changes}


memory = np.ones(2 * 6 * 3 + 8 * 15 * 3, np.float32)


def read_only() -> np.ndarray[Any, Any]:
    out = np.zeros(OUT, np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, f"tokens {ORDER}", {"tokens": np.ones(TOKENS, ">f4")}),
        (
            TypeError,
            "out must have the dtype of tokens, float32; got >f4",
            {"out": np.zeros(OUT, ">f4")},
        ),
        (
            ValueError,
            "tokens must be aligned to its elements, of 4",
            {"tokens": unaligned(TOKENS, "f4")},
        ),
        (ValueError, "out must be aligned to its elements, of 4", {"out": unaligned(OUT, "f4")}),
        (
            ValueError,
            "tokens must have strides of whole elements, 4 bytes each; "
            "got strides of [78, 78, 13, 4] bytes",
            {"tokens": packed(TOKENS)},
        ),
        (ValueError, "out must be writable; got a read-only array", {"out": read_only()}),
        (
            ValueError,
            "tokens must be dense in the last dimension; got stride -1",
            {"tokens": np.ones(TOKENS, np.float32)[..., ::-1]},
        ),
        (
            ValueError,
            "out must not overlap itself (each stride must step over what the smaller ones span); "
            "got strides [360, 120, -15, 1]",
            {"out": np.zeros(OUT, np.float32)[:, :, ::-1]},
        ),
        (
            ValueError,
            "out must not share memory with tokens; got a view of the same memory",
            {"tokens": memory[:36].reshape(TOKENS)[::-1], "out": memory[35:395].reshape(OUT)},
        ),
        (TypeError, "tokens must be a numpy.ndarray without a mask; got list", {"tokens": [[1.0]]}),
        (
            TypeError,
            "tokens must be a numpy.ndarray without a mask; got MaskedArray",
            {"tokens": np.ma.ones(TOKENS)},
        ),
        (
            TypeError,
            "offsets must be a numpy.ndarray without a mask; got MaskedArray",
            {"offsets": np.ma.zeros((2, 2))},
        ),
        (
            TypeError,
            "tokens must be a numpy.ndarray without a mask; got Tensor",
            {"tokens": torch.ones(TOKENS)},
        ),
        (TypeError, "out must be a numpy.ndarray without a mask; got list", {"out": []}),
        (TypeError, "grid must be two integers >= 1, (y, x); got (2.0, 3)", {"grid": (2.0, 3)}),
        (TypeError, "stride must be two integers >= 1, (y, x); got True", {"stride": True}),
        (ValueError, f"patch must be below 2^63; got [4, {2**63}]", {"patch": (4, 2**63)}),
        (TypeError, "border must be a string; got NoneType", {"border": None}),
        (TypeError, "reduce must be a string; got int", {"reduce": 1}),
        (
            ValueError,
            "upsample must be one of 'nearest', 'bilinear'; got '\udc80'",
            {"upsample": "\udc80"},
        ),
    ],
)
def test_arrays_that_are_refused(
    error: type[Exception], message: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        srt.ensemble(**call(**changes))
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"srt::ensemble: {message}")


def test_memory_beside_the_output_is_allowed() -> None:
    """The neighbour of the shared memory that is refused; numbers of numpy are integers, too."""
    tokens, out = memory[:36].reshape(TOKENS)[::-1], memory[36:396].reshape(OUT)
    grid = (np.int64(2), np.uint8(3))
    assert srt.ensemble(**call(tokens=tokens, out=out, grid=grid, stride=np.int32(1))) is out
    assert (out == 1).all()


def test_images_of_any_memory() -> None:
    """One that is not dense, or not aligned, is copied; one of the other byte order is refused."""
    image = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)
    offsets = [(0.5, -1), (-2, 0.25)]
    expected = srt.shift(image, offsets)
    aside = unaligned(image.shape, "f4")
    aside[...] = image
    rows = packed(image.shape)
    rows[...] = image
    backwards = image[:, ::-1, :, ::-1].copy()[:, ::-1, :, ::-1]
    for same in (aside, rows, backwards, np.asfortranarray(image)):
        assert same.tobytes() == image.tobytes()
        same.flags.writeable = False
        assert srt.shift(same, offsets).tobytes() == expected.tobytes()
    with pytest.raises(TypeError, match=f"srt::shift: image {ORDER}"):
        srt.shift(image.astype(">f4"), offsets)


@pytest.mark.parametrize("layout", ["C", "channels last", "a part"])
def test_out_of_any_strides(layout: str) -> None:
    case = ENSEMBLES["stride"]
    args, modes = case.call(case.tokens())
    batch, channels, height, width = case.shape
    whole = np.full((batch, channels, height, width), np.nan, np.float32)
    out = whole
    if layout == "channels last":
        whole = np.full((batch, height, width, channels), np.nan, np.float32)
        out = whole.transpose(0, 3, 1, 2)
    elif layout == "a part":
        whole = np.full((batch + 1, 2 * channels, height + 2, 3 * width), np.nan, np.float32)
        out = whole[1:, ::2, 2:, 1::3]
    expected = srt_ext.ensemble(*args, **modes)
    assert srt.ensemble(*arrays(args), **modes, out=out) is out
    assert_same_bits(out, expected)
    assert np.isfinite(whole).sum() == out.size


# ---- the errors of the ops ----------------------------------------------------------------------


def has_no_array(case: Wrong) -> bool:
    values = [value for value in case.changes.values() if isinstance(value, torch.Tensor)]
    return bfloat16 is None and any(value.dtype == torch.bfloat16 for value in values)


def through_numpy(case: Wrong) -> None:
    arguments = arrays(case.arguments())
    if case.op in test_errors.STATES:
        state = [arguments.pop(name) for name in test_errors.STATES[case.op]()]
        modes = {"upsample": "bilinear", "border": "coverage", "stride": 1, "weights": None}
        modes.update(arguments)
        views = [modes[name] for name in ("tokens", "offsets", "grid", "patch", "weights")]
        views += [modes[name] for name in ("upsample", "border", "stride")]
        getattr(srt._numpy, case.op)(*state, *srt._views(f"srt::{case.op}", *views))
    else:
        getattr(srt, case.op)(**arguments)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_rule_and_the_value_as_the_ops_say_them(case: Wrong) -> None:
    if has_no_array(case):
        pytest.skip("needs ml_dtypes")
    with pytest.raises(case.error) as caught:
        through_numpy(case)
    assert type(caught.value) is case.error
    message = case.message
    if re.match("(offsets|weights) must be float32 or float64$", case.rule):
        message = message.replace("float64;", "float64, or numbers in sequences;")
    assert str(caught.value) == message


def test_nothing_is_written_on_error() -> None:
    out = np.full(OUT, 7, np.float32)
    for changes in ({"border": "no"}, {"offsets": [(0, float("nan"))] * 2}, {"stride": (3, 1)}):
        with pytest.raises(ValueError, match="got"):
            srt.ensemble(**call(out=out, **changes))
    assert (out == 7).all()


EXTREMES = """
import resource
import numpy as np
import srt_ext.numpy as srt
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))  # allocations of terabytes fail at once

def huge(*shape):
    return np.broadcast_to(np.float32(1), shape)

FAR, ONE, STILL = 2**40, np.ones((1, 1, 1, 1), np.float32), [(0, 0)]
for call in (
    lambda: srt.ensemble(huge(FAR, 1, 1, 1), huge(FAR, 2), (1, 1), (1, 1)),
    lambda: srt.ensemble(ONE, STILL, (1, 1), (2**24, 2**24)),
    lambda: srt.ensemble(huge(1, FAR, 1, 0), STILL, (1, 1), (2**24, 2**24)),
    lambda: srt.ensemble_moments(ONE, STILL, (1, 1), (2**24, 2**24)),
    lambda: srt.shift(huge(1, 1, 2**24, 2**24), STILL),
    lambda: srt.shift(huge(1, 1, 2**24, 2**24).T, STILL),
    lambda: srt.shift(ONE, huge(FAR, 2)),
    lambda: srt.shift(huge(0, FAR, 2**10, 2**10), STILL),
    lambda: srt.RunningMedian((1, 1), (2**24, 2**24)).update(ONE, STILL),
):
    try:
        result = call()
    except (MemoryError, ValueError):
        continue
    assert result.size == 0
print("survived")
"""


def run_script(script: str, *args: object, **options: Any) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, **options
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_sizes_that_no_memory_holds() -> None:
    assert run_script(EXTREMES) == "survived\n"


# ---- streams ------------------------------------------------------------------------------------

KINDS = ("RunningMean", "RunningMoments", "RunningMedian")
each_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind: str, case: Ensemble) -> tuple[Any, Any]:
    """A stream here, and one of torch."""
    modes = {"upsample": case.upsample, "border": case.border, "stride": case.stride}
    ours, theirs = (
        getattr(module, kind)(case.grid, case.patch, **modes) for module in (srt, srt_ext)
    )
    return ours, theirs


def feed(streams: tuple[Any, Any], case: Ensemble, tokens: torch.Tensor, part: slice) -> None:
    (_, offsets, _, _, weights), _ = case.call(tokens)
    chunk = [tokens[part], offsets[part]]
    if weights is not None and not isinstance(streams[0], srt.RunningMedian):
        chunk.append(weights[part])
    streams[0].update(*arrays(tuple(chunk)))
    streams[1].update(*chunk)


def assert_same_stream(ours: Any, theirs: Any) -> None:
    assert ours.views == theirs.views
    for name, right in theirs._state.items():
        assert_same_bits(ours._state[name], right)
    for field, right in zip(ours._fields(), theirs._fields(), strict=True):
        assert_same_bits(field, right)
    assert_same_bits(ours.result(), theirs.result())
    if hasattr(ours, "variance"):
        assert_same_bits(ours.variance(), theirs.variance())


@each_kind
@given(ensembles(), st.sampled_from(HERE), st.integers(1, 6), st.integers(1, 6))
def test_streams_have_the_bits_of_torch(
    kind: str, case: Ensemble, dtype: torch.dtype, first: int, second: int
) -> None:
    """Chunks of any size, and a stream that is saved and goes on: one machine code adds them."""
    tokens = case.tokens(dtype)
    streams = pair(kind, case)
    parts = parts_of(case, first, second)
    for part in parts:
        feed(streams, case, tokens, part)
        assert_same_stream(*streams)
    saved = pickle.loads(pickle.dumps(streams[0].state_dict()))
    resumed, _ = pair(kind, case)
    resumed.load_state_dict(saved)
    assert_same_stream(resumed, streams[1])
    feed((resumed, streams[1]), case, tokens, parts[0])
    assert_same_stream(resumed, streams[1])
    if kind != "RunningMedian":
        others = pair(kind, case)
        others[0].merge(resumed)  # into an empty stream: a copy
        others[1].load_state_dict(srt_state(resumed))
        feed(others, case, tokens, parts[-1])
        assert_same_stream(*others)


def parts_of(case: Ensemble, first: int, second: int) -> list[slice]:
    return [slice(0, first), slice(first, first + second), slice(first + second, None)]


@pytest.mark.parametrize("kind", ["RunningMean", "RunningMoments"])
@given(ensembles(), st.sampled_from(HERE), st.integers(1, 6), st.integers(1, 6))
def test_merged_streams_are_those_of_torch(
    kind: str, case: Ensemble, dtype: torch.dtype, first: int, second: int
) -> None:
    """Within rounding, for each library merges with its own arithmetic; and what is added then."""
    tokens = case.tokens(dtype)
    parts = parts_of(case, first, second)
    streams, others = pair(kind, case), pair(kind, case)
    seen: list[slice] = []
    for into, part in ((streams, parts[0]), (streams, parts[1]), (others, parts[2])):
        feed(into, case, tokens, part)
        seen.append(part)
    for mine, other in zip(streams, others, strict=True):
        mine.merge(other)
    assert_near_the_oracle(streams, case, tokens, seen)
    feed(streams, case, tokens, parts[0])
    assert_near_the_oracle(streams, case, tokens, [*seen, parts[0]])


def assert_near_the_oracle(
    streams: tuple[Any, Any], case: Ensemble, tokens: torch.Tensor, seen: list[slice]
) -> None:
    """Both, which have seen these chunks of the views; so they are within twice of each other."""
    offsets = tuple(offset for part in seen for offset in case.offsets[part])
    weights = case.weights and tuple(weight for part in seen for weight in case.weights[part])
    every = replace(case, offsets=offsets, weights=weights)
    views = torch.cat([tokens[part] for part in seen])
    args, modes = every.call(views)
    truths = reference.ensemble_moments(*args, **modes)
    bounds = EnsembleBounds(every, views)
    joins = len(seen) - 1
    limits = [bounds.stream_mean(joins), bounds.variance(joins)]
    ours, theirs = streams
    assert ours.views == theirs.views == len(offsets)
    for state in ({k: tensor(v) for k, v in ours._state.items()}, theirs._state):
        for name, truth, bound in zip(("mean", "var"), truths, limits, strict=True):
            if name in state:
                assert_within_rounding(state[name], truth, bound)
        assert_within_rounding(state["weight"], *bounds.stream_weight(joins))


def srt_state(stream: Any) -> dict[str, Any]:
    """Its state, as torch has it."""
    saved = stream.state_dict()
    state = {name: tensor(values.copy("K")) for name, values in saved["state"].items()}
    dtype = next(d for d in DTYPES if str(d) == f"torch.{saved['dtype']}")
    return {**saved, "dtype": dtype, "state": state}


def test_what_a_stream_refuses() -> None:
    mean, other = srt.RunningMean((1, 1), (2, 2)), srt.RunningMean((1, 1), (2, 2))
    ones = np.ones((1, 1, 1, 3), np.float32)
    mean.update(ones, [(0, 0)])
    before = mean.result()
    wrong: list[tuple[Any, Any, str]] = [
        (ones.astype(np.float64), [(0, 0)], "RunningMean: tokens must keep their dtype, float32"),
        (
            ones.astype(">f4"),
            [(0, 0)],
            "RunningMean: tokens must keep their dtype, float32; got >f4",
        ),
        (ones[..., :2], [(0, 0)], r"must keep their batch and channels, \[1, 3\]; got \[1, 2\]"),
        (ones, [(0, float("inf"))], "srt::accumulate_mean_: offsets must be finite"),
        (ones, [(0, 0)] * 2, r"offsets must be \[V, 2\] with V = 1"),
        (ones[:0], [(0, 0)], r"offsets must be \[V, 2\] with V = 0"),
        ([1.0], [(0, 0)], "tokens must be a numpy.ndarray"),
        (ones[0], [(0, 0)], "tokens must have 4 dimensions"),
    ]
    for tokens, offsets, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            mean.update(tokens, offsets)
    with pytest.raises(ValueError, match="between 2\\^-500 and 2\\^500"):
        mean.update(ones, [(0, 0)], [1e200])
    assert mean.views == 1
    assert mean.result().tobytes() == before.tobytes()
    mean.update(ones[:0], np.zeros((0, 2)))
    assert mean.views == 1

    with pytest.raises(ValueError, match="no views were added"):
        other.result()
    with pytest.raises(TypeError, match="merge takes another RunningMean; got RunningMoments"):
        mean.merge(srt.RunningMoments((1, 1), (2, 2)))
    with pytest.raises(ValueError, match="same settings"):
        mean.merge(srt.RunningMean((1, 1), (2, 2), stride=2))
    median = srt.RunningMedian((1, 1), (2, 2))
    with pytest.raises(NotImplementedError, match="merge is not defined"):
        median.merge(median)
    with pytest.raises(ValueError, match="RunningMedian: weights must be None for a median"):
        median.update(ones, [(0, 0)], [1])
    with pytest.raises(ValueError, match="RunningMean: grid must be two integers"):
        srt.RunningMean((0, 1), (2, 2))
    big = srt.RunningMean((4096, 4096), (256, 256))  # nothing is allocated before the checks
    with pytest.raises(ValueError, match="grid must hold the N = 1 tokens"):
        big.update(ones, [(0, 0)])

    good = mean.state_dict()
    for damage in (
        {"views": -1},
        {"dtype": np.dtype(np.int32)},
        {"dtype": torch.float32},
        {"dtype": np.dtype(">f4")},
        {"stride": (2, 2)},
        {"state": {}},
        {"state": {**good["state"], "mean": [1]}},
        {"state": {**good["state"], "mean": good["state"]["mean"].astype(np.float64)}},
        {"state": {**good["state"], "mean": good["state"]["mean"][..., :1]}},
        {"state": {**good["state"], "weight": good["state"]["weight"].astype(">f8")}},
        {"state": {**good["state"], "weight": np.zeros(3)}},
    ):
        with pytest.raises(ValueError, match="RunningMean: "):
            mean.load_state_dict({**good, **damage})
    assert mean.result().tobytes() == before.tobytes()


def test_a_result_is_not_the_state() -> None:
    running = srt.RunningMean((1, 1), (1, 1))
    running.update(np.ones((1, 1, 1, 1), np.float32), [(0, 0)])
    saved, result = running.state_dict(), running.result()
    running.update(np.zeros((1, 1, 1, 1), np.float32), [(0, 0)])
    assert result.item() == 1
    assert saved["state"]["mean"].item() == 1
    running.reset()
    running.update(np.full((1, 1, 1, 1), 7.0), [(0, 0)])
    assert running.result().dtype == np.float64


# ---- threads ------------------------------------------------------------------------------------


@cache
def busy_arguments(seed: int) -> tuple[Any, ...]:
    case, picture = Ensemble((7, 9), (8, 8), channels=65, seed=seed), Shift((65, 127), seed=seed)
    return arrays((*case.call(case.tokens()), *picture.call(picture.image())))


def busy_call(seed: int) -> bytes:
    """Large enough to be split over threads. No torch: its own threads do not survive a fork."""
    args, modes, image, moves = busy_arguments(seed)
    running = srt.RunningMoments(*args[2:4])
    running.update(*args[:2])
    results = [
        srt.ensemble(*args, **modes),
        srt.ensemble(*args, **modes, reduce="median"),
        *srt.ensemble_moments(*args, **modes),
        running.variance(),
        srt.shift(*image, **moves),
    ]
    return b"".join(result.tobytes() for result in results)


def test_same_bits_over_threads(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        assert srt.get_num_threads() == count
        results.append(busy_call(0))
    assert results == results[:1] * 4


def test_number_of_threads() -> None:
    if hasattr(os, "sched_getaffinity"):
        cpus = run_script(
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
            "import srt_ext.numpy as srt; print(srt.get_num_threads())"
        )
        assert cpus == "1\n"
    before = srt.get_num_threads()
    for wrong in (0, -1, 2**40):
        with pytest.raises(ValueError, match=rf"set_num_threads: n must be .*; got {wrong}"):
            srt.set_num_threads(wrong)
    for wrong in (1.5, "2", None, True):
        with pytest.raises(TypeError, match="n must be an integer"):
            srt.set_num_threads(wrong)
    assert srt.get_num_threads() == before


@pytest.mark.parametrize("count", [1, 3])
def test_concurrent_calls(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    expected = [busy_call(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for i, result in enumerate(pool.map(busy_call, [i % 4 for i in range(40)])):
            assert result == expected[i % 4]


def releasing_calls() -> dict[str, Callable[[], object]]:
    case = Ensemble((14, 14), (8, 8), channels=64)
    args, modes = arrays(case.call(case.tokens()))
    image, moves = arrays(Shift((250, 250)).call(Shift((250, 250)).image()))
    running = srt.RunningMedian(case.grid, case.patch)
    return {
        "shift": lambda: srt.shift(*image, **moves),
        "ensemble": lambda: srt.ensemble(*args, **modes),
        "moments": lambda: srt.ensemble_moments(*args, **modes),
        "stream": lambda: running.update(*args[:2]),
    }


@pytest.mark.parametrize("name", releasing_calls())
def test_other_threads_run_meanwhile(name: str, threads: Callable[[int], None]) -> None:
    """With a switch interval of an hour, nothing but the call lets another thread go on."""
    threads(1)
    call, steps, stop = releasing_calls()[name], [0], threading.Event()

    def other() -> None:
        while not stop.is_set():
            steps[0] += 1
            time.sleep(0)  # gives the interpreter back

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    try:
        sys.setswitchinterval(3600)
        before = steps[0]
        for _ in range(2000):
            call()
            if steps[0] > before + 1:  # one may have been waiting for the interpreter
                break
        assert steps[0] > before + 1
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


# ---- processes ----------------------------------------------------------------------------------


TASKS = Path("/proc/self/task")  # the threads of this process


def child_status(expected: bytes) -> int:
    """Of a fork that computes; a child that hangs is ended by the alarm."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            code = 0 if busy_call(1) == expected else 2
            if code == 0 and TASKS.exists() and len(list(TASKS.iterdir())) != srt.get_num_threads():
                code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads: Callable[[int], None]) -> None:
    threads(3)
    expected = busy_call(1)  # starts the threads
    assert child_status(expected) == 0
    # While other threads of the parent are anywhere in a call.
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            busy_call(2)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        assert [child_status(expected) for _ in range(8)] == [0] * 8
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert busy_call(1) == expected


# ---- without torch ------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it raises ImportError
import numpy as np
import srt_ext
import srt_ext.numpy as srt

try:
    srt_ext.ensemble
except ImportError as error:
    assert "torch is not installed" in str(error)
else:
    raise AssertionError("there is a torch")
given = np.load(sys.argv[1])
tokens, offsets, weights = given["tokens"], given["offsets"], given["weights"]
place = (3, 5), (4, 6)
made = {
    "shift": srt.shift(given["image"], offsets, interpolation="bicubic"),
    "mean": srt.ensemble(tokens, offsets, *place, weights),
    "median": srt.ensemble(tokens, offsets, *place, reduce="median", stride=2),
}
made["moments"], made["var"] = srt.ensemble_moments(tokens, offsets, *place, weights)
for kind in ("RunningMean", "RunningMoments", "RunningMedian"):
    running = getattr(srt, kind)(*place)
    running.update(tokens[:2], offsets[:2])
    again = getattr(srt, kind)(*place)
    again.load_state_dict(running.state_dict())
    again.update(tokens[2:], offsets[2:])
    if kind != "RunningMedian":
        again.merge(running)
    made[kind] = again.result()
np.savez(sys.argv[2], **made)
assert not any(name.partition(".")[0] == "torch" for name, module in sys.modules.items() if module)
print("done")
"""


def test_without_torch(tmp_path: Path) -> None:
    case, picture = ENSEMBLES["weights"], Shift((7, 11))
    args, _ = case.call(case.tokens())
    tokens, offsets, grid, patch, weights = args
    image = picture.image(torch.uint8)
    given = {"tokens": tokens, "offsets": offsets, "weights": weights, "image": image}
    np.savez(tmp_path / "given.npz", **arrays(given))
    paths = (tmp_path / "given.npz", tmp_path / "made.npz")
    assert run_script(WITHOUT_TORCH, *paths, cwd=PACKAGE.parent) == "done\n"
    place = (grid, patch)
    mean, var = srt_ext.ensemble_moments(tokens, offsets, *place, weights)
    expected = {
        "shift": srt_ext.shift(image, offsets, interpolation="bicubic"),
        "mean": srt_ext.ensemble(*args),
        "median": srt_ext.ensemble(*args[:4], reduce="median", stride=2),
        "moments": mean,
        "var": var,
    }
    for kind in KINDS:
        running = getattr(srt_ext, kind)(*place)
        running.update(tokens[:2], offsets[:2])
        again = getattr(srt_ext, kind)(*place)
        again.load_state_dict(running.state_dict())
        again.update(tokens[2:], offsets[2:])
        if kind != "RunningMedian":
            again.merge(running)
        expected[kind] = again.result()
    with np.load(paths[1]) as made:
        assert set(made) == set(expected)
        for name, right in expected.items():
            assert_same_bits(made[name], right)


def import_reason(folder: Path) -> str:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['torch'] = None\n"
        "try:\n    import srt_ext.numpy\nexcept ImportError as error:\n    print(error)"
    )
    return run_script(script, folder, cwd=folder)


def test_import_without_the_library(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "srt_ext", ignore=shutil.ignore_patterns("*.so"))
    assert "has no _numpy." in import_reason(tmp_path)
    other = tmp_path / "srt_ext" / "_numpy.cpython-399-x86_64-linux-gnu.so"
    other.write_bytes(b"")
    assert f"it was built for another Python: {other.name}" in import_reason(tmp_path)
    mine = tmp_path / "srt_ext" / Path(srt._numpy.__file__).name
    mine.write_bytes(b"no library")
    assert "srt_ext._numpy does not load" in import_reason(tmp_path)
