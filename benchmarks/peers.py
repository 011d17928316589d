"""The alternatives in PyTorch that srt_ext is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from srt_ext import reference

Pair = tuple[int, int]


def _translate(image: torch.Tensor, dy: float, dx: float) -> torch.Tensor:
    """image [B, C, H, W] translated by whole pixels by torchvision, zeros beyond the border."""
    return affine(
        image,
        angle=0.0,
        translate=[int(dx), int(dy)],
        scale=1.0,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.NEAREST,
    )


def _upsample(view: torch.Tensor, grid: Pair, patch: Pair, upsample: str) -> torch.Tensor:
    """view [B, N, C] -> [B, C, H, W], pixels."""
    # Dense first: torch is several times slower to upsample a transposed map.
    tokens_map = view.transpose(1, 2).reshape(*view.shape[::2], *grid).contiguous()
    return F.interpolate(tokens_map, (grid[0] * patch[0], grid[1] * patch[1]), mode=upsample)


def _published_maps(
    tokens: torch.Tensor, offsets: torch.Tensor, grid: Pair, patch: Pair, upsample: str
) -> Iterator[torch.Tensor]:
    """Each view of tokens [V, B, N, C] at pixel scale [B, C, H, W], shifted back."""
    for view, (dy, dx) in zip(tokens, offsets.tolist(), strict=True):
        yield _translate(_upsample(view, grid, patch, upsample), -dy, -dx)


def published_ensemble(
    tokens: torch.Tensor, offsets: torch.Tensor, grid: Pair, patch: Pair, upsample: str
) -> torch.Tensor:
    """The mean as in the published code: upsample each view to pixels, shift it back, add.

    tokens [V, B, N, C], offsets [V, 2] whole pixels -> [B, C, H, W]. Pixels that a view does not
    cover count as zeros.
    """
    total = torch.zeros(())
    for pixels in _published_maps(tokens, offsets, grid, patch, upsample):
        total = total + pixels
    return total / len(tokens)


def published_median(
    tokens: torch.Tensor, offsets: torch.Tensor, grid: Pair, patch: Pair, upsample: str
) -> torch.Tensor:
    """The median as in the published code: stack pixel-scale maps of all views, torch.median."""
    maps = _published_maps(tokens, offsets, grid, patch, upsample)
    return torch.stack(list(maps)).median(0).values


def p_square(values: torch.Tensor) -> torch.Tensor:
    """values [V, E], V >= 5, in order -> an estimate of the median of each element [E].

    Jain and Chlamtac, "The P-square algorithm for dynamic calculation of quantiles and histograms
    without storing observations", 1985. The state is five heights and three positions.
    """
    heights = list(values[:5].sort(0).values)
    places = [torch.full_like(values[0], float(i + 1)) for i in range(5)]
    for seen, value in enumerate(values[5:], 5):
        heights[0] = torch.minimum(heights[0], value)
        heights[4] = torch.maximum(heights[4], value)
        for i in (1, 2, 3):
            places[i] = places[i] + (value < heights[i])
        places[4] = torch.full_like(value, seen + 1.0)
        for i in (1, 2, 3):
            missing = 1 + seen * i / 4 - places[i]
            left, right = places[i] - places[i - 1], places[i + 1] - places[i]
            up = (missing >= 1) & (right > 1)
            step = up.to(value.dtype) - ((missing <= -1) & (left > 1) & ~up).to(value.dtype)
            below, above = heights[i] - heights[i - 1], heights[i + 1] - heights[i]
            curve = heights[i] + step / (left + right) * (
                (left + step) * above / right + (right - step) * below / left
            )
            line = heights[i] + step * torch.where(step > 0, above / right, below / left)
            inside = (heights[i - 1] < curve) & (curve < heights[i + 1])
            heights[i] = torch.where(step != 0, torch.where(inside, curve, line), heights[i])
            places[i] = places[i] + step
    return heights[2]


def step_halving(values: torch.Tensor) -> torch.Tensor:
    """values [V, E] -> an estimate of the median [E]. The state is the estimate and a step.

    Each value moves the estimate by one step towards itself; a value within a step halves the step.
    Feldman and Shavitt, "An optimal median calculation algorithm for estimating Internet link
    delays from active measurements", 2007.
    """
    median, step = values[0].clone(), (values[1] - values[0]).abs()
    for value in values[1:]:
        median = median + step * torch.sign(value - median)
        step = torch.where((value - median).abs() < step, step / 2, step)
    return median


def published_shift(image: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """image [B, C, H, W] -> views [V, B, C, H, W], one affine warp per view, zeros outside."""
    return torch.stack([_translate(image, dy, dx) for dy, dx in offsets.tolist()])


def _overlap(size: int, offset: int) -> tuple[slice, slice]:
    """The pixels of one axis that a shifted view covers: slices of the result and of the view."""
    begin, end = max(0, -offset), min(size, size - offset)
    return slice(begin, end), slice(begin + offset, end + offset)


def sliced_ensemble(
    tokens: torch.Tensor, offsets: torch.Tensor, grid: Pair, patch: Pair, upsample: str
) -> torch.Tensor:
    """The published mean without the affine warp: each upsampled view is added where it covers."""
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    total = tokens.new_zeros(tokens.shape[1], tokens.shape[3], height, width)
    for view, (dy, dx) in zip(tokens, offsets.int().tolist(), strict=True):
        (to_y, from_y), (to_x, from_x) = _overlap(height, dy), _overlap(width, dx)
        pixels = _upsample(view, grid, patch, upsample)
        total[..., to_y, to_x] += pixels[..., from_y, from_x]
    return total.div_(len(tokens))


def _axis_matrix(
    offset: float, tokens: int, patch: int, stride: int, upsample: str, border: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One axis of one view: weights [cells, tokens] and counted pixels [cells]; float64."""
    reads, seen, counted = reference._axis(offset, tokens, patch, upsample, border)
    matrix = torch.zeros(tokens * patch, tokens, dtype=torch.float64)
    for token, weight in reads:
        matrix[torch.arange(tokens * patch), token] += torch.where(seen, weight, 0)
    cells = matrix.reshape(-1, stride, tokens).sum(1)
    return cells, counted.double().reshape(-1, stride).sum(1)


def _by_columns(
    tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, views: Pair, grid: Pair
) -> torch.Tensor:
    """tokens [Dy * Dx, B, N, C], rows [H', Dy * h], columns [W', Dx * w] -> [B, C, H', W']."""
    (count_y, count_x), (h, w) = views, grid
    batch, channels = tokens.shape[1], tokens.shape[3]
    # The product along y also sums the views that share dx. It copies the tokens, which are small.
    stacked = tokens.reshape(count_y, count_x, batch, h, w, channels).permute(2, 0, 3, 1, 4, 5)
    stacked = stacked.reshape(batch, count_y * h, count_x * w * channels)
    combined = torch.bmm(rows.expand(batch, -1, -1), stacked)
    combined = combined.reshape(batch * len(rows), count_x * w, channels)
    field = torch.bmm(columns.expand(len(combined), -1, -1), combined)
    return field.reshape(batch, len(rows), len(columns), channels).permute(0, 3, 1, 2)


def _by_views(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    inverse: torch.Tensor,
    grid: Pair,
) -> torch.Tensor:
    """tokens [V, B, N, C], rows [V, H', h], columns [W', V * w], inverse [H', W', 1]."""
    views, batch, _, channels = tokens.shape
    height, (h, w) = rows.shape[1], grid
    fields = []
    for b in range(batch):
        maps = tokens[:, b].reshape(views, h, w * channels)
        if torch.compiler.is_compiling() or tokens.requires_grad:  # which do not support this out=
            combined = torch.bmm(rows, maps).transpose(0, 1)
        else:
            combined = tokens.new_empty(height, views, w * channels)
            torch.bmm(
                rows, maps, out=combined.transpose(0, 1)
            )  # in the layout that the next product reads
        combined = combined.reshape(height, views * w, channels)
        fields.append(torch.bmm(columns.expand(height, -1, -1), combined).mul_(inverse))
    return (
        torch.stack(fields).permute(0, 3, 1, 2) if batch > 1 else fields[0].permute(2, 0, 1)[None]
    )


def separable_ensemble(
    offsets: torch.Tensor,
    grid: Pair,
    patch: Pair,
    stride: Pair,
    upsample: str,
    border: str,
    like: torch.Tensor,
) -> tuple[Callable[..., torch.Tensor], tuple[object, ...]]:
    """The mean as two matrix products, f = sum over dx of (sum over dy of A T) B^T.

    Returns a function and its arguments after the tokens [V, B, N, C]. Its result is
    [B, C, H', W'], channels_last as in srt_ext. Its tables, with the dtype and device of ``like``,
    are built here, before the clock starts.
    """
    dy, dx = (offsets.double()[:, k].unique() for k in (0, 1))
    arguments = zip(grid, patch, stride, strict=True)
    (rows, count_y), (columns, count_x) = (
        map(torch.stack, zip(*(_axis_matrix(d, *axis, upsample, border) for d in ds), strict=True))
        for ds, axis in zip((dy.tolist(), dx.tolist()), arguments, strict=True)
    )  # [D, cells, tokens], [D, cells]
    if torch.equal(offsets.double(), torch.cartesian_prod(dy, dx)):
        # A grid of offsets: the counts are also a product, and go into the tables.
        tables = []
        for matrix, count in ((rows, count_y), (columns, count_x)):
            total = count.sum(0)
            scale = torch.where(total > 0, 1 / total, 0)
            table = (matrix * scale[:, None]).transpose(0, 1).flatten(1)
            tables.append(table.to(like))
        return _by_columns, (*tables, (len(dy), len(dx)), grid)
    of_y, of_x = (
        torch.searchsorted(d, offsets.double()[:, k].contiguous()) for k, d in ((0, dy), (1, dx))
    )
    total = torch.einsum("vy,vx->yx", count_y[of_y], count_x[of_x])
    inverse = torch.where(total > 0, 1 / total, 0)[..., None]
    columns = columns[of_x].transpose(0, 1).flatten(1)
    return _by_views, (rows[of_y].to(like), columns.to(like), inverse.to(like), grid)


def sliced_shift(image: torch.Tensor, offsets: list[tuple[float, float]]) -> torch.Tensor:
    """image [B, C, H, W] -> [V, B, C, H, W], padding reflect: pad once, then blend slices.

    Views that share dy share the blend of their rows. A whole-pixel offset is one slice.
    """
    height, width = image.shape[2:]
    margin = int(max(abs(d) for pair in offsets for d in pair)) + 1
    padded = F.pad(image, (margin,) * 4, mode="reflect")

    def blend(x: torch.Tensor, d: float, size: int, dim: int) -> torch.Tensor:
        first = margin + math.floor(-d)
        near = x.narrow(dim, first, size)
        fraction = -d - math.floor(-d)
        return torch.lerp(near, x.narrow(dim, first + 1, size), fraction) if fraction else near

    rows = {dy: blend(padded, dy, height, 2) for dy, _ in offsets}
    return torch.stack([blend(rows[dy], dx, width, 3) for dy, dx in offsets])


def sampling_grid(image: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[V * B, H, W, 2], the grid of grid_sample for the views of ``image``."""
    batch, _, height, width = image.shape
    y, x = (torch.arange(n, dtype=torch.float64) for n in (height, width))
    dy, dx = offsets.double().T[:, :, None]
    y, x = ((i - d) * 2 / (n - 1) - 1 for i, d, n in ((y, dy, height), (x, dx, width)))
    places = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1
    )
    return places.repeat_interleave(batch, 0).to(image)


def sampled_shift(image: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """image [B, C, H, W] -> [V, B, C, H, W] by one grid_sample with reflection padding."""
    views = len(places) // len(image)
    images = image.expand(views, *image.shape).flatten(0, 1)
    views_flat = F.grid_sample(images, places, padding_mode="reflection", align_corners=True)
    return views_flat.unflatten(0, (views, len(image)))


def published_windows(image: torch.Tensor, centers: torch.Tensor, patch: int) -> torch.Tensor:
    """image [B, C, H, W], centers [B, N, 2] as fractions of H, W -> [B, N, C, P, P], as SPoT.

    P samples span a window of P pixels from edge to edge. The four pixels of each sample are
    indexed in the image and weighted by their distances.
    """
    size = torch.tensor(image.shape[2:]).to(centers)
    reach = torch.linspace(-1, 1, patch).to(centers) * patch / size.sum()
    places = (centers[:, :, None] + reach[:, None]) * size  # [B, N, P, 2]
    batch = torch.arange(len(image), device=image.device)[:, None, None, None]
    axes = []
    for place, pixels in zip(places.unbind(-1), image.shape[2:], strict=True):
        low = place.floor().long().clamp(0, pixels - 1)
        high = (place + 1).floor().long().clamp(0, pixels - 1)
        axes.append(((low, high - place), (high, place - low)))
    result = image.new_zeros(())
    for row, row_weight in axes[0]:
        for column, column_weight in axes[1]:
            picked = image[batch, :, row[..., :, None], column[..., None, :]]
            weight = row_weight[..., :, None] * column_weight[..., None, :]
            result = result + weight[..., None] * picked
    return result.permute(0, 1, 4, 2, 3)


def window_places(centers: torch.Tensor, patch: int, size: Pair) -> torch.Tensor:
    """[B, N * P, P, 2], the grid of grid_sample for windows of P x P pixels."""
    reach = torch.arange(patch, device=centers.device) - (patch - 1) / 2
    y, x = (
        (centers[..., axis, None] + reach) * (2 / size[axis]) - 1 for axis in (0, 1)
    )  # [B, N, P]
    shape = (*y.shape, patch)
    places = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], -1)
    return places.flatten(1, 2)


def sampled_windows(image: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """image [B, C, H, W] -> [B, N, C, P, P] by one grid_sample."""
    patch = places.shape[2]
    rows = F.grid_sample(image, places, padding_mode="border", align_corners=False)
    return rows.unflatten(2, (-1, patch)).transpose(1, 2)
