"""The interface between SRT and a model: the tokens of some layers, and their grid."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .._validation import check_count, check_pair
from .wrappers import call_method, changes_in_training, check_hooks, unwrap

Layer = int | str
Model = Callable[..., Any]


class Features(NamedTuple):
    """The tokens of one layer, for a batch of images."""

    tokens: torch.Tensor  #: [B, h * w, C], in row order
    grid: tuple[int, int]  #: (h, w)
    prefix: torch.Tensor | None  #: [B, K, C], class and register tokens; None without


class Backbone(ABC):
    """Adapter for a frozen model. :func:`srt_ext.backbones.describe` returns the one for a model.

    Attributes:
        model: the model that is read.
        patch: (Ph, Pw), pixels per token at the coarsest requested layer; the sides of images must
            be multiples of it.
        modules: names of the modules whose outputs are the layers; empty if unknown.
        prefix: number of class and register tokens; None if it is inferred from the shapes.
        returns_list: a list of layers was requested, not a single layer.
        any_size: the model declares that it accepts images of any size.
        own_output: the method or output of the model that returns the last layer with its norm.
    """

    own_output = ""
    prefix: int | None = None
    returns_list = False
    any_size = False

    def __init__(self, model: Model, patch: object, modules: Sequence[str] = ()) -> None:
        self.model = model
        self.patch = check_pair("SRT", "patch", patch)
        self.modules = tuple(modules)
        self._compiled: Callable[[torch.Tensor], list[Features]] | None = None
        self._compared: set[torch.dtype] = set()

    def features(self, images: torch.Tensor) -> list[Features]:
        """Runs the model on a batch of images.

        Args:
            images: [B, 3, H, W], normalised as the model expects; sides are multiples of ``patch``.

        Returns:
            The :class:`Features` of each layer, in the requested order.

        Raises:
            ValueError: a hook of the model would be bypassed; the last layer with its norm differs
                from the model's own output; the output of the model has another shape.
        """
        self._check_hooks()
        self._compare(images)
        compiler = getattr(self.model, "dynamo_ctx", None)  # the settings of torch.compile(model)
        if compiler is not None and self._compiled is None:
            self._compiled = compiler(self._features)
        return (self._compiled or self._features)(images)

    @property
    def inner(self) -> Any:
        """The model without wrappers such as ``torch.compile`` or ``DataParallel``."""
        return unwrap(self.model)

    @abstractmethod
    def _features(self, images: torch.Tensor) -> list[Features]: ...

    def _check_hooks(self) -> None:
        check_hooks(self.model, through=self.inner)

    def _own_output(self, images: torch.Tensor) -> Any:
        """The result of the method ``own_output``; None if images are not its only argument."""
        try:
            return call_method(self.inner, self.own_output, images)
        except Exception:
            return None

    def _last_layer(self, images: torch.Tensor) -> tuple[torch.Tensor, Any] | None:
        """The last layer with its norm, as it is read here and as the model returns it.

        None if it was not requested.
        """
        return None

    def _compare(self, images: torch.Tensor) -> None:
        """Compares the last layer with the model's own output, once for each dtype.

        The final norm is found by its name, and new models may use other names.
        """
        if torch.compiler.is_compiling() or images.dtype in self._compared:
            return
        if is_traced(images) or changes_in_training(self.inner):
            return
        few = (2 * self.patch[0], 3 * self.patch[1])
        for size in [few, images.shape[2:]] if self.any_size else [images.shape[2:]]:
            # Not random numbers, which torch.vmap does not support.
            count = torch.arange(3 * size[0] * size[1], dtype=torch.float32, device="cpu")
            image = (count * 0.618034).frac().view(1, 3, *size)
            try:
                with torch.no_grad():
                    found = self._last_layer(image.to(images))
                    error = 0.0 if found is None else _relative_error(*found)
                break
            except Exception:  # the forward pass of the images will raise it
                continue
        else:
            return
        half = images.dtype.itemsize < 4 or torch.is_autocast_enabled(images.device.type)
        if not error <= (1e-2 if half else 1e-4):  # NaN, too
            raise ValueError(
                f"SRT: the last layer with its norm must equal the output of {self.own_output} of "
                f"{type(self.inner).__name__}; got a relative error of {error:.2g}. Pass layers by "
                "name, or norm=False"
            )
        self._compared.add(images.dtype)

    def __getstate__(self) -> dict[str, Any]:  # a copy compiles again
        return {**self.__dict__, "_compiled": None}


class CallableBackbone(Backbone):
    """Reads the output of a callable: tokens, a map, or a pyramid of maps."""

    def __init__(
        self, model: Model, patch: object, prefix: object, hint: Callable[[Model], str]
    ) -> None:
        """``hint`` returns text for errors, about models that are contained in this one."""
        super().__init__(model, patch)
        self.prefix, self.hint = resolve_prefix(prefix, None), hint

    def features(self, images: torch.Tensor) -> list[Features]:
        return self._features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        output = self.model(images)
        try:
            if isinstance(output, (list, tuple)) and len(output) > 1:  # a pyramid, as timm's
                output = self._map_of(output, grid_of(images, self.patch))
            return [parse_output(output, images, self.patch, self.prefix)[0]]
        except ValueError as error:
            raise ValueError(f"{error}{self.hint(self.model)}") from None

    def _map_of(self, pyramid: Sequence[Any], grid: tuple[int, int]) -> Any:
        shapes = [getattr(part, "shape", ()) for part in pyramid]
        fits = [s[2:] == grid or s[1:3] == grid for s in shapes]
        if sum(fits) != 1:
            way = "Pass layers=NAME to read one module" if any(fits) else "Check patch"
            raise ValueError(
                f"SRT: exactly one output of the model must be a map with a grid of {list(grid)}; "
                f"got {sum(fits)} in outputs of {[list(shape) for shape in shapes]}. {way}"
            )
        return pyramid[fits.index(True)]


class TimedBackbone(Backbone):
    """Wraps another backbone and measures its time.

    Attributes:
        seconds: total time of :meth:`features`; on a GPU only the time of the host.
    """

    def __init__(self, other: Backbone) -> None:
        super().__init__(other.model, other.patch, other.modules)
        self.other, self.returns_list, self.seconds = other, other.returns_list, 0.0
        self.any_size = other.any_size

    def features(self, images: torch.Tensor) -> list[Features]:
        return self._features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        start = time.perf_counter()
        features = self.other.features(images)
        self.seconds += time.perf_counter() - start
        return features


def is_traced(images: torch.Tensor) -> bool:
    """Whether the forward pass is traced or captured, or the images have no values."""
    tracing = torch._C._is_tracing() or _get_current_dispatch_mode() is not None
    captured = images.is_cuda and torch.cuda.is_current_stream_capturing()
    return tracing or captured or images.is_meta or isinstance(images, FakeTensor)


def _relative_error(tokens: torch.Tensor, own: object) -> float:
    """The error of tokens [B, K + N, C] relative to the model's own tokens or map.

    0 if the shapes differ, or if the model's own output is not finite.
    """
    if not isinstance(own, torch.Tensor) or not own.isfinite().all():
        return 0.0
    tokens, own = tokens.float(), own.float()
    forms = [own]
    if own.dim() == 4:
        forms = [own.flatten(2).transpose(1, 2), own.flatten(1, 2)]  # NCHW, NHWC
    elif own.dim() == 3:
        forms = [own[:, -tokens.shape[1] :]]  # after prefix tokens that were not read
    errors = [
        float((tokens - form).norm() / form.norm().clamp(min=1e-30))  # all zero: equal
        for form in forms
        if form.shape == tokens.shape
    ]
    return min(errors, default=0.0)


# A wrong patch leaves hundreds of tokens; models have a class token and a few register tokens.
MAX_INFERRED_PREFIX = 16

# ---- layouts ------------------------------------------------------------------------------------


def grid_of(images: torch.Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    return images.shape[2] // patch[0], images.shape[3] // patch[1]


def from_map(tokens: torch.Tensor) -> Features:
    """[B, C, h, w] -> Features; the tokens are a view."""
    return Features(tokens.flatten(2).transpose(1, 2), (tokens.shape[2], tokens.shape[3]), None)


def split_prefix(tokens: torch.Tensor, grid: tuple[int, int], prefix: int | None) -> Features:
    """[B, K + h * w, C] -> Features. Warns if K is inferred from the shape."""
    count = grid[0] * grid[1]
    extra = tokens.shape[1] - count
    if extra < 0 or (prefix is not None and extra != prefix):
        raise ValueError(
            f"SRT: the model must return tokens [B, {'K' if prefix is None else prefix} + {count}, "
            f"C] for a grid of {list(grid)} patches; got {list(tokens.shape)}. Check patch and "
            "prefix"
        )
    if prefix is None and extra > MAX_INFERRED_PREFIX:
        raise ValueError(
            f"SRT: the model must return at most {MAX_INFERRED_PREFIX} tokens more than the "
            f"{count} of a grid of {list(grid)} patches if prefix is not given; got "
            f"{tokens.shape[1]} tokens. Check patch; if it is correct, pass prefix={extra}"
        )
    if extra and prefix is None:
        warnings.warn(
            f"SRT: the model returned {tokens.shape[1]} tokens for a grid of {list(grid)}, so "
            f"prefix={extra} (class and register tokens) is assumed. Pass prefix={extra} if this "
            "is correct; otherwise patch is wrong, or the module does not return image tokens",
            stacklevel=2,
        )
    return Features(tokens[:, extra:], grid, tokens[:, :extra] if extra else None)


def parse_output(
    output: object, images: torch.Tensor, patch: tuple[int, int], prefix: int | None
) -> tuple[Features, str]:
    """The features in a module's output, and its layout: NLC, NCHW or NHWC.

    The token spacing of a map may differ from ``patch`` by a factor, and a map may fit both
    layouts; both cases raise a warning.
    """
    output = getattr(output, "last_hidden_state", output)  # transformers
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.dim() not in (3, 4):
        got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"SRT: the model must return tokens [B, K + N, C] or a map; got {got}. "
            "Pass layers=NAME to read another module"
        )
    if output.shape[0] != images.shape[0]:  # windowed tokens, or tokens in the first dimension
        raise ValueError(
            f"SRT: the model must return tokens or a map for each of {images.shape[0]} images, in "
            f"the first dimension; got {list(output.shape)}"
        )
    if output.dim() == 3:
        return split_prefix(output, grid_of(images, patch), prefix), "NLC"
    layout = _map_layout(output, images, patch)
    return from_map(output if layout == "NCHW" else output.permute(0, 3, 1, 2)), layout


def _map_layout(features: torch.Tensor, images: torch.Tensor, patch: tuple[int, int]) -> str:
    """``NCHW`` or ``NHWC``, inferred from the shape of a map [B, ., ., .]."""
    height, width = images.shape[2:]
    fits = {}
    for layout, (h, w) in {"NCHW": features.shape[2:], "NHWC": features.shape[1:3]}.items():
        if h and w and height % h == 0 and width % w == 0:
            pitch = (height // h, width // w)
            if pitch[0] * patch[1] == pitch[1] * patch[0]:  # patches of the same shape
                fits[layout] = pitch
    exact = [layout for layout, pitch in fits.items() if pitch == patch] or list(fits)
    if not exact:
        raise ValueError(
            f"SRT: the model must return a map with a grid of {list(grid_of(images, patch))}, as "
            f"[B, C, h, w] or [B, h, w, C]; got {list(features.shape)}. Check patch"
        )
    layout = exact[0]
    if len(exact) > 1 or fits[layout] != patch:
        warnings.warn(
            f"SRT: a map of {list(features.shape)} for images of {[height, width]} pixels is read "
            f"as {layout} with a patch of {list(fits[layout])}",
            stacklevel=3,
        )
    return layout


# ---- settings that the model declares -----------------------------------------------------------


def normalize_indices(layers: list[int], count: int) -> list[int]:
    """The layer indices, counted from 0."""
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"SRT: layers must be in {-count} ... {count - 1}; got {layer}")
    return [layer % count for layer in layers]


def resolve_patch(given: object, declared: Any) -> Any:
    """The declared patch size; a given one must be equal."""
    pair = check_pair("SRT", "patch", declared)
    if given is not None and check_pair("SRT", "patch", given) != pair:
        raise ValueError(
            f"SRT: patch must equal the patch size of the model, {declared}; got {given}"
        )
    return pair


def resolve_prefix(given: object, declared: int | None) -> int | None:
    """The declared number of prefix tokens, or the given one if the model declares none."""
    if given is None:
        return declared
    count = check_count("SRT", "prefix", given, 0)
    if declared not in (None, count):
        rule = "prefix must equal the number of class and register tokens of the model"
        raise ValueError(f"SRT: {rule}, {declared}; got {given}")
    return count


def declared_patch(model: Any) -> Any:
    """The patch size in the attributes of a model."""
    for place in (model, getattr(model, "patch_embed", None), getattr(model, "config", None)):
        patch = getattr(place, "patch_size", None)
        if patch is not None:
            return patch
    raise ValueError(
        "SRT: patch must be given if the model does not declare it; "
        f"got None with {type(model).__name__}"
    )
