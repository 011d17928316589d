"""A part of the fuzzer of research/robustness: hostile calls of every op and binding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("srt_ext.numpy")
calls = pytest.importorskip("research.robustness.calls")
hostile = pytest.importorskip("research.robustness.hostile")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Restores the settings that the fuzzer changes."""
    yield
    torch.ops.srt._force_cpu_kernels("auto")
    calls._numpy.force_cpu_kernels("auto")


@pytest.mark.filterwarnings("ignore")  # warnings of torch about prototype and deprecated tensors
@pytest.mark.parametrize("target", ["torch", "numpy", "dlpack"])
def test_hostile_calls(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without calls that only a limit of memory ends, and without JAX."""
    monkeypatch.setattr(hostile, "to_jax", lambda value: value)
    kinds: Counter[str] = Counter()
    for index in range(120):
        case = hostile.make(0, index, calls.TARGETS[target])
        if not case.large:
            kinds[calls.check(case)] += 1
    assert kinds["compared"] > 20
    assert kinds["refused"] > 20


def test_a_case_depends_only_on_its_number() -> None:
    hostile.make(0, 1)
    assert hostile.make(3, 7).describe() == hostile.make(3, 7).describe()


@pytest.mark.parametrize("wrong", ["value", "memory", "error"])
def test_the_fuzzer_detects_faults(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    case = hostile.ensemble_case(rng, "out" if wrong == "memory" else "ensemble", "python")
    case.memory = [
        hostile.storage_of(v) for v in case.given.values() if isinstance(v, torch.Tensor)
    ]
    assert calls.check(case) == "compared"
    made = calls.call(case).clone()

    def faulty(case: hostile.Case) -> torch.Tensor:
        if wrong == "error":
            raise RuntimeError("INTERNAL ASSERT FAILED")
        if wrong == "memory":
            case.given["tokens"] += 1
            return case.given["out"]
        return made * 1.001

    monkeypatch.setattr(calls, "call", faulty)
    with pytest.raises(AssertionError):
        calls.check(case)
