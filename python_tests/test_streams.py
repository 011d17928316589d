"""Streams of views in torch and NumPy: kernels, chunks, merges, state, errors, processes."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from arrays import COMMON_DTYPES, array, assert_same_bits, tensor
from backends import Backend, Ops, each_gpu
from bounds import EnsembleBounds
from budget import assert_within_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ensemble as oracle
from samples import DTYPES, ENSEMBLES, Ensemble, each_dtype, each_ensemble, ensembles

import srt_ext
from srt_ext import RunningMean, RunningMedian, RunningMoments, reference, views


@dataclass(frozen=True)
class Library:
    """The streams of one library, with tensors as inputs and outputs."""

    module: Any
    of: Callable[[torch.Tensor], Any]  # an array of the library
    to: Callable[[Any], torch.Tensor]

    def __str__(self) -> str:
        return str(self.module.__name__)

    def new(self, kind: str, *place: Any, **modes: Any) -> Any:
        return getattr(self.module, f"Running{kind}")(*place, **modes)

    def like(self, kind: str, case: Ensemble) -> Any:
        modes = {"upsample": case.upsample, "border": case.border, "stride": case.stride}
        return self.new(kind, case.grid, case.patch, **modes)

    def update(self, running: Any, *chunk: torch.Tensor) -> None:
        running.update(*map(self.of, chunk))

    def feed(
        self, running: Any, case: Ensemble, tokens: torch.Tensor, chunks: Iterable[int]
    ) -> Any:
        """Adds the views in chunks of these sizes; the last size is repeated."""
        (_, offsets, _, _, weights), _ = case.call(tokens)
        sizes, begin, size = iter(chunks), 0, 1
        while begin < len(offsets):
            size = next(sizes, size)
            part = slice(begin, begin + size)
            chunk = [tokens[part], offsets[part]]
            if weights is not None and running._weighted:
                chunk.append(weights[part])
            self.update(running, *chunk)
            begin += size
        return running

    def fed(self, kind: str, case: Ensemble, tokens: torch.Tensor, chunks: Iterable[int]) -> Any:
        return self.feed(self.like(kind, case), case, tokens, chunks)

    def state(self, running: Any) -> dict[str, torch.Tensor]:
        return {name: self.to(values) for name, values in running._state.items()}

    def results(self, running: Any) -> list[torch.Tensor]:
        return [self.to(field).clone() for field in running._fields()]


def same(values: Any) -> Any:
    return values


TORCH = Library(srt_ext, same, same)
LIBRARIES = [TORCH]
try:
    import srt_ext.numpy

    LIBRARIES.append(Library(srt_ext.numpy, array, tensor))
except ImportError:  # reported by test_numpy
    pass

KINDS = ("Mean", "Moments", "Median")
AVERAGES = ("Mean", "Moments")
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_average = pytest.mark.parametrize("kind", AVERAGES)
chunk_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def part(case: Ensemble, tokens: torch.Tensor, views: slice) -> tuple[Ensemble, torch.Tensor]:
    """A call with a part of the views, and its tokens."""
    weights = case.weights and case.weights[views]
    return replace(case, offsets=case.offsets[views], weights=weights), tokens[views]


def values(*values: float) -> torch.Tensor:
    """One token of one channel in each view."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def still(views: int) -> torch.Tensor:
    return torch.zeros(views, 2)


# ---- the kernels --------------------------------------------------------------------------------


@lru_cache(64)  # for all backends; holds the samples of all dtypes
def expected_state(
    case: Ensemble, dtype: torch.dtype, joins: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The oracle's fields, and bounds after ``joins`` of chunks and states, at most."""
    tokens = case.tokens(dtype)
    bounds, (mean, var) = EnsembleBounds(case, tokens), oracle(case, tokens, "moments")
    return {
        "mean": (mean, bounds.stream_mean(joins)),
        "var": (var, bounds.variance(joins)),
        "weight": bounds.stream_weight(joins),
    }


def check_state(
    state: dict[str, torch.Tensor], case: Ensemble, dtype: torch.dtype, joins: int
) -> None:
    assert state["mean"].dtype == torch.promote_types(dtype, torch.float32)
    expected = expected_state(case, dtype, joins)
    for name, values in state.items():
        assert_within_rounding(values, *expected[name])


def chunks_of(case: Ensemble, tokens: torch.Tensor) -> list[tuple[Ensemble, torch.Tensor]]:
    """Chunks of 1 view, 3 views, and then 2 views each."""
    views = len(case.offsets)
    ends = sorted({0, *(n for n in (1, *range(4, views, 2)) if n < views), views})
    return [part(case, tokens, slice(*views)) for views in itertools.pairwise(ends)]


@each_dtype
@pytest.mark.parametrize("reduce", ["mean", "moments"])
@each_ensemble
def test_mean_and_moments(
    case: Ensemble, reduce: str, dtype: torch.dtype, backend: Backend
) -> None:
    chunks, joins = chunks_of(case, case.tokens(dtype)), len(case.offsets) - 1
    for place in backend.places:
        fields, weight = backend.stream(chunks, reduce, place=place)
        fields = torch.where(weight > 0, fields, 0)  # uncovered cells are not written
        state = dict(zip(("mean", "var"), fields, strict=False))
        check_state({**state, "weight": weight}, case, dtype, joins)


@each_dtype
@each_ensemble
def test_median(case: Ensemble, dtype: torch.dtype, backend: Backend) -> None:
    """Against the CPU, whose results are compared with the exact median below."""
    case = case.fit("median")
    chunks = chunks_of(case, case.tokens(dtype))
    expected, expected_count = Ops("cpu").stream(chunks, "median")
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for place in backend.places:
        window, count = backend.stream(chunks, "median", place=place)
        assert torch.equal(count, expected_count)
        window, right = (values[..., count > 0] for values in (window, expected))
        torch.testing.assert_close(window, right, rtol=close, atol=close)


@pytest.mark.parametrize("reduce", ["mean", "moments"])
@each_gpu
def test_invalid_weights_and_offsets_on_the_device_add_nothing(
    reduce: str, backend: Backend
) -> None:
    case = replace(ENSEMBLES["one_view"], value_dtype=torch.float64)
    tokens, nan = case.tokens(), float("nan")
    expected = backend.stream([(case, tokens)], reduce, place="device")
    wrong = [{"weights": (weight,)} for weight in (1e200, 1e-200, nan)]
    for changes in (*wrong, {"offsets": ((nan, 0.0),)}):
        chunks = [(case, tokens), (replace(case, **changes), tokens)]
        state = backend.stream(chunks, reduce, place="device")
        assert all(map(torch.equal, state, expected))


# ---- mean and moments ---------------------------------------------------------------------------


@each_average
@given(ensembles(), st.sampled_from(DTYPES), chunk_sizes)
def test_any_chunks_of_any_call(
    cpu_kernels: str, kind: str, case: Ensemble, dtype: torch.dtype, chunks: list[int]
) -> None:
    running = TORCH.fed(kind, case, case.tokens(dtype), chunks)
    assert running.views == len(case.offsets)
    assert running.result().dtype == dtype
    check_state(TORCH.state(running), case, dtype, len(case.offsets) - 1)


@pytest.mark.skipif(len(LIBRARIES) < 2, reason="srt_ext.numpy was not built")
@each_kind
@given(ensembles(), st.sampled_from(COMMON_DTYPES), chunk_sizes)
def test_torch_and_numpy_streams_are_bitwise_equal(
    kind: str, case: Ensemble, dtype: torch.dtype, chunks: list[int]
) -> None:
    """Both add chunks with the same machine code."""
    tokens = case.tokens(dtype)
    theirs, ours = (library.fed(kind, case, tokens, chunks) for library in LIBRARIES)
    for name, right in theirs._state.items():
        assert_same_bits(ours._state[name], right)
    for mine, right in zip(ours._fields(), theirs._fields(), strict=True):
        assert_same_bits(mine, right)
    assert_same_bits(ours.result(), theirs.result())
    if kind == "Moments":
        assert_same_bits(ours.variance(), theirs.variance())


def test_variance_with_a_large_mean() -> None:
    case = replace(ENSEMBLES["grid"], upsample="nearest")
    tokens = 1e4 + case.tokens()
    args, modes = case.call(tokens)
    true_var = reference.ensemble_moments(*args, **modes)[1]
    for chunks in ([1], [4], [9]):
        var = TORCH.fed("Moments", case, tokens, chunks).variance()
        # The mean of the state is rounded to float32 (6e-4 here); the variance is computed from it.
        rounding = 4 * torch.finfo(torch.float32).eps * 1e4
        assert ((var - true_var).abs() <= rounding * (1 + true_var.sqrt())).all()


@each_library
@each_average
def test_a_stream_merged_with_itself_keeps_its_result(kind: str, library: Library) -> None:
    case = ENSEMBLES["real"]
    running = library.fed(kind, case, case.tokens(), [2])
    before = library.results(running)
    running.merge(running)
    torch.testing.assert_close(library.results(running), before)
    assert running.views == 10


@each_library
@pytest.mark.parametrize("border", ["coverage", "zeros"])
def test_merging_moments_does_not_overflow(border: str, library: Library) -> None:
    """The share is multiplied first, because the square of the distance of means overflows."""
    large, small = 1e30, 2.0**-100

    def one(value: float, dx: float, weight: float = 1.0) -> Any:
        running = library.new("Moments", (1, 1), (1, 2), border=border)
        library.update(running, values(value), torch.tensor([[0.0, dx]]), torch.tensor([weight]))
        return running

    # Under coverage each of the two pixels is covered by one view alone.
    left, right = one(large, 1.0), one(-large, -1.0)
    left.merge(right)
    expected = [large, -large] if border == "coverage" else [large / 2, -large / 2]
    assert left.result().ravel().tolist() == pytest.approx(expected, rel=1e-6)
    spread = 0.0 if border == "coverage" else float("inf")
    assert left.variance().ravel().tolist() == [spread, spread]

    for first, second in ((1.0, small), (small, 1.0)):
        running = one(0.0, 0.0, first)
        running.merge(one(large, 0.0, second))
        assert running.variance().ravel().tolist() == pytest.approx([small * large**2] * 2)


def test_infinite_means_stay_infinite(cpu_kernels: str) -> None:
    """As in one call; the variance of an infinite value is NaN."""
    tokens = values(1.0, float("inf"), 2.0, 3.0)
    one, var = srt_ext.ensemble_moments(tokens, still(4), (1, 1), (1, 1))
    assert one.item() == float("inf")
    assert var.isnan().item()
    for chunk in (1, 2, 3):
        running = RunningMoments((1, 1), (1, 1))
        for part in tokens.split(chunk):
            running.update(part, still(len(part)))
        assert running.result().item() == float("inf")
        assert running.variance().isnan().item()


def test_an_infinite_value_of_negligible_weight_changes_nothing(cpu_kernels: str) -> None:
    running = RunningMean((1, 1), (4, 4))
    for value, weight in ((1.0, 2.0**400), (float("inf"), 2.0**-400)):
        running.update(values(value), still(1), torch.tensor([weight], dtype=torch.float64))
    assert (running.result() == 1).all()


@each_library
@settings(max_examples=8)
@given(ensembles(border="coverage"), st.integers(1, 5), st.integers(1, 5))
def test_merge_is_associative(library: Library, case: Ensemble, first: int, second: int) -> None:
    case = replace(case, offsets=(case.offsets * 6)[:6], weights=None)
    tokens = case.tokens(torch.float64)
    ends = sorted({0, min(first, second), max(first, second), 6})
    parts = [part(case, tokens, slice(a, b)) for a, b in itertools.pairwise(ends)]
    for kind in AVERAGES:
        left, right = library.like(kind, case), library.like(kind, case)
        for one in parts:
            left.merge(library.fed(kind, *one, [9]))
        for one in reversed(parts):
            other = library.fed(kind, *one, [9])
            other.merge(right)
            right = other
        for merged in (left, right):
            assert merged.views == 6
            check_state(library.state(merged), case, torch.float64, len(parts) - 1)


@each_library
def test_a_merged_stream_accepts_more_views(library: Library) -> None:
    """A non-finite token affects only the cells that read it."""
    case = replace(ENSEMBLES["grid"], channels=3, batch=1)
    tokens = case.tokens()
    tokens[4, :, 7] = float("inf")
    args, modes = case.call(tokens)
    touched = ~srt_ext.ensemble(*args, **modes).isfinite()
    clean = srt_ext.ensemble(torch.where(tokens.isfinite(), tokens, 0), *args[1:], **modes)
    first, second, third = (part(case, tokens, slice(a, a + 3)) for a in (0, 3, 6))
    running = library.fed("Mean", *first, [2])
    running.merge(library.fed("Mean", *second, [3]))
    mean = library.to(library.feed(running, *third, [1]).result())
    assert torch.equal(~mean.isfinite(), touched)
    torch.testing.assert_close(mean[~touched], clean[~touched])


# ---- the median ---------------------------------------------------------------------------------


def median(case: Ensemble, tokens: torch.Tensor) -> torch.Tensor:
    (_, offsets, grid, patch, _), modes = case.call(tokens)
    return srt_ext.ensemble(tokens, offsets, grid, patch, reduce="median", **modes)


@each_dtype
@given(ensembles(), chunk_sizes)
def test_median_of_up_to_7_views_is_exact(
    cpu_kernels: str, dtype: torch.dtype, case: Ensemble, chunks: list[int]
) -> None:
    case = replace(case, weights=None)
    tokens = case.tokens(dtype)
    assert torch.equal(TORCH.fed("Median", case, tokens, chunks).result(), median(case, tokens))


# Mean errors that research/streaming.py finds for Gaussian values, in units of their spread, and
# 50% margin: 0.0105, 0.0168, 0.0174. Half of the values of a ReLU are 0.
@pytest.mark.parametrize(
    ("count", "error", "rectified"),
    [(9, 1e-5, False), (49, 0.016, False), (225, 0.026, False), (121, 0.02, True)],
)
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_median_of_random_views(count: int, error: float, rectified: bool, chunk: int) -> None:
    case = Ensemble((2, 2), (2, 2), ((0.0, 0.0),) * count, channels=1024, batch=1, seed=chunk)
    case = replace(case, upsample="nearest")
    tokens = case.tokens().clamp(min=0) if rectified else case.tokens()
    running = TORCH.fed("Median", case, tokens, [chunk])
    assert (running.result() - median(case, tokens)).abs().mean() < error


def run_values(order: Iterable[float]) -> float:
    running = RunningMedian((1, 1), (1, 1))
    for value in order:
        running.update(values(float(value)), still(1))
    return running.result().item()


def test_median_of_views_that_drift() -> None:
    """A stream of sorted values is the worst case; a spread stream keeps the median."""
    count = 101
    order = (
        views.spread(torch.stack([torch.arange(count), torch.zeros(count)], 1))
        .offsets[:, 0]
        .tolist()
    )
    assert sorted(order) == list(range(count))
    assert abs(run_values(order) - 50) <= 1
    assert abs(run_values(range(count)) - 50) <= 10


def test_median_leaves_a_window_of_equal_values(cpu_kernels: str) -> None:
    assert run_values([0] * 10 + [1] * 1000) == 1
    assert run_values([0] * 9 + [5] * 9 + [7] * 1000) == 7
    assert run_values([0] * 10 + [-2] * 1000) == -2


def test_the_median_of_one_sorted_chunk_does_not_drift() -> None:
    """The kernel spreads the views of a chunk, which are sorted by dx: a ramp would drift."""
    offsets = torch.stack([torch.zeros(101), torch.arange(101) / 101], 1)
    ramp = torch.arange(101.0).reshape(101, 1, 1, 1).expand(-1, 1, 1, 40).contiguous()
    running = RunningMedian((1, 1), (4, 4), border="clamp")
    running.update(ramp, offsets)
    assert (running.result() - 50).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_persists_and_infinities_are_ordinary_values(
    dtype: torch.dtype, cpu_kernels: str
) -> None:
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


@each_library
@each_kind
def test_a_cell_that_no_view_covers_is_zero(kind: str, library: Library) -> None:
    running = library.new(kind, (2, 2), (4, 4))
    library.update(running, torch.ones(1, 1, 4, 3), torch.tensor([[0.0, 4.0]]))
    field = running.result()
    assert (field[..., :4] == 1).all()
    assert (field[..., 4:] == 0).all()


# ---- state --------------------------------------------------------------------------------------


@each_library
@each_kind
def test_bytes_of_state_do_not_grow_with_the_views(kind: str, library: Library) -> None:
    case = Ensemble((3, 5), (4, 6), channels=19, batch=2, stride=(2, 3))
    elements = 2 * 19 * 6 * 10
    of_an_element = {"Mean": 4, "Moments": 8, "Median": 32}[kind]
    running = library.like(kind, case)
    for _ in range(5):
        library.feed(running, case, case.tokens(), [4])
        state = library.state(running).values()
        assert sum(t.untyped_storage().nbytes() for t in state) == of_an_element * elements + 480
    assert running.views == 45


def saved(state: Any) -> Any:
    """Saves and loads a state, by torch or by pickle."""
    if any(isinstance(values, np.ndarray) for values in state["state"].values()):
        return pickle.loads(pickle.dumps(state))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@each_library
@pytest.mark.parametrize("dtype", COMMON_DTYPES, ids=str)
@each_kind
def test_a_resumed_stream_is_bitwise_equal(kind: str, dtype: torch.dtype, library: Library) -> None:
    case = replace(ENSEMBLES["real"], offsets=ENSEMBLES["real"].offsets * 4)
    tokens = case.tokens(dtype)
    whole = library.fed(kind, case, tokens, [3])
    half = library.fed(kind, *part(case, tokens, slice(9)), [3])
    state, taken = saved(half.state_dict()), half.state_dict()
    library.feed(half, case, tokens, [20])  # state_dict() is a copy
    for loaded in (state, taken):
        resumed = library.like(kind, case)
        resumed.load_state_dict(loaded)
        assert resumed.views == 9
        library.feed(resumed, *part(case, tokens, slice(9, None)), [3])
        assert all(map(torch.equal, library.results(resumed), library.results(whole)))
        states = (library.state(running).values() for running in (resumed, whole))
        assert all(map(torch.equal, *states))
        assert library.results(resumed)[0].dtype == dtype


@each_library
def test_a_result_does_not_change_with_the_state(library: Library) -> None:
    running = library.new("Mean", (1, 1), (1, 1))
    library.update(running, values(1.0), still(1))
    result = running.result()
    library.update(running, values(0.0), still(1))
    assert result.item() == 1
    running.reset()
    library.update(running, values(7.0).double(), still(1))
    assert library.to(running.result()).dtype == torch.float64
    assert running.result().item() == 7


@each_library
@each_kind
def test_a_chunk_without_views_only_allocates(kind: str, library: Library) -> None:
    running = library.new(kind, (2, 3), (4, 4))
    library.update(running, torch.ones(0, 1, 6, 5), still(0))
    assert running.views == 0
    assert torch.equal(library.results(running)[0], torch.zeros(1, 5, 8, 12))


# ---- errors -------------------------------------------------------------------------------------


@each_library
@each_kind
def test_nothing_is_added_on_error(kind: str, library: Library) -> None:
    case = ENSEMBLES["grid"]
    tokens, offsets = case.tokens(), still(9)
    running = library.fed(kind, case, tokens, [4])
    before = {name: values.clone() for name, values in library.state(running).items()}
    array = "torch.Tensor" if library is TORCH else "numpy.ndarray without a mask"
    nan = torch.full((9, 2), float("nan"))
    wrong: list[tuple[Any, torch.Tensor, type[Exception], str]] = [
        (tokens, nan, ValueError, f"srt::{running._op}: offsets must be finite"),
        (tokens[:, :1], offsets, ValueError, r"the \[B, C\] of the stream, \[2, 19\]; got \[1"),
        ([[1.0]], offsets, TypeError, f"tokens must be a {array}; got list"),
        (tokens[:0], torch.zeros(5, 9), ValueError, r"offsets must be \[V, 2\] with V = 0"),
        (tokens[:0, :, :4], offsets[:0], ValueError, r"tokens must have N = h \* w = .*got \[0, "),
        (tokens.double(), offsets, TypeError, f"Running{kind}: tokens must have the dtype"),
    ]
    for chunk, at, error, message in wrong:
        with pytest.raises(error, match=message):
            running.update(
                library.of(chunk) if isinstance(chunk, torch.Tensor) else chunk, library.of(at)
            )
        assert running.views == 9
        assert all(torch.equal(t, before[name]) for name, t in library.state(running).items())
    fresh = library.like(kind, case)
    with pytest.raises(ValueError, match="offsets must be finite"):
        library.update(fresh, tokens, nan)
    with pytest.raises(ValueError, match="has no views; call update first"):
        fresh.result()
    library.update(fresh, tokens.double(), offsets)  # the failed chunk does not determine the dtype


@each_library
@each_kind
def test_nothing_is_allocated_before_the_checks(kind: str, library: Library) -> None:
    """The state would take 281 TB."""
    running = library.new(kind, (4096, 4096), (256, 256))
    with pytest.raises(ValueError, match=f"srt::{running._op}: tokens must have N = h"):
        library.update(running, torch.ones(1, 1, 4, 8), still(1))
    with pytest.raises(TypeError, match="tokens must be float32"):
        library.update(running, torch.ones(0, 1, 2**24, 1, dtype=torch.int64), still(0))
    if library is TORCH:
        with pytest.raises(TypeError, match=f"srt::{running._op}: offsets must be a torch.Tensor"):
            running.update(torch.ones(1, 1, 2**24, 8), [(0, 0)])
    for changes in ({"border": "wrap"}, {"upsample": "cubic"}, {"stride": 3}, {"stride": 0}):
        with pytest.raises(ValueError, match=f"Running{kind}: "):
            library.new(kind, (1, 1), (4, 4), **changes)


@each_library
@each_kind
def test_an_invalid_state_changes_nothing(kind: str, library: Library) -> None:
    case = ENSEMBLES["grid"]
    running = library.fed(kind, case, case.tokens(), [9])
    good = running.state_dict()
    first, *_, last = good["state"]
    part = library.to(good["state"][first])

    def state(**changes: Any) -> dict[str, Any]:
        of = {n: library.of(v) if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
        return {"state": {**good["state"], **of}}

    damages: list[dict[str, Any]] = [
        {"state": {}, "views": None},
        {"views": -3},
        {"state": {}},
        {"views": True},
        {"state": None},
        {"grid": 5},
        {"stride": (2, 2)},
        {"dtype": torch.int64 if library is TORCH else np.dtype(np.int64)},
        {"dtype": "float32"},
        {"dtype": np.dtype(">f4")},
        state(**{first: [1]}),
        state(**{first: part[..., :1]}),
        state(**{first: part.half()}),
        state(**{last: torch.zeros(3)}),
        {"state": {first: good["state"][first]}},
    ]
    before = {name: values.clone() for name, values in library.state(running).items()}
    for damage in damages:
        with pytest.raises(ValueError, match=f"Running{kind}: "):
            running.load_state_dict({**good, **damage})
    with pytest.raises(ValueError, match="must be a dict; got NoneType"):
        running.load_state_dict(None)
    with pytest.raises(ValueError, match="must also have the keys"):
        running.load_state_dict({key: value for key, value in good.items() if key != "views"})
    assert running.views == 9
    assert all(torch.equal(t, before[name]) for name, t in library.state(running).items())
    running.load_state_dict({**good, "state": dict(sorted(good["state"].items(), reverse=True))})
    assert list(running._state) == list(good["state"])


@each_library
def test_wrong_states_merges_and_weights_raise(library: Library) -> None:
    mean, moments, median = (library.new(kind, (1, 1), (2, 2)) for kind in KINDS)
    tokens = torch.ones(1, 1, 1, 3)
    for running in (mean, moments):
        library.update(running, tokens, still(1))
    with pytest.raises(TypeError, match="other must be a RunningMean; got RunningMoments"):
        mean.merge(moments)
    with pytest.raises(ValueError, match="same settings"):
        mean.merge(library.new("Mean", (1, 1), (2, 2), stride=2))
    other = library.new("Mean", (1, 1), (2, 2))
    library.update(other, torch.ones(1, 1, 1, 4), still(1))
    with pytest.raises(ValueError, match="the same dtype and sizes"):
        mean.merge(other)
    with pytest.raises(NotImplementedError, match="RunningMedian: merge is not supported"):
        median.merge(median)
    with pytest.raises(ValueError, match="state must have"):
        mean.load_state_dict(moments.state_dict())
    with pytest.raises(ValueError, match="the settings"):
        library.new("Mean", (1, 1), (4, 4)).load_state_dict(mean.state_dict())
    with pytest.raises(ValueError, match=r"RunningMean: grid must be an integer or a pair"):
        library.new("Mean", (0, 1), (4, 4))
    with pytest.raises(ValueError, match="RunningMedian: weights must be None for a median; got"):
        library.update(median, tokens, still(1), torch.ones(1))
    with pytest.raises(ValueError, match="has no views; call update first"):
        median.result()


def test_streams_work_across_inference_mode() -> None:
    case = ENSEMBLES["grid"]
    tokens = case.tokens()
    for kind in AVERAGES:
        with torch.inference_mode():
            first = part(case, tokens, slice(3))
            running, other = (TORCH.fed(kind, *first, [2]) for _ in range(2))
            running.merge(other)
            running.load_state_dict(running.state_dict())
        TORCH.feed(running, *part(case, tokens, slice(3, None)), [2])
        assert running.views == 12


# ---- processes ----------------------------------------------------------------------------------


def rank(number: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=2
    )
    case = distributed_case()
    tokens = case.tokens()
    mine = part(case, tokens, slice(0, 3) if number == 0 else slice(3, 9))
    for kind in AVERAGES:
        running = TORCH.fed(kind, *mine, [2])
        running.all_reduce()
        torch.save(running.state_dict(), f"{folder}/{kind}-{number}.pt")
        # Other settings on one process: both raise an error, and the state does not change.
        other = TORCH.new(kind, (1, 1 + number), (2, 2))
        other.update(torch.ones(1, 1, 1 + number, 2), torch.zeros(1, 2))
        with pytest.raises(ValueError, match="all processes must have a stream with the same set"):
            other.all_reduce()
        assert other.views == 1
        # A process without views also takes part.
        alone = TORCH.like(kind, case)
        if number == 0:
            TORCH.feed(alone, case, tokens, [9])
        else:
            alone.update(tokens[:0], torch.zeros(0, 2))
        alone.all_reduce()
        torch.save(alone.state_dict(), f"{folder}/alone-{kind}-{number}.pt")
    torch.distributed.destroy_process_group()


def distributed_case() -> Ensemble:
    return replace(ENSEMBLES["grid"], weights=(1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 1.0, 4.0, 1.0))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    case = distributed_case()
    for kind in AVERAGES:
        for name in (kind, f"alone-{kind}"):
            states = [torch.load(tmp_path / f"{name}-{number}.pt") for number in (0, 1)]
            for state in states:
                running = TORCH.like(kind, case)
                running.load_state_dict(state)
                assert running.views == 9
                check_state(TORCH.state(running), case, torch.float32, 8)
            # Every process has the same state.
            assert all(
                torch.equal(states[0]["state"][key], values)
                for key, values in states[1]["state"].items()
            )
