"""Python in a process of its own, and the peak memory of a call there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest


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


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Address space: malloc is configured to map large blocks and to return them, so the peak is exact.
# Resident memory is not: it has those pages of the libraries that happen to be there, and Linux
# counts it only roughly where there are many cores.
PROCESS = """
import torch
torch.set_num_threads(1)  # others bring stacks; their scratch is not measured

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

{setup}
before = status("VmSize")
result = {call}
print(status("VmPeak") - before, result.nbytes)
assert {right}
"""


def peak_of(setup: str, call: str, right: str) -> tuple[int, int]:
    """The bytes that ``call`` took beyond those in use after ``setup``, and those of its result.

    Args:
        setup: statements, torch imported. A call like the one that is measured is among them: the
            first loads what it needs.
        call: an expression, a tensor.
        right: a condition on it, as ``result``.
    """
    fixed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    script = PROCESS.format(setup=setup, call=call, right=right)
    taken, size = run_python("-c", script, env=fixed).stdout.split()
    return int(taken), int(size)
