"""``SRT``: a frozen ViT in, dense features out.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from . import views as designs
from ._memory import free_bytes, peak_bytes
from ._validation import check_count, check_pair, check_tensor, check_words
from .backbones import Backbone, Features, Hooks, Layer, Model, describe, eagerly
from .ops import ensemble, ensemble_moments, shift
from .options import Border, Interpolation, Padding, Reduce, Upsample
from .streaming import RunningMean, RunningMedian, RunningMoments

Progress = Callable[[int], object]


class SRTOutput(NamedTuple):
    """What :class:`SRT` returns, of one layer."""

    field: torch.Tensor  # [B, C, ceil(H / sh), ceil(W / sw)]
    prefix: torch.Tensor | None  # [B, K, C], class and register tokens averaged over the views


class SRTMoments(NamedTuple):
    """What :meth:`SRT.moments` returns, of one layer."""

    mean: torch.Tensor  # [B, C, ceil(H / sh), ceil(W / sw)]
    var: torch.Tensor  # as mean: the population variance over the views
    prefix: torch.Tensor | None  # [B, K, C]


class SRT(torch.nn.Module):
    """Wraps a frozen ViT: shifts the picture, runs every view, moves the tokens back, aggregates.

    Args:
        model: a model of timm or of transformers, one with DINO's ``get_intermediate_layers``, or
            any callable from images [B, 3, H, W] to tokens [B, K + h * w, C] or a map
            [B, C, h, w] or [B, h, w, C] (then ``patch`` is needed). Or what
            :func:`srt_ext.backbones.describe` made of one, with its layers and the like.
        views: offsets [V, 2], (dy, dx) in pixels; words for :func:`srt_ext.views.parse`; a number
            of views for :func:`srt_ext.views.best`, up to 169, within 6 pixels; or (offsets,
            weights [V]).
        layers: the block (of a hierarchical model: the stage) whose features are wanted, from 0 or,
            negative, from the end; or the name of a module, whose output, of its first call, is
            taken by a hook. None: the last. A list gives a list of results, from one pass over
            the views. Blocks behind the last one asked for do not run (in transformers, if asked
            for by name).
        norm: pass the features through the final norm of the model, as DINO's
            ``get_intermediate_layers`` does. Models without one for that layer (all but the last
            stage of Swin; Hiera, ConvNeXt, ResNet), and layers by name, give them as they are.
            With SAM, whose last norm is its neck, the neck's output.
        inject: a layer, as in ``layers``, to put the ensemble back into: calling this gives what
            the model itself returns when its tokens there are those of all views. See below.
        reduce: ``mean`` or ``median``.
        stride: pixels per output cell, (sh, sw) or one for both. 1 is pixel scale.
        streaming: aggregate each batch of views as it comes and hold none of their tokens. The
            mean is the same up to rounding; the median becomes approximate, and the views are run
            in the order of :func:`srt_ext.views.spread` (:class:`srt_ext.RunningMedian`).
        view_batch: the most views in one forward of the model; times the batch, they bound its
            memory. ``auto``: as many as fit into half of the free memory, by what the first view
            took, and at most 8 on a CPU and 64 on a GPU.
        patch: (Ph, Pw), pixels per token, or one for both. Of a layer by name: at that layer.
        prefix: tokens in front that are no patches.
        upsample: as in :func:`srt_ext.ensemble`; None is ``bilinear``, with ``inject`` ``nearest``,
            under which one unshifted view changes nothing.
        border: as in :func:`srt_ext.ensemble`.
        padding, interpolation: as in :func:`srt_ext.shift`.

    Patch size, prefix tokens and layout come from the model. What it does not tell (the prefix of
    any other callable, the layout of a square map that could be read both ways) is taken from the
    shapes, with a warning that says what was taken.

    Calling it with images [B, 3, H, W] (normalised as the model wants them) gives an
    :class:`SRTOutput`, or a list of them. Sizes that are no multiple of the patch are padded by
    repeating the last row and column, and cropped back. No gradients are kept. Put the model in
    eval mode first. What ``torch.compile(model)`` returned is compiled with its settings for the
    features, too; with ``inject`` and with layers by name the model runs as it is written.

    With ``inject`` the blocks up to that layer run for every view, and once for the picture itself
    if the offset 0 is not among the views. The others and the head run once, on the picture itself,
    whose tokens at that layer are replaced. Class and register tokens become their averages. The
    result is of the picture padded to whole patches. The model is left as it was, also by an
    exception.

    A feature counts as that of the middle of its patch. Convolutions that overlap centre theirs
    elsewhere: the field of a ResNet lies (s - 1) / 2 pixels, s the pitch, too far down and right.

    Memory, beside what the model needs for one batch of views: for each layer the result and the
    tokens of all views. Where these would outgrow a field, a mean or moments are aggregated in
    parts, however many views there are: the tokens of a part are as large as a field, or those of
    one batch, and the sums, one for a mean and two for moments, are in float32. With
    ``streaming``: the tokens of one batch, and one field in float32 for a mean, two for moments, 8
    for a median.

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
        self._reading: dict[str, Any] = {"norm": norm, "patch": patch, "prefix": prefix}
        self._reading["layers"] = inject if self._injects else layers
        self._given = isinstance(model, Backbone)
        self._backbone = self._describe(model)
        self.model = self._backbone.model  # a submodule if it is a module
        # On the CPU, and no buffers: .half() would round them.
        self.views, self.weights = _checked(*designs.resolve(views))
        self.stride = check_pair("SRT", "stride", stride)
        self.view_batch = view_batch
        if view_batch != "auto":
            check_count("SRT", "view_batch", view_batch, 1)
        if upsample is None:
            upsample = "nearest" if self._injects else "bilinear"
        check_words("SRT", reduce=reduce, upsample=upsample, border=border)
        check_words("SRT", padding=padding, interpolation=interpolation)
        if reduce == "median" and self.weights is not None:
            raise ValueError(
                "SRT: views must have no weights where reduce is 'median'; got weights"
            )
        self.reduce, self.streaming = reduce, streaming
        self.upsample, self.border = upsample, border
        self.padding, self.interpolation = padding, interpolation

    @property
    def backbone(self) -> Backbone:
        """How the features of the present ``model`` are got."""
        if self._backbone.model is not self.model:
            if self._given:
                raise ValueError(
                    "SRT: model must stay that of the Backbone that was given; got another, "
                    f"{type(self.model).__name__}"
                )
            self._backbone = self._describe(self.model)
        return self._backbone

    def _describe(self, model: Model | Backbone) -> Backbone:
        backbone = describe(model, **self._reading)
        return Hooks.of(backbone) if self._injects else backbone

    @torch.no_grad()
    def forward(self, images: torch.Tensor, progress: Progress | None = None) -> Any:
        """images [B, 3, H, W] -> :class:`SRTOutput`, a list of them, or what the model returns.

        ``progress`` is told the views done.
        """
        if self._injects:
            return self._injected(images, progress)
        outputs = [
            SRTOutput(field, prefix)
            for (field,), prefix in self._aggregate(images, self.reduce, progress)
        ]
        return outputs if self.backbone.several else outputs[0]

    @torch.no_grad()
    def moments(self, images: torch.Tensor, progress: Progress | None = None) -> Any:
        """images [B, 3, H, W] -> :class:`SRTMoments`, or a list: whatever ``reduce`` is.

        The root of the variance, its norm over the channels, is the noise map of the paper.
        """
        if self._injects:
            raise ValueError("SRT: moments must be asked of layers, not of inject; got inject")
        outputs = [
            SRTMoments(mean, var, prefix)
            for (mean, var), prefix in self._aggregate(images, "moments", progress)
        ]
        return outputs if self.backbone.several else outputs[0]

    # ---- one pass over the views ----------------------------------------------------------------

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] to whole patches, to the right and below."""
        check_tensor("SRT", "images", images)
        _warn_of_training(self.model)
        if images.dim() != 4:
            raise ValueError(f"SRT: images must be [B, 3, H, W]; got {list(images.shape)}")
        *_, height, width = images.shape
        patch_y, patch_x = self.backbone.patch
        if height == 0 or width == 0:
            raise ValueError(f"SRT: images must have pixels; got {list(images.shape)}")
        below, right = -height % patch_y, -width % patch_x
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def _aggregate(
        self, images: torch.Tensor, reduce: str, progress: Progress | None
    ) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """Of each layer: the fields, cropped to the picture, and the mean of the prefix tokens."""
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
        results = []
        height, width = (-(-images.shape[2 + i] // stride[i]) for i in range(2))
        for field in self._shown(padded, views, len(views.offsets), reduce, stride, progress):
            made, prefix = field.result()
            results.append((tuple(part[:, :, :height, :width] for part in made), prefix))
        return results

    def _injected(self, images: torch.Tensor, progress: Progress | None) -> Any:
        """What the model returns for images [B, 3, H, W], padded, from the tokens of all views."""
        padded, hooks = self._pad(images), self.backbone
        assert isinstance(hooks, Hooks)
        # The forward that is carried to the end shows the picture itself: if that is one of the
        # views, it is the last.
        itself = (self.views == 0).all(1).nonzero().flatten().tolist()[:1]
        order = [i for i in range(len(self.views)) if i not in itself] + itself
        weights = None if self.weights is None else self.weights[order]
        views = _Views(self.views[order], weights)
        if self.streaming and self.reduce == "median":
            views = _Views(
                torch.cat([designs.spread(views.offsets[:-1]), views.offsets[-1:]]), None
            )
        before = len(order) - len(itself)
        fields = self._shown(padded, views, before, self.reduce, None, progress)

        def ensembled(found: Features) -> tuple[torch.Tensor, torch.Tensor | None]:
            if itself:
                if not fields:
                    fields.append(_Field(self, self.reduce, views, 1, None, padded, found))
                fields[0].add(found, 1)
            (field,), prefix = fields[0].result()
            return field.flatten(2).transpose(1, 2), prefix

        result = hooks.replaced(padded, ensembled)
        if progress is not None and itself:
            progress(len(order))
        return result

    def _shown(
        self,
        padded: torch.Tensor,
        views: _Views,
        count: int,
        reduce: str,
        stride: tuple[int, int] | None,
        progress: Progress | None,
    ) -> list[_Field]:
        """The fields of the layers, with the first ``count`` views added."""
        auto = self.view_batch == "auto"
        step = 1 if auto else _even(count, int(self.view_batch))
        fields: list[_Field] = []
        done = 0
        while done < count:
            part = views.offsets[done : min(count, done + step)]

            def features(part: torch.Tensor = part) -> list[Features]:
                how: dict[str, Any] = {"padding": self.padding, "interpolation": self.interpolation}
                return self.backbone.features(shift(padded, part, **how).flatten(0, 1))

            if auto and not fields:
                with eagerly(self.model):  # compiled code does not tell what it allocates
                    found, peak = peak_bytes(features)
                fit = self._fitting(peak, found, padded, len(views.offsets), reduce)
                step = _even(count - 1, fit)
            else:
                found = features()
            if not fields:
                fields = [
                    _Field(self, reduce, views, step, stride, padded, layer) for layer in found
                ]
            for field, layer in zip(fields, found, strict=True):
                field.add(layer, len(part))
            del found
            done += len(part)
            if progress is not None:
                progress(done)
        return fields

    def _fitting(
        self, peak: int, layers: list[Features], padded: torch.Tensor, total: int, reduce: str
    ) -> int:
        """The views of one forward, if the first took ``peak`` bytes."""
        planes = {"mean": 2, "moments": 4, "median": 10 if self.streaming else 1}[reduce]
        later = 0  # bytes of the fields, and of the tokens that a median holds
        for tokens, *_ in layers:
            batch, count, channels = tokens.shape
            cells = padded.shape[2] * padded.shape[3] // (self.stride[0] * self.stride[1])
            cells = count if self._injects else cells
            held = total * count if reduce == "median" and not self.streaming else 0
            later += batch * channels * (planes * cells + held) * max(4, tokens.element_size())
        free = (free_bytes(padded.device) - later) // 2
        return max(1, min(free // max(1, peak), 64 if padded.is_cuda else 8))


def _warn_of_training(model: object) -> None:
    """Not of a model in training mode in which that changes nothing."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if any(
        module.training
        and (
            isinstance(module, _BatchNorm)
            or (isinstance(module, _DropoutNd) and module.p > 0)
            or (getattr(module, "drop_prob", None) or 0) > 0  # stochastic depth
        )
        for module in modules
    ):
        warnings.warn(
            "SRT: the model is in training mode: dropout disturbs the views, and they change the "
            "statistics of its norms. Call model.eval() first",
            stacklevel=2,
        )


def _even(count: int, most: int) -> int:
    """The size of batches of one size, which a compiler likes, the last one aside."""
    return -(-count // -(-count // most)) if count else 1


def _checked(
    offsets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views as the ops want them, on the CPU: a wrong one is told before the model has run."""
    offsets = offsets.detach().cpu()
    weights = None if weights is None else weights.detach().cpu()
    # The ops know the rules: one token for each view.
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
        raise ValueError(
            f"SRT: stride must be left out with inject: it is the tokens'; got {stride}"
        )


class _Views(NamedTuple):
    offsets: torch.Tensor  # [V, 2], (dy, dx) in pixels
    weights: torch.Tensor | None  # [V]


_RUNNING = {"mean": RunningMean, "median": RunningMedian, "moments": RunningMoments}


class _Field:
    """The field of one layer, from views that come in batches. It holds as few as it may."""

    def __init__(
        self,
        srt: SRT,
        reduce: str,
        views: _Views,  # in the order in which they come
        batch: int,  # the most of them that come at once
        stride: tuple[int, int] | None,  # None: the tokens'
        padded: torch.Tensor,  # [B, 3, H, W]
        features: Features,  # of some of the views
    ) -> None:
        size, grid = padded.shape[-2:], features.grid
        if size[0] % grid[0] or size[1] % grid[1]:
            raise ValueError(
                f"SRT: tokens must divide the padded picture, {list(size)} pixels; got a grid of "
                f"{list(grid)}"
            )
        self.patch = (size[0] // grid[0], size[1] // grid[1])
        stride = self.patch if stride is None else stride
        self.settings: dict[str, Any] = {
            "upsample": srt.upsample,
            "border": srt.border,
            "stride": stride,
        }
        self.reduce, self.grid, self.views = reduce, grid, views
        self.running = _RUNNING[reduce](grid, self.patch, **self.settings)
        # Views whose tokens are held until they are aggregated: of a median all, otherwise as many
        # as have the tokens of one output, in whole batches.
        total, count = len(views.offsets), grid[0] * grid[1]
        cells = (size[0] // stride[0]) * (size[1] // stride[1])
        self.holds = batch
        if not srt.streaming:
            parts = max(1, cells // count // batch)
            self.holds = total if reduce == "median" else min(total, parts * batch)
        self.at_once = self.holds == total and not srt.streaming
        self.held: torch.Tensor | None = None  # [holds, B, N, C], the first `waiting` of them
        self.waiting = self.aggregated = 0  # views
        self.fields: tuple[torch.Tensor, ...] = ()
        self.prefix: torch.Tensor | None = None  # the sum
        self.prefix_dtype = torch.float32

    def add(self, features: Features, views: int) -> None:
        """The features of the next ``views`` views, [views * B, ...]."""
        shape = (views, features.tokens.shape[0] // views)
        tokens = features.tokens.unflatten(0, shape)
        first = self.aggregated + self.waiting
        if features.prefix is not None:
            self._add_prefix(features.prefix.unflatten(0, shape), first)
        last = first + views == len(self.views.offsets)
        if views >= self.holds or (last and not self.waiting):
            self._aggregate()
            self._aggregate(tokens)
            return
        if self.held is None:
            self.held = tokens.new_empty(self.holds, *tokens.shape[1:])
        if self.waiting + views > self.holds:
            self._aggregate()
        self.held[self.waiting : self.waiting + views] = tokens
        self.waiting += views
        if last or self.waiting == self.holds:
            self._aggregate()

    def _add_prefix(self, prefix: torch.Tensor, first: int) -> None:
        """prefix [k, B, K, C], of the views from ``first``."""
        self.prefix_dtype = prefix.dtype
        part = prefix.to(torch.promote_types(prefix.dtype, torch.float32))
        if self.views.weights is not None:
            weights = self.views.weights[first : first + len(prefix)].to(part)
            part = (part * weights[:, None, None, None])[weights > 0]  # 0 * inf is no 0
        self.prefix = part.sum(0) if self.prefix is None else self.prefix + part.sum(0)

    def _aggregate(self, tokens: torch.Tensor | None = None) -> None:
        """tokens [k, B, N, C], or those that wait."""
        if tokens is None:
            if not self.waiting:
                return
            assert self.held is not None
            tokens, self.waiting = self.held[: self.waiting], 0
        if tokens.stride(3) != 1:
            tokens = tokens.contiguous()
        here = slice(self.aggregated, self.aggregated + len(tokens))
        offsets = self.views.offsets[here]
        weights = None if self.views.weights is None else self.views.weights[here]
        self.aggregated += len(tokens)
        if not self.at_once:
            self.running.update(tokens, offsets, weights)
            return
        args = (tokens, offsets, self.grid, self.patch, weights)
        if self.reduce == "moments":
            self.fields = ensemble_moments(*args, **self.settings)
        else:
            self.fields = (ensemble(*args, **{"reduce": self.reduce, **self.settings}),)

    def result(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The fields, each [B, C, H', W'], and the mean [B, K, C] of the prefix tokens."""
        self.held = None
        fields = self.fields or self.running._fields()
        if self.prefix is None:
            return fields, None
        weights = self.views.weights
        total = len(self.views.offsets) if weights is None else float(weights.sum())
        return fields, (self.prefix / total).to(self.prefix_dtype)
