"""Cases of the fuzzer: valid calls of the ops, and changes to them.

A case depends only on ``(seed, index)``. Its arguments are tensors at first. For NumPy and DLPack
they are converted to arrays, which have further changes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

# For the modules samples and arrays of the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "python_tests"))

from arrays import arrays
from samples import BORDERS, DTYPES, INTERPOLATIONS, PADDINGS, UPSAMPLES

STATES = {
    "accumulate_mean_": ("mean", "weight"),
    "accumulate_moments_": ("mean", "var", "weight"),
    "accumulate_median_": ("window", "count"),
}
STREAMS = ("RunningMean", "RunningMoments", "RunningMedian")
# Ways to call, and the ops of each.
_FORWARD = ("shift", "ensemble", "median", "ensemble_moments", "out")
WAYS: dict[str, tuple[str, ...]] = {
    "op": (*_FORWARD, *STATES, "_shift_backward", "_mean_backward"),
    "python": (*_FORWARD, *STATES, *STREAMS),
    "gradient": ("shift", "ensemble", "median", "ensemble_moments"),
    "numpy": (*_FORWARD, *STREAMS),
    "dlpack": _FORWARD,
}
Rng = np.random.Generator


@dataclass
class Case:
    """One call. ``given``: arguments by name; ``memory``: all bytes of their storages."""

    op: str
    way: str
    given: dict[str, Any]
    changes: list[str] = field(default_factory=list)
    valid: bool = True  # must not raise
    large: bool = False  # may run out of memory
    memory: list[torch.Tensor] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)  # of a stream: the chunk before
    kernels: str = "auto"  # the instruction set

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
        return f"{self.way} {self.op} {self.kernels}: {'; '.join(self.changes)} | {given}"


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
    many = rng.random() < 0.05  # more views than the median networks support
    views, batch = int(rng.integers(1, 80 if many else 9)), int(rng.integers(1, 3))
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


# ---- changes to tensors -------------------------------------------------------------------------

SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-40, 5e-324, 2.0**14, -(2.0**14))
Change = Callable[[Rng, Case], str]


def special_values(rng: Rng, case: Case) -> str:
    """NaN, infinities, signed zeros, the smallest and very large numbers."""
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
    """Values at the limits, still valid."""
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
    """Gaps and another order of dimensions; the last one stays dense where required."""
    name = pick(rng, [n for n in (case.values, *case.written) if n not in ("weight", "count")])
    values = case.given[name]
    if name == "var" or (name == "mean" and "var" in case.given):
        return "none"  # both need the same strides
    order = [*rng.permutation(values.dim() - 1).tolist(), values.dim() - 1]
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
    """Stride 0: many elements share memory, which is valid for reading."""
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
    """A state that no stream produces: not compared, but must not crash."""
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
    """Sizes up to the limits of 64 bits, on one element of memory or on none."""
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
    except RuntimeError:  # torch rejects the shape
        return "none"
    if (
        name == case.values and rng.random() < 0.5 and shape[0] > 0
    ):  # the same number of views in all arguments
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
    """Misaligned by one byte."""
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
    except (RuntimeError, TypeError, ValueError):  # torch does not support this dtype
        return "none"
    return f"{make.__name__} {name}"


OTHERS: tuple[Any, ...] = (
    None,
    1,
    1.5,
    "photo.jpg",
    b"abc",
    [],
    [[1.0]],
    {},
    object(),
    (0, 0),
    10**400,
    [10**400],
)


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
    value = list(case.given[name])[:3]
    how = int(rng.integers(5))
    if how < 3:
        value[int(rng.integers(len(value)))] = pick(rng, INTEGERS if how < 2 else NUMBERS)
    elif how == 3:
        value = pick(rng, ([], [1], [1, 1, 1], [1, 1] * 50000, [[1, 1], [1, 1]]))
    else:
        value = pick(rng, (*OTHERS, *NUMBERS, tuple(value), np.array(value), torch.Size([2, 2])))
    case.given[name] = value
    return f"{name} is {value!r:.40}"


def large_picture(rng: Rng, case: Case) -> str:
    """At the limits of the tables: few large cells, or more bytes than available."""
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

# Changes to a tensor whose copy would exceed the memory.
WITHOUT_COPY = (huge, expanded_values, no_tensor, integers, word)


def is_huge(case: Case) -> bool:
    tensors = (v for v in case.given.values() if isinstance(v, torch.Tensor) and not v.is_nested)
    return any(v.numel() > 2**20 for v in tensors)


# ---- changes to arrays --------------------------------------------------------------------------


def to_bytes(case: Case, array: Any, offset: int) -> Any:
    """A copy at ``offset`` in a new buffer."""
    memory = bytearray(array.nbytes + 16)
    case.memory.append(torch.frombuffer(memory, dtype=torch.uint8))
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def backwards(rng: Rng, case: Case, name: str) -> None:
    """A negative stride along a random axis."""
    array = case.given[name]
    axis = int(rng.integers(array.ndim))
    case.given[name] = np.flip(to_bytes(case, np.flip(array, axis), 0), axis)
    dense = axis < array.ndim - 1 or array.shape[-1] == 1 or name == "image"
    fine = name in ("offsets", "weights") or (case.way == "numpy" and dense)
    case.valid = case.valid and fine and name not in case.written


def read_only(rng: Rng, case: Case, name: str) -> None:
    case.given[name] = case.given[name][...]
    case.given[name].flags.writeable = False
    case.valid = case.valid and name not in case.written


def beside(rng: Rng, case: Case, name: str) -> None:
    """Misaligned by one byte."""
    case.given[name], case.valid = to_bytes(case, case.given[name], 1), False


# Replaces a floating-point array by another kind, which may raise.
OTHER_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "object": lambda array: array.astype(object),
    "structured": lambda array: np.zeros(array.shape, "f4,f4"),
    "masked": lambda array: np.ma.MaskedArray(array, mask=array > 0),
    "recarray": lambda array: array.view(np.recarray),
    "record": lambda array: np.zeros(array.shape, [("a", array.dtype), ("b", "u1")])["a"],
    "string": lambda array: array.astype(str),
    "longdouble": lambda array: array.astype(np.longdouble),
    "bytes": lambda array: np.zeros(array.shape, "V4"),
    "every second": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "stride 0": lambda array: np.lib.stride_tricks.as_strided(array, strides=(0,) * array.ndim),
    "list": lambda array: array.tolist(),
}
IN_MEMORY = {"backwards": backwards, "read-only": read_only, "misaligned": beside}


def change_array(rng: Rng, case: Case) -> str:
    names = [n for n, v in case.given.items() if isinstance(v, np.ndarray) and v.ndim and v.size]
    if not names:
        return "none"
    name, how = pick(rng, names), pick(rng, (*IN_MEMORY, *OTHER_ARRAYS))
    array = case.given[name]
    if array.nbytes > 2**20:
        return "none"
    if how in IN_MEMORY:
        IN_MEMORY[how](rng, case, name)
    elif array.dtype.kind == "f":
        case.given[name], case.valid = OTHER_ARRAYS[how](array), False
    return f"{how} {name}"


def storage_of(value: torch.Tensor) -> torch.Tensor | None:
    """All bytes of the storage of a tensor."""
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        return None
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())


def to_array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or storage_of(value) is None:
        return value
    try:
        return arrays(value)
    except (RuntimeError, TypeError, ValueError):  # not convertible to NumPy
        return value


JAX_TYPES = ("float32", "float64", "float16", "uint8", "int64")


def to_jax(value: Any) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    fits = type(value) is np.ndarray and value.nbytes < 2**20 and str(value.dtype) in JAX_TYPES
    return jax.numpy.asarray(value) if fits else value


def make(seed: int, index: int, ways: Sequence[str] = tuple(WAYS)) -> Case:
    rng = np.random.default_rng((seed, index))
    way = pick(rng, ways)
    op = pick(rng, WAYS[way])
    case = (shift_case if "shift" in op else ensemble_case)(rng, op, way)
    case.kernels = pick(rng, torch.ops.srt._available_cpu_kernels().split(","))
    if op in STREAMS:
        case.first = dict(case.given)
    for _ in range(int(rng.choice(4, p=(0.1, 0.45, 0.3, 0.15)))):
        try:
            case.changes.append(pick(rng, WITHOUT_COPY if is_huge(case) else CHANGES)(rng, case))
        except Exception:  # the change does not apply to these arguments
            case.changes.append("none")
            case.valid = False
    for value in case.given.values():
        storage = storage_of(value) if isinstance(value, torch.Tensor) else None
        if storage is not None and storage.nbytes < 2**24:
            case.memory.append(storage)
    if way == "numpy" or (way == "dlpack" and rng.random() < 0.7):
        case.given = {name: to_array(value) for name, value in case.given.items()}
        case.first = {name: to_array(value) for name, value in case.first.items()}
        if rng.random() < 0.3:
            case.changes.append(change_array(rng, case))
        if way == "dlpack" and case.op != "out" and not case.large and rng.random() < 0.2:
            case.given[case.values] = to_jax(case.given[case.values])
    return case
