"""``python -m benchmarks.cuda``: ours on one GPU, against its limits and its peers, in one run.

Every reading is device time between two events, on a cold L2: before it, a buffer larger than L2 is
written, and a wait on the device hides the launches. Readings of all calls are interleaved (one of
each in turn); medians and quartiles are kept. Small calls are also read as a CUDA graph of many.
Every result is compared with the float64 oracle before anything is timed. What fails, or is wrong,
is listed with the reason; if it is ours, the exit status is 1. Writes
benchmarks/results/cuda-NAME.json and prints tables. ``--device cpu --quick`` walks through the same
code on any machine.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import srt_ext
from benchmarks.common import RESULTS, machine, output, quartiles, save
from benchmarks.peers import (
    published_ensemble,
    published_median,
    published_shift,
    sampled_shift,
    sampling_grid,
    separable_ensemble,
    sliced_ensemble,
    sliced_shift,
)
from srt_ext import reference

Pair = tuple[int, int]
Call = Callable[[], Any]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the last may lack the slow peers
FLUSH = 256 * 2**20  # bytes, several times the L2 of any GPU
WAIT = 400_000  # clock cycles: about 0.2 ms, longer than the host needs to launch a call
IN_A_GRAPH = 50
CROP = 8  # channels that are compared with the oracle
COMPILE_UNTIL, SLOW_UNTIL = 0.5, 0.7  # of the time there is: what is slow is left out after it


# ---- readings -----------------------------------------------------------------------------------


class Clock:
    """Microseconds of calls: by events on a GPU, by perf_counter elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH if self.gpu else 1, dtype=torch.uint8, device=device)

    def interleaved(self, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        readings: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds + 2):  # the first two warm up
            pending = {
                name: self._start(call)
                for name, call in calls.items()
                if not is_slow(name) or 1 < i < 5
            }
            if self.gpu:
                torch.cuda.synchronize()
            for name, reading in pending.items():
                if i > 1:
                    readings[name].append(reading())
        return readings

    def _start(self, call: Call) -> Callable[[], float]:
        if not self.gpu:
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            return lambda: 1e6 * elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.fill_(1)
        torch.cuda._sleep(WAIT)
        begin.record()
        call()
        end.record()
        return lambda: 1e3 * begin.elapsed_time(end)

    def replayed(self, call: Call, rounds: int) -> list[float]:
        """Of one of the calls of a graph; L2 is warm."""
        many: Call = partial(repeat, call, IN_A_GRAPH)
        replay = many
        if self.gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                many()
            replay = graph.replay
        readings = self.interleaved({"graph": replay}, rounds)["graph"]
        return [us / IN_A_GRAPH for us in readings]


def repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def is_slow(name: str) -> bool:
    """Peers of many launches: three readings are enough, for they are far behind."""
    return name.startswith(("published", "sliced loop"))


# ---- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    call: Call
    truth: torch.Tensor | None = None  # what it should give, of CROP channels; None for a limit
    crop: Callable[[torch.Tensor], torch.Tensor] = lambda result: result
    same: Call | None = None  # ours, which computes the same: compared in full
    coarse: bool = False  # computes in tf32


@dataclass
class Bench:
    clock: Clock
    rounds: int
    seconds: float  # that there are
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what ours did

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def row(
        self,
        about: dict[str, Any],
        peers: dict[str, Callable[[], Peer]],
        graph: bool,
        dtype: torch.dtype,
    ) -> None:
        """Checks and reads all peers; each is made here, so that its failure is its own."""
        title = f"{about['op']}, {name_of(dtype)}, {about['shape']}"
        calls: dict[str, Call] = {}
        results: dict[str, dict[str, Any]] = {}
        for name, make in peers.items():
            late = COMPILE_UNTIL if "compiled" in name else SLOW_UNTIL if is_slow(name) else 1
            if self.elapsed() > late * self.seconds:
                results[name] = {"failed": "left out: no time"}
                continue
            try:
                peer = make()
                results[name] = check(name, peer, dtype)
            except Exception as error:
                results[name] = {"failed": reason(error)}
            if "failed" not in results[name]:
                calls[name] = peer.call
            elif name.startswith("ours") or "difference" in results[name]:
                self.wrong.append(f"{title}: {name}: {results[name]['failed']}")
        for name, us in self.clock.interleaved(calls, self.rounds).items():
            results[name].update(quartiles(us))
        if graph:
            for name, call in calls.items():
                if is_slow(name) or "compiled" in name:
                    continue
                try:
                    results[name]["graph"] = quartiles(self.clock.replayed(call, 5))
                except Exception as error:
                    results[name]["graph"] = {"failed": reason(error)}
                    if name.startswith("ours"):
                        self.wrong.append(f"{title}: {name} in a graph: {reason(error)}")
        self.rows.append({**about, "dtype": name_of(dtype), "calls": results})
        medians = {name: f"{r['median']:.1f}" for name, r in results.items() if "median" in r}
        failed = [f"({name} failed)" for name, r in results.items() if "failed" in r]
        print(f"[{self.elapsed():5.1f} s] {title}: {medians}", *failed, flush=True)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(name: str, peer: Peer, dtype: torch.dtype) -> dict[str, Any]:
    """The relative error, by norms, or why the peer is not to be timed."""
    result = peer.call()
    if peer.truth is None:
        return {}
    error = ((peer.crop(result).double() - peer.truth).norm() / peer.truth.norm()).item()
    eps = 2.0**-10 if peer.coarse else torch.finfo(dtype).eps
    # Ours rounds its result once, and sums in float32. Peers round each step, and a loop each view;
    # a peer that moves pixels wrongly is off by tenths.
    is_ours = name.startswith("ours")
    allowed = (2 if dtype == torch.float32 else 1) * eps if is_ours else max(8 * eps, 1e-4)
    if not error <= allowed:  # written so that NaN fails
        return {"failed": f"wrong in this dtype: relative error {error:.2g}", "error": error}
    if peer.same is None:
        return {"error": error}
    ours = peer.same()
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    difference = (norm(result - ours) / norm(ours)).item()
    found = {"error": error, "difference": difference}
    if not difference <= 2 * allowed:  # though it is right in the channels that the oracle saw
        return {"failed": f"it and ours differ by {difference:.2g}", **found}
    return found


@dataclass(frozen=True)
class Field:
    """A call of ensemble."""

    name: str
    grid: Pair
    patch: Pair
    channels: int
    stride: Pair = (1, 1)
    offsets: torch.Tensor = field(default_factory=lambda: srt_ext.views.grid(3))
    small: bool = False
    loops: bool = True  # whether the loops over views are read; they know whole pixels, stride 1

    def text(self) -> str:
        height, width = (g * p for g, p in zip(self.grid, self.patch, strict=True))
        return (
            f"{self.name}{height}x{width} P={self.patch[0]} C={self.channels} "
            f"V={len(self.offsets)}" + (f" stride {self.stride[0]}" if self.stride[0] > 1 else "")
        )


@dataclass(frozen=True)
class Views:
    """A call of shift."""

    batch: int
    size: Pair
    offsets: torch.Tensor
    name: str

    def text(self) -> str:
        return f"{self.batch}x3x{self.size[0]}x{self.size[1]} V={len(self.offsets)} {self.name}"


def measure_field(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    device = bench.clock.device
    torch.manual_seed(0)
    count = case.grid[0] * case.grid[1]
    shape = (len(case.offsets), 1, count, case.channels)
    tokens = torch.randn(shape, device=device).to(dtype)
    place = (case.grid, case.patch)
    modes: dict[str, Any] = {"upsample": upsample, "stride": case.stride}
    run = partial(srt_ext.ensemble, tokens)
    out = torch.full_like(run(case.offsets, *place, **modes), float("nan"))
    source = torch.randn(out.shape, device=device).to(out)
    on_device = case.offsets.to(device)

    picked = torch.linspace(0, case.channels - 1, min(CROP, case.channels)).long().to(device)

    def truth(border: str) -> torch.Tensor:
        with torch.device(device):
            return reference.ensemble(
                tokens[..., picked], case.offsets, *place, **modes, border=border
            )

    def crop(result: torch.Tensor) -> torch.Tensor:
        return result[:, picked]

    coverage = truth("coverage")
    fresh = partial(run, case.offsets, *place, **modes)

    def ours(call: Call) -> Callable[[], Peer]:
        return lambda: Peer(call, coverage, crop)

    def loop(function: Callable[..., torch.Tensor]) -> Callable[[], Peer]:
        call = partial(function, tokens, case.offsets, *place, upsample)
        return lambda: Peer(call, truth("zeros"), crop, partial(fresh, border="zeros"))

    function, tables = separable_ensemble(
        case.offsets, *place, case.stride, upsample, "coverage", tokens
    )

    def gemm(precision: str = "highest", backend: str | None = None) -> Peer:
        matmuls = function
        if backend is not None:
            torch.compiler.reset()  # or the sizes of earlier rows count against a limit
            matmuls = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

        def call() -> torch.Tensor:
            torch.set_float32_matmul_precision(precision)
            result = matmuls(tokens, *tables)
            torch.set_float32_matmul_precision("highest")
            return result

        return Peer(call, coverage, crop, fresh, coarse=precision == "high")

    # aot_eager elsewhere: the code is walked through, not measured.
    backend = "inductor" if bench.clock.gpu else "aot_eager"
    peers: dict[str, Callable[[], Peer]] = {
        "ours": ours(fresh),
        "ours, out=": ours(partial(fresh, out=out)),
        "ours, offsets on the device": ours(lambda: run(on_device, *place, **modes)),
        "fill": lambda: Peer(lambda: out.fill_(1.0)),
        "copy": lambda: Peer(lambda: out.copy_(source)),
        "GEMM": gemm,
        "GEMM, compiled": partial(gemm, backend=backend),
    }
    if dtype == torch.float32:
        peers["GEMM, tf32"] = partial(gemm, "high")
    if case.loops:
        peers["published"] = loop(published_ensemble)
        peers["sliced loop"] = loop(sliced_ensemble)
    about: dict[str, Any] = {"op": f"mean, {upsample}", "shape": case.text()}
    about |= {"output_bytes": out.nbytes, "input_bytes": tokens.nbytes}
    bench.row(about, peers, case.small, dtype)


def measure_values(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    """Median and moments of one call, and a chunk of 8 views into each running state."""
    device = bench.clock.device
    torch.manual_seed(0)
    shape = (len(case.offsets), 1, case.grid[0] * case.grid[1], case.channels)
    tokens = torch.randn(shape, device=device).to(dtype)
    place = (case.offsets, case.grid, case.patch)
    modes: dict[str, Any] = {"upsample": upsample, "stride": case.stride}
    out = torch.empty_like(srt_ext.ensemble(tokens, *place, **modes))
    source = torch.randn(out.shape, device=device).to(out)
    picked = torch.linspace(0, case.channels - 1, min(CROP, case.channels)).long().to(device)

    def truth(border: str) -> torch.Tensor:
        with torch.device(device):
            return reference.ensemble(
                tokens[..., picked], *place, reduce="median", border=border, **modes
            )

    def crop(result: torch.Tensor) -> torch.Tensor:
        return result[:, picked]

    median = partial(srt_ext.ensemble, tokens, *place, reduce="median", **modes)
    limits: dict[str, Callable[[], Peer]] = {
        "fill": lambda: Peer(lambda: out.fill_(1.0)),
        "copy": lambda: Peer(lambda: out.copy_(source)),
    }
    peers = {
        "ours": lambda: Peer(median, truth("coverage"), crop),
        "ours, out=": lambda: Peer(partial(median, out=out), truth("coverage"), crop),
        **limits,
    }
    if case.loops and len(case.offsets) * out.nbytes < 2**33:
        stack = partial(published_median, tokens, *place, upsample)
        peers["published"] = lambda: Peer(stack, truth("zeros"), crop)
    about: dict[str, Any] = {"shape": case.text()}
    about |= {"output_bytes": out.nbytes, "input_bytes": tokens.nbytes}
    bench.row({"op": f"median, {upsample}", **about}, peers, case.small, dtype)

    moments = partial(srt_ext.ensemble_moments, tokens, *place, **modes)
    peers = {"ours": lambda: Peer(moments), **limits}
    bench.row({"op": f"moments, {upsample}", **about}, peers, case.small, dtype)

    chunk = (tokens[:8], case.offsets[:8])
    for kind in (srt_ext.RunningMean, srt_ext.RunningMoments, srt_ext.RunningMedian):
        running: Any = kind(case.grid, case.patch, **modes)
        running.update(*chunk)
        call = partial(running.update, *chunk)
        peers = {"ours": lambda call=call: Peer(call), **limits}
        name = f"{kind.__name__}, {upsample}, 8 views"
        bench.row({"op": name, **about}, peers, case.small, dtype)


def measure_views(bench: Bench, case: Views, dtype: torch.dtype) -> None:
    device = bench.clock.device
    torch.manual_seed(0)
    image = torch.rand(case.batch, 3, *case.size, device=device).to(dtype)
    out = torch.empty(len(case.offsets), *image.shape, dtype=dtype, device=device)
    source = torch.rand(out.shape, device=device).to(dtype)
    on_device = case.offsets.to(device)
    whole = bool((case.offsets == case.offsets.round()).all())

    def truth(padding: str) -> torch.Tensor:
        with torch.device(device):
            return reference.shift(image, case.offsets, padding=padding)

    reflected = truth("reflect")

    def ours(offsets: torch.Tensor) -> Callable[[], Peer]:
        return lambda: Peer(lambda: srt_ext.shift(image, offsets), reflected)

    same = partial(srt_ext.shift, image, case.offsets)

    pairs = [(dy, dx) for dy, dx in case.offsets.tolist()]

    def sliced(backend: str | None = None) -> Peer:
        blend = sliced_shift
        if backend is not None:
            torch.compiler.reset()
            blend = torch.compile(blend, fullgraph=True, dynamic=False, backend=backend)
        return Peer(lambda: blend(image, pairs), reflected, same=same)

    def sampled() -> Peer:
        places = sampling_grid(image, case.offsets)
        return Peer(lambda: sampled_shift(image, places), reflected, same=same)

    backend = "inductor" if bench.clock.gpu else "aot_eager"
    peers: dict[str, Callable[[], Peer]] = {
        "ours": ours(case.offsets),
        "ours, offsets on the device": ours(on_device),
        "fill": lambda: Peer(lambda: out.fill_(1.0)),
        "copy": lambda: Peer(lambda: out.copy_(source)),
        "slices": sliced,
        "grid_sample": sampled,
    }
    if case.batch == 1 and dtype != torch.float16:  # dozens of kernels each: seconds to compile
        peers["slices, compiled"] = partial(sliced, backend)
    if whole:
        peers["published"] = lambda: Peer(
            partial(published_shift, image, case.offsets),
            truth("zeros"),
            same=partial(same, padding="zeros"),
        )
    about: dict[str, Any] = {"op": "shift, bilinear", "shape": case.text()}
    about |= {"output_bytes": out.nbytes, "input_bytes": image.nbytes}
    bench.row(about, peers, True, dtype)


def ceilings(clock: Clock, size: int, rounds: int) -> dict[str, Any]:
    """TB/s of writing, and of reading and writing, ``size`` bytes."""
    source = torch.randn(size // 4, device=clock.device)
    to = torch.empty_like(source)
    calls: dict[str, Call] = {"fill": lambda: to.fill_(1.5), "copy": lambda: to.copy_(source)}
    readings = clock.interleaved(calls, rounds)
    moved = {"fill": size, "copy": 2 * size}
    return {
        "bytes": size,
        **{
            f"{name}_TB_per_s": quartiles([1e-6 * moved[name] / us for us in readings[name]])
            for name in calls
        },
    }


# ---- tables -------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Microseconds of ours; of each peer, its time over ours. ``graph`` where it was read."""

    def median(row: dict[str, Any], name: str, *, graph: bool = False) -> float | None:
        entry = row["calls"].get(name, {})
        median: float | None = (entry.get("graph", {}) if graph else entry).get("median")
        return median

    def number(us: float | None) -> str:
        return "-" if us is None else f"{us:.1f}"

    def ratio(over: float | None, under: float | None) -> str:
        return f"{over / under:.2f}" if over is not None and under else "-"

    names = ("ours, out=", "ours, offsets on the device")
    head = ["op", "dtype", "shape", "ours, us", "ours / fill", "ours / copy"]
    head += [
        f"{name} / ours" for name in (*names, *columns) if any(name in r["calls"] for r in rows)
    ]
    head += ["in a graph: ours, us", "ours / fill"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        ours, graph = median(row, "ours"), median(row, "ours", graph=True)
        cells = [row["op"], row["dtype"], row["shape"], number(ours)]
        cells += [ratio(ours, median(row, limit)) for limit in ("fill", "copy")]
        cells += [
            ratio(median(row, h.removesuffix(" / ours")), ours)
            for h in head
            if h.endswith("/ ours")
        ]
        cells += [number(graph), ratio(graph, median(row, "fill", graph=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    peers = ("GEMM", "GEMM, tf32", "GEMM, compiled", "published", "sliced loop")
    shifts = ("slices", "slices, compiled", "grid_sample", "published")
    means = [row for row in results["rows"] if row["op"].startswith("mean")]
    moves = [row for row in results["rows"] if row["op"].startswith("shift")]
    values = [row for row in results["rows"] if row["op"].startswith(("median", "mom", "Running"))]
    failed = [
        f"- {row['op']}, {row['dtype']}, {row['shape']}: {name}: {entry['failed']}"
        for row in results["rows"]
        for name, entry in row["calls"].items()
        if "failed" in entry
    ]
    bandwidth = results["ceilings"]
    return "\n".join(
        (
            f"{results['machine']['gpu']}: fill {bandwidth['fill_TB_per_s']['median']:.2f} TB/s, "
            f"copy {bandwidth['copy_TB_per_s']['median']:.2f} TB/s (read + written)",
            "",
            table(means, peers),
            "",
            table(moves, shifts),
            "",
            table(values, ("published",)),
            "",
            "Not timed:" if failed else "",
            *failed,
        )
    )


def cases(quick: bool) -> tuple[list[Field], list[Views]]:
    grid = srt_ext.views.grid(1 if quick else 3)
    generator = torch.Generator().manual_seed(0)
    scattered = torch.rand(len(grid), 2, generator=generator) * 8 - 4
    between = grid + torch.tensor([0.25, -0.375])
    if quick:
        return [
            Field("", (3, 4), (4, 4), 16, offsets=grid),
            Field("", (3, 4), (4, 4), 16, (4, 4), grid, small=True, loops=False),
            Field("scattered ", (3, 4), (4, 4), 16, offsets=scattered, loops=False),
        ], [Views(1, (16, 20), grid, "whole"), Views(2, (16, 20), between, "between")]
    fields = [
        Field("", (14, 14), (16, 16), 384),
        Field("", (30, 53), (16, 16), 384),
        Field("", (37, 37), (14, 14), 1024),
        Field("", (14, 14), (16, 16), 384, (16, 16), small=True, loops=False),
        Field("", (30, 53), (16, 16), 384, (4, 4), loops=False),
        Field("scattered ", (14, 14), (16, 16), 384, offsets=scattered, loops=False),
    ]
    views = [
        Views(batch, size, offsets, name)
        for batch, size in ((1, (224, 224)), (8, (224, 224)), (1, (480, 848)))
        for offsets, name in ((grid, "whole"), (between, "between"))
    ]
    return fields, views


def main(
    output_folder: Annotated[Path, typer.Option("--output")] = RESULTS,
    device: str = "cuda",
    quick: bool = False,
    rounds: int = 20,
    commit: str = "",
    seconds: float = 210,
) -> None:
    """Measures, writes the JSON after every row, prints the tables.

    What there is no time for in ``seconds`` is left out and named: first what has to be compiled,
    then the slow loops, then everything.
    """
    clock = Clock(torch.device(device))
    bench = Bench(clock, 3 if quick else rounds, seconds)
    facts = {"gpu": "none", **machine()}
    if commit:
        facts["commit"] = commit
    if clock.gpu:
        properties = torch.cuda.get_device_properties(clock.device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": output(*query).partition("\n")[0],
            "cuda": torch.version.cuda,
        }
    results: dict[str, Any] = {
        "machine": facts,
        "unit": "us",
        "rounds": bench.rounds,
        "ceilings": ceilings(clock, 2**22 if quick else 2**31, bench.rounds),
        "rows": bench.rows,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    path = output_folder / f"cuda-{slug}.json"
    fields, views = cases(quick)
    for dtype in DTYPES:
        work = [partial(measure_views, bench, case, dtype) for case in views]
        work += [
            partial(measure_field, bench, case, dtype, upsample)
            for case in fields
            for upsample in ("bilinear", "nearest")
        ]
        work += [
            partial(measure_values, bench, case, dtype, upsample)
            for case in fields
            if dtype != torch.float16 and not case.name
            for upsample in ("bilinear", "nearest")
        ]
        for step in work:
            try:
                step()
            except Exception as error:  # the rows that were read are written all the same
                bench.wrong.append(f"{step.args[1].text()} {name_of(dtype)}: {reason(error)}")
                traceback.print_exc()
            results |= {"wrong": bench.wrong, "seconds": round(bench.elapsed(), 1)}
            part = path.with_suffix(".part")
            save(results, part)
            part.replace(path)
    print(tables(results))
    if bench.wrong:
        print("WRONG:", *bench.wrong, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
