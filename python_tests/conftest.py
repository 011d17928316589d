"""Shared fixtures, and the selection of the tests that run by default.

``pytest`` skips tests marked ``slow`` and runs a few cases of each test marked ``interp``.
``pytest -m ""`` runs all tests, with more examples of hypothesis. Tests marked ``cuda`` need a GPU.
"""

from __future__ import annotations

import gc
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is imported. Threads that spin while they wait make small calls ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when JAX is imported. Tests of JAX compare with the ops on the CPU, so they run there unless
# they name a GPU.
os.environ.setdefault("JAX_DEFAULT_DEVICE", "cpu")
# Otherwise JAX allocates most of the memory of a GPU at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import backends
import pytest
import torch
from hypothesis import HealthCheck, settings

import srt_ext  # noqa: F401  (registers torch.ops.srt)

# Derandomised, so that runs are reproducible. Function-scoped fixtures such as `backend` are
# meant to hold for all examples of a test.
for profile, examples in (("fast", 15), ("full", 60)):
    settings.register_profile(
        profile,
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )

INTERP_CASES = 6  # of each test, by default


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("fast" if "not slow" in config.option.markexpr else "full")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects the slow tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # JAX last: it starts threads, and other tests fork, which is not safe after that.
    items.sort(key=lambda item: "jax" in item.nodeid)
    interp = defaultdict(list)
    for item in items:
        if item.get_closest_marker("interp") and not item.get_closest_marker("slow"):
            interp[item.nodeid.split("[")[0]].append(item)
    for cases in interp.values():
        rest = max(0, len(cases) - INTERP_CASES)
        for item in random.Random(0).sample(cases, rest):
            item.add_marker("slow")
    if not torch.cuda.is_available() and not config.option.collectonly:
        cuda = [item for item in items if item.get_closest_marker("cuda")]
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=cuda)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Modules, items and models live long: the garbage collector would scan them again and again.
    gc.freeze()
    gc.set_threshold(10_000)
    if session.config.option.collectonly:
        return
    if any(item.get_closest_marker("interp") for item in session.items):
        backends.compile_in_background()


# Evaluation data: not in the repository, next to the clone on machines that have it.
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(params=backends.ALL)
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Runs a test once with each backend (backends.py)."""
    with backends.opened(request.param) as kernels:
        yield kernels


@pytest.fixture(params=backends.CPU)
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each instruction set that this machine supports."""
    with backends.opened(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
