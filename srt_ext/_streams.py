"""Streams of views, whatever library their arrays are of: settings, state, merges.

``srt_ext.streaming`` is this with torch, ``srt_ext.numpy`` with NumPy: each adds what its arrays do
in a way of their own, and public classes. No torch here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NoReturn, TypeVar

from ._rules import BORDERS, UPSAMPLES, WINDOW_PLANES, check_word

A = TypeVar("A")  # an array [..., C, H', W'] of torch or NumPy, which lies in memory channels last


def _channels_last(array: Any) -> Any:
    """[..., C, H', W'] as [..., H', W', C]."""
    return array.swapaxes(-3, -2).swapaxes(-2, -1)


def _channels_first(array: Any) -> Any:
    """[..., H', W', C] as [..., C, H', W']."""
    return array.swapaxes(-2, -1).swapaxes(-3, -2)


class Stream(ABC, Generic[A]):
    """A stream of views: its settings, its state, and what all of its kinds do alike."""

    _op: str  # adds a chunk to the state
    _planes: dict[str, tuple[int, ...]]  # of the state [*planes, B, C, H', W'], by name
    _seen: str  # the state [H', W'] that tells what each cell has got
    _weighted = True

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
        self.grid, self.patch = self._pair("grid", grid), self._pair("patch", patch)
        self.stride = self._pair("stride", stride)
        check_word(name, "upsample", upsample, UPSAMPLES)
        check_word(name, "border", border, BORDERS)
        pixels = [g * p for g, p in zip(self.grid, self.patch, strict=True)]
        if any(n % s for n, s in zip(pixels, self.stride, strict=True)):
            self._fail(f"stride must divide grid * patch = {pixels}", list(self.stride))
        self.upsample, self.border = upsample, border
        self.reset()

    # ---- what a library fills in ----------------------------------------------------------------

    _float32: Any  # its dtypes
    _float64: Any

    @abstractmethod
    def _pair(self, name: str, value: object) -> tuple[int, int]:
        """(y, x), checked; one integer stands for both."""

    @abstractmethod
    def _check_array(self, where: str, name: str, value: object) -> None:
        """Raises TypeError for what is no array of the library."""

    @abstractmethod
    def _check_chunk(self, where: str, tokens: A, offsets: Any, weights: Any) -> None:
        """The checks of a chunk of any number of views, before there is a state."""

    def _check_device(self, tokens: A) -> None:
        """That the state, which there is, lies where the tokens are."""

    def _check_devices(self, state: dict[str, A]) -> None:
        """That the arrays of a state lie in one place."""

    @abstractmethod
    def _accumulate(self, tokens: A, offsets: Any, *weights: Any) -> None:
        """Adds a chunk to the state, or raises and adds nothing."""

    @abstractmethod
    def _is_floating(self, dtype: object) -> bool:
        """Whether tokens may have this dtype."""

    @abstractmethod
    def _is_array(self, value: object) -> bool:
        """Whether it is an array of the library."""

    @abstractmethod
    def _zeros(self, shape: Sequence[int], dtype: Any, like: A) -> A:
        """Dense, on the device of ``like``."""

    @abstractmethod
    def _dense(self, array: A) -> A:
        """A copy, dense in the order of its dimensions."""

    @abstractmethod
    def _cast(self, array: A, copy: bool) -> A:
        """In the dtype of the tokens."""

    @abstractmethod
    def _ratio(self, part: A, total: A, dtype: Any) -> A:
        """part / total, 0 where both are."""

    @abstractmethod
    def _put(self, target: A, where: Any, value: A) -> None:
        """Overwrites the elements of ``target`` that ``where`` names."""

    def _writing(self) -> AbstractContextManager[object]:
        """While arrays of the state are made."""
        return nullcontext()

    # ---- what all do alike ----------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets every view, and the sizes and dtype of the tokens."""
        self.views = 0
        self._state: dict[str, Any] = {}
        self._dtype = self._float32  # of the tokens

    @property
    def _modes(self) -> dict[str, Any]:
        return {"upsample": self.upsample, "border": self.border, "stride": self.stride}

    def _settings(self) -> dict[str, Any]:
        return {"grid": self.grid, "patch": self.patch, **self._modes}

    def _fail(self, rule: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
        raise kind(f"{type(self).__name__}: {rule}; got {got}")

    def _sums(self, dtype: Any) -> Any:
        """What sums over tokens of this dtype are kept in."""
        return self._float64 if dtype == self._float64 else self._float32

    def _shapes(self, batch: int, channels: int) -> dict[str, tuple[int, ...]]:
        """Of the state, as it lies in memory: channels last."""
        height, width = (
            g * p // s for g, p, s in zip(self.grid, self.patch, self.stride, strict=True)
        )
        planes = {
            name: (*lead, batch, height, width, channels) for name, lead in self._planes.items()
        }
        return {**planes, self._seen: (height, width)}

    def _allocate(self, tokens: Any) -> None:
        self._dtype = tokens.dtype
        with self._writing():
            for name, shape in self._shapes(tokens.shape[1], tokens.shape[3]).items():
                if name == self._seen:
                    self._state[name] = self._zeros(shape, self._float64, tokens)
                else:
                    planes = self._zeros(shape, self._sums(tokens.dtype), tokens)
                    self._state[name] = _channels_first(planes)

    def _update(self, tokens: Any, offsets: Any, weights: Any) -> None:
        if weights is not None and not self._weighted:
            self._fail("weights must be None for a median", repr(weights))
        where = f"srt::{self._op}"
        self._check_array(where, "tokens", tokens)
        fresh, empty = not self._state, tokens.shape[:1] == (0,)
        if fresh or empty:  # before anything is allocated
            self._check_chunk(where, tokens, offsets, weights)
        if fresh:
            self._allocate(tokens)
        else:
            self._check_device(tokens)
            if tokens.dtype != self._dtype:
                self._fail(f"tokens must keep their dtype, {self._dtype}", tokens.dtype, TypeError)
            if tokens.ndim == 4:
                first = next(iter(self._state.values()))
                size, given = list(first.shape[-4:-2]), [tokens.shape[1], tokens.shape[3]]
                if given != size:
                    self._fail(f"tokens must keep their batch and channels, {size}", given)
        if empty:
            return
        try:
            self._accumulate(tokens, offsets, *([weights] if self._weighted else []))
        except BaseException:
            if fresh:
                self.reset()
            raise
        self.views += tokens.shape[0]

    def _check_seen(self) -> None:
        if not self._state:
            raise ValueError(f"{type(self).__name__}: no views were added")

    def _fields(self) -> tuple[A, ...]:
        """The results, each [B, C, H', W'] in the dtype of the tokens, or the state itself.

        For the last use of a stream: later updates may write to them.
        """
        self._check_seen()
        return tuple(self._cast(self._state[name], copy=False) for name in self._planes)

    def _check_same(self, other: object) -> None:
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"{name}: merge takes another {name}; got {type(other).__name__}")
        if other._settings() != self._settings():
            self._fail(f"both must have the same settings, {self._settings()}", other._settings())
        if self._state and other._state:
            mine, theirs = (
                (s._dtype, *(tuple(array.shape) for array in s._state.values()))
                for s in (self, other)
            )
            if mine != theirs:
                self._fail(f"both must have tokens of one dtype and size, {mine}", theirs)

    def _shares(self, part: A, total: A) -> A:
        """part / total [H', W'], 0 where both are; in the precision of the state."""
        return self._ratio(part, total, self._sums(self._dtype))

    def _copied(self, name: str, array: Any) -> Any:
        """A copy of a part of the state, as it was allocated, whatever its strides have become."""
        if name == self._seen:
            return self._dense(array)
        return _channels_first(self._dense(_channels_last(array)))

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything: settings, number of views, state."""
        state = {name: self._copied(name, array) for name, array in self._state.items()}
        return {**self._settings(), "views": self.views, "dtype": self._dtype, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: the same result, bit for bit.

        Tensors stay on the device that they lie on: ``torch.load(file, map_location=device)``.

        Raises:
            ValueError: it is of another kind of stream, has other settings, or is damaged. Then
                this stream stays as it was.
        """

        def text(shape: Sequence[int], dtype: object) -> str:
            return f"{list(shape)} of {dtype}"

        if not isinstance(state_dict, dict):
            self._fail("a state_dict must be a dict", type(state_dict).__name__)
        missing = {*self._settings(), "views", "dtype", "state"} - set(state_dict)
        if missing:
            self._fail("a state_dict must have all of its keys", f"none of {sorted(missing)}")
        settings = {
            key: tuple(value) if isinstance(value, list | tuple) else value
            for key, value in state_dict.items()
            if key in self._settings()
        }
        if settings != self._settings():
            self._fail(f"the state must have the settings {self._settings()}", settings)
        views, dtype, state = (state_dict[key] for key in ("views", "dtype", "state"))
        number = isinstance(views, int) and not isinstance(views, bool) and views >= 0
        if not self._is_floating(dtype) or not number or not isinstance(state, dict):
            self._fail(
                "views, dtype and state must be a number, a floating dtype and arrays",
                (views, dtype),
            )
        loaded: dict[str, Any] = {}
        if views and not state:
            self._fail("a stream that has seen views must have a state", f"{views} views and none")
        if state:
            names = [*self._planes, self._seen]
            if set(state) != set(names) or not all(map(self._is_array, state.values())):
                self._fail(f"the state must have the arrays {names}", list(state))
            self._check_devices(state)
            first = state[names[0]]
            if first.ndim < 4:
                self._fail(f"{names[0]} must be [..., B, C, H', W']", list(first.shape))
            shapes = self._shapes(first.shape[-4], first.shape[-3])
            for name in names:
                array, shape, expected = state[name], shapes[name], self._float64
                if name != self._seen:
                    *lead, height, width, channels = shape
                    shape, expected = (*lead, channels, height, width), self._sums(dtype)
                if tuple(array.shape) != shape or array.dtype != expected:
                    self._fail(
                        f"{name} must be {text(shape, expected)}", text(array.shape, array.dtype)
                    )
                with self._writing():
                    loaded[name] = self._copied(name, array)
        self.views, self._dtype, self._state = views, dtype, loaded


class MeanStream(Stream[A]):
    _op, _planes, _seen = "accumulate_mean_", {"mean": ()}, "weight"

    def result(self) -> A:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        self._check_seen()
        return self._cast(self._state["mean"], copy=True)

    def merge(self, other: MeanStream[A]) -> None:
        """Adds all views of another stream with the same settings; associative up to rounding."""
        self._check_same(other)
        if not other._state:
            return
        if not self._state:
            self.load_state_dict(other.state_dict())
            return
        with self._writing():
            mine, theirs = self._state, other._state
            total = mine["weight"] + theirs["weight"]
            keep, share = (self._shares(s["weight"], total) for s in (mine, theirs))
            self._state = {**self._joined(theirs, keep, share), "weight": total}
            self.views += other.views

    def _joined(self, other: dict[str, Any], keep: Any, share: Any) -> dict[str, Any]:
        mean = share * other["mean"]
        mean += keep * self._state["mean"]
        return {"mean": mean}


class MomentsStream(MeanStream[A]):
    _op, _planes = "accumulate_moments_", {"mean": (), "var": ()}

    def variance(self) -> A:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        self._check_seen()
        return self._cast(self._state["var"], copy=True)

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


class MedianStream(Stream[A]):
    _op, _planes, _seen = "accumulate_median_", {"window": (WINDOW_PLANES,)}, "count"
    _weighted = False

    def result(self) -> A:
        """[B, C, H', W'] in the dtype of the tokens; 0 where no view counts.

        Raises ValueError before the first update.
        """
        return self._fields()[0]

    def _fields(self) -> tuple[A, ...]:
        """As :meth:`result`."""
        self._check_seen()
        with self._writing():
            *values, place = self._state["window"]
            median = _channels_first(self._dense(_channels_last(values[0])))
            for i, value in enumerate(values[1:], 1):
                self._put(median, place >= i, value)
            self._put(median, place != place, place)
            empty = self._state["count"] == 0
            self._put(median, empty, self._zeros((), median.dtype, median))
            return (self._cast(median, copy=False),)

    def merge(self, other: MedianStream[A]) -> NoReturn:
        """Raises: the windows of two streams do not tell the median of both."""
        self._refuse("merge")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise NotImplementedError(
            f"RunningMedian: {what} is not defined: a window holds the 7 values around the median "
            "of its own views, and the median of both streams may lie in neither. Give one stream "
            "all views, or merge means"
        )
