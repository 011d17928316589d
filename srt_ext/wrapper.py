"""``SRT``: a frozen ViT in, dense features out.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from . import views as designs
from ._rules import (
    BORDERS,
    INTERPOLATIONS,
    PADDINGS,
    REDUCES,
    UPSAMPLES,
    check_count,
    check_word,
)
from .backbones import Backbone, describe
from .checks import check_pair, check_tensor
from .ops import ensemble, ensemble_moments, shift
from .streaming import RunningMean, RunningMedian, RunningMoments


class SRTOutput(NamedTuple):
    """What :class:`SRT` returns."""

    field: torch.Tensor  # [B, C, ceil(H / sh), ceil(W / sw)]
    prefix: torch.Tensor | None  # [B, K, C], class and register tokens averaged over the views


class SRTMoments(NamedTuple):
    """What :meth:`SRT.moments` returns."""

    mean: torch.Tensor  # [B, C, ceil(H / sh), ceil(W / sw)]
    var: torch.Tensor  # as mean: the population variance over the views
    prefix: torch.Tensor | None  # [B, K, C]


class SRT(torch.nn.Module):
    """Wraps a frozen ViT: shifts the picture, runs every view, moves the tokens back, aggregates.

    Args:
        model: a timm ViT, or any callable from images [B, 3, H, W] to tokens [B, K + h * w, C]
            (then ``patch`` is needed, and ``prefix`` if K > 0).
        views: offsets [V, 2], (dy, dx) in pixels, or words for :func:`srt_ext.views.parse`.
        reduce: ``mean`` or ``median``.
        stride: pixels per output cell, (sh, sw) or one for both. 1 is pixel scale.
        streaming: aggregate each batch of views as it comes and hold none of their tokens. The
            mean is the same up to rounding; the median becomes approximate, and the views are run
            in the order of :func:`srt_ext.views.spread` (:class:`srt_ext.RunningMedian`).
        view_batch: views in one forward of the model; times the batch, they bound its memory.
        patch: (Ph, Pw), pixels per token, or one for both.
        prefix: tokens in front that are no patches.
        upsample, border: as in :func:`srt_ext.ensemble`.
        padding, interpolation: as in :func:`srt_ext.shift`.

    Calling it with images [B, 3, H, W] (normalised as the model wants them) gives an
    :class:`SRTOutput`. Sizes that are no multiple of the patch are padded by repeating the last row
    and column, and cropped back. No gradients are kept. Put the model in eval mode first.

    Memory, beside what the model needs for one batch of views: the output and the tokens of all
    views. A mean whose tokens would outgrow the output is aggregated in parts, in float32: twice
    the output, or the output and the tokens of one batch if they are more, however many views
    there are. With ``streaming``: the output in float32 for a mean, twice that for moments, 8 times
    for a median, and the result.

    Raises:
        TypeError, ValueError: as the ops, and for tokens whose number does not fit the picture.

    Example:
        >>> def mean_colour(x):  # a "model" whose tokens are the mean colours of 8 x 8 patches
        ...     return torch.nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)
        >>> srt = SRT(mean_colour, views="grid:2", patch=8)
        >>> srt(torch.rand(1, 3, 32, 30)).field.shape
        torch.Size([1, 3, 32, 30])
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        views: torch.Tensor | str = "grid:3",
        *,
        reduce: str = "mean",
        stride: int | tuple[int, int] = 1,
        view_batch: int = 8,
        streaming: bool = False,
        patch: int | tuple[int, int] | None = None,
        prefix: int | None = None,
        upsample: str = "bilinear",
        border: str = "coverage",
        padding: str = "reflect",
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        self.model = model  # a submodule if it is a module
        self._patch, self._prefix = patch, prefix
        describe(model, patch, prefix)
        if isinstance(views, str):
            views = designs.parse(views)
        check_tensor("SRT", "views", views)
        if views.dim() != 2 or views.shape[0] < 1 or views.shape[1] != 2:
            raise ValueError(f"SRT: views must be [V, 2] with V >= 1; got {list(views.shape)}")
        # On the CPU, and no buffer: .half() would round the offsets.
        self.views = views.detach().cpu()
        self.stride = check_pair("SRT", "stride", stride)
        self.view_batch = check_count("SRT", "view_batch", view_batch, 1)
        check_word("SRT", "reduce", reduce, REDUCES)
        check_word("SRT", "upsample", upsample, UPSAMPLES)
        check_word("SRT", "border", border, BORDERS)
        check_word("SRT", "padding", padding, PADDINGS)
        check_word("SRT", "interpolation", interpolation, INTERPOLATIONS)
        self.reduce, self.streaming = reduce, streaming
        self.upsample, self.border = upsample, border
        self.padding, self.interpolation = padding, interpolation

    @property
    def backbone(self) -> Backbone:
        """How the tokens of the present ``model`` are got."""
        return describe(self.model, self._patch, self._prefix)

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] to whole patches, to the right and below."""
        *_, height, width = images.shape
        patch_y, patch_x = self.backbone.patch
        if images.shape[2] == 0 or images.shape[3] == 0:
            raise ValueError(f"SRT: images must have pixels; got {list(images.shape)}")
        below, right = -height % patch_y, -width % patch_x
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _tokens(self, views: torch.Tensor, count: int) -> torch.Tensor:
        """views [k, B, 3, H, W] to tokens [k, B, K + N, C], N = ``count``."""
        tokens = self.backbone.tokens(views.flatten(0, 1))
        expected = self.backbone.prefix + count
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 3 or tokens.shape[1] != expected:
            got = list(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise ValueError(
                "SRT: the model must return tokens "
                f"[B, {self.backbone.prefix} + {count}, C]; got {got}"
            )
        return tokens.reshape(*views.shape[:2], *tokens.shape[1:])

    @torch.no_grad()
    def forward(
        self, images: torch.Tensor, progress: Callable[[int], object] | None = None
    ) -> SRTOutput:
        """images [B, 3, H, W] -> :class:`SRTOutput`; ``progress`` is told the views done."""
        (field,), prefix = self._aggregate(images, self.reduce, progress)
        return SRTOutput(field, prefix)

    @torch.no_grad()
    def moments(
        self, images: torch.Tensor, progress: Callable[[int], object] | None = None
    ) -> SRTMoments:
        """images [B, 3, H, W] -> mean and variance over the views, whatever ``reduce`` is.

        The root of the variance, its norm over the channels, is the noise map of the paper.
        """
        (mean, var), prefix = self._aggregate(images, "moments", progress)
        return SRTMoments(mean, var, prefix)

    def _aggregate(
        self, images: torch.Tensor, reduce: str, progress: Callable[[int], object] | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The fields, cropped to the picture, and the mean of the prefix tokens."""
        check_tensor("SRT", "images", images)
        if images.dim() != 4:
            raise ValueError(f"SRT: images must be [B, 3, H, W]; got {list(images.shape)}")
        padded = self._pad(images)
        patch, stride = self.backbone.patch, self.stride
        size = padded.shape[-2:]
        if size[0] % stride[0] or size[1] % stride[1]:
            raise ValueError(
                f"SRT: stride must divide the picture, padded to whole patches of {list(patch)}: "
                f"(y, x) = {list(size)}; "
                f"got {list(stride)}"
            )
        grid = (size[0] // patch[0], size[1] // patch[1])
        count, cells = grid[0] * grid[1], (size[0] // stride[0]) * (size[1] // stride[1])
        settings: dict[str, Any] = {
            "upsample": self.upsample,
            "border": self.border,
            "stride": stride,
        }
        running = _RUNNING[reduce](grid, patch, **settings)
        offsets = self.views
        if self.streaming and reduce == "median":
            offsets = designs.spread(offsets)

        # Views whose tokens are held until they are aggregated: of a median all, otherwise as many
        # as have the tokens of one output, in whole batches.
        total = len(offsets)
        part = self.view_batch
        if not self.streaming:
            batches = max(1, cells // count // self.view_batch)
            part = total if reduce == "median" else min(total, batches * self.view_batch)
        held = prefix = None
        fields: tuple[torch.Tensor, ...] = ()
        for begin in range(0, total, self.view_batch):
            end = min(total, begin + self.view_batch)
            views = shift(
                padded, offsets[begin:end], padding=self.padding, interpolation=self.interpolation
            )
            tokens = self._tokens(views, count)
            if self.backbone.prefix:
                sums = torch.promote_types(tokens.dtype, torch.float32)
                prefix_sum = tokens[:, :, : self.backbone.prefix].to(sums).sum(0)
                prefix = prefix_sum if prefix is None else prefix + prefix_sum
            dtype, patches = tokens.dtype, tokens[:, :, self.backbone.prefix :]
            first = begin - begin % part
            if part > self.view_batch:
                if held is None:
                    held = patches.new_empty(part, *patches.shape[1:])
                held[begin - first : end - first] = patches
                patches = held[: end - first]
            elif patches.stride(3) != 1:
                patches = patches.contiguous()
            if end - first == part or end == total:
                chunk = (patches, offsets[first:end])
                if part >= total and not self.streaming:
                    fields = self._all_at_once(reduce, *chunk, grid, patch, **settings)
                else:
                    running.update(*chunk)
            if progress is not None:
                progress(end)

        del held, patches, chunk
        if not fields:
            fields = running._fields()
        height, width = (-(-images.shape[2 + i] // stride[i]) for i in range(2))
        mean_prefix = None if prefix is None else (prefix / total).to(dtype)
        return tuple(field[:, :, :height, :width] for field in fields), mean_prefix

    @staticmethod
    def _all_at_once(reduce: str, *args: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
        if reduce == "moments":
            return ensemble_moments(*args, **settings)
        return (ensemble(*args, reduce=reduce, **settings),)


_RUNNING = {"mean": RunningMean, "median": RunningMedian, "moments": RunningMoments}
