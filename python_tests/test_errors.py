"""Errors of wrong arguments state the rule and the value, in Python, ops and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from arrays import arrays, bfloat16
from process import run_python
from torch.autograd import forward_ad

import srt_ext
from srt_ext import ops

try:
    import srt_ext.numpy as numpy_binding
except ImportError:
    numpy_binding = None

NAN, INF = float("nan"), float("inf")
BIG = 2**62


def tokens(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (2, 1, 6, 3))


def huge(*shape: int) -> torch.Tensor:
    """A tensor of any size on one element of memory."""
    return torch.ones(()).expand(shape)


def dense_huge(*shape: int) -> torch.Tensor:
    """As ``huge``, dense in the last dimension."""
    return torch.ones(shape[-1]).expand(shape)


def ensemble_call(**changes: Any) -> dict[str, Any]:
    place = {"offsets": torch.zeros(2, 2), "grid": [2, 3], "patch": [4, 5], "weights": None}
    return {"tokens": tokens(), **place, **changes}


def per_cell() -> torch.Tensor:
    return torch.zeros(8, 15, dtype=torch.float64)


OUT = (1, 3, 8, 15)  # of ensemble_call()
# The shapes of the state of each stream for it, in the order of the arguments of the op.
STATES = {
    "accumulate_mean_": {"mean": OUT, "weight": (8, 15)},
    "accumulate_moments_": {"mean": OUT, "var": OUT, "weight": (8, 15)},
    "accumulate_median_": {"window": (8, *OUT), "count": (8, 15)},
}


class Wrong:
    """A call that is valid except for ``changes``, and its error."""

    def __init__(
        self,
        rule: str,
        got: str,
        error: type[Exception] = ValueError,
        op: str = "ensemble",
        **changes: Any,
    ) -> None:
        self.rule, self.got, self.error, self.op, self.changes = rule, got, error, op, changes

    @property
    def message(self) -> str:
        return f"srt::{self.op}: {self.rule}; got {self.got}"

    def arguments(self) -> dict[str, Any]:
        if self.op == "shift":
            return {"image": torch.ones(1, 2, 5, 6), "offsets": torch.zeros(2, 2), **self.changes}
        if self.op == "windows":
            place = {"centers": torch.ones(1, 3, 2), "size": [2, 3], "scale": None}
            return {"image": torch.ones(1, 2, 5, 6), **place, **self.changes}
        state = {
            name: torch.zeros(shape, dtype=torch.float64 if len(shape) == 2 else torch.float32)
            for name, shape in STATES.get(self.op, {}).items()
        }
        call = {**state, **ensemble_call(), **self.changes}
        if self.op == "accumulate_median_":
            del call["weights"]
        return call

    def __str__(self) -> str:
        return f"{self.op}-{self.rule[:40]}-{self.got}"


def shown(word: str) -> str:
    """The string as a message quotes it."""
    return "'{}'".format(word.replace("\0", "\\x00").replace("\n", "\\x0a"))


wrong_type = partial(Wrong, error=TypeError)
wrong_shift = partial(Wrong, op="shift")
wrong_windows = partial(Wrong, op="windows")
wrong_mean = partial(Wrong, op="accumulate_mean_")
wrong_moments = partial(Wrong, op="accumulate_moments_")


def shapes(rule: str, name: str, *sizes: tuple[int, ...], op: str = "ensemble") -> list[Wrong]:
    """Cases in which ``name`` has each of these shapes."""
    return [Wrong(rule, str(list(size)), op=op, **{name: torch.ones(size)}) for size in sizes]


def dtypes(rule: str, name: str, right: torch.Tensor, *names: str, op: str) -> list[Wrong]:
    """Cases in which ``right`` has each of these dtypes."""
    each = [(dtype, right.to(getattr(torch, dtype))) for dtype in names]
    return [Wrong(f"{name} {rule}", dtype, TypeError, op, **{name: t}) for dtype, t in each]


PAIR = "must be an integer or a pair of integers (y, x), each >= 1"
FLOATING = "must be float32, float16, bfloat16 or float64"
PIXELS = "must be float32, float16, bfloat16, float64 or uint8"
VALUES = "must be float32 or float64"
TOKENS = "tokens must have 4 dimensions, [V, B, N, C]"
DENSE = "tokens must be contiguous in the last dimension"
DIVIDES = "stride must divide grid * patch = [8, 15]"
COUNT = "tokens must have N = h * w = {} for grid {}, without class or register tokens"
OFFSETS = "offsets must be finite and at most 2^20 pixels in magnitude"
CENTERS = "centers must be finite and at most 2^25 pixels in magnitude"
SCALE = "scale must be finite and at most 2^20 pixels in magnitude"
WINDOWS_AXIS = "image must have 1 to 2^24 pixels on each axis"
WINDOWS_SCALE = "scale must be [2] or have the shape of centers, [1, 3, 2]"
WEIGHTS = "weights must be finite and >= 0"
TINY = "weights must be 0 or at least 2^-80 times the largest"
BYTES = "the output must have fewer than 2^63 bytes"
AXIS = "grid * patch must be at most 2^24 pixels on each axis"
IMAGE_AXIS = "image must have at most 2^24 pixels on each axis"
OVERLAP = (
    "must not overlap itself: each stride must be at least the extent of the dimensions with "
    "smaller strides"
)
SHARED_MEMORY = ("out must not share memory with tokens", "overlapping memory")
STREAM_WEIGHTS = "weights must be 0 or between 2^-500 and 2^500"
UPSAMPLES = "upsample must be one of 'nearest', 'bilinear'"
BORDER_WORDS = "'coverage', 'zeros', 'clamp', 'circular'"
BORDERS = f"border must be one of {BORDER_WORDS}"

memory = torch.ones(2 * 6 * 3 + 8 * 15 * 3)
out, double = torch.ones(OUT), torch.float64
INTEGERS = ("int8", "int64", "uint16", "bool", "complex64")
part = torch.zeros(1000)

TABLE = [
    # Ranks and shapes.
    *shapes(TOKENS, "tokens", (), (6, 3), (1, 2, 1, 6, 3)),
    *shapes("tokens must hold at least one view", "tokens", (0, 1, 6, 3)),
    *shapes("offsets must be [V, 2] with V = 2", "offsets", (3, 2), (2, 3), (4,)),
    *shapes("weights must be [V] with V = 2", "weights", (3,), (2, 1)),
    *shapes("image must have 4 dimensions, [B, C, H, W]", "image", (5, 6), op="shift"),
    *shapes("offsets must be [V, 2] with V >= 1", "offsets", (0, 2), (2, 3), (2,), op="shift"),
    *shapes("image must have 4 dimensions, [B, C, H, W]", "image", (5, 6), op="windows"),
    *shapes(WINDOWS_AXIS, "image", (1, 2, 0, 6), (1, 2, 5, 0), op="windows"),
    *shapes("centers must be [B, N, 2] with B = 1", "centers", (3, 2), (2, 3, 2), op="windows"),
    *shapes("centers must be [B, N, 2] with B = 1", "centers", (1, 3, 3), op="windows"),
    *shapes(WINDOWS_SCALE, "scale", (), (1,), (3, 2), (1, 1, 2), op="windows"),
    # Types of elements.
    *dtypes(FLOATING, "tokens", tokens(), *INTEGERS, "uint8", op="ensemble"),
    *dtypes(PIXELS, "image", torch.ones(1, 2, 5, 6), *INTEGERS, op="shift"),
    *dtypes(VALUES, "offsets", torch.zeros(2, 2), *INTEGERS, "bfloat16", op="ensemble"),
    *dtypes(VALUES, "offsets", torch.zeros(2, 2), "int64", op="shift"),
    *dtypes(PIXELS, "image", torch.ones(1, 2, 5, 6), "int64", op="windows"),
    *dtypes(VALUES, "centers", torch.ones(1, 3, 2), "int64", "float16", op="windows"),
    *dtypes(VALUES, "scale", torch.ones(2), "int64", op="windows"),
    *dtypes(VALUES, "weights", torch.ones(2), "float16", "int64", op="ensemble"),
    *dtypes("must have the dtype of tokens, float32", "out", out, "float64", op="ensemble"),
    # Pairs of integers.
    *(
        Wrong(f"{name} {PAIR}", str(value), **{name: value})
        for name in ("grid", "patch", "stride")
        for value in ([], [2, 3, 1], [0, 3], [2, -BIG])
    ),
    *(wrong_windows(f"size {PAIR}", str(s), size=s) for s in ([], [2, 3, 1], [0, 3], [2, -BIG])),
    *(Wrong(DIVIDES, str(s), stride=s) for s in ([3, 1], [1, 30], [BIG, BIG])),
    *(Wrong(COUNT.format(n, g), "[2, 1, 6, 3]", grid=g) for n, g in ((9, [3, 3]), (5, [1, 5]))),
    # Sizes beyond the limits.
    Wrong(AXIS, f"[2, 3] * [{2**23 + 1}, 1]", patch=[2**23 + 1, 1]),
    Wrong(AXIS, f"[{BIG}, 3] * [4, {BIG}]", grid=[BIG, 3], patch=[4, BIG]),
    *(
        Wrong(BYTES, str(field), tokens=dense_huge(2, batch, 1, 2**20), grid=[1, 1], patch=patch)
        for batch, patch in ((1, [2**24, 2**24]), (2**31, [2**12, 1]))
        for field in ([batch, 2**20, *patch],)
    ),
    wrong_shift(IMAGE_AXIS, f"[1, 1, 1, {2**40}]", image=huge(1, 1, 1, 2**40)),
    wrong_shift(
        BYTES,
        f"[{2**20}, 1, 1, {2**24}, {2**24}]",
        image=huge(1, 1, 2**24, 2**24),
        offsets=huge(2**20, 2),
    ),
    Wrong(
        "tokens must hold at most 2^20 views",
        str([2**20 + 1, 1, 6, 3]),
        tokens=dense_huge(2**20 + 1, 1, 6, 3),
        offsets=huge(2**20 + 1, 2),
    ),
    wrong_shift(
        "offsets must hold at most 2^20 views", str([2**20 + 1, 2]), offsets=huge(2**20 + 1, 2)
    ),
    wrong_windows(WINDOWS_AXIS, f"[1, 1, 1, {2**40}]", image=huge(1, 1, 1, 2**40)),
    wrong_windows("size must be at most 2^24 samples on each axis", f"[1, {BIG}]", size=[1, BIG]),
    wrong_windows(
        "centers must hold at most 2^26 windows",
        str([1, 2**26 + 1, 2]),
        centers=huge(1, 2**26 + 1, 2),
    ),
    wrong_windows(
        BYTES,
        f"[1, 3, {2**14}, {2**24}, {2**24}]",
        image=huge(1, 2**14, 5, 6),
        size=[2**24, 2**24],
    ),
    # Values of offsets and weights.
    *(
        Wrong(OFFSETS, got, op=op, offsets=torch.tensor(values, dtype=double))
        for op in ("ensemble", "shift")
        for got, values in (
            ("nan at [1, 0]", [(0, 0), (NAN, 0)]),
            ("-inf at [0, 1]", [(0, -INF), (0, 0)]),
            ("1.04858e+06 at [0, 0]", [(2**20 + 0.25, 0), (0, 0)]),
            ("-1e+300 at [1, 1]", [(0, 0), (0, -1e300)]),
        )
    ),
    *(
        wrong_windows(rule, got, **{name: torch.tensor(values, dtype=double)})
        for rule, got, name, values in (
            (CENTERS, "nan at [0, 1, 0]", "centers", [[(0, 0), (NAN, 0), (0, 0)]]),
            (CENTERS, "-3.35544e+07 at [0, 0, 1]", "centers", [[(0, -(2**25) - 1)] * 3]),
            (SCALE, "inf at [1]", "scale", [1, INF]),
            (SCALE, "1.04858e+06 at [0, 2, 0]", "scale", [[(0, 0), (1, 1), (2**20 + 0.5, 0)]]),
        )
    ),
    *(
        Wrong(rule, got, op=op, weights=torch.tensor(values, dtype=double))
        for op, rule, got, values in (
            ("ensemble", WEIGHTS, "-1e-40 at [0]", [-1e-40, 1]),
            ("ensemble", WEIGHTS, "nan at [1]", [1, NAN]),
            ("ensemble", WEIGHTS, "inf at [1]", [0, INF]),
            ("ensemble", TINY, "1e-30 at [1]", [1, 1e-30]),
            ("accumulate_mean_", STREAM_WEIGHTS, "1e+160 at [1]", [0, 1e160]),
            ("accumulate_moments_", STREAM_WEIGHTS, "1e-160 at [0]", [1e-160, 0]),
        )
    ),
    Wrong(
        "weights must be None if reduce is 'median'",
        "weights of shape [2]",
        reduce="median",
        weights=torch.ones(2),
    ),
    # Option strings.
    *(
        Wrong(f"{name} must be one of {options}", shown(word), op=op, **{name: word})
        for op, name, options, words in (
            ("ensemble", "reduce", "'mean', 'median'", ("", "sum", "Mean", "mean ")),
            ("ensemble", "upsample", "'nearest', 'bilinear'", ("bicubic",)),
            ("ensemble", "border", BORDER_WORDS, ("covéragé",)),
            # Escaped in the message: a NUL would end it, a line break its first line.
            ("ensemble", "border", BORDER_WORDS, ("a\0b", "a\nb")),
            ("shift", "padding", "'zeros', 'border', 'reflect', 'circular'", ("clamp",)),
            ("windows", "padding", "'zeros', 'border', 'reflect', 'circular'", ("edge",)),
            ("shift", "interpolation", "'nearest', 'bilinear', 'bicubic'", ("area",)),
        )
        for word in words
    ),
    # Memory of tokens and out.
    Wrong(DENSE, "stride 2", tokens=tokens(2, 1, 6, 6)[..., ::2]),
    Wrong(DENSE, "stride 0", tokens=tokens(2, 1, 6, 1).expand(2, 1, 6, 3)),
    *shapes("out must be [1, 3, 8, 15]", "out", (1, 8, 15, 3), (3, 8, 15)),
    Wrong("out must be [1, 3, 4, 3]", "[1, 3, 8, 15]", stride=[2, 5], out=out),
    *(
        Wrong(f"out {OVERLAP}", f"strides {list(s)}", out=torch.ones(400).as_strided(OUT, s))
        for s in ((0, 0, 0, 0), (120, 0, 15, 1), (1, 119, 15, 1))
    ),
    Wrong(*SHARED_MEMORY, tokens=memory[:36].view(2, 1, 6, 3), out=memory[35:395].view(OUT)),
    Wrong(*SHARED_MEMORY, tokens=memory[-36:].view(2, 1, 6, 3), out=memory[1:361].view(OUT)),
    # The other ops have the same rules.
    *(
        Wrong(rule, got, TypeError if "float" in rule else ValueError, op, **{name: value})
        for op in ("ensemble_moments", *STATES)
        for rule, got, name, value in (
            (TOKENS, "[6, 3]", "tokens", tokens(6, 3)),
            (f"tokens {FLOATING}", "int32", "tokens", tokens().int()),
            (f"patch {PAIR}", "[]", "patch", []),
            (DIVIDES, "[3, 1]", "stride", [3, 1]),
            (UPSAMPLES, "'cubic'", "upsample", "cubic"),
            (BORDERS, "'wrap'", "border", "wrap"),
            (OFFSETS, "nan at [1, 0]", "offsets", torch.tensor([(0, 0), (NAN, 0)])),
        )
    ),
    # States of streams.
    *shapes("mean must be [1, 3, 8, 15]", "mean", (1, 3, 8, 5), op="accumulate_mean_"),
    *dtypes("must be float32", "mean", out, "float64", "float16", op="accumulate_mean_"),
    *dtypes("must be float64", "weight", per_cell(), "float32", op="accumulate_mean_"),
    wrong_mean(
        "mean must be float64, the dtype of tokens", "float32", TypeError, tokens=tokens().double()
    ),
    wrong_mean("weight must be [8, 15]", "[15, 8]", weight=per_cell().t()),
    wrong_mean(
        "weight must be contiguous",
        "strides [1, 8]",
        weight=torch.zeros(15, 8, dtype=double).t(),
    ),
    wrong_mean(f"mean {OVERLAP}", "strides [0, 0, 0, 0]", mean=torch.zeros(()).expand(OUT)),
    wrong_moments(
        "var must have the strides of mean",
        "strides [360, 1, 45, 3]",
        var=out.to(memory_format=torch.channels_last),
    ),
    wrong_moments(
        "mean and var must not share memory",
        "overlapping memory",
        mean=part[:360].view(OUT),
        var=part[359:719].view(OUT),
    ),
    *shapes("window must be [8, 1, 3, 8, 15]", "window", (7, *OUT), op="accumulate_median_"),
    Wrong("count must be [8, 15]", "[8]", op="accumulate_median_", count=torch.zeros(8).double()),
]


def split(case: Wrong) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """The state, the views and the modes of a call of accumulate_*."""
    call = case.arguments()
    state = [call.pop(name) for name in STATES[case.op]]
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
        numpy_binding._numpy.accumulate(case.op, arrays(tuple(state)), views)
    else:
        getattr(numpy_binding, case.op)(**arrays(case.arguments()))


def through_cuda(case: Wrong) -> None:
    """Data, out= and state are on the device; offsets and weights are validated on the CPU."""
    call, storages = case.arguments(), {}
    for name, tensor in call.items():
        if isinstance(tensor, torch.Tensor) and name not in ("offsets", "weights"):
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            whole = storages.setdefault((storage.data_ptr(), tensor.dtype), whole.to("cuda"))
            call[name] = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    through_python(Wrong(case.rule, case.got, case.error, case.op, **call))


WAYS = [through_python, through_op, *([through_numpy] if numpy_binding else [])]


def is_possible(through: Callable[[Wrong], None], case: Wrong) -> bool:
    """NumPy has no bfloat16 without ml_dtypes, and other rules for some types."""
    if through is not through_numpy:
        return True
    return "Tensor" not in case.rule and (bfloat16 is not None or case.got != "bfloat16")


@pytest.mark.parametrize("case", TABLE, ids=str)
@pytest.mark.parametrize("through", [*WAYS, pytest.param(through_cuda, marks=pytest.mark.cuda)])
def test_the_error_states_the_rule_and_the_value(
    through: Callable[[Wrong], None], case: Wrong
) -> None:
    if not is_possible(through, case):
        pytest.skip("needs ml_dtypes")
    error = RuntimeError if through is through_op else case.error
    with pytest.raises(error) as caught:
        through(case)
    assert type(caught.value) is error
    message = case.message
    if through is through_numpy:  # which accepts any dtype in sequences
        message = message.replace(f"{VALUES};", f"{VALUES}, or sequences of numbers;")
    if through is through_op:
        kind = "TypeError: " if case.error is TypeError else ""
        assert kind + message in str(caught.value)
    else:
        assert str(caught.value) == message


@pytest.mark.parametrize("word", ["x" * 10**5, "xx" + "é" * 99])
def test_long_strings_are_shortened(word: str) -> None:
    """Not within a character: a part of one is not valid UTF-8."""
    for through in WAYS:
        with pytest.raises((ValueError, RuntimeError), match=r"got 'xx[xé]+\.\.\.'") as caught:
            through(Wrong("", "", border=word))
        assert len(str(caught.value)) < 2000  # torch.ops adds the position in the source


def test_memory_next_to_the_output_is_allowed() -> None:
    """Tokens and out are adjacent; the invalid cases overlap."""
    for part, rest in ((memory[:36], memory[36:396]), (memory[-36:], memory[-396:-36])):
        out = rest.view(OUT)
        srt_ext.ensemble(**ensemble_call(tokens=part.view(2, 1, 6, 3), out=out))
        assert (out == 1).all()


NOT_A_TENSOR, NOT_A_STRING = "must be a torch.Tensor", "must be a string"
WRONG_TYPES = [
    *(
        wrong_type(f"{name} {rule}", type(value).__name__, op=op, **{name: value})
        for op, rule, name, value in (
            ("ensemble", NOT_A_TENSOR, "tokens", [[1.0]]),
            ("ensemble", NOT_A_TENSOR, "offsets", None),
            ("ensemble", NOT_A_TENSOR, "weights", 1.0),
            ("ensemble", NOT_A_TENSOR, "out", []),
            ("shift", NOT_A_TENSOR, "image", "photo.jpg"),
            ("shift", NOT_A_TENSOR, "offsets", ((0, 0),)),
            ("windows", NOT_A_TENSOR, "image", None),
            ("windows", NOT_A_TENSOR, "centers", [[(0, 0)]]),
            ("windows", NOT_A_TENSOR, "scale", 2.0),
            ("accumulate_mean_", NOT_A_TENSOR, "offsets", [(0, 0), (0, 0)]),
            ("accumulate_median_", NOT_A_TENSOR, "count", 0),
            ("ensemble", NOT_A_STRING, "reduce", None),
            ("ensemble", NOT_A_STRING, "border", 0),
            ("shift", NOT_A_STRING, "padding", None),
        )
    ),
    *(
        wrong_type(f"{name} {PAIR}", repr(value), **{name: value})
        for name, value in (("grid", (2.0, 3.0)), ("patch", "16"), ("stride", [1, None]))
    ),
    Wrong("patch must be below 2^63", f"[4, {2**63}]", patch=[4, 2**63]),
    Wrong(BORDERS, r"'\ud800'", border="\ud800"),
]


@pytest.mark.parametrize("case", WRONG_TYPES, ids=str)
def test_wrong_python_types_raise(case: Wrong) -> None:
    """torch's dispatcher rejects the call of the op with its own message. NumPy: test_numpy."""
    with pytest.raises((RuntimeError, TypeError)):
        through_op(case)
    for through in filter(lambda way: way is not through_op and is_possible(way, case), WAYS):
        with pytest.raises(case.error) as caught:
            through(case)
        assert str(caught.value) == case.message


def nested(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(values))


def quantized(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(values, 0.1, 0, torch.quint8)


DENSE_TENSOR = "must be a dense tensor, not sparse, nested or quantized"


NEW_KINDS = pytest.mark.filterwarnings(
    "ignore"
)  # warnings of torch about prototype and deprecated tensors


@NEW_KINDS
@pytest.mark.parametrize("name", ["tokens", "offsets"])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        pytest.param(torch.Tensor.to_sparse, "a torch.sparse_coo tensor", id="sparse"),
        pytest.param(nested, "a nested tensor", id="nested"),
        pytest.param(quantized, "a quantized tensor", id="quantized"),
    ],
)
def test_tensors_that_are_not_dense_raise(name: str, make: Any, got: str) -> None:
    call = ensemble_call()
    case = wrong_type(f"{name} {DENSE_TENSOR}", got, **{name: make(call[name])})
    with pytest.raises(TypeError) as caught:
        through_python(case)
    assert str(caught.value) == case.message
    with pytest.raises(NotImplementedError):  # the error of torch
        through_op(case)


@NEW_KINDS
def test_a_state_that_is_not_dense_raises() -> None:
    running = srt_ext.RunningMean(grid=(2, 3), patch=(4, 5))
    running.update(tokens(), torch.zeros(2, 2))
    for make in (torch.Tensor.to_sparse, nested, quantized):
        saved = running.state_dict()
        saved["state"]["mean"] = make(saved["state"]["mean"])
        with pytest.raises(ValueError, match=r"RunningMean: .*(must have the arrays|must be)"):
            running.load_state_dict(saved)
    assert (running.result() == 1).all()


def misaligned(values: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is off by one byte."""
    memory = bytearray(values.numel() * values.element_size() + 8)
    flat = torch.frombuffer(memory, dtype=values.dtype, offset=1, count=values.numel())
    return flat.copy_(values.flatten()).view(values.shape)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("ensemble", "tokens"),
        ("ensemble", "out"),
        ("accumulate_mean_", "mean"),
        ("accumulate_mean_", "weight"),
        ("accumulate_median_", "window"),
        ("shift", "image"),
        ("windows", "image"),
    ],
)
def test_misaligned_tensors_raise(op: str, name: str) -> None:
    call = {**({"out": out} if name == "out" else {}), **Wrong("", "", op=op).arguments()}
    case = Wrong("", "", op=op, **{name: misaligned(call[name])})
    size = call[name].element_size()
    rule = f"srt::{op}: {name} must be aligned to its element size, {size} bytes; got address"
    for through in (through_python, through_op):
        with pytest.raises((ValueError, RuntimeError), match=rule):
            through(case)


def test_misaligned_gradients_raise() -> None:
    call = ensemble_call()
    modes = {"upsample": "bilinear", "border": "coverage", "stride": [1, 1]}
    place = (call["offsets"], call["grid"], call["patch"], None)
    grad = misaligned(torch.ones(1, 8, 15, 3)).permute(0, 3, 1, 2)  # other layouts are copied
    with pytest.raises(RuntimeError, match="srt::_mean_backward: grad must be aligned"):
        torch.ops.srt._mean_backward(grad, *place, **modes)
    grad, centers = misaligned(torch.ones(1, 3, 2, 2, 3)), torch.ones(1, 3, 2)
    with pytest.raises(RuntimeError, match="srt::_windows_backward_image: grad must be aligned"):
        torch.ops.srt._windows_backward_image(grad, centers, [5, 6], None, padding="zeros")
    with pytest.raises(RuntimeError, match="srt::_windows_backward_points: grad must be aligned"):
        torch.ops.srt._windows_backward_points(
            grad, torch.ones(1, 2, 5, 6), centers, None, padding="zeros"
        )
    grad, words = misaligned(torch.ones(2, 1, 2, 5, 6)), ("zeros", "nearest")
    with pytest.raises(RuntimeError, match="srt::_shift_backward: grad must be aligned"):
        torch.ops.srt._shift_backward(
            grad, call["offsets"], padding=words[0], interpolation=words[1]
        )


def test_misaligned_offsets_and_weights_are_read() -> None:
    offsets, weights = torch.tensor([(0.5, -1), (2, 0.25)]), torch.tensor([1.0, 2.0])
    call = ensemble_call(tokens=torch.randn(2, 1, 6, 3))
    expected = srt_ext.ensemble(**{**call, "offsets": offsets, "weights": weights})
    call |= {"offsets": misaligned(offsets), "weights": misaligned(weights)}
    assert torch.equal(srt_ext.ensemble(**call), expected)


def test_a_gradient_of_too_many_tokens_raises() -> None:
    """Although all arguments are small."""
    modes = {"upsample": "nearest", "border": "coverage", "stride": [2**24, 2**24]}
    place = (huge(2**20, 2), [2**24, 2**24], [1, 1], None)
    with pytest.raises(RuntimeError, match=r"tokens must have fewer than 2\^63 bytes"):
        torch.ops.srt._mean_backward(torch.ones(1, 1, 1, 1), *place, **modes)


@pytest.mark.parametrize("op", ["ensemble", *STATES])
def test_outputs_must_be_on_the_device_of_the_tokens(op: str) -> None:
    """With one of them on the meta device, nothing would be written and no error raised."""
    call = {**({"out": out} if op == "ensemble" else {}), **Wrong("", "", op=op).arguments()}
    written = list(STATES.get(op, ["out"]))
    for name in (*written, "tokens"):
        case = Wrong("", "", op=op, **{**call, name: call[name].to("meta")})
        with pytest.raises(ValueError, match=f"srt::{op}: .* must be on the device of tokens"):
            through_python(case)
    every = {name: call[name].to("meta") for name in (*written, "tokens")}
    through_python(Wrong("", "", op=op, **{**call, **every}))  # checks only shapes


@pytest.mark.parametrize("op", STATES)
def test_a_state_of_none_raises(op: str) -> None:
    """The dispatcher accepts None for a tensor."""
    for name in STATES[op]:
        case = wrong_type(f"{name} {NOT_A_TENSOR}", "NoneType", op=op, **{name: None})
        for through in (through_python, through_op):
            with pytest.raises(TypeError) as caught:
                through(case)
            assert str(caught.value) == case.message


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        ("ensemble", "offsets", (2, 2)),
        ("ensemble", "weights", (2,)),
        ("shift", "offsets", (2, 2)),
        ("windows", "centers", (1, 3, 2)),
        ("windows", "scale", (2,)),
    ],
)
def test_meta_offsets_and_weights_are_errors(op: str, name: str, shape: tuple[int, ...]) -> None:
    """torch would call the fake kernel, whose result is uninitialised memory."""
    rule = f"srt::{op}: {name} must be on the CPU or on the device of the input; got meta"
    for through in (through_python, through_op):
        with pytest.raises(ValueError, match=rule):
            through(Wrong("", "", op=op, **{name: torch.ones(shape, device="meta")}))


def test_nothing_is_written_on_error() -> None:
    out = torch.full(OUT, 7.0)
    for changes in (
        {"border": "no"},
        {"offsets": torch.tensor([(NAN, 0), (0, 0)])},
        {"stride": [3, 1]},
    ):
        with pytest.raises(ValueError, match="got"):
            srt_ext.ensemble(**ensemble_call(out=out, **changes))
    assert (out == 7).all()


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "median", "moments", "shift"])
def test_offsets_have_no_derivative(reduce: str) -> None:
    name = {"moments": "ensemble_moments", "shift": "shift"}.get(reduce, "ensemble")
    call = Wrong("", "", op=name, **({"reduce": reduce} if name == "ensemble" else {})).arguments()

    def function(offsets: torch.Tensor) -> torch.Tensor:
        return torch.cat(tuple(getattr(srt_ext, name)(**{**call, "offsets": offsets})))

    rule, offsets = f"srt::{name} has no derivative with respect to offsets", torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=rule):
        function(offsets.clone().requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match=rule):
        torch.func.jvp(function, (offsets,), (offsets,))


@pytest.mark.parametrize("op", ["ensemble", *STATES])
def test_out_and_state_are_not_differentiable(op: str) -> None:
    stream = op in STATES
    changes = {"weights": torch.ones(2), **({} if stream else {"out": torch.ones(OUT)})}
    call = Wrong("", "", op=op, **changes).arguments()
    function = getattr(torch.ops.srt, op) if stream else torch.ops.srt.ensemble.out
    subject = "the state of a stream" if stream else "out="
    rule = f"srt::{op}: {subject} is not differentiable; got an argument that requires grad"
    written = list(STATES.get(op, ["out"]))
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            given = {**call, name: value.clone().requires_grad_()}
            with pytest.raises(RuntimeError, match=rule):
                function(**given)
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match=rule):
                function(**{**call, name: forward_ad.make_dual(value, value)})
            versions = [given[key]._version for key in written]
            with torch.no_grad():
                function(**given)
            assert all(given[k]._version > v for k, v in zip(written, versions, strict=True))

    def write(tokens: torch.Tensor) -> torch.Tensor:
        function(**{**call, "tokens": tokens})
        return call[written[0]]

    with pytest.raises(RuntimeError):
        torch.func.jvp(write, (tokens(),), (tokens(),))


# ---- calls that could crash a process -----------------------------------------------------------

FAR = 2**40
STILL = torch.zeros(1, 2)
UNIT, LARGE = ([1, 1], [1, 1]), ([1, 1], [2**24, 2**24])


# Valid by their shapes and dtypes, but too large for any memory, or empty with sizes that overflow.
# `srt`: the functions of a library, called with tensors.
EXTREMES: dict[str, Callable[[Any], Any]] = {
    "views": lambda srt: srt.ensemble(huge(FAR, 1, 1, 1), huge(FAR, 2), *UNIT),
    "views beyond a vector": lambda srt: srt.ensemble(huge(2**61, 1, 1, 1), huge(2**61, 2), *UNIT),
    "pixels": lambda srt: srt.ensemble(tokens(1, 1, 1, 1), STILL, *LARGE),
    "moments": lambda srt: srt.ensemble_moments(tokens(1, 1, 1, 1), STILL, *LARGE),
    "tables": lambda srt: srt.ensemble(
        huge(2**18, 1, 2**24, 1), torch.rand(2**18, 2), [2**24, 1], [1, 1]
    ),
    "no batch": lambda srt: srt.ensemble(dense_huge(1, 0, 1, 2**20), STILL, *LARGE),
    "no channels": lambda srt: srt.ensemble(huge(1, FAR, 1, 0), STILL, *LARGE),
    "no channels, out": lambda srt: srt.ensemble(
        huge(1, 5, 1, 0), STILL, *LARGE, out=huge(5, 0, 2**24, 2**24)
    ),
    "stream": lambda srt: srt.stream(tokens(1, 1, 1, 1), STILL, *LARGE),
    "shift, pixels": lambda srt: srt.shift(huge(1, 1, 2**24, 2**24), STILL),
    "shift, transposed": lambda srt: srt.shift(huge(2**24, 2**24, 1, 1).permute(2, 3, 1, 0), STILL),
    "shift, views": lambda srt: srt.shift(tokens(1, 1, 1, 1), huge(FAR, 2)),
    "shift, views beyond a vector": lambda srt: srt.shift(tokens(0, 1, 1, 1), huge(2**61, 2)),
    "shift, no batch": lambda srt: srt.shift(huge(0, FAR, 2**24, 2**24), STILL),
    "windows, samples": lambda srt: srt.windows(
        tokens(1, 1, 4, 4), torch.ones(1, 1, 2), [2**24, 2**24]
    ),
    "windows, no channels": lambda srt: srt.windows(
        tokens(1, 0, 4, 4), torch.ones(1, 1, 2), [2**24, 2**24]
    ),
    "windows, no batch": lambda srt: srt.windows(huge(0, FAR, 4, 4), tokens(0, 1, 2), [1, 1]),
    "windows, centers": lambda srt: srt.windows(tokens(1, 1, 4, 4), huge(1, FAR, 2), [1, 1]),
    "windows beyond a vector": lambda srt: srt.windows(
        tokens(0, 1, 4, 4), huge(0, 2**61, 2), [1, 1]
    ),
    "shift, no pixels": lambda srt: srt.shift(tokens(1, 1, 0, 0), STILL),
}


class Library:
    """The functions of srt_ext or of srt_ext.numpy, on tensors."""

    def __init__(self, module: Any) -> None:
        self.module, self.given = module, arrays if module is numpy_binding else lambda args: args

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        return lambda *args, **modes: function(*self.given(args), **self.given(modes))

    def stream(self, tokens: torch.Tensor, offsets: torch.Tensor, *place: Any) -> None:
        self.module.RunningMedian(*place).update(*self.given((tokens, offsets)))


CHILD = """
import resource, sys
sys.path.insert(0, {folder!r})
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))  # allocations of terabytes fail at once
import test_errors
test_errors.survive()
"""


def survive() -> None:
    """Runs in a subprocess; the last line of its output names the call that crashed it."""
    for module in filter(None, (srt_ext, numpy_binding)):
        for name, call in EXTREMES.items():
            print(name, flush=True)
            if name == "tables":
                with pytest.raises(MemoryError, match="not enough memory for the tables"):
                    call(Library(module))
                continue
            text = ""
            try:
                result = call(Library(module))
            except (MemoryError, RuntimeError, ValueError) as error:
                text = str(error)
            assert "std::" not in text
            if text:
                continue
            assert 0 in result.shape
    print("survived", flush=True)


@pytest.mark.slow
def test_no_call_crashes_the_process() -> None:
    script = CHILD.format(folder=str(Path(__file__).parent))
    assert run_python("-c", script).stdout.splitlines()[-1] == "survived"


# ---- out= behaves as in torch -------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_negated_out_is_an_error(mode: Any) -> None:
    out = torch.zeros(OUT, dtype=torch.complex64).conj().imag
    assert out.is_neg()
    with mode(), pytest.raises(ValueError, match="out must not be a lazily negated or conjugated"):
        srt_ext.ensemble(**ensemble_call(out=out))


def test_lazily_negated_tokens_are_resolved() -> None:
    negated = torch.full((2, 1, 6, 3), 1 + 2j).conj().imag
    assert negated.is_neg()
    for out in (None, torch.empty(OUT)):
        assert (srt_ext.ensemble(**ensemble_call(tokens=negated, out=out)) == -2).all()
