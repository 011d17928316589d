"""``python -m research.robustness.huge``: tensors of more than 2^31 elements, on the CPU.

Large results and images are computed in full (at most 7 GB at once) and compared with the oracle at
sampled places: all pixels of some channels, or windows around some pixels. With large strides the
memory between the elements is never touched, so it needs no pages; the results must be bitwise
equal to those of packed memory. Tests torch and NumPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import srt_ext
from research.robustness import hostile
from srt_ext import numpy as numpy_binding
from srt_ext import ops

# isort: split
# These are in python_tests; hostile.py puts it on the path.
import oracle
from bounds import EnsembleBounds
from budget import assert_within_rounding
from samples import Ensemble, Shift

LIMIT = 2**31  # elements, beyond which 32-bit indices fail
OFFSETS = ((0.25, -1.5), (-3.0, 2.0))
NEAR = 16  # pixels around a sampled one


def at_places(shape: tuple[int, ...], count: int = 40) -> Iterator[tuple[int, ...]]:
    """Indices of the first and last element, of elements around 2^31 and 2^32, and random ones."""
    size = int(np.prod(shape, dtype=object))
    rng = np.random.default_rng(0)
    flat = [0, size - 1, LIMIT - 1, LIMIT, 2 * LIMIT - 1, 2 * LIMIT, *rng.integers(0, size, count)]
    for place in flat:
        if place < size:
            yield tuple(int(i) for i in np.unravel_index(place, shape))


def window(image: torch.Tensor, y: int, x: int) -> tuple[torch.Tensor, int, int]:
    """The pixels around (y, x), clipped to the image, and the position of (y, x) in them."""
    top, left = max(0, y - NEAR), max(0, x - NEAR)
    part = image[..., top : y + NEAR + 1, left : x + NEAR + 1]
    return part.clone(), y - top, x - left


def pattern(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Integers up to 255 that differ after any shift of rows or columns."""
    height, width = shape[-2:]
    image = torch.empty(shape, dtype=dtype)
    rows, columns = (torch.arange(n).mul(k).to(torch.uint8) for n, k in ((height, 13), (width, 7)))
    for plane in image.view(-1, height, width):
        for y in range(0, height, 1024):  # uint8 wraps
            plane[y : y + 1024] = rows[y : y + 1024, None].bitwise_xor(columns)
    return image


# ---- shift --------------------------------------------------------------------------------------


def check_shift(image: torch.Tensor, views: torch.Tensor, case: Shift) -> None:
    for v, b, c, y, x in at_places(tuple(views.shape)):
        part, at_y, at_x = window(image[b : b + 1, c : c + 1], y, x)
        near = replace(case, size=(part.shape[2], part.shape[3]), offsets=(case.offsets[v],))
        result = views[v, b, c, y, x].reshape(1)
        exact, bound = (
            field[0, 0, 0, at_y, at_x].reshape(1)
            for field in (
                oracle.truth("shift", near, part),
                oracle.bound_of("shift", near, part).expand(1, *part.shape),
            )
        )
        assert_within_rounding(result, exact, bound)


def shift_large_image() -> int:
    """An image of more than 2^31 pixels, uint8."""
    case = Shift(batch=1, channels=1, offsets=OFFSETS[:1], interpolation="bicubic")
    image = pattern((1, 1, 2**16, 2**15 + 8), torch.uint8)
    views = srt_ext.shift(image, torch.tensor(OFFSETS[:1]), interpolation="bicubic")
    check_shift(image, views, case)
    return views.numel()


def shift_many_views_numpy() -> int:
    """Views of more than 2^31 pixels, uint8."""
    case = Shift(batch=1, channels=2, offsets=OFFSETS * 2, padding="border")
    image = pattern((1, 2, 2**14, 2**14 + 64), torch.uint8)
    views = numpy_binding.shift(image.numpy(), OFFSETS * 2, padding="border")
    check_shift(image, torch.from_numpy(views), case)
    return int(views.size)


def shift_gradient() -> int:
    """A gradient of more than 2^31 pixels, bfloat16."""
    case = Shift(batch=1, channels=1, offsets=OFFSETS, padding="zeros")
    grad = pattern((2, 1, 1, 2**15, 2**15 + 8), torch.bfloat16)
    modes = {"padding": case.padding, "interpolation": case.interpolation}
    image_grad = torch.ops.srt._shift_backward(grad, torch.tensor(OFFSETS), **modes)
    for b, c, y, x in at_places(tuple(image_grad.shape)):
        part, at_y, at_x = window(grad, y, x)
        near = replace(case, size=(part.shape[3], part.shape[4]))
        exact, bound = (
            field[b, c, at_y, at_x].reshape(1)
            for field in (
                oracle.truth("shift_backward", near, part),
                oracle.bound_of("shift_backward", near, part),
            )
        )
        assert_within_rounding(image_grad[b, c, y, x].reshape(1), exact, bound)
    return grad.numel()


# ---- ensemble: a large result -------------------------------------------------------------------

FIELD = Ensemble(grid=(64, 64), patch=(32, 32), offsets=OFFSETS, channels=516, batch=1)
CHANNELS = (0, 300, 515)
SOME = replace(FIELD, channels=len(CHANNELS))


def check_field(kernel: str, values: torch.Tensor, result: torch.Tensor, case: Ensemble) -> None:
    assert_within_rounding(
        result, oracle.truth(kernel, case, values), oracle.bound_of(kernel, case, values)
    )


def ensemble_out() -> int:
    """A result of more than 2^31 elements in a buffer of the caller, bfloat16."""
    tokens = FIELD.tokens(torch.bfloat16)
    (_, *views, _), _ = FIELD.call(tokens)
    _, channels, height, width = FIELD.shape
    out = torch.empty(1, height, width, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    for reduce in ("mean", "median"):
        srt_ext.ensemble(tokens, *views, reduce=reduce, out=out)
        some = tokens[..., CHANNELS]
        check_field(reduce, some, out[:, list(CHANNELS)].contiguous(), SOME)
    return out.numel()


def ensemble_numpy() -> int:
    """A new result of more than 2^31 elements, float16."""
    tokens = FIELD.tokens(torch.float16)
    field = torch.from_numpy(
        numpy_binding.ensemble(tokens.numpy(), OFFSETS, FIELD.grid, FIELD.patch)
    )
    check_field("mean", tokens[..., CHANNELS], field[:, list(CHANNELS)].contiguous(), SOME)
    return field.numel()


def ensemble_gradient() -> int:
    """A gradient of more than 2^31 elements, expanded from the memory of one pixel."""
    row = FIELD.tokens(torch.bfloat16)[0, 0, 0]
    grad = row[:, None, None].expand(FIELD.shape[1:])[None]
    (_, *views, weights), modes = FIELD.call(torch.empty(0))
    modes["stride"] = [1, 1]
    tokens_grad = torch.ops.srt._mean_backward(grad, *views, weights, **modes)
    some = grad[:, list(CHANNELS)]
    check_field("mean_backward", some, tokens_grad[..., CHANNELS], SOME)
    return grad.numel()


# ---- many views of the same memory --------------------------------------------------------------


def expanded_views() -> int:
    """2^20 views, with more than 2^31 elements of tokens through stride 0; float64."""
    count, case = 2**20, Ensemble(grid=(4, 4), patch=(2, 2), channels=129, batch=1)
    chosen = torch.arange(count) % len(case.offsets)
    one = case.tokens(torch.float64)[:1]
    tokens = one.expand(count, *one.shape[1:])
    offsets = torch.tensor(case.offsets, dtype=torch.float64)
    weights = tuple(torch.bincount(chosen).double().tolist())
    field = srt_ext.ensemble(tokens, offsets[chosen], case.grid, case.patch)
    few = replace(case, weights=weights)
    same = one.expand(len(offsets), *one.shape[1:])
    bounds = EnsembleBounds(few, same)
    bounds.count += 4 * count  # a product and a sum of every view
    assert_within_rounding(field, oracle.truth("mean", few, same), bounds.mean())
    return tokens.numel()


def expanded_median() -> int:
    """2048 views, with more than 2^31 elements of tokens through stride 0; also moments."""
    channels, count = 2**16 + 64, 2048
    case = Ensemble(grid=(4, 4), patch=(1, 1), channels=2, batch=1)
    case = replace(case, offsets=(case.offsets * 300)[:count])
    one = replace(case, channels=channels, offsets=case.offsets[:1]).tokens()
    tokens = one.expand(count, *one.shape[1:])
    (_, *views, _), _ = case.call(tokens)
    ends = (0, channels - 1)
    median = srt_ext.ensemble(tokens, *views, reduce="median")
    check_field("median", tokens[..., ends], median[:, list(ends)], case)
    moments = srt_ext.ensemble_moments(tokens, *views)
    check_field("moments", tokens[..., ends], torch.stack(moments)[:, :, list(ends)], case)
    return tokens.numel()


# ---- large strides ------------------------------------------------------------------------------

SPARSE = Ensemble(channels=5, batch=3)


def spread(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The values, spread along ``dim`` so that they span more than 2^31 elements."""
    strides = list(values.contiguous().stride())
    strides[dim] = LIMIT // (values.shape[dim] - 1) + values.numel()
    last = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    assert last > LIMIT
    view = torch.empty(last + 1, dtype=values.dtype).as_strided(values.shape, strides)
    return view.copy_(values)


def both(call: Callable[..., Any], values: torch.Tensor, *dims: int) -> int:
    """``call`` with the torch and the NumPy module must give equal results for spread values."""
    for module, of in ((srt_ext, torch.Tensor.detach), (numpy_binding, torch.Tensor.numpy)):
        packed = call(module, of(values), of)
        for dim in dims:
            for a, b in zip(packed, call(module, of(spread(values, dim)), of), strict=True):
                assert np.array_equal(np.asarray(a), np.asarray(b))
    return LIMIT


def strided_tokens() -> int:
    """Large strides of tokens along views, batch and tokens."""
    (_, offsets, *views), modes = SPARSE.call(torch.empty(0))

    def call(module: Any, tokens: Any, of: Any) -> list[Any]:
        place = (tokens, of(offsets), *views)
        stream = module.RunningMedian(*views[:2], **modes)
        stream.update(tokens, of(offsets))
        return [
            module.ensemble(*place, **modes),
            module.ensemble(*place, reduce="median", **modes),
            *module.ensemble_moments(*place, **modes),
            stream.result(),
        ]

    return both(call, SPARSE.tokens(), 0, 1, 2)


def strided_image() -> int:
    """Large strides of an image along each dimension."""
    case = Shift(channels=3, batch=2)

    def call(module: Any, image: Any, of: Any) -> list[Any]:
        return [module.shift(image, of(torch.tensor(case.offsets)))]

    return both(call, case.image(), 0, 1, 2, 3)


def strided_out() -> int:
    """Large strides of out along each dimension."""
    tokens = SPARSE.tokens()
    (_, offsets, *views), modes = SPARSE.call(tokens)

    def call(module: Any, out: Any, of: Any) -> list[Any]:
        module.ensemble(of(tokens), of(offsets), *views, **modes, out=out)
        return [out]

    return both(call, torch.zeros(SPARSE.shape), 0, 1, 2, 3)


def strided_state() -> int:
    """Large strides of the state of each stream."""
    tokens = SPARSE.tokens()
    (_, *views, weights), modes = SPARSE.call(tokens)
    for op, names in hostile.STATES.items():
        planes = (8, *SPARSE.shape) if op == "accumulate_median_" else SPARSE.shape
        place = (tokens, *views) if op == "accumulate_median_" else (tokens, *views, weights)
        for dim in range(len(planes)):
            states = []
            for spread_out in (False, True):
                fields = [torch.zeros(planes) for _ in names[1:]]
                fields = [spread(f, dim) for f in fields] if spread_out else fields
                total = torch.zeros(SPARSE.shape[2:], dtype=torch.float64)
                for _ in range(2):
                    ops.accumulate(op, *fields, total, *place, **modes)
                states.append([*fields, total])
            for packed, far in zip(*states, strict=True):
                assert torch.equal(packed, far), (op, dim)
    return LIMIT


CASES: tuple[tuple[Callable[[], int], int], ...] = (  # and the bytes that it needs
    (shift_large_image, 5 << 30),
    (shift_many_views_numpy, 3 << 30),
    (shift_gradient, 7 << 30),
    (ensemble_out, 5 << 30),
    (ensemble_numpy, 6 << 30),
    (ensemble_gradient, 1 << 30),
    (expanded_views, 1 << 30),
    (expanded_median, 1 << 30),
    (strided_tokens, 1 << 30),
    (strided_image, 1 << 30),
    (strided_out, 1 << 30),
    (strided_state, 1 << 30),
)


def available() -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def main(
    only: Annotated[str, typer.Option(help="Run only cases whose names contain this.")] = "",
) -> None:
    """Calls on more than 2^31 elements, against the oracle at sampled places."""
    start, failed = time.monotonic(), 0
    chosen = [(case, need) for case, need in CASES if only in case.__name__]
    for case, need in chosen:
        begin = time.monotonic()
        if available() < need:
            failed += 1
            print(f"{case.__name__}: skipped, needs {need >> 30} of {available() >> 30} GiB")
            continue
        try:
            text = f"{case() / 2**31:.2f} x 2^31 elements"
        except AssertionError as error:
            failed += 1
            text = f"WRONG: {error}"
        print(f"{case.__name__}: {text}, {time.monotonic() - begin:.1f} s", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(chosen) - failed} of {len(chosen)} passed, {seconds:.0f} s")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
