"""The oracle: what the ops compute, in plain PyTorch, written to be read.

Slow and hungry on purpose: a pixel-scale map for every view. ``dtype`` is the precision of all
sums; float64 is the truth that the kernels are tested against, and the same code in float32 gives
the error budget that they have to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# The constant of cubic convolution (Keys 1981) that PyTorch uses.
_A = -0.75


def _taps(f: torch.Tensor, interpolation: str) -> list[tuple[int, torch.Tensor]]:
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


def _pad_index(i: torch.Tensor, n: int, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
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
    return torch.where(weight == 0, torch.zeros((), dtype=value.dtype), weight * value)


def _shift_axis(
    x: torch.Tensor, d: float, dim: int, padding: str, interpolation: str
) -> torch.Tensor:
    """``x`` [..., H, W] moved by ``d`` pixels along ``dim``."""
    n = x.shape[dim]
    y = torch.arange(n)
    delta = torch.tensor(d, dtype=torch.float64)
    along = (-1, 1) if dim == -2 else (1, -1)
    if interpolation == "nearest":
        reads = [(y + torch.floor(0.5 - delta).long(), torch.ones(()))]
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
    padding: str = "reflect",
    interpolation: str = "bilinear",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """As :func:`srt_ext.shift`, computed and returned in ``dtype``: [V, B, C, H, W]."""
    views = []
    for dy, dx in offsets.double().tolist():
        view = _shift_axis(image.to(dtype), dy, -2, padding, interpolation)
        views.append(_shift_axis(view, dx, -1, padding, interpolation))
    return torch.stack(views)


def _axis(
    d: float, tokens: int, patch: int, upsample: str, border: str
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """For each pixel of one axis: (token, weight) reads, whether it is seen, whether it counts."""
    p = torch.arange(tokens * patch, dtype=torch.float64) + 0.5 + d
    covered = (p >= 0) & (p < tokens * patch)
    everywhere = torch.ones_like(covered)
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


def ensemble(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The mean of :func:`srt_ext.ensemble`, computed and returned in ``dtype``: [B, C, H', W']."""
    stride = (stride, stride) if isinstance(stride, int) else stride
    views, batch, _, channels = tokens.shape
    maps = tokens.to(dtype).reshape(views, batch, *grid, channels).permute(0, 1, 4, 2, 3)
    scales = torch.ones(views) if weights is None else weights
    total = count = torch.zeros((), dtype=dtype)
    for view, (dy, dx), scale in zip(
        maps, offsets.double().tolist(), scales.to(dtype), strict=True
    ):
        if scale == 0:
            continue
        reads_y, seen_y, counted_y = _axis(dy, grid[0], patch[0], upsample, border)
        reads_x, seen_x, counted_x = _axis(dx, grid[1], patch[1], upsample, border)
        pixels = torch.zeros((), dtype=dtype)
        for token_y, weight_y in reads_y:
            for token_x, weight_x in reads_x:
                weight = torch.outer(
                    torch.where(seen_y, weight_y, 0), torch.where(seen_x, weight_x, 0)
                )
                value = view[:, :, token_y[:, None], token_x[None, :]]
                pixels = pixels + _weighted(weight.to(dtype), value)
        total = total + scale * _cells(pixels, stride)
        count = count + scale * _cells(torch.outer(counted_y, counted_x).to(dtype), stride)
    if total.dim() == 0:
        height, width = (g * p // s for g, p, s in zip(grid, patch, stride, strict=True))
        return torch.zeros(batch, channels, height, width, dtype=dtype)
    return torch.where(count > 0, total / count, torch.zeros((), dtype=dtype))
