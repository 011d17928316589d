"""What SRT has to know of a model: its tokens at the layers asked for, and the grid they lie on.

One class for each way in which libraries hand out features: timm's ``forward_intermediates``,
``output_hidden_states`` of transformers, ``get_intermediate_layers`` of DINO, hooks on modules by
name, and what a call returns. None of them changes the model.
"""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._validation import check_count, check_pair

Layer = int | str
Model = Callable[..., Any]


def _inner(model: Any) -> Any:
    """The model itself, where ``model`` is what torch.compile returned."""
    return getattr(model, "_orig_mod", model)


class Features(NamedTuple):
    """The tokens of one layer, of a batch of pictures."""

    tokens: torch.Tensor  # [B, h * w, C], in row order
    grid: tuple[int, int]  # (h, w)
    prefix: torch.Tensor | None  # [B, K, C], class and register tokens


class Backbone(ABC):
    """A frozen model as SRT sees it. :func:`describe` finds the one for a model.

    Attributes:
        model: what it reads.
        patch: (Ph, Pw), pixels per token at the coarsest layer asked for; the sides of pictures
            must be multiples of it.
        modules: names of the modules whose output the layers are, empty where that is not known.
        prefix: class and register tokens, None where the shapes have to tell.
        several: a list of layers was asked for, and not one.
    """

    prefix: int | None = None
    several = False

    def __init__(self, model: Model, patch: object, modules: Sequence[str] = ()) -> None:
        self.model = model
        self.patch = check_pair("SRT", "patch", patch)
        self.modules = tuple(modules)
        self._compiled: Callable[[torch.Tensor], list[Features]] | None = None

    def features(self, images: torch.Tensor) -> list[Features]:
        """images [B, 3, H, W], whole patches -> the features of each layer, in the order asked."""
        compiler = getattr(self.model, "dynamo_ctx", None)  # of torch.compile(model): its settings
        if compiler is not None and self._compiled is None:
            self._compiled = compiler(self._features)
        return (self._compiled or self._features)(images)

    @property
    def inner(self) -> Any:
        return _inner(self.model)

    @abstractmethod
    def _features(self, images: torch.Tensor) -> list[Features]: ...

    def __getstate__(self) -> dict[str, Any]:  # a copy compiles its own
        return {**self.__dict__, "_compiled": None}


# ---- layouts ------------------------------------------------------------------------------------


def _from_map(tokens: torch.Tensor) -> Features:
    """[B, C, h, w] -> Features; the tokens are a view."""
    return Features(tokens.flatten(2).transpose(1, 2), (tokens.shape[2], tokens.shape[3]), None)


def _grid(images: torch.Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    return images.shape[2] // patch[0], images.shape[3] // patch[1]


def _split(tokens: torch.Tensor, grid: tuple[int, int], prefix: int | None) -> Features:
    """[B, K + h * w, C] -> Features. A number of prefix tokens that nobody told is said aloud."""
    count = grid[0] * grid[1]
    extra = tokens.shape[1] - count
    if extra < 0 or (prefix is not None and extra != prefix):
        raise ValueError(
            f"SRT: the model must return tokens [B, {'K' if prefix is None else prefix} + {count}, "
            f"C] for its patches, a grid of {list(grid)}; got {list(tokens.shape)}. Are patch and "
            "prefix right?"
        )
    if extra and prefix is None:
        warnings.warn(
            f"SRT: of {tokens.shape[1]} tokens for a grid of {list(grid)} the first {extra} are "
            f"taken for class or register tokens. Say prefix={extra} if that is right; if not, "
            "patch is wrong, or the tokens are not those of a picture",
            stacklevel=2,
        )
    return Features(tokens[:, extra:], grid, tokens[:, :extra] if extra else None)


def _located(
    output: object, images: torch.Tensor, patch: tuple[int, int], prefix: int | None
) -> tuple[Features, str]:
    """What a module returned, and its layout: NLC, NCHW or NHWC.

    A map may be finer or coarser than the patch says, by a factor: that, and which of two layouts
    that fit is meant, is said aloud.
    """
    tokens = _tensor(output)
    if tokens is None or tokens.dim() not in (3, 4):
        got = type(output).__name__ if tokens is None else list(tokens.shape)
        raise ValueError(
            f"SRT: the model must return tokens [B, K + N, C] or a map; got {got}. "
            "A layer, by name, may be a module that does"
        )
    if len(tokens) != len(images):  # windows of a picture, or tokens before the batch
        raise ValueError(
            f"SRT: the model must return one row of tokens, or one map, for each of {len(images)} "
            f"pictures; got {list(tokens.shape)}"
        )
    if tokens.dim() == 3:
        return _split(tokens, _grid(images, patch), prefix), "NLC"
    fits = {}
    for layout, (h, w) in {"NCHW": tokens.shape[2:], "NHWC": tokens.shape[1:3]}.items():
        height, width = images.shape[2:]
        if h and w and height % h == 0 and width % w == 0:
            pitch = (height // h, width // w)
            if pitch[0] * patch[1] == pitch[1] * patch[0]:  # patches of the same shape
                fits[layout] = pitch
    exact = [layout for layout, pitch in fits.items() if pitch == patch] or list(fits)
    if not exact:
        raise ValueError(
            f"SRT: the map of the model must lie on a grid of {list(_grid(images, patch))}, NCHW "
            f"or NHWC; got {list(tokens.shape)}. Is patch right?"
        )
    layout = exact[0]
    if len(exact) > 1 or fits[layout] != patch:
        warnings.warn(
            f"SRT: a map of {list(tokens.shape)} for pictures of {list(images.shape[2:])} is taken "
            f"for {layout} with a patch of {list(fits[layout])}",
            stacklevel=2,
        )
    if layout == "NHWC":
        tokens = tokens.permute(0, 3, 1, 2)
    return _from_map(tokens), layout


def _tensor(output: object) -> torch.Tensor | None:
    """The tensor of an output that may be a tuple or an object of transformers."""
    output = getattr(output, "last_hidden_state", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


# ---- the ways to get features -------------------------------------------------------------------


class _Timm(Backbone):
    """timm: ``forward_intermediates``. Layers are blocks, or stages of hierarchical models."""

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        inner = _inner(model)
        info = list(inner.feature_info)
        self.indices = _indices(layers, len(info))
        takes = inspect.signature(inner.forward_intermediates).parameters
        self.in_rows = "return_prefix_tokens" in takes  # tokens, not maps
        found = _both_sides(inner, max(info[i]["reduction"] for i in self.indices))
        self.prefix = getattr(inner, "num_prefix_tokens", 0) if self.in_rows else 0
        # Where there is no norm (Hiera) timm refuses to be asked for it.
        self.norm = norm and (hasattr(inner, "norm") or hasattr(inner, "neck"))
        names = [info[i]["module"] for i in self.indices]
        super().__init__(model, _agreed("patch", patch, found), names)
        _agreed("prefix", prefix, self.prefix)
        # Hiera's modules have tokens in an order of their own; some models name none that exist.
        if hasattr(inner, "reroll") or not set(names) <= {n for n, _ in inner.named_modules()} - {
            ""
        }:
            self.modules = ()

    def features(self, images: torch.Tensor) -> list[Features]:
        with _sizes_told(images):
            return super().features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        wanted = sorted(set(self.indices))
        how: dict[str, Any] = {"output_fmt": "NCHW"}
        if self.in_rows:
            how = {"output_fmt": "NLC", "return_prefix_tokens": bool(self.prefix)}
        found = self.inner.forward_intermediates(
            images,
            indices=wanted,
            norm=self.norm,
            stop_early=True,
            intermediates_only=True,
            **how,
        )
        made = []
        for layer in found:
            if not self.in_rows:
                made.append(_from_map(layer))
                continue
            tokens, prefix = layer if isinstance(layer, (tuple, list)) else (layer, None)
            made.append(_split(tokens, _grid(images, self.patch), 0)._replace(prefix=prefix))
        return [made[wanted.index(i)] for i in self.indices]


@contextmanager
def _sizes_told(images: torch.Tensor) -> Iterator[None]:
    """Says what to do where a model of timm refuses the size of a picture."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(
            f"SRT: the model must take pictures of {list(images.shape[2:])}, whole patches; it "
            f"says: {str(error).rstrip('.')}. timm's create_model(..., dynamic_img_size=True) or "
            "model.set_input_size(...) change what it takes, where it can"
        ) from error


def _both_sides(model: Any, pitch: Any) -> Any:
    """(Ph, Pw) of a pitch that timm tells as one number, which is the longer side."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio") and embed.feat_ratio() == pitch:
        return tuple(embed.feat_ratio(as_scalar=False))
    return pitch


class _Transformers(Backbone):
    """transformers: ``output_hidden_states``. Layers are those of the encoder."""

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        core = _vision(_inner(model))
        config = core.config
        name, blocks = next(
            (
                (name, module)
                for name, module in core.named_modules()
                if isinstance(module, torch.nn.ModuleList)
                and len(module) == getattr(config, "num_hidden_layers", None)
            ),
            ("", ()),
        )
        # Stages (Swin, ConvNeXt) have pitches, layouts and norms of their own.
        if not blocks or not hasattr(config, "patch_size") or hasattr(config, "depths"):
            raise ValueError(
                f"SRT: layers must be names of modules, with patch, for {type(core).__name__}: "
                "it has no list of num_hidden_layers layers whose tokens are all of one size; "
                f"got {layers}"
            )
        self.indices = _indices(layers, len(blocks))
        self.last = len(blocks) - 1
        # It may lie below the picture's model: `vision_model.post_layernorm`.
        self.norm = next(
            (
                other
                for other, module in core.named_modules()
                if norm
                and not other.startswith(name + ".")
                and other.rpartition(".")[2] in ("layernorm", "norm", "rms_norm", "post_layernorm")
            ),
            "",
        )
        self.neck = norm and any(n.rpartition(".")[2] == "neck" for n, _ in core.named_modules())
        found = _prefix_of(core)
        self.how = {"output_hidden_states": True, **_how(core)}
        path = next((n for n, m in _inner(model).named_modules() if m is core), "")
        names = [".".join(filter(None, (path, name, str(i)))) for i in self.indices]
        super().__init__(model, _agreed("patch", patch, _plain(config.patch_size)), names)
        self.prefix = _agreed("prefix", prefix, found)

    def _features(self, images: torch.Tensor) -> list[Features]:
        core = _vision(self.inner)
        output = core(pixel_values=images, **self.how, **_in_order(core, images, self.patch))
        made = []
        for i in self.indices:
            tokens = output.hidden_states[i + 1]  # the first is that of the patch embedding
            if self.neck and i == self.last:
                made.append(_from_map(output.last_hidden_state))
                continue
            if self.norm:
                tokens = core.get_submodule(self.norm)(tokens)
            made.append(_located(tokens, images, self.patch, self.prefix)[0])  # SAM: NHWC
        return made


def _is_transformers(model: object) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def _how(model: Any) -> dict[str, Any]:
    """What lets models of transformers take pictures of any size, where they can."""
    if _takes(model, "interpolate_pos_encoding"):
        return {"interpolate_pos_encoding": True}
    return {}


def _in_order(model: Any, images: torch.Tensor, patch: tuple[int, int]) -> dict[str, Any]:
    """What keeps ViTMAE of transformers, which shuffles its patches, from doing so."""
    ratio = getattr(getattr(model, "config", None), "mask_ratio", None)
    if ratio is None or not _takes(model, "noise"):
        return {}
    if ratio:
        raise ValueError(
            "SRT: mask_ratio of the model's configuration must be 0, or it leaves patches out; "
            f"got {ratio}"
        )
    height, width = _grid(images, patch)
    return {"noise": torch.arange(height * width, device=images.device).expand(len(images), -1)}


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _prefix_of(model: Any) -> int | None:
    """How many prefix tokens a model tells. It is checked against the tokens that come."""
    if not _is_transformers(model):
        count = getattr(model, "num_prefix_tokens", None)  # timm's
        return count if isinstance(count, int) else None
    front = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    counts = [  # not the query of a pooling head
        parameter.shape[-2] if parameter.dim() > 1 else 1
        for name, parameter in _vision(model).named_parameters()
        if name.rpartition(".")[2] in front and "embed" in name.rpartition(".")[0]
    ]
    return sum(counts) if counts else None


def _vision(model: Any) -> Any:
    """The part of a model of transformers that turns a picture into tokens, without its head."""
    core = model.base_model
    if not _takes(core, "pixel_values"):  # DINOv3: the layers alone
        core = model
    for tower, other in (
        ("vision_model", "text_model"),
        ("vision_model", "classifier"),
        ("vision_encoder", "mask_decoder"),
    ):
        if hasattr(core, tower) and hasattr(core, other):
            return getattr(core, tower)
    return core


class _Dino(Backbone):
    """DINO's ``get_intermediate_layers``. Layers are blocks."""

    def __init__(self, model: Model, layers: list[int], norm: bool, patch: object, prefix: object):
        inner = _inner(model)
        count = getattr(inner, "n_blocks", None) or len(inner.blocks)
        self.indices, self.count, self.norm = _indices(layers, count), count, norm
        self.takes = tuple(inspect.signature(inner.get_intermediate_layers).parameters)
        if not norm and "norm" not in self.takes:
            raise ValueError(
                "SRT: norm must be True for a model whose get_intermediate_layers always "
                "normalises; got False"
            )
        if prefix is not None:
            prefix = check_count("SRT", "prefix", prefix, 0)
        self.prefix = prefix
        names = [f"blocks.{i}" for i in self.indices] if len(inner.blocks) == count else []
        super().__init__(model, _agreed("patch", patch, _patch_of(inner)), names)

    def _features(self, images: torch.Tensor) -> list[Features]:
        get, grid = self.inner.get_intermediate_layers, _grid(images, self.patch)
        wanted = sorted(set(self.indices))
        if "return_class_token" not in self.takes:  # the first DINO: the last n, normalised
            last = get(images, self.count - wanted[0])
            return [_split(last[i - wanted[0]], grid, self.prefix) for i in self.indices]
        how = {"reshape": False, "return_class_token": True, "norm": self.norm}
        if "return_extra_tokens" in self.takes:  # DINOv3: registers, too
            how["return_extra_tokens"] = True
        made = []
        for tokens, *others in get(images, n=wanted, **how):
            front = [t if t.dim() == 3 else t[:, None] for t in others]
            made.append(_split(tokens, grid, 0)._replace(prefix=torch.cat(front, 1)))
        return [made[wanted.index(i)] for i in self.indices]


class _Call(Backbone):
    """What the model returns when it is called: tokens, or a map."""

    def __init__(self, model: Model, patch: object, prefix: object):
        super().__init__(model, patch)
        self.prefix = None if prefix is None else check_count("SRT", "prefix", prefix, 0)

    def features(self, images: torch.Tensor) -> list[Features]:
        return self._features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        output = self.model(images)
        if isinstance(output, (list, tuple)) and len(output) > 1:  # a pyramid, as of timm
            grid = _grid(images, self.patch)
            shapes = [getattr(part, "shape", ()) for part in output]
            fits = [s[2:] == grid or s[1:3] == grid for s in shapes]
            if sum(fits) != 1:
                raise ValueError(
                    f"SRT: of the outputs of the model one must lie on a grid of {list(grid)}; got "
                    f"{[list(shape) for shape in shapes]}. Is patch right?"
                )
            output = output[fits.index(True)]
        return [_located(output, images, self.patch, self.prefix)[0]]


class _Done(Exception):  # noqa: N818
    """Ends a forward whose rest nobody needs."""


class Hooks(Backbone):
    """Modules by name, in any model: their outputs, by hooks that are taken off again."""

    def __init__(self, model: Model, layers: list[str], patch: object, prefix: object):
        inner = _inner(model)
        known = dict(inner.named_modules()) if isinstance(inner, torch.nn.Module) else {}
        for name in layers:
            if name not in known or name == "":
                rule = f"layers must be indices, or names of modules of {type(inner).__name__}"
                near = [n for n in known if n.endswith(".0")][:3]
                hint = f" (such as {', '.join(near)})" if near else ""
                raise ValueError(f"SRT: {rule}{hint}; got {name!r}")
        if _is_transformers(inner) and _takes(inner, "input_ids"):
            raise ValueError(
                "SRT: model must run on pictures alone for inject and for layers by name, as the "
                f"vision_model of CLIP does; got {type(inner).__name__}"
            )
        if hasattr(inner, "reroll"):
            raise ValueError(
                "SRT: layers must be indices, and inject must be left out, for Hiera, whose "
                f"modules have tokens in an order of their own; got {layers}"
            )
        if patch is None:
            declared = {i["module"]: i["reduction"] for i in getattr(inner, "feature_info", [])}
            patch = declared.get(layers[0]) if len(layers) == 1 else None
            patch = _patch_of(inner) if patch is None else _both_sides(inner, patch)
        if prefix is None:
            prefix = _prefix_of(inner)
        self.prefix = None if prefix is None else check_count("SRT", "prefix", prefix, 0)
        self.how = _how(inner)
        super().__init__(model, patch, layers)

    @classmethod
    def of(cls, backbone: Backbone) -> Hooks:
        """The same layers, by the names of their modules."""
        if isinstance(backbone, cls):
            return backbone
        if not backbone.modules:
            if hasattr(backbone.inner, "reroll"):
                raise ValueError(
                    "SRT: inject must be left out for Hiera, whose modules have tokens in an order "
                    "of their own; got an index"
                )
            raise ValueError(
                "SRT: inject must be the name of a module whose tokens lie in row order, with "
                f"patch, for {type(backbone.inner).__name__}; got an index"
            )
        return cls(backbone.model, list(backbone.modules), backbone.patch, backbone.prefix)

    def features(self, images: torch.Tensor) -> list[Features]:
        return self._features(images)  # not compiled: compiled code does not call new hooks

    def _features(self, images: torch.Tensor) -> list[Features]:
        found: dict[str, Features] = {}

        def keep(name: str, output: object) -> None:
            if name not in found:
                found[name] = _located(output, images, self.patch, self.prefix)[0]
            if len(found) == len(set(self.modules)):
                raise _Done

        with suppress(_Done), self.hooked(keep):
            self._run(images)
        missing = sorted(set(self.modules) - set(found))
        if missing:
            raise ValueError(
                f"SRT: the model must call its layers in its forward; it left out {missing}"
            )
        return [found[name] for name in self.modules]

    def _run(self, images: torch.Tensor) -> Any:
        of_timm = hasattr(self.inner, "forward_intermediates")
        with _sizes_told(images) if of_timm else nullcontext():
            return self.inner(images, **self.how, **_in_order(self.inner, images, self.patch))

    @contextmanager
    def hooked(self, hook: Callable[[str, object], object]) -> Iterator[None]:
        """Meanwhile each module calls ``hook`` with its name and output, which it may replace.

        In this thread alone: in another one somebody may run the same model.
        """
        thread = threading.get_ident()

        def called(name: str, output: object) -> object:
            return hook(name, output) if threading.get_ident() == thread else None

        with eagerly(self.model):
            handles = []
            try:
                for name in set(self.modules):
                    module = self.inner.get_submodule(name)
                    handles.append(
                        module.register_forward_hook(
                            lambda _m, _i, out, name=name: called(name, out)
                        )
                    )
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def replaced(
        self, images: torch.Tensor, replace: Callable[[Features], tuple[torch.Tensor, Any]]
    ) -> Any:
        """What the model returns for images [B, 3, H, W] with other features at its one layer.

        ``replace`` is given the features that came, and returns tokens [B, h * w, C] and prefix
        [B, K, C] or None in their place.
        """
        changed = False

        def put(_name: str, output: Any) -> Any:
            nonlocal changed
            if changed:
                raise ValueError(
                    "SRT: the model must call its layer once in its forward; it called "
                    f"{self.modules[0]} again"
                )
            changed = True
            features, layout = _located(output, images, self.patch, self.prefix)
            tokens, prefix = replace(features)
            if layout == "NLC":
                new = tokens if prefix is None else torch.cat([prefix, tokens], 1)
            else:
                new = tokens.unflatten(1, features.grid)
                new = new if layout == "NHWC" else new.permute(0, 3, 1, 2)
            if isinstance(output, torch.Tensor):
                return new
            if type(output) in (tuple, list):
                return type(output)([new, *output[1:]])
            raise ValueError(
                "SRT: inject must name a module that returns a tensor, or a tuple or list that "
                f"starts with one; {self.modules[0]} returns {type(output).__name__}"
            )

        with self.hooked(put):
            result = self._run(images)
        if not changed:
            raise ValueError(
                f"SRT: the model must call its layer in its forward; it left out {self.modules[0]}"
            )
        return result


def eagerly(model: Any) -> AbstractContextManager[Any]:
    """Compiled models run as they are written: hooks that came later would not be called."""
    compiled = hasattr(model, "dynamo_ctx") or getattr(model, "_compiled_call_impl", None)
    return _stance.held() if compiled else nullcontext()


class _Stance:
    """torch's is that of the process: the first thread in sets it, the last one out resets it."""

    def __init__(self) -> None:
        self.lock, self.threads = threading.Lock(), 0
        self.set: Any = None

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if self.threads == 0:
                self.set = torch.compiler.set_stance("force_eager")
            self.threads += 1
        try:
            yield
        finally:
            with self.lock:
                self.threads -= 1
                if self.threads == 0:
                    self.set.__exit__(None, None, None)


_stance = _Stance()


class Timed(Backbone):
    """Another backbone, which counts the seconds that it took; on a GPU, only those of the host."""

    def __init__(self, other: Backbone) -> None:
        super().__init__(other.model, other.patch, other.modules)
        self.other, self.several, self.seconds = other, other.several, 0.0

    def features(self, images: torch.Tensor) -> list[Features]:
        return self._features(images)

    def _features(self, images: torch.Tensor) -> list[Features]:
        start = time.perf_counter()
        found = self.other.features(images)
        self.seconds += time.perf_counter() - start
        return found


# ---- which way for which model ------------------------------------------------------------------


def describe(
    model: Model | Backbone,
    layers: Layer | Sequence[Layer] | None = None,
    *,
    norm: bool = True,
    patch: int | tuple[int, int] | None = None,
    prefix: int | None = None,
) -> Backbone:
    """The :class:`Backbone` of a model: arguments as of :class:`srt_ext.SRT`.

    Raises:
        TypeError: ``model`` is not callable, or ``layers`` are neither indices nor names.
        ValueError: layers that the model does not have; a patch size or a number of prefix tokens
            that is neither given nor found, or that contradicts the model's.
    """
    if isinstance(model, Backbone):
        settings = {"layers": layers, "patch": patch, "prefix": prefix}
        told = {name: value for name, value in settings.items() if value is not None}
        if told or not norm:
            raise ValueError(
                "SRT: layers, inject, norm, patch and prefix must be left out for a Backbone, "
                f"which has its own; got {told or 'norm=False'}"
            )
        return model
    if not callable(model):
        raise TypeError(f"SRT: model must be callable; got {type(model).__name__}")
    backbone = _found(model, _as_list(layers), norm, patch, prefix)
    backbone.several = not (layers is None or isinstance(layers, (int, str)))
    return backbone


def _found(model: Model, layers: list[Layer], norm: bool, patch: Any, prefix: Any) -> Backbone:
    indices = [layer for layer in layers if isinstance(layer, int)]
    names = [layer for layer in layers if isinstance(layer, str)]
    inner = _inner(model)
    if names:
        if indices:
            raise TypeError(f"SRT: layers must be all indices or all names; got {layers!r}")
        return Hooks(model, names, patch, prefix)
    settings = (indices or [-1], norm, patch, prefix)
    if hasattr(inner, "forward_intermediates") and hasattr(inner, "feature_info"):
        return _Timm(model, *settings)
    if _is_transformers(inner):
        return _Transformers(model, *settings)
    if hasattr(inner, "get_intermediate_layers"):
        return _Dino(model, *settings)
    rule = (
        "for a model that is neither of timm nor of transformers, without get_intermediate_layers"
    )
    if layers:
        raise ValueError(
            f"SRT: layers must be names of modules, with patch, {rule}; got {layers!r}"
        )
    if patch is None:
        raise ValueError(f"SRT: patch must be given {rule}; got None with {type(model).__name__}")
    return _Call(model, patch, prefix)


def _as_list(layers: Layer | Sequence[Layer] | None) -> list[Layer]:
    if layers is None:
        return []
    several = [layers] if isinstance(layers, (int, str)) else layers
    if not isinstance(several, Sequence) or not all(
        isinstance(layer, (int, str)) and not isinstance(layer, bool) for layer in several
    ):
        raise TypeError(f"SRT: layers must be indices or names of modules; got {layers!r}")
    if not several:
        raise ValueError("SRT: layers must name at least one; got none")
    return list(several)


def _indices(layers: list[int], count: int) -> list[int]:
    """From 0, whatever end they were counted from."""
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"SRT: layers must be in {-count} ... {count - 1}; got {layer}")
    return [layer % count for layer in layers]


def _agreed(name: str, given: object, found: Any) -> Any:
    """What the model tells, unless it tells nothing; a setting that contradicts it is a slip."""
    if given is None:
        return found
    told = found
    if name == "prefix":
        check_count("SRT", name, given, 0)
        same = found is None or given == found
        found = given
    else:
        same = check_pair("SRT", name, given) == check_pair("SRT", name, _plain(found))
    if not same:
        raise ValueError(f"SRT: {name} must be that of the model, {told}; got {given}")
    return found


def _plain(pair: Any) -> Any:
    return pair if isinstance(pair, int) else tuple(pair)


def _patch_of(model: Any) -> Any:
    """The patch size that a model tells somewhere."""
    for place in (model, getattr(model, "patch_embed", None), getattr(model, "config", None)):
        patch = getattr(place, "patch_size", None)
        if patch is not None:
            return _plain(patch)
    raise ValueError(
        "SRT: patch must be given where the model does not tell it; "
        f"got None with {type(model).__name__}"
    )


# ---- models of timm -----------------------------------------------------------------------------


# The one that comes with the package: it needs no network.
SMALL = "small"

# Seconds to wait for the hub's answer.
PATIENCE = 3.0


class ModelError(RuntimeError):
    """A model that cannot be had; the message says what to do."""


class PretrainedError(ModelError):
    """Pretrained weights that are not within reach.

    Attributes:
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"the pretrained weights of {name} cannot be had: {reason}. Give a state dict with "
            f"--weights FILE.safetensors, or take --model {SMALL}, which needs no network"
        )
        self.reason = reason


def load_timm(name: str, weights: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A model of timm in eval mode, for pictures of any size if it can, and its data configuration.

    Args:
        name: a model name of timm, with or without its pretrained tag; or ``small``, the ViT that
            comes with this package.
        weights: a .safetensors state dict; None takes the pretrained weights.

    Raises:
        ModelError: unknown model, weights that do not fit, or (PretrainedError) no pretrained
            weights within reach.
    """
    if name == SMALL:
        from .demo.small import load_small

        model, config = load_small()
    else:
        model, config = _made(name, pretrained=weights is None)
    if weights is not None:
        _fill(model, name, weights)
    return model.eval(), config


def _made(name: str, *, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    import timm
    from timm.data.config import resolve_model_data_config

    plain = name.split(".")[0]
    if not timm.is_model(plain):
        first = plain.split("_")[0]
        near = ", ".join((timm.list_models(f"{plain}*") or timm.list_models(f"*{first}*"))[:3])
        hint = f" (for instance {near})" if near else ""
        raise ModelError(f"timm has no model {name!r}{hint}")
    try:
        source = _source(name) if pretrained else {}
        try:
            model = timm.create_model(name, pretrained, dynamic_img_size=True, **source)
        except TypeError:  # it has no such argument
            model = timm.create_model(name, pretrained, **source)
    except PretrainedError:
        raise
    except Exception as error:  # the hub client raises whatever its transport does
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(".")
        if pretrained:
            raise PretrainedError(name, reason) from error
        raise ModelError(f"timm cannot make {name}: {reason}") from error
    return model, resolve_model_data_config(model)


def cached_weights(name: str) -> str | None:
    """The file of timm's pretrained weights in the hub's cache, found without a network."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    file = config.hf_hub_filename or "pytorch_model.bin"
    # In the order in which timm looks for them.
    for choice in (file.replace("pytorch_model.bin", "model.safetensors"), file):
        found = try_to_load_from_cache(repository, choice, revision=revision or None)
        if isinstance(found, str):  # else None, or a mark that the hub has no such file
            return found
    return None


def _source(name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model``: where it is to take the pretrained weights from.

    Left to itself timm asks the hub even for a file that is in the cache, and the hub's client
    tries most of a minute before it says that there is no network. So a cached file is given to
    timm, and for another the hub is asked once whether it answers, whatever it says.

    Raises:
        PretrainedError: it does not.
    """
    import timm
    from huggingface_hub import constants, get_session

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {}  # they are elsewhere, or there are none: timm says so
    file = cached_weights(name)
    if file is not None:
        # A loader of the model's own is for the file of its url, unless it says that of the hub.
        own = str(config.custom_load) == "hf"
        return {"pretrained_cfg_overlay": {"file": file, "custom_load": own}}
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # whatever the transport raises; HF_HUB_OFFLINE is one, too
        raise PretrainedError(
            name,
            f"not in the hub's cache, and {constants.ENDPOINT} does not answer: "
            f"{type(error).__name__}",
        ) from error
    return {}


def _fill(model: Any, name: str, weights: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{weights} is no readable safetensors file: {error}") from error
    wanted = model.state_dict()
    wrong = []
    for key in {**wanted, **state}:
        rule, got = (list(s[key].shape) if key in s else "absent" for s in (wanted, state))
        if rule != got:
            wrong.append(f"{key} must be {rule}, is {got}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(
            f"the weights in {weights} do not fit {name}: {wrong[0]}{more}. "
            "Name the model that they are of with --model"
        )
    model.load_state_dict(state)
