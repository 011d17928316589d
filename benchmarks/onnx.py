"""``python -m benchmarks.onnx``: the ensemble of srt_ext.onnx in ONNX Runtime, against the op.

Both compute the mean in float32 with the same number of threads, from tokens in memory. ONNX
Runtime reuses the memory of results that were freed; the op does so with ``out=``. The calls are
timed in turn, after one call each to warm up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import typer

import srt_ext
from benchmarks.common import RESULTS, machine, quartiles, save
from srt_ext.onnx import Ensemble

CHANNELS, PATCH = 384, 16
CALLS = ("onnx", "onnx, channels last", "op", "op, out=")


class ChannelsLast(Ensemble):
    """Returns [B, H', W', C], the order of the products, so the export has no transpose."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).permute(0, 2, 3, 1)


def session_of(module: torch.nn.Module, tokens: torch.Tensor) -> Any:
    program: Any = torch.onnx.export(module.eval(), (tokens,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads are busy while the next call is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def calls_of(size: tuple[int, int], views: str, stride: int) -> dict[str, Callable[[], Any]]:
    grid, patch = (size[0] // PATCH, size[1] // PATCH), (PATCH, PATCH)
    offsets = srt_ext.views.parse(views).offsets
    tokens = torch.randn(len(offsets), 1, grid[0] * grid[1], CHANNELS)
    expected = srt_ext.ensemble(tokens, offsets, grid, patch, stride=stride)

    def op(**out: Any) -> torch.Tensor:
        return srt_ext.ensemble(tokens, offsets, grid, patch, stride=stride, **out)

    calls: dict[str, Callable[[], Any]] = {"op": op, "op, out=": lambda: op(out=expected)}
    for name, kind, order in (
        ("onnx", Ensemble, (0, 1, 2, 3)),
        (CALLS[1], ChannelsLast, (0, 2, 3, 1)),
    ):
        session = session_of(kind(offsets, grid, patch, stride=stride), tokens)
        inputs = {session.get_inputs()[0].name: tokens.numpy()}
        calls[name] = partial(session.run, None, inputs)
        found = torch.from_numpy(calls[name]()[0])
        torch.testing.assert_close(found, expected.permute(order), rtol=1e-5, atol=1e-5)
    return calls


def main(
    rounds: Annotated[int, typer.Option(help="Readings per call.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads of torch and ONNX Runtime.")] = 2,
    results: Annotated[Path, typer.Option(help="Folder for the JSON.")] = RESULTS,
) -> None:
    """Measure, print a table of milliseconds and ratios, write onnx.json."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    print(f"| image | views | stride | {' | '.join(CALLS)} | onnx / op | channels last / op |")
    print("|---" * 9 + "|")
    for size in ((224, 224), (480, 848)):
        for views in ("best:4", "best:16", "grid:3"):
            for stride in (1, 4):
                calls = calls_of(size, views, stride)
                readings: dict[str, list[float]] = {name: [] for name in CALLS}
                for round_ in range(rounds + 1):
                    for name in CALLS:
                        start = time.perf_counter()
                        result = calls[name]()
                        if round_:  # the first one warms up
                            readings[name].append(1e3 * (time.perf_counter() - start))
                        del result
                found = {name: quartiles(times) for name, times in readings.items()}
                rows.append({"size": size, "views": views, "stride": stride, "calls": found})
                medians = [found[name]["median"] for name in CALLS]
                ratios = [medians[0] / medians[2], medians[1] / medians[2]]
                cells = " | ".join(f"{x:.1f}" for x in medians + ratios)
                print(f"| {size[0]} x {size[1]} | `{views}` | {stride} | {cells} |", flush=True)
    facts = {**machine(), "onnxruntime": onnxruntime.__version__}
    save({"machine": facts, "unit": "ms", "rounds": rounds, "rows": rows}, results / "onnx.json")


if __name__ == "__main__":
    typer.run(main)
