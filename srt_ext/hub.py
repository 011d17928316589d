"""Models of timm by name, with weights from the hub, from its cache or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = "small"  # the model of srt_ext.demo, which needs no network
HUB_TIMEOUT = 3.0  # seconds


class ModelError(RuntimeError):
    """A model that cannot be loaded; the message says what to do."""


class PretrainedError(ModelError):
    """Pretrained weights that are not available; ``reason`` says why, in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"the pretrained weights of {name} cannot be had: {reason}. Give a state dict with "
            f"--weights FILE.safetensors, or take --model {SMALL}, which needs no network"
        )
        self.reason = reason


def load_timm(name: str, weights: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A model of timm in eval mode, for any image size if it can, and its data configuration.

    ``name`` is one of timm's, with or without its pretrained tag, or ``small``, the ViT that comes
    with this package; ``weights`` a .safetensors state dict, or None for the pretrained weights.
    Raises a ModelError for an unknown model, weights that do not fit, or (PretrainedError) no
    pretrained weights within reach.
    """
    if name == SMALL:
        from .demo.small import load_small

        model, config = load_small()
    else:
        model, config = _create(name, pretrained=weights is None)
    if weights is not None:
        _load_weights(model, name, weights)
    return model.eval(), config


def _create(name: str, *, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    import timm
    from timm.data.config import resolve_model_data_config

    plain = name.split(".")[0]
    if not timm.is_model(plain):
        first = plain.split("_")[0]
        near = ", ".join((timm.list_models(f"{plain}*") or timm.list_models(f"*{first}*"))[:3])
        hint = f" (for instance {near})" if near else ""
        raise ModelError(f"timm has no model {name!r}{hint}")
    try:
        source = _weight_source(name) if pretrained else {}
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
    """The file of timm's pretrained weights in the hub's cache. Uses no network."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    file = config.hf_hub_filename or "pytorch_model.bin"
    # In the order in which timm looks for them.
    choices = (file.replace("pytorch_model.bin", "model.safetensors"), file)
    found = [try_to_load_from_cache(repository, c, revision=revision or None) for c in choices]
    # Not None, nor the mark of a file that the hub does not have.
    return next((path for path in found if isinstance(path, str)), None)


def _weight_source(name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for a cached file, without which the hub must answer.

    timm asks the hub even for cached files, and the hub's client retries for most of a minute when
    there is no network. A single request with a short timeout replaces that; a PretrainedError if
    the file is not cached, and the hub does not answer.
    """
    import timm
    from huggingface_hub import constants, get_session

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {}  # timm looks elsewhere, or reports that there are none
    file = cached_weights(name)
    if file is not None:
        # A custom loader reads the file of the model's url, unless it is declared for the hub's.
        custom = str(config.custom_load) == "hf"
        return {"pretrained_cfg_overlay": {"file": file, "custom_load": custom}}
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever the transport raises, and HF_HUB_OFFLINE
        reason = f"not in the hub's cache, and {constants.ENDPOINT} does not answer"
        raise PretrainedError(name, f"{reason}: {type(error).__name__}") from error
    return {}


def _load_weights(model: Any, name: str, weights: Path) -> None:
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
