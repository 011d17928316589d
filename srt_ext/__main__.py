"""``srt-ext``, also as ``python -m srt_ext``."""

from __future__ import annotations

import sys
from importlib import import_module
from io import TextIOWrapper


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # for names in another encoding
    try:
        from .cli import app
    except ImportError as error:
        from . import __version__
        from ._library import unavailable

        try:
            import_module("srt_ext.numpy")
            arrays = "srt_ext.numpy is available"
        except ImportError as reason:
            arrays = str(reason)
        sys.exit(
            f"srt-ext: the command needs packages that are not installed ({error}): "
            f"pip install 'srt_ext[models]'\nsrt_ext {__version__}: "
            + (f"no ops: {unavailable}" if unavailable else "torch.ops.srt is available")
            + f"\n{arrays}"
        )
    try:
        app()
    except OSError as error:  # stdout is full
        sys.exit(f"srt-ext: {error}")


if __name__ == "__main__":
    main()
