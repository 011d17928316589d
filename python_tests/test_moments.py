"""Mean and variance of one call: against the oracle, and beside large or infinite values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from backends import Backend, Ops
from hypothesis import given
from hypothesis import strategies as st
from oracle import check_ensemble, check_sample, large_enough
from oracle import ensemble as oracle
from samples import DTYPES, Ensemble, ensembles, poison, sample_ensembles

SAMPLES = sample_ensembles()
each_sample = pytest.mark.parametrize("case", SAMPLES.values(), ids=SAMPLES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@each_sample
def test_error_budget(case: Ensemble, dtype: torch.dtype, backend: Backend) -> None:
    case = large_enough(case, dtype, 304)
    for place in backend.places:
        fields = backend.ensemble(case, case.tokens(dtype), reduce="moments", place=place)
        check_sample(case, dtype, fields, "moments")


@given(ensembles(), st.sampled_from(DTYPES))
def test_rounding_of_any_call(backend: Backend, case: Ensemble, dtype: torch.dtype) -> None:
    case = replace(case, channels=min(case.channels, 40))
    tokens = case.tokens(dtype)
    check_ensemble(case, tokens, backend.ensemble(case, tokens, reduce="moments"), "moments")


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.5, 1e-3, 7.0)])
def test_variance_beside_a_large_mean(weights: tuple[float, ...] | None, backend: Backend) -> None:
    """The mean is 1e4 times the spread, in float32: E[x^2] - E[x]^2 would leave nothing."""
    case = replace(SAMPLES["real"], weights=weights, upsample="nearest")
    tokens = 1e4 + case.tokens()
    mean, var = backend.ensemble(case, tokens, reduce="moments")
    true_mean, true_var = oracle(case, tokens, "moments")
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=0)
    # The tokens themselves are exact; what is left are roundings of a mean of 1e4, 6e-4 each.
    assert ((var - true_var).abs() <= 1e-4 * true_var + 1e-5).all()


def test_one_view_has_no_variance(backend: Backend) -> None:
    case = SAMPLES["one_view"]
    _, var = backend.ensemble(case, case.tokens(), reduce="moments")
    assert torch.equal(var, torch.zeros(case.shape))


@lru_cache(32)  # the same for every backend
def poisoned(case: Ensemble, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = poison(case.tokens(dtype), 1)
    return tokens, oracle(case, tokens, "moments")


@each_dtype
@each_sample
def test_containment(case: Ensemble, dtype: torch.dtype, backend: Backend) -> None:
    tokens, expected = poisoned(case, dtype)
    fields = backend.ensemble(case, tokens, reduce="moments")
    assert torch.equal(fields.isfinite(), expected.isfinite())
    assert torch.equal(fields[0].isinf(), expected[0].isinf())


@each_dtype
def test_same_bits_over_threads(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case = Ensemble((7, 9), (8, 8), channels=133)
    fields = []
    for count in (1, 2, 3, 7):
        threads(count)
        fields.append(Ops("cpu").ensemble(case, case.tokens(dtype), reduce="moments"))
    assert all(torch.equal(fields[0], field) for field in fields[1:])
