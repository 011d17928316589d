"""``python -m benchmarks.profile``: the time of each kernel of a call, by torch.profiler.

On a GPU: the 16 views of SRT at 480x848, P=16, C=384. On the CPU, where the profiler shows only
ops: tiny shapes. L2 is not flushed between calls. To profile one call with Nsight Compute, after a
warm-up call:

    ncu --clock-control none --set full --profile-from-start off \
        python -m benchmarks.profile --device cuda --only mean-float32 --once
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import srt_ext
from benchmarks.common import RESULTS, machine, save, slug
from benchmarks.report import markdown
from benchmarks.suite import DEFAULT, REAL, TINY, Call, Field, Sample, Sizes, by_views, name_of

CALLS = 3


def operations(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Call]]:
    """For each operation a function that creates its tensors and returns the call."""
    case = by_views(sizes.davis, DEFAULT)
    coarse = by_views(sizes.davis, DEFAULT, stride=sizes.stride)

    def mean(dtype: torch.dtype, case: Field = case, **modes: str) -> Call:
        sample = Sample(case, dtype, "bilinear", device)
        arguments = (sample.tokens, *sample.place)
        return partial(srt_ext.ensemble, *arguments, **sample.modes, **modes, out=sample.out)

    def moments(dtype: torch.dtype) -> Call:
        sample = Sample(case, dtype, "bilinear", device)
        return partial(srt_ext.ensemble_moments, sample.tokens, *sample.place, **sample.modes)

    def shift(dtype: torch.dtype) -> Call:
        image = torch.rand(1, 3, *case.pixels(), device=device).to(dtype)
        return partial(srt_ext.shift, image, case.offsets)

    def windows(dtype: torch.dtype) -> Call:
        places = sizes.windows
        image = torch.rand(places.batch, 3, *places.size, device=device).to(dtype)
        patch = (places.patch, places.patch)
        return partial(srt_ext.windows, image, places.centers(device), patch)

    def sample(dtype: torch.dtype) -> Call:
        cells = [n // s for n, s in zip(case.pixels(), sizes.stride, strict=True)]
        field = torch.rand(1, case.channels, *cells, device=device).to(dtype)
        field = field.contiguous(memory_format=torch.channels_last)
        points = torch.rand(1, 100_000, 2, device=device)
        points *= torch.tensor(case.pixels(), device=device)
        return partial(srt_ext.sample, field, points, sizes.stride)

    makers: dict[str, Callable[[torch.dtype], Call]] = {
        "mean": mean,
        "mean-stride": partial(mean, case=coarse),
        "median": partial(mean, reduce="median"),
        "moments": moments,
        "shift": shift,
        "windows": windows,
        "sample": sample,
    }
    return {
        f"{name}-{name_of(dtype)}": partial(make, dtype)
        for name, make in makers.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


def kernels(call: Call, device: torch.device) -> list[dict[str, Any]]:
    """The kernels of a warm call (on the CPU its ops), with launches and microseconds per call."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS):
            call()
        if gpu:
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        if event.device_type != (DeviceType.CUDA if gpu else DeviceType.CPU):
            continue  # launches on the host
        us = event.self_device_time_total if gpu else event.self_cpu_time_total
        found.append({"kernel": event.key, "launches": event.count / CALLS, "us": us / CALLS})
    if not found:
        raise RuntimeError("the profiler reported no kernel")
    return sorted(found, key=lambda kernel: -kernel["us"])


def observed(call: Call, device: torch.device) -> None:
    """Runs the call between cudaProfilerStart and cudaProfilerStop."""
    if device.type != "cuda":
        call()
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        call()
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def short(kernel: str) -> str:
    """A name without namespaces and arguments."""
    words = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return words.partition("(")[0].replace("srt::cuda::", "").replace("at::native::", "")[:80]


def main(
    results: Annotated[Path, typer.Option(help="Folder for the JSON.")] = RESULTS,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[
        list[str] | None, typer.Option(help="An operation, such as mean-float32; repeatable.")
    ] = None,
    once: Annotated[
        bool,
        typer.Option(
            help="For an external profiler: one warm-up call, then one profiled call; no JSON."
        ),
    ] = False,
    commit: Annotated[
        str, typer.Option(help="Commit of the sources, if git is not available.")
    ] = "",
) -> None:
    """Print the kernels of each operation; write the JSON after each operation.

    The exit status is 1 if an operation failed.
    """
    place = torch.device(device)
    makers = operations(REAL if place.type == "cuda" else TINY, place)
    for name in only or []:
        if name not in makers:
            raise typer.BadParameter(f"--only must be one of {', '.join(makers)}; got {name}")
    facts = {**machine(place), **({"commit": commit} if commit else {})}
    found: dict[str, Any] = {"machine": facts, "unit": "us", "calls": CALLS, "ops": {}}
    failed = False
    for name in only or makers:
        try:
            call = makers[name]()
            call()
            if once:
                observed(call, place)
                continue
            rows = found["ops"][name] = kernels(call, place)
            lines = [[short(r["kernel"]), f"{r['launches']:g}", f"{r['us']:.1f}"] for r in rows]
            lines.append(["all", "", f"{sum(row['us'] for row in rows):.1f}"])
            print(f"\n{name}\n\n{markdown(['kernel', 'launches', 'us'], lines)}", flush=True)
        except Exception as error:
            traceback.print_exc()
            found["ops"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            failed = True
        if not once:
            save(found, results / f"profile-{slug(facts)}.json")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
