"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def run_python(
    *arguments: object, code: int = 0, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Its output, as text. ``code`` must be its exit status; ``env`` is added to this process's."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        **options,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result
