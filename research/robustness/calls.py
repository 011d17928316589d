"""``python -m research.robustness.calls``: hostile calls of every op and binding.

A case is a valid call with up to three changes: special values, shapes, strides, dtypes, kinds of
tensors and arrays, integers, option strings, overlapping outputs (hostile.py). It depends only on
``(seed, index)``, so ``--only INDEX`` repeats a case. Checks:

- The process survives, and each call ends within ``LIMIT`` seconds.
- An error is a ValueError or TypeError that states the violated rule (from ``torch.ops`` also the
  dispatcher's RuntimeError), or reports too little memory for a large call. Nothing was written.
- A result is within the forward error bound of the float64 oracle (python_tests/bounds.py), with
  NaN and infinities where the oracle has them. Inputs, and the memory around an output, are
  unchanged.
- A call that only has unusual values or strides raises no error.

A parent process starts a worker, which announces each case. A case that kills or blocks the worker
is a finding, and a new worker continues after it. ``--state FILE`` stores the findings and the next
index; the same command resumes there.
"""

from __future__ import annotations

import gc
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
from research.robustness.hostile import STATES, STREAMS, WAYS, Case, make, to_jax
from srt_ext import _numpy, dlpack, ops
from srt_ext import numpy as numpy_binding

# isort: split
# These are in python_tests; hostile.py puts it on the path.
import oracle
from arrays import tensor
from bounds import EnsembleBounds
from budget import assert_within_rounding
from samples import Ensemble, Shift

LIMIT = 20  # seconds of one call
MEMORY = 3 << 28  # bytes of address space of a worker, in addition to its imports
SAMPLED = 1 << 17  # limit for the oracle: elements of an array, and of pixel maps of all views
TARGETS = {"torch": ("op", "python", "gradient"), "numpy": ("numpy",), "dlpack": ("dlpack",)}


# ---- the call -----------------------------------------------------------------------------------


def library_of(case: Case) -> Any:
    return {"numpy": numpy_binding, "dlpack": dlpack}.get(case.way, srt_ext)


def call_stream(case: Case, given: dict[str, Any]) -> Any:
    """Update a stream with a valid chunk, then with the case; errors must not change the state."""
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
        assert after["views"] == before["views"], "a failed update was counted"
        assert before["state"].keys() == after["state"].keys(), "a failed update created a state"
        for name, values in before["state"].items():
            assert np.array_equal(np.asarray(values), np.asarray(after["state"][name]), True), (
                f"a failed update wrote to {name}"
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
    if case.op in STATES:  # as called by a stream, which has already checked these
        for size in ("grid", "patch", "stride"):
            if size in given:
                given[size] = ops.pair(name, size, given[size])
        state = [given.pop(n) for n in STATES[case.op]]
        views = ("tokens", "offsets", "grid", "patch", "weights")
        place = [given.pop(n) for n in views if n in given]
        return ops.accumulate(name, *state, *place, **given)
    return getattr(library_of(case), name)(**given)


# ---- checks -------------------------------------------------------------------------------------

INTERNAL = ("INTERNAL ASSERT", "std::", "vector", "max_size", "basic_string", "_M_", "out_of_range")
OF_MEMORY = ("allocate", "not enough memory")


def check_error(case: Case, error: BaseException) -> str:
    """The kind of an error; raises AssertionError if the message does not meet the rules."""
    text, name = str(error), type(error).__name__
    said = text.split("frame #0")[0]
    memory = any(words in said for words in OF_MEMORY)
    if memory and isinstance(error, (MemoryError, RuntimeError)):
        assert case.large, f"out of memory in a small call: {name}: {said[:300]}"
        return "out of memory"
    assert said.strip(), f"{name} without a message"
    found = [words for words in INTERNAL if words in said]
    assert not found, f"internal terms {found}: {name}: {said[:300]}"
    allowed: tuple[type[BaseException], ...] = (ValueError, TypeError)
    if case.way in ("op", "gradient") or "nference tensor" in said:
        allowed = (*allowed, RuntimeError)
    assert isinstance(error, allowed), f"{name}: {said[:300]}"
    if case.way not in ("op", "gradient"):
        stated = "srt::" in said or said.startswith("Running") or "nference tensor" in said
        assert stated, f"no rule stated: {name}: {said[:300]}"
    assert not case.valid, f"a valid call raised {name}: {said[:300]}"
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
    """The sample of the oracle and its values; None if the case is too large for the oracle."""
    given = case.given
    tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
    arrays = [v for v in given.values() if isinstance(v, np.ndarray)]
    if any(v.is_meta for v in tensors) or any(v.size > SAMPLED for v in arrays):
        return None
    if any(v.layout == torch.strided and v.numel() > SAMPLED for v in tensors if not v.is_nested):
        return None
    values = as_tensor(given[case.values]).clone()
    if values.numel() == 0:
        return None
    offsets = numbers(given["offsets"])
    pairs = tuple((float(dy), float(dx)) for dy, dx in offsets)
    if "shift" in case.op:
        if values.numel() * len(pairs) > SAMPLED:
            return None
        batch, channels, height, width = values.shape[-4:]
        return (
            Shift(
                size=(height, width),
                offsets=pairs,
                channels=channels,
                batch=batch,
                padding=str(given["padding"]),
                interpolation=str(given["interpolation"]),
                value_dtype=torch.float64,
            ),
            values,
        )
    grid, patch, stride = (pair(given[name]) for name in ("grid", "patch", "stride"))
    batch, channels = values.shape[1::2] if case.values == "tokens" else values.shape[:2]
    if len(pairs) * batch * channels * math.prod(grid) * math.prod(patch) > SAMPLED * 16:
        return None
    weights = given.get("weights")
    return (
        Ensemble(
            grid=grid,
            patch=patch,
            offsets=pairs,
            channels=channels,
            batch=batch,
            weights=None if weights is None else scaled(numbers(weights)),
            stride=stride,
            upsample=str(given["upsample"]),
            border=str(given["border"]),
            value_dtype=torch.float64,
        ),
        values,
    )


def scaled(weights: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Weights scaled to at most 1: only ratios matter, and the oracle's sums must not overflow."""
    if weights.max() > 0:
        weights = np.ldexp(weights, -int(np.frexp(weights.max())[1]))
    return tuple(weights.tolist())


def assert_right(result: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Within the bound; non-finite exactly where the oracle is, or where the dtype overflows."""
    assert result.shape == exact.shape, f"shape {list(result.shape)}, not {list(exact.shape)}"
    result, bound = result.detach(), bound.expand_as(exact)
    reached = ~exact.isfinite()
    if result.is_floating_point():
        largest = torch.finfo(result.dtype).max
        beyond = exact.abs() + bound >= largest * (1 - torch.finfo(result.dtype).eps)
        spread = (~result.isfinite() != reached) & ~beyond
        assert not spread.any(), (
            f"{int(spread.sum())} results differ from the oracle in being finite: "
            f"{result[spread][:3].tolist()}, not {exact[spread][:3].tolist()}"
        )
        reached = reached | beyond
    result, exact = (torch.where(reached, 0, values) for values in (result, exact))
    assert_within_rounding(result, exact, torch.where(reached, 0, bound))


def bounded(kernel: str, sample: Any, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of the oracle, and the error bound of its finite values."""
    clean = torch.where(values.isfinite(), values, torch.zeros((), dtype=values.dtype))
    return oracle.truth(kernel, sample, values), oracle.bound_of(kernel, sample, clean)


def compare(case: Case, sample: Any, values: torch.Tensor, result: Any) -> bool:
    """Compare the result with the oracle; False if it cannot be compared."""
    median = str(case.given.get("reduce")) == "median"
    if case.way == "gradient" and (median or case.op not in ("shift", "ensemble")):
        return False  # composed of other ops
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
            kernel = "moments" if "moments" in kernel else "median" if median else "mean"
        exact, bound = bounded(kernel, sample, values)
        result = torch.stack([*map(as_tensor, result)]) if kernel == "moments" else result
        assert_right(as_tensor(result), exact, bound)
    return True


def compare_state(case: Case, sample: Any, values: torch.Tensor) -> bool:
    """Compare the state of a stream after its first update; False if it cannot be compared."""
    changed = any(how in change for change in case.changes for how in (" has ", "overlaps"))
    if case.reduce == "median" or changed:
        return False
    clean = torch.where(values.isfinite(), values, torch.zeros((), dtype=values.dtype))
    bounds, exact = EnsembleBounds(sample, clean), oracle.ensemble(sample, values, case.reduce)
    counted = bounds.stream_weight(1)[0] > 0
    exact = exact if case.reduce == "moments" else exact[None]
    limits = [bounds.stream_mean(1)]
    if case.reduce == "moments":
        limits.append(bounds.variance(1))
    for name, truth, limit in zip(("mean", "var"), exact, limits, strict=False):
        # The state is unchanged where no view counts.
        result = as_tensor(case.given[name])
        result, truth = (
            torch.where(counted, v, torch.zeros((), dtype=v.dtype)) for v in (result, truth)
        )
        assert_right(result, truth, limit)
    return True


def compare_stream(case: Case, sample: Any, values: torch.Tensor, result: Any, same: bool) -> bool:
    """Compare the result over the views of both chunks."""
    if same:
        before = replace(case, given=case.first)
        first = sample_of(before)
        if first is None or as_tensor(case.first["tokens"]).dtype != values.dtype:
            return False
        weights = [
            np.ones(len(numbers(given["offsets"])))
            if given.get("weights") is None
            else numbers(given["weights"])
            for given in (case.first, case.given)
        ]
        sample = replace(
            sample,
            offsets=first[0].offsets + sample.offsets,
            weights=None if case.reduce == "median" else scaled(np.concatenate(weights)),
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


def attempt(function: Callable[[], Any]) -> Any:
    """The result of a function, or the exception that it raised."""
    try:
        return function()
    except AssertionError:
        raise
    except Exception as error:
        return error


def check(case: Case) -> str:
    """Run a case; raises AssertionError if it violates a check."""
    torch.ops.srt._force_cpu_kernels(case.kernels)
    _numpy.force_cpu_kernels(case.kernels)
    memory = [values.clone() for values in case.memory]
    # Before the call, because it may write to offsets that overlap its output. Either may fail,
    # because the arguments need not be tensors.
    sample = attempt(lambda: sample_of(case))
    before = attempt(lambda: {name: copy_of(case.given[name]) for name in case.written})
    result = attempt(lambda: call(case))
    kind = "returned"
    if isinstance(result, Exception):
        kind = check_error(case, result)
    else:
        assert not isinstance(sample, Exception), f"invalid arguments were accepted: {sample!r}"
        if sample is not None and compare(case, sample[0], sample[1], result):
            kind = "compared"
        for name, value in {} if isinstance(before, Exception) else before.items():
            put_back(case.given[name], value)
    for was, now in zip(memory, case.memory, strict=True):
        assert torch.equal(was, now), f"{kind}, and memory other than the output was written"
    return kind


# ---- the stress test ----------------------------------------------------------------------------


def resident() -> int:
    """Resident bytes of this process, after clearing JAX's cache of compiled functions."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(connection: Any, seed: int, begin: int, end: int, ways: Sequence[str]) -> None:
    """The worker: announces each case, then sends its outcome."""
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
    """Handle one message of the worker; False once the worker has ended."""
    try:
        if connection.poll(LIMIT if campaign.next else 120):
            message = connection.recv()
        else:
            campaign.add(campaign.next, f"did not end within {LIMIT} seconds")
            process.kill()
            message = ("end",)
            campaign.next += 1
    except (EOFError, ConnectionError):
        process.join()
        campaign.add(campaign.next, f"the process ended with exit code {process.exitcode}")
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
    return bool(message[0] != "end")


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
    calls: Annotated[int, typer.Option(help="Run the cases 0 to CALLS - 1.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of all cases.")] = 0,
    state: Annotated[
        Path | None, typer.Option(help="File for findings and the next index; resumes from it.")
    ] = None,
    target: Annotated[str, typer.Option(help="torch, numpy, dlpack or all.")] = "all",
    only: Annotated[int | None, typer.Option(help="Run only this case, in this process.")] = None,
) -> None:
    """Run hostile calls and report findings."""
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
                f"{state} belongs to seed {campaign.seed}, target {campaign.target}"
            )
    run(campaign, calls, state)
    for kind, count in sorted(campaign.outcomes.items()):
        print(f"{kind}: {count}")
    if campaign.resident:
        first, last = campaign.resident[min(4, len(campaign.resident) - 1)], campaign.resident[-1]
        print(f"memory: {first >> 20} MiB after warm-up, {last >> 20} MiB at the end")
    print(f"{campaign.next} calls, {len(campaign.findings)} findings, {campaign.seconds:.0f} s")
    raise typer.Exit(1 if campaign.findings else 0)


if __name__ == "__main__":
    typer.run(main)
