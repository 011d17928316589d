"""``srt-ext info``: versions, available backends, and the reasons why others are missing."""

from __future__ import annotations

import platform
from importlib import import_module

from rich.table import Table
from rich.text import Text

from .. import __version__
from .._library import cuda_unavailable, unavailable
from .common import DEFAULT_MODEL, console

PACKAGES = ("timm", "transformers", "torchvision", "PIL", "safetensors", "sklearn")


def command() -> None:
    """Prints versions, the available backends, and the reasons why others are not available."""
    rows = {
        "srt_ext": __version__,
        "python": f"{platform.python_version()}, {platform.machine()}",
        "torch": _version("torch"),
        "CPU": _cpu(),
        "CUDA": _cuda(),
        "srt_ext.numpy": _numpy(),
        "srt_ext.jax": _jax(),
        **{package: _version(package) for package in PACKAGES},
        "default model": _default_model(),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, Text(value))  # no markup: reasons may contain brackets
    console.print(table)


def _version(package: str) -> str:
    try:
        return str(import_module(package).__version__)
    except Exception as error:  # a broken package may raise anything
        return f"not available: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _cpu() -> str:
    if unavailable is not None:
        return f"not available: {unavailable}"
    from torch import get_num_threads, ops

    kernels = f"{ops.srt._cpu_kernels()} (of {ops.srt._available_cpu_kernels()})"
    return f"{kernels}, {get_num_threads()} threads"


def _cuda() -> str:
    if cuda_unavailable is not None:
        return f"not available: {cuda_unavailable}"
    import torch

    if not torch.cuda.is_available():
        return "kernels loaded, but torch does not find a GPU"
    gpus = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{', '.join(gpus)} (CUDA {torch.version.cuda})"


def _numpy() -> str:
    try:
        from ..numpy import get_num_threads
    except ImportError as error:
        return str(error).removeprefix("srt_ext.numpy is ")
    from .._numpy import available_cpu_kernels, cpu_kernels

    return f"{cpu_kernels()} (of {available_cpu_kernels()}), {get_num_threads()} threads"


def _jax() -> str:
    try:
        import jax

        from .._ffi import platforms

        import_module("srt_ext.jax")
    except ImportError as error:
        return "not available: " + str(error).removeprefix("srt_ext.jax is not available: ")
    return f"jax {jax.__version__}, kernels for {' and '.join(platforms)}"


def _default_model() -> str:
    try:
        from ..hub import cached_weights

        cached = cached_weights(DEFAULT_MODEL) is not None
    except Exception as error:  # as in _version
        return f"{DEFAULT_MODEL}: not available: {type(error).__name__}: {error}"
    return f"{DEFAULT_MODEL}: {'in' if cached else 'not in'} the local cache"
