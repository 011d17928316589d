"""The kernels of the streams of views: the state after chunks of views.

Running... and what Python does with the state are in test_streams.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from backends import Backend, Chunks, Ops, each_gpu
from bounds import EnsembleBounds
from budget import assert_within_rounding
from oracle import ensemble as oracle
from samples import DTYPES, Ensemble, sample_ensembles

SAMPLES = sample_ensembles()
each_sample = pytest.mark.parametrize("case", SAMPLES.values(), ids=SAMPLES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def chunks_of(case: Ensemble, tokens: torch.Tensor) -> Chunks:
    """Of 1, 3 and then 2 views."""
    views = len(case.offsets)
    ends = sorted({0, *(n for n in (1, *range(4, views, 2)) if n < views), views})
    parts = itertools.starmap(slice, itertools.pairwise(ends))
    return [
        (
            replace(case, offsets=case.offsets[p], weights=case.weights and case.weights[p]),
            tokens[p],
        )
        for p in parts
    ]


@lru_cache(32)  # the same for every backend
def expected_of(case: Ensemble, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The oracle's fields, and bounds after a chunk for each view."""
    tokens, joins = case.tokens(dtype), len(case.offsets) - 1
    bounds, (mean, var) = EnsembleBounds(case, tokens), oracle(case, tokens, "moments")
    return {
        "mean": (mean, bounds.stream_mean(joins)),
        "var": (var, bounds.variance(joins)),
        "weight": bounds.stream_weight(joins),
    }


@each_dtype
@pytest.mark.parametrize("reduce", ["mean", "moments"])
@each_sample
def test_mean_and_moments(
    case: Ensemble, reduce: str, dtype: torch.dtype, backend: Backend
) -> None:
    expected = expected_of(case, dtype)
    for place in backend.places:
        fields, weight = backend.stream(chunks_of(case, case.tokens(dtype)), reduce, place=place)
        assert_within_rounding(weight, *expected["weight"])
        counted = weight > 0  # the rest is not written
        for name, field in zip(("mean", "var"), fields, strict=False):
            assert_within_rounding(torch.where(counted, field, 0), *expected[name])


@each_dtype
@each_sample
def test_median(case: Ensemble, dtype: torch.dtype, backend: Backend) -> None:
    """Against the CPU, whose state test_streams.py compares with the oracle."""
    case = case.fit("median")
    chunks = chunks_of(case, case.tokens(dtype))
    expected, count = Ops("cpu").stream(chunks, "median")
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for place in backend.places:
        window, seen = backend.stream(chunks, "median", place=place)
        assert torch.equal(seen, count)
        counted = count > 0
        torch.testing.assert_close(
            window[..., counted], expected[..., counted], rtol=close, atol=close
        )


@pytest.mark.parametrize("reduce", ["mean", "moments"])
@each_gpu
def test_what_the_host_would_refuse_adds_nothing(reduce: str, backend: Backend) -> None:
    """Weights on the device that a stream cannot hold, and offsets that are not finite."""
    case = replace(SAMPLES["one_view"], value_dtype=torch.float64)
    tokens = case.tokens()
    expected = backend.stream([(case, tokens)], reduce, place="device")
    for changes in (
        {"weights": (1e200,)},
        {"weights": (1e-200,)},
        {"weights": (float("nan"),)},
        {"offsets": ((float("nan"), 0.0),)},
    ):
        chunks = [(case, tokens), (replace(case, **changes), tokens)]
        state = backend.stream(chunks, reduce, place="device")
        assert all(map(torch.equal, state, expected))
