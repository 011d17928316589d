"""``SRT``: dense features from a frozen ViT.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import _register_namedtuple  # there is no public one for named tuples

from . import views as designs
from ._cost import fake_copy, operations_and_bytes, peak_bytes
from ._memory import free_bytes
from ._validation import (
    check_count,
    check_number,
    check_pair,
    check_tensor,
    check_words,
    is_integer,
    wrong,
)
from .backbones import Backbone, Features, Layer, Model, describe
from .backbones.wrappers import changes_in_training, force_eager
from .ops import check_views, ensemble, ensemble_moments, no_grad, shift, state_mode
from .options import Anchor, Border, Interpolation, Padding, Quality, Reduce, Upsample
from .polyphase import polyphase, unique_anchor
from .streaming import RunningMean, RunningMedian, RunningMoments
from .views import Views

Progress = Callable[[int], object]


class SRTOutput(NamedTuple):
    """The result of :class:`SRT` for one layer."""

    field: torch.Tensor  #: [B, C, ceil(H / sh), ceil(W / sw)]
    prefix: torch.Tensor | None  #: [B, K, C], class and register tokens averaged over the views


class SRTMoments(NamedTuple):
    """The result of :meth:`SRT.moments` for one layer."""

    mean: torch.Tensor  #: [B, C, ceil(H / sh), ceil(W / sw)]
    var: torch.Tensor  #: the population variance over the views, of the shape of ``mean``
    prefix: torch.Tensor | None  #: [B, K, C], class and register tokens averaged over the views


class LayerTokens(NamedTuple):
    """The tokens of one layer for k views."""

    tokens: torch.Tensor  #: [k, B, N, C], N = h * w, in row order; dense in the last dimension
    grid: tuple[int, int]  #: (h, w)
    patch: tuple[int, int]  #: (Ph, Pw), pixels per token at this layer
    prefix: torch.Tensor | None  #: [k, B, K, C], class and register tokens


class ViewTokens(NamedTuple):
    """One batch of views from :meth:`SRT.tokens`.

    Offsets and ``patch`` are in pixels of the enlarged image.
    """

    #: [k, 2], (dy, dx) in pixels, on the CPU. With an anchor [k, B, 2], one per view and image, in
    #: float64 on the device of the images.
    offsets: torch.Tensor
    weights: torch.Tensor | None  #: [k], or None for equal weights
    layers: list[LayerTokens]  #: in the requested order; one if ``layers`` is not a list


class Cost(NamedTuple):
    """The cost of one call of ``SRT``, from :meth:`srt_ext.SRT.cost`."""

    operations: int  #: floating-point operations of the model; a multiply-add counts as two
    tokens: int  #: patch tokens computed by the model, over all views and images
    memory: int  #: peak bytes, without the weights of the model and the images


# Lets torch.export save programs with these types, and torch.load read them.
for _type in (SRTOutput, SRTMoments, LayerTokens, ViewTokens, Cost, Views):
    _register_namedtuple(_type, serialized_type_name=f"srt_ext.{_type.__name__}")
    torch.serialization.add_safe_globals([_type])

# (scale, number of views), chosen by research/quality.
PRESETS: dict[str, tuple[float, int]] = {
    "fast": (1, 4),
    "balanced": (1.25, 4),
    "outlines": (1.5, 4),
}
DEFAULT = "balanced"


class SRT(torch.nn.Module):
    """Wraps a frozen ViT: shifts the image, runs the model on every view, aggregates the tokens.

    ``srt(images)`` takes images [B, 3, H, W] of any size, normalised as the model expects, and
    returns an :class:`SRTOutput` whose field is [B, C, ceil(H / sh), ceil(W / sw)] for a stride of
    (sh, sw) pixels. It returns a list of them if ``layers`` is a list, and the output of the model
    with ``inject``. Gradients are not recorded. Put the model in eval mode first.

    Args:
        model: one of

            - a model of timm or transformers, or one with DINO's ``get_intermediate_layers``;
            - any callable from images [B, 3, H, W] to tokens [B, K + h * w, C] or a map
              [B, C, h, w] or [B, h, w, C]; ``patch`` is then required;
            - a :class:`srt_ext.backbones.Backbone` from :func:`srt_ext.backbones.describe`.
        views: one of

            - a number of views: :func:`srt_ext.views.best` with offsets of up to 3/8 of the token
              spacing, which is patch / scale;
            - a design of :mod:`srt_ext.views`, or a string for :func:`srt_ext.views.parse`;
            - offsets [V, 2], (dy, dx) in pixels of the image;
            - a tuple (offsets, weights [V]) or (offsets, weights, mirror [V, 2]), as in
              :class:`srt_ext.views.Views`.

            With ``scale``, the offsets of numbers, strings and ``Views`` are rounded to whole
            pixels of the enlarged image. Offsets in tensors and tuples are not rounded.
        scale: the factor, >= 1, by which the image is enlarged (bicubic) before the views are
            computed. The size and the coordinates of the field do not change. Always 1 with
            ``inject`` and with ``border="circular"``, also in a preset.
        quality: ``fast``, ``balanced`` or ``outlines``: a preset that replaces ``scale`` and
            ``views``.
        layers: index of a block (in a hierarchical model: of a stage), counted from 0 or, if
            negative, from the end; or the name of a module, whose first output is read by a hook.
            None: the last layer. A list returns a list of results from one pass over the views.
            Blocks after the last requested one do not run (in transformers, this requires layers
            by name).
        norm: apply the final norm of the model to the features, as DINO's
            ``get_intermediate_layers`` does. Layers by name, and layers to which the model applies
            no norm (all but the last stage of Swin; Hiera, ConvNeXt, ResNet), are returned as they
            are. For SAM, the neck is used; for CLIP, the norm of the pooled token.
        inject: a layer, as in ``layers``, whose tokens are replaced by the ensemble. Calling the
            module then returns the output of the model.
        reduce: ``mean`` or ``median``.
        stride: pixels per output cell, (sh, sw) or one integer for both. 1 is pixel scale. The
            image is padded to a multiple of the patch and of stride * scale: a stride whose least
            common multiple with the patch is small needs little padding and costs least.
        streaming: aggregate each batch of views as soon as it is computed, without keeping its
            tokens. The mean is the same up to rounding. The median is approximate
            (:class:`srt_ext.RunningMedian`), and the views run in the order of
            :func:`srt_ext.views.spread`.
        view_batch: maximum number of views in one forward pass of the model, which processes
            ``view_batch`` * B images. ``auto``: as many as fit into half of the free memory,
            measured on the first view, and at most 8 on a CPU and 64 on a GPU; 8 in
            ``torch.export``.
        patch: (Ph, Pw), pixels per token, or one integer for both. For a layer by name: pixels per
            token at that layer.
        prefix: number of class and register tokens before the patch tokens.
        upsample: as in :func:`srt_ext.ensemble`. None: ``bilinear``; with ``inject``, ``nearest``,
            with which a single unshifted view leaves the tokens unchanged.
        border: as in :func:`srt_ext.ensemble`. With ``coverage``, the field is 0 where no view
            covers a pixel: the default views leave no such pixels, 2 views leave two small corners.
            ``circular`` is for periodic images: it requires ``padding="circular"``, and images of
            whole patches and cells, because padding would change the period.
        padding, interpolation: as in :func:`srt_ext.shift`.
        anchor: ``phase`` or ``full``, with ``border="circular"``: the offsets of each image are
            relative to its anchor (:func:`srt_ext.polyphase`) instead of its corner. With ``full``,
            the model receives the same views for every roll of an image, so that the field of a
            rolled image is the rolled field, up to rounding, for any model (at a stride: for rolls
            by its multiples). ``phase`` is sufficient for models whose tokens roll with whole
            patches, which excludes models with position embeddings. Not with ``inject``.

    Raises:
        TypeError, ValueError: for the same reasons as the ops; if the number of tokens does not fit
            the image; if hooks would be bypassed; if the final norm of the model is not found.

    Example:
        >>> def mean_colour(x):  # a "model" whose tokens are the mean colours of 8 x 8 patches
        ...     return torch.nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)
        >>> srt = SRT(mean_colour, views="grid:2", patch=8)
        >>> srt(torch.rand(1, 3, 32, 30)).field.shape
        torch.Size([1, 3, 32, 30])

    **Presets.** Each preset has 4 views; they differ in scale. ``balanced`` is used if ``views``,
    ``scale`` and ``quality`` are omitted; if only ``views`` or ``scale`` is given, the other one is
    4 views or scale 1. The cost is the number of plain forward passes with as many operations, at
    stride 8 for images of 240 x 432 and of 480 x 848 pixels, measured in ``research/quality`` with
    a ViT-Ti/16:

    - ``fast``: scale 1, cost 4 and 4.
    - ``balanced``: scale 1.25, cost 8 and 10. The best mean gain over five tasks among the settings
      that cost at most 16 and are not worse than plain tokens on any task.
    - ``outlines``: scale 1.5, cost 14 and 16. The best preset for outlines (label propagation,
      object discovery); worse than plain tokens where regions are matched by meaning (retrieval).

    A preset enlarges the image only if the model declares that it accepts images of any size. For
    other models, callables and layers by name it uses scale 1, with a warning. :meth:`cost` counts
    the operations, tokens and bytes of a setting.

    **Image sizes.** Images are padded to whole patches and cells by repeating the last row and
    column; the field is cropped. Where stride * scale is not a whole number of pixels, the field is
    computed at the next finer stride and resampled (bilinear). A token is located at the centre of
    its patch. Overlapping convolutions centre their tokens elsewhere: the field of a ResNet is
    shifted down and right by (s - 1) / 2 pixels, where s is the token spacing.

    **Models.** Patch size, prefix tokens and layout are read from the model. Values that the model
    does not declare (the prefix of a callable, the layout of a square map that fits both) are
    inferred from the shapes, with a warning. Wrappers (``torch.compile``, ``DataParallel``,
    ``DistributedDataParallel``, PEFT) are removed. Features of a model in ``torch.compile`` are
    compiled with its settings; with ``inject`` and with layers by name the model runs eagerly.
    Pre-hooks of the model run, and so do the hooks of FSDP2 and accelerate that load weights; hooks
    that would be bypassed raise an error. The first call for each dtype compares the last layer
    with ``forward_features`` or ``last_hidden_state`` on a few tokens; a difference raises an
    error, because the final norm was not found.

    **Injection.** With ``inject``, the blocks up to that layer run for every view, and once more
    for the unshifted image if no view has offset 0. The other blocks and the head run once, on the
    unshifted, padded image with the aggregated tokens; class and register tokens are averaged over
    the views. The model is not modified, even if an exception is raised.

    **Memory,** in addition to the memory that the model needs for one batch of views: for each
    layer, the result and the tokens of all views. If these tokens are larger than a field, a mean
    or moments are accumulated in parts: the tokens of a part are as large as a field, or as the
    tokens of one batch, and the sums (one for a mean, two for moments) are in float32. With
    ``streaming``: the tokens of one batch, and one float32 field for a mean, two for moments, 8 for
    a median. With an anchor, the fields of several images are copied into the result one by one.
    """

    def __init__(
        self,
        model: Model | Backbone,
        views: Views | torch.Tensor | str | int | tuple[torch.Tensor | None, ...] | None = None,
        *,
        scale: float | None = None,
        quality: Quality | None = None,
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
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__()
        for name, flag in {"norm": norm, "streaming": streaming}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"SRT: {name} must be True or False; got {flag!r}")
        if inject is not None:
            _check_inject(inject, layers, stride)
        self._injects = inject is not None
        check_words("SRT", border=border, padding=padding, interpolation=interpolation)
        _check_circular(border, padding, anchor, inject)
        self.border, self.padding, self.interpolation = border, padding, interpolation
        self.anchor = anchor
        requested = inject if self._injects else layers
        settings: Any = {"layers": requested, "norm": norm, "patch": patch, "prefix": prefix}
        self._settings: Any = copy.deepcopy(settings)  # lists, arrays and tensors may change later
        self._is_fixed = isinstance(model, Backbone)
        self._backbone = self._describe(model)
        self.model = self._backbone.model  # a submodule if it is a module
        self._set_views(views, scale, quality)
        # These settings depend on the model and are resolved again if it is replaced.
        by_model = views is None or isinstance(views, str) or is_integer(views)
        scale = None if scale is None else self._scale  # a number; a tensor may change later
        if is_integer(views):
            views = operator.index(views)  # type: ignore[arg-type]
        self._request = (views, scale, quality) if by_model else None
        self.stride, self.view_batch = check_pair("SRT", "stride", stride), _view_batch(view_batch)
        if upsample is None:
            upsample = "nearest" if self._injects else "bilinear"
        check_words("SRT", reduce=reduce, upsample=upsample)
        if reduce == "median" and self._views.weights is not None:
            rule = "views must have no weights if reduce is 'median'"
            raise ValueError(f"SRT: {rule}; got weights")
        self.reduce, self.streaming, self.upsample = reduce, streaming, upsample

    def extra_repr(self) -> str:
        """The settings; those after ``upsample`` only if they are not the default."""
        settings = {
            "views": self._known.number,
            "scale": self.scale,
            "stride": self.stride,
            "reduce": self.reduce,
            "upsample": self.upsample,
        }
        layers = self._settings["layers"]
        others = {
            "inject" if self._injects else "layers": (layers, None),
            "norm": (self._settings["norm"], True),
            "streaming": (self.streaming, False),
            "border": (self.border, "coverage"),
            "padding": (self.padding, "reflect"),
            "interpolation": (self.interpolation, "bilinear"),
            "anchor": (self.anchor, None),
        }
        settings |= {name: value for name, (value, default) in others.items() if value != default}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())

    @property
    def scale(self) -> float:
        """The factor by which images are enlarged."""
        return self._scale

    @property
    def views(self) -> Views:
        """A copy of the views, with their offsets in pixels of the image."""
        views = _copied(self._views)
        # Not _replace, which torch.compile of torch 2.11 (not 2.12) cannot trace.
        return Views(views.offsets / self.scale, views.weights, views.mirror)

    @property
    def _views(self) -> Views:
        """The views with offsets in pixels of the enlarged image."""
        return self._known.views

    @property
    def backbone(self) -> Backbone:
        """The :class:`srt_ext.backbones.Backbone` of the current ``model``."""
        if self._backbone.model is not self.model:
            if self._is_fixed:
                raise ValueError(
                    "SRT: model must not be replaced if a Backbone was given; got another "
                    f"{type(self.model).__name__}"
                )
            self._backbone = self._describe(self.model)
            if self._request is not None:
                self._set_views(*self._request)
        return self._backbone

    def _describe(self, model: Model | Backbone) -> Backbone:
        backbone = describe(model, **self._settings)
        if not self._injects:
            return backbone
        from .backbones.hooks import HookBackbone

        return HookBackbone.from_backbone(backbone)

    def _set_views(self, views: Any, scale: Any, quality: Any) -> None:
        """Sets the scale and the views for the model.

        The views are on the CPU, with offsets in pixels of the enlarged image. They are not
        buffers, because .half() would round them.
        """
        self._scale, views = self._chosen(views, scale, quality)
        with _with_values():
            resolved = designs.resolve(views, self._backbone.patch, self._scale)
            self._known = _ViewList.of(_checked(resolved))

    def _chosen(self, views: Any, scale: Any, quality: Any) -> tuple[float, Any]:
        """(scale, views), from a preset if neither is given."""
        if quality is not None and (views is not None or scale is not None):
            rule = "quality must be omitted if views or scale is given"
            raise wrong(ValueError, "SRT", rule, f"{quality!r}, views {views!r}, scale {scale!r}")
        fixed = "inject" if self._injects else ""  # the setting that requires scale 1
        fixed = fixed or ("border 'circular'" if self.border == "circular" else "")
        if views is not None or scale is not None:
            scale = 1.0 if scale is None else _check_scale(scale)
            if scale != 1 and fixed:
                raise wrong(ValueError, "SRT", f"scale must be 1 with {fixed}", scale)
            return scale, PRESETS[DEFAULT][1] if views is None else views
        name = DEFAULT if quality is None else quality
        check_words("SRT", quality=name)
        scale, views = PRESETS[name]
        if fixed or scale == 1:
            return 1.0, views
        if not self._backbone.any_size:
            default = "the default " if quality is None else ""
            warnings.warn(
                f"SRT: {default}quality {name!r} uses scale 1 instead of {scale}, because the "
                "model does not declare that it accepts images of any size (timm: "
                "dynamic_img_size=True), or its layers are read by name. To use scale 1 without "
                f"this warning, pass quality='fast'; to enlarge images, pass scale={scale}",
                stacklevel=4,
            )
            scale = 1.0
        return scale, views

    @torch.no_grad()
    def forward(self, images: torch.Tensor, progress: Progress | None = None) -> Any:
        """Computes the fields of images, or with ``inject`` the output of the model.

        Args:
            images: [B, 3, H, W], floating-point, normalised as the model expects.
            progress: is called with the number of finished views after each batch of views.

        Returns:
            :class:`SRTOutput`; a list of them if ``layers`` is a list; with ``inject`` the output
            of the model.
        """
        if self._injects:
            return self._inject(images, progress)
        return self._aggregate(images, self.reduce, SRTOutput, progress)

    @torch.no_grad()
    def moments(self, images: torch.Tensor, progress: Progress | None = None) -> Any:
        """Mean and variance over the views; ``reduce`` is ignored.

        The noise map of the paper is the norm over the channels of the standard deviation.

        Args:
            images, progress: as for :meth:`forward`.

        Returns:
            :class:`SRTMoments`; a list of them if ``layers`` is a list.

        Raises:
            ValueError: with ``inject``; otherwise as :meth:`forward`.

        Example:
            >>> srt = SRT(torch.nn.Conv2d(3, 5, 8, stride=8), views=4, stride=8, patch=8)
            >>> mean, var, _ = srt.moments(torch.rand(1, 3, 32, 24))
            >>> noise = var.sum(1).sqrt()  # [1, 4, 3]
        """
        if self._injects:
            inject = self._settings["layers"]
            raise ValueError(f"SRT: inject must be None for moments; got {inject!r}")
        return self._aggregate(images, "moments", SRTMoments, progress)

    def tokens(self, images: torch.Tensor) -> Iterator[ViewTokens]:
        """Runs the model on every view, in batches of views, and yields the tokens.

        The other methods use this loop; use it for other reductions over the views. Images are
        enlarged by ``scale`` and padded to whole patches and cells. The tokens of mirrored views
        are mirrored back. With ``inject``, the tokens of that layer are yielded. The generator
        keeps no batch: ``del`` a batch before requesting the next one, or the tokens of two batches
        are in memory.

        Args:
            images: [B, 3, H, W], normalised as the model expects. They are read for each batch, so
                do not change them in between.

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
        views, frame = self._known._replace(views=_copied(self._views)), self._frame(images)
        return self._batches(frame, self._anchored(frame, views))

    def cost(
        self,
        size: tuple[int, int],
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cost:
        """The cost of :meth:`forward`, without running it.

        A copy of the model runs on fake tensors, which have no data. The operations of matrix
        products, convolutions and attention are counted. Memory counts tensors, not the workspaces
        of kernels.

        Args:
            size: (H, W) of the images in pixels, or one for both.
            batch: number of images.
            dtype, device: of the images. None: as the parameters of the model, or float32 on the
                CPU for a model without parameters.

        Returns:
            :class:`~srt_ext.srt.Cost`.

        Raises:
            TypeError, ValueError: as :meth:`forward`, and if the model cannot be copied or its
                forward pass needs the values of its tensors.

        Example:
            >>> srt = SRT(torch.nn.Conv2d(3, 5, 8, stride=8), 4, patch=8)
            >>> srt.cost((32, 24)).operations == 4 * 2 * 12 * (3 * 8 * 8) * 5
            True
        """
        height, width = check_pair("SRT", "size", size)
        batch = check_count("SRT", "batch", batch, 1)
        _check_dtype_and_device(dtype, device)
        parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else ()
        default = torch.empty(0, dtype=torch.float32, device="cpu")
        like = next((p for p in parameters if p.is_floating_point()), default)
        place: Any = {
            "dtype": like.dtype if dtype is None else dtype,
            "device": like.device if device is None else device,
        }
        try:
            # A copy, because a model may store what it computes, here fake tensors.
            backbone, mode = fake_copy(self.backbone)
            with mode:
                images = torch.empty(batch, 3, height, width, **place)
            twin = SRT.__new__(SRT)
            twin.__dict__ = {**self.__dict__, "_backbone": backbone, "_modules": {}}
            twin.model = backbone.model
            # Outside of the mode, only tensors computed from the images are fake: offsets have
            # values.
            with force_eager(backbone.model):
                operations, memory = operations_and_bytes(lambda: twin(images))
        except Exception as error:
            if str(error).startswith(("SRT: ", "srt::")):  # of the settings
                raise
            rule = "model must run on fake tensors for cost"
            raise ValueError(f"SRT: {rule}; it raised {type(error).__name__}: {error}") from error
        patch, stride = backbone.patch, self.stride
        seen = _Frame.of(images, patch, patch if self._injects else stride, self.scale).image
        forwards = self._known.number + (self._injects and not any(self._known.unshifted))
        tokens = (seen.shape[2] // patch[0]) * (seen.shape[3] // patch[1])
        return Cost(operations, batch * forwards * tokens, memory)

    # ---- one pass over the views ----------------------------------------------------------------

    def _batches(
        self, frame: _Frame, views: _ViewList, reduce: str | None = None
    ) -> Iterator[ViewTokens]:
        """Yields the tokens of the views of an image.

        With ``view_batch="auto"``, the batches leave enough memory for ``reduce``.
        """
        image, total, done = frame.image, views.number, 0

        # no_grad() is not on the generator: torch's wrapper would keep the last batch alive.
        def batch(count: int) -> ViewTokens:
            part = views.take(slice(done, done + count))
            (offsets, weights, _), mirror = part.views, part.mirror
            modes: Any = {"padding": self.padding, "interpolation": self.interpolation}
            with no_grad():
                shifted = _mirrored(_shifted(image, offsets, **modes), mirror, (-2, -1))
                found = self.backbone.features(shifted.flatten(0, 1))
                layers = [_layer_tokens(f, image, len(offsets), mirror) for f in found]
            return ViewTokens(offsets, weights, layers)

        exporting = torch.compiler.is_exporting()  # the program may run on another machine
        if self.view_batch != "auto" or exporting:
            step = _even(total, 8 if self.view_batch == "auto" else int(self.view_batch))
        elif total:
            with force_eager(self.model):  # allocations in compiled code are not counted
                first, peak = peak_bytes(lambda: batch(1))
            step = _even(total - 1, self._fitting(peak, first.layers, frame, total, reduce))
            yield first
            del first
            done = 1
        while done < total:
            yield batch(step)  # not bound to a name, so that the caller can free it
            done += step

    def _fitting(
        self, peak: int, layers: list[LayerTokens], frame: _Frame, total: int, reduce: Any
    ) -> int:
        """The number of views in one forward pass, if the first view took ``peak`` bytes."""
        held = total if reduce == "median" and not self.streaming else 0  # views
        planes = {None: 0, "mean": 2, "moments": 4, "median": 1 if held else 10}[reduce]
        later = 0  # bytes of the fields and of the held tokens
        for layer in layers:
            _, batch, count, channels = layer.tokens.shape
            elements = planes * (count if self._injects else frame.cells) + held * count
            later += batch * channels * elements * max(4, layer.tokens.element_size())
        image = frame.image
        free = (free_bytes(image.device) - later) // 2
        return max(1, min(free // max(1, peak), 64 if image.is_cuda else 8))

    def _frame(self, images: torch.Tensor) -> _Frame:
        """images [B, 3, H, W], enlarged and padded for the model."""
        check_tensor("SRT", "images", images)
        _warn_if_training(self.model)
        if images.dim() != 4:
            raise ValueError(f"SRT: images must be [B, 3, H, W]; got {list(images.shape)}")
        if images.shape[3] == 3 and images.shape[1] > 4:
            rule = "images must be [B, 3, H, W], channels before pixels"
            raise wrong(ValueError, "SRT", rule, list(images.shape))
        if 0 in images.shape[2:]:
            raise ValueError(f"SRT: images must have pixels; got {list(images.shape)}")
        if not images.is_floating_point():
            rule = "images must be floating-point, normalised as the model expects"
            raise wrong(TypeError, "SRT", rule, images.dtype)
        patch = self.backbone.patch
        stride = patch if self._injects else self.stride
        if self.border == "circular":
            _check_periodic(images, patch, stride)
        return _Frame.of(images, patch, stride, self.scale)

    def _anchored(self, frame: _Frame, views: _ViewList) -> _ViewList:
        """The views with offsets [V, B, 2] from the anchor of each image; unchanged without one."""
        image = frame.image
        if self.anchor is None or not len(image):
            return views
        size = list(image.shape[2:])
        if max(size) > designs.MAX_RADIUS:  # the limit of offsets
            rule = "images must have at most 2^20 pixels on each axis with anchor"
            raise wrong(ValueError, "SRT", rule, size)
        anchor = (unique_anchor if self.anchor == "full" else polyphase)(image, self.backbone.patch)
        # In float64, so that adding an anchor does not round the fraction of a pixel.
        offsets = views.views.offsets.to(image.device, torch.float64, non_blocking=True)
        both = [(offsets[:, None, i] - anchor[:, i]) % size[i] for i in range(2)]
        return views._replace(views=views.views._replace(offsets=torch.stack(both, 2)))

    def _aggregate(
        self, images: torch.Tensor, reduce: str, kind: Callable[..., Any], progress: Any
    ) -> Any:
        """``kind`` for each layer: the fields, cropped to the image, and the mean prefix tokens."""
        frame, views = self._frame(images), self._known
        if self.streaming and reduce == "median":
            views = views.take(designs.spread_order(views.number))
        views = self._anchored(frame, views)
        outputs = []
        for field in self._fields(frame, views, views, reduce, frame.stride, progress):
            fields, prefix = field.result()
            outputs.append(kind(*map(frame.cropped, fields), prefix))
        return outputs if self.backbone.returns_list else outputs[0]

    def _inject(self, images: torch.Tensor, progress: Progress | None) -> Any:
        """The output of the model for padded images [B, 3, H, W] with the aggregated tokens."""
        frame = self._frame(images)
        hooks: Any = self.backbone  # a HookBackbone
        # Only the forward pass of the unshifted image runs to the end. If it is one of the views,
        # it runs last.
        identity = [i for i, same in enumerate(self._known.unshifted) if same][:1]
        order = [i for i in range(self._known.number) if i not in identity]
        if self.streaming and self.reduce == "median":
            order = [order[i] for i in designs.spread_order(len(order))]
        views = self._known.take(order + identity)
        before = views.take(slice(len(order)))
        fields = self._fields(frame, before, views, self.reduce, None, progress)

        def ensemble_tokens(features: Features) -> tuple[torch.Tensor, torch.Tensor | None]:
            if identity:
                last = _layer_tokens(features, frame.image, 1, None)
                if not fields:
                    fields.append(_Field(self, self.reduce, views, None, frame, last))
                fields[0].add(last)
            (field,), prefix = fields[0].result()
            return field.flatten(2).transpose(1, 2), prefix

        result = hooks.forward_with(frame.image, ensemble_tokens)
        if progress is not None and identity:
            progress(views.number)
        return result

    def _fields(
        self,
        frame: _Frame,
        part: _ViewList,
        views: _ViewList,
        reduce: str,
        stride: tuple[int, int] | None,
        progress: Progress | None,
    ) -> list[_Field]:
        """The fields of the layers for ``views``, after ``part``, the first of them, was added."""
        fields: list[_Field] = []
        done = 0
        for batch in self._batches(frame, part, reduce):
            settings = (self, reduce, views, stride, frame)
            fields = fields or [_Field(*settings, layer) for layer in batch.layers]
            for field, layer in zip(fields, batch.layers, strict=True):
                field.add(layer)
            done += len(batch.offsets)
            del batch, layer  # frees the tokens before the next forward pass
            if progress is not None:
                progress(done)
        return fields


def _warn_if_training(model: object) -> None:
    """Warns if the model is in training mode and this changes its features."""
    if changes_in_training(model):
        warnings.warn(
            "SRT: the model is in training mode: dropout changes the features of the views, and "
            "the views change the running statistics of its norms. Call model.eval() first",
            stacklevel=2,
        )


def _check_dtype_and_device(dtype: object, device: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise wrong(kind, "SRT", "dtype must be a floating-point torch.dtype", repr(dtype))
    try:
        if device is not None:
            torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        rule = "device must be a torch.device or its name"
        raise wrong(kind, "SRT", rule, repr(device)) from None


def _even(count: int, most: int) -> int:
    """A batch size that fills all batches but the last: compiled models recompile for others."""
    return -(-count // -(-count // most)) if count else 1


@contextmanager
def _with_values() -> Iterator[None]:
    """New tensors have values and can be used in every mode."""
    with state_mode(), unset_fake_temporarily():
        yield


def _copied(views: Views) -> Views:
    """A copy on the CPU."""
    with _with_values():
        parts = (None if part is None else part.detach().cpu().clone() for part in views)
        return Views(*parts)  # type: ignore[arg-type]


class _ViewList(NamedTuple):
    """Views, with their values as Python lists: tensors cannot be read where a call is traced."""

    views: Views
    unshifted: list[bool]  # the view is the image itself
    weights: list[float] | None
    mirror: list[list[bool]] | None  # (y, x) of each view

    @classmethod
    def of(cls, views: Views) -> _ViewList:
        lists: Any = (None if part is None else part.tolist() for part in views)
        offsets, weights, mirror = lists
        mirrored = [False] * len(offsets) if mirror is None else map(any, mirror)
        unshifted = [not any(o) and not m for o, m in zip(offsets, mirrored, strict=True)]
        return cls(views, unshifted, weights, mirror)

    def take(self, index: slice | list[int]) -> _ViewList:
        """The views at ``index``."""

        def taken(part: list[Any] | None) -> list[Any] | None:
            if part is None:
                return None
            # Not range(number)[index], which torch.compile of torch 2.10 (not 2.11) cannot trace.
            return part[index] if isinstance(index, slice) else [part[i] for i in index]

        lists: Any = map(taken, self[1:])
        return _ViewList(self.views.take(index), *lists)

    @property
    def number(self) -> int:
        return len(self.unshifted)

    @property
    def parts(self) -> int:
        """The number of parts of a batch with separate offsets: the images, or 1."""
        offsets = self.views.offsets
        return 1 if offsets.dim() == 2 else offsets.shape[1]


def _checked(views: Views) -> Views:
    """A copy of the views. Invalid views raise an error before the model runs."""
    offsets, weights, _ = views = _copied(views)
    token = torch.zeros(len(offsets), 1, 1, 1, dtype=torch.float32, device="cpu")
    try:
        check_views("ensemble", token, offsets, (1, 1), (1, 1), weights)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("srt::ensemble: ").replace("must", "of views must", 1)
        raise type(error)(f"SRT: {reason}") from None
    if weights is not None and not weights.sum() > 0:
        raise ValueError(f"SRT: weights of views must not all be 0; got {weights.tolist()}")
    return views


def _check_scale(scale: Any) -> float:
    rule = "scale must be a number from 1 to 2^24"
    value = check_number("SRT", rule, scale)
    if not 1 <= value <= _MAX_SIDE:
        raise wrong(ValueError, "SRT", rule, scale)
    return value


def _view_batch(value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    return check_count("SRT", "view_batch", value, 1, other=", or 'auto'")


def _check_circular(border: str, padding: str, anchor: object, inject: object) -> None:
    if border == "circular" and padding != "circular":
        rule = "padding must be 'circular' if border is 'circular'"
        raise wrong(ValueError, "SRT", rule, repr(padding))
    if anchor is None:
        return
    check_words("SRT", anchor=anchor)
    if border != "circular":
        rule = "border and padding must be 'circular' with anchor"
        raise wrong(ValueError, "SRT", rule, f"border {border!r}, padding {padding!r}")
    if inject is not None:
        rule = "anchor must be None with inject, whose last blocks run on the unshifted image"
        raise wrong(ValueError, "SRT", rule, repr(anchor))


def _check_periodic(images: torch.Tensor, patch: tuple[int, int], stride: tuple[int, int]) -> None:
    """Checks that images [B, 3, H, W] need no padding, which would change their period."""
    size, whole = list(images.shape[2:]), list(map(math.lcm, patch, stride))
    if any(pixels % unit for pixels, unit in zip(size, whole, strict=True)):
        rule = f"H and W of images must be multiples of {whole} pixels (whole patches and cells)"
        raise wrong(ValueError, "SRT", f"{rule} with border 'circular'", size)


def _check_inject(inject: object, layers: object, stride: object) -> None:
    if not isinstance(inject, str) and not is_integer(inject):
        raise TypeError(f"SRT: inject must be one index or module name; got {inject!r}")
    if layers is not None:
        raise ValueError(f"SRT: layers must be None with inject; got {layers!r}")
    if stride != 1:
        rule = "stride must be omitted with inject, which uses the stride of the tokens"
        raise ValueError(f"SRT: {rule}; got {stride}")


class _Frame(NamedTuple):
    """An image, enlarged and padded for the model, and the position of the cells in it."""

    image: torch.Tensor  # [B, 3, H, W], enlarged, and padded to whole patches and cells
    stride: tuple[int, int]  # pixels of ``image`` per cell of the computed field
    ratio: tuple[float, float]  # computed cells per cell of the result, >= 1
    size: tuple[int, int]  # (H', W') of the result

    @classmethod
    def of(
        cls, images: torch.Tensor, patch: tuple[int, int], stride: tuple[int, int], scale: float
    ) -> _Frame:
        """images [B, 3, H, W] enlarged by ``scale``; ``stride`` in their pixels."""
        size, enlarged, pad, made, ratio = [], [], [], [], []
        for axis in range(2):
            cell = stride[axis] * scale
            made.append(math.floor(cell + _ROUNDING))
            ratio.append(1.0 if abs(cell - made[axis]) < _ROUNDING else cell / made[axis])
            pixels = images.shape[2 + axis]
            size.append(-(-pixels // stride[axis]))
            enlarged.append(pixels if scale == 1 else math.ceil(pixels * scale - _ROUNDING))
            needed = max(enlarged[axis], math.ceil(size[axis] * cell - _ROUNDING))
            pad.append(needed - enlarged[axis] + -needed % math.lcm(patch[axis], made[axis]))
            if enlarged[axis] + pad[axis] > _MAX_SIDE:
                raise ValueError(
                    "SRT: images must have at most 2^24 pixels on each axis, enlarged by scale and "
                    f"padded to whole patches and cells; got {enlarged[axis] + pad[axis]}"
                )
        image = images if scale == 1 else _enlarged(images, enlarged, scale)
        if any(pad):
            image = F.pad(image, (0, pad[1], 0, pad[0]), mode="replicate")
        return cls(image, (made[0], made[1]), (ratio[0], ratio[1]), (size[0], size[1]))

    @property
    def cells(self) -> int:
        """The number of cells of the computed field."""
        return (self.image.shape[2] // self.stride[0]) * (self.image.shape[3] // self.stride[1])

    def cropped(self, field: torch.Tensor) -> torch.Tensor:
        """field [B, C, h, w] with cells of ``stride`` -> [B, C, H', W']."""
        if self.ratio == (1, 1):
            return field[:, :, : self.size[0], : self.size[1]]
        # Sampled at the centres of the cells of the result.
        factors = [1 / ratio for ratio in self.ratio]
        result: torch.Tensor = _resample.upsample_bilinear2d(field, self.size, False, *factors)
        return result


# F.interpolate accepts a size or a scale factor, not both, and rounds the size down for a factor.
_resample: Any = torch.ops.aten
_MAX_SIDE = 1 << 24  # pixels, as in the ops
_ROUNDING = 1e-6  # pixels: far above rounding errors of sizes, far below a visible shift


def _enlarged(images: torch.Tensor, size: list[int], scale: float) -> torch.Tensor:
    """images [B, 3, H, W] -> [B, 3, *size], bicubic; size is (H, W) * scale, rounded up.

    Pixel y samples the image at (y + 0.5) / scale - 0.5, also where H * scale is not whole.
    """
    enlarged: torch.Tensor = _resample.upsample_bicubic2d(images, size, False, scale, scale)
    return enlarged


def _parts(
    tensor: torch.Tensor, dim: int, offsets: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a tensor and offsets [k, 2]: one pair, or one per image for offsets [k, B, 2].

    The images are along ``dim``.
    """
    if offsets.dim() == 2:
        return [(tensor, offsets)]
    return list(zip(tensor.split(1, dim), offsets.unbind(1), strict=True))


def _shifted(image: torch.Tensor, offsets: torch.Tensor, **modes: Any) -> torch.Tensor:
    """The views [k, B, 3, H, W] of image [B, 3, H, W]; offsets [k, 2] or [k, B, 2]."""
    views = [shift(*part, **modes) for part in _parts(image, 0, offsets)]
    return views[0] if len(views) == 1 else torch.cat(views, 1)


def _joined(parts: Iterator[tuple[torch.Tensor, ...]], number: int) -> tuple[torch.Tensor, ...]:
    """Joins the fields of the parts of a batch, each [1, C, H', W'] if there are several.

    Each field is copied as soon as it is computed, so that only one of them exists twice.
    """
    if number == 1:
        return next(parts)
    fields: tuple[torch.Tensor, ...] = ()
    for i, part in enumerate(parts):
        if not fields:
            whole = (field.expand(number, -1, -1, -1) for field in part)
            fields = tuple(torch.empty_like(w, memory_format=torch.channels_last) for w in whole)
        for field, made in zip(fields, part, strict=True):
            field[i] = made[0]
    return fields


def _mirrored(
    parts: torch.Tensor, mirror: list[list[bool]] | None, dims: tuple[int, int]
) -> torch.Tensor:
    """parts [k, ...], each mirrored along the ``dims``, (y, x), that ``mirror`` selects."""
    if mirror is None:
        return parts
    flips = [[dim for dim, flip in zip(dims, axes, strict=True) if flip] for axes in mirror]
    return torch.stack([part.flip(dims) for part, dims in zip(parts, flips, strict=True)])


def _layer_tokens(
    features: Features, image: torch.Tensor, views: int, mirror: list[list[bool]] | None
) -> LayerTokens:
    """The features of ``views`` views of image [B, 3, H, W], mirrored back."""
    size, grid = image.shape[-2:], features.grid
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ValueError(
            f"SRT: the token grid must divide the padded image, {list(size)} pixels; got a grid of "
            f"{list(grid)}"
        )
    shape = (views, features.tokens.shape[0] // views)
    tokens = features.tokens.unflatten(0, shape)
    if mirror is not None:
        tokens = _mirrored(tokens.unflatten(2, grid), mirror, (-3, -2)).flatten(2, 3)
    return LayerTokens(
        tokens if tokens.stride(3) == 1 else tokens.contiguous(),
        grid,
        (size[0] // grid[0], size[1] // grid[1]),
        None if features.prefix is None else features.prefix.unflatten(0, shape),
    )


_RUNNING = {"mean": RunningMean, "median": RunningMedian, "moments": RunningMoments}


class _Field:
    """Accumulates the field of one layer over batches of views. Keeps as few tokens as possible."""

    def __init__(
        self,
        srt: SRT,
        reduce: str,
        views: _ViewList,  # in the order in which they are added
        stride: tuple[int, int] | None,  # None: the token spacing
        frame: _Frame,
        first: LayerTokens,  # the first batch
    ) -> None:
        stride = stride or first.patch
        modes: dict[str, Any] = {"upsample": srt.upsample, "border": srt.border, "stride": stride}
        self.reduce, self.views = reduce, views
        self.running = [
            _RUNNING[reduce](first.grid, first.patch, **modes) for _ in range(views.parts)
        ]
        # The number of views whose tokens are held until they are aggregated: all for a median,
        # otherwise as many whole batches as have the size of one output.
        total, batch, count = views.number, first.tokens.shape[0], first.tokens.shape[2]
        image = frame.image
        cells = (image.shape[2] // stride[0]) * (image.shape[3] // stride[1])
        self.holds = batch
        if not srt.streaming:
            parts = max(1, cells // count // batch)
            self.holds = total if reduce == "median" else min(total, parts * batch)
        self.at_once = self.holds == total and not srt.streaming
        self.held: torch.Tensor | None = None  # [holds, B, N, C]; the first `waiting` are filled
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
        last = first + views == self.views.number
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
        """Adds prefix [k, B, K, C] of the views from index ``first``."""
        self.prefix_dtype = prefix.dtype
        part = prefix.to(torch.promote_types(prefix.dtype, torch.float32))
        weights = self.views.views.weights
        if self.views.weights is not None and weights is not None:
            own = self.views.weights[first : first + len(prefix)]
            counted = [i for i, weight in enumerate(own) if weight]  # 0 * inf is NaN
            weights = weights[first : first + len(prefix)][counted].to(part)
            part = part[counted] * weights[:, None, None, None]
        self.prefix = part.sum(0) if self.prefix is None else self.prefix + part.sum(0)

    def _aggregate_held(self) -> None:
        if self.held is not None and self.waiting:
            count, self.waiting = self.waiting, 0
            self._aggregate(self.held[:count])

    def _aggregate(self, tokens: torch.Tensor) -> None:
        """Aggregates tokens [k, B, N, C] of the next views."""
        views = slice(self.aggregated, self.aggregated + len(tokens))
        offsets, weights, _ = self.views.views.take(views)
        self.aggregated += len(tokens)
        parts = _parts(tokens, 1, offsets)
        if self.at_once:
            self.fields = _joined((self._made(*part, weights) for part in parts), len(parts))
            return
        for running, part in zip(self.running, parts, strict=True):
            running.update(*part, weights)

    def _made(
        self, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The fields of tokens [V, B, N, C] of all views, with offsets [V, 2]."""
        running = self.running[0]
        args = (tokens, offsets, running.grid, running.patch, weights)
        if self.reduce == "moments":
            return ensemble_moments(*args, **running._modes)
        return (ensemble(*args, **{**running._modes, "reduce": self.reduce}),)

    def result(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The fields, each [B, C, H', W'], and the mean prefix tokens [B, K, C]."""
        self.held = None
        number = len(self.running)
        # Each state is freed after it is copied.
        states = (self.running.pop(0)._fields() for _ in range(number))
        fields = self.fields or _joined(states, number)
        if self.prefix is None:
            return fields, None
        weights = self.views.weights
        total = self.views.number if weights is None else math.fsum(weights)
        return fields, (self.prefix / total).to(self.prefix_dtype)
