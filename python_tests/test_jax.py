"""srt_ext.jax: values, derivatives and transformations of programs, and invalid arguments.

The expected values are those of the torch ops. test_host_shim.py runs this file with the handlers
for CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arrays import array, arrays
from process import run_python
from samples import DTYPES, ENSEMBLES, REDUCES, SHIFTS, WINDOWS, Ensemble, Shift, Windows

import srt_ext

jax = pytest.importorskip("jax")
jax.config.update("jax_num_cpu_devices", 4)  # for shard_map
srt = pytest.importorskip("srt_ext.jax", exc_type=ImportError)
jnp, P = jax.numpy, jax.sharding.PartitionSpec

Case = Ensemble | Shift | Windows
STRIDED = replace(ENSEMBLES["stride"], channels=6)


def assert_same(actual: Any, expected: Any) -> None:
    """Asserts bitwise equality. test_host_shim.py replaces this function."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Asserts an error relative to the largest value."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=0)
    )


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def functions(reduce: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The function of srt_ext.jax for a reduction, and that of torch."""
    if reduce == "moments":
        return srt.ensemble_moments, srt_ext.ensemble_moments
    return partial(srt.ensemble, reduce=reduce), partial(srt_ext.ensemble, reduce=reduce)


def check(case: Case, data: torch.Tensor, ours: Any, theirs: Any, traced: bool) -> None:
    """Runs the case in a program; ``traced``: its numbers are arguments of the program."""
    args, modes = case.call(data)
    expected = theirs(*args, **modes)
    data, *rest = arrays(args)
    names = [i for i, value in enumerate(rest) if isinstance(value, np.ndarray)]

    def program(data: Any, *values: Any) -> Any:
        given = list(rest)
        for i, value in zip(names, values, strict=False):
            given[i] = value
        return ours(data, *given, **modes)

    values = [jnp.asarray(rest[i]) for i in names] if traced else []
    result = jax.jit(program)(jnp.asarray(data), *values)
    pairs = (
        [(result, expected)] if torch.is_tensor(expected) else zip(result, expected, strict=True)
    )
    for actual, wanted in pairs:
        assert_same(actual, array(wanted))


def constant_and_traced(names: Iterable[str]) -> list[Any]:
    """Pairs of a name and whether the numbers are traced; most of the traced ones are slow."""
    fast = ("real", "weights", "scales")
    marks = {name: () if name in fast else pytest.mark.slow for name in names}
    return [
        *(pytest.param(name, False, id=f"{name}-constant") for name in names),
        *(pytest.param(name, True, id=f"{name}-traced", marks=marks[name]) for name in names),
    ]


# ---- equality with the ops ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "traced"), constant_and_traced(ENSEMBLES))
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.usefixtures("x64")
def test_ensembles(name: str, reduce: str, traced: bool) -> None:
    case = ENSEMBLES[name].fit(reduce)
    for dtype in DTYPES if name in ("weights", "stride") else (torch.float32, torch.bfloat16):
        check(case, case.tokens(dtype), *functions(reduce), traced)


@pytest.mark.parametrize(("name", "traced"), constant_and_traced(SHIFTS))
@pytest.mark.usefixtures("x64")
def test_shifts(name: str, traced: bool) -> None:
    case = replace(SHIFTS[name], layout="dense")
    for dtype in (*DTYPES, torch.uint8):
        check(case, case.image(dtype), srt.shift, srt_ext.shift, traced)


@pytest.mark.parametrize(("name", "traced"), constant_and_traced(WINDOWS))
@pytest.mark.usefixtures("x64")
def test_windows(name: str, traced: bool) -> None:
    case = WINDOWS[name]
    case = replace(case, layout="channels_last" if case.channels > 4 else "dense")
    for dtype in (*DTYPES, torch.uint8):
        check(case, case.image(dtype), srt.windows, srt_ext.windows, traced)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_mean_sums(name: str) -> None:
    case = ENSEMBLES[name]
    (tokens, *rest), modes = arrays(case.call(case.tokens()))
    running = srt_ext.RunningMean(case.grid, case.patch, **modes)
    tensors, _ = case.call(case.tokens())
    running.update(*tensors[:2], tensors[4])
    state = running.state_dict()["state"]
    total, count = srt.mean_sums(tokens, *rest, **modes)
    assert total.dtype == count.dtype == jnp.float32
    assert_close(count, state["weight"], 1e-6)
    covered = state["weight"] > 0
    assert_close(total, torch.where(covered, state["mean"] * state["weight"], 0), 1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_sizes_0_and_1(shape: tuple[int, int]) -> None:
    case = Ensemble((2, 1), (2, 3), ((0.0, 0.5),), channels=shape[1], batch=shape[0])
    for reduce in REDUCES:
        check(case, case.tokens(), *functions(reduce), traced=True)
    total, count = srt.mean_sums(*arrays(case.call(case.tokens())[0]))
    assert total.shape == case.shape
    assert (count > 0).any()
    for size in ((0, 4), (4, 0), (1, 1)):
        image = Shift(size, batch=shape[0], channels=shape[1])
        check(image, image.image(), srt.shift, srt_ext.shift, traced=True)
    windows = Windows(batch=shape[0], channels=shape[1])
    check(windows, windows.image(), srt.windows, srt_ext.windows, traced=False)


def test_large_results() -> None:
    """Large results are populated in bulk: 34 MB, not a whole number of pages."""
    args = (torch.randn(3, 1, 100, 377), torch.tensor([[0.0, 1], [2.5, -1], [-1, 0.25]]))
    field = srt.ensemble(*arrays(args), (10, 10), (15, 15))
    assert_same(field, srt_ext.ensemble(*args, (10, 10), (15, 15)).numpy())


# ---- derivatives --------------------------------------------------------------------------------


def gradients(case: Case, data: torch.Tensor, ours: Any, theirs: Any, *names: int) -> None:
    """Compares the gradients with respect to the arguments ``names``, under jit.

    The sum of squares of all results is differentiated, so that each has a different gradient.
    """
    args, modes = case.call(data)
    leaves = [args[i].detach().clone().requires_grad_() for i in names]

    def fill(values: Any, given: Any) -> list[Any]:
        filled = list(given)
        for i, value in zip(names, values, strict=True):
            filled[i] = value
        return filled

    def squares(results: Any, square: Any) -> Any:
        results = results if isinstance(results, tuple) else (results,)
        return sum(square(result).sum() / (i + 1) for i, result in enumerate(results))

    loss = squares(theirs(*fill(leaves, args), **modes), torch.square)
    expected = torch.autograd.grad(loss, leaves)
    given = arrays(args)
    program = lambda values: squares(ours(*fill(values, given), **modes), jnp.square)  # noqa: E731
    found = jax.jit(jax.grad(program))([jnp.asarray(given[i]) for i in names])
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == array(wanted).dtype
        assert_close(actual, wanted, 5e-5)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(
    "name",
    ["real", "weights", "stride"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("circular", "beyond")],
)
def test_gradients_of_ensembles(name: str, reduce: str) -> None:
    case = replace(ENSEMBLES[name], channels=5, value_dtype=torch.float32).fit(reduce)
    names = (0, 4) if case.weights else (0,)
    gradients(case, case.tokens(), *functions(reduce), *names)


@pytest.mark.parametrize("reduce", REDUCES)
def test_gradients_with_constant_weights(reduce: str) -> None:
    case = replace(ENSEMBLES["weights"], channels=5).fit(reduce)
    gradients(case, case.tokens(), *functions(reduce), 0)


@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_gradients_do_not_depend_on_the_unit_of_weights(traced: bool) -> None:
    """Weights whose sum is not finite in float32, and whose reciprocals are not."""
    case = replace(ENSEMBLES["weights"], channels=2)
    (tokens, *place, weights), modes = arrays(case.call(case.tokens()))

    def loss(tokens: Any, weights: Any) -> Any:
        mean, var = srt.ensemble_moments(tokens, *place, weights, **modes)
        return jnp.square(mean).sum() + jnp.square(var).sum()

    grads = []
    for unit in (1.0, 2.0**125, 2.0**-115):
        given = (weights * np.float32(unit)).astype(np.float32)
        grads.append(jax.grad(loss)(tokens, jnp.asarray(given) if traced else given))
    assert_close(grads[1], grads[0], 1e-6)
    assert_close(grads[2], grads[0], 1e-6)


@pytest.mark.parametrize("name", ["real", "bicubic", "beyond"])
def test_gradients_of_shifts(name: str) -> None:
    case = SHIFTS[name]
    gradients(case, case.image(), srt.shift, srt_ext.shift, 0)


@pytest.mark.parametrize("name", ["real", "scale", "scales", "channels_last"])
def test_gradients_of_windows(name: str) -> None:
    case = replace(WINDOWS[name], layout="dense", value_dtype=torch.float32)
    gradients(case, case.image(), srt.windows, srt_ext.windows, 0)
    gradients(
        case, case.image(), srt.windows, srt_ext.windows, *((1,) if case.scale is None else (1, 3))
    )


def linear(name: str) -> tuple[Callable[[Any], Any], Any]:
    """A function that is linear in an array, and that array."""
    if name == "shift":
        (image, offsets), modes = arrays(SHIFTS["bicubic"].call(SHIFTS["bicubic"].image()))
        return lambda x: srt.shift(x, jnp.asarray(offsets), **modes), image
    if name == "windows":
        (image, *rest), modes = arrays(WINDOWS["real"].call(WINDOWS["real"].image()))
        return lambda x: srt.windows(x, *rest, **modes), image
    (tokens, *rest), modes = arrays(STRIDED.call(STRIDED.tokens()))
    if name == "mean_sums":
        return lambda x: srt.mean_sums(x, *rest, **modes)[0], tokens
    return lambda x: srt.ensemble(x, *rest, **modes), tokens


@pytest.mark.parametrize(
    "name", [pytest.param("shift", marks=pytest.mark.slow), "windows", "mean", "mean_sums"]
)
def test_derivatives_of_linear_functions(name: str) -> None:
    """The gradient is the transpose of the function; a gradient of a gradient is the function."""
    function, x = linear(name)
    y, pull = jax.vjp(function, x)
    direction = jax.random.normal(jax.random.key(0), y.shape)
    (back,) = pull(direction)
    assert_close((back * x).sum(), (direction * y).sum(), 1e-4)
    if name == "mean_sums":
        return
    energy = lambda v: 0.5 * jnp.square(jax.vjp(function, x)[1](v)[0]).sum()  # noqa: E731
    assert_close(jax.grad(energy)(direction), function(back), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["median", "moments"])
def test_second_derivatives_of_the_median_and_moments(reduce: str) -> None:
    case = replace(ENSEMBLES["real"], channels=2)
    (tokens, *rest), modes = arrays(case.call(case.tokens()))
    tensors, _ = case.call(case.tokens().requires_grad_())

    def loss(fields: Any) -> Any:
        mean, *var = fields if isinstance(fields, tuple) else (fields,)
        return (mean * mean * mean).sum() + sum((v * v).sum() for v in var)

    ours, theirs = functions(reduce)
    first = lambda x: jax.grad(lambda t: loss(ours(t, *rest, **modes)))(x)  # noqa: E731
    found = jax.grad(lambda x: jnp.square(first(x)).sum())(jnp.asarray(tokens))
    (grad,) = torch.autograd.grad(loss(theirs(*tensors, **modes)), tensors[0], create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), tensors[0])
    assert_close(found, expected, 1e-4)


def test_gradients_that_are_not_available_raise() -> None:
    (tokens, offsets, *rest), modes = arrays(STRIDED.call(STRIDED.tokens()))
    mean = lambda t, o, w: srt.ensemble(t, o, *rest[:2], w, **modes).sum()  # noqa: E731
    numbers = (jnp.asarray(offsets), jnp.ones(len(offsets)))
    jax.grad(mean, (0, 2))(tokens, *numbers)
    with pytest.raises(ValueError, match="srt::ensemble: offsets must not be differentiated here"):
        jax.grad(mean, 1)(tokens, *numbers)
    twice = jax.grad(lambda *a: jax.grad(mean)(*a).sum(), 2)
    with pytest.raises(ValueError, match="srt::ensemble: weights must not be differentiated here"):
        twice(tokens, *numbers)
    with pytest.raises(ValueError, match="srt::mean_sums: weights must not be differentiated"):
        jax.grad(lambda w: srt.mean_sums(tokens, offsets, *rest[:2], w)[0].sum())(numbers[1])
    with pytest.raises(ValueError, match="srt::shift: offsets must not be differentiated here"):
        jax.grad(lambda o: srt.shift(jnp.ones((1, 1, 4, 4)), o).sum())(numbers[0])
    points = lambda c: srt.windows(jnp.ones((1, 1, 4, 4)), c, 2).sum()  # noqa: E731
    with pytest.raises(ValueError, match="srt::windows: second derivatives with respect to"):
        jax.grad(lambda c: jax.grad(points)(c).sum())(jnp.ones((1, 3, 2)))


# ---- transformations ----------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [(0,), (1,), (0, 1), (0, 4), (0, 1, 4)])
@pytest.mark.parametrize("reduce", REDUCES)
def test_vmap_of_ensembles(reduce: str, mapped: tuple[int, ...]) -> None:
    """Tokens are folded into one call. Calls with mapped offsets or weights run one by one."""
    if reduce == "median" and 4 in mapped:
        pytest.skip("the median does not support weights")
    case = replace(ENSEMBLES["weights"], channels=5).fit(reduce)
    args, modes = arrays(case.call(case.tokens()))
    args = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
    for i in mapped:
        args[i] = jnp.stack([args[i], 0.5 * args[i], -args[i] if i < 4 else args[i][::-1]])
    function = partial(functions(reduce)[0], **modes)
    axes = [0 if i in mapped else None for i in range(5)]
    together = jax.jit(
        lambda *a: jax.vmap(
            lambda t, o, w: function(t, o, *args[2:4], w), (axes[0], axes[1], axes[4])
        )(*a)
    )
    fields = together(args[0], args[1], args[4])
    for m in range(3):
        given = [a[m] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
        jax.tree.map(assert_same, jax.tree.map(lambda f, m=m: f[m], fields), function(*given))


def test_vmap_of_shifts_and_windows() -> None:
    image = jax.random.normal(jax.random.key(0), (3, 2, 6, 9, 11))
    offsets = jax.random.normal(jax.random.key(1), (3, 4, 2))
    centers = jax.random.uniform(jax.random.key(2), (3, 2, 5, 2), maxval=9)
    scale = jax.random.uniform(jax.random.key(3), (3, 2), minval=0.5)
    for function, args in (
        (srt.shift, (image, offsets)),
        (lambda x, c: srt.windows(x, c, (2, 3)), (image, centers)),
        (lambda x, c, s: srt.windows(x, c, (2, 3), s), (image, centers, scale)),
        (lambda x: srt.windows(x, np.asarray(centers[0]), (2, 3)), (image,)),
        (jax.grad(lambda x, c: srt.windows(x, c, 2).sum(), (0, 1)), (image, centers)),
        (jax.grad(lambda x, o: srt.shift(x, jax.lax.stop_gradient(o)).sum()), (image, offsets)),
    ):
        together = jax.vmap(function)(*args)
        if len(args) == 2:  # the second argument is the same for all
            shared = jax.vmap(function, (0, None))(args[0], args[1][1])
        for m in range(3):
            one = function(*(a[m] for a in args))
            jax.tree.map(assert_same, jax.tree.map(lambda f, m=m: f[m], together), one)
            if len(args) == 2:
                one = function(args[0][m], args[1][1])
                jax.tree.map(assert_same, jax.tree.map(lambda f, m=m: f[m], shared), one)


def test_vmap_of_vmap_and_of_gradients() -> None:
    function, tokens = linear("mean")
    every = jnp.stack([jnp.stack([tokens * (i + 2 * j) for i in range(3)]) for j in range(2)])
    fields = jax.vmap(jax.vmap(function))(every)
    assert_same(fields[1, 2], function(every[1, 2]))
    grad = jax.grad(lambda t: jnp.square(function(t)).sum())
    assert_same(jax.vmap(grad)(every[1])[2], grad(every[1, 2]))
    total = jax.grad(lambda t: jnp.square(jax.vmap(function)(t)).sum())(every[1])
    assert_same(total[2], grad(every[1, 2]))
    sums, counts = jax.vmap(lambda t: srt.mean_sums(t, [(0, 0)], 1, 2))(jnp.ones((3, 1, 2, 1, 4)))
    assert sums.shape == (3, 2, 4, 2, 2)
    assert counts.shape == (3, 2, 2)


def mesh() -> Any:
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("d",))


@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_shards_of_the_batch(traced: bool) -> None:
    case = replace(STRIDED, batch=8)
    (tokens, offsets, *rest), modes = arrays(case.call(case.tokens()))
    function = lambda t, o: srt.ensemble(t, o if traced else offsets, *rest, **modes)  # noqa: E731
    specs = {"in_specs": (P(None, "d"), P()), "out_specs": P("d")}
    sharded = jax.jit(jax.shard_map(function, mesh=mesh(), **specs))
    args = (jnp.asarray(tokens), jnp.asarray(offsets))
    field = sharded(*args)
    assert len(field.sharding.device_set) == 4
    assert_same(field, function(*args))
    of = lambda f: jax.grad(lambda t, o: jnp.square(f(t, jax.lax.stop_gradient(o))).sum())  # noqa: E731
    assert_same(of(sharded)(*args), of(function)(*args))


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh")
def test_arrays_whose_type_is_sharded() -> None:
    """They are gathered first; the gradient has the type of the tokens."""
    function, tokens = linear("mean")
    energy = lambda t: jnp.square(function(t)).sum()  # noqa: E731
    expected = jax.grad(energy)(tokens)
    explicit = jax.sharding.Mesh(
        jax.devices("cpu")[:2], "d", axis_types=(jax.sharding.AxisType.Explicit,)
    )
    with jax.set_mesh(explicit):
        sharding = jax.sharding.NamedSharding(explicit, P(None, "d"))
        sharded = jax.device_put(tokens, sharding)
        assert_same(function(sharded), function(tokens))
        for grad in (jax.grad(energy), jax.jit(jax.grad(energy))):
            found = grad(sharded)
            assert jax.typeof(found) == jax.typeof(sharded)
            assert_same(found, expected)


@pytest.mark.parametrize("border", ["coverage", "zeros"])
def test_shards_of_the_views(border: str) -> None:
    """Also the gradient, and cells that no view covers."""
    offsets = tuple((y * 5.0, -20.0 - x) for y in (-1.5, 0.25) for x in range(4))
    weights = tuple(0.5 + v for v in range(8))
    case = replace(STRIDED, offsets=offsets, weights=weights, border=border)
    (tokens, offsets, *place, weights), modes = arrays(case.call(case.tokens()))

    def mean(t: Any, o: Any, w: Any) -> Any:
        total, count = jax.lax.psum(srt.mean_sums(t, o, *place, w, **modes), "d")
        return jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))

    specs = {"in_specs": (P("d"), P("d"), P("d")), "out_specs": P()}
    sharded = jax.jit(jax.shard_map(mean, mesh=mesh(), **specs))
    whole = lambda t, o, w: srt.ensemble(t, o, *place, w, **modes)  # noqa: E731
    args = tuple(map(jnp.asarray, (tokens, offsets, weights)))
    expected = whole(*args)
    assert (expected == 0).all(1).any()
    assert_close(sharded(*args), expected, 1e-6)
    grads = [
        jax.grad(lambda t, f=f: jnp.square(f(t, *args[1:])).sum())(args[0])
        for f in (sharded, whole)
    ]
    assert_close(*grads, 1e-6)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_wrong_values_in_shards_are_nan(together: bool, check_vma: bool) -> None:
    """An error on one device would stop the process, because the others wait for it."""
    case = replace(STRIDED, offsets=STRIDED.offsets[:4])
    (tokens, offsets, *place, _), modes = arrays(case.call(case.tokens()))

    def mean(t: Any, o: Any) -> Any:
        if not together:
            return srt.ensemble(t, o, *place, **modes)[None]
        total, count = jax.lax.psum(srt.mean_sums(t, o, *place, **modes), "d")
        return jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))

    specs = {"in_specs": (P("d"), P("d")), "out_specs": P() if together else P("d")}
    sharded = jax.jit(jax.shard_map(mean, mesh=mesh(), **specs, check_vma=check_vma))
    right = sharded(tokens, offsets)
    assert jnp.isfinite(right).all()
    offsets[2, 1] = np.nan
    field = sharded(tokens, offsets)
    if together:
        assert jnp.isnan(field).all()
    else:
        assert jnp.isnan(field[2]).all()
        assert_same(np.delete(field, 2, 0), np.delete(right, 2, 0))


def test_donated_buffers() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 3, 9, 11))
    expected = srt.shift(image, [(1.5, -2)])
    program = jax.jit(
        lambda x: (srt.shift(x, [(1.5, -2)])[0], srt.shift(x, [(0, 0)])[0]), donate_argnums=0
    )
    copy = jnp.array(image)
    shifted, same = program(copy)
    assert copy.is_deleted()
    assert_same(shifted, expected[0])
    assert_same(same, image)


def test_donated_shards_in_bfloat16() -> None:
    image = jax.random.normal(jax.random.key(0), (8, 3, 9, 11), jnp.bfloat16)
    function = lambda x: srt.shift(x, [(1.5, -2)])[0]  # noqa: E731
    specs = {"in_specs": P("d"), "out_specs": P("d")}
    program = jax.jit(jax.shard_map(function, mesh=mesh(), **specs), donate_argnums=0)
    given = jax.device_put(jnp.array(image), jax.sharding.NamedSharding(mesh(), P("d")))
    shifted = program(given)
    assert given.is_deleted()
    assert len(shifted.sharding.device_set) == 4
    assert_same(shifted, function(image))


def test_memory_does_not_grow_with_the_views() -> None:
    """A program allocates the field and no pixel maps of single views."""
    tokens = jax.ShapeDtypeStruct((64, 1, 64, 32), jnp.float32)
    views = [(v / 8, -v / 8) for v in range(64)]
    program = jax.jit(lambda t: srt.ensemble(t, views, 8, 16).transpose(0, 2, 3, 1))
    memory = program.lower(tokens).compile().memory_analysis()
    assert memory.output_size_in_bytes == 4 * 32 * 128 * 128
    assert memory.temp_size_in_bytes < 2**12


def test_calls_from_several_threads() -> None:
    """The threads of XLA run parts of several calls at the same time."""
    case = Ensemble((12, 12), (16, 16), channels=64)
    (tokens, *rest), modes = arrays(case.call(case.tokens()))
    program = jax.jit(
        lambda t: (srt.ensemble(t, *rest, **modes), srt.ensemble(2 * t, *rest, **modes))
    )
    expected = program(tokens)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: program(tokens), range(64)):
            jax.tree.map(assert_same, result, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_on_a_gpu(traced: bool) -> None:
    """Values and gradients equal those of the CPU."""
    gpus = [device for device in jax.devices() if device.platform in ("gpu", "cuda")]
    if not gpus:
        pytest.skip("JAX does not find a GPU")
    (tokens, offsets, *place, _), modes = arrays(STRIDED.call(STRIDED.tokens()))
    image = SHIFTS["bicubic"].image().numpy()
    centers = np.array([[(1.5, 2.25), (4.0, 7.5)]] * len(image), np.float32)

    def program(tokens: Any, image: Any, o: Any, c: Any) -> Any:
        o, c = (o, c) if traced else (offsets, centers)
        return (
            srt.ensemble(tokens, o, *place, **modes),
            srt.ensemble(tokens, o, *place, **modes, reduce="median"),
            srt.ensemble_moments(tokens, o, *place, **modes),
            srt.mean_sums(tokens, o, *place, **modes),
            srt.shift(image, o, interpolation="bicubic"),
            srt.windows(image, c, (3, 2)),
        )

    def loss(*args: Any) -> Any:
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(program(*args)))

    args = (tokens, image, offsets, centers)
    for function in (program, jax.grad(loss, (0, 1))):
        results = []
        for device in (jax.devices("cpu")[0], gpus[0]):
            placed = jax.device_put(args, device)
            results.append([jax.jit(function)(*placed) for _ in range(3)])  # captured after one
        for result in results[1]:
            jax.tree.map(assert_close, result, results[0][0])


# ---- invalid arguments --------------------------------------------------------------------------

TOKENS = np.ones((2, 1, 6, 3), np.float32)
IMAGE = np.ones((1, 2, 5, 6), np.float32)


def call(**changes: Any) -> dict[str, Any]:
    return {"tokens": TOKENS, "offsets": [(0, 0)] * 2, "grid": (2, 3), "patch": (4, 5), **changes}


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": [(0, 0)]},
        {"offsets": [(0, float("nan"))] * 2},
        {"offsets": [(0, 2.0**21)] * 2},
        {"offsets": np.zeros((2, 2), np.int64)},
        {"offsets": "12"},
        {"weights": [1, -1]},
        {"weights": [1, 1e-30]},
        {"weights": [1]},
        {"grid": (2, 2)},
        {"grid": 2.5},
        {"patch": (0, 5)},
        {"stride": (3, 3)},
        {"stride": True},
        {"reduce": "max"},
        {"reduce": "median", "weights": [1, 1]},
        {"upsample": "cubic"},
        {"border": 3},
        {"tokens": TOKENS[0]},
        {"tokens": TOKENS[:0], "offsets": np.zeros((0, 2))},
        {"tokens": TOKENS.astype(np.int32)},
    ],
    ids=str,
)
def test_wrong_arguments_have_the_errors_of_numpy(wrong: dict[str, Any]) -> None:
    """Inside a program, too, when it is traced."""
    reference = pytest.importorskip("srt_ext.numpy", exc_type=ImportError)
    with pytest.raises((TypeError, ValueError)) as expected:
        reference.ensemble(**call(**wrong))
    given = call(**wrong)
    tokens = given.pop("tokens")
    for function in (srt.ensemble, jax.jit(lambda tokens: srt.ensemble(tokens, **given))):
        with pytest.raises(expected.type) as caught:
            function(tokens=tokens, **given) if function is srt.ensemble else function(tokens)
        assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize(
    ("function", "args", "modes"),
    [
        ("shift", (IMAGE[0], [(0, 0)]), {}),
        ("shift", (IMAGE, [(0, 0, 0)]), {}),
        ("shift", (IMAGE, [(0, 0)]), {"padding": "wrap"}),
        ("shift", (IMAGE, [(0, 0)]), {"interpolation": "area"}),
        ("windows", (IMAGE, [[(0, 0)]] * 2, 2), {}),
        ("windows", (IMAGE, [[(0, float("inf"))]], 2), {}),
        ("windows", (IMAGE, [[(0, 0)]], 2, [1, 2, 3]), {}),
        ("windows", (IMAGE, [[(0, 0)]], (0, 2)), {}),
        ("windows", (IMAGE[:, :, :0], [[(0, 0)]], 2), {}),
        ("ensemble_moments", (TOKENS, [(0, 0)] * 2, (2, 2), 4), {}),
    ],
    ids=str,
)
def test_wrong_arguments_of_other_functions(
    function: str, args: tuple[Any, ...], modes: dict[str, str]
) -> None:
    reference = pytest.importorskip("srt_ext.numpy", exc_type=ImportError)
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(reference, function)(*args, **modes)
    with pytest.raises(expected.type) as caught:
        getattr(srt, function)(*args, **modes)
    assert str(caught.value) == str(expected.value)


def test_arrays_of_other_libraries_raise() -> None:
    rule = "tokens must be a jax.Array or a numpy.ndarray without a mask; got"
    for tokens, got in ((torch.ones(TOKENS.shape), "Tensor"), (TOKENS.tolist(), "list")):
        with pytest.raises(TypeError, match=re.escape(f"srt::ensemble: {rule} {got}")):
            srt.ensemble(**call(tokens=tokens))
    with pytest.raises(TypeError, match="offsets must be float32 or float64; got int32"):
        srt.ensemble(**call(offsets=jnp.zeros((2, 2), jnp.int32)))


def test_weights_of_sums_are_of_moderate_size() -> None:
    """The sums are float32."""
    for weight in (2.0**-61, 2.0**61):
        with pytest.raises(ValueError, match=r"weights must be 0 or between 2\^-60 and 2\^60"):
            srt.mean_sums(**call(weights=[1, weight]))
    total, count = srt.mean_sums(**call(weights=[2.0**60, 0]))
    assert (total == count).all()


def test_a_tracer_in_a_sequence_raises() -> None:
    rule = r"offsets must not be sequences that contain arrays of the program; use jnp.array"
    with pytest.raises(TypeError, match=f"srt::ensemble: {rule}"):
        jax.jit(lambda d: srt.ensemble(**call(offsets=[(0, d), (1, 0)])))(1.0)


def test_a_median_of_parts_of_the_views_raises() -> None:
    with pytest.raises(ValueError, match=r"a median cannot be combined from parts.*; got 'median'"):
        srt.mean_sums(**call(reduce="median"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**21])
def test_wrong_values_in_a_program_raise_when_it_runs(value: float) -> None:
    """The process and later calls are not affected."""
    place = ((2, 3), (4, 5))
    program = jax.jit(lambda t, o, w: srt.ensemble(t, o, *place, w))
    right = (jnp.asarray(TOKENS), jnp.zeros((2, 2)), jnp.ones(2))
    for i, rule in ((1, "offsets must be finite and at most"), (2, "weights must be finite and")):
        wrong = [*right]
        wrong[i] = wrong[i].at[0].set(-value)
        with pytest.raises(Exception, match=f"INVALID_ARGUMENT: srt::ensemble: {rule}"):
            jax.block_until_ready(program(*wrong))
        assert (program(*right) == 1).all()


# ---- the library --------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # its import fails
import jax, srt_ext.jax
program = jax.jit(lambda tokens: srt_ext.jax.ensemble(tokens, [(0, 1)], (1, 2), (1, 4)))
print(program(jax.numpy.ones((1, 1, 2, 1))).sum())
"""


def test_use_without_torch() -> None:
    assert run_python("-c", WITHOUT_TORCH).stdout == "7.0\n"  # one pixel is not covered


OLD_JAXLIB = """
import sys
sys.modules["torch"] = None  # its import takes long
import jax
jax.ffi.include_dir = lambda: {folder!r}
try:
    import srt_ext.jax
except ImportError as error:
    print(error)
print(jax.jit(lambda x: x + 1)(1))  # JAX is still usable
"""


def test_an_older_interface_is_refused(tmp_path: Path) -> None:
    """Before the handlers are registered, because that would make JAX unusable."""
    header = Path("xla/ffi/api/c_api.h")
    text = Path(jax.ffi.include_dir(), header).read_text()
    (minor,) = re.findall(r"#define XLA_FFI_API_MINOR (\d+)", text)
    old = tmp_path / header
    old.parent.mkdir(parents=True)
    for number, reason in (("0", r"has version 0\.0\."), ("", "does not state the version")):
        old.write_text(re.sub(r"(API_MINOR) \d+", rf"\1 {number}", text))
        error, result = run_python(
            "-c", OLD_JAXLIB.format(folder=str(tmp_path))
        ).stdout.splitlines()
        assert re.search(reason, error)
        assert result == "2"
        if number:
            (built,) = re.findall(r"built for version 0\.(\d+) of XLA's foreign", error)
            assert 0 < int(built) <= int(minor)
            assert re.search(r"but jaxlib \d+\.\d+\.[\d.]+ has", error)
