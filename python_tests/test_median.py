"""Median and moments on the CPU: against the oracle, torch.median and the published code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bounds import EnsembleBounds
from budget import assert_within_budget, assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from peak import needs_proc, peak_of
from samples import DTYPES, Ensemble, ensembles, sample_ensembles
from test_ensemble import buffer, poison

import srt_ext
from srt_ext import reference

SAMPLES = sample_ensembles()
each_sample = pytest.mark.parametrize("case", SAMPLES.values(), ids=SAMPLES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def median(case: Ensemble, tokens: torch.Tensor) -> torch.Tensor:
    args, modes = replace(case, weights=None).call(tokens)
    return srt_ext.ensemble(*args, reduce="median", **modes)


def median_oracle(
    case: Ensemble, tokens: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    args, modes = replace(case, weights=None).call(tokens)
    return reference.ensemble(*args, reduce="median", **modes, dtype=dtype)


def check_median(case: Ensemble, tokens: torch.Tensor) -> torch.Tensor:
    case = replace(case, weights=None)
    field = median(case, tokens)
    bound = EnsembleBounds(case, tokens).median()
    assert_within_rounding(field, median_oracle(case, tokens), bound)
    return field


@each_dtype
@each_sample
def test_median(case: Ensemble, dtype: torch.dtype, cpu_kernels: str) -> None:
    tokens = case.tokens(dtype)
    field = check_median(case, tokens)
    if dtype != torch.float64:
        same = median_oracle(case, tokens, torch.float32).to(dtype)
        assert_within_budget(field, median_oracle(case, tokens), same)


@given(ensembles(), st.sampled_from(DTYPES))
def test_median_of_any_call(cpu_kernels: str, case: Ensemble, dtype: torch.dtype) -> None:
    check_median(case, case.tokens(dtype))


def test_golden(golden: Callable[[str], dict[str, torch.Tensor]], cpu_kernels: str) -> None:
    file = golden("median_p16_r6")
    grid, patch = file["grid"].tolist(), file["patch"].tolist()
    field = srt_ext.ensemble(
        file["tokens"],
        file["offsets"],
        grid,
        patch,
        reduce="median",
        upsample="nearest",
        border="zeros",
    )
    assert torch.equal(field[0].permute(1, 2, 0), file["output"])


# Every network, the numbers beside its size, and the counting beyond the largest.
COUNTS = (1, 2, 3, 4, 5, 9, 10, 16, 17, 25, 26, 36, 37, 49, 50, 51, 63, 64, 65, 121, 225, 1000)


@each_dtype
@pytest.mark.parametrize("border", ["zeros", "clamp"])
@pytest.mark.parametrize("views", COUNTS)
def test_bits_of_torch_median(
    views: int, border: str, dtype: torch.dtype, cpu_kernels: str
) -> None:
    generator = torch.Generator().manual_seed(views)
    offsets = torch.randint(-5, 6, (views, 2), generator=generator).float()
    tokens = torch.randn(views, 1, 6, 5, generator=generator).to(dtype)
    tokens[:, :, :, 1] = tokens[:, :, :, 1].round()  # many ties
    tokens[:, :, :, 2] *= torch.finfo(dtype).smallest_normal  # and subnormal numbers
    args: tuple[object, ...] = ((2, 3), (4, 4))
    modes = {"upsample": "nearest", "border": border}
    maps = [
        srt_ext.ensemble(tokens[v : v + 1], offsets[v : v + 1], *args, **modes)
        for v in range(views)
    ]
    field = srt_ext.ensemble(tokens, offsets, *args, reduce="median", **modes)
    assert torch.equal(field, torch.stack(maps).median(0).values)


@pytest.mark.parametrize("views", [2, 9, 49, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_infinities_and_nan(views: int, dtype: torch.dtype, cpu_kernels: str) -> None:
    """As torch.median: infinities are ordinary values, a NaN wins."""
    generator = torch.Generator().manual_seed(views)
    tokens = torch.randn(views, 1, 1, 400, generator=generator).to(dtype)
    share = torch.rand(tokens.shape, generator=generator)
    tokens[share < 0.4] = float("inf")
    tokens[share < 0.2] = -float("inf")
    tokens[:, :, :, 200:300][share[:, :, :, 200:300] < 0.8] = float("inf")
    tokens[:, :, :, 300:][share[:, :, :, 300:] < 0.8] = -float("inf")
    tokens[:, :, :, :40][share[:, :, :, :40] > 1 - 1 / views] = float("nan")
    field = srt_ext.ensemble(tokens, torch.zeros(views, 2), (1, 1), (2, 2), reduce="median")
    expected = tokens[:, 0, 0].median(0).values
    assert expected.isnan().any()
    assert expected.isinf().any()
    for pixel in field[0].flatten(1).T:
        assert torch.equal(pixel.nan_to_num(7e4), expected.nan_to_num(7e4))


@given(ensembles(), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_containment(cpu_kernels: str, case: Ensemble, dtype: torch.dtype, seed: int) -> None:
    tokens = poison(case.tokens(dtype), seed)
    actual, expected = median(case, tokens), median_oracle(case, tokens)
    assert torch.equal(actual.isnan(), expected.isnan())
    # An infinite value that is not the median leaves no trace.
    assert torch.equal(actual.isinf(), expected.isinf())


def test_views_that_do_not_cover_do_not_vote(cpu_kernels: str) -> None:
    """Spelled out, without the oracle: two of three views cover the left half of 4 pixels."""
    tokens = torch.tensor([1.0, 5.0, 3.0]).reshape(3, 1, 1, 1)
    offsets = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    args = (tokens, offsets, (1, 1), (1, 4))
    field = srt_ext.ensemble(*args, reduce="median")
    assert field.flatten().tolist() == [1.0, 1.0, 1.0, 1.0]  # of (1, 5) and of (1, 3): the lower
    field = srt_ext.ensemble(*args, reduce="median", border="zeros")
    assert field.flatten().tolist() == [1.0, 1.0, 1.0, 1.0]  # of (0, 1, 5) and of (0, 1, 3)
    field = srt_ext.ensemble(*args, reduce="median", border="clamp")
    assert field.flatten().tolist() == [3.0] * 4
    far = torch.full((3, 2), 10.0)
    assert not srt_ext.ensemble(tokens, far, (1, 1), (1, 4), reduce="median").any()


@each_dtype
@pytest.mark.parametrize("name", ["grid", "stride", "nearest", "wide"])
def test_out(name: str, dtype: torch.dtype, cpu_kernels: str) -> None:
    case = replace(SAMPLES[name], weights=None)
    tokens = case.tokens(dtype)
    field = median(case, tokens)
    args, modes = case.call(tokens)
    for layout in ("contiguous", "channels_last", "padded", "steps"):
        whole, out = buffer(case.shape, dtype, layout)
        expected_whole, expected_out = buffer(case.shape, dtype, layout)
        expected_out.copy_(field)
        assert srt_ext.ensemble(*args, **modes, reduce="median", out=out) is out
        assert torch.equal(whole, expected_whole), layout


@each_dtype
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_same_bits_over_threads(
    upsample: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    case = Ensemble((7, 9), (8, 8), channels=133, upsample=upsample)
    tokens = case.tokens(dtype)
    args, modes = case.call(tokens)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append([median(case, tokens), *srt_ext.ensemble_moments(*args, **modes)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MEMORY = """
import srt_ext

def field(tokens):
    offsets = srt_ext.views.grid(7)[: len(tokens)]
    modes = dict(reduce="median", upsample="{upsample}")
    return srt_ext.ensemble(tokens, offsets, (14, 14), (16, 16), **modes)

field(torch.ones(2, 1, 196, 8))
tokens = torch.randn({views}, 1, 196, 64)
"""


@needs_proc
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("views", [49, 225])
def test_no_stack_of_maps_is_made(views: int, upsample: str) -> None:
    """Beside the tokens it takes its output, and cache-sized scratch, not a map for every view."""
    setup = MEMORY.format(views=views, upsample=upsample)
    taken, output = peak_of(setup, "field(tokens)", "result.isfinite().all()")
    assert output <= taken < 1.25 * output


# ---- moments ------------------------------------------------------------------------------------


def check_moments(case: Ensemble, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    args, modes = case.call(tokens)
    mean, var = srt_ext.ensemble_moments(*args, **modes)
    true_mean, true_var = reference.ensemble_moments(*args, **modes)
    bounds = EnsembleBounds(case, tokens)
    assert_within_rounding(mean, true_mean, bounds.mean())
    assert_within_rounding(var, true_var, bounds.variance())
    return mean, var


@each_dtype
@each_sample
def test_moments(case: Ensemble, dtype: torch.dtype, cpu_kernels: str) -> None:
    case = replace(case, batch=16)  # or the largest error of the oracle is one of a few
    tokens = case.tokens(dtype)
    results = check_moments(case, tokens)
    if dtype == torch.float64:
        return
    args, modes = case.call(tokens)
    truths = reference.ensemble_moments(*args, **modes)
    same = reference.ensemble_moments(*args, **modes, dtype=torch.float32)
    for result, truth, close in zip(results, truths, same, strict=True):
        assert_within_budget(result, truth, close.to(dtype))


@given(ensembles(), st.sampled_from(DTYPES))
def test_moments_of_any_call(cpu_kernels: str, case: Ensemble, dtype: torch.dtype) -> None:
    check_moments(case, case.tokens(dtype))


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.5, 1e-3, 7.0)])
def test_variance_beside_a_large_mean(weights: tuple[float, ...] | None, cpu_kernels: str) -> None:
    """The mean is 1e4 times the spread, in float32: E[x^2] - E[x]^2 would leave nothing."""
    case = replace(SAMPLES["real"], weights=weights, upsample="nearest")
    tokens = 1e4 + case.tokens(torch.float32)
    args, modes = case.call(tokens)
    mean, var = srt_ext.ensemble_moments(*args, **modes)
    true_mean, true_var = reference.ensemble_moments(*args, **modes)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=0)
    # The tokens themselves are exact; what is left are roundings of a mean of 1e4, 6e-4 each.
    assert ((var - true_var).abs() <= 1e-4 * true_var + 1e-5).all()


def test_one_view_has_no_variance(cpu_kernels: str) -> None:
    case = SAMPLES["one_view"]
    args, modes = case.call(case.tokens())
    _, var = srt_ext.ensemble_moments(*args, **modes)
    assert torch.equal(var, torch.zeros(case.shape))
