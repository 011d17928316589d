"""Views that arrive one after the other: aggregated in memory that does not grow with their number.

``RunningMean``, ``RunningMoments`` and ``RunningMedian`` wrap ``torch.ops.srt.accumulate_*``, which
take a chunk of views and a state of plain tensors that they read and write once. What they do does
not depend on the library of the arrays: ``srt_ext.numpy`` has the same classes over NumPy, which
need no torch.
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
N = TypeVar("N")  # numbers of the views, as the library takes them

WINDOW_PLANES = 8  # of the state of a median: 7 values, and the place of the median


def _device(array: Any) -> object:
    return getattr(array, "device", None)  # NumPy 1 has none


class Stream(Generic[A, N]):
    """A stream of views: its settings, its state, and what all of its kinds do alike."""

    _arrays: Any  # what a library of arrays does in a way of its own: _Tensors, or NumPy's
    _op: str  # adds a chunk to the state
    _planes: dict[str, tuple[int, ...]]  # of the state [*planes, B, C, H', W'], by name
    _total: str  # the state [H', W']: total weight of a cell, or its number of views
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
        return copy.deepcopy(self)  # views that are added to one are not added to the other

    def reset(self) -> None:
        """Forgets every view, and the sizes and dtype of the tokens."""
        self.views = 0
        self._state: dict[str, Any] = {}
        self._dtype = self._arrays.float32  # of the tokens

    def update(self, tokens: A, offsets: N, weights: N | None = None) -> None:
        """Adds views: tokens [V, B, N, C], offsets [V, 2], weights [V], as for ``ensemble``.

        Weights count against those of the other chunks: 0, or between 2^-500 and 2^500; a median
        takes none. No views (V = 0) only allocate the state. Raises as ``ensemble``; then nothing
        was added.
        """
        if weights is not None and not self._weighted:
            self._fail("weights must be None for a median", repr(weights))
        self._arrays.check_array(f"srt::{self._op}", "tokens", tokens)
        fresh, empty = not self._state, tokens.shape[:1] == (0,)
        views = (tokens, offsets, self.grid, self.patch)
        if fresh or empty:  # before anything is allocated
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
        """Shape and dtype of each array of the state, for tokens of this dtype."""
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
        """That tokens are of the place, dtype and size of those before."""
        first = next(iter(self._state.values()))
        device, given = _device(first), _device(tokens)
        if given != device:
            self._fail(f"tokens must stay on the device of the stream, {device}", given)
        if tokens.dtype != self._dtype:
            self._fail(f"tokens must keep their dtype, {self._dtype}", tokens.dtype, TypeError)
        size, new = list(first.shape[-4:-2]), list(tokens.shape[1::2])
        if new != size and tokens.ndim == 4:
            self._fail(f"tokens must keep their batch and channels, {size}", new)

    def _check_has_views(self) -> None:
        if not self._state:
            raise ValueError(f"{type(self).__name__}: no views were added")

    def result(self) -> A:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        return self._result(next(iter(self._planes)))

    def _result(self, name: str) -> A:
        self._check_has_views()
        result: A = self._arrays.cast(self._state[name], self._dtype, copy=True)
        return result

    def _fields(self) -> tuple[A, ...]:
        """The results, each [B, C, H', W'] in the dtype of the tokens, or the state itself.

        For the last use of a stream: later updates may write to them.
        """
        self._check_has_views()
        return tuple(self._arrays.cast(self._state[name], self._dtype) for name in self._planes)

    def _copied(self, array: Any) -> Any:
        """A copy of a part of the state, dense in the order of memory, channels last."""
        arrays = self._arrays
        if array.ndim == 2:
            return arrays.dense(array)
        return arrays.moveaxis(arrays.dense(arrays.moveaxis(array, -3, -1)), -1, -3)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything: settings, number of views, state."""
        state = {name: self._copied(array) for name, array in self._state.items()}
        return {**self._settings(), "views": self.views, "dtype": self._dtype, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: the same result, bit for bit.

        Tensors stay on the device that they lie on: ``torch.load(file, map_location=device)``.

        Raises:
            ValueError: it is of another kind of stream, has other settings, or is damaged. Then
                this stream stays as it was.
        """
        if not isinstance(state_dict, dict):
            self._fail("a state_dict must be a dict", type(state_dict).__name__)
        own, values = self._settings(), ("views", "dtype", "state")
        missing = {*own, *values} - set(state_dict)
        if missing:
            self._fail("a state_dict must have all of its keys", f"none of {sorted(missing)}")
        settings = {key: state_dict[key] for key in own}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        if settings != own:
            self._fail(f"the state must have the settings {own}", settings)
        views, dtype, state = (state_dict[key] for key in values)
        number = is_integer(views) and int(views) >= 0
        if not self._arrays.is_floating(dtype) or not number or not isinstance(state, dict):
            rule = "views, dtype and state must be a number, a floating dtype and arrays"
            self._fail(rule, (views, dtype))
        if views and not state:
            self._fail("a stream that has views must have a state", f"{views} views and none")
        loaded: dict[str, Any] = {}
        if state:
            self._check_state(state, dtype)
            with self._arrays.writing():
                names = (*self._planes, self._total)
                loaded = {name: self._copied(state[name]) for name in names}
        self.views, self._dtype, self._state = int(views), dtype, loaded

    def _check_state(self, state: dict[str, Any], dtype: Any) -> None:
        """That these arrays are a state for tokens of this dtype."""
        names = [*self._planes, self._total]
        if set(state) != set(names) or not all(map(self._arrays.is_array, state.values())):
            self._fail(f"the state must have the arrays {names}", list(state))
        devices = [_device(array) for array in state.values()]
        if len(set(devices)) > 1:
            self._fail("the state must lie on one device", [str(device) for device in devices])
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
        """Adds all views of another stream with the same settings; associative up to rounding."""
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
            raise TypeError(f"{name}: merge takes another {name}; got {type(other).__name__}")
        if other._settings() != self._settings():
            self._fail(f"both must have the same settings, {self._settings()}", other._settings())
        mine, theirs = (
            (stream._dtype, *(tuple(array.shape) for array in stream._state.values()))
            for stream in (self, other)
        )
        if self._state and other._state and mine != theirs:
            self._fail(f"both must have tokens of one dtype and size, {mine}", theirs)

    def _shares(self, part: Any, total: Any) -> Any:
        """part / total [H', W'], 0 where both are; in the precision of the state."""
        # 1e-300 is below every weight of a stream, which are 0 or at least 2^-500.
        return self._arrays.cast(part / total.clip(1e-300), self._state["mean"].dtype)

    def _joined(self, other: dict[str, Any], keep: Any, share: Any) -> dict[str, Any]:
        mean = share * other["mean"]
        mean += keep * self._state["mean"]
        return {"mean": mean}


class MomentsStream(MeanStream[A, N]):
    _op, _planes = "accumulate_moments_", {"mean": (), "var": ()}

    def variance(self) -> A:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        return self._result("var")

    def _joined(self, other: dict[str, Any], keep: Any, share: Any) -> dict[str, Any]:
        # keep * share * apart^2, multiplied so that a cell that only one stream covers never
        # computes 0 * inf.
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
        """Raises: the windows of two streams do not tell the median of both."""
        self._refuse("merge")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise NotImplementedError(
            f"RunningMedian: {what} is not defined: a window holds the 7 values around the median "
            "of its own views, and the median of both streams may lie in neither. Give one stream "
            "all views, or merge means"
        )


# ---- torch --------------------------------------------------------------------------------------


class _Tensors:
    """What a stream needs from torch; srt_ext.numpy has the same for NumPy."""

    check_array = staticmethod(check_tensor)
    if _library.unavailable is None:
        float32, float64, moveaxis = torch.float32, torch.float64, staticmethod(torch.moveaxis)

    def is_array(self, value: object) -> bool:
        """A dense tensor."""
        if not isinstance(value, torch.Tensor) or value.is_nested:
            return False
        return value.layout == torch.strided

    def is_floating(self, dtype: object) -> bool:
        """Whether tokens may have this dtype."""
        return dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    def check_chunk(self, op: str, *views: Any, **modes: Any) -> None:
        """The rules for a chunk of any number of views, before there is a state."""
        ops.check_views(op, *views, stream=True, **modes)

    def accumulate(self, op: str, state: Sequence[Any], *views: Any, **modes: Any) -> None:
        """Adds a chunk to the state, or raises and adds nothing."""
        ops.accumulate(op, *state, *views, **modes)

    def zeros(self, shape: Sequence[int], dtype: Any, like: torch.Tensor) -> torch.Tensor:
        """One 0 in every place, on the device of ``like``."""
        return torch.zeros((), dtype=dtype, device=like.device).expand(shape)

    def dense(self, array: torch.Tensor) -> torch.Tensor:
        """A copy, dense in the order of its dimensions."""
        return array.clone(memory_format=torch.contiguous_format)

    def cast(self, array: torch.Tensor, dtype: Any, copy: bool = False) -> torch.Tensor:
        return array.to(dtype, copy=copy)

    def put(self, target: torch.Tensor, where: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrites the elements of ``target`` that ``where`` names."""
        torch.where(where, value, target, out=target)

    def writing(self) -> AbstractContextManager[None]:
        """While arrays of the state are made."""
        # Or the state could not be written outside of an inference mode in which it was made.
        return ops.state_mode()


class RunningMean(MeanStream["torch.Tensor", "torch.Tensor"]):
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

    _arrays = _Tensors()

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
        with ops.state_mode():
            total = self._sum_over(self._state["weight"], group)
            share = self._shares(self._state["weight"], total)
            self._state = {**self._reduced(share, group), "weight": total}
            self.views = sum(one[4] for one in every)

    def _reduced(self, share: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
        return {"mean": self._sum_over(self._state["mean"] * share, group)}

    def _sum_over(self, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        """The sum of the tensors of all processes, in the strides of this one."""
        total: torch.Tensor = self._copied(tensor)
        dense = total if total.ndim == 2 else total.movedim(-3, -1)  # as a state lies in memory
        torch.distributed.all_reduce(dense, group=group)
        return total


class RunningMoments(RunningMean, MomentsStream["torch.Tensor", "torch.Tensor"]):
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
        return {"mean": mean, "var": self._sum_over(apart.add_(self._state["var"] * share), group)}


class RunningMedian(MedianStream["torch.Tensor", "torch.Tensor"]):
    """The lower median of a stream of views, approximately: ``reduce="median"`` in chunks.

    State, whatever the number of views: the 7 values around the median of each element, in order,
    with the place of the median among them, [8, B, C, H', W'] in float32 (float64 for float64
    tokens), and the number of views of each cell [H', W'].

    The median is exact as long as it stays among the 7 values, always up to 7 views. Where it
    leaves them, the window follows it by the mean gap between its values: slowly, where most values
    are equal or lie in two heaps far apart. So the order of the views matters: in the raster order
    of a grid, where the values drift, the error is ten (225 views) to fifty (49 views) times that
    in an order which spreads them, such as :func:`srt_ext.views.spread` gives
    (research/README.md has both). Within a chunk the order is spread.

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

    _arrays = _Tensors()

    def all_reduce(self, group: Any = None) -> NoReturn:
        """Raises: the windows of several streams do not tell the median of all."""
        self._refuse("all_reduce")
