"""srt_ext.dlpack: arrays of other frameworks, without copies and in the order of streams."""

from __future__ import annotations

import functools
import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from arrays import array
from arrays import tensor as from_array
from process import run_python
from samples import DTYPES, ENSEMBLES, SHIFTS, WINDOWS, Call, Ensemble

from srt_ext import dlpack, ops

ENSEMBLE = Ensemble(weights=(1.0, 0.0, 2.5, 1e-3, 7.0, 1.0, 1.0, 1.0, 1.0), stride=(2, 3), prefix=1)


@pytest.fixture
def jax() -> Iterator[ModuleType]:
    module = pytest.importorskip("jax")
    module.config.update("jax_enable_x64", True)  # otherwise float64 is converted to float32
    yield module
    module.config.update("jax_enable_x64", False)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Records the addresses of the inputs and results of the last torch op."""
    seen = SimpleNamespace(given=[], made=[])

    def spy(op: Callable[..., Any], *args: Any, **modes: Any) -> Any:
        result = op(*args, **modes)
        seen.given = [a.data_ptr() for a in args if isinstance(a, torch.Tensor)]
        seen.made = [r.data_ptr() for r in in_tuple(result)]
        return result

    for name in ("shift", "windows", "ensemble", "ensemble_moments"):
        monkeypatch.setattr(ops, name, functools.partial(spy, getattr(ops, name)))
    return seen


def in_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts bitwise equality."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(*(t.flatten().view(torch.uint8) for t in (actual, expected)))


@dataclass
class Framework:
    """Conversions between tensors and the arrays of one framework."""

    make: Callable[[torch.Tensor], Any]
    back: Callable[[Any], torch.Tensor]
    address: Callable[[Any], int]
    kind: type


FRAMEWORKS = {
    "numpy": Framework(array, from_array, lambda a: a.ctypes.data, np.ndarray),
    "torch": Framework(lambda t: t, lambda t: t, lambda t: t.data_ptr(), torch.Tensor),
}


@pytest.fixture(params=["numpy", "torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Framework:
    if request.param in FRAMEWORKS:
        return FRAMEWORKS[request.param]
    jax = request.getfixturevalue("jax")
    return Framework(
        make=lambda tensor: jax.dlpack.from_dlpack(tensor.contiguous()),
        back=torch.from_dlpack,
        address=lambda a: a.unsafe_buffer_pointer(),
        kind=jax.Array,
    )


def check(framework: Framework, op: str, call: Call) -> tuple[Any, tuple[Any, ...]]:
    """Checks values, dtypes and types of the results; returns the input and the results."""
    (tensor, *rest), modes = call
    given = framework.make(tensor)
    results = in_tuple(getattr(dlpack, op)(given, *rest, **modes))
    expected = in_tuple(getattr(torch.ops.srt, op)(tensor, *rest, **modes))
    for result, right in zip(results, expected, strict=True):
        assert isinstance(result, framework.kind)
        assert result.dtype == given.dtype
        assert_same(framework.back(result), right)
    return given, results


# ---- values, kinds and memory -------------------------------------------------------------------

CASES = {
    **{name: ENSEMBLES[name] for name in ("real", "weights", "one_token", "wide")},
    "median": replace(ENSEMBLE, weights=None, upsample="nearest", border="clamp", stride=(4, 6)),
    "moments": ENSEMBLE,
}
CALLS: dict[str, tuple[str, Call]] = {
    **{str(d): ("ensemble", ENSEMBLE.call(ENSEMBLE.tokens(d))) for d in DTYPES},
    **{name: ("ensemble", case.call(case.tokens())) for name, case in CASES.items()},
    **{
        f"shift {name}": ("shift", SHIFTS[name].call(SHIFTS[name].image()))
        for name in ("whole", "strided", "one_pixel")
    },
    **{
        f"windows {name}": ("windows", WINDOWS[name].call(WINDOWS[name].image()))
        for name in ("scale", "scales")
    },
    "shift uint8": ("shift", SHIFTS["strided"].call(SHIFTS["strided"].image(torch.uint8))),
}
CALLS["median"][1][1]["reduce"] = "median"
CALLS["moments"] = ("ensemble_moments", CALLS["moments"][1])


@pytest.mark.parametrize("name", CALLS)
def test_results_equal_those_of_the_op_without_copies(
    name: str, framework: Framework, spied: SimpleNamespace
) -> None:
    if name == "torch.bfloat16" and framework.kind is np.ndarray:
        pytest.importorskip("ml_dtypes")
    op, ((tensor, *rest), modes) = CALLS[name]
    given, results = check(framework, *CALLS[name])
    assert spied.given[0] == framework.address(given)
    takes_strides = framework.kind in (np.ndarray, torch.Tensor)
    if takes_strides or name != "moments":
        assert spied.made == [framework.address(result) for result in results]
    if takes_strides:
        expected = in_tuple(getattr(torch.ops.srt, op)(tensor, *rest, **modes))
        assert [framework.back(r).stride() for r in results] == [r.stride() for r in expected]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 15, 1), (1, 2, 15, 3), (3, 0, 15, 3)])
def test_sizes_of_1_and_0(framework: Framework, shape: tuple[int, ...]) -> None:
    """The stride of a dimension of size 1 is arbitrary and differs between frameworks."""
    grid = (1, 1) if shape[2] == 1 else (3, 5)
    args = (torch.ones(shape), torch.zeros(shape[0], 2), grid, (4, 4))
    for stride in ((1, 1), (grid[0] * 4, 1), (grid[0] * 4, grid[1] * 4)):
        check(framework, "ensemble", (args, {"stride": stride}))


def test_read_only_numpy(spied: SimpleNamespace, tmp_path: Any) -> None:
    tokens, offsets = ENSEMBLE.tokens().numpy().copy(), np.array(ENSEMBLE.offsets)
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    tokens.flags.writeable = offsets.flags.writeable = False
    expected = torch.ops.srt.ensemble(ENSEMBLE.tokens(), torch.tensor(offsets), (3, 5), (4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (tokens, mapped):
            result = dlpack.ensemble(given, offsets, (3, 5), (4, 6))
            assert spied.given[0] == given.ctypes.data
            assert not given.flags.writeable
            assert result.flags.writeable
            assert type(result) is np.ndarray
            assert_same(torch.from_numpy(result), expected)


def test_results_outlive_their_inputs(framework: Framework) -> None:
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    expected = torch.ops.srt.ensemble(tokens, *rest, **modes)
    results = [  # freed memory would be reused
        dlpack.ensemble(framework.make(tokens.clone()), *rest, **modes) for _ in range(20)
    ]
    for result in results:
        assert_same(framework.back(result), expected)


def test_gradients_reach_tensors() -> None:
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens().requires_grad_())
    assert dlpack.ensemble(tokens, *rest, **modes).requires_grad


# ---- offsets, weights, out ----------------------------------------------------------------------


CONVERSIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda t: t,
    "ndarray": lambda t: t.numpy(),
    "float64": lambda t: t.double().numpy(),
    "lists": lambda t: t.tolist(),
    "tuples": lambda t: [np.float64(x) if t.dim() == 1 else tuple(x) for x in t.tolist()],
    "flipped": lambda t: np.flip(np.ascontiguousarray(np.flip(t.numpy(), 0)), 0),  # strides < 0
}


@pytest.mark.parametrize("kind", ["framework", *CONVERSIONS])
def test_offsets_and_weights_of_many_kinds(framework: Framework, kind: str) -> None:
    (tokens, offsets, grid, patch, weights), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    convert, given = CONVERSIONS.get(kind, framework.make), framework.make(tokens)
    result = dlpack.ensemble(given, convert(offsets), grid, patch, convert(weights), **modes)
    expected = torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    assert_same(framework.back(result), expected)


@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
def test_out(framework: Framework, spied: SimpleNamespace) -> None:
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    expected = torch.ops.srt.ensemble(tokens, *rest, **modes)
    out = framework.make(torch.full(expected.shape, float("nan")))
    assert dlpack.ensemble(framework.make(tokens), *rest, **modes, out=out) is out
    assert spied.made == [framework.address(out)]
    assert_same(framework.back(out), expected)


# ---- JAX ----------------------------------------------------------------------------------------


def test_pending_results_of_jax_are_awaited(jax: ModuleType) -> None:
    """JAX computes asynchronously, also on the CPU."""
    cpu = jax.devices("cpu")[0]
    weight = jax.device_put(np.eye(1024, dtype=np.float32), cpu)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ weight, x))
    tokens = ENSEMBLE.tokens()
    padded = torch.zeros(1024, 1024)
    padded.flatten()[: tokens.numel()] = tokens.flatten()
    late = slow(jax.device_put(padded.numpy(), cpu)).reshape(-1)[: tokens.numel()]
    (_, *rest), modes = ENSEMBLE.call(tokens)
    result = dlpack.ensemble(late.reshape(tuple(tokens.shape)), *rest, **modes)
    assert_same(torch.from_dlpack(result), torch.ops.srt.ensemble(tokens, *rest, **modes))


@pytest.mark.parametrize("framework", ["jax"], indirect=True)
def test_results_are_contiguous_and_usable_in_jax(framework: Framework, jax: ModuleType) -> None:
    """Row-major: with other strides some versions of JAX fail or compute wrong results."""
    for op in ("ensemble", "ensemble_moments"):
        for result in check(framework, op, ENSEMBLE.call(ENSEMBLE.tokens()))[1]:
            tensor = torch.from_dlpack(result)
            assert tensor.is_contiguous()
            total = jax.jit(lambda x: x[:, 1:, ::2].sum((2, 3)))(result)
            torch.testing.assert_close(torch.from_dlpack(total), tensor[:, 1:, ::2].sum((2, 3)))


def test_jax_tracers_and_out_raise(jax: ModuleType) -> None:
    with pytest.raises(
        TypeError, match=r"srt::shift: image must be an array with __dlpack__, without a mask; got"
    ):
        jax.jit(lambda x: dlpack.shift(x, [[0.0, 0.0]]))(np.ones((1, 1, 2, 2), np.float32))
    with pytest.raises(TypeError, match="srt::ensemble: out must be a writable array"):
        ensemble(out=jax.numpy.zeros((1, 3, 8, 15)))
    with pytest.raises(ValueError, match="reduce must be one of"):  # before 4 TB are allocated
        dlpack.ensemble(jax.numpy.ones((1, 1, 1, 1)), [[0, 0]], [1, 1], [2**20] * 2, reduce="max")


# ---- the protocol -------------------------------------------------------------------------------


@dataclass
class Produced:
    """An array of a fictitious framework that records the calls of ``__dlpack__``."""

    tensor: torch.Tensor
    asked: list[dict[str, Any]] = field(default_factory=list)
    consumer: Any = None  # the stream of the consumer
    producer: Any = None  # the stream of the producer

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        with torch.cuda.stream(self.producer):  # None: the stream of the caller, or no GPU
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
    expected = torch.ops.srt.ensemble(tokens, offsets, grid, patch, weights, **modes)
    assert_same(result.tensor, expected)
    assert result.tensor.is_contiguous()  # every framework accepts contiguous arrays
    for one in given:
        (options,) = one.asked
        assert options.get("stream") is None  # the CPU has no streams
        assert not options.get("copy")
        assert options.get("dl_device") in (None, (1, 0))
        assert options.get("max_version", (1, 0)) >= (1, 0)


def test_producers_without_options_are_supported() -> None:
    class Old(Produced):
        def __dlpack__(self, *, stream: Any = None) -> Any:
            return self.tensor.__dlpack__()

    (image, *rest), modes = CALLS["shift strided"][1]
    result = dlpack.shift(Old(image), *rest, **modes)
    assert_same(result.tensor, torch.ops.srt.shift(image, *rest, **modes))


# ---- errors -------------------------------------------------------------------------------------

TOKENS = np.ones((2, 1, 6, 3), np.float32)


def ensemble(**changes: Any) -> Any:
    call = {"tokens": TOKENS, "offsets": [[0.0, 0.0], [1.0, 2.0]], "grid": [2, 3], "patch": [4, 5]}
    return dlpack.ensemble(**{**call, **changes})


# An object without __array_namespace__; memory with wrong strides, wrong alignment, read-only.
ENDLESS = SimpleNamespace(__dlpack__=None, __dlpack_device__=None)
RECORDS = np.zeros((2, 1, 6, 3), "f4,u1")["f0"]
BESIDE = np.zeros(4 * 36 + 1, np.uint8)[1:].view(np.float32).reshape(2, 1, 6, 3)
LOCKED = np.broadcast_to(np.float32(0), (1, 3, 8, 15))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": [[1.0]]}, TypeError, "tokens must be .* __dlpack__, without a mask; got list"),
        ({"tokens": np.ma.masked_less(TOKENS, 0)}, TypeError, "tokens must .*; got MaskedArray"),
        ({"offsets": np.ma.zeros((2, 2))}, TypeError, "offsets must .*; got MaskedArray"),
        ({"tokens": None}, TypeError, "tokens must be an array with __dlpack__.*; got NoneType"),
        ({"tokens": TOKENS[..., ::-1]}, ValueError, "tokens must have strides >= 0; got"),
        ({"tokens": ENDLESS}, TypeError, "tokens must have __array_namespace__.*; got SimpleN"),
        ({"offsets": "abc"}, TypeError, "offsets must be an array or a sequence .*; got str"),
        ({"offsets": [[0, 0], [1]]}, TypeError, "offsets must be an array or a seq.*; got list"),
        (
            {"offsets": [[10**400, 0]] * 2},
            TypeError,
            "offsets must be an array or a seq.*; got list",
        ),
        ({"offsets": np.zeros((2, 2), ">f4")}, TypeError, "offsets must have .* byte order"),
        ({"offsets": np.zeros((2, 2), "S4")}, TypeError, r"offsets must have a dtype .*; got \|S4"),
        ({"weights": np.ones(2, object)}, TypeError, "weights must have a dtype .*; got object"),
        ({"tokens": np.zeros((2, 1, 6, 3), "f4,f4")}, TypeError, "tokens must have a dtype"),
        ({"tokens": TOKENS.astype(np.longdouble)}, TypeError, "tokens must have a dtype that"),
        ({"tokens": RECORDS}, ValueError, "tokens must have strides that are multiples"),
        ({"tokens": BESIDE}, ValueError, "tokens must be aligned to its element size, 4"),
        ({"weights": {}}, TypeError, "weights must be an array or a sequence .*; got dict"),
        ({"out": [1]}, TypeError, "out must be an array with __dlpack__, without a mask; got list"),
        ({"out": LOCKED}, TypeError, "out must be a writable array; got a read-only ndarray"),
        # The errors of the op itself.
        ({"offsets": [[0, 0]]}, ValueError, r"offsets must be \[V, 2\] with V = 2; got \[1, 2\]"),
        ({"weights": [1, -1]}, ValueError, "weights must be"),
        ({"out": np.zeros((1, 3, 8, 15))}, TypeError, "out must have the dtype of tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_raise(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="srt::ensemble: " + message):
        ensemble(**changes)


def test_offsets_that_require_grad_are_accepted() -> None:
    """Although NumPy rejects such tensors."""
    offsets = torch.zeros(2, 2, requires_grad=True)
    np.testing.assert_array_equal(ensemble(offsets=offsets), ensemble(offsets=offsets.detach()))


# ---- import -------------------------------------------------------------------------------------

LAZY = """
import sys, srt_ext.dlpack
print({"jax", "cupy", "ml_dtypes", "typer", "timm", "matplotlib", "rich"} & set(sys.modules))
"""


@pytest.mark.slow
def test_import_needs_no_framework() -> None:
    assert run_python("-c", LAZY).stdout == "set()\n"


# ---- lifetime of inputs -------------------------------------------------------------------------


def test_inputs_are_kept_until_the_gpu_has_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: Mock(query=Mock(return_value=False)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"current stream of {d}")
    monkeypatch.setattr(dlpack, "_in_use", deque())
    first, second, third = (SimpleNamespace(is_cuda=True, device="cuda:1") for _ in range(3))
    on_cpu = SimpleNamespace(is_cuda=False)
    dlpack._hold(
        (first, first, on_cpu, None), ("cupy", first, "cupy", None)
    )  # one is a tensor of torch
    dlpack._hold((on_cpu, second), ("numpy", second))
    assert [kept for _, kept in dlpack._in_use] == [[first]]
    dlpack._hold((second, third), ("cupy", "jax"))
    assert [kept for _, kept in dlpack._in_use] == [[first], [second, third]]
    event = dlpack._in_use[0][0]
    event.record.assert_called_once_with("current stream of cuda:1")
    event.query.return_value = True
    dlpack._hold((first,), ("cupy",))
    assert [kept for _, kept in dlpack._in_use] == [[second, third], [first]]


# ---- on a GPU -----------------------------------------------------------------------------------

SLEEP = 400_000_000  # clock cycles: some tenths of a second


def on_gpu() -> tuple[torch.Tensor, list[Any], dict[str, Any], torch.Tensor]:
    """Tokens on the GPU; the other arguments, the modes and the expected result on the host.

    Results may differ by the order of sums; a result that is read too early is NaN.
    """
    (tokens, *rest), modes = ENSEMBLE.call(ENSEMBLE.tokens())
    expected = torch.ops.srt.ensemble(tokens.cuda(), *rest, **modes).cpu()
    return tokens.cuda(), rest, modes, expected


@pytest.mark.cuda
@pytest.mark.parametrize("current", ["default", "side"])
def test_streams_wait_for_each_other(current: str) -> None:
    """The stream of the producer is delayed: our stream and that of the consumer must wait."""
    tokens, rest, modes, expected = on_gpu()
    producer, ours, consumer = (torch.cuda.Stream() for _ in range(3))
    if current == "default":
        ours = torch.cuda.default_stream()
    for sleep in (0, SLEEP):  # the first pass allocates memory and loads kernels
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
    assert not consumer.query()  # the host has not synchronised
    torch.cuda.synchronize()
    (options,) = given.asked
    assert options["stream"] == (1 if current == "default" else ours.cuda_stream)
    torch.testing.assert_close(read.cpu(), expected)


@pytest.mark.cuda
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
    torch.testing.assert_close(result.tensor.cpu(), expected)
    dlpack.ensemble(Produced(tokens), *rest, **modes)  # releases inputs that have been read
    assert torch.cuda.memory_allocated() == with_copy - size


@pytest.mark.cuda
def test_offsets_and_weights_on_a_gpu() -> None:
    tokens, (offsets, grid, patch, weights), modes, expected = on_gpu()
    given = [Produced(t.cuda()) for t in (tokens, offsets, weights)]
    result = dlpack.ensemble(given[0], given[1], grid, patch, given[2], **modes)
    torch.testing.assert_close(result.tensor.cpu(), expected)


@pytest.mark.cuda
def test_cupy() -> None:
    """CuPy on a side stream, our kernel on the stream of torch, and CuPy again."""
    cupy = pytest.importorskip("cupy")
    tokens, rest, modes, expected = on_gpu()
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        source = cupy.asarray(tokens.cpu().numpy())
        for sleep in (0, SLEEP):  # the first pass compiles kernels
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
        assert other.data.ptr != address  # memory that is still read is not reused
        side.synchronize()
    assert isinstance(result, cupy.ndarray)
    assert result.strides[1] == result.itemsize  # channels_last, as the kernel writes it
    torch.testing.assert_close(torch.from_numpy(cupy.asnumpy(read)), expected)
    out = cupy.full(expected.shape, np.nan, dtype=np.float32)
    assert dlpack.ensemble(source, *rest, **modes, out=out) is out
    torch.testing.assert_close(torch.from_numpy(cupy.asnumpy(out)), expected)


@pytest.mark.cuda
def test_jax_on_a_gpu(jax: ModuleType) -> None:
    """A long computation of JAX, our kernel, and JAX again."""
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
        other = slow(start + 1, weight)  # allocates free memory
        assert result.devices() == {devices[0]}
        torch.testing.assert_close(torch.from_numpy(np.array(result + 0)), expected)
        del other


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tokens_on_a_gpu_that_is_not_current() -> None:
    tokens, rest, modes, expected = on_gpu()
    result = dlpack.ensemble(Produced(tokens.to("cuda:1")), *rest, **modes)
    assert result.tensor.device == torch.device("cuda:1")
    torch.testing.assert_close(result.tensor.cpu(), expected)
