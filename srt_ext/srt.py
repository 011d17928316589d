"""``SRT``: dense features from a frozen ViT.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from . import views as designs
from ._memory import free_bytes, peak_bytes
from ._validation import check_count, check_pair, check_tensor, check_words
from .backbones import Backbone, Features, HookBackbone, Layer, Model, describe, force_eager
from .ops import ensemble, ensemble_moments, shift
from .options import Border, Interpolation, Padding, Reduce, Upsample
from .streaming import RunningMean, RunningMedian, RunningMoments

Progress = Callable[[int], object]


class SRTOutput(NamedTuple):
    """What :class:`SRT` returns for one layer."""

    field: torch.Tensor  # [B, C, ceil(H / sh), ceil(W / sw)]
    prefix: torch.Tensor | None  # [B, K, C], class and register tokens averaged over the views


class SRTMoments(NamedTuple):
    """What :meth:`SRT.moments` returns for one layer."""

    mean: torch.Tensor  # [B, C, ceil(H / sh), ceil(W / sw)]
    var: torch.Tensor  # as mean: the population variance over the views
    prefix: torch.Tensor | None  # [B, K, C]


class LayerTokens(NamedTuple):
    """The tokens of one layer, of some views."""

    tokens: torch.Tensor  # [k, B, N, C], N = h * w, in row order; dense in the last dimension
    grid: tuple[int, int]  # (h, w)
    patch: tuple[int, int]  # (Ph, Pw), pixels per token at this layer
    prefix: torch.Tensor | None  # [k, B, K, C], class and register tokens


class ViewTokens(NamedTuple):
    """One batch of views from :meth:`SRT.tokens`."""

    offsets: torch.Tensor  # [k, 2], (dy, dx) in pixels, on the CPU
    weights: torch.Tensor | None  # [k]; None: all views count the same
    layers: list[LayerTokens]  # in requested order; one without ``layers`` or with ``inject``


class SRT(torch.nn.Module):
    """Wraps a frozen ViT: shifts the image, runs every view, and aggregates the tokens.

    Args:
        model: a model of timm or of transformers, one with DINO's ``get_intermediate_layers``, or
            any callable from images [B, 3, H, W] to tokens [B, K + h * w, C] or a map
            [B, C, h, w] or [B, h, w, C] (then ``patch`` is needed). Or the
            :class:`srt_ext.backbones.Backbone` that :func:`srt_ext.backbones.describe` returns.
        views: offsets [V, 2], (dy, dx) in pixels; a string for :func:`srt_ext.views.parse`; a
            number of views for :func:`srt_ext.views.best`, up to 169, within 6 pixels; or (offsets,
            weights [V]).
        layers: the block (of a hierarchical model: the stage), from 0 or, negative, from the end;
            or the name of a module, whose first output is read by a hook. None: the last. A list
            gives a list of results, from one pass over the views. Blocks behind the last requested
            one do not run (in transformers: only if requested by name).
        norm: apply the final norm of the model to the features, as DINO's
            ``get_intermediate_layers`` does. Layers without one (all but the last stage of Swin;
            Hiera, ConvNeXt, ResNet) and layers by name are returned as they are. For SAM, whose
            last norm is its neck, the neck's output.
        inject: a layer, as in ``layers``, whose tokens are replaced by the ensemble: calling this
            gives what the model itself returns from there. See below.
        reduce: ``mean`` or ``median``.
        stride: pixels per output cell, (sh, sw) or one for both. 1 is pixel scale.
        streaming: aggregate each batch of views as it comes and hold none of their tokens. The
            mean is the same up to rounding; the median becomes approximate, and the views run in
            the order of :func:`srt_ext.views.spread` (:class:`srt_ext.RunningMedian`).
        view_batch: the most views in one forward of the model; times the batch, they bound its
            memory. ``auto``: as many as fit into half of the free memory, measured on the first
            view, and at most 8 on a CPU and 64 on a GPU.
        patch: (Ph, Pw), pixels per token, or one for both. For a layer by name: at that layer.
        prefix: number of class and register tokens before the patches.
        upsample: as in :func:`srt_ext.ensemble`; None is ``bilinear``, with ``inject`` ``nearest``,
            for which one unshifted view changes nothing.
        border: as in :func:`srt_ext.ensemble`.
        padding, interpolation: as in :func:`srt_ext.shift`.

    Patch size, prefix tokens and layout are read from the model. What it does not declare (the
    prefix of any other callable, the layout of a square map that fits both) is inferred from the
    shapes, with a warning.

    Calling it with images [B, 3, H, W] (normalised as the model wants them) gives an
    :class:`SRTOutput`, or a list of them. Images are padded to whole patches by repeating the last
    row and column, and the result is cropped. No gradients are kept. Put the model in eval mode
    first. For the result of ``torch.compile(model)`` the features are compiled with its settings;
    with ``inject`` and with layers by name the model runs eagerly.

    With ``inject`` the blocks up to that layer run for every view, and once for the unshifted image
    if the offset 0 is not among the views. The other blocks and the head run once, on the unshifted
    image with the new tokens. Class and register tokens become their averages. The result is that
    of the padded image. The model is left unchanged, also by an exception.

    A token is located at the middle of its patch. Overlapping convolutions centre theirs elsewhere:
    the field of a ResNet lies (s - 1) / 2 pixels, s the pitch, too far down and right.

    Memory, beside what the model needs for one batch of views: for each layer the result and the
    tokens of all views. Where these would be larger than a field, a mean or moments are aggregated
    in parts: the tokens of a part are as large as a field, or those of one batch, and the sums, one
    for a mean and two for moments, are in float32. With ``streaming``: the tokens of one batch, and
    one field in float32 for a mean, two for moments, 8 for a median.

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
        model: Model | Backbone,
        views: torch.Tensor | str | int | tuple[torch.Tensor, torch.Tensor] = 16,
        *,
        layers: Layer | Sequence[Layer] | None = None,
        norm: bool = True,
        inject: Layer | None = None,
        reduce: Reduce = "mean",
        stride: int | tuple[int, int] = 1,
        view_batch: int | str = 8,
        streaming: bool = False,
        patch: int | tuple[int, int] | None = None,
        prefix: int | None = None,
        upsample: Upsample | None = None,
        border: Border = "coverage",
        padding: Padding = "reflect",
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        for name, flag in {"norm": norm, "streaming": streaming}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"SRT: {name} must be True or False; got {flag!r}")
        if inject is not None:
            _check_inject(inject, layers, stride)
        self._injects = inject is not None
        requested = inject if self._injects else layers
        self._settings: Any = {"layers": requested, "norm": norm, "patch": patch, "prefix": prefix}
        self._is_fixed = isinstance(model, Backbone)
        self._backbone = self._describe(model)
        self.model = self._backbone.model  # a submodule if it is a module
        # On the CPU, and no buffers: .half() would round them.
        self.views, self.weights = _checked(*designs.resolve(views))
        self.stride, self.view_batch = check_pair("SRT", "stride", stride), view_batch
        if view_batch != "auto":
            check_count("SRT", "view_batch", view_batch, 1)
        if upsample is None:
            upsample = "nearest" if self._injects else "bilinear"
        check_words("SRT", reduce=reduce, upsample=upsample, border=border)
        check_words("SRT", padding=padding, interpolation=interpolation)
        if reduce == "median" and self.weights is not None:
            rule = "views must have no weights where reduce is 'median'"
            raise ValueError(f"SRT: {rule}; got weights")
        self.reduce, self.streaming = reduce, streaming
        self.upsample, self.border = upsample, border
        self.padding, self.interpolation = padding, interpolation

    @property
    def backbone(self) -> Backbone:
        """How the features of the current ``model`` are read."""
        if self._backbone.model is not self.model:
            if self._is_fixed:
                raise ValueError(
                    "SRT: model must stay that of the Backbone that was given; got another, "
                    f"{type(self.model).__name__}"
                )
            self._backbone = self._describe(self.model)
        return self._backbone

    def _describe(self, model: Model | Backbone) -> Backbone:
        backbone = describe(model, **self._settings)
        return HookBackbone.from_backbone(backbone) if self._injects else backbone

    @torch.no_grad()
    def forward(self, images: torch.Tensor, progress: Progress | None = None) -> Any:
        """images [B, 3, H, W] -> :class:`SRTOutput`, a list of them, or what the model returns.

        ``progress`` is called with the number of views done.
        """
        if self._injects:
            return self._inject(images, progress)
        return self._aggregate(images, self.reduce, SRTOutput, progress)

    @torch.no_grad()
    def moments(self, images: torch.Tensor, progress: Progress | None = None) -> Any:
        """images [B, 3, H, W] -> :class:`SRTMoments`, or a list: whatever ``reduce`` is.

        The norm over the channels of the standard deviation is the noise map of the paper.
        """
        if self._injects:
            raise ValueError("SRT: moments must be asked of layers, not of inject; got inject")
        return self._aggregate(images, "moments", SRTMoments, progress)

    def tokens(self, images: torch.Tensor) -> Iterator[ViewTokens]:
        """Runs the model on every view, in batches of views, and yields the tokens.

        The loop behind every other method, for other reductions of the views. Images are padded
        to whole patches; with ``inject`` the tokens are those of that layer. Nothing is kept from
        one batch to the next: ``del`` a batch before the next one is requested, or the tokens of
        two batches are in memory.

        Args:
            images: [B, 3, H, W], normalised as the model wants them.

        Yields:
            :class:`ViewTokens` of at most ``view_batch`` views, in the order of ``views``, in the
            dtype and on the device of the model's output.

        Raises:
            TypeError, ValueError: as :meth:`forward`.

        Example:
            >>> srt = SRT(torch.nn.Conv2d(3, 5, 8, stride=8), "grid:1", patch=8)
            >>> for offsets, weights, layers in srt.tokens(torch.rand(2, 3, 32, 24)):
            ...     tokens, grid, patch, prefix = layers[0]
            ...     print(list(offsets.shape), list(tokens.shape), grid, patch)
            [5, 2] [5, 2, 12, 5] (4, 3) (8, 8)
            [4, 2] [4, 2, 12, 5] (4, 3) (8, 8)
        """
        return self._batches(self._pad(images), _Views(self.views, self.weights))

    # ---- one pass over the views ----------------------------------------------------------------

    def _batches(
        self, padded: torch.Tensor, views: _Views, reduce: str | None = None
    ) -> Iterator[ViewTokens]:
        """The tokens of views of padded [B, 3, H, W].

        With ``view_batch="auto"`` the batches leave the memory that ``reduce`` needs.
        """
        total, done = len(views.offsets), 0

        # Not on the generator: torch's wrapper of one would hold the last batch.
        @torch.no_grad()
        def batch(count: int) -> ViewTokens:
            part = views.take(slice(done, done + count))
            modes: Any = {"padding": self.padding, "interpolation": self.interpolation}
            shifted = shift(padded, part.offsets, **modes).flatten(0, 1)
            found = self.backbone.features(shifted)
            return ViewTokens(*part, [_layer_tokens(f, padded, len(part.offsets)) for f in found])

        if self.view_batch != "auto":
            step = _even(total, int(self.view_batch))
        elif total:
            with force_eager(self.model):  # allocations in compiled code are not counted
                first, peak = peak_bytes(lambda: batch(1))
            step = _even(total - 1, self._fitting(peak, first.layers, padded, total, reduce))
            yield first
            del first
            done = 1
        while done < total:
            yield batch(step)  # without a name, so that the caller can free it
            done += step

    def _fitting(
        self, peak: int, layers: list[LayerTokens], padded: torch.Tensor, total: int, reduce: Any
    ) -> int:
        """The number of views in one forward, if the first one took ``peak`` bytes."""
        held = total if reduce == "median" and not self.streaming else 0  # views
        planes = {None: 0, "mean": 2, "moments": 4, "median": 1 if held else 10}[reduce]
        later = 0  # bytes of the fields and of the held tokens
        for layer in layers:
            _, batch, count, channels = layer.tokens.shape
            cells = padded.shape[2] * padded.shape[3] // (self.stride[0] * self.stride[1])
            elements = planes * (count if self._injects else cells) + held * count
            later += batch * channels * elements * max(4, layer.tokens.element_size())
        free = (free_bytes(padded.device) - later) // 2
        return max(1, min(free // max(1, peak), 64 if padded.is_cuda else 8))

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] to whole patches, to the right and below."""
        check_tensor("SRT", "images", images)
        _warn_if_training(self.model)
        if images.dim() != 4:
            raise ValueError(f"SRT: images must be [B, 3, H, W]; got {list(images.shape)}")
        patch = self.backbone.patch
        if 0 in images.shape[2:]:
            raise ValueError(f"SRT: images must have pixels; got {list(images.shape)}")
        below, right = (-side % p for side, p in zip(images.shape[2:], patch, strict=True))
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _aggregate(
        self, images: torch.Tensor, reduce: str, kind: Callable[..., Any], progress: Any
    ) -> Any:
        """``kind`` of the fields of each layer, cropped to the image, and mean prefix tokens."""
        padded, stride = self._pad(images), self.stride
        size = padded.shape[-2:]
        if size[0] % stride[0] or size[1] % stride[1]:
            raise ValueError(
                "SRT: stride must divide the picture, padded to whole patches of "
                f"{list(self.backbone.patch)}: (y, x) = {list(size)}; got {list(stride)}"
            )
        views = _Views(self.views, self.weights)
        if self.streaming and reduce == "median":
            views = _Views(designs.spread(self.views), None)
        outputs = []
        height, width = (-(-images.shape[2 + i] // stride[i]) for i in range(2))
        for field in self._fields(padded, views, views, reduce, stride, progress):
            fields, prefix = field.result()
            outputs.append(kind(*(part[:, :, :height, :width] for part in fields), prefix))
        return outputs if self.backbone.returns_list else outputs[0]

    def _inject(self, images: torch.Tensor, progress: Progress | None) -> Any:
        """What the model returns for images [B, 3, H, W], padded, from the tokens of all views."""
        padded, hooks = self._pad(images), self.backbone
        assert isinstance(hooks, HookBackbone)
        # The forward that runs to the end is that of the unshifted image. If that is one of the
        # views, it comes last.
        identity = (self.views == 0).all(1).nonzero().flatten().tolist()[:1]
        order = [i for i in range(len(self.views)) if i not in identity] + identity
        views = _Views(self.views, self.weights).take(order)
        if self.streaming and self.reduce == "median":
            spread = designs.spread(views.offsets[:-1])
            views = _Views(torch.cat([spread, views.offsets[-1:]]), None)
        before = views.take(slice(len(order) - len(identity)))
        fields = self._fields(padded, before, views, self.reduce, None, progress)

        def ensemble_tokens(features: Features) -> tuple[torch.Tensor, torch.Tensor | None]:
            if identity:
                last = _layer_tokens(features, padded, 1)
                if not fields:
                    fields.append(_Field(self, self.reduce, views, None, padded, last))
                fields[0].add(last)
            (field,), prefix = fields[0].result()
            return field.flatten(2).transpose(1, 2), prefix

        result = hooks.forward_with(padded, ensemble_tokens)
        if progress is not None and identity:
            progress(len(order))
        return result

    def _fields(
        self,
        padded: torch.Tensor,
        part: _Views,
        views: _Views,
        reduce: str,
        stride: tuple[int, int] | None,
        progress: Progress | None,
    ) -> list[_Field]:
        """The fields of the layers, to be made of ``views``, after ``part``, the first of them."""
        fields: list[_Field] = []
        done = 0
        for batch in self._batches(padded, part, reduce):
            settings = (self, reduce, views, stride, padded)
            fields = fields or [_Field(*settings, layer) for layer in batch.layers]
            for field, layer in zip(fields, batch.layers, strict=True):
                field.add(layer)
            done += len(batch.offsets)
            del batch, layer  # before the next forward
            if progress is not None:
                progress(done)
        return fields


def _warn_if_training(model: object) -> None:
    """Warns of a model in training mode, if that changes its features."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()

    def changes(module: torch.nn.Module) -> bool:
        drops = module.p if isinstance(module, _DropoutNd) else 0
        drops = drops or getattr(module, "drop_prob", None) or 0  # stochastic depth
        return module.training and (isinstance(module, _BatchNorm) or drops > 0)

    if any(map(changes, modules)):
        warnings.warn(
            "SRT: the model is in training mode: dropout disturbs the views, and they change the "
            "statistics of its norms. Call model.eval() first",
            stacklevel=2,
        )


def _even(count: int, most: int) -> int:
    """A size for batches that are equal but for the last: compiled models recompile for others."""
    return -(-count // -(-count // most)) if count else 1


def _checked(
    offsets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views on the CPU; a wrong one is an error before the model has run."""
    offsets = offsets.detach().cpu()
    weights = None if weights is None else weights.detach().cpu()
    # The op checks them: one token per view.
    ensemble(torch.zeros(len(offsets), 1, 1, 1), offsets, (1, 1), (1, 1), weights)
    if weights is not None and not weights.sum() > 0:
        raise ValueError(f"SRT: weights of views must not all be 0; got {weights.tolist()}")
    return offsets, weights


def _check_inject(inject: object, layers: object, stride: object) -> None:
    if not isinstance(inject, (int, str)) or isinstance(inject, bool):
        raise TypeError(f"SRT: inject must be one index or name of a module; got {inject!r}")
    if layers is not None:
        raise ValueError(f"SRT: layers must be None with inject; got {layers!r}")
    if stride != 1:
        rule = "stride must be left out with inject: it is the tokens'"
        raise ValueError(f"SRT: {rule}; got {stride}")


class _Views(NamedTuple):
    offsets: torch.Tensor  # [V, 2], (dy, dx) in pixels
    weights: torch.Tensor | None  # [V]

    def take(self, index: list[int] | slice) -> _Views:
        return _Views(self.offsets[index], None if self.weights is None else self.weights[index])


def _layer_tokens(features: Features, padded: torch.Tensor, views: int) -> LayerTokens:
    """The features of ``views`` views of padded [B, 3, H, W]."""
    size, grid = padded.shape[-2:], features.grid
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ValueError(
            f"SRT: tokens must divide the padded picture, {list(size)} pixels; got a grid of "
            f"{list(grid)}"
        )
    shape = (views, features.tokens.shape[0] // views)
    tokens = features.tokens.unflatten(0, shape)
    return LayerTokens(
        tokens if tokens.stride(3) == 1 else tokens.contiguous(),
        grid,
        (size[0] // grid[0], size[1] // grid[1]),
        None if features.prefix is None else features.prefix.unflatten(0, shape),
    )


_RUNNING = {"mean": RunningMean, "median": RunningMedian, "moments": RunningMoments}


class _Field:
    """The field of one layer, from batches of views. It holds as few of their tokens as it may."""

    def __init__(
        self,
        srt: SRT,
        reduce: str,
        views: _Views,  # in the order in which they come
        stride: tuple[int, int] | None,  # None: that of the tokens
        padded: torch.Tensor,  # [B, 3, H, W]
        first: LayerTokens,  # of the first batch
    ) -> None:
        stride = stride or first.patch
        modes: dict[str, Any] = {"upsample": srt.upsample, "border": srt.border, "stride": stride}
        self.reduce, self.views = reduce, views
        self.running = _RUNNING[reduce](first.grid, first.patch, **modes)
        # The number of views whose tokens are held until they are aggregated: all for a median,
        # otherwise as many as have the tokens of one output, in whole batches.
        total, batch, count = len(views.offsets), first.tokens.shape[0], first.tokens.shape[2]
        cells = (padded.shape[2] // stride[0]) * (padded.shape[3] // stride[1])
        self.holds = batch
        if not srt.streaming:
            parts = max(1, cells // count // batch)
            self.holds = total if reduce == "median" else min(total, parts * batch)
        self.at_once = self.holds == total and not srt.streaming
        self.held: torch.Tensor | None = None  # [holds, B, N, C], of which `waiting` are filled
        self.waiting = self.aggregated = 0  # views
        self.fields: tuple[torch.Tensor, ...] = ()
        self.prefix: torch.Tensor | None = None  # the sum
        self.prefix_dtype = torch.float32

    def add(self, layer: LayerTokens) -> None:
        """Adds the next views."""
        tokens, views = layer.tokens, len(layer.tokens)
        first = self.aggregated + self.waiting
        if layer.prefix is not None:
            self._add_prefix(layer.prefix, first)
        last = first + views == len(self.views.offsets)
        if self.waiting + views > self.holds:
            self._aggregate_held()
        if views >= self.holds or (last and not self.waiting):
            self._aggregate(tokens)
            return
        if self.held is None:
            self.held = tokens.new_empty(self.holds, *tokens.shape[1:])
        self.held[self.waiting : self.waiting + views] = tokens
        self.waiting += views
        if last or self.waiting == self.holds:
            self._aggregate_held()

    def _add_prefix(self, prefix: torch.Tensor, first: int) -> None:
        """prefix [k, B, K, C], of the views from ``first``."""
        self.prefix_dtype = prefix.dtype
        part = prefix.to(torch.promote_types(prefix.dtype, torch.float32))
        if self.views.weights is not None:
            weights = self.views.weights[first : first + len(prefix)].to(part)
            part = (part * weights[:, None, None, None])[weights > 0]  # 0 * inf is NaN
        self.prefix = part.sum(0) if self.prefix is None else self.prefix + part.sum(0)

    def _aggregate_held(self) -> None:
        if self.held is not None and self.waiting:
            count, self.waiting = self.waiting, 0
            self._aggregate(self.held[:count])

    def _aggregate(self, tokens: torch.Tensor) -> None:
        """tokens [k, B, N, C] of the next views that are not aggregated."""
        views = self.views.take(slice(self.aggregated, self.aggregated + len(tokens)))
        self.aggregated += len(tokens)
        if not self.at_once:
            self.running.update(tokens, *views)
            return
        running = self.running
        args = (tokens, views.offsets, running.grid, running.patch, views.weights)
        if self.reduce == "moments":
            self.fields = ensemble_moments(*args, **running._modes)
        else:
            self.fields = (ensemble(*args, **{**running._modes, "reduce": self.reduce}),)

    def result(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The fields, each [B, C, H', W'], and the mean [B, K, C] of the prefix tokens."""
        self.held = None
        fields = self.fields or self.running._fields()
        if self.prefix is None:
            return fields, None
        weights = self.views.weights
        total = len(self.views.offsets) if weights is None else float(weights.sum())
        return fields, (self.prefix / total).to(self.prefix_dtype)
