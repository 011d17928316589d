"""Views that arrive one after the other: aggregated in memory that does not grow with their number.

``RunningMean``, ``RunningMoments`` and ``RunningMedian`` wrap ``torch.ops.srt.accumulate_*``, which
take a chunk of views and a state of plain tensors that they read and write once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from ._streams import MeanStream, MedianStream, MomentsStream, Stream
from .checks import FLOATING, check_pair, check_tensor, check_views
from .ops import accumulate


class _Tensors(Stream[torch.Tensor]):
    """A stream whose arrays are tensors."""

    _float32, _float64 = torch.float32, torch.float64

    def update(
        self, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], weights [V], as for ``ensemble``.

        Weights count against those of the other chunks: 0, or between 2^-500 and 2^500; a median
        takes none. No views (V = 0) only allocate the state. Raises as ``ensemble``; then nothing
        was added.
        """
        self._update(tokens, offsets, weights)

    def _pair(self, name: str, value: object) -> tuple[int, int]:
        return check_pair(type(self).__name__, name, value)

    def _check_array(self, where: str, name: str, value: object) -> None:
        check_tensor(where, name, value)

    def _check_chunk(self, where: str, tokens: torch.Tensor, offsets: Any, weights: Any) -> None:
        place = (self.grid, self.patch)
        check_views(where, tokens, offsets, *place, weights, **self._modes, least=0)

    def _check_device(self, tokens: torch.Tensor) -> None:
        device = self._state[self._seen].device
        if tokens.device != device:
            self._fail(f"tokens must stay on the device of the stream, {device}", tokens.device)

    def _check_devices(self, state: dict[str, torch.Tensor]) -> None:
        devices = [tensor.device for tensor in state.values()]
        if len(set(devices)) > 1:
            self._fail("the state must lie on one device", [str(device) for device in devices])

    def _accumulate(self, tokens: torch.Tensor, offsets: Any, *weights: Any) -> None:
        place = (self.grid, self.patch)
        accumulate(self._op, self._state, tokens, offsets, *place, *weights, **self._modes)

    def _is_floating(self, dtype: object) -> bool:
        return dtype in FLOATING

    def _is_array(self, value: object) -> bool:
        return isinstance(value, torch.Tensor)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=like.device)

    def _dense(self, array: torch.Tensor) -> torch.Tensor:
        return array.clone(memory_format=torch.contiguous_format)

    def _cast(self, array: torch.Tensor, copy: bool) -> torch.Tensor:
        return array.to(self._dtype, copy=copy)

    def _ratio(self, part: torch.Tensor, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.where(total > 0, part / total, 0).to(dtype)

    def _put(self, target: torch.Tensor, where: torch.Tensor, value: torch.Tensor) -> None:
        torch.where(where, value, target, out=target)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # Or the state could not be written outside of an inference mode in which it was made.
        with torch.inference_mode(False), torch.no_grad():
            yield


class RunningMean(_Tensors, MeanStream[torch.Tensor]):
    """The mean of a stream of views: ``ensemble`` in chunks.

    State, whatever the number of views: the mean [B, C, H', W'] in float32 (float64 for float64
    tokens) and the weight of each cell [H', W'] in float64. The result equals that of
    :func:`srt_ext.ensemble` over all views within float32 rounding, for any chunks.

    Args:
        grid, patch, upsample, border, stride: as for :func:`srt_ext.ensemble`.

    Example:
        >>> running = RunningMean(grid=(1, 2), patch=(1, 1))
        >>> for value in (1.0, 2.0, 6.0):
        ...     running.update(torch.full((1, 1, 2, 1), value), torch.zeros(1, 2))
        >>> running.result().flatten()
        tensor([3., 3.])
    """

    def all_reduce(self, group: Any = None) -> None:
        """Makes this the stream of the views of all processes of a ``torch.distributed`` group.

        Every process must have had an ``update``; one without views calls it with none. Raises on
        all of them if one has not, or has other settings; then nothing was changed.
        """
        shapes = [tuple(tensor.shape) for tensor in self._state.values()]
        own = (type(self).__name__, self._settings(), str(self._dtype), shapes, self.views)
        every: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(every, own, group=group)
        if any(one[:4] != own[:4] for one in every) or not shapes:
            raise ValueError(
                f"{type(self).__name__}: all processes must have a stream of the same settings, "
                f"dtype and size; got {[one[:4] for one in every]}"
            )
        with torch.inference_mode(False), torch.no_grad():
            total = _sum_over(self._state["weight"], group)
            share = self._shares(self._state["weight"], total)
            self._state = {**self._reduced(share, group), "weight": total}
            self.views = sum(one[4] for one in every)

    def _reduced(self, share: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
        return {"mean": _sum_over(self._state["mean"] * share, group)}


def _sum_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of the tensors of all processes, in the strides of this one."""
    dense = tensor if tensor.dim() == 2 else tensor.movedim(-3, -1)  # as a state lies in memory
    dense = dense.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(dense, group=group)
    return dense if tensor.dim() == 2 else dense.movedim(-1, -3)


class RunningMoments(RunningMean, MomentsStream[torch.Tensor]):
    """Mean and variance of a stream of views: ``ensemble_moments`` in chunks.

    State, whatever the number of views: mean and population variance [B, C, H', W'] and the weight
    of each cell [H', W']. Chunks and streams are joined as Chan, Golub and LeVeque do ("Updating
    formulae and a pairwise algorithm for computing sample variances", 1979). The mean is rounded to
    float32 between chunks, and the spread is taken from it: where it is 1e4 times the spread the
    variance is within 0.5 % (that of :func:`srt_ext.ensemble_moments`, in one call, within 0.2 %).

    Args:
        grid, patch, upsample, border, stride: as for :func:`srt_ext.ensemble`.

    Example:
        >>> running = RunningMoments(grid=(1, 1), patch=(1, 1))
        >>> for value in (1.0, 3.0):
        ...     running.update(torch.full((1, 1, 1, 1), value), torch.zeros(1, 2))
        >>> running.result().item(), running.variance().item()
        (2.0, 1.0)
    """

    def _reduced(self, share: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
        mean = super()._reduced(share, group)["mean"]
        apart = (self._state["mean"] - mean).mul_(share.sqrt()).square_()
        return {"mean": mean, "var": _sum_over(apart.add_(self._state["var"] * share), group)}


class RunningMedian(_Tensors, MedianStream[torch.Tensor]):
    """The lower median of a stream of views, approximately: ``reduce="median"`` in chunks.

    State, whatever the number of views: the 7 values around the median of each element, in order,
    with the place of the median among them, [8, B, C, H', W'] in float32 (float64 for float64
    tokens), and the number of views of each cell [H', W'].

    The median is exact as long as it stays among the 7 values, always up to 7 views. Where it
    leaves them, the window follows it by the mean gap between its values: slowly, where most values
    are equal or lie in two heaps far apart. So the order of the views matters: in the raster order
    of a grid, where the values drift, the error is ten (225 views) to fifty (49 views) times that
    in an order which spreads them, such as :func:`srt_ext.views.spread` gives
    (benchmarks/README.md has both). Within a chunk the order is spread.

    Two windows do not tell the median of both streams: there is no merge.

    After Munro and Paterson, "Selection and sorting with limited storage", 1980.

    Args:
        grid, patch, upsample, border, stride: as for :func:`srt_ext.ensemble`.

    Example:
        >>> running = RunningMedian(grid=(1, 1), patch=(1, 1))
        >>> for value in (5.0, 1.0, 9.0):
        ...     running.update(torch.full((1, 1, 1, 1), value), torch.zeros(1, 2))
        >>> running.result().item()
        5.0
    """

    def all_reduce(self, group: Any = None) -> NoReturn:
        """Raises: the windows of several streams do not tell the median of all."""
        self._refuse("all_reduce")
