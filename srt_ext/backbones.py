"""What SRT has to know of a model: how to get its tokens, and which of them are patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._rules import check_count
from .checks import check_pair


@dataclass(frozen=True)
class Backbone:
    """A frozen model as SRT sees it."""

    # images [B, 3, H, W] -> tokens [B, prefix + h * w, C], patch tokens last, in row order
    tokens: Callable[[torch.Tensor], torch.Tensor]
    patch: tuple[int, int]  # (Ph, Pw), pixels per token
    prefix: int  # class and register tokens in front


def describe(
    model: Callable[[torch.Tensor], torch.Tensor],
    patch: int | tuple[int, int] | None = None,
    prefix: int | None = None,
) -> Backbone:
    """Reads patch size and prefix tokens from a timm ViT; of any other callable they are given.

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: the patch size is neither given nor found.
    """
    if not callable(model):
        raise TypeError(f"SRT: model must be callable; got {type(model).__name__}")
    tokens = model
    embed = getattr(model, "patch_embed", None)
    if hasattr(model, "num_prefix_tokens") and hasattr(embed, "patch_size"):  # a ViT of timm
        tokens = model.forward_features  # type: ignore[attr-defined]
        patch = embed.patch_size if patch is None else patch  # type: ignore[union-attr]
        prefix = model.num_prefix_tokens if prefix is None else prefix
    if patch is None:
        raise ValueError(
            "SRT: patch must be given for a model that is no timm ViT; "
            f"got None with {type(model).__name__}"
        )
    prefix = 0 if prefix is None else check_count("SRT", "prefix", prefix, 0)
    return Backbone(tokens, check_pair("SRT", "patch", patch), prefix)


class ModelError(RuntimeError):
    """A model that cannot be had; the message says what to do."""


def load_timm(name: str, weights: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A ViT of timm that takes any picture size, in eval mode, and its data configuration.

    Args:
        name: a model name of timm, with or without its pretrained tag.
        weights: a .safetensors state dict; None takes timm's pretrained weights.

    Raises:
        ModelError: unknown model, weights that do not fit, or no pretrained weights within reach.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3])
        hint = f" (for instance {near})" if near else ""
        raise ModelError(f"timm has no model {name!r}{hint}")
    try:
        model = timm.create_model(name, pretrained=weights is None, dynamic_img_size=True)
    except TypeError as error:
        raise ModelError(f"{name} is no ViT that takes any picture size: {error}") from error
    except Exception as error:  # the hub client raises whatever its transport does
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(".")
        if weights is not None:
            raise ModelError(f"timm cannot make {name}: {reason}") from error
        raise ModelError(
            f"the pretrained weights of {name} could not be loaded: {reason}. "
            "Give a state dict with --weights FILE.safetensors"
        ) from error
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{weights} is no readable safetensors file: {error}") from error
        except RuntimeError as error:
            raise ModelError(f"the weights in {weights} do not fit {name}: {error}") from error
    return model.eval(), resolve_model_data_config(model)
