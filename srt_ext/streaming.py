"""Aggregates a stream of views in memory that does not grow with the number of views.

``RunningMean``, ``RunningMoments`` and ``RunningMedian`` wrap ``torch.ops.srt.accumulate_*``. Each
of these ops adds a chunk of views to a state of plain tensors, which it reads and writes once. The
base classes do not depend on the array library: ``srt_ext.numpy`` has the same classes for NumPy
arrays and does not need torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, NoReturn, TypeVar

from . import _library
from ._validation import check_cells, check_pair, check_tensor, check_words, is_integer
from .options import Border, Pair, Stride, Upsample

if _library.unavailable is None:
    import torch

    from . import ops

A = TypeVar("A", bound=Any)  # an array of torch or NumPy
N = TypeVar("N")  # the type of offsets and weights in that library

WINDOW_PLANES = 8  # planes of a median state: 7 values and the position of the median


def _device(array: Any) -> object:
    return getattr(array, "device", None)  # NumPy 1 has none


class Stream(Generic[A, N]):
    """Base class of the streams: settings, state, and the operations common to all kinds."""

    _arrays: Any  # the operations that differ between array libraries: _Tensors, or NumPy's
    _op: str  # the op that adds a chunk to the state
    _planes: dict[str, tuple[int, ...]]  # leading sizes of each state array [*planes, B, C, H', W']
    _total: str  # name of the state array [H', W']: total weight or number of views per cell
    _weighted = True

    def __init__(
        self,
        grid: Pair,
        patch: Pair,
        *,
        upsample: Upsample = "bilinear",
        border: Border = "coverage",
        stride: Stride = 1,
    ) -> None:
        name = type(self).__name__
        check_words(name, upsample=upsample, border=border)
        self._cells = check_cells(name, grid, patch, stride)
        self.grid, self.patch = check_pair(name, "grid", grid), check_pair(name, "patch", patch)
        self.stride = check_pair(name, "stride", stride)
        self.upsample, self.border = upsample, border
        self.reset()

    def __copy__(self) -> Stream[A, N]:
        return copy.deepcopy(self)  # the copy must not share its state

    def reset(self) -> None:
        """Removes all views. The next update may have tokens of another size, dtype and device."""
        self.views = 0
        self._state: dict[str, Any] = {}
        self._dtype = self._arrays.float32  # of the tokens

    def update(self, tokens: A, offsets: N, weights: N | None = None) -> None:
        """Adds a chunk of views.

        Args:
            tokens: [V, B, N, C], as for ``ensemble``; device, dtype, B and C must be the same in
                every chunk. V = 0 only allocates the state.
            offsets: [V, 2], (dy, dx) in pixels, as for ``ensemble``.
            weights: [V] or None for weights of 1; each is 0 or between 2^-500 and 2^500. Weights
                are relative to the weights of all other chunks. A median does not support weights.

        Raises:
            TypeError: an argument has the wrong type or dtype. The stream is unchanged.
            ValueError: an argument has a wrong shape or value. The stream is unchanged.
        """
        if weights is not None and not self._weighted:
            self._fail("weights must be None for a median", type(weights).__name__)
        self._arrays.check_array(f"srt::{self._op}", "tokens", tokens)
        fresh, empty = not self._state, tokens.shape[:1] == (0,)
        views = (tokens, offsets, self.grid, self.patch)
        if fresh or empty:  # checked before the state is allocated
            self._arrays.check_chunk(self._op, *views, weights, **self._modes)
        if fresh:
            self._allocate(tokens)
        else:
            self._check_goes_on(tokens)
        if empty:
            return
        given = (*views, weights) if self._weighted else views
        try:
            self._arrays.accumulate(self._op, list(self._state.values()), *given, **self._modes)
        except BaseException:
            if fresh:
                self.reset()
            raise
        self.views += tokens.shape[0]

    @property
    def _modes(self) -> dict[str, Any]:
        return {"upsample": self.upsample, "border": self.border, "stride": self.stride}

    def _settings(self) -> dict[str, Any]:
        return {"grid": self.grid, "patch": self.patch, **self._modes}

    def _fail(self, rule: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
        raise kind(f"{type(self).__name__}: {rule}; got {got}")

    # ---- the state ------------------------------------------------------------------------------

    def _layout(self, batch: int, channels: int, dtype: Any) -> dict[str, tuple[Any, Any]]:
        """Shape and dtype of each state array for tokens of this dtype."""
        double, shape = self._arrays.float64, (batch, channels, *self._cells)
        sums = double if dtype == double else self._arrays.float32
        planes = {name: ((*lead, *shape), sums) for name, lead in self._planes.items()}
        return {**planes, self._total: (self._cells, double)}

    def _allocate(self, tokens: Any) -> None:
        self._dtype = tokens.dtype
        layout = self._layout(tokens.shape[1], tokens.shape[3], tokens.dtype)
        with self._arrays.writing():
            for name, (shape, dtype) in layout.items():
                self._state[name] = self._copied(self._arrays.zeros(shape, dtype, tokens))

    def _check_goes_on(self, tokens: Any) -> None:
        """Checks that the tokens have the device, dtype and size of the previous chunks."""
        first = next(iter(self._state.values()))
        device, given = _device(first), _device(tokens)
        if given != device:
            self._fail(f"tokens must be on the device of the stream, {device}", given)
        if tokens.dtype != self._dtype:
            rule = f"tokens must have the dtype of the stream, {self._dtype}"
            self._fail(rule, tokens.dtype, TypeError)
        size, new = list(first.shape[-4:-2]), list(tokens.shape[1::2])
        if new != size and tokens.ndim == 4:
            self._fail(f"tokens must have the [B, C] of the stream, {size}", new)

    def _check_has_views(self) -> None:
        if not self._state:
            raise ValueError(f"{type(self).__name__}: the stream has no views; call update first")

    def result(self) -> A:
        """Returns the aggregate of all views added so far.

        Returns:
            [B, C, H', W'] in the dtype of the tokens. Cells in which no view counts are 0.

        Raises:
            ValueError: ``update`` was not called.
        """
        return self._result(next(iter(self._planes)))

    def _result(self, name: str) -> A:
        self._check_has_views()
        result: A = self._arrays.cast(self._state[name], self._dtype, copy=True)
        return result

    def _fields(self) -> tuple[A, ...]:
        """Returns the results, each [B, C, H', W'] in the dtype of the tokens.

        They may be the state itself, so later updates may overwrite them.
        """
        self._check_has_views()
        return tuple(self._arrays.cast(self._state[name], self._dtype) for name in self._planes)

    def _copied(self, array: Any) -> Any:
        """Copies a state array to contiguous memory with channels last."""
        arrays = self._arrays
        if array.ndim == 2:
            return arrays.dense(array)
        return arrays.moveaxis(arrays.dense(arrays.moveaxis(array, -3, -1)), -1, -3)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the settings, the number of views and the state."""
        state = {name: self._copied(array) for name, array in self._state.items()}
        return {**self._settings(), "views": self.views, "dtype": self._dtype, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`. Later results are bitwise equal.

        The arrays stay on their device; use ``torch.load(file, map_location=device)`` to move
        tensors.

        Args:
            state_dict: a result of :meth:`state_dict` of the same kind of stream.

        Raises:
            ValueError: ``state_dict`` is invalid, or is from another kind of stream or a stream
                with other settings. This stream is unchanged.
        """
        if not isinstance(state_dict, dict):
            self._fail("state_dict must be a dict", type(state_dict).__name__)
        own, values = self._settings(), ("views", "dtype", "state")
        missing = {*own, *values} - set(state_dict)
        if missing:
            rule = f"state_dict must also have the keys {sorted(missing)}"
            self._fail(rule, sorted(map(str, state_dict)))
        settings = {key: state_dict[key] for key in own}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        if settings != own:
            self._fail(f"state_dict must have the settings of the stream, {own}", settings)
        views, dtype, state = (state_dict[key] for key in values)
        number = is_integer(views) and int(views) >= 0
        if not self._arrays.is_floating(dtype) or not number or not isinstance(state, dict):
            rule = "views must be an integer >= 0, dtype a floating-point dtype and state a dict"
            self._fail(rule, [views, dtype, type(state).__name__])
        if views and not state:
            self._fail("state must not be empty if views > 0", f"{views} views and an empty state")
        loaded: dict[str, Any] = {}
        if state:
            self._check_state(state, dtype)
            with self._arrays.writing():
                names = (*self._planes, self._total)
                loaded = {name: self._copied(state[name]) for name in names}
        self.views, self._dtype, self._state = int(views), dtype, loaded

    def _check_state(self, state: dict[str, Any], dtype: Any) -> None:
        """Checks that these arrays are a state for tokens of this dtype."""
        names = [*self._planes, self._total]
        if set(state) != set(names) or not all(map(self._arrays.is_array, state.values())):
            self._fail(f"state must have the arrays {names}", list(state))
        devices = [_device(array) for array in state.values()]
        if len(set(devices)) > 1:
            self._fail("all arrays of state must be on one device", list(map(str, devices)))
        first = state[names[0]]
        if first.ndim < 4:
            self._fail(f"{names[0]} must be [..., B, C, H', W']", list(first.shape))
        for name, layout in self._layout(first.shape[-4], first.shape[-3], dtype).items():
            got = tuple(state[name].shape), state[name].dtype
            if got != layout:
                rule, found = (f"{list(shape)} of {dtype}" for shape, dtype in (layout, got))
                self._fail(f"{name} must be {rule}", found)


class MeanStream(Stream[A, N]):
    _op, _planes, _total = "accumulate_mean_", {"mean": ()}, "weight"

    def merge(self, other: MeanStream[A, N]) -> None:
        """Adds all views of another stream. Merging is associative up to rounding.

        Args:
            other: a stream of the same kind with the same settings and the same size and dtype of
                tokens. It is not changed.

        Raises:
            TypeError: ``other`` is another kind of object.
            ValueError: the settings, sizes or dtypes differ.
        """
        self._check_same(other)
        if not other._state:
            return
        if not self._state:
            self.load_state_dict(other.state_dict())
            return
        with self._arrays.writing():
            mine, theirs = self._state, other._state
            total = mine["weight"] + theirs["weight"]
            keep, share = (self._shares(s["weight"], total) for s in (mine, theirs))
            self._state = {**self._joined(theirs, keep, share), "weight": total}
            self.views += other.views

    def _check_same(self, other: object) -> None:
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"{name}: other must be a {name}; got {type(other).__name__}")
        if other._settings() != self._settings():
            self._fail(f"other must have the same settings, {self._settings()}", other._settings())
        mine, theirs = (
            (stream._dtype, *(tuple(array.shape) for array in stream._state.values()))
            for stream in (self, other)
        )
        if self._state and other._state and mine != theirs:
            self._fail(f"other must have the same dtype and sizes, {mine}", theirs)

    def _shares(self, part: Any, total: Any) -> Any:
        """part / total [H', W'] in the precision of the state; 0 where both are 0."""
        # 1e-300 is below every positive weight of a stream: these are at least 2^-500.
        return self._arrays.cast(part / total.clip(1e-300), self._state["mean"].dtype)

    def _joined(self, other: dict[str, Any], keep: Any, share: Any) -> dict[str, Any]:
        mean = share * other["mean"]
        mean += keep * self._state["mean"]
        return {"mean": mean}


class MomentsStream(MeanStream[A, N]):
    _op, _planes = "accumulate_moments_", {"mean": (), "var": ()}

    def variance(self) -> A:
        """Returns the population variance of all views added so far.

        Returns:
            [B, C, H', W'] in the dtype of the tokens. Cells in which no view counts are 0.

        Raises:
            ValueError: ``update`` was not called.
        """
        return self._result("var")

    def _joined(self, other: dict[str, Any], keep: Any, share: Any) -> dict[str, Any]:
        # keep * share * apart^2, in an order that never computes 0 * inf in a cell that only one
        # stream covers.
        apart = other["mean"] - self._state["mean"]
        var = keep * apart
        apart *= share
        var *= apart
        var += share * other["var"]
        var += keep * self._state["var"]
        return {**super()._joined(other, keep, share), "var": var}


class MedianStream(Stream[A, N]):
    _op, _planes, _total = "accumulate_median_", {"window": (WINDOW_PLANES,)}, "count"
    _weighted = False

    def _fields(self) -> tuple[A, ...]:
        return (self.result(),)

    def _result(self, name: str) -> A:
        self._check_has_views()
        arrays = self._arrays
        with arrays.writing():
            *values, place = self._state[name]
            median = self._copied(values[0])
            for i, value in enumerate(values[1:], 1):
                arrays.put(median, place >= i, value)
            arrays.put(median, place != place, place)
            zero = arrays.zeros((), median.dtype, median)
            arrays.put(median, self._state["count"] == 0, zero)
            result: A = arrays.cast(median, self._dtype)
            return result

    def merge(self, other: MedianStream[A, N]) -> NoReturn:
        """Not supported: always raises a :class:`NotImplementedError` (see the class)."""
        self._refuse("merge")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise NotImplementedError(
            f"RunningMedian: {what} is not supported. A stream keeps only the 7 values around the "
            "median of its own views, and the median of all views may not be among them. Add all "
            "views to one stream, or use RunningMean"
        )


# ---- torch --------------------------------------------------------------------------------------


class _Tensors:
    """The torch operations of a stream. ``srt_ext.numpy._Arrays`` is the NumPy version."""

    check_array = staticmethod(check_tensor)
    if _library.unavailable is None:
        float32, float64, moveaxis = torch.float32, torch.float64, staticmethod(torch.moveaxis)

    def is_array(self, value: object) -> bool:
        """Whether ``value`` is a dense tensor."""
        if not isinstance(value, torch.Tensor) or value.is_nested:
            return False
        return value.layout == torch.strided

    def is_floating(self, dtype: object) -> bool:
        """Whether tokens may have this dtype."""
        return dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def check_chunk(self, op: str, *views: Any, **modes: Any) -> None:
        """Checks a chunk with any number of views before the state exists."""
        ops.check_views(op, *views, stream=True, **modes)

    def accumulate(self, op: str, state: Sequence[Any], *views: Any, **modes: Any) -> None:
        """Adds a chunk to the state. If it raises, the state is unchanged."""
        ops.accumulate(op, *state, *views, **modes)

    def zeros(self, shape: Sequence[int], dtype: Any, like: torch.Tensor) -> torch.Tensor:
        """An expanded 0 of this shape on the device of ``like``."""
        return torch.zeros((), dtype=dtype, device=like.device).expand(shape)

    def dense(self, array: torch.Tensor) -> torch.Tensor:
        """A contiguous copy."""
        return array.clone(memory_format=torch.contiguous_format)

    def cast(self, array: torch.Tensor, dtype: Any, copy: bool = False) -> torch.Tensor:
        return array.to(dtype, copy=copy)

    def put(self, target: torch.Tensor, where: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrites the elements of ``target`` where ``where`` is true."""
        torch.where(where, value, target, out=target)

    def writing(self) -> AbstractContextManager[None]:
        """A context in which state arrays are created."""
        # A state created in inference mode could not be written outside it.
        return ops.state_mode()


class RunningMean(MeanStream["torch.Tensor", "torch.Tensor"]):
    """The mean of a stream of views, computed in chunks of any size.

    The state is the mean [B, C, H', W'] in float32 (float64 for float64 tokens) and the weight of
    each cell [H', W'] in float64. Its size does not depend on the number of views. For any chunk
    sizes, the result equals :func:`srt_ext.ensemble` over all views up to float32 rounding.

    Args:
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both, as for :func:`srt_ext.ensemble`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> running = RunningMean(grid=(1, 2), patch=(1, 1))
        >>> for value in (1.0, 2.0, 6.0):
        ...     running.update(torch.full((1, 1, 2, 1), value), torch.zeros(1, 2))
        >>> running.result().flatten()
        tensor([3., 3.])
    """

    _arrays = _Tensors()

    def all_reduce(self, group: Any = None) -> None:
        """Merges the streams of all processes; afterwards every process has the views of all.

        Every process must have called ``update`` before. A process without views calls it with
        V = 0.

        Args:
            group: a ``torch.distributed`` group; None means the default group.

        Raises:
            ValueError: a process has not called ``update``, or its settings, dtype or sizes differ.
                It is raised in every process, and no stream is changed.
        """
        shapes = [tuple(tensor.shape) for tensor in self._state.values()]
        own = (type(self).__name__, self._settings(), str(self._dtype), shapes, self.views)
        every: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(every, own, group=group)
        if any(one[:4] != own[:4] for one in every) or not shapes:
            raise ValueError(
                f"{type(self).__name__}: all processes must have a stream with the same settings, "
                f"dtype and sizes; got {[one[:4] for one in every]}"
            )
        with ops.state_mode():
            total = self._sum_over(self._state["weight"], group)
            share = self._shares(self._state["weight"], total)
            self._state = {**self._reduced(share, group), "weight": total}
            self.views = sum(one[4] for one in every)

    def _reduced(self, share: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
        return {"mean": self._sum_over(self._state["mean"] * share, group)}

    def _sum_over(self, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        """Sums a tensor over all processes. The result has the strides of the state."""
        total: torch.Tensor = self._copied(tensor)
        dense = total if total.ndim == 2 else total.movedim(-3, -1)  # the layout of a state
        torch.distributed.all_reduce(dense, group=group)
        return total


class RunningMoments(RunningMean, MomentsStream["torch.Tensor", "torch.Tensor"]):
    """The mean and variance of a stream of views, computed in chunks of any size.

    The state is the mean and the population variance [B, C, H', W'] and the weight of each cell
    [H', W']. Its size does not depend on the number of views. The mean is rounded to float32
    between chunks, which limits the accuracy of the variance: if the mean is 1e4 times the standard
    deviation, the variance is accurate within 0.5 % (:func:`srt_ext.ensemble_moments` in one call:
    0.2 %).

    Args:
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both, as for :func:`srt_ext.ensemble`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    References:
        Chunks and streams are combined by the formulae of Chan, Golub and LeVeque, "Updating
        formulae and a pairwise algorithm for computing sample variances", 1979.

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
        return {"mean": mean, "var": self._sum_over(apart.add_(self._state["var"] * share), group)}


class RunningMedian(MedianStream["torch.Tensor", "torch.Tensor"]):
    """The approximate lower median of a stream of views, computed in chunks of any size.

    The state is a window [8, B, C, H', W'] in float32 (float64 for float64 tokens) and the number
    of views of each cell [H', W']. The window holds the 7 sorted values around the median of each
    element and the position of the median among them. Its size does not depend on the number of
    views.

    The median is exact while it stays within the 7 values, and always for up to 7 views. When it
    leaves the window, the window moves towards it by the mean gap between its values. This is slow
    if most values are equal or form two distant clusters. Therefore the order of the views matters:
    in the row order of a grid, in which the values drift, the error is 10 times (225 views) to 50
    times (49 views) the error in an order from :func:`srt_ext.views.spread` (research/README.md).
    Within a chunk, ``update`` spreads the order itself.

    Two medians cannot be merged, because the windows do not determine the median of all views.

    Args:
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        upsample: as for :func:`srt_ext.ensemble`.
        border: as for :func:`srt_ext.ensemble`.
        stride: pixels per output cell, (sh, sw) or one for both, as for :func:`srt_ext.ensemble`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    References:
        After Munro and Paterson, "Selection and sorting with limited storage", 1980.

    Example:
        >>> running = RunningMedian(grid=(1, 1), patch=(1, 1))
        >>> for value in (5.0, 1.0, 9.0):
        ...     running.update(torch.full((1, 1, 1, 1), value), torch.zeros(1, 2))
        >>> running.result().item()
        5.0
    """

    _arrays = _Tensors()

    def all_reduce(self, group: Any = None) -> NoReturn:
        """Not supported: always raises a :class:`NotImplementedError` (see the class)."""
        self._refuse("all_reduce")
