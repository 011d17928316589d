"""Conversion between tensors and NumPy arrays that share memory; bfloat16 needs ml_dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from samples import DTYPES

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

# The dtypes that both libraries support here.
COMMON_DTYPES = DTYPES if bfloat16 else tuple(d for d in DTYPES if d != torch.bfloat16)


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns an array on the same memory, with the same strides."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(bfloat16)
    return tensor.numpy()


def tensor(values: np.ndarray[Any, Any]) -> torch.Tensor:
    if bfloat16 is not None and values.dtype == bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def arrays(values: Any) -> Any:
    """Converts all tensors among arguments to arrays."""
    if isinstance(values, torch.Tensor):
        return array(values)
    if isinstance(values, dict):
        return {key: arrays(value) for key, value in values.items()}
    return tuple(map(arrays, values)) if isinstance(values, tuple) else values


def assert_same_bits(actual: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == array(expected).dtype
    assert actual.tobytes() == array(expected).tobytes()
