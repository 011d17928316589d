"""Tests that need a GPU: streams, graphs, synchronisation, devices, large memory, real sizes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Ops, empty_state
from bounds import gradient
from budget import assert_within_budget
from oracle import check_result, field_of
from oracle import shift as shift_oracle
from samples import (
    DTYPES,
    ENSEMBLES,
    UPSAMPLES,
    Ensemble,
    Shift,
    each_dtype,
    each_reduce,
    poison,
    random_views,
)
from test_gradients import problem
from test_ops import check_compiled, model, model_inputs

import srt_ext

pytestmark = pytest.mark.cuda

NAN = float("nan")
GPU = Ops("cuda")
VALUES = ("host", "device")  # the places of offsets and weights
SLEEP = 400_000_000  # clock cycles: some tenths of a second

each_values = pytest.mark.parametrize("values", VALUES)


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


# ---- realistic sizes ----------------------------------------------------------------------------


def assert_as_on_the_cpu(case: Ensemble, tokens: torch.Tensor, field: torch.Tensor) -> None:
    truth, same = (Ops("cpu").ensemble(case, tokens.to(t)) for t in (torch.float64, torch.float32))
    assert_within_budget(field, truth, same.to(tokens.dtype))


REALISTIC_SIZES = [  # grid, patch, channels, stride
    ((14, 14), (16, 16), 384, (1, 1)),
    ((14, 14), (16, 16), 384, (16, 16)),
    ((30, 53), (16, 16), 192, (4, 4)),
    ((37, 37), (14, 14), 100, (2, 2)),
]


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("grid", "patch", "channels", "stride"), REALISTIC_SIZES)
def test_realistic_sizes(
    grid: tuple[int, int],
    patch: tuple[int, int],
    channels: int,
    stride: tuple[int, int],
    dtype: torch.dtype,
    upsample: str,
) -> None:
    """Against the CPU kernels, because the oracle would take minutes."""
    offsets = tuple((y + 0.25, x / 2) for y in range(-3, 4) for x in range(-3, 4))
    case = Ensemble(grid, patch, offsets, channels, 1, 1, stride=stride, upsample=upsample)
    tokens = case.tokens(dtype)
    assert_as_on_the_cpu(case, tokens, GPU.ensemble(case, tokens))


@each_values
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", ["grid", "nearest", "real", "beyond", "weights", "stride"])
def test_many_tiles(name: str, dtype: torch.dtype, values: str) -> None:
    """The samples, with enough images and channels to fill a GPU."""
    case = replace(ENSEMBLES[name], batch=5, channels=2112)
    tokens = case.tokens(dtype)
    field = GPU.ensemble(case, tokens, place=values)
    assert_as_on_the_cpu(case, tokens, field)

    poisoned = poison(tokens, 1)
    actual = GPU.ensemble(case, poisoned, place=values)
    expected = Ops("cpu").ensemble(case, poisoned).isfinite()
    assert torch.equal(actual.isfinite(), expected)
    GPU.assert_same(actual[expected], field[expected])


def test_long_axes() -> None:
    offsets = ((0.25, -0.5), (0.0, 2.0**20 - 0.25))
    for grid, patch in (((1, 2**16), (1, 2**6)), ((2**16, 1), (2**6, 1))):
        case = Ensemble(grid, patch, offsets, channels=2, batch=1)
        tokens = case.tokens()
        assert_as_on_the_cpu(case, tokens, GPU.ensemble(case, tokens))


@each_dtype
def test_repeated_calls_are_bitwise_equal(dtype: torch.dtype) -> None:
    """Results that differ between calls indicate a race."""
    case = Ensemble((14, 14), (16, 16), random_views(49), channels=136, batch=1)
    tokens = case.tokens(dtype)
    args, modes = GPU.call(case, tokens)
    first = srt_ext.ensemble(*args, **modes)
    assert all(torch.equal(srt_ext.ensemble(*args, **modes), first) for _ in range(20))


# ---- past 2^31 ----------------------------------------------------------------------------------


def needs(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of device memory; {free:.1f} are free")


@pytest.mark.serial
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("batch", "channels"), [(1, 520), (65, 8)])
def test_field_past_2_31(batch: int, channels: int, layout: str) -> None:
    needs(6)
    offsets = ((0.25, -3.5), (-7.0, 5.0))
    case = Ensemble((64, 64), (32, 32), offsets, channels, batch)
    tokens = case.tokens(torch.float16)
    args, modes = GPU.call(case, tokens, "host")
    out = None
    if layout == "contiguous":
        out = torch.full(case.shape, NAN, dtype=torch.float16, device="cuda")
    field = srt_ext.ensemble(*args, **modes, out=out)
    assert field.numel() > 2**31
    images = [0, batch // 2, batch - 1] if batch > 1 else [0]
    picked = [0, 3, channels - 1]
    few = replace(case, batch=len(images), channels=len(picked))
    some = torch.stack([field[b, picked] for b in images]).cpu()
    assert_as_on_the_cpu(few, tokens[:, images][..., picked].contiguous(), some)


@pytest.mark.serial
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_tokens_past_2_31(dim: int) -> None:
    """Tokens with a large stride along one dimension."""
    needs(9)
    case = Ensemble(channels=24)
    tokens = case.tokens(torch.float16)
    strides = [0, 0, 0, 1]
    near = 24
    for d in (2, 1, 0):
        if d != dim:
            strides[d] = near
            near *= tokens.shape[d]
    strides[dim] = 2**31 // (tokens.shape[dim] - 1) + 8
    last = sum((n - 1) * s for n, s in zip(tokens.shape, strides, strict=True))
    assert last > 2**31
    storage = torch.full((last + 1,), NAN, dtype=torch.float16, device="cuda")
    far = storage.as_strided(tokens.shape, strides)
    far.copy_(tokens)
    args, modes = case.call(tokens)
    field = srt_ext.ensemble(far, *args[1:], **modes).cpu()
    check_result("mean", case, tokens.dtype, field)


@pytest.mark.serial
def test_views_past_2_31() -> None:
    needs(6)
    offsets = (*random_views(720)[:-1], (-3.3, 7.1))
    case = Shift((1001, 1024), offsets, batch=1)
    image = case.image(torch.uint8)
    args, modes = GPU.call(case, image, "host")
    views = srt_ext.shift(*args, **modes)
    assert views.numel() > 2**31
    for v in (0, 300, 699, 719):
        one = replace(case, offsets=(offsets[v],))
        assert torch.equal(views[v].cpu(), GPU.shift(one, image)[0])
    check = (719, 0, slice(None), slice(-9, None), slice(-21, None))
    truth = shift_oracle(replace(case, offsets=offsets[-1:]), image[..., -40:, -60:])[0, 0]
    inner = truth[:, -9:, -21:]
    assert ((views[check].cpu() - inner.clamp(0, 255)).abs() <= 0.501).all()


@pytest.mark.serial
def test_windows_past_2_31() -> None:
    """Windows of an image with a large stride between planes."""
    needs(9)
    image = torch.randint(0, 256, (1, 2, 90, 70), dtype=torch.uint8)
    storage = torch.zeros(2**31 + 90 * 70, dtype=torch.uint8, device="cuda")
    far = storage.as_strided(image.shape, (0, 2**31, 70, 1))
    far.copy_(image)
    centers = torch.rand(1, 300_000, 2) * torch.tensor([90.0, 70.0])
    result = srt_ext.windows(far, centers.cuda(), (60, 70))
    assert result.numel() > 2**31
    for n in (0, 150_000, 299_999):
        expected = srt_ext.windows(image, centers[:, n : n + 1], (60, 70))
        assert ((result[:, n].cpu().float() - expected[:, 0].float()).abs() <= 1).all()


@pytest.mark.serial
def test_plane_past_2_31() -> None:
    needs(9)
    height, width = 2**11 + 1, 2**20 + 16
    image = torch.randint(0, 256, (1, 1, height, width), dtype=torch.uint8, device="cuda")
    assert image.numel() > 2**31
    view = srt_ext.shift(image, torch.tensor([[1.0, -2.0]]), padding="circular")[0, 0, 0]
    for begin in range(0, height, 64):  # a whole copy would double the memory
        rows = torch.arange(begin, min(begin + 64, height), device="cuda")
        expected = image[0, 0, (rows - 1) % height].roll(-2, 1)
        assert torch.equal(view[rows], expected)


# ---- errors -------------------------------------------------------------------------------------


def test_mixed_devices_raise() -> None:
    case = ENSEMBLES["weights"]
    (tokens, offsets, grid, patch, weights), modes = case.call(case.tokens())
    moved, moved_weights, out = GPU.put(offsets), GPU.put(weights), torch.empty(case.shape)
    place = "{} must be on the CPU or on the device of the input"
    place_out = "out must be on the device of tokens"
    for rule, args, more in (
        (place.format("offsets"), (tokens, moved, grid, patch), {}),
        (place.format("offsets"), (tokens, moved, grid, patch, moved_weights), {}),
        (place.format("weights"), (tokens, offsets, grid, patch, moved_weights), {}),
        (place_out, (GPU.put(tokens), offsets, grid, patch), {"out": out}),
        (place_out, (tokens, offsets, grid, patch), {"out": GPU.put(out)}),
    ):
        with pytest.raises(ValueError, match=re.escape(f"srt::ensemble: {rule}; got ")):
            srt_ext.ensemble(*args, **modes, **more)
        op = torch.ops.srt.ensemble.out if more else torch.ops.srt.ensemble.default
        with pytest.raises(RuntimeError, match=re.escape(rule)):
            op(*args, **modes, **more)
    with pytest.raises(ValueError, match=re.escape(f"srt::shift: {place.format('offsets')}; got ")):
        srt_ext.shift(torch.ones(1, 2, 5, 6), moved)


# ---- streams and graphs -------------------------------------------------------------------------


def inputs(views: int, seed: int, values: str) -> list[torch.Tensor]:
    """tokens, image, offsets, weights: the arguments of ``calls``."""
    case = Ensemble((3, 5), (8, 8), random_views(views, seed=seed), channels=40, seed=seed)
    weights = torch.rand(views, generator=torch.Generator().manual_seed(seed)) + 0.5
    image = Shift((24, 40), seed=seed).image()
    place = [torch.tensor(case.offsets), weights]
    if values == "device":
        place = list(map(GPU.put, place))
    return [GPU.put(case.tokens()), GPU.put(image), *place]


def calls(
    tokens: torch.Tensor, image: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    place = ((3, 5), (8, 8))
    out = torch.empty(2, 40, 24, 40, device="cuda")
    case = Ensemble((3, 5), (8, 8), channels=40)
    moments, median = (empty_state(case, reduce, device="cuda") for reduce in ("moments", "median"))
    for part in (slice(0, 2), slice(2, None)):
        chunk = (tokens[part], offsets[part], *place)
        torch.ops.srt.accumulate_moments_(*moments[2], *chunk, weights[part])
        torch.ops.srt.accumulate_median_(*median[2], *chunk)
    centers, scale = (offsets + 12).expand(2, -1, -1), weights[:, None].expand(2, -1, 2)
    windows = srt_ext.windows(image, centers, (8, 8), scale)
    grads = (windows.cos(), centers, scale)
    return [
        srt_ext.ensemble(tokens, offsets, *place, weights),
        srt_ext.ensemble(tokens, offsets, *place, stride=8, border="zeros"),
        srt_ext.ensemble(tokens, offsets, *place, upsample="nearest", out=out),
        srt_ext.shift(image, offsets),
        srt_ext.ensemble(tokens, offsets, *place, reduce="median"),
        *srt_ext.ensemble_moments(tokens, offsets, *place, weights),
        *(*moments[:2], *median[:2]),
        windows,
        srt_ext.sample(image, centers, stride=(2, 1)),
        torch.ops.srt._windows_backward_image(*grads[:2], (24, 40), scale, padding="reflect"),
        *torch.ops.srt._windows_backward_points(grads[0], image, *grads[1:], padding="zeros"),
    ]


each_count = pytest.mark.parametrize(
    "views", [5, 49, 300]
)  # 300: more than the parameters of one launch hold


@pytest.mark.serial
@each_count
@each_values
def test_graph(values: str, views: int) -> None:
    """A replay reads its inputs again, except CPU offsets and weights, which are captured."""
    static = inputs(views, 0, values)
    calls(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls(*static)
    captured = [tensor.clone() for tensor in static]
    if values == "host":
        static[2].fill_(NAN), static[3].fill_(NAN)
    for seed in (1, 2, 3):
        fresh = inputs(views, seed, values)
        if values == "host":
            fresh[2:] = captured[2:]
        for old, new in zip(static, fresh, strict=True):
            if old.is_cuda:
                old.copy_(new)
        for result in results:
            result.fill_(NAN)
        graph.replay()
        assert_same(results, calls(*fresh))


@pytest.mark.serial
@each_count
@each_values
def test_calls_run_on_the_current_stream(values: str, views: int) -> None:
    """A call runs after earlier work and before later work of the current stream."""
    fresh = inputs(views, 0, values)
    expected = calls(*fresh)
    stale = [torch.full_like(t, NAN) if t.is_cuda else t for t in fresh]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)  # other streams run ahead
        for old, new in zip(stale, fresh, strict=True):
            if old.is_cuda:
                old.copy_(new)
        results = calls(*stale)
        copies = [result.clone() for result in results]
        for tensor in (*stale, *results):
            if tensor.is_cuda:
                tensor.fill_(NAN)
    stream.synchronize()
    assert_same(copies, expected)


@pytest.mark.serial
def test_two_streams_at_once() -> None:
    seeds = range(6)
    expected = [calls(*inputs(49, seed, "device")) for seed in seeds]
    torch.cuda.synchronize()

    def work(first: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            arguments = [inputs(49, seed, VALUES[seed % 2]) for seed in seeds]
            for _ in range(10):
                results = [calls(*arguments[(first + i) % len(seeds)]) for i in seeds]
            stream.synchronize()
            for i in seeds:
                assert_same(results[i], expected[(first + i) % len(seeds)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 3)))


@pytest.mark.serial
@pytest.mark.parametrize("anchor", ["phase", "full"])
def test_anchors_do_not_synchronise(anchor: Any) -> None:
    """Although the anchors depend on the images, and the views on the anchors."""
    modes: Any = {"padding": "circular", "border": "circular", "anchor": anchor}
    conv = torch.nn.Conv2d(3, 8, 16, stride=16, device="cuda")
    srt = srt_ext.SRT(conv, 4, patch=16, view_batch=4, **modes)
    images = torch.randn(2, 3, 64, 96, device="cuda")
    expected = srt(images).field
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP)
        field = srt(images).field
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "a call synchronised with the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(field, expected)


@pytest.mark.serial
@each_count
@each_values
def test_calls_do_not_synchronise(values: str, views: int) -> None:
    arguments = inputs(views, 0, values)
    calls(*arguments)  # loads the kernels and fills the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP)
        results = calls(*arguments)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "a call synchronised with the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert_same(results, calls(*arguments))


def test_calls_run_on_the_device_of_the_tokens() -> None:
    """Also if another device is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for values in VALUES:
        arguments = inputs(49, 0, values)
        expected = calls(*arguments)
        other = [t.to("cuda:1") if t.is_cuda else t for t in arguments]
        tokens, image, offsets, weights = other
        with torch.cuda.device(0):
            results = [
                srt_ext.ensemble(tokens, offsets, (3, 5), (8, 8), weights),
                srt_ext.shift(image, offsets),
            ]
            assert torch.cuda.current_device() == 0
        assert all(result.device == torch.device("cuda:1") for result in results)
        assert_same([r.to("cuda:0") for r in results], [expected[0], expected[3]])
        with pytest.raises(ValueError, match="on the CPU or on the device of the input; got cuda"):
            srt_ext.ensemble(tokens, arguments[2].to("cuda:0"), (3, 5), (8, 8))


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.serial
def test_a_backward_runs_on_the_stream_of_its_forward_pass() -> None:
    case = ENSEMBLES["grid"]
    tokens, grad = (t.cuda() for t in problem(case, "mean", torch.float32))
    field = field_of(srt_ext, "mean", case, "cuda")
    expected = gradient(field, tokens, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on another stream would run before this
        late = tokens.clone().requires_grad_()
        (result,) = torch.autograd.grad(field(late), late, grad.clone())
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.serial
@each_reduce
def test_a_captured_backward(reduce: str) -> None:
    case = ENSEMBLES["weights"]
    tokens, grad = (t.cuda() for t in problem(case, reduce, torch.float32))
    field = field_of(srt_ext, reduce, case, "cuda", "device")
    static, static_grad = tokens.clone().requires_grad_(), grad.clone()

    def step() -> torch.Tensor:
        return torch.autograd.grad(field(static), static, static_grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for factor in (1.0, -2.0):
        with torch.no_grad():
            static.copy_(tokens * factor)
        static_grad.copy_(grad + factor)
        graph.replay()
        assert torch.equal(result, gradient(field, tokens * factor, grad + factor))


@pytest.mark.serial
def test_compiled_training_steps_are_captured() -> None:
    """By the CUDA graphs of inductor, forward and backward."""
    pytest.importorskip("triton")
    inputs = model_inputs(device="cuda", place="device")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # the first calls compile, warm up and capture
            torch.compiler.cudagraph_mark_step_begin()
            check_compiled(compiled, inputs, strides=False)
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    finally:
        torch.compiler.reset()
