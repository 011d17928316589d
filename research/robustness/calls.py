"""``python -m research.robustness.calls``: hostile calls of every op and binding.

A case is a valid call of an op to which up to three things are done: special values, shapes, strides,
dtypes, kinds of tensors and arrays, integers, words, overlapping outputs. It is made from
``(seed, index)`` alone, so any case is repeated by ``--only INDEX``. What is checked:

- The process lives, and a call ends within ``LIMIT`` seconds.
- An error is a ValueError or TypeError that says which rule was broken (from ``torch.ops`` also the
  dispatcher's RuntimeError), or tells that memory is short where the call is large. Nothing was
  written then.
- A result is within the forward error bound of the float64 oracle (python_tests/bounds.py), NaN and
  infinities where the oracle has them. Inputs, and the memory around an output, are unchanged.
- A call that only has unusual values or strides is not refused.

A parent process starts a worker, which announces each case: one that kills or stops the worker is a
finding, and the next worker begins behind it. ``--state FILE`` keeps the findings and the next index:
the same command goes on there.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import srt_ext
from srt_ext import dlpack, ops
from srt_ext import numpy as numpy_binding

# The oracle's bounds and the samples' descriptions belong to the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "python_tests"))

import oracle
from arrays import arrays, tensor
from bounds import EnsembleBounds
from budget import assert_within_rounding
from samples import BORDERS, DTYPES, INTERPOLATIONS, PADDINGS, UPSAMPLES, Ensemble, Shift

LIMIT = 20  # seconds of one call
MEMORY = 3 << 28  # bytes of address space that a worker may take beyond those after its imports
SAMPLED = 1 << 17  # elements of pixel maps of all views that the oracle may make

STATES = {
    "accumulate_mean_": ("mean", "weight"),
    "accumulate_moments_": ("mean", "var", "weight"),
    "accumulate_median_": ("window", "count"),
}
STREAMS = ("RunningMean", "RunningMoments", "RunningMedian")
TENSORS = ("tokens", "image", "grad", "offsets", "weights", "out", "mean", "var", "weight")
# Ways to call, and the ops that each has.
_FORWARD = ("shift", "ensemble", "median", "ensemble_moments", "out")
WAYS: dict[str, tuple[str, ...]] = {
    "op": (*_FORWARD, *STATES, "_shift_backward", "_mean_backward"),
    "python": (*_FORWARD, *STATES, *STREAMS),
    "gradient": ("shift", "ensemble", "median", "ensemble_moments"),
    "numpy": (*_FORWARD, *STREAMS),
    "dlpack": _FORWARD,
}
TARGETS = {"torch": ("op", "python", "gradient"), "numpy": ("numpy",), "dlpack": ("dlpack",)}

Rng = np.random.Generator


@dataclass
class Case:
    """One call. ``given``: its arguments by name; ``memory``: all bytes that they lie on."""

    op: str
    way: str
    given: dict[str, Any]
    changes: list[str] = field(default_factory=list)
    valid: bool = True  # must not be refused
    large: bool = False  # may be refused for want of memory
    memory: list[torch.Tensor] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)  # of a stream: the views before

    @property
    def written(self) -> list[str]:
        """Arguments that the call writes to."""
        return [n for n in (*STATES.get(self.op, ()), "out") if self.given.get(n) is not None]

    @property
    def values(self) -> str:
        return next(name for name in ("tokens", "image", "grad") if name in self.given)

    @property
    def streams(self) -> bool:
        return self.op in STATES or self.op in STREAMS

    @property
    def reduce(self) -> str:
        for name in ("median", "oments"):
            if name in self.op or name in self.op.lower():
                return "moments" if name == "oments" else name
        return "mean"

    def describe(self) -> str:
        def short(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                kind = "" if value.layout == torch.strided else f" {value.layout}"
                return f"tensor({list(value.shape)} {value.dtype} {value.device}{kind})"
            if isinstance(value, np.ndarray):
                return f"array({value.shape} {value.dtype} strides {value.strides})"
            return repr(value)[:60]

        given = ", ".join(f"{name}={short(value)}" for name, value in self.given.items())
        return f"{self.way} {self.op}: {'; '.join(self.changes)} | {given}"


# ---- a valid call -------------------------------------------------------------------------------


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def random(rng: Rng, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def ensemble_case(rng: Rng, op: str, way: str) -> Case:
    grid, patch = ([int(n) for n in rng.integers(1, 6, 2)] for _ in range(2))
    pixels = [g * p for g, p in zip(grid, patch, strict=True)]
    stride = [pick(rng, [s for s in range(1, n + 1) if n % s == 0]) for n in pixels]
    views, batch = int(rng.integers(1, 9)), int(rng.integers(1, 3))
    channels = pick(rng, (1, 2, 3, 7, 16, 19, 33, 70))
    dtype, numbers = pick(rng, DTYPES), pick(rng, (torch.float32, torch.float64))
    steps = rng.integers(-8 * max(pixels), 8 * max(pixels) + 1, (views, 2)) / pick(rng, (4, 8, 11))
    given: dict[str, Any] = {}
    cells = [n // s for n, s in zip(pixels, stride, strict=True)]
    shape = (batch, channels, *cells)
    if op == "_mean_backward":
        given["grad"] = random(rng, shape, dtype)
    else:
        given["tokens"] = random(rng, (views, batch, grid[0] * grid[1], channels), dtype)
    given |= {"offsets": torch.from_numpy(steps).to(numbers), "grid": grid, "patch": patch}
    if "edian" not in op:
        weights = torch.from_numpy(rng.uniform(0.1, 4, views)).to(numbers)
        given["weights"] = weights if rng.random() < 0.5 else None
    given |= {"upsample": pick(rng, UPSAMPLES), "border": pick(rng, BORDERS), "stride": stride}
    if op in STATES:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        planes = (8, *shape) if op == "accumulate_median_" else shape
        *names, total = STATES[op]
        state = {name: random(rng, planes, sums) for name in names}
        state[total] = torch.zeros(cells, dtype=torch.float64)
        given = {**state, **given}
    if op in ("ensemble", "out") and rng.random() < 0.5:
        given["reduce"] = "mean"
    if op == "median" or (op == "out" and given["weights"] is None and rng.random() < 0.5):
        given["reduce"] = "median"
    if op == "out":
        given["out"] = random(rng, shape, dtype)
    return Case(op, way, given)


def shift_case(rng: Rng, op: str, way: str) -> Case:
    size = [int(rng.integers(1, 10)), int(rng.integers(1, 40))]
    views = int(rng.integers(1, 6))
    shape = (int(rng.integers(1, 3)), int(rng.integers(1, 4)), *size)
    steps = rng.integers(-8 * max(size), 8 * max(size) + 1, (views, 2)) / pick(rng, (4, 8, 11))
    modes = {"padding": pick(rng, PADDINGS), "interpolation": pick(rng, INTERPOLATIONS)}
    offsets = torch.from_numpy(steps).to(pick(rng, (torch.float32, torch.float64)))
    if op == "_shift_backward":
        values = {"grad": random(rng, (views, *shape), pick(rng, DTYPES))}
    else:
        dtypes = DTYPES if way == "gradient" else (*DTYPES, torch.uint8)
        values = {"image": random(rng, shape, pick(rng, dtypes))}
    return Case(op, way, {**values, "offsets": offsets, **modes})


# ---- what is done to it: to tensors -------------------------------------------------------------

SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-40, 5e-324, 2.0**14, -(2.0**14))
Change = Callable[[Rng, Case], str]


def special_values(rng: Rng, case: Case) -> str:
    """NaN, infinities, zeros with a sign, the smallest and large numbers."""
    values = case.given[case.values]
    if not values.is_floating_point() or values.numel() == 0:
        return "none"
    flat = values.clone().flatten()
    for _ in range(int(rng.integers(1, 6))):
        flat[int(rng.integers(len(flat)))] = pick(rng, SPECIAL)
    case.given[case.values] = flat.reshape(values.shape)
    return "special values"


def all_special(rng: Rng, case: Case) -> str:
    values = case.given[case.values]
    special = pick(rng, SPECIAL)
    if values.is_floating_point():
        case.given[case.values] = torch.full_like(values, special)
    return f"all {special}"


def far_offsets(rng: Rng, case: Case) -> str:
    """At the limits: valid."""
    offsets = case.given["offsets"].clone()
    limits = (2.0**20, -(2.0**20), 5e-324, -0.0, 2.0**-41, -(2.0**-40), 0.5, 0.0, 1 - 2.0**-24)
    for _ in range(int(rng.integers(1, 4))):
        offsets.view(-1)[int(rng.integers(offsets.numel()))] = pick(rng, limits)
    case.given["offsets"] = offsets
    return "offsets at the limits"


def wrong_offsets(rng: Rng, case: Case) -> str:
    offsets = case.given["offsets"].clone()
    wrong = pick(rng, (math.nan, math.inf, -math.inf, 2.0**20 + 0.25, -3e38, 2.0**62))
    offsets.view(-1)[int(rng.integers(offsets.numel()))] = wrong
    case.given["offsets"], case.valid = offsets, False
    return f"offset {wrong}"


def weight_values(rng: Rng, case: Case) -> str:
    if case.given.get("weights") is None:
        return "none"
    count = len(case.given["weights"])
    scale = pick(rng, (0.0, 1.0, 2.0**500, 2.0**-500, 1e308, 5e-324, 1e-310, 2.0**501))
    weights = torch.full((count,), scale, dtype=torch.float64)
    chosen = int(rng.integers(count))
    weights[chosen] = pick(
        rng, (scale, 0.0, scale * 2.0**-80, scale * 2.0**-81, -1.0, math.nan, math.inf, 1.0)
    )
    case.given["weights"] = weights
    counted = weights[weights != 0]
    fine = bool(weights.isfinite().all()) and bool((weights >= 0).all())
    fine = fine and bool((counted >= weights.max() * 2.0**-80).all())
    if case.streams:
        fine = fine and bool(((counted >= 2.0**-500) & (counted <= 2.0**500)).all())
    case.valid = case.valid and fine
    return f"weights {scale:g} and {weights[chosen]:g}"


def strided(rng: Rng, case: Case) -> str:
    """Gaps and another order in memory; the last dimension stays dense where it must."""
    name = pick(rng, [n for n in (case.values, *case.written) if n not in ("weight", "count")])
    values = case.given[name]
    if name == "var" or (name == "mean" and "var" in case.given):
        return "none"  # both need the same strides
    order = rng.permutation(values.dim() - 1).tolist() + [values.dim() - 1]
    if name != "tokens":
        order = rng.permutation(values.dim()).tolist()
    sizes = [values.shape[d] for d in order]
    gaps = (
        [1] * len(sizes) if rng.random() < 0.5 else [int(n) for n in rng.integers(1, 3, len(sizes))]
    )
    gaps[-1] = 1 if name == "tokens" else gaps[-1]
    whole = torch.zeros([s * g + 1 for s, g in zip(sizes, gaps, strict=True)], dtype=values.dtype)
    part = whole[tuple(slice(1, 1 + s * g, g) for s, g in zip(sizes, gaps, strict=True))]
    view = part.permute([order.index(d) for d in range(len(order))])
    case.given[name] = view.copy_(values)
    return f"strided {name}"


def expanded_values(rng: Rng, case: Case) -> str:
    """Stride 0: the same memory in many places, which may be read."""
    values = case.given[case.values]
    last = values.dim() - (1 if case.values == "tokens" else 0)
    dim = int(rng.integers(last))
    case.given[case.values] = values.narrow(dim, 0, 1).expand(values.shape)
    return f"expanded {case.values} in {dim}"


def overlapping(rng: Rng, case: Case) -> str:
    if not case.written:
        return "none"
    name, case.valid = pick(rng, case.written), False
    values = case.given[name]
    kind = pick(rng, ("expanded", "as_strided", "tokens", "another", "offsets"))
    if kind == "expanded":
        case.given[name] = values.narrow(0, 0, 1).expand(values.shape)
    elif kind == "as_strided":
        strides = [int(n) for n in rng.integers(0, 4, values.dim())]
        case.given[name] = torch.zeros(
            1 + sum((s - 1) * t for s, t in zip(values.shape, strides, strict=True) if s > 0),
            dtype=values.dtype,
        ).as_strided(values.shape, strides)
    else:
        other = {"tokens": "tokens", "offsets": "offsets"}.get(kind, pick(rng, case.written))
        given = case.given[other]
        storage = torch.zeros(values.numel() + given.numel() + 1, dtype=values.dtype)
        if given.dtype != values.dtype:
            return "none"
        shift = int(rng.integers(0, given.numel() + 1))
        case.given[name] = storage[shift : shift + values.numel()].view(values.shape)
        if other != name:
            case.given[other] = storage[: given.numel()].view(given.shape).copy_(given)
    return f"{name} overlaps: {kind}"


def state_values(rng: Rng, case: Case) -> str:
    """A state that no stream makes: not compared, but nothing may break."""
    if case.op not in STATES:
        return "none"
    name = pick(rng, STATES[case.op])
    values = case.given[name].clone()
    special = pick(rng, (*SPECIAL, -1.0, 1e300, 7.0))
    if rng.random() < 0.5:
        values.fill_(special)
    else:
        values.view(-1)[int(rng.integers(values.numel()))] = special
    case.given[name] = values
    return f"{name} has {special}"


def a_tensor(rng: Rng, case: Case) -> str:
    names = [n for n, value in case.given.items() if isinstance(value, torch.Tensor)]
    return str(pick(rng, names))


def rank(rng: Rng, case: Case) -> str:
    name, case.valid = a_tensor(rng, case), False
    values = case.given[name]
    changes: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: values.unsqueeze(int(rng.integers(values.dim() + 1))),
        lambda: values[0],
        lambda: values.flatten(),
        lambda: values.reshape(-1)[0],
        lambda: values.transpose(0, -1),
        lambda: values[(None,) * 20],
    )
    case.given[name] = pick(rng, changes)() if values.numel() and values.dim() else values
    return f"rank of {name}"


def size(rng: Rng, case: Case) -> str:
    name, case.valid = a_tensor(rng, case), False
    values = case.given[name]
    if values.dim() == 0:
        return "none"
    dim = int(rng.integers(values.dim()))
    count = pick(rng, (0, 0, values.shape[dim] + 1, max(0, values.shape[dim] - 1)))
    shape = list(values.shape)
    shape[dim] = count
    case.given[name] = torch.zeros(shape, dtype=values.dtype)
    return f"size {count} of {name}"


def empty(rng: Rng, case: Case) -> str:
    """No images or channels: a valid call with an empty result."""
    dims = {"tokens": (1, 3), "image": (0, 1, 2, 3), "grad": (1, 2, 3)}[case.values]
    if case.op == "_mean_backward":
        dims = (0, 1)
    if case.written or case.op in STREAMS:
        return "none"
    dim, values = pick(rng, dims), case.given[case.values]
    case.given[case.values] = values.narrow(dim, 0, 0)
    return f"empty {case.values}"


HUGE = (2**20, 2**20 + 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**61, 2**62)


def huge(rng: Rng, case: Case) -> str:
    """Sizes to the limits of 64 bits, on one element of memory or on none."""
    name, case.valid, case.large = a_tensor(rng, case), False, True
    values = case.given[name]
    if values.dim() == 0 or values.numel() == 0:
        return "none"
    shape = list(values.shape)
    for _ in range(int(rng.integers(1, 3))):
        shape[int(rng.integers(len(shape)))] = pick(rng, HUGE)
    if rng.random() < 0.2:
        shape[int(rng.integers(len(shape)))] = 0
    element = values.reshape(-1)[:1].clone()
    try:
        if name == "tokens" and shape[-1] < 1000:
            case.given[name] = element.expand(max(1, shape[-1])).clone()[: shape[-1]].expand(shape)
        else:
            case.given[name] = element.expand(shape)
    except RuntimeError:  # torch has no such shape
        return "none"
    if name == case.values and rng.random() < 0.5 and shape[0] > 0:  # as many views everywhere
        for other, width in (("offsets", (2,)), ("weights", ())):
            if isinstance(case.given.get(other), torch.Tensor):
                one = case.given[other].flatten()[: 2 if width else 1].view(1, *width)
                case.given[other] = one.expand(shape[0], *width)
    return f"huge {name}"


ELEMENTS = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.uint16,
    torch.uint64,
)


def dtype(rng: Rng, case: Case) -> str:
    name, case.valid = a_tensor(rng, case), False
    new = pick(rng, ELEMENTS)
    case.given[name] = case.given[name].to(new)
    return f"{name} of {new}"


class Subclass(torch.Tensor):
    pass


def sparse(values: torch.Tensor) -> torch.Tensor:
    return values.to_sparse()


def compressed(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(values.shape[0], -1).to_sparse_csr()


def quantized(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(values.float(), 0.1, 0, torch.quint8)


def nested(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(values))


def jagged(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(values), layout=torch.jagged)


def inference(values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return values.clone()


def meta(values: torch.Tensor) -> torch.Tensor:
    return values.to("meta")


def negated(values: torch.Tensor) -> torch.Tensor:
    return torch.complex(values.double(), -values.double()).conj().imag.to(values.dtype)


def lazily_negated(values: torch.Tensor) -> torch.Tensor:
    return torch.complex(values.float(), -values.float()).conj().imag


def conjugated(values: torch.Tensor) -> torch.Tensor:
    return torch.complex(values.float(), values.float()).conj()


def subclass(values: torch.Tensor) -> torch.Tensor:
    return values.as_subclass(Subclass)


def parameter(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(values) if values.is_floating_point() else values


def misaligned(values: torch.Tensor) -> torch.Tensor:
    """One byte beside the place of an element."""
    memory = bytearray(values.numel() * values.element_size() + 9)
    offset = 1 if torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2 == 0 else 2
    flat = torch.frombuffer(memory, dtype=values.dtype, offset=offset, count=values.numel())
    return flat.copy_(values.flatten()).view(values.shape)


KINDS = (
    sparse,
    compressed,
    quantized,
    nested,
    jagged,
    inference,
    meta,
    negated,
    lazily_negated,
    conjugated,
    subclass,
    parameter,
    misaligned,
)


def kind(rng: Rng, case: Case) -> str:
    name, case.valid = a_tensor(rng, case), False
    make = pick(rng, KINDS)
    try:
        case.given[name] = make(case.given[name])
    except (RuntimeError, TypeError, ValueError):  # torch has no such tensor of this dtype
        return "none"
    return f"{make.__name__} {name}"


OTHERS = (None, 1, 1.5, "photo.jpg", b"abc", [], [[1.0]], {}, object(), (0, 0), 10**400, [10**400])


def no_tensor(rng: Rng, case: Case) -> str:
    name, case.valid = a_tensor(rng, case), False
    case.given[name] = pick(rng, (*OTHERS, np.zeros((2, 2)), [np.zeros(2)], [torch.zeros(2)]))
    return f"{name} is {case.given[name]!r:.30}"


INTEGERS = (0, -1, 1, 2, 3, 2**20, 2**24, 2**24 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**200)
NUMBERS = (np.int64(2), np.uint8(1), True, 1.0, math.nan, "1", None, -(2**63), torch.tensor(2))


def integers(rng: Rng, case: Case) -> str:
    if "grid" not in case.given:
        return wrong_offsets(rng, case)
    name, case.valid, case.large = pick(rng, ("grid", "patch", "stride")), False, True
    value = list(case.given[name])
    how = int(rng.integers(5))
    if how < 3:
        value[int(rng.integers(len(value)))] = pick(rng, INTEGERS if how < 2 else NUMBERS)
    elif how == 3:
        value = pick(rng, ([], [1], [1, 1, 1], value * 50000, [value, value]))
    else:
        value = pick(rng, (*OTHERS, *NUMBERS, tuple(value), np.array(value), torch.Size([2, 2])))
    case.given[name] = value
    return f"{name} is {value!r:.40}"


def large_picture(rng: Rng, case: Case) -> str:
    """At the limits of the tables: few large cells, or more bytes than there are."""
    if "grid" not in case.given or case.written or case.values != "tokens":
        return "none"
    tokens, case.valid, case.large = case.given["tokens"], False, True
    log = int(rng.integers(0, 25))
    count, pitch = 2**log, 2 ** (24 - log)
    axis = int(rng.integers(2))
    grid, patch, stride = [1, 1], [1, 1], [1, 1]
    grid[axis], patch[axis] = count, pitch
    stride[axis] = pick(rng, (2**24, 2**24, 2**23, 2 ** int(rng.integers(12, 25)), 1))
    if stride[axis] == 1:
        patch[1 - axis] = 2 ** int(rng.integers(10, 25))
    views = int(rng.integers(1, 3))
    shape = (views, 1, count, 1)
    case.given["tokens"] = tokens.reshape(-1)[:1].expand(shape)
    case.given["offsets"] = case.given["offsets"][:1].expand(views, 2)
    if case.given.get("weights") is not None:
        case.given["weights"] = case.given["weights"][:1].expand(views)
    case.given |= {"grid": grid, "patch": patch, "stride": stride}
    return "large picture"


WORDS = ("", "mean ", "Mean", "a\0b", "a\nb", "\ud800", "x" * 10**5, "é", "'", "median", "zeros")


def word(rng: Rng, case: Case) -> str:
    names = ("upsample", "border", "padding", "interpolation", "reduce")
    name, case.valid = pick(rng, [n for n in names if n in case.given]), False
    case.given[name] = pick(rng, (*WORDS, *OTHERS, np.str_("mean")))
    return f"{name} is {case.given[name]!r:.30}"


CHANGES: tuple[Change, ...] = (
    special_values,
    special_values,
    all_special,
    far_offsets,
    wrong_offsets,
    weight_values,
    weight_values,
    strided,
    strided,
    expanded_values,
    overlapping,
    overlapping,
    state_values,
    rank,
    size,
    empty,
    huge,
    dtype,
    kind,
    kind,
    no_tensor,
    integers,
    integers,
    large_picture,
    word,
)


# ---- and to arrays ------------------------------------------------------------------------------


def to_bytes(case: Case, array: Any, offset: int) -> Any:
    """A copy at ``offset`` in memory of its own."""
    memory = bytearray(array.nbytes + 16)
    case.memory.append(torch.frombuffer(memory, dtype=torch.uint8))
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def change_array(rng: Rng, case: Case) -> str:
    names = [n for n, v in case.given.items() if isinstance(v, np.ndarray) and v.ndim and v.size]
    if not names:
        return "none"
    name = pick(rng, names)
    array, inputs = case.given[name], name not in case.written
    how = pick(
        rng,
        ("negative", "misaligned", "read-only", "big-endian", "object", "structured", "masked")
        + ("matrix", "steps", "record", "string", "longdouble", "float128 bytes", "padded", "list"),
    )
    if how == "negative" and array.nbytes < 2**24:
        axis = int(rng.integers(array.ndim))
        copy = to_bytes(case, np.flip(array, axis), 0)
        case.given[name] = np.flip(copy, axis)
        fine = case.way == "numpy" and (axis < array.ndim - 1 or array.shape[-1] == 1)
        case.valid = case.valid and inputs and (fine or name in ("offsets", "weights"))
    elif how == "misaligned" and array.nbytes < 2**24:
        case.given[name], case.valid = to_bytes(case, array, 1), False
    elif how == "read-only":
        case.given[name] = array[...]
        case.given[name].flags.writeable = False
        case.valid = case.valid and inputs
    elif array.nbytes < 2**20 and array.dtype.kind == "f":
        case.valid = False
        makers: dict[str, Callable[[], Any]] = {
            "big-endian": lambda: array.astype(array.dtype.newbyteorder(">")),
            "object": lambda: array.astype(object),
            "structured": lambda: np.zeros(array.shape, "f4,f4"),
            "masked": lambda: np.ma.MaskedArray(array, mask=array > 0),
            "matrix": lambda: array.view(np.recarray),
            "record": lambda: np.zeros(array.shape, [("a", array.dtype), ("b", "u1")])["a"],
            "string": lambda: array.astype(str),
            "longdouble": lambda: array.astype(np.longdouble),
            "float128 bytes": lambda: np.zeros(array.shape, "V4"),
            "padded": lambda: np.repeat(array, 2, axis=-1)[..., ::2],
            "steps": lambda: np.lib.stride_tricks.as_strided(array, strides=(0,) * array.ndim),
            "list": lambda: array.tolist(),
        }
        case.given[name] = makers.get(how, lambda: array)()
    return f"{name} {how}"


def storage_of(value: torch.Tensor) -> torch.Tensor | None:
    """All bytes that a tensor lies on."""
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        return None
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())


def to_array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or storage_of(value) is None:
        return value
    try:
        return arrays(value)
    except (RuntimeError, TypeError, ValueError):  # no array of NumPy
        return value


JAX_TYPES = ("float32", "float64", "float16", "uint8", "int64")


def to_jax(value: Any) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    fits = type(value) is np.ndarray and value.nbytes < 2**20 and str(value.dtype) in JAX_TYPES
    return jax.numpy.asarray(value) if fits else value


def make(seed: int, index: int, ways: Sequence[str] = tuple(WAYS)) -> Case:
    rng = np.random.default_rng((seed, index))
    way = pick(rng, ways)
    op = pick(rng, WAYS[way])
    case = (shift_case if "shift" in op else ensemble_case)(rng, op, way)
    if op in STREAMS:
        case.first = dict(case.given)
    for _ in range(int(rng.choice(4, p=(0.1, 0.45, 0.3, 0.15)))):
        try:
            case.changes.append(pick(rng, CHANGES)(rng, case))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            case.changes.append("none")  # not of what the call has become
            case.valid = False
    for value in case.given.values():
        if isinstance(value, torch.Tensor) and storage_of(value) is not None:
            case.memory.append(storage_of(value))
    if way == "numpy" or (way == "dlpack" and rng.random() < 0.7):
        case.given = {name: to_array(value) for name, value in case.given.items()}
        case.first = {name: to_array(value) for name, value in case.first.items()}
        if rng.random() < 0.3:
            case.changes.append(change_array(rng, case))
        if way == "dlpack" and case.op != "out" and rng.random() < 0.2:
            case.given[case.values] = to_jax(case.given[case.values])
    return case


# ---- the call -----------------------------------------------------------------------------------


def library_of(case: Case) -> Any:
    return {"numpy": numpy_binding, "dlpack": dlpack}.get(case.way, srt_ext)


def call_stream(case: Case, given: dict[str, Any]) -> Any:
    """A chunk of the valid call, then the case; nothing is added by one that is refused."""
    modes = ("upsample", "border", "stride")
    stream_type = getattr(library_of(case), case.op)
    stream = stream_type(given["grid"], given["patch"], **{m: given[m] for m in modes})
    same = all(repr(given[m]) == repr(case.first[m]) for m in ("grid", "patch", *modes))
    if same:
        stream.update(*(case.first[n] for n in ("tokens", "offsets", "weights") if n in case.first))
    before = stream.state_dict()
    try:
        stream.update(*(given[n] for n in ("tokens", "offsets", "weights") if n in given))
    except BaseException:
        after = stream.state_dict()
        assert after["views"] == before["views"], "a refused update was counted"
        assert before["state"].keys() == after["state"].keys(), "a refused update made a state"
        for name, values in before["state"].items():
            assert np.array_equal(np.asarray(values), np.asarray(after["state"][name]), True), (
                f"a refused update wrote to {name}"
            )
        raise
    results = (stream.result(), stream.variance()) if case.reduce == "moments" else stream.result()
    return results, same


def call_gradient(case: Case, given: dict[str, Any]) -> Any:
    name = {"median": "ensemble"}.get(case.op, case.op)
    values = given[case.values]
    if isinstance(values, torch.Tensor) and values.is_floating_point() and values.is_leaf:
        given[case.values] = values.detach().requires_grad_()
    result = getattr(srt_ext, name)(**given)
    results = result if isinstance(result, tuple) else (result,)
    grads = [torch.ones((), dtype=r.dtype, device=r.device).expand(r.shape) for r in results]
    return torch.autograd.grad(results, [given[case.values]], grads)[0]


def call(case: Case) -> Any:
    given = dict(case.given)
    if case.op in STREAMS:
        return call_stream(case, given)
    if case.way == "gradient":
        return call_gradient(case, given)
    name = {"median": "ensemble", "out": "ensemble"}.get(case.op, case.op)
    if case.way == "op":
        op = getattr(torch.ops.srt, name)
        if case.op == "out":
            op.out(**given)
            return given["out"]
        return op.default(**given)
    if case.op in STATES:
        state = [given.pop(n) for n in STATES[case.op]]
        views = ("tokens", "offsets", "grid", "patch", "weights")
        place = [given.pop(n) for n in views if n in given]
        return ops.accumulate(name, *state, *place, **given)
    return getattr(library_of(case), name)(**given)


# ---- what must hold -----------------------------------------------------------------------------

INTERNAL = ("INTERNAL ASSERT", "std::", "vector", "max_size", "basic_string", "_M_", "out_of_range")
OF_MEMORY = ("allocate", "not enough memory")


def check_error(case: Case, error: BaseException) -> str:
    """Raises for an error that says too little; the kind of a good one."""
    text, name = str(error), type(error).__name__
    said = text.split("frame #0")[0]
    memory = any(words in said for words in OF_MEMORY)
    if memory and isinstance(error, (MemoryError, RuntimeError)):
        assert case.large, f"short of memory for a small call: {name}: {said[:300]}"
        return "out of memory"
    assert said.strip(), f"{name} without words"
    found = [words for words in INTERNAL if words in said]
    assert not found, f"internal words {found}: {name}: {said[:300]}"
    allowed: tuple[type[BaseException], ...] = (ValueError, TypeError)
    if case.way in ("op", "gradient") or "nference tensor" in said:
        allowed = (*allowed, RuntimeError)
    assert isinstance(error, allowed), f"{name}: {said[:300]}"
    if case.way not in ("op", "gradient"):
        stated = "srt::" in said or said.startswith("Running") or "nference tensor" in said
        assert stated, f"no rule: {name}: {said[:300]}"
    assert not case.valid, f"a valid call was refused: {name}: {said[:300]}"
    return "refused"


def as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().resolve_neg()
    array = np.array(value, order="C", subok=False)
    return tensor(array.astype(array.dtype.newbyteorder("="), copy=False))


def pair(value: Any) -> tuple[int, int]:
    values = [value, value] if np.ndim(value) == 0 else list(value)
    if len(values) == 1:
        values = values * 2
    return int(values[0]), int(values[1])


def numbers(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(as_tensor(value), np.float64)


def sample_of(case: Case) -> tuple[Ensemble | Shift, torch.Tensor] | None:
    """The case as the oracle takes it, with its values; None where it is too large for that."""
    given = case.given
    tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
    arrays = [v for v in given.values() if isinstance(v, np.ndarray)]
    if any(v.is_meta for v in tensors) or any(v.size > SAMPLED for v in arrays):
        return None
    if any(v.layout == torch.strided and v.numel() > SAMPLED for v in tensors if not v.is_nested):
        return None
    values = as_tensor(given[case.values])
    if values.numel() > SAMPLED or values.numel() == 0:
        return None
    values = values.clone()
    offsets = numbers(given["offsets"])
    if case.values != "grad":
        work = values.numel() * (len(offsets) if "image" in given else 1)
    else:
        work = values.numel() * len(offsets)
    pairs = tuple(map(tuple, offsets.tolist()))
    if "shift" in case.op:
        modes = {name: str(given[name]) for name in ("padding", "interpolation") if name in given}
        if work > SAMPLED:
            return None
        batch, channels, *size = values.shape[-4:]
        shift = Shift(tuple(size), pairs, channels, batch, **modes, value_dtype=torch.float64)
        return shift, values
    grid, patch, stride = (pair(given[name]) for name in ("grid", "patch", "stride"))
    batch, channels = values.shape[1::2] if case.values == "tokens" else values.shape[:2]
    if len(offsets) * batch * channels * math.prod(grid) * math.prod(patch) > SAMPLED * 16:
        return None
    weights = given.get("weights")
    if weights is not None:
        scaled = numbers(weights)
        if scaled.max() > 0:  # only ratios matter, and the oracle's sums must not overflow
            scaled = np.ldexp(scaled, -int(np.frexp(scaled.max())[1]))
        weights = tuple(scaled.tolist())
    return (
        Ensemble(
            grid=grid,
            patch=patch,
            offsets=pairs,
            channels=channels,
            batch=batch,
            weights=weights,
            stride=stride,
            upsample=str(given["upsample"]),
            border=str(given["border"]),
            value_dtype=torch.float64,
        ),
        values,
    )


def assert_right(result: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Within the bound, and not finite where the oracle is not, or where it is beyond the type."""
    assert result.shape == exact.shape, f"shape {list(result.shape)}, not {list(exact.shape)}"
    result, bound = result.detach(), bound.expand_as(exact)
    reached = ~exact.isfinite()
    if result.is_floating_point():
        largest = torch.finfo(result.dtype).max
        beyond = exact.abs() + bound >= largest * (1 - torch.finfo(result.dtype).eps)
        spread = (~result.isfinite() != reached) & ~beyond
        assert not spread.any(), (
            f"{int(spread.sum())} results are finite or not against the oracle: "
            f"{result[spread][:3].tolist()}, not {exact[spread][:3].tolist()}"
        )
        reached = reached | beyond
    result, exact = (torch.where(reached, 0, values) for values in (result, exact))
    assert_within_rounding(result, exact, torch.where(reached, 0, bound))


def bounded(kernel: str, sample: Any, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's result and its bound where that is finite."""
    clean = torch.where(values.isfinite(), values, torch.zeros((), dtype=values.dtype))
    return oracle.truth(kernel, sample, values), oracle.bound_of(kernel, sample, clean)


def compare(case: Case, sample: Any, values: torch.Tensor, result: Any) -> bool:
    """With the oracle; False where there is nothing to compare."""
    same = True
    if case.op in STREAMS:
        result, same = result
    if case.way == "gradient":
        kernel = "shift_backward" if case.op == "shift" else "mean_backward"
        shape = (len(sample.offsets), *values.shape) if case.op == "shift" else sample.shape
        exact, bound = bounded(kernel, sample, torch.ones(shape, dtype=values.dtype))
        assert_right(result, exact, bound)
    elif case.op in STATES:
        return compare_state(case, sample, values)
    elif case.op in STREAMS:
        return compare_stream(case, sample, values, result, same)
    else:
        kernel = case.op.lstrip("_")
        if "shift" not in kernel and kernel != "mean_backward":
            median = case.given.get("reduce") == "median"
            kernel = "moments" if "moments" in kernel else "median" if median else "mean"
        exact, bound = bounded(kernel, sample, values)
        result = torch.stack([*map(as_tensor, result)]) if kernel == "moments" else result
        assert_right(as_tensor(result), exact, bound)
    return True


def compare_state(case: Case, sample: Any, values: torch.Tensor) -> bool:
    """Of a stream that begins with this call."""
    if case.reduce == "median" or any("has" in change for change in case.changes):
        return False
    clean = torch.where(values.isfinite(), values, torch.zeros((), dtype=values.dtype))
    bounds, exact = EnsembleBounds(sample, clean), oracle.ensemble(sample, values, case.reduce)
    counted = bounds.stream_weight(1)[0] > 0
    exact = exact if case.reduce == "moments" else exact[None]
    limits = [bounds.stream_mean(1)]
    if case.reduce == "moments":
        limits.append(bounds.variance(1))
    for name, truth, limit in zip(("mean", "var"), exact, limits, strict=False):
        # Where no view counts the state is as it was.
        result = as_tensor(case.given[name])
        result, truth = (
            torch.where(counted, v, torch.zeros((), dtype=v.dtype)) for v in (result, truth)
        )
        assert_right(result, truth, limit)
    return True


def compare_stream(case: Case, sample: Any, values: torch.Tensor, result: Any, same: bool) -> bool:
    """The result over the views of both chunks."""
    if same:
        before = replace(case, given=case.first)
        first = sample_of(before)
        if first is None or as_tensor(case.first["tokens"]).dtype != values.dtype:
            return False
        weights = [
            np.ones(len(given["offsets"]))
            if given.get("weights") is None
            else numbers(given["weights"])
            for given in (case.first, case.given)
        ]
        joined = np.concatenate(weights)
        if joined.max() > 0:
            joined = np.ldexp(joined, -int(np.frexp(joined.max())[1]))
        sample = replace(
            sample,
            offsets=first[0].offsets + sample.offsets,
            weights=None if case.reduce == "median" else tuple(joined.tolist()),
        )
        values = torch.cat([first[1], values])
    clean = torch.where(values.isfinite(), values, torch.zeros((), dtype=values.dtype))
    bounds, exact = EnsembleBounds(sample, clean), oracle.ensemble(sample, values, case.reduce)
    if case.reduce == "median":
        if len(sample.offsets) > 7:
            return False
        assert_right(as_tensor(result), exact, bounds.median())
    elif case.reduce == "mean":
        assert_right(as_tensor(result), exact, bounds.stream_mean(2))
    else:
        assert_right(as_tensor(result[0]), exact[0], bounds.stream_mean(2))
        assert_right(as_tensor(result[1]), exact[1], bounds.variance(2))
    return True


def copy_of(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else np.array(value)


def put_back(target: Any, values: Any) -> None:
    if isinstance(target, torch.Tensor):
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(values)
    else:
        np.copyto(target, values)


def check(case: Case) -> str:
    """Makes the call; raises AssertionError if anything is wrong with what it does."""
    memory = [values.clone() for values in case.memory]
    written = {name: case.given[name] for name in case.written}
    try:
        before = {name: copy_of(value) for name, value in written.items()}
    except Exception:  # no values: of the meta device, no array at all
        before = {}
    try:  # before the call, which may write to offsets that overlap its output
        found = sample_of(case)
    except Exception as error:  # not a call that has a meaning
        found = error
    try:
        result = call(case)
    except AssertionError:
        raise
    except Exception as error:
        kind = check_error(case, error)
        for was, now in zip(memory, case.memory, strict=True):
            assert torch.equal(was, now), f"written to, and refused: {str(error)[:200]}"
        return kind
    assert not isinstance(found, Exception), f"accepted, but: {type(found).__name__}: {found}"
    composed = case.way == "gradient" and case.op not in ("shift", "ensemble")
    compared = found is not None and not composed and compare(case, *found, result)
    if len(before) == len(written):
        for name, value in before.items():
            put_back(written[name], value)
        for was, now in zip(memory, case.memory, strict=True):
            assert torch.equal(was, now), "memory was written that is no output"
    return "compared" if compared else "returned"


# ---- the campaign -------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(connection: Any, seed: int, begin: int, end: int, ways: Sequence[str]) -> None:
    """The worker: announces each case, then tells what came of it."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    numpy_binding.set_num_threads(1)
    if "dlpack" in ways:
        to_jax(np.zeros(1))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    connection.send(("ready", resident()))
    for index in range(begin, end):
        connection.send(("case", index))
        case, kind, text = None, "finding", ""
        try:
            case = make(seed, index, ways)
            kind = check(case)
        except Exception as error:
            made = case.describe() if case else "not made"
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{made} || {type(error).__name__}: {error} ({where.name}:{where.lineno})"
        way = f"{case.way}" if case else "none"
        connection.send(("done", index, way, kind, text, resident() if index % 500 == 0 else 0))
    connection.send(("end",))


@dataclass
class Campaign:
    seed: int
    target: str
    next: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[list[Any]] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)  # bytes, every 500 calls of one worker

    def add(self, index: int, text: str) -> None:
        self.findings.append([index, text])
        print(f"{index}: {text}", flush=True)


def receive(connection: Any, campaign: Campaign, process: Any) -> bool:
    """One message of the worker; False where it is gone."""
    try:
        if connection.poll(LIMIT if campaign.next else 120):
            message = connection.recv()
        else:
            campaign.add(campaign.next, f"no end after {LIMIT} seconds")
            process.kill()
            message = ("end",)
            campaign.next += 1
    except (EOFError, ConnectionError):
        process.join()
        campaign.add(campaign.next, f"the process ended with {process.exitcode}")
        campaign.next += 1
        return False
    if message[0] == "case":
        campaign.next = message[1]
    elif message[0] == "done":
        _, index, way, kind, text, memory = message
        campaign.next = index + 1
        counts = Counter(campaign.outcomes)
        counts[f"{way} {kind}"] += 1
        campaign.outcomes = dict(counts)
        if text:
            campaign.add(index, text)
        if memory:
            campaign.resident.append(memory)
    return message[0] != "end"


def run(campaign: Campaign, calls: int, state: Path | None) -> None:
    context = multiprocessing.get_context("spawn")
    ways = TARGETS.get(campaign.target, tuple(WAYS))
    start, before, saved = time.monotonic(), campaign.seconds, time.monotonic()
    while campaign.next < calls:
        connection, other = context.Pipe(duplex=False)
        given = (other, campaign.seed, campaign.next, calls, ways)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        other.close()
        if connection.poll(300):  # imports
            while receive(connection, campaign, process):
                if state and time.monotonic() - saved > 5:
                    saved = time.monotonic()
                    campaign.seconds = before + saved - start
                    state.write_text(json.dumps(vars(campaign), indent=1))
        process.join(LIMIT)
    campaign.seconds = before + time.monotonic() - start
    if state:
        state.write_text(json.dumps(vars(campaign), indent=1))


def main(
    calls: Annotated[int, typer.Option(help="Cases 0 to CALLS - 1.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of all cases.")] = 0,
    state: Annotated[Path | None, typer.Option(help="Keeps findings and the next index.")] = None,
    target: Annotated[str, typer.Option(help="torch, numpy, dlpack or all.")] = "all",
    only: Annotated[int | None, typer.Option(help="One case, in this process.")] = None,
) -> None:
    """Makes hostile calls and reports what is wrong with them."""
    if only is not None:
        case = make(seed, only, TARGETS.get(target, tuple(WAYS)))
        print(case.describe(), flush=True)
        print(check(case))
        return
    campaign = Campaign(seed, target)
    if state and state.exists():
        campaign = Campaign(**json.loads(state.read_text()))
        if (campaign.seed, campaign.target) != (seed, target):
            raise typer.BadParameter(
                f"{state} is of seed {campaign.seed}, target {campaign.target}"
            )
    run(campaign, calls, state)
    for kind, count in sorted(campaign.outcomes.items()):
        print(f"{kind}: {count}")
    if campaign.resident:
        first, last = campaign.resident[min(4, len(campaign.resident) - 1)], campaign.resident[-1]
        print(f"memory: {first >> 20} MiB after warming up, {last >> 20} MiB at the end")
    print(f"{campaign.next} calls, {len(campaign.findings)} findings, {campaign.seconds:.0f} s")
    raise typer.Exit(1 if campaign.findings else 0)


if __name__ == "__main__":
    typer.run(main)
