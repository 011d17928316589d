"""csrc/numpy/module.cpp. Numbers are float64 and dense; types are checked by srt_ext.numpy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[Any]
_Numbers = NDArray[np.float64]
_Pair = tuple[int, int]

def shift(image: _Array, offsets: _Numbers, padding: str, interpolation: str, /) -> _Array: ...
def ensemble(
    tokens: _Array,
    offsets: _Numbers,
    grid: _Pair,
    patch: _Pair,
    weights: _Numbers | None,
    upsample: str,
    border: str,
    stride: _Pair,
    reduce: str,
    out: _Array | None,
    /,
) -> _Array: ...
def ensemble_moments(
    tokens: _Array,
    offsets: _Numbers,
    grid: _Pair,
    patch: _Pair,
    weights: _Numbers | None,
    upsample: str,
    border: str,
    stride: _Pair,
    /,
) -> tuple[_Array, _Array]: ...

# Of a state, then the arguments of ensemble_moments.
def accumulate_mean_(mean: _Array, weight: _Numbers, /, *views: Any) -> None: ...
def accumulate_moments_(mean: _Array, var: _Array, weight: _Numbers, /, *views: Any) -> None: ...
def accumulate_median_(window: _Array, count: _Numbers, /, *views: Any) -> None: ...
def check_chunk(op: str, /, *views: Any) -> None: ...
def set_threads(threads: int, /) -> None: ...
def get_threads() -> int: ...
def cpu_kernels() -> str: ...
def available_cpu_kernels() -> str: ...
def force_cpu_kernels(name: str, /) -> bool: ...
