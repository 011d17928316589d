"""The CUDA sources, executed on the CPU (backends.CudaOnHost).

Injected faults, launches, small grids, the L2 cache, and the ops.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from ctypes import byref, c_int64, c_void_p
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from backends import (
    ROOT,
    SOURCES,
    STUB,
    CudaOnHost,
    EnsembleArgs,
    Guarded,
    Values,
    WindowsArgs,
    compiled,
    host_library,
    linked,
    objects,
)
from oracle import KERNELS, check_containment, check_sample
from process import run_python
from samples import DTYPES, ENSEMBLES, REDUCES, SHIFTS, WINDOWS, each_reduce, random_views

ALL_DTYPES = (*DTYPES, torch.uint8)
Call = Callable[[], torch.Tensor]


@pytest.fixture
def cuda() -> Iterator[CudaOnHost]:
    kernels = CudaOnHost(host_library())
    yield kernels
    kernels.reset()


# ---- faults -------------------------------------------------------------------------------------


def check_mean(cuda: CudaOnHost) -> None:
    case = replace(ENSEMBLES["real"], channels=40)
    check_sample("mean", cuda, case, torch.float32)
    check_containment("mean", cuda, case, torch.float32)


def check_shift(cuda: CudaOnHost) -> None:
    check_sample("shift", cuda, replace(SHIFTS["real"], size=(9, 32)), torch.float32)


def check_windows(cuda: CudaOnHost) -> None:
    check_sample("windows", cuda, WINDOWS["real"], torch.float32)


def check_windows_backward(cuda: CudaOnHost) -> None:
    for name in ("real", "points"):
        check_sample("windows_backward", cuda, WINDOWS[name], torch.float32)


@pytest.mark.slow
def test_injected_faults_are_detected(tmp_path: Path) -> None:
    """The checks must detect each of the faults below, and must pass without a fault."""
    mean = {
        "a missing barrier": ("sums);\n      __syncthreads();", "sums);"),
        "a write beyond": ("x * plan.out_strides[3];", "(x + 1) * plan.out_strides[3];"),
        "a row that is not written": ("y >= plan.rows)", "y >= plan.rows - 1)"),
        "a walk that goes on": ("x % walk_interval(plan.x) == 0", "x == 0"),
        "a column that is left out": ("column >= round", "column > round"),
        "sums that are not finite": ("if (!isfinite(check))", "if (false)"),
        "a piece of the workspace that is too small": (
            "take<int32_t>(plan.x_tiles)",
            "take<int32_t>(plan.x_tiles - 1)",
        ),
        "none": ("if (!isfinite(check))", "if (!isfinite(check))"),
    }
    shift = {
        "a line that is too short": ("at < columns + taps_x - 1", "at < columns"),
        "a missing barrier of a warp": (
            "block.taps[0], own);\n      __syncwarp();",
            "block.taps[0], own);",
        ),
    }
    windows = {"taps without a barrier": ("y0, x0);\n    __syncthreads();", "y0, x0);")}
    windows_backward = {
        "a line in the place of another": ("*at = slot + 1;", "*at = slot;"),
        "lines without a barrier": (
            "staged[at] = read;\n      __syncthreads();",
            "staged[at] = read;",
        ),
        "points without a barrier": (
            "points[at] = own;\n      __syncthreads();",
            "points[at] = own;",
        ),
        "too few lines": ("2 * windows * args.size[0]", "windows * args.size[0]"),
    }
    sources = {
        **dict.fromkeys(mean, "mean.cu"),
        **dict.fromkeys(shift, "shift.cu"),
        **dict.fromkeys(windows, "windows.cu"),
        **dict.fromkeys(windows_backward, "windows_backward.cu"),
    }
    faults = mean | shift | windows | windows_backward
    checks = {
        "mean.cu": check_mean,
        "shift.cu": check_shift,
        "windows.cu": check_windows,
        "windows_backward.cu": check_windows_backward,
    }
    rest = objects()

    def broken(fault: str) -> Path:
        """Compiles the library with that fault."""
        folder = tmp_path / fault.replace(" ", "_")
        shutil.copytree(SOURCES, folder)
        name, (good, bad) = sources[fault], faults[fault]
        source = folder / "cuda" / name
        text = source.read_text()
        assert text.count(good) == 1, fault
        source.write_text(text.replace(good, bad))
        own = {name: compiled(source, folder / "broken.o", "-O0")}
        return linked((rest | own).values(), folder / "broken.so")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault, library in zip(faults, pool.map(broken, faults), strict=True):
            with nullcontext() if fault == "none" else pytest.raises(AssertionError):
                checks[sources[fault]](CudaOnHost(ctypes.CDLL(str(library))))


# ---- launches -----------------------------------------------------------------------------------


def calls(cuda: CudaOnHost) -> dict[str, Call]:
    """One call of every kernel, with more views than the parameters of a kernel hold."""
    plain = replace(ENSEMBLES["weights"], channels=72, batch=1)
    case = replace(plain, offsets=plain.offsets * 40, weights=(1.0,) * 200)
    shift = replace(SHIFTS["real"], offsets=SHIFTS["real"].offsets * 60, size=(20, 70))
    tokens, grad, views = case.tokens(), torch.randn(case.shape), torch.randn(shift.shape)
    few = replace(case, offsets=plain.offsets * 9)  # more than 64 views are slow
    windows = replace(WINDOWS["real"], centers=random_views(150), size=(20, 70))
    image, of_windows = windows.image(), torch.randn(windows.shape)
    return {
        "mean": partial(cuda.ensemble, case, tokens),
        "median": partial(cuda.ensemble, few, tokens[:45], reduce="median"),
        "moments": partial(cuda.ensemble, case, tokens, reduce="moments"),
        "mean_backward": partial(cuda.mean_backward, case, grad),
        "shift": partial(cuda.shift, shift, shift.image()),
        "shift_backward": partial(cuda.shift_backward, shift, views),
        "windows": partial(cuda.windows, windows, image),
        "windows_backward": partial(cuda.windows_backward, windows, of_windows),
        "windows_points": partial(cuda.windows_points, windows, of_windows, image),
    }


each_call = pytest.mark.parametrize("name", [*KERNELS, "windows_points"])


def test_number_of_launches(cuda: CudaOnHost) -> None:
    for name, few, many in (("grid", 3, 0), ("weights", 3, 2)):
        case = ENSEMBLES[name]
        cuda.ensemble(case, case.tokens())
        assert cuda.gpu.launches == few
        if many:  # two launches copy offsets and weights
            calls(cuda)["mean"]()
            assert cuda.gpu.launches == few + many
    for name, launches in (("shift", 1), ("windows", 1), ("windows_backward", 5)):
        calls(cuda)[name]()
        assert cuda.gpu.launches == 2 + launches  # two copy the offsets or the centers


@each_call
def test_every_launch_is_checked(name: str, cuda: CudaOnHost) -> None:
    call = calls(cuda)[name]
    call()
    launches = cuda.gpu.launches
    assert launches > 2
    for failing in range(launches):
        cuda.gpu.failing_launch = failing
        with pytest.raises(RuntimeError, match=r"srt::\w+: CUDA: unspecified launch failure"):
            call()
        assert cuda.gpu.launches == failing + 1
    cuda.gpu.failing_launch = launches
    call()
    assert cuda.gpu.launches == launches


@each_call
def test_results_do_not_depend_on_the_largest_grid(name: str, cuda: CudaOnHost) -> None:
    call = calls(cuda)[name]
    expected = call().clone()
    for max_grid in (1, 3):
        cuda.gpu.max_grid = max_grid
        assert torch.equal(call(), expected)


@pytest.mark.parametrize("backward", [False, True])
@each_reduce
@pytest.mark.parametrize("shape", [(9, 0, 15, 4), (9, 1, 15, 0)])
def test_empty_inputs_launch_nothing(
    shape: tuple[int, ...], reduce: str, backward: bool, cuda: CudaOnHost
) -> None:
    args = EnsembleArgs(reduce=REDUCES.index(reduce), views=9, batch=shape[1], channels=shape[3])
    function = cuda.library.ensemble
    if backward:
        function = partial(cuda.library.mean_backward, None)
    views, size = byref(Values(None, "host").struct), c_int64(-1)
    cuda.gpu.launches = 0
    for workspace in (None, c_void_p(1)):
        assert not function(byref(args), views, views, workspace, byref(size))
    assert size.value == 0
    assert cuda.gpu.launches == 0


@pytest.mark.parametrize("window", [(3, 2), (1, 1)])
@pytest.mark.parametrize(("batch", "count", "channels"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_gradients_of_empty_inputs_are_zero(
    batch: int, count: int, channels: int, window: tuple[int, int], cuda: CudaOnHost
) -> None:
    """``windows`` launches nothing; its gradients are filled with 0."""
    args = WindowsArgs(batch=batch, channels=channels, height=5, width=6, count=count)
    args.size[:] = window
    values = [Values(torch.full((batch, count, 2), 2.5), "host"), Values(None, "host")]
    library, points = cuda.library, Guarded(4 * batch * count, torch.float64)
    image = Guarded(batch * channels * 30, torch.float32)
    half = c_void_p(points.pointer() + 16 * batch * count)
    of_points = partial(library.windows_backward_points, c_void_p(points.pointer()), half)
    of_image = partial(library.windows_backward_image, c_void_p(image.pointer()))
    cuda._run(library.windows, args, values, Guarded(0, torch.float32))
    assert cuda.gpu.launches == 0
    for call, result in ((of_image, image), (of_points, points)):
        cuda._run(call, args, values, result)
        if result.elements is not None:
            assert (cuda.writes == 1).all()
            assert not result.elements.any()


def test_too_many_lines_raise_before_allocation(cuda: CudaOnHost) -> None:
    """When the size of the workspace is computed."""
    args = WindowsArgs(batch=2**10, channels=1, height=5, width=6, count=2**16)
    none, size = Values(None, "host"), c_int64(-1)
    for rows, error in ((8, None), (9, b"at most 2^29; got 603979776")):
        args.size[:] = rows, 1
        given = (byref(args), byref(none.struct), byref(none.struct), None, byref(size))
        message = cuda.library.windows_backward_image(None, *given)
        assert (message is None) if error is None else (error in message)


# ---- memory -------------------------------------------------------------------------------------


def check_l2(cuda: CudaOnHost, size: int, call: Call) -> None:
    """Inputs and outputs stay in an L2 cache of ``size`` bytes, and leave a smaller one."""
    results = []
    for l2_bytes in (size, size - 1):
        cuda.gpu.l2_bytes = l2_bytes
        results.append(call().clone())
        assert (cuda.gpu.evict_first == 0) == (l2_bytes == size)
    assert torch.equal(*results)


@each_reduce
def test_fields_that_fit_l2(reduce: str, cuda: CudaOnHost) -> None:
    case, planes = ENSEMBLES["grid"], 2 if reduce == "moments" else 1
    tokens = case.tokens()
    size = planes * math.prod(case.shape) * torch.float32.itemsize + tokens.nbytes
    check_l2(cuda, size, partial(cuda.ensemble, case, tokens, reduce=reduce))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_views_that_fit_l2(dtype: torch.dtype, cuda: CudaOnHost) -> None:
    case = SHIFTS["real"]
    image = case.image(dtype)
    check_l2(cuda, (len(case.offsets) + 1) * image.nbytes, partial(cuda.shift, case, image))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_windows_that_fit_l2(dtype: torch.dtype, cuda: CudaOnHost) -> None:
    case = WINDOWS["real"]
    image = case.image(dtype)
    size = image.nbytes + math.prod(case.shape) * dtype.itemsize
    check_l2(cuda, size, partial(cuda.windows, case, image))


@pytest.mark.parametrize("layout", ["contiguous", "padded", "steps"])
def test_moments_into_any_strides(layout: str, cuda: CudaOnHost) -> None:
    """Called directly, because the op has no out= for moments."""
    case = ENSEMBLES["stride"]
    expected = cuda.ensemble(case, case.tokens(), reduce="moments")
    assert torch.equal(
        cuda.ensemble(case, case.tokens(), reduce="moments", layout=layout), expected
    )


# ---- the ops ------------------------------------------------------------------------------------

OPS = """
import ctypes, sys
import pytest, torch
import srt_ext
from backends import HostDevice, Ops

torch.ops.load_library(sys.argv[1])  # replaces the CPU kernels
library = ctypes.CDLL(sys.argv[1])
library.device.restype = ctypes.POINTER(HostDevice)
gpu = library.device().contents
gpu.stream = 0x5EED

def launches():
    count, gpu.launches = gpu.launches, 0
    return count

tokens, offsets = torch.ones(2, 1, 6, 16), torch.zeros(2, 2)
args = (tokens, offsets, (2, 3), (4, 4))
srt_ext.ensemble(*args)
assert launches() == 3
for wrong in ({"out": tokens}, {"weights": torch.ones(3)}, {"upsample": "cubic"}):
    with pytest.raises(ValueError):
        srt_ext.ensemble(*args, **wrong)
assert launches() == 0
for ensemble in (torch.ops.srt.ensemble, srt_ext.ensemble):
    gpu.failing_launch = 2
    launches()
    with pytest.raises(RuntimeError, match="srt::ensemble: CUDA: unspecified launch failure"):
        ensemble(*args)
gpu.failing_launch = -1
# As on a GPU: sums that are computed again near a NaN have another order.
Ops.assert_same = lambda self, *fields: torch.testing.assert_close(*fields, equal_nan=True)
tests = "cpu-baseline or strides or dtype_and_stride or no_pixels or (sum_to and baseline)"
tests = f"({tests}) and not changes_no_bit"
assert pytest.main(["-q", "-p", "no:cacheprovider", "-k", tests, *sys.argv[2:]]) == 0
assert library.live_guards() == 0
"""


@pytest.mark.slow
def test_ops(tmp_path: Path) -> None:
    """csrc/torch through the dispatcher; every tensor is treated as one on the device."""
    torch_path = Path(torch.__file__).parent
    kernels = [path for name, path in objects().items() if name != "host.cpp"]
    flags = ("-O1", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    glue = compiled(STUB / "glue.cpp", tmp_path / "glue.o", *flags, f"-isystem{torch_path}/include")
    link = ("-Wl,-Bsymbolic", "-L", f"{torch_path}/lib", "-ltorch_cpu")
    library = linked([glue, *kernels], tmp_path / "ops.so", *link)
    names = ("kernels", "ensemble", "median", "shift", "windows", "streams", "gradients")
    tests = [str(ROOT / "python_tests" / f"test_{name}.py") for name in names]
    path = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))
    run_python("-c", OPS, library, *tests, env={"PYTHONPATH": path})


# ---- the handlers for JAX -----------------------------------------------------------------------

HANDLERS = """
import ctypes, sys
import jax, pytest
from backends import HostDevice

library = ctypes.CDLL(sys.argv[1])
library.device.restype = ctypes.POINTER(HostDevice)
library.device().contents.stream = 0x5EED
register = jax.ffi.register_ffi_target

def registered(name, handler, platform):
    if platform == "cpu":  # replaces the handlers for the CPU
        handler = jax.ffi.pycapsule(getattr(library, name.replace("srt_", "host_")))
    register(name, handler, platform=platform)

jax.ffi.register_ffi_target = registered
import test_jax

def assert_near(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    test_jax.assert_close(actual, expected, 1e-2 if actual.dtype.itemsize < 4 else 1e-5)

test_jax.assert_same = assert_near
# The others pass values that are not finite, or large inputs.
skipped = "wrong_values or large or several_threads or interface or missing or without_torch"
tests = ["-k", f"not ({skipped})", *sys.argv[2:]]
assert pytest.main(["-q", "-p", "no:cacheprovider", *tests]) == 0
assert library.handler_calls() > 500
"""


@pytest.mark.slow
def test_jax_handlers(tmp_path: Path) -> None:
    """csrc/xla/cuda.cu in programs of JAX; every array is treated as one on the device."""
    jax = pytest.importorskip("jax")
    kernels = [path for name, path in objects().items() if name != "host.cpp"]
    handlers = compiled(
        STUB / "xla.cpp", tmp_path / "xla.o", "-O1", f"-isystem{jax.ffi.include_dir()}"
    )
    library = linked([handlers, *kernels], tmp_path / "xla.so", "-Wl,-Bsymbolic")
    path = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))
    tests = ROOT / "python_tests" / "test_jax.py"
    run_python("-c", HANDLERS, library, tests, env={"PYTHONPATH": path})
