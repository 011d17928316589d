"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is imported. Threads that spin while they wait make small calls ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import srt_ext  # noqa: F401  (registers torch.ops.srt)

# Derandomised, so that a run says the same as the run before it. A fixture holds for all examples
# of a test, which is what `cpu_kernels` is for.
settings.register_profile(
    "srt",
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("srt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """JAX last: it starts threads, after which a process should not be forked, as tests do."""
    items.sort(key=lambda item: "jax" in item.name)


# Beside the checkout, on machines that have it.
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(params=torch.ops.srt._available_cpu_kernels().split(","))
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each instruction set of this machine."""
    torch.ops.srt._force_cpu_kernels(request.param)
    assert torch.ops.srt._cpu_kernels() == request.param
    yield request.param
    torch.ops.srt._force_cpu_kernels("auto")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Loads an output of the published code; skips where there is none."""

    def load(name: str) -> dict[str, torch.Tensor]:
        path = SHARED / "golden" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path} does not exist")
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load
