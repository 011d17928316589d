"""srt_ext.dlpack: arrays of other frameworks in and out, without copies and in the right order."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from samples import DTYPES, Ensemble, Shift, sample_ensembles, sample_shifts

from srt_ext import dlpack, ops

ENSEMBLE = Ensemble(weights=(1.0, 0.0, 2.5, 1e-3, 7.0, 1.0, 1.0, 1.0, 1.0), stride=(2, 3), prefix=1)
SHIFT = Shift(layout="sliced")


@pytest.fixture
def jax(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # XLA would take most of a GPU's memory at once.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return pytest.importorskip("jax")


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the torch ops were given, and what they gave, as addresses."""
    seen = SimpleNamespace(given=[], made=[])

    def spy(name: str) -> None:
        op = getattr(ops, name)

        def call(*args: Any, **modes: Any) -> Any:
            result = op(*args, **modes)
            seen.given = [a.data_ptr() for a in args if isinstance(a, torch.Tensor)]
            made = result if isinstance(result, tuple) else (result,)
            seen.made = [r.data_ptr() for r in made]
            return result

        monkeypatch.setattr(ops, name, call)

    for name in ("shift", "ensemble", "ensemble_moments"):
        spy(name)
    return seen


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and torch.equal(bits(actual), bits(expected))
    )


@dataclass
class Framework:
    """How the tests make arrays of one kind."""

    make: Callable[[torch.Tensor], Any]
    back: Callable[[Any], torch.Tensor]
    address: Callable[[Any], int]
    kind: type


def numpy_arrays() -> Framework:
    return Framework(
        make=lambda tensor: tensor.numpy(),
        back=torch.from_numpy,
        address=lambda a: a.__array_interface__["data"][0],
        kind=np.ndarray,
    )


def torch_tensors() -> Framework:
    return Framework(lambda t: t, lambda t: t, lambda t: t.data_ptr(), torch.Tensor)


def jax_arrays(jax: ModuleType) -> Framework:
    def make(tensor: torch.Tensor) -> Any:
        return jax.dlpack.from_dlpack(tensor.contiguous())

    return Framework(
        make=make,
        back=torch.from_dlpack,
        address=lambda a: a.unsafe_buffer_pointer(),
        kind=jax.Array,
    )


@pytest.fixture(params=["numpy", "torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Framework:
    if request.param == "jax":
        return jax_arrays(request.getfixturevalue("jax"))
    return {"numpy": numpy_arrays, "torch": torch_tensors}[request.param]()


# ---- values, kinds and memory -------------------------------------------------------------------

CASES = ("real", "weights", "token_scale", "one_token", "wide")


@pytest.mark.parametrize("name", CASES)
def test_ensemble_is_that_of_the_op_without_copies(
    name: str, framework: Framework, spied: SimpleNamespace
) -> None:
    case = sample_ensembles()[name]
    (tokens, *rest), modes = case.call(case.tokens())
    expected = torch.ops.srt.ensemble(tokens, *rest, **modes)
    given = framework.make(tokens)
    result = dlpack.ensemble(given, *rest, **modes)
    assert isinstance(result, framework.kind)
    assert same(framework.back(result), expected)
    assert spied.given[0] == framework.address(given)
    assert spied.made == [framework.address(result)]
    if framework.kind in (np.ndarray, torch.Tensor):
        assert framework.back(result).stride() == expected.stride()


def test_moments_and_median_are_those_of_the_ops(
    framework: Framework, spied: SimpleNamespace
) -> None:
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    given = framework.make(tokens)
    results = dlpack.ensemble_moments(given, offsets, grid, patch, weights, **modes)
    assert spied.given[0] == framework.address(given)
    expected = torch.ops.srt.ensemble_moments(tokens, offsets, grid, patch, weights, **modes)
    for result, right in zip(results, expected, strict=True):
        assert isinstance(result, framework.kind)
        assert same(framework.back(result), right)
    modes |= {"reduce": "median", "upsample": "nearest", "border": "clamp", "stride": [4, 6]}
    median = dlpack.ensemble(given, offsets, grid, patch, **modes)
    assert same(
        framework.back(median), torch.ops.srt.ensemble(tokens, offsets, grid, patch, **modes)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["whole", "strided", "one_pixel"])
def test_shift_is_that_of_the_op_without_copies(
    name: str, dtype: torch.dtype, framework: Framework, spied: SimpleNamespace
) -> None:
    case = sample_shifts()[name]
    (image, offsets), modes = case.call(case.image(dtype))
    given = framework.make(image)
    result = dlpack.shift(given, offsets, **modes)
    assert isinstance(result, framework.kind)
    assert same(framework.back(result), torch.ops.srt.shift(image, offsets, **modes))
    assert spied.given[0] == framework.address(given)
    assert spied.made == [framework.address(result)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_kept(
    framework: Framework, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if framework.kind is np.ndarray and dtype == torch.bfloat16:
        pytest.skip("test_numpy_bfloat16")
    in_jax = framework.kind not in (np.ndarray, torch.Tensor)
    if in_jax:  # or float64 would be made float32
        request.getfixturevalue("jax").config.update("jax_enable_x64", True)
    try:
        (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens(dtype))
        given = framework.make(tokens)
        result = dlpack.ensemble(given, *rest, **modes)
        assert result.dtype == given.dtype
        assert same(framework.back(result), torch.ops.srt.ensemble(tokens, *rest, **modes))
    finally:
        if in_jax:
            request.getfixturevalue("jax").config.update("jax_enable_x64", False)


def test_numpy_bfloat16(spied: SimpleNamespace) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens(torch.bfloat16))
    given = tokens.view(torch.uint16).numpy().view(bfloat16)
    result = dlpack.ensemble(given, offsets, grid, patch, weights, **modes)
    assert result.dtype == bfloat16
    assert spied.given[0] == given.ctypes.data
    assert spied.made == [result.ctypes.data]
    expected = torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    assert same(torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16), expected)


def test_strides_are_read_in_place(spied: SimpleNamespace) -> None:
    model_output = np.random.default_rng(0).random((9, 2, 16, 24), dtype=np.float32)
    tokens = model_output[:, :, 1:, 2:21]
    offsets = torch.tensor(ENSEMBLE.offsets)
    result = dlpack.ensemble(tokens, offsets, (3, 5), (4, 6))
    assert spied.given[0] == tokens.ctypes.data
    assert result.strides[1] == 4  # channels_last: no copy
    expected = torch.ops.srt.ensemble(torch.tensor(tokens), offsets, (3, 5), (4, 6))
    assert same(torch.from_numpy(result), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 15, 1), (1, 2, 15, 3), (3, 0, 15, 3)])
def test_sizes_of_1_and_0(framework: Framework, shape: tuple[int, ...]) -> None:
    """Where a size is 1 a stride means nothing, and frameworks differ about it."""
    grid, tokens = (1, 1) if shape[2] == 1 else (3, 5), torch.ones(shape)
    offsets = torch.zeros(shape[0], 2)
    for stride in ((1, 1), (grid[0] * 4, 1), (grid[0] * 4, grid[1] * 4)):
        result = dlpack.ensemble(framework.make(tokens), offsets, grid, (4, 4), stride=stride)
        expected = torch.ops.srt.ensemble(tokens, offsets, grid, (4, 4), stride=stride)
        assert same(framework.back(result), expected)


def test_read_only_numpy(spied: SimpleNamespace, tmp_path: Any) -> None:
    tokens = ENSEMBLE.tokens().numpy().copy()
    tokens.flags.writeable = False
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    offsets = np.array(ENSEMBLE.offsets)
    offsets.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [dlpack.ensemble(t, offsets, (3, 5), (4, 6)) for t in (tokens, mapped)]
        assert spied.given[0] == mapped.ctypes.data
    assert not tokens.flags.writeable
    for result in results:
        assert result.flags.writeable
        assert type(result) is np.ndarray
        assert np.array_equal(result, results[0])
    expected = torch.ops.srt.ensemble(ENSEMBLE.tokens(), torch.tensor(offsets), (3, 5), (4, 6))
    assert same(torch.from_numpy(results[0]), expected)


def test_memory_outlives_what_made_it(framework: Framework) -> None:
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    expected = torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    results = []
    for _ in range(20):  # freed memory would be used again
        given = framework.make(tokens.clone())
        results.append(dlpack.ensemble(given, offsets, grid, patch, weights, **modes))
        del given
    for result in results:
        assert same(framework.back(result), expected)


def test_gradients_reach_tensors() -> None:
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens().requires_grad_())
    assert dlpack.ensemble(tokens, *rest, **modes).requires_grad


# ---- offsets, weights, out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        None,
        lambda t: t,
        lambda t: t.numpy(),
        lambda t: t.double().numpy(),
        lambda t: t.tolist(),
        lambda t: [np.float64(x) if t.dim() == 1 else tuple(x) for x in t.tolist()],
        lambda t: np.flip(np.ascontiguousarray(np.flip(t.numpy(), 0)), 0),  # strides below 0
    ],
    ids=["framework", "tensor", "ndarray", "float64", "lists", "tuples", "flipped"],
)
def test_offsets_and_weights_of_many_kinds(
    framework: Framework, convert: Callable[..., Any] | None
) -> None:
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    convert = convert or framework.make
    expected = torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    result = dlpack.ensemble(
        framework.make(tokens), convert(offsets), grid, patch, convert(weights), **modes
    )
    assert same(framework.back(result), expected)


@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
def test_out(framework: Framework, spied: SimpleNamespace) -> None:
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    expected = torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    out = framework.make(torch.full(expected.shape, float("nan")))
    result = dlpack.ensemble(
        framework.make(tokens), offsets, grid, patch, weights, **modes, out=out
    )
    assert result is out
    assert spied.made == [framework.address(out)]
    assert same(framework.back(out), expected)


# ---- JAX ----------------------------------------------------------------------------------------


def test_jax_waits_for_the_producer(jax: ModuleType) -> None:
    """JAX computes behind the back of Python, also on the CPU."""
    cpu = jax.devices("cpu")[0]
    weight = jax.device_put(np.eye(1024, dtype=np.float32), cpu)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ weight, x))
    tokens = ENSEMBLE.tokens()
    padded = torch.zeros(1024, 1024)
    padded.flatten()[: tokens.numel()] = tokens.flatten()
    late = slow(jax.device_put(padded.numpy(), cpu)).reshape(-1)[: tokens.numel()]
    (_, *rest), modes = ENSEMBLE.call(tokens)
    result = dlpack.ensemble(late.reshape(tuple(tokens.shape)), *rest, **modes)
    expected = torch.ops.srt.ensemble(tokens, *rest, **modes)
    assert same(torch.from_dlpack(result), expected)


def test_jax_results_are_of_use(jax: ModuleType) -> None:
    """Row order: with other strides some versions of JAX fail, or compute wrongly."""
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    given = jax_arrays(jax).make(tokens)
    result = dlpack.ensemble(given, *rest, **modes)
    for one in (result, *dlpack.ensemble_moments(given, *rest, **modes)):
        assert torch.from_dlpack(one).is_contiguous()
    expected = torch.ops.srt.ensemble(tokens, *rest, **modes)
    total = jax.jit(lambda x: x[:, 1:, ::2].sum((2, 3)))(result)
    torch.testing.assert_close(torch.from_dlpack(total), expected[:, 1:, ::2].sum((2, 3)))


def test_jax_tracers_are_refused(jax: ModuleType) -> None:
    with pytest.raises(
        TypeError, match=r"srt::shift: image must be an array with __dlpack__, without a mask; got"
    ):
        jax.jit(lambda x: dlpack.shift(x, [[0.0, 0.0]]))(np.ones((1, 1, 2, 2), np.float32))


# ---- the protocol -------------------------------------------------------------------------------


@dataclass
class Produced:
    """An array of a framework that exists here alone, and records how it is asked for memory."""

    tensor: torch.Tensor
    asked: list[dict[str, Any]] = field(default_factory=list)
    consumer: Any = None  # the stream that it consumes on
    producer: Any = None  # the stream that it produces on

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        with torch.cuda.stream(self.producer):  # None: a stream of the caller, or no GPU
            return self.tensor.__dlpack__(**options)

    def __array_namespace__(self) -> SimpleNamespace:
        def from_dlpack(other: Any) -> Produced:
            options = {}
            if self.consumer is not None:
                options["stream"] = self.consumer.cuda_stream
            capsule = other.__dlpack__(**options)
            return Produced(torch.utils.dlpack.from_dlpack(capsule), consumer=self.consumer)

        return SimpleNamespace(from_dlpack=from_dlpack)


def test_the_protocol_on_the_cpu() -> None:
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    given = [Produced(t) for t in (tokens, offsets, weights)]
    result = dlpack.ensemble(given[0], given[1], grid, patch, given[2], **modes)
    assert isinstance(result, Produced)
    assert same(
        result.tensor, torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    )
    assert result.tensor.is_contiguous()  # what an unknown framework is sure to take
    for one in given:
        (options,) = one.asked
        assert options.get("stream") is None  # the protocol's word for: the CPU has none
        assert not options.get("copy")
        assert options.get("dl_device") in (None, (1, 0))
        assert options.get("max_version", (1, 0)) >= (1, 0)


def test_an_old_producer_knows_no_options() -> None:
    class Old(Produced):
        def __dlpack__(self, *, stream: Any = None) -> Any:
            return self.tensor.__dlpack__()

    image = SHIFT.image()
    result = dlpack.shift(Old(image), [[0.5, 1.0]])
    assert same(result.tensor, torch.ops.srt.shift(image, torch.tensor([[0.5, 1.0]])))


# ---- errors -------------------------------------------------------------------------------------

TOKENS = np.ones((2, 1, 6, 3), np.float32)


def ensemble(**changes: Any) -> Any:
    call = {"tokens": TOKENS, "offsets": [[0.0, 0.0], [1.0, 2.0]], "grid": [2, 3], "patch": [4, 5]}
    return dlpack.ensemble(**{**call, **changes})


class Endless:
    """Memory that can be taken, in a kind that nothing can be made into."""

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("asked for nothing")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def locked(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    result = np.zeros(shape, np.float32)
    result.flags.writeable = False
    return result


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokens": [[1.0]]},
            TypeError,
            "tokens must be an array with __dlpack__, without a mask; got list",
        ),
        ({"tokens": np.ma.masked_less(TOKENS, 0)}, TypeError, "tokens must .*; got MaskedArray"),
        ({"offsets": np.ma.zeros((2, 2))}, TypeError, "offsets must .*; got MaskedArray"),
        (
            {"tokens": None},
            TypeError,
            "tokens must be an array with __dlpack__, without a mask; got NoneType",
        ),
        ({"tokens": Endless()}, TypeError, "tokens must have __array_namespace__.*; got Endless"),
        ({"offsets": "abc"}, TypeError, "offsets must be an array or a sequence .*; got str"),
        ({"offsets": [[0, 0], [1]]}, TypeError, "offsets must be an array or a seq.*; got list"),
        ({"weights": {}}, TypeError, "weights must be an array or a sequence .*; got dict"),
        ({"out": [1]}, TypeError, "out must be an array with __dlpack__, without a mask; got list"),
        ({"out": locked((1, 3, 8, 15))}, TypeError, "out must be an array that can be written to"),
        # of the op, as they are
        ({"offsets": [[0, 0]]}, ValueError, r"offsets must be \[V, 2\] with V = 2; got \[1, 2\]"),
        ({"weights": [1, -1]}, ValueError, "weights must be"),
        ({"out": np.zeros((1, 3, 8, 15))}, TypeError, "out must have the dtype of tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="srt::ensemble: " + message):
        ensemble(**changes)


def test_strides_below_0_are_refused() -> None:
    image = np.ones((1, 3, 4, 4), np.float32)[:, ::-1]  # BGR to RGB
    with pytest.raises(ValueError, match="stride"):
        dlpack.shift(image, [[0.0, 0.0]])


def test_jax_out_is_refused(jax: ModuleType) -> None:
    with pytest.raises(TypeError, match="srt::ensemble: out must be an array that can be written"):
        ensemble(out=jax.numpy.zeros((1, 3, 8, 15)))


# ---- import -------------------------------------------------------------------------------------

LAZY = """
import sys
import srt_ext
import srt_ext.dlpack
assert srt_ext.dlpack.shift
print({"jax", "cupy", "ml_dtypes", "typer", "timm", "matplotlib", "rich"} & set(sys.modules))
"""
REASON = "srt_ext.dlpack is not available: torch is not installed"
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
import srt_ext
for touch in (lambda: srt_ext.dlpack, lambda: __import__("srt_ext.dlpack")):
    try:
        touch()
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "printed"), [(LAZY, "set()"), (WITHOUT_TORCH, REASON)])
def test_import_needs_no_framework(script: str, printed: str) -> None:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(printed) for line in result.stdout.splitlines())
    assert result.stdout.count("\n") == (1 if script is LAZY else 2)


# ---- how long inputs are kept -------------------------------------------------------------------


class Event:
    """Of a GPU that is done when the test says so."""

    def __init__(self) -> None:
        self.done = False

    def record(self, stream: object) -> None:
        assert stream == "current stream of cuda:1"

    def query(self) -> bool:
        return self.done


def test_inputs_are_kept_until_the_gpu_has_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"current stream of {d}")
    monkeypatch.setattr(dlpack, "_in_use", deque())
    first, second, third = (SimpleNamespace(is_cuda=True, device="cuda:1") for _ in range(3))
    on_cpu = SimpleNamespace(is_cuda=False)
    dlpack._hold((first, first, on_cpu, None), ("cupy", first, "cupy", None))  # one is torch's own
    dlpack._hold((on_cpu, second), ("numpy", second))
    assert [kept for _, kept in dlpack._in_use] == [[first]]
    dlpack._hold((second, third), ("cupy", "jax"))
    assert [kept for _, kept in dlpack._in_use] == [[first], [second, third]]
    dlpack._in_use[0][0].done = True
    dlpack._hold((first,), ("cupy",))
    assert [kept for _, kept in dlpack._in_use] == [[second, third], [first]]


# ---- on a GPU -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.cuda
SLEEP = 400_000_000  # clock cycles: some tenths of a second


def on_gpu() -> tuple[torch.Tensor, list[Any], dict[str, Any], torch.Tensor]:
    """tokens on the GPU; the other arguments, the modes and the right result on the host."""
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    expected = torch.ops.srt.ensemble(tokens.cuda(), *rest, **modes).cpu()
    return tokens.cuda(), rest, modes, expected


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Another order in memory may mean another order of sums; too early is NaN."""
    torch.testing.assert_close(actual, expected)


@needs_gpu
@pytest.mark.parametrize("current", ["default", "side"])
def test_streams_wait_for_each_other(current: str) -> None:
    """The producer's stream is late, and ours with it: both ends must wait."""
    tokens, rest, modes, expected = on_gpu()
    producer, ours, consumer = (torch.cuda.Stream() for _ in range(3))
    if current == "default":
        ours = torch.cuda.default_stream()
    for sleep in (0, SLEEP):  # memory is allocated and kernels are loaded before it counts
        late = torch.full_like(tokens, float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(sleep)
            late.copy_(tokens)
        given = Produced(late, producer=producer, consumer=consumer)
        with torch.cuda.stream(ours):
            result = dlpack.ensemble(given, *rest, **modes)
        with torch.cuda.stream(consumer):
            read = result.tensor.clone()
    assert not consumer.query()  # nobody has waited on the host
    torch.cuda.synchronize()
    (options,) = given.asked
    assert options["stream"] == (1 if current == "default" else ours.cuda_stream)
    check(read.cpu(), expected)


@needs_gpu
def test_memory_of_inputs_is_kept_while_it_is_read() -> None:
    tokens, rest, modes, expected = on_gpu()
    dlpack.ensemble(Produced(tokens), *rest, **modes)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    copy = tokens.clone()
    size = torch.cuda.memory_allocated() - before
    torch.cuda._sleep(SLEEP)
    result = dlpack.ensemble(Produced(copy), *rest, **modes)
    with_copy = torch.cuda.memory_allocated()
    del copy
    gc.collect()
    assert torch.cuda.memory_allocated() == with_copy
    check(result.tensor.cpu(), expected)
    dlpack.ensemble(Produced(tokens), *rest, **modes)  # looks, and lets go
    assert torch.cuda.memory_allocated() == with_copy - size


@needs_gpu
def test_offsets_and_weights_on_a_gpu() -> None:
    tokens, (offsets, grid, patch, weights), modes, expected = on_gpu()
    given = [Produced(t.cuda()) for t in (tokens, offsets, weights)]
    result = dlpack.ensemble(given[0], given[1], grid, patch, given[2], **modes)
    check(result.tensor.cpu(), expected)


@needs_gpu
def test_cupy() -> None:
    """CuPy on a side stream, our kernel on torch's, and CuPy again."""
    cupy = pytest.importorskip("cupy")
    tokens, rest, modes, expected = on_gpu()
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        source = cupy.asarray(tokens.cpu().numpy())
        for sleep in (0, SLEEP):  # kernels are compiled before it counts
            late = cupy.full(tokens.shape, np.nan, dtype=np.float32)
            side.synchronize()
            with torch.cuda.stream(torch.cuda.ExternalStream(side.ptr)):
                torch.cuda._sleep(sleep)
            cupy.copyto(late, source)
            result = dlpack.ensemble(late, *rest, **modes)
            address = late.data.ptr
            del late
            other = cupy.full(tokens.shape, np.nan, dtype=np.float32)
            read = result.copy()
        assert not side.done
        assert other.data.ptr != address  # of what is still read
        side.synchronize()
    assert isinstance(result, cupy.ndarray)
    assert result.strides[1] == result.itemsize  # channels_last: as the kernel wrote it
    check(torch.from_numpy(cupy.asnumpy(read)), expected)
    out = cupy.full(expected.shape, np.nan, dtype=np.float32)
    assert dlpack.ensemble(source, *rest, **modes, out=out) is out
    check(torch.from_numpy(cupy.asnumpy(out)), expected)


@needs_gpu
def test_jax_on_a_gpu(jax: ModuleType) -> None:
    """A long computation of JAX, our kernel, JAX again."""
    devices = [device for device in jax.devices() if device.platform in ("gpu", "cuda")]
    if not devices:
        pytest.skip("this JAX has no CUDA")
    tokens, rest, modes, expected = on_gpu()
    weight = jax.device_put(np.eye(4096, dtype=np.float32), devices[0])
    multiply = functools.partial(jax.numpy.matmul, precision="highest")  # exact: by 0 and 1
    slow = jax.jit(lambda x, w: jax.lax.fori_loop(0, 50, lambda _, y: multiply(y, w), x))
    padded = np.zeros((4096, 4096), np.float32)
    padded.reshape(-1)[: tokens.numel()] = tokens.cpu().numpy().reshape(-1)
    start = jax.device_put(padded, devices[0])
    slow(start, weight).block_until_ready()  # compiled
    for _ in range(3):
        late = slow(start, weight).reshape(-1)[: tokens.numel()].reshape(tuple(tokens.shape))
        result = dlpack.ensemble(late, *rest, **modes)
        del late
        other = slow(start + 1, weight)  # takes what memory is free
        assert result.devices() == {devices[0]}
        check(torch.from_numpy(np.array(result + 0)), expected)
        del other


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current() -> None:
    tokens, rest, modes, expected = on_gpu()
    result = dlpack.ensemble(Produced(tokens.to("cuda:1")), *rest, **modes)
    assert result.tensor.device == torch.device("cuda:1")
    check(result.tensor.cpu(), expected)
