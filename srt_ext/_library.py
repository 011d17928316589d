"""Loads the native libraries, and remembers why it could not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MIN_TORCH = (2, 10)


def _load() -> str | None:
    """Registers ``torch.ops.srt``; the reason in words if that is impossible."""
    if find_spec("torch") is None:
        return "torch is not installed: pip install 'srt_ext[torch]'"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch is installed but does not load: {error}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"torch >= 2.10 is required; found {torch.__version__}"
    return _load_library(
        "_C.so",
        "the package was not built, or this is its source folder and hides the installed one. Run "
        "elsewhere, or install it here (pip install -e .)",
    )


def _load_cuda() -> str | None:
    """Adds the CUDA kernels to ``torch.ops.srt``; the reason in words if that is impossible."""
    if unavailable is not None:
        return unavailable
    import torch

    if torch.version.cuda is None:
        return "torch was built without CUDA"
    return _load_library(
        "_C_cuda.so",
        "nvcc was not found when the package was built, or SRT_CUDA=0. Build it again with nvcc on "
        "PATH; SRT_CUDA=1 pip install -v . tells what is missing",
    )


def _load_library(name: str, reason: str) -> str | None:
    import torch

    path = Path(__file__).with_name(name)
    if not path.exists():
        return f"{path} does not exist: {reason}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


# None once torch.ops.srt is registered.
unavailable = _load()
# None once it has CUDA kernels, whether or not there is a GPU.
cuda_unavailable = _load_cuda()
