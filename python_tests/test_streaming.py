"""Streams of views on the CPU: any chunks, merges, interruptions, processes; bytes of state."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from bounds import EnsembleBounds
from budget import assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, Ensemble, ensembles, sample_ensembles

import srt_ext
from srt_ext import RunningMean, RunningMedian, RunningMoments, reference, views

SAMPLES = sample_ensembles()
KINDS = (RunningMean, RunningMoments, RunningMedian)
Kind = type[RunningMean] | type[RunningMedian]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def new(kind: Kind, case: Ensemble) -> Any:
    modes = {"upsample": case.upsample, "border": case.border, "stride": case.stride}
    return kind(case.grid, case.patch, **modes)


def feed(running: Any, case: Ensemble, tokens: torch.Tensor, chunks: Iterable[int]) -> Any:
    """Adds the views in chunks of these sizes; the last one again and again."""
    (_, offsets, _, _, weights), _ = case.call(tokens)
    sizes, begin, size = iter(chunks), 0, 1
    while begin < len(offsets):
        size = next(sizes, size)
        part = slice(begin, begin + size)
        chunk = [tokens[part], offsets[part]]
        if weights is not None and not isinstance(running, RunningMedian):
            chunk.append(weights[part])
        running.update(*chunk)
        begin += size
    return running


def tensors(running: Any) -> list[torch.Tensor]:
    return list(running._state.values())


def results(running: Any) -> list[torch.Tensor]:
    return [field.clone() for field in running._fields()]


# ---- mean and moments ---------------------------------------------------------------------------


def check(case: Ensemble, dtype: torch.dtype, chunks: list[int]) -> None:
    """Against the oracle, by the roundings of the sums and of the joins of the chunks."""
    tokens = case.tokens(dtype)
    for kind in (RunningMean, RunningMoments):
        running = feed(new(kind, case), case, tokens, chunks)
        assert running.views == len(case.offsets)
        assert running.result().dtype == dtype
        joins = len(case.offsets) - 1
        assert_near_the_oracle(running._state, case, tokens, joins)


def assert_near_the_oracle(
    state: dict[str, torch.Tensor], case: Ensemble, tokens: torch.Tensor, joins: int
) -> None:
    """``joins``: of chunks and states, at most."""
    args, modes = case.call(tokens)
    mean, var = reference.ensemble_moments(*args, **modes)
    bounds = EnsembleBounds(case, tokens)
    assert state["mean"].dtype == torch.promote_types(tokens.dtype, torch.float32)
    assert_within_rounding(state["mean"], mean, bounds.stream_mean(joins))
    assert_within_rounding(state["weight"], *bounds.stream_weight(joins))
    if "var" in state:
        assert_within_rounding(state["var"], var, bounds.variance(joins))


@each_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_chunks_equal_one_call(name: str, dtype: torch.dtype, cpu_kernels: str) -> None:
    check(SAMPLES[name], dtype, [2, 1, 3])


@given(ensembles(), st.sampled_from(DTYPES), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_any_chunks_of_any_call(
    cpu_kernels: str, case: Ensemble, dtype: torch.dtype, chunks: list[int]
) -> None:
    check(case, dtype, chunks)


def test_result_is_that_of_the_op() -> None:
    case = SAMPLES["weights"]
    tokens = case.tokens()
    args, modes = case.call(tokens)
    mean = feed(new(RunningMean, case), case, tokens, [5]).result()
    torch.testing.assert_close(mean, srt_ext.ensemble(*args, **modes))
    running = feed(new(RunningMoments, case), case, tokens, [5])
    expected = srt_ext.ensemble_moments(*args, **modes)
    torch.testing.assert_close((running.result(), running.variance()), expected)


def test_variance_beside_a_large_mean() -> None:
    case = replace(SAMPLES["grid"], upsample="nearest")
    tokens = 1e4 + case.tokens()
    args, modes = case.call(tokens)
    true_var = reference.ensemble_moments(*args, **modes)[1]
    for chunks in ([1], [4], [9]):
        var = feed(new(RunningMoments, case), case, tokens, chunks).variance()
        # The mean of the state is rounded to float32, 6e-4 here, and the spread is taken from it.
        rounding = 4 * torch.finfo(torch.float32).eps * 1e4
        assert ((var - true_var).abs() <= rounding * (1 + true_var.sqrt())).all()


def test_weights_of_chunks_count_against_each_other(cpu_kernels: str) -> None:
    """Spelled out: 1 and 4 with the weights 1e9 and 3e9, each alone in its chunk."""
    for kind in (RunningMean, RunningMoments):
        running = kind((1, 1), (1, 1))
        for value, weight in ((1.0, 1e9), (4.0, 3e9)):
            running.update(
                torch.full((1, 1, 1, 1), value), torch.zeros(1, 2), torch.tensor([weight])
            )
        assert running.result().item() == 3.25
    assert running.variance().item() == 0.25 * 2.25**2 + 0.75 * 0.75**2


@pytest.mark.parametrize("kind", [RunningMean, RunningMoments])
def test_a_stream_merged_with_itself_stays_what_it_is(kind: Kind) -> None:
    case = SAMPLES["real"]
    running = feed(new(kind, case), case, case.tokens(), [2])
    before = results(running)
    running.merge(running)
    torch.testing.assert_close(results(running), before)
    assert running.views == 10


@pytest.mark.parametrize("border", ["coverage", "zeros"])
def test_a_merge_takes_shares_before_squares(border: str) -> None:
    """Where the square of a distance overflows: beside a share of 0, and beside a small one."""
    large, small = 1e30, 2.0**-100

    def one(value: float, dx: float, weight: float = 1.0) -> RunningMoments:
        running = RunningMoments((1, 1), (1, 2), border=border)
        tokens, offsets = torch.full((1, 1, 1, 1), value), torch.tensor([[0.0, dx]])
        running.update(tokens, offsets, torch.tensor([weight]))
        return running

    # Under coverage each of the two pixels is seen by one view alone.
    left, right = one(large, 1.0), one(-large, -1.0)
    left.merge(right)
    expected = [large, -large] if border == "coverage" else [large / 2, -large / 2]
    assert left.result().flatten().tolist() == pytest.approx(expected, rel=1e-6)
    spread = 0.0 if border == "coverage" else float("inf")
    assert left.variance().flatten().tolist() == [spread, spread]

    for first, second in ((1.0, small), (small, 1.0)):
        running = one(0.0, 0.0, first)
        running.merge(one(large, 0.0, second))
        assert running.variance().flatten().tolist() == pytest.approx([small * large**2] * 2)


def test_infinite_means_stay_infinite(cpu_kernels: str) -> None:
    """As in one call; the variance of an infinite value is NaN."""
    tokens = torch.tensor([1.0, float("inf"), 2.0, 3.0]).reshape(4, 1, 1, 1)
    place = (torch.zeros(4, 2), (1, 1), (1, 1))
    one, var = srt_ext.ensemble_moments(tokens, *place)
    assert one.item() == float("inf")
    assert var.isnan().item()
    for chunk in (1, 2, 3):
        running = RunningMoments((1, 1), (1, 1))
        for begin in range(0, 4, chunk):
            part = tokens[begin : begin + chunk]
            running.update(part, torch.zeros(len(part), 2))
        assert running.result().item() == float("inf")
        assert running.variance().isnan().item()


def test_an_infinite_value_of_no_weight_changes_nothing(cpu_kernels: str) -> None:
    running = RunningMean((1, 1), (4, 4))
    for value, weight in ((1.0, 2.0**400), (float("inf"), 2.0**-400)):
        weights = torch.tensor([weight], dtype=torch.float64)
        running.update(torch.full((1, 1, 1, 1), value), torch.zeros(1, 2), weights)
    assert (running.result() == 1).all()


@given(ensembles(border="coverage"), st.integers(1, 5), st.integers(1, 5))
def test_merge_is_associative(case: Ensemble, first: int, second: int) -> None:
    case = replace(case, offsets=(case.offsets * 6)[:6], weights=None)
    tokens = case.tokens(torch.float64)
    ends = sorted({0, min(first, second), max(first, second), 6})
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def part(kind: Kind, s: slice) -> Any:
        return feed(new(kind, case), replace(case, offsets=case.offsets[s]), tokens[s], [9])

    for kind in (RunningMean, RunningMoments):
        left = new(kind, case)
        for s in parts:
            left.merge(part(kind, s))
        right = new(kind, case)
        for s in reversed(parts):
            other = part(kind, s)
            other.merge(right)
            right = other
        for merged in (left, right):
            assert merged.views == 6
            assert_near_the_oracle(merged._state, case, tokens, joins=len(parts) - 1)


def test_a_non_finite_token_stays_where_it_is() -> None:
    """Of a view of one chunk, in the cells that read it, also after a merge."""
    case = replace(SAMPLES["grid"], channels=3, batch=1)
    tokens = case.tokens()
    tokens[4, :, 7] = float("inf")
    args, modes = case.call(tokens)
    touched = ~srt_ext.ensemble(*args, **modes).isfinite()
    clean = srt_ext.ensemble(torch.where(tokens.isfinite(), tokens, 0), *args[1:], **modes)
    one, two = new(RunningMean, case), new(RunningMean, case)
    feed(one, replace(case, offsets=case.offsets[:5]), tokens[:5], [2])
    feed(two, replace(case, offsets=case.offsets[5:]), tokens[5:], [3])
    one.merge(two)
    assert torch.equal(~one.result().isfinite(), touched)
    torch.testing.assert_close(one.result()[~touched], clean[~touched])


# ---- the median ---------------------------------------------------------------------------------


def median(case: Ensemble, tokens: torch.Tensor) -> torch.Tensor:
    (_, offsets, grid, patch, _), modes = case.call(tokens)
    return srt_ext.ensemble(tokens, offsets, grid, patch, reduce="median", **modes)


@each_dtype
@given(ensembles(), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_median_of_up_to_7_views_is_exact(
    cpu_kernels: str, dtype: torch.dtype, case: Ensemble, chunks: list[int]
) -> None:
    case = replace(case, weights=None)
    tokens = case.tokens(dtype)
    running = feed(new(RunningMedian, case), case, tokens, chunks)
    assert torch.equal(running.result(), median(case, tokens))


def random_views(count: int, seed: int) -> tuple[Ensemble, torch.Tensor]:
    case = Ensemble((2, 2), (2, 2), ((0.0, 0.0),) * count, channels=4096, batch=1, seed=seed)
    return replace(case, upsample="nearest"), case.tokens()


# Mean errors that benchmarks/streaming.py finds for Gaussian values, in units of their spread, and
# half as much again: 0.0105, 0.0168, 0.0174.
@pytest.mark.parametrize(("count", "error"), [(9, 1e-5), (49, 0.016), (121, 0.025), (225, 0.026)])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_median_of_random_views(count: int, error: float, chunk: int) -> None:
    case, tokens = random_views(count, chunk)
    running = feed(new(RunningMedian, case), case, tokens, [chunk])
    assert (running.result() - median(case, tokens)).abs().mean() < error


def test_median_of_views_that_drift() -> None:
    """A stream in order of its values is the worst; spread, the window keeps the median."""
    count = 101
    ramp = torch.arange(count, dtype=torch.float32).reshape(count, 1, 1, 1).expand(-1, 1, 1, 40)
    order = views.spread(torch.stack([torch.arange(count), torch.zeros(count)], 1))[:, 0].long()
    assert order.sort().values.tolist() == list(range(count))
    running = RunningMedian((1, 1), (1, 1))
    for v in order:
        running.update(ramp[v : v + 1].contiguous(), torch.zeros(1, 2))
    assert (running.result() - 50).abs().max() <= 1
    running = RunningMedian((1, 1), (1, 1))
    for v in range(count):
        running.update(ramp[v : v + 1].contiguous(), torch.zeros(1, 2))
    assert (running.result() - 50).abs().max() <= 10


def run_values(*parts: tuple[float, int]) -> float:
    running = RunningMedian((1, 1), (1, 1))
    for value, times in parts:
        for _ in range(times):
            running.update(torch.full((1, 1, 1, 1), value), torch.zeros(1, 2))
    return running.result().item()


def test_median_leaves_a_window_of_equal_values(cpu_kernels: str) -> None:
    assert run_values((0.0, 10), (1.0, 1000)) == 1
    assert run_values((0.0, 9), (5.0, 9), (7.0, 1000)) == 7
    assert run_values((0.0, 10), (-2.0, 1000)) == -2


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_median_of_rectified_views(chunk: int) -> None:
    """Half of the values are 0, as those of a ReLU."""
    case, tokens = random_views(121, chunk)
    tokens = tokens.clamp(min=0)
    running = feed(new(RunningMedian, case), case, tokens, [chunk])
    assert (running.result() - median(case, tokens)).abs().mean() < 0.02


def test_one_chunk_in_any_order_of_views_drifts_not() -> None:
    """Views of a chunk are sorted by dx, which is the drift of a ramp: the kernel spreads them."""
    offsets = torch.stack([torch.zeros(101), torch.arange(101) / 101], 1)
    ramp = torch.arange(101.0).reshape(101, 1, 1, 1).expand(-1, 1, 1, 40).contiguous()
    running = RunningMedian((1, 1), (4, 4), border="clamp")
    running.update(ramp, offsets)
    assert (running.result() - 50).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_stays_and_infinities_are_values(dtype: torch.dtype, cpu_kernels: str) -> None:
    count = 30
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(count, 1, 1, 600, generator=generator, dtype=dtype)
    share = torch.rand(tokens.shape, generator=generator)
    tokens[share < 0.05] = float("inf")
    tokens[share > 0.95] = -float("inf")
    tokens[3, :, :, :100] = tokens[29, :, :, 100:120] = float("nan")
    running = RunningMedian((1, 1), (1, 1))
    for v in range(count):
        running.update(tokens[v : v + 1], torch.zeros(1, 2))
    field, exact = running.result().flatten(), tokens[:, 0, 0].median(0).values
    assert torch.equal(field.isnan(), exact.isnan())
    assert (field[120:] - exact[120:]).abs().mean() < 0.05


def test_a_cell_that_no_view_covers_is_zero() -> None:
    for kind in KINDS:
        running = kind((2, 2), (4, 4))
        running.update(torch.ones(1, 1, 4, 3), torch.tensor([[0.0, 4.0]]))
        field = running.result()
        assert (field[..., :4] == 1).all()
        assert (field[..., 4:] == 0).all()


def test_medians_take_no_weights() -> None:
    running = RunningMedian((1, 1), (1, 1))
    with pytest.raises(ValueError, match="weights must be None for a median"):
        running.update(torch.ones(1, 1, 1, 1), torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="no views were added"):
        running.result()


def test_medians_do_not_merge() -> None:
    running = RunningMedian((1, 1), (1, 1))
    with pytest.raises(NotImplementedError, match="merge is not defined: a window holds the 7"):
        running.merge(RunningMedian((1, 1), (1, 1)))


# ---- state --------------------------------------------------------------------------------------


@each_kind
def test_bytes_of_state_do_not_grow_with_the_views(kind: Kind) -> None:
    case = Ensemble((3, 5), (4, 6), channels=19, batch=2, stride=(2, 3))
    elements = 2 * 19 * 6 * 10
    of_an_element = {RunningMean: 4, RunningMoments: 8, RunningMedian: 32}[kind]
    running = new(kind, case)
    for _ in range(5):
        feed(running, case, case.tokens(), [4])
        state = sum(t.untyped_storage().nbytes() for t in tensors(running))
        assert state == of_an_element * elements + 8 * 6 * 10
    assert running.views == 45


@each_dtype
@each_kind
def test_an_interrupted_stream_goes_on_bit_for_bit(kind: Kind, dtype: torch.dtype) -> None:
    case = replace(SAMPLES["real"], offsets=SAMPLES["real"].offsets * 4)
    tokens = case.tokens(dtype)
    whole = feed(new(kind, case), case, tokens, [3])
    half = feed(new(kind, case), replace(case, offsets=case.offsets[:9]), tokens[:9], [3])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    taken = half.state_dict()
    feed(half, case, tokens, [20])  # what was taken is a copy
    file.seek(0)
    for state in (torch.load(file), taken):
        resumed = new(kind, case)
        resumed.load_state_dict(state)
        assert resumed.views == 9
        feed(resumed, replace(case, offsets=case.offsets[9:]), tokens[9:], [3])
        for a, b in zip(results(resumed), results(whole), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == dtype
        assert all(map(torch.equal, tensors(resumed), tensors(whole)))


def test_a_result_is_not_the_state() -> None:
    running = RunningMean((1, 1), (1, 1))
    running.update(torch.ones(1, 1, 1, 1), torch.zeros(1, 2))
    result = running.result()
    running.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 2))
    assert result.item() == 1
    running.reset()
    running.update(torch.full((1, 1, 1, 1), 7.0).double(), torch.zeros(1, 2))
    assert running.result().item() == 7


@each_kind
def test_no_views_only_allocate(kind: Kind) -> None:
    running = kind((2, 3), (4, 4))
    running.update(torch.ones(0, 1, 6, 5), torch.zeros(0, 2))
    assert running.views == 0
    assert torch.equal(results(running)[0], torch.zeros(1, 5, 8, 12))


# ---- errors -------------------------------------------------------------------------------------


@each_kind
def test_nothing_is_added_on_error(kind: Kind) -> None:
    case = SAMPLES["grid"]
    tokens = case.tokens()
    running = feed(new(kind, case), case, tokens, [4])
    before = [t.clone() for t in tensors(running)]
    offsets = torch.zeros(9, 2)
    wrong: list[tuple[Any, torch.Tensor, str]] = [
        (tokens, torch.full((9, 2), float("nan")), "offsets must be finite"),
        (tokens[:, :, :4], offsets, "grid must hold the N = 4 tokens"),
        (tokens[:, :1], offsets, r"tokens must keep their batch and channels, \[2, 19\]"),
        ([[1.0]], offsets, "tokens must be a torch.Tensor; got list"),
        (torch.ones(()), offsets, "tokens must have 4 dimensions"),
        (tokens[:0], torch.zeros(5, 9), r"offsets must be \[V, 2\]"),
        (tokens[:0, :, :4], offsets[:0], "grid must hold the N = 4 tokens"),
        (tokens.double(), offsets, "tokens must keep their dtype"),
        (tokens, torch.zeros(3, 2), r"offsets must be \[V, 2\]"),
    ]
    for chunk, at, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            running.update(chunk, at)
        assert running.views == 9
        assert all(map(torch.equal, tensors(running), before))
    fresh = new(kind, case)
    with pytest.raises(ValueError, match="offsets must be finite"):
        fresh.update(tokens, torch.full((9, 2), float("nan")))
    with pytest.raises(ValueError, match="no views were added"):
        fresh.result()
    fresh.update(tokens.double(), offsets)  # the failed chunk has decided nothing


def test_nothing_is_allocated_before_the_checks() -> None:
    """The state would take 281 TB."""
    for kind in KINDS:
        running = kind((4096, 4096), (256, 256))
        with pytest.raises(ValueError, match="grid must hold the N = 4 tokens"):
            running.update(torch.ones(1, 1, 4, 8), torch.zeros(1, 2))
        with pytest.raises(TypeError, match="tokens must be float32"):
            running.update(torch.ones(0, 1, 2**24, 1, dtype=torch.int64), torch.zeros(0, 2))
        for wrong in ({"border": "wrap"}, {"upsample": "cubic"}, {"stride": 3}):
            with pytest.raises(ValueError, match=kind.__name__):
                kind((1, 1), (4, 4), **wrong)


@each_kind
def test_a_damaged_state_is_refused_and_changes_nothing(kind: Kind) -> None:
    running = feed(new(kind, SAMPLES["grid"]), SAMPLES["grid"], SAMPLES["grid"].tokens(), [9])
    good = running.state_dict()
    first = next(iter(good["state"]))
    tensor = good["state"][first]
    damages: list[dict[str, Any]] = [
        {"state": {}, "views": None},
        {"views": -3},
        {"state": {}},
        {"views": True},
        {"state": None},
        {"grid": 5},
        {"dtype": torch.int64},
        {"state": {**good["state"], first: [1]}},
        {"state": {**good["state"], first: tensor[..., :1]}},
        {"state": {**good["state"], first: tensor.half()}},
        {"state": {first: tensor}},
    ]
    before = [t.clone() for t in tensors(running)]
    for damage in damages:
        with pytest.raises(ValueError, match=kind.__name__):
            running.load_state_dict({**good, **damage})
    with pytest.raises(ValueError, match="must be a dict; got NoneType"):
        running.load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all of its keys"):
        running.load_state_dict({key: value for key, value in good.items() if key != "views"})
    assert running.views == 9
    assert all(map(torch.equal, tensors(running), before))
    shuffled = dict(sorted(good["state"].items(), reverse=True))
    running.load_state_dict({**good, "state": shuffled})
    assert list(running._state) == list(good["state"])


def test_inference_mode_comes_and_goes() -> None:
    case = SAMPLES["grid"]
    tokens = case.tokens()
    for kind in (RunningMean, RunningMoments):
        with torch.inference_mode():
            running, other = new(kind, case), new(kind, case)
            part = replace(case, offsets=case.offsets[:3])
            feed(running, part, tokens[:3], [2])
            feed(other, part, tokens[:3], [2])
            running.merge(other)
            running.load_state_dict(running.state_dict())
        feed(running, replace(case, offsets=case.offsets[3:]), tokens[3:], [2])
        assert running.views == 12


def test_wrong_states_and_merges() -> None:
    mean, moments = RunningMean((1, 1), (2, 2)), RunningMoments((1, 1), (2, 2))
    for running in (mean, moments):
        running.update(torch.ones(1, 1, 1, 3), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="merge takes another RunningMean; got RunningMoments"):
        mean.merge(moments)
    with pytest.raises(ValueError, match="same settings"):
        mean.merge(RunningMean((1, 1), (2, 2), stride=2))
    other = RunningMean((1, 1), (2, 2))
    other.update(torch.ones(1, 1, 1, 4), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one dtype and size"):
        mean.merge(other)
    with pytest.raises(ValueError, match="the state must have"):
        mean.load_state_dict(moments.state_dict())
    with pytest.raises(ValueError, match="the settings"):
        RunningMean((1, 1), (4, 4)).load_state_dict(mean.state_dict())
    with pytest.raises(ValueError, match=r"RunningMean: grid must be two integers"):
        RunningMean((0, 1), (4, 4))
    with pytest.raises(ValueError, match="between 2\\^-500 and 2\\^500"):
        mean.update(
            torch.ones(1, 1, 1, 3), torch.zeros(1, 2), torch.tensor([1e200], dtype=torch.float64)
        )


# ---- processes ----------------------------------------------------------------------------------


def rank(number: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=2
    )
    case = distributed_case()
    tokens = case.tokens()
    part = slice(0, 3) if number == 0 else slice(3, 9)
    for kind in (RunningMean, RunningMoments):
        running = feed(
            new(kind, case),
            replace(case, offsets=case.offsets[part], weights=case.weights[part]),  # type: ignore[index]
            tokens[part],
            [2],
        )
        running.all_reduce()
        torch.save(running.state_dict(), f"{folder}/{kind.__name__}-{number}.pt")
        # Other settings on one process: an error on both, and nothing happens.
        other = kind((1, 1 + number), (2, 2))
        other.update(torch.ones(1, 1, 1 + number, 2), torch.zeros(1, 2))
        with pytest.raises(ValueError, match="all processes must have a stream of the same"):
            other.all_reduce()
        assert other.views == 1
        # A process without views takes part, too.
        alone = new(kind, case)
        if number == 0:
            feed(alone, case, tokens, [9])
        else:
            alone.update(tokens[:0], torch.zeros(0, 2))
        alone.all_reduce()
        torch.save(alone.state_dict(), f"{folder}/alone-{kind.__name__}-{number}.pt")
    torch.distributed.destroy_process_group()


def distributed_case() -> Ensemble:
    return replace(SAMPLES["grid"], weights=(1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 1.0, 4.0, 1.0))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    case = distributed_case()
    args, modes = case.call(case.tokens())
    expected = reference.ensemble_moments(*args, **modes)
    for kind in (RunningMean, RunningMoments):
        for name in (kind.__name__, f"alone-{kind.__name__}"):
            states = [torch.load(tmp_path / f"{name}-{number}.pt") for number in (0, 1)]
            for state in states:
                running = new(kind, case)
                running.load_state_dict(state)
                assert running.views == 9
                for field, truth in zip(running._fields(), expected, strict=False):
                    torch.testing.assert_close(field.double(), truth, rtol=1e-5, atol=1e-6)
            # Every process has the same.
            for key, tensor in states[0]["state"].items():
                assert torch.equal(tensor, states[1]["state"][key])


def test_same_bits_over_threads(threads: Callable[[int], None]) -> None:
    case = Ensemble((7, 9), (8, 8), channels=133)
    tokens = case.tokens()
    for kind in KINDS:
        states = []
        for count in (1, 2, 7):
            threads(count)
            states.append(tensors(feed(new(kind, case), case, tokens, [4])))
        for other in states[1:]:
            assert all(map(torch.equal, states[0], other))
