"""Reference implementation of the ops in plain PyTorch, written to be read.

It is slow and builds a pixel map for every view. ``dtype`` is the precision of all sums. The tests
compare the kernels with the float64 result; the float32 result of the same code determines the
allowed error. The derivatives of the kernels are compared with those that autograd computes here.

The functions have the arguments of their counterparts in ``srt_ext`` and are differentiable
with respect to every floating-point tensor except offsets. Only option strings and pairs of
integers are validated.
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
    """(k, weight) of each pixel floor(coordinate) + k that is read, for the fraction f."""
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
    """The index of the pixel at position i, and whether position i has a pixel."""
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
    """weight * value; 0 where the weight is 0, even if the value is not finite."""
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
        if (nearest + delta).abs() < 2.0**-40:  # counts as a whole pixel
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
    """Computes :func:`srt_ext.shift` in ``dtype``.

    Args:
        image: [B, C, H, W].
        offsets: [V, 2], (dy, dx) in pixels.
        padding: as for :func:`srt_ext.shift`.
        interpolation: as for :func:`srt_ext.shift`.
        dtype: the dtype of all sums and of the result.

    Returns:
        [V, B, C, H, W] in ``dtype``.

    Raises:
        TypeError: an option is not a string.
        ValueError: an option has an unknown value.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> shift(image, torch.tensor([[0.0, 0.5]]), padding="border").flatten()
        tensor([0.0000, 0.5000, 1.5000, 2.5000], dtype=torch.float64)
    """
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
    """Computes :func:`srt_ext.windows` in ``dtype``.

    Args:
        image: [B, C, H, W].
        centers: [B, N, 2], (y, x) in pixels.
        size: (Ph, Pw), samples per window.
        scale: pixels between neighbouring samples, [2] or [B, N, 2]. None means 1.
        padding: as for :func:`srt_ext.windows`.
        dtype: the dtype of all sums and of the result.

    Returns:
        [B, N, C, Ph, Pw] in ``dtype``.

    Raises:
        TypeError: ``size`` or ``padding`` has the wrong type.
        ValueError: ``size`` or ``padding`` has a wrong value.

    Example:
        >>> image = torch.arange(6.0).reshape(1, 1, 1, 6)
        >>> windows(image, torch.tensor([[[0.5, 3.25]]]), (1, 2)).flatten()
        tensor([2.2500, 3.2500], dtype=torch.float64)
    """
    check_words("srt_ext.reference.windows", padding=padding)
    size = check_pair("srt_ext.reference.windows", "size", size)
    steps = centers.new_ones(2) if scale is None else scale
    steps = steps.double().expand(centers.shape)
    taps: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # (index, weight) for each axis
    for axis, n in enumerate(image.shape[2:]):
        sample = torch.arange(size[axis], device=centers.device) - (size[axis] - 1) / 2
        u = centers[..., axis, None].double() + sample * steps[..., axis, None] - 0.5  # [B, N, P]
        whole = (u - u.round()).abs() < 2.0**-40  # counts as a whole pixel
        i = torch.where(whole, u.round(), u.floor())
        f = torch.where(whole, u - u.detach(), u - i)  # 0 with a derivative at a whole pixel
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
            # A tap of weight 0 is not read, but it has a derivative with respect to its weight.
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
    """For each pixel of an axis: (token, weight) taps, whether it is seen, whether it counts."""
    y = torch.arange(tokens * patch, dtype=torch.float64, device=device) + 0.5
    everywhere = torch.ones_like(y, dtype=torch.bool)
    if border == "circular":
        roll = math.floor(d / patch + 0.5)  # whole tokens; the remainder of d is exact
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
    """Yields for each view its weight, its sums over cells [B, C, H', W'] and counts [H', W']."""
    grid, patch = check_pair(_WHERE, "grid", grid), check_pair(_WHERE, "patch", patch)
    stride = check_pair(_WHERE, "stride", stride)
    views, batch, _, channels = tokens.shape
    maps = tokens.to(dtype).reshape(views, batch, *grid, channels).permute(0, 1, 4, 2, 3)
    scales = maps.new_ones(views) if weights is None else weights.to(maps)
    modes = upsample, border, maps.device
    for view, (dy, dx), scale in zip(maps, offsets.double().tolist(), scales, strict=True):
        reads_y, seen_y, counted_y = _axis(dy, grid[0], patch[0], *modes)
        reads_x, seen_x, counted_x = _axis(dx, grid[1], patch[1], *modes)
        if scale == 0:  # a view of weight 0 is not read and does not count
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
    """total / count; 0 where the count is 0, also in derivatives."""
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
    """Computes :func:`srt_ext.ensemble` in ``dtype``.

    Args:
        tokens: [V, B, N, C], N = h * w.
        offsets: [V, 2], (dy, dx) in pixels.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V], >= 0. None means equal weights.
        reduce: as for :func:`srt_ext.ensemble`. The median ignores ``weights`` > 0.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.
        dtype: the dtype of all sums and of the result.

    Returns:
        [B, C, H / sh, W / sw] in ``dtype``.

    Raises:
        TypeError: an option or a pair of integers has the wrong type.
        ValueError: an option or a pair of integers has a wrong value.

    Example:
        >>> tokens = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, torch.zeros(1, 2), grid=(1, 2), patch=(1, 2)).flatten()
        tensor([0., 1., 3., 4.], dtype=torch.float64)
    """
    check_words("srt_ext.reference.ensemble", reduce=reduce, upsample=upsample, border=border)
    sums = _view_sums(tokens, offsets, grid, patch, weights, upsample, border, stride, dtype)
    if reduce == "mean":
        total = count = torch.zeros((), dtype=dtype, device=tokens.device)
        for scale, view_sum, view_count in sums:
            total = total + scale * view_sum
            count = count + scale * view_count
        return _ratio(total, count)

    assert reduce == "median"
    # Counted views come first, in order. A NaN in a counted view yields NaN, as in torch.
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
    """Computes :func:`srt_ext.ensemble_moments` in ``dtype``.

    Args:
        tokens: [V, B, N, C], N = h * w.
        offsets: [V, 2], (dy, dx) in pixels.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V], >= 0. None means equal weights.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.
        dtype: the dtype of all sums and of the results.

    Returns:
        (mean, var), each [B, C, H / sh, W / sw] in ``dtype``.

    Raises:
        TypeError: an option or a pair of integers has the wrong type.
        ValueError: an option or a pair of integers has a wrong value.

    Example:
        >>> tokens = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)  # two views of one token
        >>> mean, var = ensemble_moments(tokens, torch.zeros(2, 2), grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
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
