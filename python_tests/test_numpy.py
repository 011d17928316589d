"""srt_ext.numpy: valid and invalid arrays, threads, forks, and use without torch.

Kernels are tested through torch, streams in test_streams.py, and rules shared with torch in
test_errors.py.
"""

from __future__ import annotations

import os
import re
import signal
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
import torch
from arrays import COMMON_DTYPES, array, arrays, assert_same_bits
from process import run_python
from samples import ENSEMBLES, SHIFTS, WINDOWS, Ensemble, Shift, Windows

import srt_ext

srt = pytest.importorskip("srt_ext.numpy", exc_type=ImportError)
PACKAGE = Path(srt_ext.__file__).parent


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = srt.get_num_threads()
    yield srt.set_num_threads
    srt.set_num_threads(before)


# ---- equality with the ops ----------------------------------------------------------------------


def check(name: str, case: Ensemble | Shift | Windows, values: torch.Tensor, **more: Any) -> None:
    """Asserts results that are bitwise equal to the op, with the same strides."""
    args, modes = case.call(values)
    if "reduce" in more:
        args = args[:4]  # the median does not support weights
    ours = getattr(srt, name)(*arrays(args), **modes, **more)
    theirs = getattr(srt_ext, name)(*args, **modes, **more)
    pairs = [(ours, theirs)] if isinstance(theirs, torch.Tensor) else zip(ours, theirs, strict=True)
    for actual, expected in pairs:
        assert_same_bits(actual, expected)
        if actual.size:  # the strides of empty arrays are 0 in NumPy
            assert actual.strides == tuple(s * actual.itemsize for s in expected.stride())


def check_ensemble(case: Ensemble, dtype: torch.dtype) -> None:
    tokens = case.tokens(dtype)
    check("ensemble", case, tokens)
    check("ensemble_moments", case, tokens)
    check("ensemble", case, tokens, reduce="median")


# With weights; with other upsampling and border; with a stride and prefix tokens.
@pytest.mark.parametrize("name", ["weights", "nearest", "stride"])
@pytest.mark.parametrize("dtype", COMMON_DTYPES, ids=str)
def test_ensemble_is_bitwise_equal_to_the_op(dtype: torch.dtype, name: str) -> None:
    check_ensemble(ENSEMBLES[name], dtype)


@pytest.mark.parametrize("name", ["real", "bicubic", "nearest", "strided"])
@pytest.mark.parametrize("dtype", [*COMMON_DTYPES, torch.uint8], ids=str)
def test_shift_is_bitwise_equal_to_the_op(dtype: torch.dtype, name: str) -> None:
    check("shift", SHIFTS[name], SHIFTS[name].image(dtype))


@pytest.mark.parametrize("name", ["grid", "scales", "points"])
@pytest.mark.parametrize("dtype", [*COMMON_DTYPES, torch.uint8], ids=str)
def test_windows_are_bitwise_equal_to_the_op(dtype: torch.dtype, name: str) -> None:
    check("windows", WINDOWS[name], WINDOWS[name].image(dtype))


@pytest.mark.parametrize("name", srt._numpy.available_cpu_kernels().split(","))
def test_forcing_kernels(name: str) -> None:
    try:
        assert srt._numpy.force_cpu_kernels(name)
        torch.ops.srt._force_cpu_kernels(name)
        assert srt._numpy.cpu_kernels() == name
        check_ensemble(ENSEMBLES["real"], torch.float32)
    finally:
        srt._numpy.force_cpu_kernels("auto")
        torch.ops.srt._force_cpu_kernels("auto")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_sizes_0_and_1(shape: tuple[int, int]) -> None:
    case = Ensemble((2, 1), (2, 3), ((0.0, 0.5),), channels=shape[1], batch=shape[0])
    check_ensemble(case, torch.float32)
    out = np.empty(case.shape, np.float32)
    args, modes = arrays(case.call(case.tokens()))
    assert srt.ensemble(*args, **modes, out=out) is out
    for size in ((0, 4), (4, 0), (1, 1)):
        picture = Shift(size, batch=shape[0], channels=shape[1])
        check("shift", picture, picture.image())


def test_large_results_are_bitwise_equal_to_the_op(threads: Callable[[int], None]) -> None:
    """Large results are populated in bulk: 34 MB, not a whole number of pages."""
    args = (torch.randn(3, 1, 100, 377), torch.tensor([[0.0, 1], [2.5, -1], [-1, 0.25]]))
    expected = srt_ext.ensemble(*args, (10, 10), (15, 15))
    out = torch.full_like(expected, float("nan"))
    assert torch.equal(srt_ext.ensemble(*args, (10, 10), (15, 15), out=out), expected)
    for count in (1, 3):
        threads(count)
        field = srt.ensemble(*arrays(args), (10, 10), (15, 15))
        assert field.nbytes > 2**25
        assert field.nbytes % 4096
        assert_same_bits(field, expected)


# ---- offsets and weights ------------------------------------------------------------------------


def test_offsets_and_weights_of_every_kind() -> None:
    case = replace(ENSEMBLES["grid"], offsets=((0.0, 1.0), (2.0, -3.0), (-1.0, 0.0), (0.0, 0.0)))
    tokens, place, shares = array(case.tokens()), (case.grid, case.patch), [1, 0, 2, 3]
    expected = srt.ensemble(tokens, case.offsets, *place, shares)
    offsets = np.array(case.offsets)
    wide = np.zeros((8, 6))
    wide[::2, 1:4:2] = offsets
    packed = np.zeros(4, np.dtype([("byte", "u1"), ("pair", "f4", 2)]))
    packed["pair"] = offsets
    for same in (
        read_only(offsets.astype(np.float32)),
        offsets.astype(">f4"),
        np.asfortranarray(offsets),
        wide[::2, 1:4:2],
        offsets[::-1].copy()[::-1],
        packed["pair"],
        [[int(y), int(x)] for y, x in case.offsets],
        [(np.float64(y), int(x)) for y, x in case.offsets],
    ):
        field = srt.ensemble(tokens, same, *place, shares)
        assert field.tobytes() == expected.tobytes()
    record = np.zeros(4, np.dtype([("byte", "u1"), ("weight", "f8")]))
    record["weight"] = shares
    swapped = np.array(shares, ">f8")
    for weights in (swapped, np.array(shares, np.float32), tuple(shares), record["weight"]):
        field = srt.ensemble(tokens, offsets, *place, weights)
        assert field.tobytes() == expected.tobytes()


VALUES = "must be float32 or float64, or sequences of numbers"


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.zeros((2, 2), np.int64), "int64"),
        (np.zeros((2, 2), np.longdouble), str(np.dtype(np.longdouble))),
        (np.zeros((2, 2), object), "object"),
        ([["1", "2"]], "<U1"),
        ("12", "<U2"),
        ([[True, False]], "bool"),
        ([[1j, 0]], "complex128"),
        ([[10**30, 0]], "object"),
        ([[0, 1], [0]], "rows that do not form an array"),
        (1.5, "float"),
        ({(0, 0)}, "set"),
        (torch.zeros(2, 2), "Tensor"),
    ],
    ids=str,
)
def test_invalid_offsets_and_weights_raise(value: Any, got: str) -> None:
    error = ValueError if "rows" in got else TypeError
    with pytest.raises(error, match=re.escape(f"srt::shift: offsets {VALUES}; got {got}")):
        srt.shift(np.zeros((1, 1, 2, 2)), value)
    with pytest.raises(error, match=re.escape(f"srt::ensemble: weights {VALUES}; got {got}")):
        srt.ensemble(**call(weights=value))


# ---- arrays of tokens ---------------------------------------------------------------------------


def read_only(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values.flags.writeable = False
    return values


@pytest.mark.parametrize("dtype", COMMON_DTYPES, ids=str)
def test_strides_of_tokens(dtype: torch.dtype, tmp_path: Path) -> None:
    """Any order and direction of V, B and N, gaps, an expanded view, a memory-mapped file."""
    case = ENSEMBLES["real"]
    (tokens, *rest), modes = arrays(case.call(case.tokens(dtype)))

    def field(tokens: np.ndarray[Any, Any]) -> bytes:
        return srt.ensemble(tokens, *rest, **modes).tobytes()

    for steps, order in (((1, 2, -1), (0, 1, 2)), ((-1, -1, 3), (2, 0, 1))):
        sizes = [abs(step) * size for step, size in zip(steps, tokens.shape, strict=False)]
        wide = np.full([*(sizes[d] for d in order), case.channels + 3], np.nan, tokens.dtype)
        strided = wide.transpose([*np.argsort(order), 3])
        strided = strided[tuple(slice(None, None, step) for step in steps)][..., 1:-2]
        strided[...] = tokens
        assert field(read_only(strided)) == field(tokens)
    one = np.broadcast_to(tokens[:1], tokens.shape)
    assert field(one) == field(one.copy())
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", tokens.dtype, "r", shape=tokens.shape)
    assert field(mapped) == field(tokens)


def test_tokens_are_read_in_place() -> None:
    """A copy of 40 MB would show in the memory of the process."""
    tokens = read_only(np.ones((10, 1, 16 * 17, 4096), np.float32))[:, :, 16:]
    args = (tokens, [(0, 0)] * 10, (16, 16), (4, 4))
    running = srt.RunningMean((16, 16), (4, 4), stride=64)
    running.update(*args[:2])  # allocates its state
    for call in (
        lambda: srt.ensemble(*args, stride=64),
        lambda: srt.ensemble_moments(*args, stride=64),
        lambda: running.update(*args[:2]),
    ):
        tracemalloc.start()
        call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


def unaligned(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


def packed(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """float32 rows of the last dimension, a byte before each."""
    *lead, last = shape
    return np.zeros(lead, np.dtype([("byte", "u1"), ("row", "f4", last)]))["row"]


TOKENS, OUT = (2, 1, 6, 3), (1, 3, 8, 15)  # of call()
ORDER = "must be in native byte order; got >f4"
ARRAY = "must be a numpy.ndarray without a mask; got"
ones, out = np.ones(TOKENS, np.float32), np.zeros(OUT, np.float32)
memory = np.ones(2 * 6 * 3 + 8 * 15 * 3, np.float32)


def call(**changes: Any) -> dict[str, Any]:
    return {"tokens": ones, "offsets": [(0, 0)] * 2, "grid": (2, 3), "patch": (4, 5), **changes}


@pytest.mark.parametrize(
    ("error", "name", "value", "message"),
    [
        (TypeError, "tokens", ones.astype(">f4"), ORDER),
        (TypeError, "tokens", np.zeros(TOKENS, "V0"), "must be float32, float16, bfloat16 or"),
        (TypeError, "out", out.astype(">f4"), "must have the dtype of tokens, float32; got >f4"),
        (ValueError, "tokens", unaligned(TOKENS, "f4"), "must be aligned to its element size, 4"),
        (ValueError, "out", unaligned(OUT, "f4"), "must be aligned to its element size, 4"),
        (ValueError, "tokens", packed(TOKENS), "must have strides that are multiples of its"),
        (ValueError, "out", read_only(out.copy()), "must be writable; got a read-only array"),
        (ValueError, "tokens", ones[..., ::-1], "must be contiguous in the last dimension"),
        (ValueError, "out", out[:, :, ::-1], "must not overlap itself: each stride must be"),
        (TypeError, "tokens", [[1.0]], f"{ARRAY} list"),
        (TypeError, "tokens", torch.ones(TOKENS), f"{ARRAY} Tensor"),
        (TypeError, "tokens", np.ma.ones(TOKENS), f"{ARRAY} MaskedArray"),
        (TypeError, "offsets", np.ma.zeros((2, 2)), f"{ARRAY} MaskedArray"),
        (TypeError, "out", [], f"{ARRAY} list"),
        (TypeError, "offsets", [[10**400, 0]] * 2, "must be float32 or float64, or seq"),
        (ValueError, "offsets", [torch.ones(2, requires_grad=True)] * 2, "must be float32 or"),
        (ValueError, "offsets", np.broadcast_to(0.5, (2**31, 2)), "must hold at most 2^20 views"),
        (ValueError, "weights", np.broadcast_to(0.5, (2**40,)), "must hold at most 2^20 views"),
        (
            TypeError,
            "stride",
            True,
            "must be an integer or a pair of integers (y, x), each >= 1; got True",
        ),
        (ValueError, "upsample", "\udc80", "must be one of 'nearest', 'bilinear'; got '\\udc80'"),
    ],
    ids=str,
)
def test_invalid_arrays_raise(error: type[Exception], name: str, value: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        srt.ensemble(**call(**{name: value}))
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"srt::ensemble: {name} {message}")


def test_memory_next_to_the_output_is_allowed() -> None:
    """Also with negative strides of tokens. Integers of NumPy are accepted."""
    tokens, place = memory[:36].reshape(TOKENS)[::-1], {"grid": (np.int64(2), np.uint8(3))}
    with pytest.raises(ValueError, match="out must not share memory with tokens"):
        srt.ensemble(**call(tokens=tokens, out=memory[35:395].reshape(OUT)))
    out = memory[36:396].reshape(OUT)
    assert srt.ensemble(**call(tokens=tokens, out=out, stride=np.int32(1), **place)) is out
    assert (out == 1).all()


def test_images_of_any_memory() -> None:
    """Arrays that are not dense or not aligned are copied; another byte order raises."""
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


def test_windows_of_images_of_any_memory() -> None:
    """Images with strides of whole elements are read in place."""
    image = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)
    centers = np.array([[(1.3, 2.0), (4.0, 6.7)]] * 2)
    expected = srt.windows(image, centers, (2, 3))
    assert srt.windows(image, centers.tolist(), 2, [1, 1]).shape == (2, 2, 3, 2, 2)
    backwards = image[:, ::-1, :, ::-1].copy()[:, ::-1, :, ::-1]
    for same in (backwards, np.asfortranarray(image)):
        same.flags.writeable = False
        assert np.array_equal(srt.windows(same, centers, (2, 3)), expected)
    aside = unaligned(image.shape, "f4")
    for wrong, rule in (
        (aside, "aligned to its element size"),
        (packed(image.shape), "multiples of its"),
    ):
        with pytest.raises(ValueError, match=f"srt::windows: image must .*{rule}"):
            srt.windows(wrong, centers, (2, 3))
    with pytest.raises(TypeError, match=f"srt::windows: image {ORDER}"):
        srt.windows(image.astype(">f4"), centers, (2, 3))
    with pytest.raises(ValueError, match=r"srt::windows: centers must hold at most 2\^26 windows"):
        srt.windows(image, np.broadcast_to(np.zeros(2), (2, 2**27, 2)), (2, 3))


def test_out_of_any_strides() -> None:
    case = ENSEMBLES["stride"]
    args, modes = case.call(case.tokens())
    batch, channels, height, width = case.shape
    wide = np.empty((batch + 1, 2 * channels, height + 2, 3 * width), np.float32)
    for out in (
        np.empty(case.shape, np.float32),
        np.empty((batch, height, width, channels), np.float32).transpose(0, 3, 1, 2),
        wide[1:, ::2, 2:, 1::3],
    ):
        whole = out if out.base is None else out.base
        whole[...] = np.nan
        assert srt.ensemble(*arrays(args), **modes, out=out) is out
        assert_same_bits(out, srt_ext.ensemble(*args, **modes))
        assert np.isfinite(whole).sum() == out.size


# ---- threads ------------------------------------------------------------------------------------


@cache
def busy_arguments(seed: int) -> tuple[Any, ...]:
    case, picture = Ensemble((7, 9), (8, 8), channels=65, seed=seed), Shift((65, 127), seed=seed)
    windows = Windows((65, 127), (50, 60), centers=((1.3, 2.0),) * 40, seed=seed)
    calls = [call.call(call.image())[0] for call in (picture, windows)]
    return arrays((case.call(case.tokens())[0][:4], *calls))


def busy_call(seed: int) -> bytes:
    """A call that is split over threads. Without torch, whose threads do not survive a fork."""
    args, image, windows = busy_arguments(seed)
    running = srt.RunningMoments(*args[2:])
    running.update(*args[:2])
    means, median = srt.ensemble_moments(*args), srt.ensemble(*args, reduce="median")
    results = [srt.ensemble(*args), median, *means, running.variance(), srt.shift(*image)]
    results.append(srt.windows(*windows))
    return b"".join(result.tobytes() for result in results)


def test_results_are_bitwise_equal_over_threads(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        assert srt.get_num_threads() == count
        results.append(busy_call(0))
    assert results == results[:1] * 4


def test_number_of_threads() -> None:
    if hasattr(os, "sched_getaffinity"):
        script = (
            "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
            "sys.modules['torch'] = None; import srt_ext.numpy as srt; print(srt.get_num_threads())"
        )
        assert run_python("-c", script).stdout == "1\n"
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
        for i, result in enumerate(pool.map(busy_call, [i % 4 for i in range(16)])):
            assert result == expected[i % 4]


@pytest.mark.parametrize("name", ["shift", "ensemble"])
def test_other_threads_run_during_a_call(name: str, threads: Callable[[int], None]) -> None:
    """With a switch interval of an hour, other threads run only if the call releases the GIL."""
    threads(1)
    case = Ensemble((14, 14), (8, 8), channels=64) if name == "ensemble" else Shift((250, 250))
    args, modes = arrays(case.call(case.tokens() if name == "ensemble" else case.image()))
    gate, passed = threading.Event(), threading.Event()

    def other() -> None:
        gate.wait()
        passed.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    time.sleep(0.1)  # it waits for the gate, not for the interpreter
    try:
        sys.setswitchinterval(3600)
        gate.set()
        assert not passed.is_set()
        for _ in range(2000):
            getattr(srt, name)(*args, **modes)
            if passed.is_set():
                break
        assert passed.is_set()
    finally:
        sys.setswitchinterval(interval)
        gate.set()
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
            right = busy_call(1) == expected
            own = not TASKS.exists() or len(list(TASKS.iterdir())) == srt.get_num_threads()
            code = 0 if right and own else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads(threads: Callable[[int], None]) -> None:
    threads(3)
    expected = busy_call(1)  # starts the threads
    assert child_status(expected) == 0
    with ThreadPoolExecutor(1) as pool:  # forked by a thread other than the main thread
        assert pool.submit(child_status, expected).result() == 0
    # Forks while other threads of the parent run calls.
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            busy_call(2)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        assert [child_status(expected) for _ in range(4)] == [0] * 4
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert busy_call(1) == expected


# ---- without torch ------------------------------------------------------------------------------

SCRIPT = """
import hashlib
import numpy as np
import srt_ext.numpy as srt

def results():
    random = np.random.default_rng(0)
    tokens, offsets = random.normal(size=(5, 2, 15, 3)).astype("f4"), random.normal(0, 3, (5, 2))
    image, weights = random.integers(0, 256, (2, 3, 7, 11), np.uint8), [1, 0, 2.5, 1e-3, 7]
    place = (3, 5), (4, 6)
    yield srt.shift(image, offsets, interpolation="bicubic")
    yield srt.windows(image, offsets.reshape(1, 5, 2).repeat(2, 0), (3, 4), (1.5, 1))
    yield srt.ensemble(tokens, offsets, *place, weights)
    yield srt.ensemble(tokens, offsets, *place, reduce="median", stride=2)
    yield from srt.ensemble_moments(tokens, offsets, *place, weights)
    for kind in (srt.RunningMean, srt.RunningMoments, srt.RunningMedian):
        running, again = kind(*place), kind(*place)
        running.update(tokens[:2], offsets[:2])
        again.load_state_dict(running.state_dict())
        again.update(tokens[2:], offsets[2:])
        if kind is not srt.RunningMedian:
            again.merge(running)
        yield again.result()

digest = [(str(r.dtype), hashlib.sha256(r.tobytes()).hexdigest()) for r in results()]
"""


def test_results_are_bitwise_equal_without_torch() -> None:
    """Bitwise equal to the results in this process, which imports torch."""
    script = f"import sys\nsys.modules['torch'] = None  # its import fails\n{SCRIPT}\nprint(digest)"
    here: dict[str, Any] = {}
    exec(SCRIPT, here)
    assert run_python("-c", script, cwd=PACKAGE.parent).stdout == f"{here['digest']}\n"
