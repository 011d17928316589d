"""Views that arrive one after the other: aggregated in memory that does not grow with their number.

``RunningMean``, ``RunningMoments`` and ``RunningMedian`` wrap ``torch.ops.srt.accumulate_*``, which
take a chunk of views and a state of plain tensors that they read and write once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .checks import (
    BORDERS,
    FLOATING,
    UPSAMPLES,
    WINDOW_PLANES,
    check_pair,
    check_tensor,
    check_views,
    check_word,
)
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
        check_word(name, "upsample", upsample, UPSAMPLES)
        check_word(name, "border", border, BORDERS)
        pixels = [g * p for g, p in zip(self.grid, self.patch, strict=True)]
        if any(n % s for n, s in zip(pixels, self.stride, strict=True)):
            raise ValueError(
                f"{name}: stride must divide grid * patch = {pixels}; got {list(self.stride)}"
            )
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

    def _shapes(self, batch: int, channels: int) -> dict[str, tuple[int, ...]]:
        """Of the state, as it lies in memory: channels last."""
        height, width = (
            g * p // s for g, p, s in zip(self.grid, self.patch, self.stride, strict=True)
        )
        planes = {
            name: (*lead, batch, height, width, channels) for name, lead in self._planes.items()
        }
        return {**planes, self._seen: (height, width)}

    def _allocate(self, tokens: torch.Tensor) -> None:
        self._dtype = tokens.dtype
        sums = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # or the state could not be written outside of it
            for name, shape in self._shapes(tokens.shape[1], tokens.shape[3]).items():
                dtype = torch.float64 if name == self._seen else sums
                state = torch.zeros(shape, dtype=dtype, device=tokens.device)
                self._state[name] = state if name == self._seen else state.movedim(-1, -3)

    def update(
        self, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], weights [V], as for ``ensemble``.

        Weights count against those of the other chunks: 0, or between 2^-500 and 2^500. No views
        (V = 0) only allocate the state. Raises as ``ensemble``; then nothing was added.
        """
        self._update(tokens, offsets, weights)

    def _update(
        self, tokens: torch.Tensor, offsets: torch.Tensor, *weights: torch.Tensor | None
    ) -> None:
        where, (weight,) = f"srt::{self._op}", weights or (None,)
        place = (self.grid, self.patch)
        check_tensor(where, "tokens", tokens)
        fresh, empty = not self._state, tokens.shape[:1] == (0,)
        if fresh or empty:  # before anything is allocated
            check_views(where, tokens, offsets, *place, weight, **self._modes, least=0)
        if fresh:
            self._allocate(tokens)
        elif tokens.device != (device := self._state[self._seen].device):
            rule = f"tokens must stay on the device of the stream, {device}"
            raise ValueError(f"{type(self).__name__}: {rule}; got {tokens.device}")
        elif tokens.dtype != self._dtype:
            rule = f"tokens must keep their dtype, {self._dtype}"
            raise TypeError(f"{type(self).__name__}: {rule}; got {tokens.dtype}")
        elif tokens.dim() == 4:
            *_, batch, channels, _, _ = next(iter(self._state.values())).shape
            size = (batch, channels)
            if size != (tokens.shape[1], tokens.shape[3]):
                raise ValueError(
                    f"{type(self).__name__}: tokens must keep their batch and channels, "
                    f"{list(size)}; got {[tokens.shape[1], tokens.shape[3]]}"
                )
        if empty:
            return
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

    def _fields(self) -> tuple[torch.Tensor, ...]:
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

        The state stays on the device that it lies on: ``torch.load(file, map_location=device)``.

        Raises:
            ValueError: it is of another kind of stream, has other settings, or is damaged. Then
                this stream stays as it was.
        """
        name = type(self).__name__

        def fail(rule: str, got: object) -> NoReturn:
            raise ValueError(f"{name}: {rule}; got {got}")

        def text(shape: Sequence[int], dtype: torch.dtype) -> str:
            return f"{list(shape)} of {dtype}"

        if not isinstance(state_dict, dict):
            fail("a state_dict must be a dict", type(state_dict).__name__)
        missing = {*self._settings(), "views", "dtype", "state"} - set(state_dict)
        if missing:
            fail("a state_dict must have all of its keys", f"none of {sorted(missing)}")
        settings = {
            key: tuple(value) if isinstance(value, list | tuple) else value
            for key, value in state_dict.items()
            if key in self._settings()
        }
        if settings != self._settings():
            fail(f"the state must have the settings {self._settings()}", settings)
        views, dtype, state = (state_dict[key] for key in ("views", "dtype", "state"))
        number = isinstance(views, int) and not isinstance(views, bool) and views >= 0
        if dtype not in FLOATING or not number or not isinstance(state, dict):
            fail(
                "views, dtype and state must be a number, a floating dtype and tensors",
                (views, dtype),
            )
        loaded: dict[str, torch.Tensor] = {}
        if views and not state:
            fail("a stream that has seen views must have a state", f"{views} views and none")
        if state:
            names = [*self._planes, self._seen]
            if set(state) != set(names) or not all(
                isinstance(value, torch.Tensor) for value in state.values()
            ):
                fail(f"the state must have the tensors {names}", list(state))
            first = state[names[0]]
            if len({value.device for value in state.values()}) > 1:
                fail("the state must lie on one device", [str(v.device) for v in state.values()])
            if first.dim() < 4:
                fail(f"{names[0]} must be [..., B, C, H', W']", list(first.shape))
            shapes = self._shapes(first.shape[-4], first.shape[-3])
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            for key in names:
                value, expected = state[key], torch.float64 if key == self._seen else sums
                got = text(value.shape, value.dtype)
                value = value if key == self._seen else value.movedim(-3, -1)
                if value.shape != shapes[key] or value.dtype != expected:
                    fail(f"{key} must be {text(shapes[key], expected)}", got)
                # As it was allocated, whatever a file has made of its strides.
                with torch.inference_mode(False):
                    value = value.clone(memory_format=torch.contiguous_format)
                    loaded[key] = value if key == self._seen else value.movedim(-1, -3)
        self.views, self._dtype, self._state = views, dtype, loaded


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

    def result(self) -> torch.Tensor:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        self._check_views()
        return self._state["mean"].to(self._dtype, copy=True)

    def merge(self, other: RunningMean) -> None:
        """Adds all views of another stream with the same settings; associative up to rounding."""
        self._check_same(other)
        if not other._state:
            return
        if not self._state:
            self.load_state_dict(other.state_dict())
            return
        with torch.inference_mode(False), torch.no_grad():
            mine, theirs = self._state, other._state
            total = mine["weight"] + theirs["weight"]
            keep, share = (self._shares(s["weight"], total) for s in (mine, theirs))
            self._state = {**self._joined(theirs, keep, share), "weight": total}
            self.views += other.views

    def _joined(
        self, other: dict[str, torch.Tensor], keep: torch.Tensor, share: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"mean": (share * other["mean"]).add_(keep * self._state["mean"])}

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


class RunningMoments(RunningMean):
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

    _op, _planes = "accumulate_moments_", {"mean": (), "var": ()}

    def variance(self) -> torch.Tensor:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        self._check_views()
        return self._state["var"].to(self._dtype, copy=True)

    def _joined(
        self, other: dict[str, torch.Tensor], keep: torch.Tensor, share: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        # Shares before squares: no cell that one stream alone covers multiplies an overflow by 0.
        apart = (other["mean"] - self._state["mean"]).mul_((keep * share).sqrt()).square_()
        var = (share * other["var"]).add_(keep * self._state["var"])
        return {**super()._joined(other, keep, share), "var": var.add_(apart)}

    def _reduced(self, share: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
        mean = super()._reduced(share, group)["mean"]
        apart = (self._state["mean"] - mean).mul_(share.sqrt()).square_()
        return {"mean": mean, "var": _sum_over(apart.add_(self._state["var"] * share), group)}


class RunningMedian(_Running):
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

    _op, _planes, _seen = "accumulate_median_", {"window": (WINDOW_PLANES,)}, "count"

    def update(
        self, tokens: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], as for ``ensemble``; no weights.

        No views (V = 0) only allocate the state. Raises as ``ensemble``; then nothing was added.
        """
        if weights is not None:
            raise ValueError(f"RunningMedian: weights must be None for a median; got {weights!r}")
        self._update(tokens, offsets)

    def result(self) -> torch.Tensor:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        return self._fields()[0]

    @torch.no_grad()
    def _fields(self) -> tuple[torch.Tensor, ...]:
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
        self._refuse("merge")

    def all_reduce(self, group: Any = None) -> NoReturn:
        """Raises: the windows of several streams do not tell the median of all."""
        self._refuse("all_reduce")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise NotImplementedError(
            f"RunningMedian: {what} is not defined: a window holds the 7 values around the median "
            "of its own views, and the median of both streams may lie in neither. Give one stream "
            "all views, or merge means"
        )
