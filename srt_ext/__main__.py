"""``srt-ext``, also as ``python -m srt_ext``."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .command import app
    except ImportError as error:
        sys.exit(
            f"srt-ext: the command needs packages that are not installed ({error}): "
            "pip install 'srt_ext[models]'"
        )
    app()


if __name__ == "__main__":
    main()
