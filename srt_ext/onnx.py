"""``Shift``, ``Ensemble`` and ``SRT`` as modules of plain operators, for export to ONNX.

``torch.onnx.export(module, ..., dynamo=True)`` translates them to standard operators (Gather,
MatMul, Mul, Transpose) with constant tables, which ONNX runtimes execute without custom ops. The
tables are computed by the kernels of ``torch.ops.srt`` when a module is created. The export needs
the packages ``onnx`` and ``onnxscript``; the modules do not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from ._library import unavailable

if unavailable is not None:
    raise ImportError(f"srt_ext.onnx is not available: {unavailable}")

import torch
import torch.nn.functional as F  # noqa: N812

import srt_ext

from . import ops
from ._validation import check_pair, check_tensor, check_words, wrong
from .options import Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample
from .srt import SRTOutput, _even, _layer_tokens, _mirrored

__all__ = ["SRT", "Ensemble", "Shift"]

_SRT = "srt_ext.onnx.SRT"
_READ = 64  # reading a vector takes about as long as this many multiply-adds of a vector


def _check_input(where: str, name: str, value: torch.Tensor, **shape: int | None) -> None:
    """``shape``: the size of each dimension by its letter; None accepts every size."""
    check_tensor(where, name, value)
    known = {letter: size for letter, size in shape.items() if size is not None}
    letters, got = list(shape), list(value.shape)
    if len(got) != len(letters) or any(got[letters.index(x)] != n for x, n in known.items()):
        sizes = ", ".join(f"{letter} = {size}" for letter, size in known.items())
        raise wrong(ValueError, where, f"{name} must be [{', '.join(letters)}], {sizes}", got)
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        rule = f"{name} must be float32, float16 or bfloat16"
        raise wrong(TypeError, where, rule, value.dtype)


# ---- views ---------------------------------------------------------------------------------------


def _pixel_reads(
    offsets: torch.Tensor, size: int, **modes: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pixels that one axis of each view reads, and their weights: both [K, V, size].

    offsets [V] in pixels. Missing reads have the index ``size``. The weights are None if all views
    are copies.
    """
    different, inverse = offsets.unique(return_inverse=True)
    unit = torch.eye(size, dtype=torch.float64, device="cpu")[None, None]
    indices, weights = [], []
    for offset in different:
        views = ops.shift(unit, torch.stack([offset, torch.zeros_like(offset)])[None], **modes)
        table = views[0, 0, 0]  # [size, pixels]
        place = table.abs().topk(min(size, 4), 1).indices  # bicubic reads four pixels
        weight = table.gather(1, place)
        indices.append(torch.where(weight == 0, size, place))
        weights.append(weight)
    index, weight = (torch.stack(parts)[inverse].permute(2, 0, 1) for parts in (indices, weights))
    reads = max(1, int((weight != 0).any((1, 2)).sum()))
    index, weight = index[:reads], weight[:reads]
    copies = reads == 1 and bool(((weight == 1) | (index == size)).all())
    return index, None if copies else weight.float()


def _weighted_reads(
    x: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """Sums ``x`` at index [K, n] along ``dim`` with weight [K, n, ...]."""
    reads: list[torch.Tensor] = [x.index_select(dim, places) for places in index]
    if weight is None:
        return reads[0]
    terms: list[torch.Tensor] = [r.to(w.dtype) * w for r, w in zip(reads, weight, strict=True)]
    return functools.reduce(torch.add, terms)


class Shift(torch.nn.Module):
    """:func:`srt_ext.shift` for images of one size.

    Args:
        offsets: [V, 2], (dy, dx) in pixels, float32 or float64.
        size: (H, W) of the images in pixels.
        padding: as for :func:`srt_ext.shift`.
        interpolation: as for :func:`srt_ext.shift`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> Shift(torch.tensor([[0.0, 1.0], [0.0, 0.5]]), (1, 4), padding="border")(image).squeeze()
        tensor([[0.0000, 0.0000, 1.0000, 2.0000],
                [0.0000, 0.5000, 1.5000, 2.5000]])
    """

    rows: torch.Tensor  # [K, V * H]
    columns: torch.Tensor  # [K, V * W]
    row_weights: torch.Tensor | None  # [K, V * H, 1]
    column_weights: torch.Tensor | None  # [K, V * W]

    def __init__(
        self,
        offsets: torch.Tensor,
        size: Pair,
        *,
        padding: Padding = "reflect",
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        where = "srt::shift"
        modes: Any = {"padding": padding, "interpolation": interpolation}
        check_tensor(where, "offsets", offsets)
        self.size = check_pair(where, "size", size)
        with ops.state_mode():
            offsets = offsets.detach().cpu()
            ops.shift(torch.zeros(1, 1, 1, 1, device="cpu"), offsets, **modes)  # checks them
            (rows, y), (columns, x) = (
                _pixel_reads(d, n, **modes)
                for d, n in zip(offsets.double().unbind(1), self.size, strict=True)
            )
            self.views = len(offsets)
            # Missing reads read a row or column of zeros after the last one.
            self.pads = bool((rows == self.size[0]).any()), bool((columns == self.size[1]).any())
            # Column x of view v is at v * W + x.
            first = self.size[1] * torch.arange(self.views, device="cpu")[:, None]
            missing = columns == self.size[1]
            columns = torch.where(missing, self.views * self.size[1], columns + first)
            tables = {
                "rows": rows.flatten(1),
                "columns": columns.flatten(1),
                "row_weights": None if y is None else y.flatten(1)[..., None],
                "column_weights": None if x is None else x.flatten(1),
            }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Computes the views.

        Args:
            image: [B, C, H, W], float32, float16 or bfloat16.

        Returns:
            [V, B, C, H, W] in the dtype of ``image``.
        """
        height, width = self.size
        _check_input("srt_ext.onnx.Shift", "image", image, B=None, C=None, H=height, W=width)
        batch, channels = image.shape[:2]
        x = F.pad(image, (0, 0, 0, 1)) if self.pads[0] else image
        x = _weighted_reads(x, 2, self.rows, self.row_weights)
        x = x.reshape(batch, channels, self.views, height, width).transpose(2, 3)
        x = x.reshape(batch, channels, height, self.views * width)
        x = F.pad(x, (0, 1)) if self.pads[1] else x
        x = _weighted_reads(x, 3, self.columns, self.column_weights)
        x = x.reshape(batch, channels, height, self.views, width)
        return x.permute(3, 0, 1, 2, 4).to(image.dtype)


# ---- ensemble ------------------------------------------------------------------------------------


def _axis_tables(
    offsets: torch.Tensor, tokens: int, patch: int, stride: int, upsample: Upsample, border: Border
) -> tuple[torch.Tensor, torch.Tensor]:
    """One axis of each view, float64: the weights of tokens [V, cells, tokens], counts [V, cells].

    offsets [V] in pixels. A count is the counted fraction of a cell; the weights of a cell with
    count 1 sum to 1.
    """
    different, inverse = offsets.unique(return_inverse=True)
    unit = torch.eye(tokens, dtype=torch.float64, device="cpu")[None, None]
    tables = []
    for offset in different:
        # The median of one view is its value. The mean would accumulate it from cell to cell, and
        # its rounding errors would be weights of tokens that the cell does not read.
        field = ops.ensemble(
            unit,
            torch.stack([offset, torch.zeros_like(offset)])[None],
            (tokens, 1),
            (patch, 1),
            reduce="median",
            upsample=upsample,
            border="zeros" if border == "coverage" else border,
            stride=(stride, 1),
        )
        tables.append(field[0, :, :, 0].T)
    table = torch.stack(tables)[inverse]
    if border != "coverage":
        return table, torch.ones_like(table[..., 0])
    return table, (table.sum(2) * stride).round() / stride


def _blocks(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits axis tables [..., cells, tokens] into blocks, which leaves out most of their zeros.

    A block is a range of cells. Returns the K tokens that each block reads, [..., blocks, K], and
    their weights [..., blocks, cells of a block, K]. The size of the blocks minimises the work.
    """
    cells = table.shape[-2]
    choices = []
    for size in (n for n in range(1, cells + 1) if cells % n == 0):
        blocks = table.unflatten(-2, (cells // size, size))
        reads = max(1, int((blocks != 0).any(-2).sum(-1).max()))
        choices.append((reads * (1 + _READ / size), size, reads))
    _, size, reads = min(choices)
    blocks = table.unflatten(-2, (cells // size, size))
    used = (blocks != 0).any(-2)
    index = used.byte().argsort(stable=True, dim=-1, descending=True)[..., :reads]
    used = used.gather(-1, index)
    index = torch.where(used, index, index[..., :1])  # a read that is missing has weight 0
    weights = blocks.gather(-1, index.unsqueeze(-2).expand(*blocks.shape[:-1], reads))
    return index, weights * used.unsqueeze(-2)


def _factors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(a [m], b [n]) with matrix [m, n] = outer(a, b), or None."""
    y, x = divmod(int(matrix.argmax()), matrix.shape[1])
    if matrix[y, x] == 0:
        return None
    a, b = matrix[:, x], matrix[y] / matrix[y, x]
    return (a, b) if torch.allclose(torch.outer(a, b), matrix, rtol=1e-12, atol=0) else None


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x; 0 where ``x`` is 0."""
    return torch.where(x > 0, 1 / x, 0)


class Ensemble(torch.nn.Module):
    """The mean of :func:`srt_ext.ensemble` for tokens of one grid.

    The graph has two batched matrix products, along y and along x. Upsampled maps of the views are
    not computed: between the products, the tensor is [B, D, H', w * C]. D is the number of distinct
    dx if each of them has equally many views, otherwise V. A token that is not finite can also make
    cells NaN that do not read it.

    Args:
        offsets: [V, 2], (dy, dx) in pixels, float32 or float64.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V] or None, as for :func:`srt_ext.ensemble`.
        reduce: ``mean``. The median is not supported, because it needs the upsampled maps of all
            views.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> tokens = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1)
        >>> Ensemble(torch.zeros(1, 2), grid=(1, 2), patch=(1, 4))(tokens).flatten()
        tensor([0.0000, 0.0000, 0.5000, 1.5000, 2.5000, 3.5000, 4.0000, 4.0000])
    """

    row_tokens: torch.Tensor  # [D * blocks * K], the index v * h + i of row i of view v
    rows: torch.Tensor  # [D, blocks, cells, K]
    column_tokens: torch.Tensor  # [blocks * K], the index d * w + j of column j of group d
    columns: torch.Tensor  # [blocks, cells, K]
    scale: torch.Tensor | None  # [H', W', 1], or None if the tables contain it

    def __init__(
        self,
        offsets: torch.Tensor,
        grid: Pair,
        patch: Pair,
        weights: torch.Tensor | None = None,
        *,
        reduce: Reduce = "mean",
        upsample: Upsample = "bilinear",
        border: Border = "coverage",
        stride: Stride = 1,
    ) -> None:
        super().__init__()
        modes: dict[str, Any] = {"upsample": upsample, "border": border}
        with ops.state_mode():
            self.grid, patch, stride, offsets, shares = _checked(
                offsets, grid, patch, weights, reduce, stride, modes
            )
            self.views = len(offsets)
            tables = _tables(offsets, shares, self.grid, patch, stride, modes)
        for name, table in tables.items():
            table = table if table is None or table.dtype == torch.int64 else table.float()
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Aggregates the tokens of all views.

        Args:
            tokens: [V, B, h * w, C], float32, float16 or bfloat16.

        Returns:
            [B, C, H', W'] in the dtype of ``tokens``. Cells in which no view counts are 0.
        """
        (h, w), count = self.grid, self.grid[0] * self.grid[1]
        where = "srt_ext.onnx.Ensemble"
        _check_input(where, "tokens", tokens, V=self.views, B=None, N=count, C=None)
        batch, channels = tokens.shape[1], tokens.shape[3]
        x = tokens.to(self.rows.dtype).transpose(0, 1)
        x = x.reshape(batch, self.views * h, w * channels).index_select(1, self.row_tokens)
        groups, blocks, cells, reads = self.rows.shape
        height = blocks * cells
        x = torch.matmul(self.rows, x.reshape(batch, groups, blocks, reads, w * channels))
        x = x.reshape(batch, groups, height, w * channels).transpose(1, 2)
        x = x.reshape(batch, height, groups * w, channels).index_select(2, self.column_tokens)
        blocks, cells, reads = self.columns.shape
        x = torch.matmul(self.columns, x.reshape(batch, height, blocks, reads, channels))
        x = x.reshape(batch, height, blocks * cells, channels)
        x = x if self.scale is None else x * self.scale
        return x.permute(0, 3, 1, 2).to(tokens.dtype)


def _checked(
    offsets: Any, grid: Any, patch: Any, weights: Any, reduce: Any, stride: Any, modes: Any
) -> tuple[Any, ...]:
    """(grid, patch, stride, offsets [V, 2], weights [V]); the tensors in float64 on the CPU."""
    where = "srt::ensemble"
    check_tensor(where, "offsets", offsets)
    check_words(where, reduce=reduce, **modes)
    if reduce != "mean":
        rule = "reduce must be 'mean' for ONNX; a median needs the upsampled maps of all views"
        raise wrong(ValueError, where, rule, repr(reduce))
    grid, patch = check_pair(where, "grid", grid), check_pair(where, "patch", patch)
    stride = check_pair(where, "stride", stride)
    offsets = offsets.detach().cpu()
    if weights is not None:
        check_tensor(where, "weights", weights)
        weights = weights.detach().cpu()
    views = offsets.shape[0] if offsets.dim() else 1
    token = torch.zeros(1, dtype=torch.float32, device="cpu").expand(views, 1, grid[0] * grid[1], 1)
    ops.check_views("ensemble", token, offsets, grid, patch, weights, stride=stride, **modes)
    offsets = offsets.double()
    weights = torch.ones_like(offsets[:, 0]) if weights is None else weights.double()
    return grid, patch, stride, offsets, weights


def _tables(
    offsets: torch.Tensor, weights: torch.Tensor, grid: Any, patch: Any, stride: Any, modes: Any
) -> dict[str, torch.Tensor | None]:
    """The buffers of :class:`Ensemble`, in float64 and int64."""
    weights = weights / (weights.max() if weights.max() > 0 else 1)  # only ratios matter
    counted = weights.nonzero()[:, 0]  # views of weight 0 are not read
    counted = counted if len(counted) else weights.argsort()
    order = counted[offsets[counted, 1].argsort(stable=True)]
    dy, dx = offsets[order].unbind(1)
    sizes = dx.unique(return_counts=True)[1]
    members = int(sizes[0]) if (sizes == sizes[0]).all() else 1
    groups = len(order) // members  # of equal dx

    (rows, count_y), (columns, count_x) = (
        _axis_tables(*axis, **modes) for axis in zip((dy, dx), grid, patch, stride, strict=True)
    )
    rows, columns = rows * weights[order, None, None], columns[::members]
    scale = torch.einsum("v,vy,vx->yx", weights[order], count_y, count_x)
    parts = _factors(scale)
    if parts is not None:
        rows = rows * _inverse(parts[0])[:, None]
        columns = columns * _inverse(parts[1])[:, None]

    row_tokens, rows = _blocks(rows.unflatten(0, (groups, members)))
    row_tokens = row_tokens + grid[0] * order.reshape(groups, members, 1, 1)
    column_tokens, columns = _blocks(columns)
    first = grid[1] * torch.arange(groups, device="cpu")
    return {
        "row_tokens": row_tokens.transpose(1, 2).flatten(),
        "rows": rows.permute(0, 2, 3, 1, 4).flatten(3),
        "column_tokens": (column_tokens + first[:, None, None]).transpose(0, 1).flatten(),
        "columns": columns.permute(1, 2, 0, 3).flatten(2),
        "scale": None if parts is not None else _inverse(scale)[..., None],
    }


# ---- image to field ------------------------------------------------------------------------------


class SRT(torch.nn.Module):
    """An :class:`srt_ext.SRT` for images of one size, from the image to the field.

    The views of a batch (``view_batch``; 8 for ``auto``) run in one forward pass of the model. The
    graph contains the operators of the model once for each batch of views, and its weights once.

    Args:
        srt: with ``reduce="mean"``, and without ``inject`` and ``anchor``. ``streaming`` has no
            effect. The model runs once, on an image of zeros.
        size: (H, W) of the images in pixels.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a setting of ``srt`` is not supported; otherwise as :class:`srt_ext.SRT`.

    Example:
        >>> srt = srt_ext.SRT(torch.nn.Conv2d(3, 5, 8, stride=8), views=4, stride=4, patch=8)
        >>> SRT(srt, (32, 24))(torch.rand(2, 3, 32, 24)).field.shape
        torch.Size([2, 5, 8, 6])
    """

    shares: torch.Tensor  # [V, 1, 1, 1], of the views in the prefix tokens

    def __init__(self, srt: srt_ext.SRT, size: Pair) -> None:
        super().__init__()
        _check_srt(srt)
        self.srt, self.size = srt, check_pair(_SRT, "size", size)
        known = srt._known
        weights = [1.0] * known.number if known.weights is None else known.weights
        views = known.take([i for i, weight in enumerate(weights) if weight])  # others do not count
        total = views.number
        step = _even(total, 8 if srt.view_batch == "auto" else int(srt.view_batch))
        self.parts = [views.take(slice(i, i + step)) for i in range(0, total, step)]
        with ops.state_mode():
            tensors = srt.model.parameters() if isinstance(srt.model, torch.nn.Module) else ()
            plain = torch.zeros(1, 3, *self.size, dtype=torch.float32, device="cpu")
            frame = srt._frame(plain.to(next((p for p in tensors if p.is_floating_point()), plain)))
            found = srt.backbone.features(frame.image)
            layers = [_layer_tokens(f, frame.image, 1, None) for f in found]
        modes: Any = {"padding": srt.padding, "interpolation": srt.interpolation}
        pixels, device = frame.image.shape[2:], frame.image.device
        self.shifts = torch.nn.ModuleList(
            Shift(part.views.offsets, pixels, **modes).to(device) for part in self.parts
        )
        offsets, own, _ = views.views
        modes = {"upsample": srt.upsample, "border": srt.border, "stride": frame.stride}
        self.ensembles = torch.nn.ModuleList(
            Ensemble(offsets, layer.grid, layer.patch, own, **modes).to(device) for layer in layers
        )
        shares = [weight / math.fsum(weights) for weight in weights if weight]
        tensor = torch.tensor(shares, dtype=torch.float32, device=device)[:, None, None, None]
        self.register_buffer("shares", tensor, persistent=False)

    def forward(self, images: torch.Tensor) -> Any:
        """Computes the fields of images.

        Args:
            images: [B, 3, H, W], float32, float16 or bfloat16, normalised as the model expects.

        Returns:
            :class:`srt_ext.SRTOutput`, or a list of them, as the ``SRT`` itself. In ONNX these are
            the outputs in the same order: field, then prefix tokens if the model has them.
        """
        _check_input(_SRT, "images", images, B=None, C=3, H=self.size[0], W=self.size[1])
        frame = self.srt._frame(images)
        batches = []
        for part, shift in zip(self.parts, self.shifts, strict=True):
            views = _mirrored(shift(frame.image), part.mirror, (-2, -1))
            found = self.srt.backbone.features(views.flatten(0, 1))
            settings = frame.image, part.number, part.mirror
            batches.append([_layer_tokens(features, *settings) for features in found])
        outputs = []
        for ensemble, layer in zip(self.ensembles, zip(*batches, strict=True), strict=True):
            field = frame.cropped(ensemble(torch.cat([batch.tokens for batch in layer])))
            prefix = [batch.prefix for batch in layer if batch.prefix is not None]
            mean = (torch.cat(prefix) * self.shares).sum(0).to(field.dtype) if prefix else None
            outputs.append(SRTOutput(field, mean))
        return outputs if self.srt.backbone.returns_list else outputs[0]


def _check_srt(srt: Any) -> None:
    if not isinstance(srt, srt_ext.SRT):
        raise wrong(TypeError, _SRT, "srt must be a srt_ext.SRT", type(srt).__name__)
    inject = srt._settings["layers"] if srt._injects else None
    for name, value, allowed in (
        ("reduce", srt.reduce, "mean"),
        ("inject", inject, None),
        ("anchor", srt.anchor, None),
    ):
        if value != allowed:
            raise wrong(ValueError, _SRT, f"{name} of srt must be {allowed!r}", repr(value))
