"""Tensors as NumPy arrays and back, on the same memory; bfloat16 where ml_dtypes is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from samples import DTYPES

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

# The dtypes that both libraries have here.
COMMON_DTYPES = DTYPES if bfloat16 else tuple(d for d in DTYPES if d != torch.bfloat16)


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """With the same strides."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(bfloat16)
    return tensor.numpy()


def tensor(values: np.ndarray[Any, Any]) -> torch.Tensor:
    if bfloat16 is not None and values.dtype == bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def arrays(values: Any) -> Any:
    """Tensors among arguments, as arrays."""
    if isinstance(values, torch.Tensor):
        return array(values)
    if isinstance(values, dict):
        return {key: arrays(value) for key, value in values.items()}
    return tuple(map(arrays, values)) if isinstance(values, tuple) else values


def assert_same_bits(actual: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == array(expected).dtype
    assert actual.tobytes() == array(expected).tobytes()
