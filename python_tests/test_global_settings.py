"""What torch's global settings, and integers of other libraries, must not change."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
WORDS = ("4", "grid:1", "paper:1", "lattice:5:3", "sobol:8:3", "ring:5:4", "best:9+flip")


def pooled(images: torch.Tensor) -> torch.Tensor:
    """A model whose tokens are patch means, and one prefix token."""
    tokens = F.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)
    return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


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


@contextmanager
def denormals_flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Passing(TorchDispatchMode):
    """Sees every op and changes none."""

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
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "flush denormals": denormals_flushed,
    "matmul precision": matmul_precision,
    "one thread": lambda: threads(1),
    "many threads": lambda: threads(64),
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
    """Every op, its gradients where they are recorded, streams, and the oracle."""
    offsets = views.grid(1).offsets
    weights = views.ring(9, 4).weights
    made: list[Any] = [srt_ext.shift(IMAGES, offsets), dlpack.shift(IMAGES, offsets.tolist())]
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
    """Made under the setting and used without it, and the other way round."""
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


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("autocast", "no_grad", "inference")])
def test_ops_streams_and_gradients_do_not_depend_on_torch_settings(name: str) -> None:
    expected = ops_and_streams()
    with setting(name):
        found = ops_and_streams()
    assert_same(found, expected)
