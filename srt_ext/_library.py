"""Loads the native libraries and keeps the reason if one cannot be loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MIN_TORCH = (2, 10)


def _load() -> str | None:
    """Registers ``torch.ops.srt``. Returns the reason if that fails, otherwise None."""
    if find_spec("torch") is None:
        return "torch is not installed. Run pip install 'srt_ext[torch]'"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch is installed but cannot be imported: {error}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"torch >= 2.10 is required; found {torch.__version__}"
    return _load_library(
        "_C.so",
        "Python imported the sources of srt_ext, which contain no compiled library, instead of the "
        "installed package. Start Python in another folder, or run pip install -e . in the clone",
    )


def _load_cuda() -> str | None:
    """Registers the CUDA kernels. Returns the reason if that fails, otherwise None."""
    if unavailable is not None:
        return unavailable
    import torch

    if torch.version.cuda is None:
        return "torch was built without CUDA"
    return _load_library(
        "_C_cuda.so",
        "srt_ext was built without nvcc or with SRT_CUDA=0. Rebuild it with nvcc on PATH; "
        "SRT_CUDA=1 pip install -v . stops with an error that names the missing part",
    )


def _load_library(name: str, reason: str) -> str | None:
    import torch

    path = Path(__file__).with_name(name)
    if not path.exists():
        return f"{path} does not exist. {reason}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    return None


# None once torch.ops.srt is registered.
unavailable = _load()
# None once the CUDA kernels are registered, even on a machine without a GPU.
cuda_unavailable = _load_cuda()
