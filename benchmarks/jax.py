"""``python -m benchmarks.jax``: srt_ext.jax and pure-JAX formulations under ``jax.jit``.

All programs of a row run in one process, on the CPU, once per round in random order; the tables
show medians. ``repeated`` are the same calls one after the other, without other programs in
between. Before they are timed, the result of srt_ext is compared with the float64 reference in 8
channels (gradients: not), and the results of the others with srt_ext in full. Fields are
[B, H', W', C], the fastest layout of every program. Writes results/jax.json and results/jax.md.
"""

from __future__ import annotations

import ctypes
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer

import srt_ext
import srt_ext.jax as srt
from benchmarks import jax_peers as other
from benchmarks.common import RESULTS, machine, quartiles, save
from benchmarks.report import markdown, milliseconds, number
from benchmarks.suite import M_MMAP_THRESHOLD

TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-7}  # relative to the largest value of a result
FILL, OURS = "fill", "srt_ext"


class Case(NamedTuple):
    op: str  # mean, gradient, median, shift
    views: str
    grid: tuple[int, int] = (14, 14)
    stride: int = 1
    dtype: str = "float32"
    patch: int = 16
    channels: int = 384

    def text(self) -> str:
        size = "{} x {}".format(*(n * self.patch for n in self.grid))
        stride = "" if self.op == "shift" else f", stride {self.stride}"
        return f"{self.op}, {size}, {self.views}{stride}, {self.dtype}"


def cases() -> list[Case]:
    both = ("best:16", "grid:3")
    sizes = ((14, 14), (30, 53))
    means = [Case("mean", v, g, s) for g in sizes for v in both for s in (1, 4)]
    means += [Case("mean", v, s, 4, "bfloat16") for v in both for s in sizes]
    means += [Case("mean", "best:16", dtype="bfloat16")]
    gradients = [Case("gradient", v, stride=s) for v in both for s in (1, 4)]
    gradients += [Case("gradient", "best:16", (30, 53), 4)]
    medians = [Case("median", "best:16", stride=s) for s in (1, 4)]
    medians += [Case("median", "best:16", (30, 53), 4)]
    return [*means, *gradients, *medians, *(Case("shift", v, g) for g in sizes for v in both)]


def tiny_cases() -> list[Case]:
    tiny = {"grid": (3, 4), "patch": 4, "channels": 8}
    means = [Case("mean", "grid:1", **tiny), Case("mean", "grid:1", stride=2, **tiny)]
    means += [Case("mean", "best:4", dtype="bfloat16", **tiny)]
    return [*means, *(Case(op, "best:4", **tiny) for op in ("gradient", "median", "shift"))]


class Programs(NamedTuple):
    arguments: tuple[jax.Array, ...]
    by_name: dict[str, Callable[..., jax.Array]]  # srt_ext first
    reference: Callable[[], np.ndarray] | None  # of the first channels, on the last axis


def programs(case: Case) -> Programs:
    views = srt_ext.views.parse(case.views).offsets
    offsets, rng = views.numpy(), np.random.default_rng(0)
    height, width = (n * case.patch for n in case.grid)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)

    if case.op == "shift":
        image = draw(1, 3, height, width)
        by_name = {OURS: lambda x: srt.shift(x, offsets)}
        by_name |= {f.__name__: partial(f, offsets=offsets) for f in other.SHIFTS}
        exact = torch.from_numpy(np.array(image))
        return Programs((image,), by_name, lambda: srt_ext.reference.shift(exact, views).numpy())

    tokens = draw(len(offsets), 1, case.grid[0] * case.grid[1], case.channels)
    axes = other.Tables(offsets, case.grid, case.patch, case.stride)
    reduce = "median" if case.op == "median" else "mean"
    place: Any = (case.grid, (case.patch, case.patch))
    modes: Any = {"reduce": reduce, "stride": case.stride}

    def ours(tokens: jax.Array) -> jax.Array:
        return srt.ensemble(tokens, offsets, *place, **modes).transpose(0, 2, 3, 1)

    def reference() -> np.ndarray:
        exact = torch.from_numpy(np.array(tokens[..., :8], np.float64))
        return srt_ext.reference.ensemble(exact, views, *place, **modes).movedim(1, 3).numpy()

    formulas = other.MEDIANS if reduce == "median" else other.MEANS
    outer = other.median if reduce == "median" else other.mean
    by_name = {OURS: ours, **{f.__name__: partial(outer, f, axes) for f in formulas}}
    if case.op != "gradient":
        return Programs((tokens,), by_name, reference)
    cells = draw(1, height // case.stride, width // case.stride, case.channels)
    gradients = {
        name: lambda tokens, cells, field=field: jax.vjp(field, tokens)[1](cells)[0]
        for name, field in by_name.items()
    }
    return Programs((tokens, cells), gradients, None)


def wrong(found: np.ndarray, expected: np.ndarray, dtype: str) -> float | None:
    """The largest error relative to the largest value, if it exceeds the tolerance."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return None if error <= TOLERANCE[dtype] else float(error)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    arguments, by_name, reference = programs(case)
    calls: dict[str, Callable[[], jax.Array]] = {}
    errors: dict[str, float] = {}
    expected = None
    for name, program in by_name.items():
        calls[name] = partial(jax.jit(program), *arguments)
        found = np.asarray(calls[name](), np.float32)
        error = None if expected is None else wrong(found, expected, case.dtype)
        if expected is None:
            expected = found  # of srt_ext
            if reference is not None:
                exact = reference()
                error = wrong(found[..., : exact.shape[-1]], exact, case.dtype)
        if error is not None:
            errors[name] = error
            del calls[name]
    calls[FILL] = jax.jit(partial(jnp.full, expected.shape, 1, case.dtype))
    jax.block_until_ready(calls[FILL]())
    timed = times(calls, rounds)
    return {"case": case._asdict(), "text": case.text(), "calls": timed, "wrong": errors}


def times(calls: dict[str, Callable[[], jax.Array]], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each call in random order (quartiles), and ``repeated`` without pauses."""

    def timed(name: str) -> float:
        start = time.perf_counter()
        result = jax.block_until_ready(calls[name]())
        us = 1e6 * (time.perf_counter() - start)
        del result  # after the clock
        return us

    readings: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for i in range(rounds):
        shuffle(order)  # because a call is slower after one that frees much memory
        for name in order:
            # Slow calls: three readings; very slow ones: one.
            if i == 0 or readings[name][0] < (5e6 if i < 3 else 5e5):
                readings[name].append(timed(name))
    found: dict[str, dict[str, float]] = {}
    for name, us in readings.items():
        found[name] = {**quartiles(us), "readings": len(us)}
        if us[0] < 2e6:
            again = [timed(name) for _ in range(1 + (rounds if us[0] < 2e5 else 3))]
            found[name]["repeated"] = quartiles(again[1:])["median"]
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for each set of programs; ratios compare srt_ext with the fastest and with a fill."""
    found = []
    for names, group in groupby(rows, lambda row: tuple(row["calls"])):
        others = [name for name in names if name not in (OURS, FILL)]
        lines = []
        for row in group:
            calls = row["calls"]
            line = [row["text"], *(milliseconds(calls[n]["median"]) for n in (FILL, OURS, *others))]
            for kind in ("median", "repeated"):
                us = {name: call[kind] for name, call in calls.items() if kind in call}
                fastest = min(us[name] for name in others if name in us)
                line += [number(fastest / us[OURS], " x"), number(us[OURS] / us[FILL], " x")]
            lines.append(line)
        columns = [name.replace("_", " ") for name in others]
        ratios = ["fastest / srt_ext", "srt_ext / fill"]
        ratios += [f"repeated: {ratio}" for ratio in ratios]
        found.append(markdown(["", FILL, OURS, *columns, *ratios], lines))
    return "\n\n".join(found) + "\n"


def main(
    rounds: Annotated[int, typer.Option(help="Readings per call.")] = 9,
    results: Annotated[Path, typer.Option(help="Folder for the JSON and its tables.")] = RESULTS,
    tiny: Annotated[bool, typer.Option(help="Tiny shapes, to test the code.")] = False,
) -> None:
    """Measure, write the JSON after every row, print the tables."""
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {"machine": {**machine(), "jax": jax.__version__}, "unit": "us"}
    found["rows"] = []
    if sys.platform.startswith("linux"):  # new memory for every result, as in suite.py
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    for case in tiny_cases() if tiny else cases():
        found["rows"].append(measure(case, rounds))
        save(found, results / "jax.json")
        (results / "jax.md").write_text(tables(found["rows"]))
    print(tables(found["rows"]))
    errors = [f"{row['text']}: {row['wrong']}" for row in found["rows"] if row["wrong"]]
    if errors:
        print("WRONG:", *errors, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
