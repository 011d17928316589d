"""The ops as torch sees them: opcheck, fake kernels, compile, export, torch.func, vmap, modes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from backends import Ops, each_place, empty_state
from oracle import field_of
from samples import (
    DTYPES,
    ENSEMBLES,
    REDUCES,
    SHIFTS,
    WINDOWS,
    Ensemble,
    Shift,
    Windows,
    each_reduce,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import srt_ext
from srt_ext import reference

srt = torch.ops.srt
Function = Callable[..., Any]


# ---- opcheck and fake kernels -------------------------------------------------------------------

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def ensemble_calls(
    case: Ensemble, device: str = "cpu", place: str = "host", requires_grad: bool = False
) -> dict[str, Call]:
    """Each op with its arguments and keyword arguments."""
    (tokens, *views, weights), modes = Ops(device).call(case, case.tokens(), place)
    args = (tokens, *views, weights)
    leaves = [t if t is None else t.detach().requires_grad_(requires_grad) for t in args[::4]]
    inputs, median = (leaves[0], *views, leaves[1]), {**modes, "reduce": "median"}
    field = torch.zeros(case.shape, device=device)
    nhwc = field.to(memory_format=torch.channels_last)
    grads = [torch.randn(case.shape, device=device, requires_grad=requires_grad) for _ in range(2)]
    one = (grads[0], None)

    def accumulate(reduce: str) -> Call:
        state = empty_state(case, reduce, device=device)[2]
        op = getattr(srt, f"accumulate_{reduce}_").default
        return op, (*state, *(args[:4] if reduce == "median" else args)), modes

    return {
        "mean": (srt.ensemble.default, inputs, modes),
        "median": (srt.ensemble.default, inputs[:4], median),
        "moments": (srt.ensemble_moments.default, inputs, modes),
        "out": (srt.ensemble.out, args, {**modes, "out": field}),
        "out, channels_last": (srt.ensemble.out, args, {**modes, "out": nhwc}),
        **{f"accumulate_{reduce}_": accumulate(reduce) for reduce in REDUCES},
        "gradient of a mean": (srt._mean_backward.default, (grads[0], *args[1:]), modes),
        "gradient of a median": (srt._median_backward.default, (*one, *args[:4], None), modes),
        "gradient of moments": (srt._moments_backward.default, (*grads, *args), modes),
        "gradient of weights": (srt._weights_backward.default, (*grads, *args), modes),
        "gradient of a mean's weights": (srt._weights_backward.default, (*one, *args), modes),
    }


SMALL = replace(ENSEMBLES["weights"], channels=3, stride=(6, 10))
FORWARD, GRADIENTS = (
    [op for op in ensemble_calls(SMALL) if op.startswith("gradient") == gradient]
    for gradient in (False, True)
)


@each_place
@pytest.mark.parametrize(
    "name", ["weights", "stride", pytest.param("one_token", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("op", FORWARD)
def test_opcheck(op: str, name: str, device: str, place: str) -> None:
    call = ensemble_calls(ENSEMBLES[name], device, place, requires_grad=op in REDUCES)[op]
    torch.library.opcheck(*call)


@pytest.mark.parametrize("requires_grad", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", GRADIENTS)
def test_opcheck_of_gradients(op: str, requires_grad: bool) -> None:
    torch.library.opcheck(*ensemble_calls(SMALL, requires_grad=requires_grad)[op])


@each_place
@pytest.mark.parametrize("name", ["beyond", "strided", "channels_last", "one_pixel", "bicubic"])
def test_opcheck_of_shift(name: str, device: str, place: str) -> None:
    (image, offsets), modes = Ops(device).call(SHIFTS[name], SHIFTS[name].image(), place)
    grad = torch.randn(len(offsets), *image.shape, device=device, requires_grad=True)
    torch.library.opcheck(srt.shift.default, (image.requires_grad_(), offsets), modes)
    torch.library.opcheck(srt._shift_backward.default, (grad, offsets), modes)


@each_place
@pytest.mark.parametrize(
    "name", ["scale", "points", pytest.param("scales", marks=pytest.mark.slow)]
)
def test_opcheck_of_windows(name: str, device: str, place: str) -> None:
    (image, centers, window, scale), modes = Ops(device).call(
        WINDOWS[name], WINDOWS[name].image(), place
    )
    grad = torch.randn(WINDOWS[name].shape, device=device, requires_grad=True)
    pixels = list(image.shape[2:])
    torch.library.opcheck(
        srt._windows_backward_image.default, (grad, centers, pixels, scale), modes
    )
    points = srt._windows_backward_points.default
    torch.library.opcheck(points, (grad.detach(), image, centers, scale), modes)
    image, centers = image.detach().requires_grad_(), centers.requires_grad_()
    torch.library.opcheck(srt.windows.default, (image, centers, window, scale), modes)


def test_opcheck_of_check_views() -> None:
    _, args, modes = ensemble_calls(SMALL)["mean"]
    modes = {**modes, "reduce": "mean", "stream": True}
    torch.library.opcheck(srt._check_views.default, ("accumulate_mean_", *args), modes)


def check_fake(case: Ensemble | Shift | Windows, data: torch.Tensor) -> None:
    args, modes = case.call(data)
    op = {Ensemble: srt_ext.ensemble, Shift: srt_ext.shift, Windows: srt_ext.windows}[type(case)]
    with FakeTensorMode() as mode:
        fake = op(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args), **modes
        )
    real = op(*args, **modes)
    for name in ("shape", "dtype", "device"):
        assert getattr(fake, name) == getattr(real, name)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_fake_kernels(dtype: torch.dtype) -> None:
    sizes = itertools.product(((0, 5), (4, 0), (1, 1), (4, 5)), (0, 1), (0, 1))
    small = [Shift(size, batch=batch, channels=channels) for size, batch, channels in sizes]
    few = ((0, 3), (2, 0), (1, 1))
    smaller = [Windows(batch=batch, channels=channels) for batch, channels in few]
    for case in (*SHIFTS.values(), *small, *WINDOWS.values(), *smaller):
        check_fake(case, case.image(dtype))
    if dtype == torch.uint8:
        return
    few = itertools.product(("grid", "whole", "one_token"), ((1, 1), (0, 5), (2, 0), (0, 0)))
    empty = [replace(ENSEMBLES[name], batch=b, channels=c) for name, (b, c) in few]
    for case in (*ENSEMBLES.values(), *empty):
        check_fake(case, case.tokens(dtype))


def test_errors_of_fake_kernels() -> None:
    with FakeTensorMode():
        tokens, offsets = torch.ones(2, 1, 6, 3), torch.zeros(2, 2)
        with pytest.raises(ValueError, match=r"tokens must have N = h \* w = 4 for .*; got"):
            srt.ensemble(tokens, offsets, [2, 2], [4, 5])
        with pytest.raises(ValueError, match=r"out must be \[1, 3, 8, 15\]; got"):
            srt.ensemble.out(tokens, offsets, [2, 3], [4, 5], out=torch.ones(1, 3, 8, 8))
        with pytest.raises(ValueError, match=r"image must have 4 dimensions, .*; got \[2, 2\]"):
            srt.shift(torch.ones(2, 2), offsets)
        image, centers, scale = torch.ones(1, 3, 5, 6), torch.ones(1, 4, 2), torch.ones(1, 2)
        for size in ((2, 4, 2), (1, 4, 3), (1, 2)):
            with pytest.raises(ValueError, match=r"centers must be \[B, N, 2\] with B = 1; got"):
                srt.windows(image, torch.ones(size), [2, 2])
        with pytest.raises(
            ValueError, match=r"scale must be \[2\] or .*, \[1, 4, 2\]; got \[1, 2\]"
        ):
            srt.windows(image, centers, [2, 2], scale)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_fake_kernels_limit_the_views(kind: str) -> None:
    def calls(count: int) -> list[tuple[str, Callable[[], Any]]]:
        tokens, offsets = torch.ones(1, 1, 6, 3).expand(count, 1, 6, 3), torch.zeros(count, 2)
        image, place = torch.ones(1, 1, 1, 1), (tokens, offsets, [2, 3], [4, 5])
        return [
            ("tokens", lambda: srt.ensemble(*place)),
            ("tokens", lambda: srt.ensemble_moments(*place)),
            ("offsets", lambda: srt.shift(image, offsets)),
        ]

    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        for _, call in calls(2**20):
            call()
        for name, call in calls(2**20 + 1):
            with pytest.raises(ValueError, match=rf"{name} must hold at most 2\^20 views"):
                call()


# ---- compile and export -------------------------------------------------------------------------


def model(
    tokens: torch.Tensor, image: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    """Every op between exact ops of torch; the ops with a derivative are first."""
    views, modes = (offsets, (3, 5), (4, 6)), {"border": "clamp"}
    fields = [
        2 * srt_ext.ensemble(tokens + 1, *views, weights),
        *srt_ext.ensemble_moments(4 * tokens, *views, weights, stride=2),
        srt_ext.ensemble(2 * tokens, *views, reduce="median", **modes) + 1,
        srt_ext.shift(2 * image, offsets, padding="circular", interpolation="bicubic") - 1,
        srt_ext.windows(image, (offsets + weights[:, None]).expand(image.shape[0], -1, -1), (3, 2)),
    ]
    tokens, weights = tokens.detach(), weights.detach()
    # Dense, because Dynamo of torch 2.10 and 2.13 does not support another out=.
    out = torch.zeros_like(fields[0], memory_format=torch.contiguous_format)
    mean, mean_2, var = (torch.zeros_like(fields[0]) for _ in range(3))
    srt_ext.ensemble(tokens, *views, weights, out=out)
    window = torch.stack([torch.zeros_like(out)] * 8)
    weight, weight_2, count = torch.zeros((3, 12, 30), dtype=torch.float64, device=out.device)
    for factor in (1, 2):
        srt.accumulate_mean_(mean, weight, factor * tokens, *views, weights)
        srt.accumulate_moments_(mean_2, var, weight_2, factor * tokens, *views, weights)
        srt.accumulate_median_(window, count, factor * tokens, *views, **modes)
    return [*fields, *(t + 1 for t in (out, mean, mean_2, var, window, weight, weight_2, count))]


def model_inputs(
    views: int = 4, batch: int = 2, channels: int = 5, device: str = "cpu", place: str = "host"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(views)
    data = [
        torch.randn(views, batch, 15, channels, generator=generator).to(device),
        torch.randn(batch, 3, 7, 9, generator=generator).to(device),
    ]
    values = [
        torch.randn(views, 2, generator=generator) * 3,
        torch.rand(views, generator=generator),
    ]
    return [*data, *(value.to(device if place == "device" else "cpu") for value in values)]


def check_compiled(compiled: Function, inputs: list[torch.Tensor], strides: bool = True) -> None:
    """Checks fields, gradients, and strides (inductor chooses those of its own outputs)."""
    found = []
    for function in (compiled, model):
        leaves = [t.clone().requires_grad_(i != 2) for i, t in enumerate(inputs)]
        fields = function(*leaves)
        torch.stack([field.square().mean() for field in fields[:6]]).sum().backward()
        found.append((fields, [t.grad for t in leaves if t.requires_grad]))
    (fields, grads), (expected, expected_grads) = found
    assert all(map(torch.equal, fields, expected))
    assert not strides or [f.stride() for f in fields] == [f.stride() for f in expected]
    torch.testing.assert_close(grads, expected_grads)


@pytest.fixture
def compile_model() -> Iterator[Function]:
    """torch.compile without caches, whose key ignores the derivatives of custom ops."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield partial(torch.compile, model, fullgraph=True)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@each_place
def test_compiled(device: str, place: str, backend: str, compile_model: Function) -> None:
    if backend == "inductor" and device == "cuda":
        pytest.importorskip("triton")
    inputs = model_inputs(device=device, place=place)
    check_compiled(compile_model(backend=backend), inputs, strides=backend == "aot_eager")


@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_other_sizes_do_not_recompile(dynamic: bool | None, compile_model: Function) -> None:
    """The numbers of batches, views and channels are symbols, forward and backward."""
    compiled = compile_model(backend="aot_eager", dynamic=dynamic)
    for sizes in (
        (4, 5, 6),
        (7, 3, 8),
    ):  # without ``dynamic`` the second call introduces the symbols
        check_compiled(compiled, model_inputs(*sizes))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in ((9, 5, 6), (3, 4, 9), (12, 3, 2)):
            check_compiled(compiled, model_inputs(*sizes))


class Model(torch.nn.Module):
    def forward(self, tokens: Any, image: Any, offsets: Any, weights: Any) -> list[torch.Tensor]:
        return model(tokens, image, offsets, weights)


def exported() -> torch.export.ExportedProgram:
    views, batch = torch.export.Dim("views", min=2), torch.export.Dim("batch", min=2)
    shapes = ({0: views, 1: batch}, {0: batch}, {0: views}, {0: views})
    return torch.export.export(Model(), tuple(model_inputs()), dynamic_shapes=shapes)


def check_program(program: Function) -> None:
    for sizes in ((4, 2, 5), (9, 3, 5)):
        inputs = model_inputs(*sizes)
        assert all(map(torch.equal, program(*inputs), model(*inputs)))


def test_export() -> None:
    program = exported()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ops = {call[0] for name, call in ensemble_calls(SMALL).items() if name in FORWARD}
    assert {"srt.shift.default", "srt.windows.default", *map(str, ops)} <= targets
    check_program(program.module())
    check_program(program.run_decompositions().module())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_aot_inductor(tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=path)
    check_program(torch._inductor.aoti_load_package(package))


# ---- transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduce", "module"), [("mean", srt), ("moments", srt_ext), ("median", srt)]
)
def test_torch_func(reduce: str, module: Any) -> None:
    offsets = ((0.0, 0.0), (1.5, -2.0), (-3.0, 1.0), (0.3, 4.0))
    case = Ensemble((2, 2), (2, 3), offsets, channels=1, batch=1, value_dtype=torch.float64)
    field, truth = field_of(module, reduce, case), field_of(reference, reduce, case)
    tokens = case.tokens(torch.float64)
    tangent = torch.randn_like(tokens)

    def loss(field: Function) -> Function:
        return lambda tokens: field(tokens).square().sum()

    def right(transform: Callable[[Function], Any]) -> None:
        torch.testing.assert_close(transform(field), transform(truth))

    right(lambda f: torch.func.grad(loss(f))(tokens))
    right(lambda f: torch.func.jvp(f, (tokens,), (tangent,)))
    right(lambda f: torch.func.vjp(f, tokens)[1](torch.ones_like(f(tokens))))
    right(lambda f: torch.func.jacrev(f)(tokens))
    right(lambda f: torch.func.jacfwd(f)(tokens))
    both = torch.stack([tokens, 2 * tokens.flip(0)])
    expected = torch.stack([torch.func.grad(loss(truth))(t) for t in both])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss(field)))(both), expected)
    through = torch.func.grad(lambda t: torch.vmap(field)(t).square().sum())(both)
    torch.testing.assert_close(through, expected)
    # Second derivatives, each mode inside the other.
    ones = torch.ones_like(tokens)

    def directional(f: Function) -> Function:
        return lambda tokens: torch.func.jvp(loss(f), (tokens,), (ones,))[1]

    right(lambda f: torch.func.jacfwd(torch.func.jacfwd(lambda t: loss(f)(t.sin())))(tokens))
    right(lambda f: torch.func.grad(lambda t: directional(f)(t.sin()))(tokens))
    right(lambda f: torch.func.hessian(loss(f))(tokens))
    right(lambda f: torch.func.jacrev(torch.func.grad(loss(f)))(tokens))
    right(lambda f: torch.func.grad(directional(f))(tokens))
    right(lambda f: torch.func.jvp(directional(f), (tokens,), (tangent,)))


def test_torch_func_of_shift() -> None:
    offsets = torch.tensor([[0.0, 1.0], [1.5, -2.25]], dtype=torch.float64)
    image = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        actual, expected = (
            transform(lambda image, m=module: m.shift(image, offsets))(image)
            for module in (srt, reference)
        )
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("op", "in_dims"),
    [
        *itertools.product(
            REDUCES,
            [(0, None, None), (2, None, None), (-1, 0, None), (None, 1, None), (1, None, 0)],
        ),
        *(("shift", in_dims) for in_dims in [(0, None), (4, None), (1, 2), (None, 0)]),
    ],
)
def test_vmap(op: str, in_dims: tuple[int | None, ...]) -> None:
    module = srt_ext if in_dims[0] == 0 else srt
    args = []
    shapes = ((2, 3, 5, 6), (7, 2)) if op == "shift" else ((9, 2, 15, 3), (9, 2), (9,))
    for shape, dim in zip(shapes, in_dims, strict=True):
        mapped = list(shape)
        if dim is not None:
            mapped.insert(dim if dim >= 0 else len(shape) + 1 + dim, 4)
        args.append(torch.rand(mapped) * 4)
    if in_dims[0] == -1:
        args[0] = (
            args[0].movedim(-1, 0).contiguous().movedim(0, -1)
        )  # dense channels in each example
    if op == "median" and in_dims == (1, None, 0):
        in_dims = (1, None, None)
        args[2] = args[2][0]

    def function(data: Any, offsets: Any, *weights: Any) -> Any:
        if op == "shift":
            return module.shift(data, offsets)
        place = (data, offsets, (3, 5), (4, 6))
        if op == "moments":
            return torch.stack(module.ensemble_moments(*place, *weights))
        return module.ensemble(*place, *(weights if op == "mean" else ()), reduce=op)

    each = (
        [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        for i in range(4)
    )
    expected = torch.stack([function(*one) for one in each])
    assert torch.equal(torch.vmap(function, in_dims)(*args), expected)


@pytest.mark.parametrize("scale", [None, (2,), (2, 7, 2)])
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 2, 0), (4, 0, None), (1, 1, 1)])
def test_vmap_of_windows(in_dims: tuple[int | None, ...], scale: tuple[int, ...] | None) -> None:
    args = []
    for shape, dim in zip(((2, 3, 5, 6), (2, 7, 2), scale), in_dims, strict=True):
        mapped = list(shape or ())
        if shape is not None and dim is not None:
            mapped.insert(dim, 4)
        args.append(None if shape is None else torch.rand(mapped) * 4)
    in_dims = (*in_dims[:2], in_dims[2] if scale else None)

    def function(image: Any, centers: Any, scale: Any) -> Any:
        return srt_ext.windows(image, centers, (2, 3), scale)

    each = [
        [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        for i in range(4)
    ]
    expected = torch.stack([function(*one) for one in each])
    assert torch.equal(torch.vmap(function, in_dims)(*args), expected)

    def gradients(image: Any, centers: Any, scale: Any) -> Any:
        loss = torch.func.grad(lambda *at: function(*at, scale).square().sum(), (0, 1))
        return loss(image, centers)

    found = torch.vmap(gradients, in_dims)(*args)
    for ours, theirs in zip(
        found, zip(*(gradients(*one) for one in each), strict=True), strict=True
    ):
        assert torch.equal(ours, torch.stack(theirs))


def test_vmap_of_vmap_and_of_an_empty_batch() -> None:
    offsets = torch.randn(3, 2)

    def field(tokens: torch.Tensor) -> torch.Tensor:
        return srt_ext.ensemble(tokens, offsets, (2, 3), (2, 2))

    tokens = torch.randn(4, 5, 3, 2, 6, 7)
    twice = torch.vmap(torch.vmap(field))(tokens)
    assert torch.equal(twice, torch.stack([torch.stack([field(t) for t in row]) for row in tokens]))
    assert torch.vmap(field)(torch.randn(4, 3, 0, 6, 7)).shape == (4, 0, 7, 4, 6)


# ---- modes of torch -----------------------------------------------------------------------------


@pytest.mark.parametrize("one", [np.uint8(1), np.int64(1), (np.int32(1), np.uint64(1))], ids=repr)
def test_integers_of_numpy(one: Any) -> None:
    """torch's dispatcher does not accept all of them."""
    tokens, offsets = torch.randn(3, 1, 1, 2), torch.zeros(3, 2)
    expected = srt_ext.ensemble(tokens, offsets, (1, 1), (1, 1))
    assert torch.equal(srt_ext.ensemble(tokens, offsets, one, one, stride=one), expected)
    with pytest.raises(ValueError, match=r"srt::ensemble: tokens must have N = h \* w = 4 "):
        srt_ext.ensemble(tokens, offsets, np.uint8(2), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype_of_tokens(dtype: torch.dtype) -> None:
    case = ENSEMBLES["grid"]
    (tokens, *args), modes = case.call(case.tokens(dtype).requires_grad_())
    expected = srt_ext.ensemble(tokens, *args, **modes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        field = srt_ext.ensemble(tokens, *args, **modes)
        views = srt_ext.shift(torch.randn(1, 3, 5, 6), torch.zeros(2, 2))
        (grad,) = torch.autograd.grad(field.square().mean(), tokens)
    assert field.dtype == grad.dtype == dtype
    assert torch.equal(field, expected)
    assert views.dtype == torch.float32


@pytest.mark.parametrize(("name", "shapes"), [("grid", [(9, 2)]), ("weights", [(5, 2), (5,)])])
def test_a_mean_saves_no_tokens_for_its_backward(name: str, shapes: list[tuple[int, ...]]) -> None:
    """A mean is linear: its backward needs only offsets and weights."""
    case = ENSEMBLES[name]
    args, modes = case.call(case.tokens().requires_grad_())
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        srt_ext.ensemble(*args, **modes)
    assert [t.shape for t in saved] == shapes


@each_reduce
def test_a_field_may_be_written_before_its_backward(reduce: str) -> None:
    case = ENSEMBLES["grid"]
    tokens = case.tokens().requires_grad_()
    (_, *place), modes = case.call(tokens)
    if reduce == "moments":
        field = srt_ext.ensemble_moments(tokens, *place, **modes)[1]
    else:
        field = srt_ext.ensemble(tokens, *place[:3], reduce=reduce, **modes)
    field.add_(1).sum().backward()
    assert tokens.grad is not None


def test_no_graph_without_grad_mode() -> None:
    case = ENSEMBLES["grid"]
    args, modes = case.call(case.tokens())
    assert not srt_ext.ensemble(*args, **modes).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not srt_ext.ensemble(*args, **modes).requires_grad
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(srt_ext.ensemble(*args, **modes)).tangent is None
    with torch.inference_mode():
        assert srt_ext.ensemble(*args, **modes).is_inference()
