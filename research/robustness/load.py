"""``python -m research.robustness.load forks`` or ``leaks``: forked processes, memory leaks.

``forks``: forks a process that has used the thread pool of srt_ext.numpy, from its main thread and
from another thread, while idle and while two other threads are in calls; also pools of
multiprocessing. Each child computes; its result must be correct within a time limit.

``leaks``: many calls of each kind, valid ones and ones that raise. After a warm-up the memory must
not grow, and no tensor, hook or setting may remain.

Exits with status 1 on a finding. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import srt_ext.numpy as srt

app = typer.Typer(add_completion=False)

# ---- forks --------------------------------------------------------------------------------------


def digest() -> str:
    """Hash of the results of all kernels, at sizes that use several threads. Without torch."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(9, 1, 63, 65)).astype(np.float32)
    offsets = random.uniform(-4, 4, (9, 2))
    place = (offsets, (7, 9), (8, 8))
    running = srt.RunningMoments(*place[1:])
    running.update(tokens, offsets)
    results = [srt.ensemble(tokens, *place), *srt.ensemble_moments(tokens, *place)]
    results += [srt.ensemble(tokens, *place, reduce="median"), running.result()]
    results += [srt.shift(tokens.reshape(1, 9, 65, 63), offsets)]
    return hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()


def child_status(expected: str, limit: int) -> int:
    """Exit status of a fork that computes: 0 if correct, -SIGALRM if it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(limit)
            code = 0 if digest() == expected else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """Keep ``threads`` other threads in calls."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            digest()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def in_thread(run: Callable[[], int]) -> int:
    """The result of ``run``, executed in another thread."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def pool_status(method: str, expected: str, limit: int) -> int:
    """0 if two processes of a pool compute the correct result, twice each."""
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(digest) for _ in range(4)]
        return 0 if all(result.get(limit) == expected for result in results) else 2


@app.command()
def forks(
    count: Annotated[int, typer.Option(help="Total number of forks.")] = 1000,
    limit: Annotated[int, typer.Option(help="Time limit of a child in seconds.")] = 20,
    threads: Annotated[int, typer.Option(help="Threads per call.")] = 3,
) -> None:
    """Fork a process that has used the thread pool of srt_ext.numpy."""
    srt.set_num_threads(threads)
    expected = digest()  # starts the pool
    ways: dict[str, tuple[int, Callable[[], int]]] = {
        "main thread": (0, lambda: child_status(expected, limit)),
        "another thread": (0, lambda: in_thread(lambda: child_status(expected, limit))),
        "main thread, 2 threads in calls": (2, lambda: child_status(expected, limit)),
        "another thread, 2 in calls": (2, lambda: in_thread(lambda: child_status(expected, limit))),
    }
    failed = 0
    for name, (others, run) in ways.items():
        start = time.monotonic()
        statuses: list[int] = []
        with busy(others):
            while len(statuses) < count // len(ways):
                statuses.append(run())
        failed += report(name, statuses, start)
    for method, others in (("fork", 0), ("fork", 2), ("forkserver", 2), ("spawn", 2)):
        start = time.monotonic()
        with busy(others):
            statuses = [pool_status(method, expected, 6 * limit)]  # a new Python takes seconds
        failed += report(f"multiprocessing, {method}, {others} threads in calls", statuses, start)
    if digest() != expected:
        failed += 1
        print("the result of the parent has changed")
    raise typer.Exit(1 if failed else 0)


def report(name: str, statuses: list[int], start: float) -> int:
    failed = [status for status in statuses if status]
    seconds = time.monotonic() - start
    print(f"{name}: {len(statuses)} runs, {len(failed)} failed {failed[:5]}, {seconds:.0f} s")
    return len(failed)


# ---- leaks --------------------------------------------------------------------------------------

MEGABYTE = 2**20


def used() -> int:
    """Resident bytes after freeing caches, without file pages, which Linux may drop."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(map(int, re.findall(r"^(?:RssAnon|VmSwap):\s*(\d+) kB$", status, re.M)))


def raises(call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, TypeError, RuntimeError):
        return
    raise AssertionError("a wrong call did not raise")


PLACE: Any = ((3, 5), (4, 6))  # grid and patch


def calls_of_module(m: Any, tokens: Any, offsets: Any, weights: Any, image: Any, out: Any) -> Any:
    """{name: call} for the functions of ``m``. Each call includes valid and invalid ones."""

    def ensemble() -> None:
        m.ensemble(tokens, offsets, *PLACE, weights)
        m.ensemble(tokens, offsets, *PLACE, out=out)
        m.ensemble(tokens, offsets, *PLACE, reduce="median", stride=2)
        raises(lambda: m.ensemble(tokens, offsets[:2], *PLACE))
        raises(lambda: m.ensemble(tokens, offsets, *PLACE, weights, reduce="median"))
        raises(lambda: m.ensemble(tokens, offsets, *PLACE, out=out[:1]))
        raises(lambda: m.ensemble([tokens], offsets, *PLACE))

    def moments() -> None:
        m.ensemble_moments(tokens, offsets, *PLACE, weights)
        raises(lambda: m.ensemble_moments(tokens, offsets, *PLACE, -weights))

    def shift() -> None:
        m.shift(image, offsets, interpolation="bicubic")
        raises(lambda: m.shift(image, offsets, padding="none"))
        raises(lambda: m.shift(image[0], offsets))

    def stream(kind: Any) -> None:
        running, again = kind(*PLACE), kind(*PLACE)
        running.update(tokens[:2], offsets[:2])
        again.load_state_dict(running.state_dict())
        again.update(tokens[2:], offsets[2:])
        again.result()
        raises(lambda: again.update(tokens, offsets[:2]))

    names = ("RunningMean", "RunningMoments", "RunningMedian")
    streams = {name: partial(stream, getattr(m, name)) for name in names if hasattr(m, name)}
    calls = {"ensemble": ensemble, "ensemble_moments": moments, "shift": shift, **streams}
    return {f"{m.__name__}, {name}": call for name, call in calls.items()}


def calls_of_ops() -> dict[str, Callable[[], Any]]:
    """{name: call} for functions on tensors, arrays and DLPack, for the ops and for gradients."""
    import torch

    import srt_ext

    tokens, offsets, weights = torch.randn(5, 2, 15, 19), torch.randn(5, 2), torch.rand(5)
    image, out = torch.randn(2, 3, 12, 30), torch.empty(2, 19, 12, 30)
    given = (tokens, offsets, weights, image, out)
    leaf, leaf_image = tokens.clone().requires_grad_(), image.clone().requires_grad_()

    def ops() -> None:
        torch.ops.srt.ensemble(tokens, offsets, *PLACE)
        raises(lambda: torch.ops.srt.ensemble(tokens, offsets, [3], [4, 6]))
        raises(lambda: torch.ops.srt.shift(image, offsets.int()))

    def gradients() -> None:
        reduce: Any
        for reduce in ("mean", "median"):
            field = srt_ext.ensemble(leaf, offsets, *PLACE, reduce=reduce)
            torch.autograd.grad(field.sum(), leaf)
        torch.autograd.grad(srt_ext.shift(leaf_image, offsets).sum(), leaf_image)

    arrays = tuple(tensor.numpy() for tensor in given)
    calls = {"torch.ops.srt": ops, "gradients": gradients, **calls_of_module(srt_ext, *given)}
    return {**calls, **calls_of_module(srt, *arrays), **calls_of_module(srt_ext.dlpack, *arrays)}


class ModelError(Exception):
    """Raised during a forward pass."""


def calls_of_srt() -> tuple[dict[str, Callable[[], Any]], Callable[[], int]]:
    """{name: call} for SRT, and a function that counts the hooks on its model."""
    import timm
    import torch

    from srt_ext import SRT

    size: Any = {"depth": 2, "embed_dim": 12, "num_heads": 3, "dynamic_img_size": True}
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, **size).eval()
    compiled = torch.compile(model, backend="eager")
    by_name: Any = {"layers": ["blocks.0", "norm"], "prefix": 1}
    wrappers = {
        "SRT": SRT(model, views=3),
        "SRT, layers by name": SRT(model, views=3, **by_name),
        "SRT, inject": SRT(model, views=3, inject="blocks.0", prefix=1),
        "SRT, streamed": SRT(model, views=3, streaming=True, reduce="median", view_batch=1),
        "SRT of a compiled model": SRT(compiled, views=3, **by_name),
    }
    x = torch.rand(1, 3, 32, 32)
    calls: dict[str, Callable[[], Any]] = {"SRT, made": lambda: SRT(model, views=3, **by_name)(x)}
    for name, wrapper in wrappers.items():
        calls[name] = partial(wrapper, x)
        for kind in (ModelError, KeyboardInterrupt):
            calls[f"{name}, {kind.__name__} in the model"] = partial(
                interrupted, wrapper, x, model.blocks[0].mlp, kind
            )
        calls[f"{name}, KeyboardInterrupt in progress"] = partial(in_progress, wrapper, x)
        calls[f"{name}, tokens abandoned"] = partial(abandoned, wrapper, x)
        calls[f"{name}, wrong images"] = partial(raises, partial(wrapper, x[0]))

    def hooks() -> int:
        lists = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(module, name)) for module in model.modules() for name in lists)

    return calls, hooks


def interrupted(wrapper: Any, images: Any, module: Any, kind: type[BaseException]) -> None:
    """Raise ``kind`` in ``module`` of the model, in the second view."""
    views = []

    def fault(*_: object) -> None:
        views.append(1)
        if len(views) == 2 or wrapper.view_batch > 1:
            raise kind

    with module.register_forward_hook(fault):
        try:
            wrapper(images)
        except kind:
            return
    raise AssertionError(f"{kind.__name__} of the model did not propagate")


def in_progress(wrapper: Any, images: Any) -> None:
    def progress(_done: int) -> None:
        raise KeyboardInterrupt

    try:
        wrapper(images, progress)
    except KeyboardInterrupt:
        return
    raise AssertionError("KeyboardInterrupt of progress was not passed on")


def abandoned(wrapper: Any, images: Any) -> None:
    before, wrapper.view_batch = wrapper.view_batch, 1
    next(wrapper.tokens(images))
    wrapper.view_batch = before


def live_tensors() -> int:
    import torch

    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def grows(call: Callable[[], Any], count: int) -> tuple[int, int]:
    """Bytes and tensors added by ``count`` calls, after a tenth as many warm-up calls."""
    for _ in range(max(10, count // 10)):
        call()
    tensors, before = live_tensors(), used()
    for _ in range(count):
        call()
    return used() - before, live_tensors() - tensors


def check_that_leaks_are_seen() -> None:
    kept: list[bytes] = []
    grown, _ = grows(lambda: kept.append(bytes(300)), 10000)
    if grown <= MEGABYTE:
        raise AssertionError(
            f"a leak of 300 bytes in each of 10,000 calls was measured as {grown} bytes"
        )


@app.command()
def leaks(
    calls: Annotated[int, typer.Option(help="Calls of each kind of op.")] = 10000,
    srt_calls: Annotated[int, typer.Option(help="Calls of each kind of SRT.")] = 400,
    only: Annotated[str, typer.Option(help="Run only kinds whose names contain this.")] = "",
) -> None:
    """Check memory, tensors, hooks and settings after many calls of each kind."""
    import torch

    torch.set_num_threads(1)
    srt.set_num_threads(2)
    check_that_leaks_are_seen()
    of_srt, hooks = calls_of_srt()
    expected_hooks, failed = hooks(), []
    gc.freeze()  # existing objects are neither counted nor scanned again
    for name, call in {**calls_of_ops(), **of_srt}.items():
        if only not in name:
            continue
        start, count = time.monotonic(), srt_calls if name in of_srt else calls
        grown, tensors = grows(call, count)
        stance = torch._dynamo.eval_frame._stance.stance
        right = grown <= MEGABYTE and tensors == 0 and hooks() == expected_hooks
        right = right and stance == "default"
        failed += [] if right else [name]
        print(
            f"{name}: {count} calls, {time.monotonic() - start:.0f} s, {grown / 1024:+.0f} KiB, "
            f"{tensors:+d} tensors, {hooks() - expected_hooks:+d} hooks, stance {stance}"
            + ("" if right else "  <- FAILED"),
            flush=True,
        )
    print(f"{len(failed)} failed: {failed}")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    app()
