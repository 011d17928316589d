"""All kernels: ensemble, shift, windows and their gradients.

Accuracy, containment of non-finite values, offsets and weights, threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import ALL, GPU, Backend, CudaOnHost, Ops, each_device, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    KERNELS,
    check,
    check_containment,
    check_sample,
    dtypes_of,
    large_enough,
    poisoned,
    run,
    samples_of,
    values_of,
)
from samples import (
    BORDERS,
    DTYPES,
    INTERPOLATIONS,
    NO_OFFSETS,
    PADDINGS,
    REDUCES,
    Ensemble,
    Shift,
    Windows,
    each_value_dtype,
    ensembles,
    random_views,
    shifts,
    windows,
)

import srt_ext

NAN, INF = float("nan"), float("inf")
LINEAR = ("mean", "mean_backward", "shift", "shift_backward")

each_sample = pytest.mark.parametrize(
    ("kernel", "name", "backend"),
    [
        pytest.param(kernel, name, *backend.values, marks=backend.marks)
        for kernel in KERNELS
        for name in samples_of(kernel)
        for backend in ALL
    ],
    indirect=["backend"],
)


def any_case(kernel: str) -> st.SearchStrategy[Any]:
    if kernel.startswith("windows"):
        return windows()
    return shifts() if kernel.startswith("shift") else ensembles()


# ---- accuracy -----------------------------------------------------------------------------------


@each_sample
def test_error_budget(kernel: str, name: str, backend: Backend) -> None:
    case = samples_of(kernel)[name]
    for dtype in dtypes_of(kernel):
        if isinstance(case, Shift):  # also lines of several blocks
            cases = [replace(case, size=s) for s in (case.size, (9, 32), (19, 272), (2, 300))]
        elif isinstance(case, Windows):  # enough pixels for the oracle's largest error
            cases = [replace(case, batch=6)]
        else:
            # 40: whole vectors in every dtype, and the last chunk of channels has idle lanes.
            channels = {case.channels, 40 if kernel == "mean" else case.channels}
            cases = [large_enough(replace(case, channels=c), dtype) for c in sorted(channels)]
        for one, place in itertools.product(cases, backend.places):
            check_sample(kernel, backend, one, dtype, place)


@each_kernel(*KERNELS)
@given(st.data(), st.sampled_from(("host", "device")))
def test_rounding_of_any_call(
    backend: Backend, kernel: str, data: st.DataObject, place: str
) -> None:
    case, dtype = data.draw(any_case(kernel)), data.draw(st.sampled_from(dtypes_of(kernel)))
    if isinstance(case, Ensemble):
        channels = data.draw(st.sampled_from((None, 1, 3, 8, 16, 33, 72)))
        case = replace(case, channels=channels or case.channels)
    if isinstance(backend, CudaOnHost) and kernel == "mean_backward":
        backend.gpu.processors = data.draw(st.sampled_from((1, 2, 132)))
    values = values_of(kernel, case, dtype)
    if kernel == "shift_backward" and data.draw(st.booleans()):  # misaligned to 16 bytes
        moved = torch.empty(1 + values.numel(), dtype=dtype)[1:]
        values = moved.view(values.shape).copy_(values)
    place = place if place in backend.places else "host"
    check(kernel, case, values, run(backend, kernel, case, values, place))


# ---- containment --------------------------------------------------------------------------------


@each_sample
def test_containment(kernel: str, name: str, backend: Backend) -> None:
    case = samples_of(kernel)[name]
    for dtype in DTYPES:
        check_containment(kernel, backend, case, dtype)
        if isinstance(case, Ensemble) and "mean" in kernel:
            whole = replace(case, channels=16)
            check_containment(kernel, backend, whole, dtype)


@each_kernel(*KERNELS)
@given(st.data(), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_containment_of_any_call(
    backend: Backend, kernel: str, data: st.DataObject, dtype: torch.dtype, seed: int
) -> None:
    case = data.draw(any_case(kernel))
    check_containment(kernel, backend, case, dtype, seed)


# ---- offsets and weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "views"),
    [
        *(("mean", views) for views in (160, 161)),
        pytest.param("mean", 500, marks=pytest.mark.slow),
        *(("mean_backward", views) for views in (8, 50, 160)),
        *(("shift", views) for views in (240, 241)),
        pytest.param("shift", 700, marks=pytest.mark.slow),
        *(("shift_backward", views) for views in (127, 128, 129, 300)),
    ],
)
def test_many_views(kernel: str, views: int, backend: Backend) -> None:
    """More than the parameters of a kernel hold, or than the entries of one dx."""
    weights = tuple(torch.rand(views, generator=torch.Generator().manual_seed(views)).tolist())
    cases: list[Any] = [Shift((11, 40), random_views(views), batch=1)]
    if kernel.startswith("mean"):
        plain = Ensemble((2, 2), (4, 4), channels=9)
        cases = [
            replace(plain, offsets=random_views(views, step), weights=given_weights)
            for step, given_weights in ((0.125, None), (2.0**-10, weights), (2.0, weights))
        ]
    for case, place in itertools.product(cases, backend.places):
        check_sample(
            kernel, backend, replace(case, value_dtype=torch.float64), torch.float32, place
        )


@pytest.mark.parametrize("views", [5, 200])
@each_kernel(*LINEAR, backends=GPU)
def test_results_are_bitwise_equal_wherever_offsets_and_weights_are(
    kernel: str, views: int, backend: Backend
) -> None:
    weights = (1.0, 0.0, 2.5, 0.125, 7.0) * (views // 5)  # values that both dtypes represent
    case: Any = Shift((5, 8), random_views(views))
    if kernel.startswith("mean"):
        case = Ensemble(offsets=random_views(views), weights=weights, channels=16)
    for dtype in dtypes_of(kernel) if views == 5 else DTYPES[:1]:
        values = values_of(kernel, case, dtype)
        expected = run(backend, kernel, case, values)
        for value_dtype in (torch.float32, torch.float64):
            same = replace(case, value_dtype=value_dtype)
            for place in ("device", ("host", "device"), ("device", "host")):
                assert torch.equal(run(backend, kernel, same, values, place), expected)


def case_of(kernel: str, mode: str, interpolation: str, value_dtype: torch.dtype) -> Any:
    """A case of five views."""
    if kernel.startswith("shift"):
        return Shift(padding=mode, interpolation=interpolation, value_dtype=value_dtype)
    case = samples_of(kernel)["real"]
    return replace(case, border=mode, channels=16, value_dtype=value_dtype)


@each_value_dtype
@each_kernel(*LINEAR, backends=GPU)
def test_invalid_offsets_on_the_device_cover_nothing(
    kernel: str, value_dtype: torch.dtype, backend: Backend
) -> None:
    """Values on the device are not validated."""
    shift = kernel.startswith("shift")
    modes = itertools.product(PADDINGS, INTERPOLATIONS) if shift else ((b, "") for b in BORDERS)
    for mode in modes:
        good = case_of(kernel, *mode, value_dtype)
        case = replace(good, offsets=NO_OFFSETS[:3] + good.offsets + NO_OFFSETS[3:])
        values = some = values_of(kernel, good, torch.float32)
        if kernel in ("mean", "shift_backward"):  # views that cover nothing are not read
            values = torch.full((len(case.offsets), *some.shape[1:]), NAN)
            values[3:8] = some
        result = run(backend, kernel, case, values, "device")
        if kernel in ("mean_backward", "shift"):
            assert not result[:3].any()
            assert not result[8:].any()
            result = result[3:8]
        check(kernel, good, some, result)
        none = replace(case, offsets=NO_OFFSETS[:5])
        assert not run(backend, kernel, none, some, "device").any()


@pytest.mark.parametrize("border", BORDERS)
@each_value_dtype
@each_kernel("mean", "mean_backward", backends=GPU)
def test_invalid_weights_on_the_device_count_for_nothing(
    kernel: str, value_dtype: torch.dtype, border: str, backend: Backend
) -> None:
    case = case_of(kernel, border, "", value_dtype)
    clean = replace(case, weights=(1.0, 0.0, 2.0, 0.0, 0.5))
    values = values_of(kernel, case, torch.float64)
    given = values.clone()
    if kernel == "mean":
        given[1::2] = NAN
    for bad in (NAN, INF, -INF, -1.0, -1e-30, 2.0**-79 * 0.99):  # the largest is 2
        invalid = replace(case, weights=(1.0, bad, 2.0, bad, 0.5))
        check(kernel, clean, values, run(backend, kernel, invalid, given, "device"))
    for bad in (NAN, INF, -1.0, 0.0):
        none = replace(case, weights=(bad,) * 5)
        assert not run(backend, kernel, none, values, "device").any()


@each_device
@pytest.mark.parametrize("op", ["ensemble", "shift"])
@given(st.data(), st.sampled_from((torch.float32, torch.float64)))
def test_offsets_and_weights_of_any_dtype_and_stride(
    device: str, op: str, data: st.DataObject, dtype: torch.dtype
) -> None:
    case = replace(
        data.draw(any_case(op)), value_dtype=torch.float32
    )  # values that both dtypes represent
    views = len(case.offsets)
    if op == "ensemble":
        case = replace(case, weights=case.weights or (1.0,) * views)
    args, modes = Ops(device).call(case, values_of(op, case, torch.float32), "device")
    expected = getattr(srt_ext, op)(*args, **modes)
    wide = torch.full((views, 3, 2), NAN, dtype=dtype, device=device)
    wide[:, 1] = args[1]
    if op == "ensemble":
        wide[:, 0, 1] = args[4]
        args[4] = wide[:, 0, 1]
    for offsets in (wide[:, 1], args[1].to(dtype).t().contiguous().t()):
        args[1] = offsets
        assert torch.equal(getattr(srt_ext, op)(*args, **modes), expected)


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_bitwise_equal_over_threads(
    kernel: str, threads: Callable[[int], None], cpu_kernels: str
) -> None:
    # Large enough to be split over threads. Kernels of single views are split at smaller sizes.
    patch = 4 if kernel in ("median", "moments") else 8
    plain = Ensemble((7, 9), (patch, patch), channels=133)
    strided = replace(plain, stride=(patch // 2, patch // 2), upsample="nearest")
    cases: list[Any] = [plain, strided]
    if kernel.startswith("shift"):
        cases = [Shift((67, 131), interpolation=mode) for mode in INTERPOLATIONS]
    if kernel.startswith("windows"):
        plain = Windows((67, 131), (40, 43), random_views(30), batch=1)
        cases = [plain, replace(plain, scale=(1.0, 1.5), layout="channels_last", channels=9)]
    for case, dtype in itertools.product(cases, dtypes_of(kernel)):
        values, results = values_of(kernel, case, dtype), []
        for count in (1, 2, 7):
            threads(count)
            results.append([run(Ops("cpu"), kernel, case, values)])
            if kernel in REDUCES:  # also as two chunks of a stream
                results[-1] += Ops("cpu").stream([(case, values)] * 2, kernel)
        assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_near_nan_are_bitwise_equal_over_threads(
    dtype: torch.dtype, threads: Callable[[int], None], cpu_kernels: str
) -> None:
    """Part of a mean is computed differently there; that part must not depend on the threads."""
    for stride in ((1, 1), (2, 1), (1, 2)):
        case = Ensemble((7, 19), (8, 8), channels=133, stride=stride)
        values, results = poisoned("mean", case, dtype), []
        for count in (1, 2, 7, 64):
            threads(count)
            results.append(run(Ops("cpu"), "mean", case, values).nan_to_num())
        assert all(torch.equal(results[0], other) for other in results[1:])
