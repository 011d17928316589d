"""Independence of global settings of torch, and of the library of integers and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import srt_ext
from srt_ext import SRT, RunningMean, RunningMedian, RunningMoments, dlpack, reference, views
from srt_ext import numpy as srt_numpy

PATCH = 8
WORDS = (
    *("4", "grid:1", "paper:1", "lattice:5:3", "sobol:8:3", "ring:5:4", "best:9+flip"),
    *("moore:1,2.5", "neumann:2+vflip", "patches:5:9x7:0.3:1"),
)


def pooled(images: torch.Tensor) -> torch.Tensor:
    """A model whose tokens are the means of patches, with one prefix token."""
    tokens = F.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)
    return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


@contextmanager
def changed(change: Callable[[Any], object], value: object, before: object) -> Iterator[None]:
    """Changes a setting of torch during a test and restores it."""
    change(value)
    try:
        yield
    finally:
        change(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


class Passing(TorchDispatchMode):
    """Receives every op and does not change it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class PassingFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


SETTINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: changed(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: changed(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "flush denormals": lambda: changed(torch.set_flush_denormal, True, False),
    "matmul precision": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
    "one thread": lambda: changed(torch.set_num_threads, 1, torch.get_num_threads()),
    "many threads": lambda: changed(torch.set_num_threads, 64, torch.get_num_threads()),
    "anomaly": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Passing,
    "function mode": PassingFunctions,
}


@contextmanager
def setting(name: str) -> Iterator[None]:
    with warnings.catch_warnings(), SETTINGS[name]():
        warnings.simplefilter("ignore")  # of anomaly mode
        yield


def leaves(result: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in found if leaf is not None]


def assert_same(results: Any, expected: Any) -> None:
    """Bit for bit, of the same dtypes, with values."""
    pairs = list(zip(leaves(results), leaves(expected), strict=True))
    assert pairs
    for result, right in pairs:
        assert result.dtype == right.dtype
        assert result.device.type == "cpu"
        assert torch.equal(result, right)


IMAGES = torch.rand(2, 3, 30, 28, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(9, 2, 16, 5, generator=torch.Generator().manual_seed(1))
PLACE: Any = {"grid": (4, 4), "patch": (8, 8)}


def designs() -> list[views.Views]:
    made = [views.parse(words, 16) for words in WORDS]
    made += [views.spread(made[1]), views.spread(made[1].offsets), views.resolve(made[4], 16, 1.5)]
    return made


def modules() -> list[SRT]:
    shared: dict[str, Any] = {"patch": PATCH, "prefix": 1}
    return [
        SRT(pooled, 4, **shared),
        SRT(pooled, "ring:5:4", stride=2, **shared),
        SRT(pooled, "sobol:8:3", scale=1.3, stride=4, **shared),
        SRT(pooled, "4+flip", view_batch="auto", **shared),
        SRT(pooled, views.ring(9, 4)[:2], **shared),
        SRT(pooled, "grid:1", reduce="median", **shared),
        SRT(pooled, "grid:1", reduce="median", streaming=True, view_batch=2, **shared),
        SRT(pooled, "grid:1", streaming=True, view_batch=2, **shared),
    ]


def fields(srts: list[SRT]) -> list[Any]:
    return [[srt(IMAGES), srt.moments(IMAGES)] for srt in srts]


def ops_and_streams() -> list[Any]:
    """Results of every op, of gradients if they are recorded, of streams and of the oracle."""
    offsets = views.grid(1).offsets
    weights = views.ring(9, 4).weights
    made: list[Any] = [srt_ext.shift(IMAGES, offsets), dlpack.shift(IMAGES, offsets.tolist())]
    made.append(srt_ext.polyphase(IMAGES, 2, full=True))
    centers = (offsets.expand(len(IMAGES), -1, -1) + 3.25).requires_grad_()
    sampled = srt_ext.windows(IMAGES, centers, (3, 4))
    made.append(sampled.detach())
    if sampled.requires_grad:
        made.append(torch.autograd.grad(sampled.square().sum(), centers)[0])
    made.append(reference.windows(IMAGES, centers.detach(), (2, 2)))
    tokens = TOKENS.clone().requires_grad_()
    for reduce in ("mean", "median"):
        field = srt_ext.ensemble(tokens, offsets, **PLACE, reduce=reduce, stride=2)
        made.append(field.detach())
        if field.requires_grad:
            made.append(torch.autograd.grad(field.square().sum(), tokens)[0])
    mean, var = srt_ext.ensemble_moments(tokens, offsets, weights=weights, **PLACE)
    made += [mean.detach(), var.detach()]
    if var.requires_grad:
        made.append(torch.autograd.grad((mean + var).sum(), tokens)[0])
    for kind in (RunningMean, RunningMoments, RunningMedian):
        running: Any = kind(**PLACE)
        for chunk, moved in zip(TOKENS.split(4), offsets.split(4), strict=True):
            running.update(chunk, moved)
        other = kind(**PLACE)
        other.load_state_dict(running.state_dict())
        made += [running.result(), other.result()]
    made.append(reference.ensemble(TOKENS, offsets, **PLACE, weights=weights))
    made += reference.ensemble_moments(TOKENS, offsets, **PLACE, dtype=torch.float32)
    made.append(reference.shift(IMAGES, offsets[:2] + 0.3, interpolation="bicubic"))
    made.append(reference.shift(IMAGES, offsets[:2], interpolation="nearest"))
    return made


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "autocast"])
def test_designs_and_srt_do_not_depend_on_torch_settings(name: str) -> None:
    """Created with the setting and used without it, and vice versa."""
    expected, made = designs(), modules()
    right = fields(made)
    with setting(name):
        found = designs()
        assert all(part is None or part.device.type == "cpu" for v in found for part in v)
        others = modules()
        results = fields(others)
        more = fields(made)
    for one, two in zip(found, expected, strict=True):
        assert one.offsets.dtype == torch.float32
        assert_same(one, two)
    assert_same(results, right)
    assert_same(more, right)
    assert_same(fields(others), right)


@pytest.mark.parametrize(
    "name", [n for n in SETTINGS if n not in ("autocast", "no_grad", "inference")]
)
def test_ops_streams_and_gradients_do_not_depend_on_torch_settings(name: str) -> None:
    expected = ops_and_streams()
    with setting(name):
        found = ops_and_streams()
    assert_same(found, expected)


def test_autocast_affects_only_the_model() -> None:
    conv = torch.nn.Conv2d(3, 6, PATCH, stride=PATCH)
    with torch.no_grad():
        exact = SRT(conv, "ring:5:4", scale=1.3, stride=3, patch=PATCH)(IMAGES).field
        with torch.autocast("cpu", torch.bfloat16):
            field = SRT(conv, "ring:5:4", scale=1.3, stride=3, patch=PATCH)(IMAGES).field
    assert field.dtype == torch.bfloat16
    torch.testing.assert_close(field.float(), exact, rtol=0.02, atol=0.02)


def test_srt_created_in_inference_mode_works_outside_it() -> None:
    """Its views can be saved for a backward pass."""
    with torch.inference_mode():
        srt = SRT(pooled, "ring:9:4", patch=PATCH, prefix=1)
        inside = srt(IMAGES).field
    assert torch.equal(srt(IMAGES).field, inside)
    offsets, weights, _ = srt.views
    tokens = TOKENS.clone().requires_grad_()
    srt_ext.ensemble(tokens, offsets, weights=weights, **PLACE).sum().backward()
    assert tokens.grad is not None


def test_srt_can_be_created_in_fake_tensor_mode() -> None:
    """Its views are not fake."""
    expected = SRT(pooled, "sobol:4:3", patch=PATCH, prefix=1)
    with FakeTensorMode():
        srt = SRT(pooled, "sobol:4:3", patch=PATCH, prefix=1)
    assert torch.equal(srt.views.offsets, expected.views.offsets)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        field = srt(mode.from_tensor(IMAGES)).field
        assert field.shape == (2, 3, 30, 28)


def test_vmap_over_srt() -> None:
    many = torch.rand(3, 1, 3, 16, 24)
    for settings in ({}, {"reduce": "median"}, {"stride": 8, "view_batch": 9}):
        srt = SRT(pooled, "grid:1", patch=PATCH, prefix=1, **settings)
        expected = torch.stack([srt(images).field for images in many])
        torch.testing.assert_close(torch.vmap(lambda x, s=srt: s(x).field)(many), expected)


def test_the_first_call_for_a_model_may_be_in_vmap() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("test_vit", dynamic_img_size=True).eval()
    many = torch.rand(3, 1, 3, 32, 48)
    first = torch.vmap(SRT(vit, 2, stride=8))(many).field
    expected = torch.stack([SRT(vit, 2, stride=8)(images).field for images in many])
    torch.testing.assert_close(first, expected)


# ---- integers and numbers of other libraries ----------------------------------------------------


class Index:
    """An integer by the protocol ``__index__``."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


KINDS = {
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
    "__index__": Index,
}


def calls(n: Callable[[int], Any]) -> dict[str, Callable[[], Any]]:
    """A call of every function with integer arguments, which ``n`` converts."""
    offsets = views.grid(1).offsets
    place = {"grid": (n(4), n(4)), "patch": n(8), "stride": n(2)}
    tokens = TOKENS.numpy()
    shared: dict[str, Any] = {"patch": n(PATCH), "prefix": n(1)}

    def stream(kind: Any, tokens: Any, offsets: Any) -> Any:
        running = kind(**place)
        running.update(tokens, offsets)
        state = running.state_dict()
        running.load_state_dict({**state, "views": n(state["views"])})
        assert type(running.views) is int
        return running.result()

    pair = {**place, "patch": (n(8), n(8))}
    return {
        "best": lambda: views.best(n(5), n(3)),
        "best, pair": lambda: views.best(n(5), (n(3), n(2))),
        "paper": lambda: views.paper(n(2)),
        "lattice": lambda: views.lattice(n(5), 3),
        "sobol": lambda: views.sobol(n(5), 3, n(7)),
        "ring": lambda: views.ring(n(5), 3),
        "patches": lambda: views.patches(n(5), (n(9), n(7)), 0.3, n(1), patch=n(8)),
        "polyphase": lambda: srt_ext.polyphase(IMAGES, n(2), full=True),
        "radius_for": lambda: torch.tensor(views.radius_for(n(16))),
        "resolve": lambda: views.resolve(n(9)),
        "ensemble": lambda: srt_ext.ensemble(TOKENS, offsets, **pair),
        "moments": lambda: srt_ext.ensemble_moments(TOKENS, offsets, **pair),
        "dlpack": lambda: torch.tensor(dlpack.ensemble(tokens, offsets.numpy(), **pair)),
        "numpy": lambda: torch.tensor(srt_numpy.ensemble(tokens, offsets.numpy(), **place)),
        "reference": lambda: reference.ensemble(TOKENS, offsets, **pair),
        "stream": lambda: stream(RunningMean, TOKENS, offsets),
        "numpy stream": lambda: torch.tensor(
            stream(srt_numpy.RunningMean, tokens, offsets.numpy())
        ),
        "SRT": lambda: SRT(pooled, n(9), stride=n(2), view_batch=n(4), **shared)(IMAGES),
        "SRT, pair": lambda: SRT(pooled, 9, stride=[n(2), n(1)], **shared)(IMAGES),
        "cost": lambda: torch.tensor(
            SRT(torch.nn.Conv2d(3, 2, 8, stride=8), 4, patch=8).cost((n(32), n(24)), n(2))
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_other_libraries_are_accepted(kind: str) -> None:
    expected, found = calls(int), calls(KINDS[kind])
    for name, call in found.items():
        assert_same(call(), expected[name]()), name


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 4.0, np.float32(4), "4"])
def test_bools_and_floats_raise_where_integers_are_required(value: Any) -> None:
    for name, call in calls(lambda _: value).items():
        if name == "resolve" and value == "4":
            continue
        with pytest.raises((TypeError, ValueError), match="must be"):
            call()


@pytest.mark.parametrize(
    "value",
    [torch.tensor(4.0), torch.tensor([4]), torch.tensor([[4]]), torch.tensor(4, device="meta")],
)
def test_other_tensors_raise_where_integers_are_required(value: torch.Tensor) -> None:
    for call in (
        lambda: srt_ext.ensemble(TOKENS, torch.zeros(9, 2), (value, value), (8, 8)),
        lambda: views.best(value),  # type: ignore[arg-type]
        lambda: SRT(pooled, 4, patch=PATCH, view_batch=value),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="must be"):
            call()


NUMBERS = [np.float32, np.float64, np.float16, np.array, torch.tensor]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_other_libraries_are_accepted(number: Any) -> None:
    assert_same(views.grid(number(1.5), number(0.5)), views.grid(1.5, 0.5))
    assert_same(views.ring(5, number(3.5)), views.ring(5, 3.5))
    assert_same(views.sobol(5, number(3.5)), views.sobol(5, 3.5))
    assert_same(views.moore(number(1.5)), views.moore(1.5))
    assert_same(views.neumann([number(1.5), 2]), views.neumann((1.5, 2)))
    assert_same(views.patches(5, 9, number(0.25)), views.patches(5, 9, 0.25))
    one, two = (SRT(pooled, "grid:1", scale=s, patch=PATCH, prefix=1) for s in (number(1.25), 1.25))
    assert type(one.scale) is float
    assert_same(one(IMAGES), two(IMAGES))
    some = [torch.tensor([3.0]), torch.tensor(True), torch.tensor(3j), np.array("3")]
    for wrong in ("3", True, None, *some, torch.tensor(3.0, device="meta")):
        with pytest.raises(TypeError, match="radius must be"):
            views.grid(wrong)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="must be"):
            views.grid(1, wrong)  # type: ignore[arg-type]


def test_layers_and_inject_accept_integers_of_other_libraries() -> None:
    timm = pytest.importorskip("timm")
    settings: dict[str, Any] = {"depth": 2, "embed_dim": 12, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **settings).eval()
    images = torch.rand(1, 3, 32, 32)
    for kind in KINDS.values():
        for how in ({"layers": 0}, {"layers": [0, -1]}, {"inject": 0}):
            ((name, layers),) = how.items()
            if kind is np.uint8 and layers == [0, -1]:
                continue
            given = [kind(n) for n in layers] if isinstance(layers, list) else kind(layers)
            srt = SRT(model, 2, **{name: given})
            assert_same(srt(images), SRT(model, 2, **how)(images))
    for wrong in (True, np.True_, 1.0, torch.tensor(True)):
        for name in ("layers", "inject"):
            with pytest.raises(TypeError, match=f"{name} must be"):
                SRT(model, 2, **{name: wrong})


def test_the_former_name_of_dlpack_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"srt_ext.array is deprecated; use srt_ext.dlpack"):
        assert srt_ext.array is dlpack
    with pytest.raises(AttributeError, match="no attribute 'arrays'"):
        _ = srt_ext.arrays
