"""Loads the native library, and remembers why it could not."""

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
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        return (
            f"{path} does not exist: the package was not built. Install it (pip install .), and to "
            "run from the source folder install it there (pip install -e .)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


# None once torch.ops.srt is registered.
unavailable = _load()
