"""Loads models of timm by name, with weights from the Hugging Face hub, its cache, or a file."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

SMALL = "small"  # the model of srt_ext.demo, which needs no network
HUB_TIMEOUT = 3.0  # seconds
CONFIG = "config.json"
SAFETENSORS = "model.safetensors"  # in a repository of the hub, or a folder
OPEN_CLIP_SAFETENSORS = "open_clip_model.safetensors"  # if that file is missing
NO_PICKLES = (
    "Pickles (.pt, .pth, .bin) can execute any code and are not loaded; save the weights with "
    "safetensors.torch.save_file"
)
SAVE = "timm.models.save_for_hf(model, FOLDER, model_args=ARGUMENTS, safe_serialization=True)"
NO_RGB = "The command reads RGB images; for other images, use srt_ext.SRT in Python"


class ModelError(RuntimeError):
    """A model cannot be loaded. The message states the reason and a remedy."""


class PretrainedError(ModelError):
    """Pretrained weights are not available. ``reason`` states the cause in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"the pretrained weights of {name} are not available: {reason}. Pass a state dict with "
            f"--weights FILE.safetensors, or use --model {SMALL}, which needs no download"
        )
        self.reason = reason


def load_timm(name: str, weights: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """Loads a model of timm in eval mode; for images of any size, if the model supports it.

    Pickles are never loaded.

    Args:
        name: a model of timm, with or without its pretrained tag; ``local-dir:FOLDER`` or
            ``hf-hub:OWNER/NAME``, as in timm; or ``small``, the ViT in this package.
        weights: a .safetensors state dict. None: the pretrained weights.

    Returns:
        The model, and its data configuration with ``mean`` and ``std`` for pixels in 0 .. 1.

    Raises:
        ModelError: the model is unknown, or the weights do not fit the model.
        PretrainedError: the pretrained weights are neither in the cache nor can be downloaded.

    Example:
        >>> model, config = load_timm("small")
        >>> config["mean"]
        (0.5, 0.5, 0.5)
    """
    if name == SMALL:
        from .demo.small import load_small

        model, config = load_small()
    elif (folder := _model_folder(name)) is not None:
        weights = weights or _weights_of(folder)
        model, config = _create(f"local-dir:{folder}", pretrained=False)
        _check_images(folder, config)
    else:
        model, config = _create(name, pretrained=weights is None)
    if weights is not None:
        _load_weights(model, name, weights)
    return model.eval(), config


def _model_folder(name: str) -> Path | None:
    """The folder with config.json and weights, for ``local-dir:`` and ``hf-hub:`` names."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        # Shells do not expand ~ after the colon; Path.expanduser fails for an unknown user.
        folder = Path(os.path.expanduser(place))
        if not folder.is_dir():
            raise ModelError(f"the model folder {folder} does not exist")
        if not (folder / CONFIG).is_file():
            raise ModelError(f"{folder} has no {CONFIG} with the architecture of the model")
        _read_config(folder)
        return folder
    if source not in ("hf-hub", "hf_hub"):
        return None
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = place.partition("@")
    try:
        folder = _fetch(name, repository, revision, CONFIG).parent
        _read_config(folder)
        _fetch_weights(name, repository, revision)
    except HFValidationError as error:
        raise ModelError(f"--model must be hf-hub:OWNER/NAME; got {name!r} ({error})") from error
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json. Raises a ModelError if its architecture is not a model of timm."""
    import timm

    file = folder / CONFIG
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} must be JSON: {error}") from error
    settings: dict[str, Any] = config if isinstance(config, dict) else {}
    name = settings.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ModelError(
            f"the architecture in {file} must be a model of timm; got {name!r}. "
            f"{SAVE} writes such a folder. For a model of another library, use "
            "srt_ext.SRT in Python"
        )
    return settings


def _check_images(folder: Path, config: dict[str, Any]) -> None:
    """Raises a ModelError if the model or its normalisation is not for RGB images."""
    arguments = dict(_read_config(folder).get("model_args") or {})
    channels = arguments.get("in_chans", config["input_size"][0])
    if channels != 3:
        raise ModelError(
            f"the model in {folder} must have in_chans=3; got in_chans={channels}. {NO_RGB}"
        )
    for key in ("mean", "std"):
        value = config[key]
        if not isinstance(value, (list, tuple)) or len(value) not in (1, 3):
            raise ModelError(f"{key} in {folder / CONFIG} must be 3 numbers; got {value!r}")


def _fetch_weights(name: str, repository: str, revision: str) -> None:
    try:
        _fetch(name, repository, revision, SAFETENSORS)
    except PretrainedError:
        with suppress(PretrainedError):
            _fetch(name, repository, revision, OPEN_CLIP_SAFETENSORS)
            return
        raise


def _weights_of(folder: Path) -> Path:
    for file in (folder / SAFETENSORS, *sorted(folder.glob("*.safetensors"))):
        if file.is_file():
            return file
    raise ModelError(f"{folder} has no {SAFETENSORS}. {NO_PICKLES}")


def _create(name: str, *, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    import timm
    from timm.data.config import resolve_model_data_config

    if not name.startswith("local-dir:") and not timm.is_model(name.split(".")[0]):
        raise ModelError(f"timm has no model {name!r}. {_similar(name)}")
    try:
        source = _weight_source(name) if pretrained else {}
        try:
            model = timm.create_model(name, pretrained, dynamic_img_size=True, **source)
        except TypeError:  # the model has no such argument
            model = timm.create_model(name, pretrained, **source)
    except PretrainedError:
        raise
    except Exception as error:  # the client of the hub also raises errors of its transport
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(".")
        if pretrained:
            raise PretrainedError(name, reason) from error
        hint = f". {SAVE} writes a valid folder" if name.startswith("local-dir:") else ""
        raise ModelError(f"timm cannot create {name}: {reason}{hint}") from error
    return model, resolve_model_data_config(model)


def _similar(name: str) -> str:
    """A hint for a name that is not a model of timm."""
    import timm

    if "/" in name:
        return (
            "A model of timm on the hub is hf-hub:OWNER/NAME; for models of other libraries, use "
            "srt_ext.SRT in Python"
        )
    plain = name.split(".")[0]
    near = plain and (
        timm.list_models(f"{plain}*")
        or difflib.get_close_matches(plain, timm.list_models(), cutoff=0.7)
        or timm.list_models(f"*{plain.split('_')[0]}*")
    )
    hint = f"Similar names: {', '.join(near[:3])}. " if near else ""
    return f"{hint}timm.list_models() lists all names"


def cached_weights(name: str) -> Path | None:
    """The pretrained weights of a model of timm in the local cache of the hub, or None."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    return _cached(repository, revision, _file_name(config))


def _file_name(config: Any) -> str:
    """The file name of the weights in a repository of the hub; .safetensors instead of a pickle."""
    file = config.hf_hub_filename or "pytorch_model.bin"
    if file.endswith((".safetensors", ".npz")):
        return str(file)
    safe = file.replace("pytorch_model.bin", SAFETENSORS)
    return str(Path(safe).with_suffix(".safetensors"))


def _cached(repository: str, revision: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision or None)
    # Otherwise None, or a marker for a file that does not exist on the hub.
    return Path(found) if isinstance(found, str) else None


def _fetch(name: str, repository: str, revision: str, file: str) -> Path:
    """Returns a file from the cache of the hub, or downloads it. Raises a PretrainedError.

    The client of the hub sends requests even for cached files, and retries for most of a minute
    without a network. A single request with a short timeout comes first instead.
    """
    import huggingface_hub
    from huggingface_hub import constants

    found = _cached(repository, revision, file)
    if found is not None:
        return found
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # any error of the transport, or HF_HUB_OFFLINE
        reason = f"not in the local cache, and {constants.ENDPOINT} cannot be reached"
        raise PretrainedError(name, f"{reason} ({type(error).__name__})") from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(".")
        raise PretrainedError(name, f"no {file} in {repository} ({reason})") from error


def _weight_source(name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for weights on the hub that are not a pickle.

    Raises a PretrainedError if no such file exists.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        return {}  # timm raises an error
    if not config.hf_hub_id:
        if str(config.url).endswith(".npz"):
            return {}
        raise PretrainedError(name, f"{config.url} is a pickle; pickles are not loaded")
    repository, _, revision = config.hf_hub_id.partition("@")
    file = _fetch(name, repository, revision, _file_name(config))
    # A custom loader is for the file at the model's url, unless it is declared for the hub.
    custom = str(config.custom_load) == "hf"
    return {"pretrained_cfg_overlay": {"file": str(file), "custom_load": custom}}


# ---- weights from a file ------------------------------------------------------------------------


def by_descriptor(file: IO[bytes]) -> str:
    """A path of an open file, for safetensors, which rejects paths that are not UTF-8."""
    return f"/dev/fd/{file.fileno()}"


def check_file(weights: Path) -> None:
    """Raises a ModelError if ``weights`` is not a file."""
    if weights.is_dir():
        raise ModelError(
            f"--weights must be a .safetensors file; got the folder {weights}. Pass the file in "
            f"it, or --model local-dir:{weights} if the folder has a {CONFIG} of timm"
        )
    if not weights.is_file():
        raise ModelError(f"weights must be an existing .safetensors file; got {weights}")


def _load_weights(model: Any, name: str, weights: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(weights)
    try:
        with weights.open("rb") as file:
            state = load_file(by_descriptor(file))
    except OSError as error:
        raise ModelError(f"{weights} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelError(
            f"{weights} is not a readable safetensors file: {error}. {NO_PICKLES}"
        ) from error
    wanted = model.state_dict()
    state = _resampled(model, _without_prefix(state, wanted, weights))
    state = _with_head(model, wanted, state)
    wrong = []
    for key in {**wanted, **state}:
        rule, got = (
            list(s[key].shape) if key in s else other
            for s, other in ((wanted, "absent"), (state, "none"))
        )
        if rule != got:
            wrong.append(f"{key} must be {rule}, got {got}")
        elif wanted[key].is_floating_point() and not state[key].is_floating_point():
            wrong.append(f"{key} must be floating-point, got {state[key].dtype}")
        elif not state[key].to(wanted[key].dtype).isfinite().all():
            wrong.append(f"{key} must be finite, got NaN or infinities")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(
            f"the weights in {weights} do not fit {name}: {wrong[0]}{more}. "
            f"{_remedy(name, wanted, state)}"
        )
    model.load_state_dict(state)


def _remedy(name: str, wanted: dict[str, Any], state: dict[str, Any]) -> str:
    """Advice for weights ``state`` that do not fit the model ``name``."""
    if {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in state.items()}:
        return "Pass weights that are floating-point and finite"
    if any(_PEFT.search(key) for key in state):
        return "They are from a PEFT model: save the state dict of its merge_and_unload()"
    if any(".parametrizations." in key for key in state):
        return "Call torch.nn.utils.parametrize.remove_parametrizations before saving them"
    if any(_other_channels(wanted[key], state[key]) for key in wanted.keys() & state.keys()):
        return NO_RGB
    if name.startswith("local-dir:"):
        return f"model_args in {CONFIG} must be the arguments of timm.create_model"
    return (
        "Select the timm model of these weights with --model; if it was created with arguments, "
        f"save it with {SAVE} and pass --model local-dir:FOLDER"
    )


def _other_channels(ours: Any, theirs: Any) -> bool:
    """Whether both are first convolutions [N, C, H, W], but only ours is for RGB images."""
    if not ours.ndim == theirs.ndim == 4 or ours[:, :1].shape != theirs[:, :1].shape:
        return False
    return bool(ours.shape[1] == 3 != theirs.shape[1])


_PEFT = re.compile(r"(^|\.)base_model\.model\.|\.base_layer\.(weight|bias)$")


def _with_head(model: Any, wanted: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Replaces the classifier of ``state`` by zeros if it has other classes or is missing.

    Features do not depend on it, and zeros are the same in every run.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    begins = tuple(f"{n}." for n in names) or ("head.weight", "head.bias", "fc.weight", "fc.bias")
    ours, theirs = ({k: s[k] for k in s if k.startswith(begins)} for s in (wanted, state))
    if {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}:
        return state
    body = {key: value for key, value in state.items() if key not in theirs}
    return {**body, **{key: value.new_zeros(value.shape) for key, value in ours.items()}}


# Names that wrappers of torch add: DataParallel, compile, checkpoint_wrapper, FSDP.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def _without_prefix(state: dict[str, Any], wanted: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Removes a prefix such as ``module.`` or ``backbone.`` from the names in ``state``.

    Names of wrappers inside of the model are removed, too. Tensors without the prefix belong to a
    larger module: they are ignored, with a warning.
    """
    wrappers = WRAPPERS - {part for key in wanted for part in key.split(".")}
    prefix = _prefix(state, wanted, wrappers, weights)
    if prefix is None:  # another model: the check of names and shapes reports it
        return state
    ours: dict[str, str] = {}  # name in the model -> name in the file
    for key in state:
        if key.startswith(prefix):
            name = _unwrapped(key.removeprefix(prefix).split("."), wrappers)
            if name in ours:
                raise ModelError(
                    f"{weights} must contain the weights of one model; got two tensors for one "
                    f"weight, {ours[name]} and {key}. Save only one of them"
                )
            ours[name] = key
    others = [key for key in state if not key.startswith(prefix)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(
            f"SRT: only the tensors {prefix}* of {weights} are used; ignored: {others[0]}{more}",
            stacklevel=2,
        )
    return {name: state[key] for name, key in ours.items()}


def _prefix(
    state: dict[str, Any], wanted: dict[str, Any], wrappers: set[str], weights: Path
) -> str | None:
    """The prefix with which most of the model's names are in ``state``, or None."""
    prefixes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i, part in enumerate(parts):
            if part not in wrappers and _unwrapped(parts[i:], wrappers) in wanted:
                prefixes["".join(f"{part}." for part in parts[:i])] += 1
    found = [prefix for prefix, count in prefixes.items() if 2 * count > len(wanted)]
    if len(found) > 1:
        raise ModelError(
            f"{weights} must contain the weights of one model; got several, with the prefixes "
            f"{', '.join(map(repr, found))}. Save only one of them"
        )
    return found[0] if found else None


def _unwrapped(parts: list[str], wrappers: set[str]) -> str:
    return ".".join(part for part in parts if part not in wrappers)


def _resampled(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Resamples position embeddings to the image size of the model with timm's function.

    That function also resamples patch embeddings to another patch size. This would change the
    model, so they are not replaced, and the check of the shapes reports them.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        converted = dict(convert(dict(state), model)) if convert else state
    except Exception:  # weights of another model: the check of names and shapes reports it
        return state
    kept = {k for k in converted if k in state and state[k].shape != converted[k].shape}
    return {k: state[k] if k in kept and "pos" not in k else v for k, v in converted.items()}
