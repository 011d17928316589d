"""The ``srt-ext`` command, also run as ``python -m srt_ext``."""

from __future__ import annotations

import errno
import io
import os
import sys
from importlib import import_module
from typing import Any


class _Output(io.FileIO):
    """stdout or stderr. A failed write does not stop the command; ``error`` keeps the first one."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def open_outputs() -> dict[str, _Output]:
    """Replaces stdout and stderr where they are files; escapes characters they cannot encode."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed descriptor: the next file opened would become stdin, stdout or stderr
    os.close(handle)
    outputs = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            output = _Output(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError):  # closed, or replaced
            continue
        outputs[name] = output
        text = io.TextIOWrapper(
            io.BufferedWriter(output), stream.encoding, "backslashreplace", line_buffering=True
        )
        setattr(sys, name, text)
    return outputs


def main() -> None:
    outputs = open_outputs()
    try:
        from .cli import app
    except ImportError as error:
        from . import __version__
        from ._library import unavailable

        others = []
        for name in ("srt_ext.numpy", "srt_ext.jax"):
            try:
                import_module(name)
                others.append(f"{name} is available")
            except ImportError as reason:
                others.append(f"{reason}".replace("No module named", f"{name}: no module named"))
        sys.exit(
            f"srt-ext: the command needs packages that are not installed ({error}). Run "
            f"pip install 'srt_ext[models]'\nsrt_ext {__version__}: "
            + (f"no torch ops: {unavailable}" if unavailable else "torch.ops.srt is available")
            + "".join(f"\n{line}" for line in others)
        )
    try:
        app()
    except SystemExit:
        for name, output in outputs.items():
            getattr(sys, name).flush()
            if output.error is not None and output.error.errno != errno.EPIPE:
                sys.exit(f"srt-ext: {name} cannot be written: {output.error.strerror}")
        raise


if __name__ == "__main__":
    main()
