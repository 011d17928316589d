"""Runs Python in a subprocess, and measures the peak memory of a call there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest


def run_python(
    *arguments: object, code: int = 0, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs Python and asserts its exit status ``code``; ``env`` extends the environment."""
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

# Measures address space: malloc is configured to map large blocks and to return them, so the peak
# is exact. Resident memory is not exact: it depends on the pages of the libraries that are loaded,
# and Linux counts it only approximately on machines with many cores.
PROCESS = """
import torch
torch.set_num_threads(1)  # more threads add stacks; their scratch is not measured

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
    """Returns the peak bytes of ``call`` beyond those in use after ``setup``, and of its result.

    Args:
        setup: statements, after the import of torch. They include a call like the measured one,
            because the first call loads libraries.
        call: an expression whose value is a tensor.
        right: a condition on that tensor, which is named ``result``.
    """
    fixed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    script = PROCESS.format(setup=setup, call=call, right=right)
    taken, size = run_python("-c", script, env=fixed).stdout.split()
    return int(taken), int(size)
