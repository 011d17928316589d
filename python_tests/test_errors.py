"""Wrong arguments: an error that states the rule and the value, from Python, op and NumPy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from arrays import arrays, bfloat16

import srt_ext
from srt_ext import ops

try:
    import srt_ext.numpy as numpy_binding
except ImportError:
    numpy_binding = None

NAN, INF = float("nan"), float("inf")
BIG = 2**62


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape or (2, 1, 6, 3), dtype=dtype)


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of any size on one element of memory."""
    return torch.ones((), dtype=dtype).expand(shape)


def dense_huge(*shape: int) -> torch.Tensor:
    """The same, dense in the last dimension."""
    return torch.ones(shape[-1]).expand(shape)


def pairs(*values: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ensemble_call(**changes: Any) -> dict[str, Any]:
    call = {
        "tokens": tokens(),
        "offsets": torch.zeros(2, 2),
        "grid": [2, 3],
        "patch": [4, 5],
        "weights": None,
    }
    return {**call, **changes}


def shift_call(**changes: Any) -> dict[str, Any]:
    return {"image": torch.ones(1, 2, 5, 6), "offsets": torch.zeros(2, 2), **changes}


def per_cell() -> torch.Tensor:
    return torch.zeros(8, 15, dtype=torch.float64)


# The state of each stream, for ensemble_call().
STATES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "accumulate_mean_": lambda: {"mean": torch.zeros(OUT), "weight": per_cell()},
    "accumulate_moments_": lambda: {
        "mean": torch.zeros(OUT),
        "var": torch.zeros(OUT),
        "weight": per_cell(),
    },
    "accumulate_median_": lambda: {"window": torch.zeros(8, *OUT), "count": per_cell()},
}


@dataclass(frozen=True)
class Wrong:
    rule: str
    got: str
    changes: dict[str, Any]
    error: type[Exception] = ValueError
    op: str = "ensemble"

    @property
    def message(self) -> str:
        return f"srt::{self.op}: {self.rule}; got {self.got}"

    def arguments(self) -> dict[str, Any]:
        if self.op == "shift":
            return shift_call(**self.changes)
        call = {**STATES.get(self.op, dict)(), **ensemble_call(), **self.changes}
        if self.op == "accumulate_median_":
            del call["weights"]
        return call

    def __str__(self) -> str:
        return f"{self.op}-{self.rule[:40]}-{self.got}"


def wrong(
    rule: str,
    got: str,
    error: type[Exception] = ValueError,
    op: str = "ensemble",
    **changes: Any,
) -> Wrong:
    return Wrong(rule, got, changes, error, op)


wrong_type = partial(wrong, error=TypeError)
wrong_shift = partial(wrong, op="shift")
wrong_mean = partial(wrong, op="accumulate_mean_")
wrong_moments = partial(wrong, op="accumulate_moments_")
wrong_median = partial(wrong, op="accumulate_median_")


TOKENS_RANK = "tokens must have 4 dimensions, [V, B, N, C]"
IMAGE_RANK = "image must have 4 dimensions, [B, C, H, W]"
OFFSETS_SHAPE = "offsets must be [V, 2] with V = 2"
SHIFT_OFFSETS_SHAPE = "offsets must be [V, 2] with V >= 1"
WEIGHTS_SHAPE = "weights must be [V] with V = 2"
VALUE_DTYPE = "must be float32 or float64"
IMAGE_AXIS = "image must have at most 2^24 pixels on each axis"
DENSE = "tokens must be dense in the last dimension"
DIVIDES = "stride must divide grid * patch = [8, 15]"
COUNT = "grid must hold the N = 6 tokens of a view, without class or register tokens"
FLOATING = "must be float32, float16, bfloat16 or float64"
PAIR = "must be two integers >= 1, (y, x)"
OFFSETS = "offsets must be finite and at most 2^20 pixels in size"
WEIGHTS = "weights must be finite and >= 0"
TINY = "weights must be 0 or at least 2^-80 of the largest"
BYTES = "the output must have fewer than 2^63 bytes"
AXIS = "grid * patch must be at most 2^24 pixels on each axis"
OVERLAP = "out must not overlap itself (each stride must step over what the smaller ones span)"
SHARED_MEMORY = ("out must not share memory with tokens", "a view of the same memory")

memory = torch.ones(2 * 6 * 3 + 8 * 15 * 3)
OUT = (1, 3, 8, 15)  # of ensemble_call()

RANKS = [
    wrong(TOKENS_RANK, "[]", tokens=torch.ones(())),
    wrong(TOKENS_RANK, "[6, 3]", tokens=tokens(6, 3)),
    wrong(TOKENS_RANK, "[1, 2, 1, 6, 3]", tokens=tokens(1, 2, 1, 6, 3)),
    wrong(
        "tokens must hold at least one view",
        "[0, 1, 6, 3]",
        tokens=tokens(0, 1, 6, 3),
        offsets=torch.zeros(0, 2),
    ),
    wrong(OFFSETS_SHAPE, "[3, 2]", offsets=torch.zeros(3, 2)),
    wrong(OFFSETS_SHAPE, "[2, 3]", offsets=torch.zeros(2, 3)),
    wrong(OFFSETS_SHAPE, "[4]", offsets=torch.zeros(4)),
    wrong(OFFSETS_SHAPE, "[]", offsets=torch.zeros(())),
    wrong(OFFSETS_SHAPE, "[2, 2, 1]", offsets=torch.zeros(2, 2, 1)),
    wrong(WEIGHTS_SHAPE, "[3]", weights=torch.ones(3)),
    wrong(WEIGHTS_SHAPE, "[2, 1]", weights=torch.ones(2, 1)),
    wrong(WEIGHTS_SHAPE, "[]", weights=torch.ones(())),
    wrong_shift(IMAGE_RANK, "[5, 6]", image=torch.ones(5, 6)),
    wrong_shift(IMAGE_RANK, "[]", image=torch.ones(())),
    wrong_shift(IMAGE_RANK, "[1, 1, 1, 5, 6]", image=torch.ones(1, 1, 1, 5, 6)),
    wrong_shift(SHIFT_OFFSETS_SHAPE, "[0, 2]", offsets=torch.zeros(0, 2)),
    wrong_shift(SHIFT_OFFSETS_SHAPE, "[2]", offsets=torch.zeros(2)),
    wrong_shift(SHIFT_OFFSETS_SHAPE, "[2, 3]", offsets=torch.zeros(2, 3)),
    wrong_shift(SHIFT_OFFSETS_SHAPE, "[1, 2, 2]", offsets=torch.zeros(1, 2, 2)),
]

DTYPES = [
    *(
        wrong_type(f"tokens {FLOATING}", name, tokens=tokens(dtype=getattr(torch, name)))
        for name in ("uint8", "int8", "int16", "int32", "int64", "bool", "complex64", "complex128")
    ),
    *(
        wrong_shift(
            f"image {FLOATING}, or uint8", name, TypeError, image=torch.ones(1, 2, 5, 6).to(dtype)
        )
        for name in ("int8", "int32", "int64", "bool", "complex64")
        for dtype in (getattr(torch, name),)
    ),
    *(
        wrong_type(f"offsets {VALUE_DTYPE}", name, offsets=torch.zeros(2, 2).to(dtype))
        for name in ("float16", "bfloat16", "int64", "int32", "complex64")
        for dtype in (getattr(torch, name),)
    ),
    wrong_type(f"weights {VALUE_DTYPE}", "float16", weights=torch.ones(2).half()),
    wrong_type(f"weights {VALUE_DTYPE}", "int64", weights=torch.ones(2).long()),
    wrong_shift(f"offsets {VALUE_DTYPE}", "int64", TypeError, offsets=torch.zeros(2, 2).long()),
    wrong_type(
        "out must have the dtype of tokens, float32", "float64", out=torch.empty(OUT).double()
    ),
    wrong_type(
        "out must have the dtype of tokens, float16",
        "float32",
        tokens=tokens().half(),
        out=torch.empty(OUT),
    ),
]

LISTS = [
    *(
        wrong(f"{name} {PAIR}", str(value), **{name: value})
        for name in ("grid", "patch", "stride")
        for value in ([], [2, 3, 1], [0, 3], [2, 0], [-2, -3], [2, -1])
    ),
    wrong(f"stride {PAIR}", "[0, 0]", stride=[0, 0]),
    wrong(f"patch {PAIR}", f"[4, {-BIG}]", patch=[4, -BIG]),
    wrong(DIVIDES, "[3, 1]", stride=[3, 1]),
    wrong(DIVIDES, "[1, 30]", stride=[1, 30]),
    wrong(DIVIDES, f"[{BIG}, {BIG}]", stride=[BIG, BIG]),
    wrong(COUNT, "[3, 3]", grid=[3, 3]),
    wrong(COUNT, "[1, 5]", grid=[1, 5]),
    wrong(COUNT.replace("6", "0"), "[2, 3]", tokens=tokens(2, 1, 0, 3)),
]

OVERFLOWS = [
    wrong(AXIS, f"[2, 3] * [{2**23 + 1}, 1]", patch=[2**23 + 1, 1]),
    wrong(AXIS, f"[2, 3] * [{BIG}, {BIG}]", patch=[BIG, BIG]),
    wrong(AXIS, f"[{BIG}, 3] * [4, 5]", grid=[BIG, 3]),
    wrong(AXIS, f"[{2**32}, {2**32}] * [{2**32}, {2**32}]", grid=[2**32] * 2, patch=[2**32] * 2),
    wrong(
        BYTES,
        f"[1, {2**20}, {2**24}, {2**24}]",
        tokens=dense_huge(2, 1, 1, 2**20),
        grid=[1, 1],
        patch=[2**24, 2**24],
    ),
    wrong(
        BYTES,
        f"[{2**31}, {2**20}, {2**12}, 1]",
        tokens=dense_huge(2, 2**31, 1, 2**20),
        grid=[1, 1],
        patch=[2**12, 1],
    ),
    wrong_shift(IMAGE_AXIS, f"[1, 1, {2**24 + 1}, 1]", image=huge(1, 1, 2**24 + 1, 1)),
    wrong_shift(IMAGE_AXIS, f"[1, 1, 1, {2**40}]", image=huge(1, 1, 1, 2**40)),
    wrong_shift(
        BYTES,
        f"[{2**20}, 1, 1, {2**24}, {2**24}]",
        image=huge(1, 1, 2**24, 2**24),
        offsets=huge(2**20, 2),
    ),
]

VALUES = [
    wrong(OFFSETS, "nan at [1, 0]", offsets=pairs((0, 0), (NAN, 0))),
    wrong(OFFSETS, "inf at [0, 1]", offsets=pairs((0, INF), (0, 0))),
    wrong(OFFSETS, "-inf at [1, 1]", offsets=pairs((0, 0), (0, -INF))),
    wrong(OFFSETS, "1.04858e+06 at [0, 0]", offsets=pairs((2**20 + 0.25, 0), (0, 0))),
    wrong(OFFSETS, "-1e+300 at [0, 0]", offsets=pairs((-1e300, 0), (0, 0))),
    wrong_shift(OFFSETS, "nan at [0, 0]", offsets=pairs((NAN, 0))),
    wrong_shift(OFFSETS, "-inf at [1, 1]", offsets=pairs((0, 0), (0, -INF))),
    wrong_shift(OFFSETS, "2e+06 at [0, 1]", offsets=pairs((0, 2e6))),
    wrong(WEIGHTS, "-1 at [0]", weights=torch.tensor([-1.0, 1.0])),
    wrong(WEIGHTS, "nan at [1]", weights=torch.tensor([1.0, NAN])),
    wrong(WEIGHTS, "inf at [1]", weights=torch.tensor([0.0, INF])),
    wrong(WEIGHTS, "-1e-40 at [0]", weights=torch.tensor([-1e-40, 1.0], dtype=torch.float64)),
    wrong(TINY, "1e-30 at [1]", weights=torch.tensor([1.0, 1e-30])),
    wrong(TINY, "4.94066e-324 at [0]", weights=torch.tensor([5e-324, 1.0], dtype=torch.float64)),
]

UNWEIGHTED = "weights must be None where reduce is 'median'"
REDUCES = "reduce must be one of 'mean', 'median'"
UPSAMPLES = "upsample must be one of 'nearest', 'bilinear'"
BORDERS = "border must be one of 'coverage', 'zeros', 'clamp'"
PADDINGS = "padding must be one of 'zeros', 'border', 'reflect', 'circular'"
INTERPOLATIONS = "interpolation must be one of 'nearest', 'bilinear', 'bicubic'"

WORDS = [
    wrong(UNWEIGHTED, "weights", reduce="median", weights=torch.ones(2)),
    *(wrong(REDUCES, f"'{word}'", reduce=word) for word in ("", "sum", "Mean", "mean ")),
    *(wrong(UPSAMPLES, f"'{word}'", upsample=word) for word in ("", "bicubic", "linear")),
    *(wrong(BORDERS, f"'{word}'", border=word) for word in ("", "reflect", "covéragé")),
    *(wrong_shift(PADDINGS, f"'{word}'", padding=word) for word in ("", "clamp", "replicate")),
    *(wrong_shift(INTERPOLATIONS, f"'{word}'", interpolation=word) for word in ("", "area")),
]

LAYOUTS = [
    wrong(DENSE, "stride 2", tokens=tokens(2, 1, 6, 6)[..., ::2]),
    wrong(DENSE, "stride 0", tokens=tokens(2, 1, 6, 1).expand(2, 1, 6, 3)),
    wrong(DENSE, "stride 6", tokens=tokens(2, 1, 3, 6).transpose(2, 3)),
    wrong("out must be [1, 3, 8, 15]", "[1, 8, 15, 3]", out=torch.empty(1, 8, 15, 3)),
    wrong("out must be [1, 3, 8, 15]", "[3, 8, 15]", out=torch.empty(3, 8, 15)),
    wrong("out must be [1, 3, 8, 15]", "[0]", out=torch.empty(0)),
    wrong("out must be [1, 3, 4, 3]", "[1, 3, 8, 15]", stride=[2, 5], out=torch.empty(OUT)),
    wrong(OVERLAP, "strides [0, 0, 0, 0]", out=torch.empty(()).expand(OUT)),
    wrong(OVERLAP, "strides [120, 0, 15, 1]", out=torch.empty(1, 1, 8, 15).expand(OUT)),
    wrong(OVERLAP, "strides [1, 1, 15, 1]", out=torch.empty(400).as_strided(OUT, (1, 1, 15, 1))),
    wrong(
        OVERLAP, "strides [1, 119, 15, 1]", out=torch.empty(400).as_strided(OUT, (1, 119, 15, 1))
    ),
    wrong(*SHARED_MEMORY, tokens=memory[:36].view(2, 1, 6, 3), out=memory[35:395].view(OUT)),
    wrong(*SHARED_MEMORY, tokens=memory[-36:].view(2, 1, 6, 3), out=memory[1:361].view(OUT)),
]

OTHER_OPS = [
    Wrong(rule, got, changes, error, op)
    for op in ("ensemble_moments", *STATES)
    for rule, got, changes, error in (
        (TOKENS_RANK, "[6, 3]", {"tokens": tokens(6, 3)}, ValueError),
        (f"tokens {FLOATING}", "int32", {"tokens": tokens(dtype=torch.int32)}, TypeError),
        (f"patch {PAIR}", "[]", {"patch": []}, ValueError),
        (DIVIDES, "[3, 1]", {"stride": [3, 1]}, ValueError),
        (UPSAMPLES, "'cubic'", {"upsample": "cubic"}, ValueError),
        (BORDERS, "'wrap'", {"border": "wrap"}, ValueError),
        (OFFSETS, "nan at [1, 0]", {"offsets": pairs((0, 0), (NAN, 0))}, ValueError),
    )
]

state_memory = torch.zeros(1000)
STREAM_WEIGHTS = "weights must be 0 or between 2^-500 and 2^500"


STREAMS = [
    wrong_mean("mean must be [1, 3, 8, 15]", "[1, 3, 8, 5]", mean=torch.zeros(1, 3, 8, 5)),
    wrong_mean("mean must be float32", "float64", TypeError, mean=torch.zeros(OUT).double()),
    wrong_mean("mean must be float32", "float16", TypeError, mean=torch.zeros(OUT).half()),
    wrong_mean(
        "mean must be float64, as tokens are",
        "float32",
        TypeError,
        tokens=tokens(dtype=torch.float64),
    ),
    wrong_mean("weight must be [8, 15]", "[15, 8]", weight=per_cell().t()),
    wrong_mean("weight must be float64", "float32", TypeError, weight=per_cell().float()),
    wrong_mean(
        "weight must be contiguous",
        "strides [1, 8]",
        weight=torch.zeros(15, 8, dtype=torch.float64).t(),
    ),
    wrong_mean(
        OVERLAP.replace("out", "mean", 1),
        "strides [0, 0, 0, 0]",
        mean=torch.zeros(()).expand(OUT),
    ),
    wrong_moments(
        "var must have the strides of mean",
        "strides [360, 1, 45, 3]",
        var=torch.zeros(OUT).to(memory_format=torch.channels_last),
    ),
    wrong_moments(
        "mean and var must not share memory",
        "views of the same memory",
        mean=state_memory[:360].view(OUT),
        var=state_memory[359:719].view(OUT),
    ),
    wrong_median(
        "window must be [8, 1, 3, 8, 15]", "[7, 1, 3, 8, 15]", window=torch.zeros(7, *OUT)
    ),
    wrong_median("count must be [8, 15]", "[8]", count=torch.zeros(8).double()),
    *(
        wrong_stream(STREAM_WEIGHTS, got, weights=torch.tensor(values, dtype=torch.float64))
        for wrong_stream in (wrong_mean, wrong_moments)
        for values, got in (([0.0, 1e160], "1e+160 at [1]"), ([1e-160, 0.0], "1e-160 at [0]"))
    ),
]

TABLE = [*RANKS, *DTYPES, *LISTS, *OVERFLOWS, *VALUES, *WORDS, *LAYOUTS, *OTHER_OPS, *STREAMS]


def split(case: Wrong) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """The state, the views and the modes of a call of accumulate_*."""
    call = case.arguments()
    state = [call.pop(name) for name in STATES[case.op]()]
    names = ("tokens", "offsets", "grid", "patch", "weights")
    views = tuple(call.pop(name) for name in names if name in call)
    return state, views, {"upsample": "bilinear", "border": "coverage", "stride": 1, **call}


def through_python(case: Wrong) -> None:
    if case.op in STATES:
        state, views, modes = split(case)
        ops.accumulate(case.op, *state, *views, **modes)
    else:
        getattr(srt_ext, case.op)(**case.arguments())


def through_op(case: Wrong) -> None:
    call = case.arguments()
    op = getattr(torch.ops.srt, case.op)
    (op.out if "out" in call else op)(**call)


def through_numpy(case: Wrong) -> None:
    if case.op in STATES:
        state, views, modes = arrays(split(case))
        views = numpy_binding._views(f"srt::{case.op}", *views, **modes)
        getattr(numpy_binding._numpy, case.op)(*arrays(tuple(state)), views)
    else:
        getattr(numpy_binding, case.op)(**arrays(case.arguments()))


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_python_states_the_rule_and_the_value(case: Wrong) -> None:
    with pytest.raises(case.error) as caught:
        through_python(case)
    assert type(caught.value) is case.error
    assert str(caught.value) == case.message


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_op_says_the_same(case: Wrong) -> None:
    with pytest.raises(RuntimeError) as caught:
        through_op(case)
    assert case.message in str(caught.value)


@pytest.mark.skipif(numpy_binding is None, reason="srt_ext.numpy was not built")
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_numpy_says_the_same(case: Wrong) -> None:
    values = [value for value in case.changes.values() if isinstance(value, torch.Tensor)]
    if bfloat16 is None and any(value.dtype == torch.bfloat16 for value in values):
        pytest.skip("needs ml_dtypes")
    with pytest.raises(case.error) as caught:
        through_numpy(case)
    assert type(caught.value) is case.error
    message = case.message
    if case.rule in (f"offsets {VALUE_DTYPE}", f"weights {VALUE_DTYPE}"):
        message = message.replace("float64;", "float64, or numbers in sequences;")
    assert str(caught.value) == message


def test_memory_beside_the_output_is_allowed() -> None:
    """The neighbours of the two cases of shared memory that are refused."""
    for part, rest in ((memory[:36], memory[36:396]), (memory[-36:], memory[-396:-36])):
        out = rest.view(OUT)
        srt_ext.ensemble(**ensemble_call(tokens=part.view(2, 1, 6, 3), out=out))
        assert (out == 1).all()


NOT_A_TENSOR, NOT_A_STRING = "must be a torch.Tensor", "must be a string"
WRONG_TYPES = [
    wrong_type(f"tokens {NOT_A_TENSOR}", "list", tokens=[[1.0]]),
    wrong_type(f"tokens {NOT_A_TENSOR}", "NoneType", tokens=None),
    wrong_type(f"offsets {NOT_A_TENSOR}", "list", offsets=[(0, 0), (0, 0)]),
    wrong_type(f"offsets {NOT_A_TENSOR}", "NoneType", offsets=None),
    wrong_type(f"weights {NOT_A_TENSOR}", "list", weights=[1.0, 1.0]),
    wrong_type(f"weights {NOT_A_TENSOR}", "float", weights=1.0),
    wrong_type(f"out {NOT_A_TENSOR}", "list", out=[]),
    wrong_type(f"grid {PAIR}", "None", grid=None),
    wrong_type(f"grid {PAIR}", "(2.0, 3.0)", grid=(2.0, 3.0)),
    wrong_type(f"patch {PAIR}", "'16'", patch="16"),
    wrong_type(f"stride {PAIR}", "[1, None]", stride=[1, None]),
    wrong_type(f"stride {PAIR}", "1.5", stride=1.5),
    wrong("patch must be below 2^63", f"[4, {2**63}]", patch=[4, 2**63]),
    wrong_type(f"reduce {NOT_A_STRING}", "NoneType", reduce=None),
    wrong_type(f"upsample {NOT_A_STRING}", "int", upsample=1),
    wrong_type(f"border {NOT_A_STRING}", "int", border=0),
    wrong_shift(f"image {NOT_A_TENSOR}", "str", TypeError, image="photo.jpg"),
    wrong_shift(f"offsets {NOT_A_TENSOR}", "tuple", TypeError, offsets=((0, 0),)),
    wrong_shift(f"padding {NOT_A_STRING}", "NoneType", TypeError, padding=None),
    wrong_shift(f"interpolation {NOT_A_STRING}", "int", TypeError, interpolation=1),
    wrong_mean(f"offsets {NOT_A_TENSOR}", "list", TypeError, offsets=[(0, 0)] * 2),
    wrong_median(f"count {NOT_A_TENSOR}", "int", TypeError, count=0),
]


@pytest.mark.parametrize("case", WRONG_TYPES, ids=str)
def test_wrong_python_types(case: Wrong) -> None:
    """torch's dispatcher refuses the call of the op, in its words. NumPy's arrays: test_numpy."""
    with pytest.raises(case.error) as caught:
        through_python(case)
    assert str(caught.value) == case.message
    with pytest.raises((RuntimeError, TypeError)):
        through_op(case)
    if numpy_binding is not None and NOT_A_TENSOR not in case.rule:
        with pytest.raises(case.error) as caught:
            through_numpy(case)
        assert str(caught.value) == case.message


@pytest.mark.parametrize("name", ["offsets", "weights"])
@pytest.mark.parametrize("op", ["ensemble", "shift"])
def test_numbers_without_memory_are_refused(op: str, name: str) -> None:
    """torch calls the fake kernel, of which the result would be memory that nobody wrote."""
    if (op, name) == ("shift", "weights"):
        pytest.skip("shift has none")
    case = wrong(
        "", "", op=op, **{name: torch.ones(2, 2)[0 if name == "weights" else ...].to("meta")}
    )
    rule = f"srt::{op}: {name} must be on the CPU or on the device of the input; got meta"
    for through in (through_python, through_op):
        with pytest.raises(ValueError, match=rule):
            through(case)


def test_nothing_is_written_on_error() -> None:
    out = torch.full(OUT, 7.0)
    for changes in ({"border": "no"}, {"offsets": pairs((NAN, 0), (0, 0))}, {"stride": [3, 1]}):
        with pytest.raises(ValueError, match="got"):
            srt_ext.ensemble(**ensemble_call(out=out, **changes))
    assert (out == 7).all()


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "median", "moments"])
def test_offsets_of_tokens_have_no_derivative(reduce: str) -> None:
    call = ensemble_call(offsets=torch.zeros(2, 2, requires_grad=True))
    name = "ensemble_moments" if reduce == "moments" else "ensemble"
    modes = {} if reduce == "moments" else {"reduce": reduce}
    rule = f"srt::{name} has no derivative with respect to offsets"
    with pytest.raises(RuntimeError, match=rule):
        torch.cat(tuple(getattr(srt_ext, name)(**call, **modes))).sum().backward()

    def function(offsets: torch.Tensor) -> Any:
        return getattr(srt_ext, name)(**{**call, **modes, "offsets": offsets})

    offsets = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=rule):
        torch.func.jvp(function, (offsets,), (offsets,))


@pytest.mark.parametrize("op", STATES)
def test_a_stream_is_not_differentiable(op: str) -> None:
    case = Wrong("", "", {"tokens": tokens().requires_grad_()}, op=op)
    rule = f"srt::{op}: the state of a stream is not differentiable; got an argument that requires"
    with pytest.raises(RuntimeError, match=rule):
        getattr(torch.ops.srt, op)(**case.arguments())
    with torch.no_grad():
        getattr(torch.ops.srt, op)(**case.arguments())


@pytest.mark.parametrize("op", STATES)
def test_a_state_gets_a_new_version(op: str) -> None:
    call = Wrong("", "", {}, op=op).arguments()
    state = [call[name] for name in STATES[op]()]
    versions = [tensor._version for tensor in state]
    getattr(torch.ops.srt, op)(**call)
    assert all(t._version > v for t, v in zip(state, versions, strict=True))


def test_offsets_of_an_image_have_no_derivative() -> None:
    call = shift_call()
    call["offsets"] = call["offsets"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="srt::shift has no derivative with respect to offsets"):
        srt_ext.shift(**call).sum().backward()


@pytest.mark.parametrize("name", ["tokens", "weights", "offsets", "out"])
def test_out_is_not_differentiable(name: str) -> None:
    call = ensemble_call(weights=torch.ones(2), out=torch.zeros(OUT))
    call[name] = call[name].clone().requires_grad_()
    rule = r"srt::ensemble: out= is not differentiable; got an argument that requires grad"
    with pytest.raises(RuntimeError, match=rule):
        torch.ops.srt.ensemble.out(**call)
    with pytest.raises((RuntimeError, ValueError), match=rule):
        srt_ext.ensemble(**call)
    with torch.no_grad():
        assert (srt_ext.ensemble(**call) == 1).all()


# ---- calls that could crash a process -----------------------------------------------------------

FAR = 2**40
STILL = torch.zeros(1, 2)


# Valid by their shapes and dtypes, but of sizes that no memory holds, or empty with sizes that
# overflow. `srt`: the functions of a library, which take tensors.
EXTREMES: dict[str, Callable[[Any], Any]] = {
    "views": lambda srt: srt.ensemble(huge(FAR, 1, 1, 1), huge(FAR, 2), [1, 1], [1, 1]),
    "views beyond a vector": lambda srt: srt.ensemble(
        huge(2**61, 1, 1, 1), huge(2**61, 2), [1, 1], [1, 1]
    ),
    "pixels": lambda srt: srt.ensemble(tokens(1, 1, 1, 1), STILL, [1, 1], [2**24, 2**24]),
    "moments": lambda srt: srt.ensemble_moments(tokens(1, 1, 1, 1), STILL, [1, 1], [2**24, 2**24]),
    "no batch": lambda srt: srt.ensemble(dense_huge(1, 0, 1, 2**20), STILL, [1, 1], [2**24, 2**24]),
    "no channels": lambda srt: srt.ensemble(huge(1, FAR, 1, 0), STILL, [1, 1], [2**24, 2**24]),
    "no channels, out": lambda srt: srt.ensemble(
        huge(1, 5, 1, 0), STILL, [1, 1], [2**24, 2**24], out=huge(5, 0, 2**24, 2**24)
    ),
    "stream": lambda srt: srt.RunningMedian((1, 1), (2**24, 2**24)).update(
        *srt.given(tokens(1, 1, 1, 1), STILL)
    ),
    "shift, pixels": lambda srt: srt.shift(huge(1, 1, 2**24, 2**24), STILL),
    "shift, transposed": lambda srt: srt.shift(huge(2**24, 2**24, 1, 1).permute(2, 3, 1, 0), STILL),
    "shift, views": lambda srt: srt.shift(tokens(1, 1, 1, 1), huge(FAR, 2)),
    "shift, views beyond a vector": lambda srt: srt.shift(tokens(0, 1, 1, 1), huge(2**61, 2)),
    "shift, no batch": lambda srt: srt.shift(huge(0, FAR, 2**24, 2**24), STILL),
    "shift, no pixels": lambda srt: srt.shift(tokens(1, 1, 0, 0), STILL),
}

CHILD = """
import resource, sys
sys.path.insert(0, {folder!r})
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))  # allocations of terabytes fail at once
import test_errors
test_errors.survive()
"""


def libraries() -> list[Any]:
    def converted(name: str) -> Callable[..., Any]:
        function = getattr(numpy_binding, name)
        return lambda *args, **modes: function(*arrays(args), **arrays(modes))

    functions = ("shift", "ensemble", "ensemble_moments")
    found = [SimpleNamespace(**vars(srt_ext), given=lambda *args: args)]
    if numpy_binding is not None:
        own = {name: converted(name) for name in functions}
        streams = {"RunningMedian": numpy_binding.RunningMedian}
        found.append(SimpleNamespace(**own, **streams, given=lambda *args: arrays(args)))
    return found


def survive() -> None:
    """Runs in a process of its own; the last line it prints names the call that ended it."""
    ways = [through_op, through_python, *([through_numpy] if numpy_binding else [])]
    for case in [*TABLE, *WRONG_TYPES]:
        for through in ways:
            print(through.__name__, case, flush=True)
            try:
                through(case)
            except (RuntimeError, TypeError, ValueError):
                continue
            assert through is through_numpy  # takes sequences of numbers
    for srt in libraries():
        for name, call in EXTREMES.items():
            print(name, flush=True)
            try:
                result = call(srt)
            except (MemoryError, RuntimeError, ValueError):
                continue
            assert 0 in result.shape
    print("survived", flush=True)


def test_no_call_ends_the_process() -> None:
    script = CHILD.format(folder=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "survived"


# ---- out= behaves as torch's own out= functions -------------------------------------------------


def out_call(out: torch.Tensor, tokens: torch.Tensor | None = None) -> None:
    tokens = torch.ones(1, 1, 6, 3) if tokens is None else tokens
    torch.ops.srt.ensemble.out(tokens, torch.zeros(1, 2), [2, 3], [2, 2], out=out)


def test_out_gets_a_new_version() -> None:
    out = torch.empty(1, 3, 4, 6)
    weight = torch.ones(1, 3, 4, 6, requires_grad=True)
    out_call(out)
    loss = (out * weight).sum()
    out_call(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = out._version
    with torch.no_grad():
        out_call(out)
    assert out._version > version


def test_no_forward_derivative_through_out() -> None:
    tokens, out = torch.ones(1, 1, 6, 3), torch.empty(1, 3, 4, 6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens, tokens)
        with pytest.raises(RuntimeError, match="out= is not differentiable"):
            out_call(out, dual)

    def field(tokens: torch.Tensor) -> torch.Tensor:
        out = torch.empty(1, 3, 4, 6)
        out_call(out, tokens)
        return out

    with pytest.raises(RuntimeError):
        torch.func.jvp(field, (tokens,), (tokens,))


NEGATED = """
import torch, srt_ext
out = torch.zeros(1, 3, 4, 6, dtype=torch.complex64).conj().imag
assert out.is_neg()
for mode in (torch.no_grad, torch.inference_mode):
    with mode():
        try:
            srt_ext.ensemble(torch.ones(1, 1, 6, 3), torch.zeros(1, 2), (2, 3), (2, 2), out=out)
        except ValueError as error:
            print(error)
"""


def test_a_negated_out_is_refused() -> None:
    result = subprocess.run([sys.executable, "-c", NEGATED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("out must be no lazily negated or conjugated view") == 2


def test_negated_tokens_are_read_as_what_they_mean() -> None:
    tokens = torch.full((1, 1, 6, 3), 1 + 2j).conj().imag
    assert tokens.is_neg()
    out = torch.empty(1, 3, 4, 6)
    out_call(out, tokens)
    assert (out == -2).all()
    assert (srt_ext.ensemble(tokens, torch.zeros(1, 2), (2, 3), (2, 2)) == -2).all()
