"""Measures the floating-point operations and the memory of a call."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

T = TypeVar("T")


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that ops allocated.

    It works the same on every device and does not reset the allocator's own statistics, which the
    user may be reading.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in self._held and id(storage) not in given:
                self._add(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            self.now -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, freed)
        self.now += size


def peak_bytes(call: Callable[[], T]) -> tuple[T, int]:
    """Returns the result of a call and the peak bytes of its tensors, including the result.

    Memory that kernels allocate internally (such as cuDNN workspaces) is not counted.
    """
    with _Live() as live:
        result = call()
    return result, live.peak


def fake_copy(value: T) -> tuple[T, FakeTensorMode]:
    """Returns a deep copy whose tensors have no data, and their fake tensor mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        return copy.deepcopy(value), mode


def operations_and_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Returns the floating-point operations and the peak bytes of a call on fake tensors.

    A multiply-add counts as two operations. The bytes are counted as in :func:`peak_bytes`.
    """
    aten, quantized = torch.ops.aten, torch.ops.quantized
    products = (
        aten._int_mm,
        aten._weight_int8pack_mm,
        aten._weight_int4pack_mm,
        aten._weight_int4pack_mm_for_cpu,
        quantized.linear_dynamic,
        quantized.linear_dynamic_fp16,
        quantized.linear_relu_dynamic,
        quantized.linear_relu_dynamic_fp16,
    )
    # torch has no formula for these ops and would count them as 0.
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        **dict.fromkeys(products, _product_flops),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        peak = peak_bytes(call)[1]
    return counter.get_total_flops(), peak


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop(query, key, value))


def _product_flops(left: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """left [..., K] times a matrix, possibly packed, -> [..., N]."""
    return 2 * left.numel() * out_shape[-1]
