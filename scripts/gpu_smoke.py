"""Compares every op on the GPU, in float32 and bfloat16, with the CPU kernels in float64.

Takes a few seconds. With ``--graph``, the first calls of the process are captured in a CUDA graph,
which fails if an op synchronises or allocates outside of the graph. ``--device cpu`` runs the
script without a GPU.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable

import torch

import srt_ext

GRID, PATCH, CHANNELS = (6, 9), (16, 16), 96
VIEWS = srt_ext.views.best(16).offsets
PLACE = (VIEWS, GRID, PATCH)
CENTERS = (8 * VIEWS + 50.3)[None]  # [1, N, 2], pixels
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, of the norm

Results = tuple[torch.Tensor, ...]
Op = Callable[[torch.Tensor, torch.Tensor], Results]


def shift(interpolation: str) -> Op:
    return lambda _, image: (srt_ext.shift(image, VIEWS + 0.25, interpolation=interpolation),)


def ensemble(**modes: object) -> Op:
    return lambda tokens, _: (srt_ext.ensemble(tokens, *PLACE, **modes),)  # type: ignore[arg-type]


def uint8(_: torch.Tensor, image: torch.Tensor) -> Results:
    # Bytes are exact in both precisions, and whole-pixel views are copies.
    return (
        srt_ext.shift((40 * image.float()).clamp(0, 255).to(torch.uint8), VIEWS).to(image.dtype),
    )


def on_the_device(tokens: torch.Tensor, _: torch.Tensor) -> Results:
    """The mean with offsets and weights on the device of the tokens."""
    weights = torch.linspace(0.5, 2, len(VIEWS), device=tokens.device)
    return (srt_ext.ensemble(tokens, VIEWS.to(tokens.device), GRID, PATCH, weights),)


def into(tokens: torch.Tensor, _: torch.Tensor) -> Results:
    out = torch.full((1, CHANNELS, 96, 144), float("nan"), dtype=tokens.dtype, device=tokens.device)
    return (srt_ext.ensemble(tokens, *PLACE, out=out),)


def moments(tokens: torch.Tensor, _: torch.Tensor) -> Results:
    return tuple(srt_ext.ensemble_moments(tokens, *PLACE))


def stream(kind: type) -> Op:
    def run(tokens: torch.Tensor, _: torch.Tensor) -> Results:
        running = kind(GRID, PATCH)
        for part in (slice(0, 5), slice(5, 7)):  # a running median of 7 views is exact
            running.update(tokens[part], VIEWS[part])
        return (running.result(),)

    return run


def windows(_: torch.Tensor, image: torch.Tensor) -> Results:
    return (srt_ext.windows(image, CENTERS, PATCH),)


def sample(tokens: torch.Tensor, _: torch.Tensor) -> Results:
    field = tokens[:1, 0].unflatten(1, GRID).permute(0, 3, 1, 2)
    return (srt_ext.sample(field, CENTERS, stride=PATCH),)


def gradient_of_centers(_: torch.Tensor, image: torch.Tensor) -> Results:
    centers = CENTERS.to(image.device).requires_grad_()
    result = srt_ext.windows(image, centers, PATCH)
    return torch.autograd.grad(result.square().sum(), centers)


def gradient(op: Op, of_image: bool = False) -> Op:
    def run(tokens: torch.Tensor, image: torch.Tensor) -> Results:
        of = (image if of_image else tokens).detach().requires_grad_()
        results = op(tokens, of) if of_image else op(of, image)
        return torch.autograd.grad(sum(r.square().sum() for r in results), of)

    return run


OPS: dict[str, Op] = {
    "shift, whole pixels": lambda _, image: (srt_ext.shift(image, VIEWS),),
    "shift, uint8": uint8,
    "shift, nearest": shift("nearest"),
    "shift, bilinear": shift("bilinear"),
    "shift, bicubic": shift("bicubic"),
    "mean": ensemble(),
    "mean, weights": ensemble(weights=torch.linspace(0.5, 2, len(VIEWS))),
    "mean, offsets and weights on the device": on_the_device,
    "mean, nearest": ensemble(upsample="nearest"),
    "mean, stride 4": ensemble(stride=4),
    "mean, token scale": ensemble(stride=16, border="zeros"),
    "mean, out=": into,
    "median": ensemble(reduce="median"),
    "moments": moments,
    "RunningMean": stream(srt_ext.RunningMean),
    "RunningMoments": stream(srt_ext.RunningMoments),
    "RunningMedian": stream(srt_ext.RunningMedian),
    "gradient of mean": gradient(ensemble()),
    "gradient of moments": gradient(moments),
    # Under nearest upsampling, a median is a token, so rounding cannot select another view.
    "gradient of median": gradient(ensemble(reduce="median", upsample="nearest")),
    "gradient of shift": gradient(shift("bilinear"), of_image=True),
    "windows": windows,
    "sample": sample,
    "gradient of windows": gradient(windows, of_image=True),
    "gradient of sample": gradient(sample),
    "gradient of windows, for the centers": gradient_of_centers,
}


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns tokens [V, 1, N, C] and an image [1, 3, H, W], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = (len(VIEWS), 1, GRID[0] * GRID[1], CHANNELS), (1, 3, 96, 144)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def is_right(name: str, dtype: torch.dtype, results: Results) -> bool:
    truth = OPS[name](*(value.double() for value in inputs(dtype)))
    errors = [
        ((result.double().cpu() - right).norm() / right.norm()).item()
        for result, right in zip(results, truth, strict=True)
    ]
    right = all(error <= TOLERANCE[dtype] for error in errors)  # False for NaN
    found = ", ".join(f"{error:.1e}" for error in errors)
    print(f"{'ok   ' if right else 'WRONG'} {name}, {dtype}: relative error {found}", flush=True)
    return right


def in_a_graph(device: str) -> bool:
    """Captures the first calls of this process in a CUDA graph and checks their results."""
    names = ("mean", "median", "moments", "shift, bilinear", "windows")
    given = [value.to(device) for value in inputs(torch.float32)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = {name: OPS[name](*given) for name in names}
    for result in results.values():
        for tensor in result:
            tensor.fill_(float("nan"))
    graph.replay()
    right = [is_right(name, torch.float32, result) for name, result in results.items()]
    return all(right)


def called(device: str) -> bool:
    right = True
    for dtype in TOLERANCE:
        given = [value.to(device) for value in inputs(dtype)]
        for name, op in OPS.items():
            try:
                right &= is_right(name, dtype, op(*given))
            except Exception:  # report it, and go on
                print(f"FAILED {name}, {dtype}", flush=True)
                traceback.print_exc()
                right = False
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--graph", action="store_true")
    options = parser.parse_args()
    raise SystemExit(not (in_a_graph if options.graph else called)(options.device))
