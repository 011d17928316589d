"""Views that arrive one after the other: aggregated in memory that does not grow with their number.

``RunningMean``, ``RunningMoments`` and ``RunningMedian`` wrap ``torch.ops.srt.accumulate_*``, which
take a chunk of views and a state of plain tensors that they read and write once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .checks import WINDOW_PLANES, check_pair, check_tensor
from .ops import accumulate


class _Running:
    """A stream of views: its settings, its state, and what all of its kinds do alike."""

    _op: str
    _planes: dict[str, tuple[int, ...]]  # of the state [*planes, B, C, H', W'], by name
    _seen: str  # the state [H', W'] that tells what each cell has got

    def __init__(
        self,
        grid: Sequence[int],
        patch: Sequence[int],
        *,
        upsample: str = "bilinear",
        border: str = "coverage",
        stride: int | Sequence[int] = 1,
    ) -> None:
        name = type(self).__name__
        self.grid, self.patch = check_pair(name, "grid", grid), check_pair(name, "patch", patch)
        self.stride = check_pair(name, "stride", stride)
        self.upsample, self.border = upsample, border
        self.reset()

    def reset(self) -> None:
        """Forgets every view, and the sizes and dtype of the tokens."""
        self.views = 0
        self._state: dict[str, torch.Tensor] = {}
        self._dtype = torch.float32  # of the tokens

    @property
    def _modes(self) -> dict[str, Any]:
        return {"upsample": self.upsample, "border": self.border, "stride": self.stride}

    def _allocate(self, tokens: torch.Tensor) -> None:
        self._dtype = tokens.dtype
        sums = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        height, width = (
            g * p // s for g, p, s in zip(self.grid, self.patch, self.stride, strict=True)
        )
        batch, channels = tokens.shape[1], tokens.shape[3]
        for name, planes in self._planes.items():
            shape = (*planes, batch, height, width, channels)
            self._state[name] = tokens.new_zeros(shape, dtype=sums).movedim(-1, -3)
        self._state[self._seen] = tokens.new_zeros(height, width, dtype=torch.float64)

    def update(self, tokens: torch.Tensor, offsets: torch.Tensor) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], as for ``ensemble``.

        No views (V = 0) only allocate the state. Raises as ``ensemble``; then nothing was added.
        """
        self._update(tokens, offsets)

    def _update(
        self, tokens: torch.Tensor, offsets: torch.Tensor, *weights: torch.Tensor | None
    ) -> None:
        check_tensor(type(self).__name__, "tokens", tokens)
        fresh = not self._state
        if fresh:
            if tokens.dim() != 4:
                rule = "tokens must have 4 dimensions, [V, B, N, C]"
                raise ValueError(f"srt::{self._op}: {rule}; got {list(tokens.shape)}")
            self._allocate(tokens)
        elif tokens.dtype != self._dtype:
            rule = f"tokens must keep their dtype, {self._dtype}"
            raise TypeError(f"{type(self).__name__}: {rule}; got {tokens.dtype}")
        if tokens.dim() == 4 and tokens.shape[0] == 0:
            return
        place = (self.grid, self.patch)
        try:
            accumulate(
                self._op, self._state, tokens.detach(), offsets, *place, *weights, **self._modes
            )
        except BaseException:
            if fresh:
                self.reset()
            raise
        self.views += tokens.shape[0]

    def _check_views(self) -> None:
        if not self._state:
            raise ValueError(f"{type(self).__name__}: no views were added")

    def fields(self) -> tuple[torch.Tensor, ...]:
        """The results, each [B, C, H', W'] in the dtype of the tokens, or the state itself.

        For the last use of a stream: later updates may write to them.
        """
        self._check_views()
        return tuple(self._state[name].to(self._dtype) for name in self._planes)

    def _check_same(self, other: object) -> None:
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"{name}: merge takes another {name}; got {type(other).__name__}")
        if other._settings() != self._settings():
            raise ValueError(
                f"{name}: both must have the same settings, {self._settings()}; "
                f"got {other._settings()}"
            )
        if self._state and other._state:
            mine, theirs = (
                (s._dtype, *(tuple(t.shape) for t in s._state.values())) for s in (self, other)
            )
            if mine != theirs:
                raise ValueError(
                    f"{name}: both must have tokens of one dtype and size, {mine}; got {theirs}"
                )

    def _settings(self) -> dict[str, Any]:
        return {"grid": self.grid, "patch": self.patch, **self._modes}

    def _shares(self, other: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """other / total [H', W'], 0 where both are; in the precision of the state."""
        state = next(iter(self._state.values()))
        return torch.where(total > 0, other / total, 0).to(state.dtype)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything: settings, number of views, state."""
        state = {name: tensor.clone() for name, tensor in self._state.items()}
        return {**self._settings(), "views": self.views, "dtype": self._dtype, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: the same result, bit for bit.

        Raises:
            ValueError: it is of another kind of stream, or has other settings.
        """
        name = type(self).__name__
        names = [*self._planes, self._seen]
        state = state_dict.get("state", {})
        if state and list(state) != names:
            raise ValueError(f"{name}: the state must have {names}; got {list(state)}")
        settings = {key: state_dict.get(key) for key in self._settings()}
        settings |= {key: tuple(settings[key] or ()) for key in ("grid", "patch", "stride")}
        if settings != self._settings():
            raise ValueError(
                f"{name}: the state must have the settings {self._settings()}; got {settings}"
            )
        self.views, self._dtype = state_dict["views"], state_dict["dtype"]
        # As they were allocated, whatever a file has made of their strides.
        self._state = {
            key: value.clone()
            if key == self._seen
            else value.movedim(-3, -1).contiguous().clone().movedim(-1, -3)
            for key, value in state.items()
        }


class RunningMean(_Running):
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

    _op, _planes, _seen = "accumulate_mean_", {"mean": ()}, "weight"

    def update(
        self, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], weights [V], as for ``ensemble``.

        Weights count against those of the other chunks: 0, or between 2^-500 and 2^500. No views
        (V = 0) only allocate the state. Raises as ``ensemble``; then nothing was added.
        """
        self._update(tokens, offsets, weights)

    def result(self) -> torch.Tensor:
        """[B, C, H', W'] in the dtype of the tokens."""
        self._check_views()
        return self._state["mean"].to(self._dtype, copy=True)

    @torch.no_grad()
    def merge(self, other: RunningMean) -> None:
        """Adds all views of another stream with the same settings; associative up to rounding."""
        self._check_same(other)
        if not other._state:
            return
        if not self._state:
            self.load_state_dict(other.state_dict())
            return
        total = self._state["weight"] + other._state["weight"]
        keep, share = (self._shares(s._state["weight"], total) for s in (self, other))
        self._state["mean"].mul_(keep).add_(share * other._state["mean"])
        self._state["weight"] = total
        self.views += other.views

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Makes this the stream of the views of all processes of a ``torch.distributed`` group.

        Every process must have had an ``update``; one without views calls it with none.
        """
        share = self._all_reduce_weight(group)
        self._state["mean"] = _sum_over(self._state["mean"] * share, group)

    def _all_reduce_weight(self, group: Any) -> torch.Tensor:
        """Joins weights and numbers of views; the share of this process [H', W']."""
        self._check_views()
        total = _sum_over(self._state["weight"].clone(), group)
        share = self._shares(self._state["weight"], total)
        self._state["weight"] = total
        self.views = int(_sum_over(total.new_tensor([self.views]), group).item())
        return share


def _sum_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of the tensors of all processes; reduced as dense memory, kept in its strides."""
    dense = tensor if tensor.is_contiguous() else tensor.movedim(-3, -1).contiguous()
    torch.distributed.all_reduce(dense, group=group)
    return dense if tensor.is_contiguous() else dense.movedim(-1, -3)


class RunningMoments(RunningMean):
    """Mean and variance of a stream of views: ``ensemble_moments`` in chunks.

    State, whatever the number of views: mean and population variance [B, C, H', W'] and the weight
    of each cell [H', W']. Chunks and streams are joined as Chan, Golub and LeVeque do ("Updating
    formulae and a pairwise algorithm for computing sample variances", 1979).

    Args:
        grid, patch, upsample, border, stride: as for :func:`srt_ext.ensemble`.

    Example:
        >>> running = RunningMoments(grid=(1, 1), patch=(1, 1))
        >>> for value in (1.0, 3.0):
        ...     running.update(torch.full((1, 1, 1, 1), value), torch.zeros(1, 2))
        >>> running.result().item(), running.variance().item()
        (2.0, 1.0)
    """

    _op, _planes = "accumulate_moments_", {"mean": (), "var": ()}

    def variance(self) -> torch.Tensor:
        """[B, C, H', W'] in the dtype of the tokens."""
        self._check_views()
        return self._state["var"].to(self._dtype, copy=True)

    @torch.no_grad()
    def merge(self, other: RunningMean) -> None:
        """Adds all views of another stream with the same settings; associative up to rounding."""
        self._check_same(other)
        if self._state and other._state:
            total = self._state["weight"] + other._state["weight"]
            keep, share = (self._shares(s._state["weight"], total) for s in (self, other))
            apart = (other._state["mean"] - self._state["mean"]).square_().mul_(keep * share)
            self._state["var"].mul_(keep).add_(share * other._state["var"]).add_(apart)
        super().merge(other)

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Makes this the stream of the views of all processes of a ``torch.distributed`` group.

        Every process must have had an ``update``; one without views calls it with none.
        """
        share = self._all_reduce_weight(group)
        mean = _sum_over(self._state["mean"] * share, group)
        spread = (self._state["mean"] - mean).square_().add_(self._state["var"])
        self._state["var"] = _sum_over(spread.mul_(share), group)
        self._state["mean"] = mean


class RunningMedian(_Running):
    """The lower median of a stream of views, approximately: ``reduce="median"`` in chunks.

    State, whatever the number of views: the 7 values around the median of each element, in order,
    with the place of the median among them, [8, B, C, H', W'] in float32 (float64 for float64
    tokens), and the number of views of each cell [H', W'].

    The median is exact as long as it stays among the 7 values, always up to 7 views. Where it
    leaves them, the window follows it by the mean gap between its values. So the order of the views
    matters: in the raster order of a grid, where the values drift, the error is ten times that in
    an order which spreads them, such as :func:`srt_ext.views.spread` gives
    (benchmarks/streaming.py measures both). Within a chunk the order is spread.

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

    _op, _planes, _seen = "accumulate_median_", {"window": (WINDOW_PLANES,)}, "count"

    def result(self) -> torch.Tensor:
        """[B, C, H', W'] in the dtype of the tokens."""
        return self.fields()[0]

    @torch.no_grad()
    def fields(self) -> tuple[torch.Tensor, ...]:
        """As :meth:`result`."""
        self._check_views()
        *values, place = self._state["window"]
        median = values[0].clone()
        for i, value in enumerate(values[1:], 1):
            torch.where(place >= i, value, median, out=median)
        torch.where(place.isnan(), place, median, out=median)
        return (median.masked_fill_(self._state["count"] == 0, 0).to(self._dtype),)

    def merge(self, other: RunningMedian) -> NoReturn:
        """Raises: the windows of two streams do not tell the median of both."""
        raise NotImplementedError(
            "RunningMedian: merge is not defined: a window holds the 7 values around the median of "
            "its own views, and the median of both streams may lie in neither. Give one stream all "
            "views, or merge means"
        )
