"""The measurements: every op, its lower bounds and its alternatives, interleaved in one run.

On a GPU a reading is the device time between two events, with a cold L2: before it, a buffer
several times as large as L2 is read (not written: written lines would be evicted while the call
runs). A wait on the device hides the launches. Small calls are also measured as a CUDA graph of
many calls. On the CPU a reading is the time of the call; the result is freed after the clock stops.
Readings of all calls are taken in turn; medians and quartiles are stored. Every result is compared
with the float64 oracle before the call is timed, and the result of an alternative also with
srt_ext. A failed or wrong call is listed with the reason.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

import benchmarks
import srt_ext
from benchmarks.common import quartiles
from benchmarks.peers import (
    published_ensemble,
    published_median,
    published_shift,
    published_windows,
    sampled_shift,
    sampled_windows,
    sampling_grid,
    separable_ensemble,
    sliced_ensemble,
    sliced_shift,
    window_places,
)
from srt_ext import reference

Pair = tuple[int, int]
Call = Callable[[], Any]

M_MMAP_THRESHOLD = -3  # of mallopt
FLUSH = 256 * 2**20  # bytes, several times the L2 of any GPU
WAIT = 400_000  # clock cycles, about 0.2 ms: the least wait before a call while it is launched
CYCLES = 2e9  # per second, at most
WARM_UP = 2  # readings
SLOW, FEW = 0.5e6, 3  # calls of more than SLOW microseconds are read FEW times
ONCE = 5e6  # slower calls are read once, while they are checked
IN_A_GRAPH = 50
CROP = 8  # channels compared with the oracle
CHECKED = 500  # points whose gradients are compared with the oracle
LARGEST_STACK = 2**33  # bytes of all views at pixel scale
SMALL_RESULT = 2**26  # bytes; calls with smaller results are also measured as a graph
COMPILE_UNTIL, SLOW_UNTIL = 0.5, 0.7  # shares of the time limit; later, slow calls are skipped
DEFAULT = "best:16"  # views=16 of SRT


# ---- readings -----------------------------------------------------------------------------------


class Clock:
    """Microseconds of calls: by events on a GPU, by perf_counter on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.flush = torch.zeros(FLUSH // 4 if self.gpu else 1, device=device)
        self.read = torch.zeros((), device=device)
        if sys.platform.startswith("linux"):
            # Gives every call new memory for its result. By default glibc's malloc may reuse
            # memory that was freed before.
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)

    def interleaved(self, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        readings: dict[str, list[float]] = {name: [] for name in calls}
        until = dict.fromkeys(calls, rounds)
        waits = dict.fromkeys(calls, WAIT)
        for i in range(-WARM_UP, rounds):
            pending = {
                name: self._start(calls[name], waits[name]) for name in calls if i < until[name]
            }
            self.wait()
            for name, (reading, launched) in pending.items():
                us = reading()
                waits[name] = max(WAIT, int(1.5 * launched * CYCLES))
                if i >= 0:
                    readings[name].append(us)
                elif us > SLOW:
                    until[name] = FEW
        return readings

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def works(self) -> bool:
        """Whether the device still works: after some kernel errors every later call fails."""
        try:
            self.wait()
        except RuntimeError:
            return False
        return True

    def _start(self, call: Call, wait: int) -> tuple[Callable[[], float], float]:
        """Run a call after ``wait`` cycles on the device, so that the host is ahead of it.

        Returns a function that returns the reading, and the seconds that the host took to launch.
        """
        if not self.gpu:
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            del result
            return lambda: 1e6 * elapsed, elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self.flush, 0, out=self.read)
        torch.cuda._sleep(wait)
        begin.record()
        start = time.perf_counter()
        call()
        launched = time.perf_counter() - start
        end.record()
        return lambda: 1e3 * begin.elapsed_time(end), launched

    def replayed(self, call: Call, rounds: int) -> list[float]:
        """Readings of one call of a graph of many; L2 is warm."""
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


@contextmanager
def kernels(name: str) -> Iterator[None]:
    torch.ops.srt._force_cpu_kernels(name)
    try:
        yield
    finally:
        torch.ops.srt._force_cpu_kernels("auto")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def within(context: Callable[[], Any], call: Call) -> Call:
    def inside() -> Any:
        with context():
            return call()

    return inside


def is_loop(name: str) -> bool:
    """Alternatives of many launches: far slower, and skipped first near the time limit."""
    return name.startswith(("published", "sliced"))


def fill_huge_pages(like: torch.Tensor) -> torch.Tensor:
    """Allocate + fill, in huge pages (if the machine has them)."""
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).fill_(1.0)


# ---- calls --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    call: Call
    truth: torch.Tensor | None = None  # expected result, CROP channels; None for a lower bound
    crop: Callable[[torch.Tensor], torch.Tensor] = lambda result: result
    same: Call | None = None  # srt_ext with the same result: compared in full
    coarse: bool = False  # computes in tf32
    into: torch.Tensor | None = None  # the buffer for the result
    compared: Call | None = None  # returns the result to compare


@dataclass
class Bench:
    clock: Clock
    rounds: int
    seconds: float  # time limit
    compiler: str  # of torch.compile
    save: Callable[[], None] = lambda: None  # of all rows so far
    rows: list[dict[str, Any]] = field(default_factory=list)
    end_to_end: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # of srt_ext
    kept: list[dict[str, Any]] = field(default_factory=list)  # rows of an interrupted run

    def elapsed(self) -> float:
        return time.monotonic() - benchmarks.STARTED

    def row(
        self,
        about: dict[str, Any],
        peers: dict[str, Callable[[], Peer]],
        graph: bool,
        dtype: torch.dtype,
    ) -> None:
        """Check and time all calls. Each is built here, so that a failure affects it alone."""
        title = f"{about['op']}, {name_of(dtype)}, {about['shape']}"
        new = {**about, "dtype": name_of(dtype)}
        for row in self.kept:
            if all(row.get(key) == value for key, value in as_json(new).items()):
                self.rows.append(row)
                return
        calls: dict[str, Call] = {}
        results: dict[str, dict[str, Any]] = {}
        for name, make in peers.items():
            late = COMPILE_UNTIL if "compiled" in name else SLOW_UNTIL
            slow = "compiled" in name or is_loop(name)
            if slow and self.elapsed() > late * self.seconds:
                results[name] = {"failed": "skipped: time limit"}
                continue
            try:
                peer = make()
                results[name], us = self.check(name, peer, dtype)
            except Exception as error:
                results[name] = {"failed": reason(error)}
            if "failed" not in results[name]:
                if us < ONCE:
                    calls[name] = peer.call
                else:
                    results[name].update(quartiles([us]))
            elif name.startswith("ours") or "difference" in results[name]:
                self.wrong.append(f"{title}: {name}: {results[name]['failed']}")
        try:
            for name, us in self.clock.interleaved(calls, self.rounds).items():
                results[name].update(quartiles(us))
        except Exception as error:
            self.wrong.append(f"{title}: {reason(error)}")
            results |= {name: {"failed": reason(error)} for name in calls}
            graph = False
        if graph:
            for name, call in calls.items():
                if is_loop(name) or "compiled" in name:
                    continue
                try:
                    results[name]["graph"] = quartiles(self.clock.replayed(call, 5))
                except Exception as error:
                    results[name]["graph"] = {"failed": reason(error)}
                    if name.startswith("ours"):
                        self.wrong.append(f"{title}: {name} in a graph: {reason(error)}")
        self.rows.append({**new, "calls": results})
        medians = {name: f"{r['median']:.1f}" for name, r in results.items() if "median" in r}
        failed = [f"({name} failed)" for name, r in results.items() if "failed" in r]
        print(f"[{self.elapsed():5.1f} s] {title}: {medians}", *failed, flush=True)
        self.save()

    def check(self, name: str, peer: Peer, dtype: torch.dtype) -> tuple[dict[str, Any], float]:
        """The relative error (of norms), or the reason not to time the call; and microseconds."""
        if "compiled" in name:
            peer.call()
        self.clock.wait()
        if peer.into is not None:
            peer.into.fill_(float("nan"))
        start = time.perf_counter()
        result = peer.call()
        self.clock.wait()
        us = 1e6 * (time.perf_counter() - start)
        if peer.compared is not None:
            result = peer.compared()
        return compare(name, result, peer, dtype), us


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(value))
    return read


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(name: str, result: torch.Tensor, peer: Peer, dtype: torch.dtype) -> dict[str, Any]:
    if peer.truth is None:
        return {}
    error = ((peer.crop(result).double() - peer.truth).norm() / peer.truth.norm()).item()
    eps = 2.0**-10 if peer.coarse else torch.finfo(dtype).eps
    # srt_ext sums in float32 or float64 and rounds to 16 bits once. The bound of the mean is 4
    # times the error of sums of its type, about eps. Alternatives round every step, loops every
    # view; an alternative that shifts pixels wrongly has an error of tenths.
    is_ours = name.startswith("ours")
    allowed = (1 if torch.finfo(dtype).bits == 16 else 4) * eps if is_ours else max(8 * eps, 1e-4)
    if not error <= allowed:  # written so that NaN fails
        return {"failed": f"wrong in this dtype: relative error {error:.2g}", "error": error}
    if peer.same is None:
        return {"error": error}
    ours = peer.same()
    norm = partial(torch.linalg.vector_norm, dtype=torch.promote_types(dtype, torch.float32))
    difference = (norm(result - ours) / norm(ours)).item()
    found = {"error": error, "difference": difference}
    if not difference <= 2 * allowed:  # though the channels compared with the oracle are correct
        return {"failed": f"differs from srt_ext by {difference:.2g}", **found}
    return found


@dataclass(frozen=True)
class Field:
    """A shape of ensemble."""

    name: str
    grid: Pair
    patch: Pair
    channels: int
    stride: Pair = (1, 1)
    offsets: torch.Tensor = field(default_factory=lambda: srt_ext.views.grid(3).offsets)
    small: bool = False
    loops: bool = True  # measure the loops over views (whole pixels, stride 1, float32 only)
    compiled: bool = True  # measure the alternatives under torch.compile
    growth: bool = False  # a point of a curve: measure only the plotted calls

    def pixels(self) -> Pair:
        return (self.grid[0] * self.patch[0], self.grid[1] * self.patch[1])

    def text(self) -> str:
        height, width = self.pixels()
        return (
            f"{self.name}{height}x{width} P={self.patch[0]} C={self.channels} "
            f"V={len(self.offsets)}" + (f" stride {self.stride[0]}" if self.stride[0] > 1 else "")
        )

    def numbers(self) -> dict[str, Any]:
        return {
            "grid": self.grid,
            "patch": self.patch,
            "stride": self.stride,
            "channels": self.channels,
            "views": len(self.offsets),
            "offsets": self.name.strip() or "grid",
            "growth": self.growth,
        }


@dataclass(frozen=True)
class Views:
    """A shape of shift."""

    batch: int
    size: Pair
    offsets: torch.Tensor
    name: str
    loops: bool = True
    compiled: bool = True

    def text(self) -> str:
        return f"{self.batch}x3x{self.size[0]}x{self.size[1]} V={len(self.offsets)} {self.name}"


@dataclass(frozen=True)
class Places:
    """A shape of windows: ``count`` per image, inside the image."""

    batch: int
    size: Pair
    count: int
    patch: int

    def text(self) -> str:
        return f"{self.batch}x3x{self.size[0]}x{self.size[1]} N={self.count} P={self.patch}"

    def centers(self, device: torch.device) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        where = torch.rand(self.batch, self.count, 2, generator=generator)
        room = torch.tensor(self.size) - self.patch - 4
        return (where * room + self.patch / 2 + 2).to(device)


@dataclass(frozen=True)
class Points:
    """A shape of sample: ``count`` points, at least a cell from the edges of the field."""

    cells: Pair
    channels: int
    count: int
    stride: Pair

    def text(self) -> str:
        height, width = self.cells
        shape = f"1x{self.channels}x{height}x{width}"
        return f"{shape} N={self.count} stride {self.stride[0]}"

    def points(self, device: torch.device) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        where = torch.rand(1, self.count, 2, generator=generator)
        room = torch.tensor(self.cells) - 2
        return ((where * room + 1) * torch.tensor(self.stride)).to(device)


def limits(bench: Bench, out: torch.Tensor) -> dict[str, Callable[[], Peer]]:
    """Lower bounds: fill and copy of a result like ``out``, warm and newly allocated."""
    source = torch.rand_like(out)  # with its strides
    calls: dict[str, Call] = {
        "fill": lambda: out.fill_(1.0),
        "copy": lambda: out.copy_(source),
    }
    if not bench.clock.gpu:  # on a GPU memory comes from a cache
        calls |= {
            "allocate + fill": lambda: torch.empty_like(out).fill_(1.0),
            "allocate + fill, huge pages": lambda: fill_huge_pages(out),
            "allocate + copy": source.clone,
        }
    return {name: partial(Peer, call) for name, call in calls.items()}


def on_the_cpu(bench: Bench, call: Call, peer: Callable[..., Peer]) -> dict[str, Any]:
    """The same call on one thread, and with the kernels of each smaller instruction set."""
    if bench.clock.gpu:
        return {}
    sets = torch.ops.srt._available_cpu_kernels().split(",")
    calls = {"one thread": within(partial(threads, 1), call)} | {
        name: within(partial(kernels, name), call) for name in sets[:-1]
    }
    return {f"ours, out=, {name}": partial(peer, run) for name, run in calls.items()}


def backward(call: Callable[[torch.Tensor], Any], of: torch.Tensor, by: torch.Tensor) -> Call:
    """A call that computes the gradient of ``of``. The forward pass runs once, here."""
    of = of.detach().requires_grad_()
    result = call(of)
    results = (result,) if isinstance(result, torch.Tensor) else result
    grads = [by] * len(results)
    return lambda: torch.autograd.grad(results, of, grads, retain_graph=True)[0]


class Sample:
    """Arguments of a call of ensemble, an output buffer, and the exact result of some channels."""

    def __init__(
        self, case: Field, dtype: torch.dtype, upsample: str, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        shape = (len(case.offsets), 1, case.grid[0] * case.grid[1], case.channels)
        self.case, self.dtype, self.upsample, self.device = case, dtype, upsample, device
        self.tokens = torch.randn(shape, device=device).to(dtype)
        self.place = (case.offsets, case.grid, case.patch)
        self.modes: dict[str, Any] = {"upsample": upsample, "stride": case.stride}
        cells = (g * p // s for g, p, s in zip(case.grid, case.patch, case.stride, strict=True))
        form = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
        self.out = torch.empty(1, case.channels, *cells, **form)
        picked = torch.linspace(0, case.channels - 1, min(CROP, case.channels))
        self.picked = picked.long().to(device)

    def truth(self, views: int | None = None, **modes: Any) -> torch.Tensor:
        some = self.tokens[:views, ..., self.picked]
        offsets, *place = self.place
        with torch.device(self.device):
            return reference.ensemble(some, offsets[:views], *place, **self.modes, **modes)

    def crop(self, result: torch.Tensor) -> torch.Tensor:
        return result[:, self.picked]

    def moments(self, **modes: Any) -> Peer:
        call = partial(srt_ext.ensemble_moments, **self.modes, **modes)
        exact = partial(reference.ensemble_moments, **self.modes, **modes)
        with torch.device(self.device):
            truth = torch.stack(exact(self.tokens[..., self.picked], *self.place))

        def crop(result: Any) -> torch.Tensor:
            return torch.stack([self.crop(moment) for moment in result])

        return Peer(partial(call, self.tokens, *self.place), truth, crop)

    def gradient(self, function: str, grad: torch.Tensor, **modes: Any) -> Peer:
        picked = self.picked[:1]  # because the oracle's graph keeps pixel maps of every view
        forward, exact = (
            partial(getattr(module, function), **self.modes, **modes)
            for module in (srt_ext, reference)
        )
        with torch.device(self.device):
            truth = backward(
                lambda t: exact(t, *self.place),
                self.tokens[..., picked].double(),
                grad[:, picked].double(),
            )()
        call = backward(lambda t: forward(t, *self.place), self.tokens, grad)
        return Peer(call, truth, lambda result: result[..., picked])

    def about(self, op: str) -> dict[str, Any]:
        row = {"op": f"{op}, {self.upsample}", "shape": self.case.text(), **self.case.numbers()}
        return row | {"output_bytes": self.out.nbytes, "input_bytes": self.tokens.nbytes}


def measure_mean(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    sample = Sample(case, dtype, upsample, bench.clock.device)
    tokens, place, modes = sample.tokens, sample.place, sample.modes
    fresh = partial(srt_ext.ensemble, tokens, *place, **modes)
    into = partial(fresh, out=sample.out)
    crop = sample.crop
    ours = partial(Peer, truth=sample.truth(), crop=crop)
    writes = partial(ours, into=sample.out)

    def loop(function: Callable[..., torch.Tensor]) -> Callable[[], Peer]:
        call = partial(function, tokens, *place, upsample)
        return lambda: Peer(
            call, sample.truth(border="zeros"), crop, partial(fresh, border="zeros")
        )

    function, tables = separable_ensemble(*place, case.stride, upsample, "coverage", tokens)

    def gemm(precision: str = "highest", backend: str | None = None) -> Peer:
        matmuls = function
        if backend is not None:
            torch.compiler.reset()  # the recompile limit counts the sizes of earlier rows
            matmuls = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

        def call() -> torch.Tensor:
            torch.set_float32_matmul_precision(precision)
            try:
                return matmuls(tokens, *tables)
            finally:
                torch.set_float32_matmul_precision("highest")

        return ours(call, same=fresh, coarse=precision == "high")

    peers: dict[str, Callable[[], Peer]] = {
        "ours": partial(ours, fresh),
        "ours, out=": partial(writes, into),
        **on_the_cpu(bench, into, writes),
    }
    peers |= limits(bench, sample.out)
    peers["read the tokens"] = lambda: Peer(tokens.sum)
    peers["GEMM"] = gemm
    if case.compiled:
        peers["GEMM, compiled"] = partial(gemm, backend=bench.compiler)
    if bench.clock.gpu:
        on_device = (case.offsets.to(sample.device), *place[1:])
        peers["ours, offsets on the device"] = partial(
            ours, partial(srt_ext.ensemble, tokens, *on_device, **modes)
        )
        if dtype == torch.float32:
            peers["GEMM, tf32"] = partial(gemm, "high")
    if case.loops and dtype == torch.float32:
        peers["published"] = loop(published_ensemble)
        peers["sliced loop"] = loop(sliced_ensemble)
    if case.growth:
        plotted = ("ours", "allocate + fill", "GEMM", "published")
        peers = {name: peers[name] for name in plotted}
    bench.row(sample.about("mean"), peers, case.small, dtype)


def measure_read(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    """The mean, followed by a read of it: shows whether the result is still in the cache."""
    sample = Sample(case, dtype, upsample, bench.clock.device)
    out = sample.out
    mean = partial(srt_ext.ensemble, sample.tokens, *sample.place, **sample.modes, out=out)
    fill = partial(out.fill_, 1.0)

    def then_sum(write: Call) -> Call:
        def both() -> torch.Tensor:
            write()
            return out.sum()

        return both

    ours = partial(Peer, truth=sample.truth(), crop=sample.crop, into=out, compared=lambda: out)
    peers: dict[str, Callable[[], Peer]] = {
        "ours": partial(ours, then_sum(mean)),
        "ours, not read": partial(ours, mean),
        "fill": partial(Peer, fill),
        "fill, sum": partial(Peer, then_sum(fill)),
        "sum": partial(Peer, out.sum),
        "read the tokens": partial(Peer, sample.tokens.sum),
    }
    bench.row(sample.about("mean, then sum"), peers, False, dtype)


def measure_median(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    sample = Sample(case, dtype, upsample, bench.clock.device)
    median = partial(
        srt_ext.ensemble, sample.tokens, *sample.place, reduce="median", **sample.modes
    )
    into = partial(median, out=sample.out)
    crop = sample.crop
    ours = partial(Peer, truth=sample.truth(reduce="median"), crop=crop)
    writes = partial(ours, into=sample.out)
    peers: dict[str, Callable[[], Peer]] = {
        "ours": partial(ours, median),
        "ours, out=": partial(writes, into),
        **on_the_cpu(bench, into, writes),
        **limits(bench, sample.out),
    }
    few = len(case.offsets) * sample.out.nbytes < LARGEST_STACK
    if case.loops and dtype == torch.float32 and few:
        stack = partial(published_median, sample.tokens, *sample.place, upsample)
        peers["published"] = lambda: Peer(
            stack,
            sample.truth(reduce="median", border="zeros"),
            crop,
            partial(median, border="zeros"),
        )
    bench.row(sample.about("median"), peers, case.small, dtype)


def measure_moments(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    sample = Sample(case, dtype, upsample, bench.clock.device)
    two = torch.empty(2, *sample.out.shape, dtype=dtype, device=sample.device)
    peers: dict[str, Callable[[], Peer]] = {"ours": sample.moments}
    bench.row(sample.about("moments"), peers | limits(bench, two), case.small, dtype)


def measure_streams(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    """An update of each running state with 8 views."""
    sample = Sample(case, dtype, upsample, bench.clock.device)
    planes = {srt_ext.RunningMean: 1, srt_ext.RunningMoments: 2, srt_ext.RunningMedian: 8}
    for kind, count in planes.items():

        def run(views: int, kind: Any = kind) -> Any:
            running = kind(case.grid, case.patch, **sample.modes)
            running.update(sample.tokens[:views], case.offsets[:views])
            return running

        def exact(kind: Any = kind, run: Call = run) -> Peer:
            """Compares 7 views: up to that count the median of a stream is exact."""
            reduce = "median" if kind is srt_ext.RunningMedian else "mean"
            truth = sample.truth(views=7, reduce=reduce)
            call = partial(run(8).update, sample.tokens[:8], case.offsets[:8])
            return Peer(call, truth, sample.crop, compared=lambda: run(7).result())

        # The bounds are of a state, whose dtype is at least float32.
        sums = torch.promote_types(dtype, torch.float32)
        state = torch.empty(count, *sample.out.shape, device=sample.device, dtype=sums)
        peers: dict[str, Callable[[], Peer]] = {"ours": exact, **limits(bench, state)}
        bench.row(sample.about(f"{kind.__name__} of 8 views"), peers, case.small, dtype)


def measure_gradients(bench: Bench, case: Field, dtype: torch.dtype, upsample: str) -> None:
    """The backward pass of a mean, which has kernels, and its forward pass."""
    _measure_gradients(bench, case, dtype, upsample, ["mean"])


def measure_recomputed_gradients(
    bench: Bench, case: Field, dtype: torch.dtype, upsample: str
) -> None:
    """The backward passes of median and moments, which are recomputed view by view."""
    _measure_gradients(bench, case, dtype, upsample, ["median", "moments"])


def _measure_gradients(
    bench: Bench, case: Field, dtype: torch.dtype, upsample: str, ops: list[str]
) -> None:
    sample = Sample(case, dtype, upsample, bench.clock.device)
    tokens, place, modes = sample.tokens, sample.place, sample.modes
    grad = torch.randn_like(sample.out)

    def gemm() -> Peer:
        function, tables = separable_ensemble(*place, case.stride, upsample, "coverage", tokens)
        same = backward(lambda t: srt_ext.ensemble(t, *place, **modes), tokens, grad)
        return Peer(backward(lambda t: function(t, *tables), tokens, grad), same=same)

    for op in ops:
        if op == "median" and torch.finfo(dtype).bits == 16:
            continue  # any of several equal views may be the median: not comparable
        kind = {} if op == "moments" else {"reduce": op}
        function = "ensemble_moments" if op == "moments" else "ensemble"
        forward = partial(getattr(srt_ext, function), tokens, *place, **modes, **kind)
        peers: dict[str, Callable[[], Peer]] = {
            "ours": partial(sample.gradient, function, grad, **kind),
            "ours, forward": partial(Peer, forward),
            "read the gradient": lambda: Peer(grad.sum),
        }
        if op == "mean" and case.loops:
            peers["GEMM"] = gemm
        bench.row(sample.about(f"gradient of {op}"), peers, False, dtype)


def measure_circular(bench: Bench, case: Field, dtype: torch.dtype, upsample: str, op: str) -> None:
    """The same call with both borders, into a warm buffer where the op has ``out=``."""
    sample = Sample(case, dtype, upsample, bench.clock.device)
    grad = torch.randn_like(sample.out)

    out = sample.out if op in ("mean", "median") else None

    def ours(border: str) -> Peer:
        if op == "moments":
            return sample.moments(border=border)
        if op == "gradient of mean":
            return sample.gradient("ensemble", grad, border=border)
        modes = {**sample.modes, "reduce": op, "border": border, "out": out}
        call = partial(srt_ext.ensemble, sample.tokens, *sample.place, **modes)
        return Peer(call, sample.truth(reduce=op, border=border), sample.crop, into=out)

    peers: dict[str, Callable[[], Peer]] = {
        "ours": partial(ours, "circular"),
        "ours, coverage": partial(ours, "coverage"),
    }
    bench.row(sample.about(f"circular {op}"), peers, False, dtype)


def measure_views(bench: Bench, case: Views, dtype: torch.dtype) -> None:
    device = bench.clock.device
    torch.manual_seed(0)
    image = torch.rand(case.batch, 3, *case.size, device=device).to(dtype)
    out = torch.empty(len(case.offsets), *image.shape, dtype=dtype, device=device)
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

    peers: dict[str, Callable[[], Peer]] = {
        "ours": ours(case.offsets),
        **limits(bench, out),
        "slices": sliced,
        "grid_sample": sampled,
    }
    if bench.clock.gpu:
        peers["ours, offsets on the device"] = ours(on_device)
    # Each compiles to dozens of kernels, which takes seconds.
    if case.compiled and case.batch == 1 and dtype != torch.float16:
        peers["slices, compiled"] = partial(sliced, bench.compiler)
    if whole and case.loops:
        peers["published"] = lambda: Peer(
            partial(published_shift, image, case.offsets),
            truth("zeros"),
            same=partial(same, padding="zeros"),
        )
    about: dict[str, Any] = {"op": "shift, bilinear", "shape": case.text()}
    about |= {"views": len(case.offsets), "offsets": case.name}
    about |= {"output_bytes": out.nbytes, "input_bytes": image.nbytes}
    bench.row(about, peers, out.nbytes < SMALL_RESULT, dtype)


def measure_windows(bench: Bench, case: Places, dtype: torch.dtype) -> None:
    """Windows, and the same with the gradient of their centers."""
    device, patch = bench.clock.device, case.patch
    torch.manual_seed(0)
    image = torch.rand(case.batch, 3, *case.size, device=device).to(dtype)
    centers = case.centers(device)
    size = torch.tensor(case.size, device=device)
    # The scale of the published sampler: P samples over P pixels, ends included.
    spread = 2 * patch * size / (size.sum() * (patch - 1))
    parts = (centers - 0.5) / size
    ours = partial(srt_ext.windows, image, size=(patch, patch))
    shape = (case.batch, case.count, 3, patch, patch)
    out = torch.empty(shape, dtype=dtype, device=device)

    grad = torch.randn_like(out)

    def gradient(forward: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> Call:
        """Gradient of ``at``; the call includes the forward pass."""
        leaf = at.detach().clone().requires_grad_()

        def call() -> torch.Tensor:
            result = forward(leaf)
            return torch.autograd.grad(result, leaf, grad.to(result.dtype))[0]

        return call

    def exact(at: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        with torch.device(device):
            return reference.windows(image, at, (patch, patch), scale)

    # Alternatives round positions to float32: near the centre of a pixel another slope results.

    def sampled(at: torch.Tensor) -> torch.Tensor:
        return sampled_windows(image, window_places(at, patch, case.size).to(dtype))

    truth, wide = exact(centers), exact(centers, spread)
    places = window_places(centers, patch, case.size).to(dtype)
    published = partial(published_windows, image, patch=patch)
    peers: dict[str, Callable[[], Peer]] = {
        "ours": lambda: Peer(lambda: ours(centers), truth),
        "ours, scale": lambda: Peer(lambda: ours(centers, scale=spread), wide),
        **limits(bench, out),
        "grid_sample": lambda: Peer(lambda: sampled_windows(image, places), truth),
    }
    both: dict[str, Callable[[], Peer]] = {
        "ours": lambda: Peer(gradient(ours, centers), gradient(exact, centers)()),
        "ours, scale": lambda: Peer(gradient(partial(ours, scale=spread), centers)),
        "grid_sample": lambda: Peer(gradient(sampled, centers)),
    }
    if dtype == torch.float32:
        peers["published"] = lambda: Peer(lambda: published(parts), wide)
        both["published"] = lambda: Peer(gradient(published, parts))
    about: dict[str, Any] = {"shape": case.text(), "views": case.count}
    about |= {"output_bytes": out.nbytes, "input_bytes": image.nbytes}
    bench.row({"op": "windows", **about}, peers, out.nbytes < SMALL_RESULT, dtype)
    bench.row({"op": "windows and gradient of centers", **about}, both, False, dtype)


class FieldPoints:
    """Arguments of a call of sample, for srt_ext, for grid_sample and for the oracle."""

    def __init__(self, case: Points, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        field = torch.randn(1, case.channels, *case.cells, device=device).to(dtype)
        self.field = field.contiguous(memory_format=torch.channels_last)
        self.fields = {"grid_sample": self.field, "grid_sample, contiguous": field}
        self.points = case.points(device)
        self.out = torch.empty(1, case.count, case.channels, dtype=dtype, device=device)
        self.ours = partial(srt_ext.sample, stride=case.stride)
        self.case = case
        self.stride = torch.tensor(case.stride, device=device)
        self.picked = torch.linspace(0, case.channels - 1, min(CROP, case.channels)).long()

    def exact(self, field: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        with torch.device(field.device):
            return reference.windows(field, points.double() / self.stride, (1, 1)).flatten(2)

    def sampled(self, field: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        places = window_places(points / self.stride, 1, self.case.cells).to(field)
        return sampled_windows(field, places).flatten(2)

    def about(self, op: str) -> dict[str, Any]:
        row = {"op": op, "shape": self.case.text(), "views": self.case.count}
        return row | {"output_bytes": self.out.nbytes, "input_bytes": self.field.nbytes}


def measure_sample(bench: Bench, case: Points, dtype: torch.dtype) -> None:
    sample = FieldPoints(case, dtype, bench.clock.device)
    field, points, picked = sample.field, sample.points, sample.picked
    truth = sample.exact(field[:, picked], points)
    places = window_places(points / sample.stride, 1, case.cells).to(dtype)
    checked = partial(Peer, truth=truth, crop=lambda result: result[..., picked])
    peers: dict[str, Callable[[], Peer]] = {
        "ours": partial(checked, partial(sample.ours, field, points)),
        **limits(bench, sample.out),
    }
    for name, of in sample.fields.items():
        call = partial(sampled_windows, of, places)
        peers[name] = lambda call=call: checked(lambda: call().flatten(2))
    bench.row(sample.about("sample"), peers, sample.out.nbytes < SMALL_RESULT, dtype)


def measure_sample_gradients(bench: Bench, case: Points, dtype: torch.dtype) -> None:
    """Gradients of points (the first are checked) and of the field (some channels are)."""
    sample = FieldPoints(case, dtype, bench.clock.device)
    field, points, picked = sample.field, sample.points, sample.picked
    grad = torch.randn_like(sample.out)
    first = slice(CHECKED)
    exact = partial(sample.exact, field)
    of_points = backward(exact, points[:, first], grad[:, first].double())()
    exact = partial(sample.exact, points=points)
    of_field = backward(exact, field[:, picked].double(), grad[..., picked].double())()

    def to_points(function: Callable[..., torch.Tensor], of: torch.Tensor) -> Call:
        return backward(partial(function, of), points, grad)

    def to_field(function: Callable[..., torch.Tensor], of: torch.Tensor) -> Peer:
        call = backward(partial(function, points=points), of, grad)
        return Peer(call, of_field, lambda result: result[:, picked])

    points_peers: dict[str, Callable[[], Peer]] = {
        "ours": lambda: Peer(to_points(sample.ours, field), of_points, lambda g: g[:, first])
    }
    field_peers: dict[str, Callable[[], Peer]] = {"ours": partial(to_field, sample.ours, field)}
    for name, of in sample.fields.items():
        # Not compared: near the centre of a cell, float32 positions select another slope.
        points_peers[name] = lambda of=of: Peer(to_points(sample.sampled, of))
        field_peers[name] = partial(to_field, sample.sampled, of)
    bench.row(sample.about("sample, gradient of points"), points_peers, False, dtype)
    bench.row(sample.about("sample, gradient of field"), field_peers, False, dtype)


def ceilings(clock: Clock, size: int, rounds: int) -> dict[str, Any]:
    """TB/s of a fill and of a copy (read + written) of ``size`` bytes."""
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


# ---- the plan -----------------------------------------------------------------------------------

Step = partial[None]  # called with a Bench
UPSAMPLES = ("bilinear", "nearest")
VALUES = (measure_median, measure_moments, measure_streams)
WINDOWS = Places(32, (224, 224), 25, 16)
POINTS = Points((120, 212), 384, 20_000, (4, 4))
CIRCULAR = ("mean", "median", "moments", "gradient of mean")
TOKENS, SMALL = (14, 14), (16, 16)  # 224 x 224 in patches of 16
DAVIS, LARGE = (30, 53), (37, 37)  # 480 x 848; 518 x 518 in patches of 14, as of DINOv2


def plan(extent: str) -> list[Step]:
    """The steps of an extent, most important first.

    "main" has the main shapes on the CPU, "full" all shapes on the CPU; "core" and "rest" are for a
    GPU; "walk" runs the code of these two with tiny shapes.
    """
    if extent == "core":
        return _core(REAL)
    if extent == "rest":
        return _rest(REAL)
    if extent == "walk":
        return _core(TINY) + _rest(TINY)
    return _main() + (_on_cpu() if extent == "full" else [])


def title(step: Step) -> str:
    """The name of a step in the list of skipped steps."""

    def word(value: Any) -> str:
        if isinstance(value, torch.dtype):
            return name_of(value)
        return str(value.text() if isinstance(value, (Field, Views, Places, Points)) else value)

    return ", ".join([step.func.__name__, *map(word, step.keywords.values())])


def _steps(
    fields: list[Field],
    views: list[Views],
    dtype: torch.dtype,
    functions: Iterable[Callable[..., None]] = (measure_mean, *VALUES),
) -> list[Step]:
    return [
        *(partial(measure_views, case=case, dtype=dtype) for case in views),
        *(
            partial(function, case=case, dtype=dtype, upsample=upsample)
            for function in functions
            for case in fields
            for upsample in UPSAMPLES
        ),
    ]


def _each(
    function: Callable[..., None],
    cases: Iterable[Field | Views | Places | Points],
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    **modes: str,
) -> list[Step]:
    """Case by case, each in all dtypes."""
    return [
        partial(function, case=case, dtype=dtype, **modes) for case in cases for dtype in dtypes
    ]


def _circular(cases: Iterable[Field], ops: Iterable[str] = CIRCULAR) -> list[Step]:
    """Both borders, float32."""
    return [
        step
        for op in ops
        for case in cases
        for upsample in UPSAMPLES
        for step in _each(measure_circular, [case], (torch.float32,), upsample=upsample, op=op)
    ]


def _scattered(offsets: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(offsets.shape, generator=generator) * 8 - 4


def _between(offsets: torch.Tensor) -> torch.Tensor:
    return offsets + torch.tensor([0.25, -0.375])


class Sizes(NamedTuple):
    """The shapes of the plans of a GPU."""

    tokens: Field
    davis: Field
    large: Field
    stride: Pair  # a cell of several pixels
    windows: Places
    points: Points


REAL = Sizes(
    Field("", TOKENS, SMALL, 384),
    Field("", DAVIS, SMALL, 384),
    Field("", LARGE, (14, 14), 1024),
    (4, 4),
    WINDOWS,
    POINTS,
)
TINY = Sizes(
    Field("", (3, 4), (4, 4), 16),
    Field("", (4, 5), (4, 4), 16),
    Field("", (5, 5), (3, 3), 24),
    (2, 2),
    Places(2, (12, 16), 3, 4),
    Points((8, 10), 16, 5, (2, 2)),
)


def by_views(case: Field, words: str, **changed: Any) -> Field:
    """The same shape with the views of ``words``."""
    return replace(case, name=f"{words} ", offsets=srt_ext.views.parse(words).offsets, **changed)


def _pictures(sizes: Sizes, batch: int = 1, **peers: bool) -> list[Views]:
    """Both sizes, with 16 views and with a grid between the pixels."""
    default, grid = srt_ext.views.parse(DEFAULT).offsets, _between(srt_ext.views.grid(3).offsets)
    return [
        Views(batch, case.pixels(), offsets, name, **peers)
        for case in (sizes.davis, sizes.tokens)
        for offsets, name in ((default, DEFAULT), (grid, "between"))
    ]


def _core(sizes: Sizes) -> list[Step]:
    """The most important rows of a GPU, most important first. No torch.compile."""
    bare = {"loops": False, "compiled": False}
    grid, small = replace(sizes.davis, **bare), replace(sizes.tokens, **bare)
    default = by_views(grid, DEFAULT)
    coarse = replace(default, stride=sizes.stride)
    means = [
        grid,
        replace(default, loops=True),  # the published loop, once
        coarse,
        by_views(grid, "best:4"),
        by_views(grid, "best:2"),
        small,
        by_views(small, DEFAULT),
    ]
    at_tokens = replace(small, stride=small.patch, small=True)
    bilinear, nearest = ({"upsample": upsample} for upsample in UPSAMPLES)
    return [
        *_each(measure_mean, means, **bilinear),
        *_each(measure_read, [coarse], **bilinear),
        *_each(
            measure_mean,
            [replace(case, stride=sizes.stride) for case in (by_views(grid, "best:4"), grid)],
            **bilinear,
        ),
        *_each(measure_mean, [at_tokens, by_views(at_tokens, DEFAULT)], **bilinear),
        *_each(measure_views, _pictures(sizes, **bare)),
        *_each(measure_windows, [sizes.windows]),
        *(
            step
            for case in (default, grid)
            for function in (measure_median, measure_moments)
            for step in _each(function, [case], **bilinear)
        ),
        *_each(measure_mean, [default, grid], **nearest),
    ]


def _rest(sizes: Sizes) -> list[Step]:
    """The rows of a GPU that are not in the core."""
    bare = {"loops": False, "compiled": False}
    small, grid, large = (replace(case, **bare) for case in sizes[:3])
    default, small_default = by_views(grid, DEFAULT), by_views(small, DEFAULT)
    scattered = replace(small, name="scattered ", offsets=_scattered(small.offsets))
    at_tokens = replace(small, stride=small.patch, small=True)
    bilinear, nearest = ({"upsample": upsample} for upsample in UPSAMPLES)
    both = (default, grid, small_default, small)
    half = (torch.float16,)
    gradients = [replace(case, loops=True) for case in (default, small)]
    wide = by_views(grid, "grid:6:2")
    means = [wide, replace(wide, stride=sizes.stride), large, by_views(large, DEFAULT), scattered]
    return [
        *_each(measure_mean, means, **bilinear),
        *_each(measure_streams, [default], **bilinear),
        *_each(measure_gradients, gradients, **bilinear),
        *_each(
            measure_mean, [replace(case, compiled=True) for case in (default, small)], **bilinear
        ),
        *_each(measure_mean, both, half, **bilinear),
        *_each(measure_mean, [*both, replace(default, stride=sizes.stride), at_tokens], **nearest),
        *_each(measure_median, [default, small], **nearest),
        *_each(measure_moments, [default, small], **nearest),
        *_each(measure_views, _pictures(sizes, loops=False), half),
        *_each(measure_views, _pictures(sizes, batch=8)[2:]),
        *_each(measure_views, _pictures(sizes)[2:3]),
        *_each(measure_median, [default, small], half, **bilinear),
        *_each(measure_moments, [default, small], half, **bilinear),
        *_each(measure_streams, [small], half, **bilinear),
        *_each(measure_streams, [small], **nearest),
        *_each(measure_gradients, [small], **nearest),
        *_each(measure_recomputed_gradients, [small_default], (torch.float32,), **bilinear),
        *_each(measure_sample, [sizes.points]),
        *_each(measure_sample_gradients, [sizes.points]),
        *_circular([default, small]),
        *_circular([replace(default, stride=sizes.stride)], ["mean"]),
    ]


def _main() -> list[Step]:
    """On the CPU: float32, 224 x 224, 49 views and the 16 views of SRT."""
    case = Field("", TOKENS, SMALL, 384)
    default = by_views(case, DEFAULT)
    views = [
        Views(1, (224, 224), srt_ext.views.grid(3).offsets, "whole"),
        Views(1, (224, 224), default.offsets, DEFAULT),
    ]
    functions = (measure_mean, measure_median, measure_moments, measure_gradients)
    four = by_views(case, "best:4")
    return [
        *_steps([case], views, torch.float32, functions),
        *_steps([default], [], torch.float32, functions),
        *_steps([four], [], torch.float32, [measure_mean]),
        *_each(measure_windows, [WINDOWS], (torch.float32,)),
        *_each(measure_sample, [POINTS], (torch.float32,)),
        *_each(measure_sample_gradients, [POINTS], (torch.float32,)),
        *_circular([case, default]),
        *_circular([four, *(replace(c, stride=(4, 4)) for c in (case, default, four))], ["mean"]),
    ]


def _on_cpu() -> list[Step]:
    """All other rows of the CPU."""
    nine, grid, many = (srt_ext.views.grid(radius).offsets for radius in (1, 3, 7))
    main = Field("", TOKENS, SMALL, 384)
    alone = replace(main, loops=False)
    token_scale = [
        Field("", TOKENS, SMALL, 384, SMALL, offsets, small=True, loops=False)
        for offsets in (nine, grid)
    ]
    token_scale.append(by_views(token_scale[0], DEFAULT))
    davis = Field("", DAVIS, SMALL, 384, loops=False)  # one loop over its views takes minutes
    shapes = [
        davis,
        Field("", LARGE, (14, 14), 1024, loops=False),
        Field("", TOKENS, SMALL, 384, offsets=nine),
        Field("", TOKENS, SMALL, 384, offsets=many),
        Field("", TOKENS, SMALL, 768, offsets=nine),
        Field("", TOKENS, SMALL, 768),
        Field("", TOKENS, SMALL, 768, offsets=many, loops=False),
        Field("", DAVIS, SMALL, 384, (4, 4), loops=False),
        *(
            by_views(davis, words, stride=stride)
            for words in (DEFAULT, "best:4")
            for stride in ((1, 1), (4, 4))
        ),
        Field("scattered ", TOKENS, SMALL, 384, offsets=_scattered(grid), loops=False),
    ]
    whole = Views(1, (224, 224), grid, "whole")
    views = [
        Views(1, (224, 224), _between(grid), "between"),
        Views(8, (224, 224), grid, "whole"),
        Views(1, (480, 848), grid, "whole"),
    ]
    growth = [replace(main, offsets=srt_ext.views.grid(r).offsets) for r in (0, 1, 2, 3, 5, 7)]
    growth += [replace(main, grid=(n, n)) for n in (4, 7, 28, 37)]
    growth += [replace(main, channels=c) for c in (48, 96, 192, 768, 1536)]
    return [
        *_steps(token_scale, [], torch.float32, [measure_mean]),
        *_steps([main], [], torch.float32, [measure_streams]),
        *_each(
            measure_recomputed_gradients,
            [by_views(main, DEFAULT)],
            (torch.float32,),
            upsample="bilinear",
        ),
        *_steps([alone], [whole], torch.bfloat16),
        *_steps([alone], [whole], torch.float16),
        *_steps([alone], [whole], torch.float64),
        *(
            partial(
                measure_mean,
                case=replace(case, growth=True),
                dtype=torch.float32,
                upsample="bilinear",
            )
            for case in growth
        ),
        *_steps(shapes, views, torch.float32, [measure_mean]),
        *_steps([davis, by_views(davis, DEFAULT)], [], torch.float32, VALUES),
    ]
