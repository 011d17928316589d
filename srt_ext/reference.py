"""The oracle: what the ops compute, in plain PyTorch, written to be read.

Slow and hungry on purpose: a pixel-scale map for every view. ``dtype`` is the precision of all
sums; float64 is the truth that the kernels are tested against, and the same code in float32 gives
the error budget that they have to keep. Its derivatives, by autograd, are the truth for theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ._validation import check_pair, check_words
from .options import Border, Interpolation, Padding, Reduce, Upsample

# The constant of cubic convolution (Keys 1981) that PyTorch uses.
_A = -0.75
_WHERE = "srt_ext.reference"


def _taps(f: torch.Tensor, interpolation: Interpolation) -> list[tuple[int, torch.Tensor]]:
    """(k, weight) of each pixel k read beside floor(coordinate), at fraction f."""
    if interpolation == "bilinear":
        return [(0, 1 - f), (1, f)]

    g = 1 - f
    return [
        (-1, _A * f * g * g),
        (0, g * (-_A + g * ((2 * _A + 3) - (_A + 2) * g))),
        (1, f * (-_A + f * ((2 * _A + 3) - (_A + 2) * f))),
        (2, _A * g * f * f),
    ]


def _pad_index(i: torch.Tensor, n: int, padding: Padding) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixel that stands at position i, and whether there is one."""
    inside = torch.ones_like(i, dtype=torch.bool)
    if padding == "zeros":
        inside = (i >= 0) & (i < n)
    elif padding == "reflect" and n > 1:
        i = i.remainder(2 * (n - 1))
        i = torch.minimum(i, 2 * (n - 1) - i)
    elif padding == "circular":
        i = i.remainder(n)
    return i.clamp(0, n - 1), inside


def _weighted(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight * value, and 0 where the weight is 0, whatever the value."""
    return torch.where(weight == 0, value.new_zeros(()), weight * value)


def _shift_axis(
    x: torch.Tensor, d: float, dim: int, padding: Padding, interpolation: Interpolation
) -> torch.Tensor:
    """``x`` [..., H, W] moved by ``d`` pixels along ``dim``."""
    n = x.shape[dim]
    y = torch.arange(n, device=x.device)
    delta = torch.tensor(d, dtype=torch.float64, device=x.device)
    along = (-1, 1) if dim == -2 else (1, -1)
    if interpolation == "nearest":
        reads = [(y + torch.floor(0.5 - delta).long(), torch.ones_like(delta))]
    else:
        whole, nearest = torch.floor(-delta), torch.floor(0.5 - delta)
        if (nearest + delta).abs() < 2.0**-40:  # a whole pixel, by the op's contract
            whole, delta = nearest, -nearest
        reads = [(y + whole.long() + k, w) for k, w in _taps(-delta - whole, interpolation)]
    total = torch.zeros_like(x)
    for position, weight in reads:
        index, inside = _pad_index(position, n, padding)
        column = torch.where(inside, weight, 0).to(x.dtype).reshape(along)
        total = total + _weighted(column, x.index_select(dim, index))
    return total


def shift(
    image: torch.Tensor,
    offsets: torch.Tensor,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """As :func:`srt_ext.shift`, computed and returned in ``dtype``: [V, B, C, H, W]."""
    check_words("srt_ext.reference.shift", padding=padding, interpolation=interpolation)
    views = []
    for dy, dx in offsets.double().tolist():
        view = _shift_axis(image.to(dtype), dy, -2, padding, interpolation)
        views.append(_shift_axis(view, dx, -1, padding, interpolation))
    return torch.stack(views)


def windows(
    image: torch.Tensor,
    centers: torch.Tensor,
    size: Sequence[int],
    scale: torch.Tensor | None = None,
    *,
    padding: Padding = "border",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """As :func:`srt_ext.windows`, computed and returned in ``dtype``: [B, N, C, Ph, Pw]."""
    check_words("srt_ext.reference.windows", padding=padding)
    size = check_pair("srt_ext.reference.windows", "size", size)
    steps = centers.new_ones(2) if scale is None else scale
    steps = steps.double().expand(centers.shape)
    taps: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # of each axis: (index, weight)
    for axis, n in enumerate(image.shape[2:]):
        sample = torch.arange(size[axis], device=centers.device) - (size[axis] - 1) / 2
        u = centers[..., axis, None].double() + sample * steps[..., axis, None] - 0.5  # [B, N, P]
        whole = (u - u.round()).abs() < 2.0**-40  # a whole pixel, by the op's contract
        i = torch.where(whole, u.round(), u.floor())
        f = torch.where(whole, u - u.detach(), u - i)  # 0, with a derivative
        taps.append([])
        for k, weight in enumerate((1 - f, f)):
            index, inside = _pad_index(i.long() + k, n, padding)
            taps[axis].append((index, torch.where(inside, weight, 0).to(dtype)))
    pixels = image.to(dtype).permute(0, 2, 3, 1)
    batch = torch.arange(len(image), device=image.device)[:, None, None, None]
    total = pixels.new_zeros(())
    for y, weight_y in taps[0]:
        for x, weight_x in taps[1]:
            value = pixels[batch, y[..., :, None], x[..., None, :]]  # [B, N, Ph, Pw, C]
            weight = (weight_y[..., :, None] * weight_x[..., None, :])[..., None]
            # A tap of weight 0 is not read, but has a derivative with respect to the weight.
            read = torch.where(weight == 0, value.detach().nan_to_num(0, 0, 0), value)
            total = total + torch.where(weight == 0, weight * read.detach(), weight * read)
    return total.permute(0, 1, 4, 2, 3)


def _axis(
    d: float,
    tokens: int,
    patch: int,
    upsample: Upsample,
    border: Border,
    device: torch.device | str = "cpu",
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """For each pixel of one axis: (token, weight) reads, whether it is seen, whether it counts."""
    y = torch.arange(tokens * patch, dtype=torch.float64, device=device) + 0.5
    everywhere = torch.ones_like(y, dtype=torch.bool)
    if border == "circular":
        roll = math.floor(d / patch + 0.5)  # whole tokens; what is left of d is exact
        p = y + (d - roll * patch)
        q = p / patch - (0 if upsample == "nearest" else 0.5)
        token, f = q.floor().long() + roll, q - q.floor()
        if upsample == "nearest":
            return [(token % tokens, torch.ones_like(p))], everywhere, everywhere
        return [(token % tokens, 1 - f), ((token + 1) % tokens, f)], everywhere, everywhere

    p = y + d
    covered = (p >= 0) & (p < tokens * patch)
    seen = everywhere if border == "clamp" else covered
    counted = covered if border == "coverage" else everywhere
    if upsample == "nearest":
        token = torch.floor(p / patch).clamp(0, tokens - 1).long()
        return [(token, torch.ones_like(p))], seen, counted
    q = (p / patch - 0.5).clamp(0, tokens - 1)
    token = q.floor().long()
    f = q - token
    return [(token, 1 - f), ((token + 1).clamp(max=tokens - 1), f)], seen, counted


def _cells(x: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Sums of ``x`` [..., H, W] over cells of ``stride`` pixels."""
    *lead, height, width = x.shape
    sh, sw = stride
    return x.reshape(*lead, height // sh, sh, width // sw, sw).sum((-3, -1))


def _view_sums(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None,
    upsample: Upsample,
    border: Border,
    stride: int | Sequence[int],
    dtype: torch.dtype,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each view: the weight, sums over cells [B, C, H', W'], counts [H', W']."""
    grid, patch = check_pair(_WHERE, "grid", grid), check_pair(_WHERE, "patch", patch)
    stride = check_pair(_WHERE, "stride", stride)
    views, batch, _, channels = tokens.shape
    maps = tokens.to(dtype).reshape(views, batch, *grid, channels).permute(0, 1, 4, 2, 3)
    scales = maps.new_ones(views) if weights is None else weights.to(maps)
    modes = upsample, border, maps.device
    for view, (dy, dx), scale in zip(maps, offsets.double().tolist(), scales, strict=True):
        reads_y, seen_y, counted_y = _axis(dy, grid[0], patch[0], *modes)
        reads_x, seen_x, counted_x = _axis(dx, grid[1], patch[1], *modes)
        if scale == 0:  # it is not read, and counts nowhere
            view, counted_y = torch.zeros_like(view), torch.zeros_like(counted_y)
        pixels = maps.new_zeros(())
        for token_y, weight_y in reads_y:
            for token_x, weight_x in reads_x:
                weight = torch.outer(
                    torch.where(seen_y, weight_y, 0), torch.where(seen_x, weight_x, 0)
                )
                value = view.index_select(2, token_y).index_select(3, token_x)
                pixels = pixels + _weighted(weight.to(dtype), value)
        counted = torch.outer(counted_y, counted_x).to(dtype)
        yield scale, _cells(pixels, stride), _cells(counted, stride)


def _ratio(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """total / count, and 0 where there is none, also in derivatives."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0)


def ensemble(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    reduce: Reduce = "mean",
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """As :func:`srt_ext.ensemble`, computed and returned in ``dtype``: [B, C, H', W']."""
    check_words("srt_ext.reference.ensemble", reduce=reduce, upsample=upsample, border=border)
    sums = _view_sums(tokens, offsets, grid, patch, weights, upsample, border, stride, dtype)
    if reduce == "mean":
        total = count = torch.zeros((), dtype=dtype, device=tokens.device)
        for scale, view_sum, view_count in sums:
            total = total + scale * view_sum
            count = count + scale * view_count
        return _ratio(total, count)

    assert reduce == "median"
    # The views that count come first, in order; a NaN that counts is the result, as in torch.
    values = [(_ratio(s, count), (count > 0).expand_as(s)) for _, s, count in sums]
    stack, counts = torch.stack([v for v, _ in values]), torch.stack([c for _, c in values])
    ordered = torch.where(counts, stack, torch.inf).sort(0).values
    number = counts.sum(0, keepdim=True)
    median = ordered.gather(0, (number - 1).clamp(min=0) // 2)[0]
    median = torch.where((counts & stack.isnan()).any(0), torch.nan, median)
    return torch.where(number[0] > 0, median, 0)


def ensemble_moments(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`srt_ext.ensemble_moments`, computed and returned in ``dtype``."""
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    mean = ensemble(tokens, offsets, grid, patch, weights, **modes, dtype=dtype)
    total, count = torch.zeros_like(mean), mean.new_zeros(())
    for scale, view_sum, view_count in _view_sums(
        tokens, offsets, grid, patch, weights, **modes, dtype=dtype
    ):
        squared = (_ratio(view_sum, view_count) - mean) ** 2
        total = total + scale * view_count * torch.where(view_count > 0, squared, 0)
        count = count + scale * view_count
    return mean, _ratio(total, count)
