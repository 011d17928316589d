"""Argument checks in Python: settings, and arguments that torch's dispatcher rejects before C++.

csrc/srt/validation.cpp checks all other arguments of the ops. This module imports torch only where
a function needs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from .options import OPTIONS

Wrong = type[ValueError] | type[TypeError]

MAX_VIEWS = 2**20  # per call, as kMaxViews in csrc/srt/types.h
MAX_WINDOWS = 2**26  # per call, as kMaxWindows in csrc/srt/windows.h


def wrong(kind: Wrong, where: str, rule: str, got: object) -> ValueError | TypeError:
    """Returns the error for an argument that violates ``rule``. The caller raises it."""
    return kind(f"{where}: {rule}; got {got}")


def stated_error(message: str) -> ValueError | TypeError | None:
    """Returns the error that the message of a RuntimeError from srt::Error describes, or None."""
    found = re.search(r"(TypeError: )?(srt::\w+: (?!CUDA: ).*)", message)
    return found and (TypeError if found[1] else ValueError)(found[2])


def check_tensor(where: str, name: str, value: object) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        raise wrong(TypeError, where, f"{name} must be a torch.Tensor", type(value).__name__)
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "a quantized" if value.is_quantized else f"a {value.layout}"
        kind = "a nested tensor" if value.is_nested else f"{kind} tensor"
        rule = f"{name} must be a dense tensor, not sparse, nested or quantized"
        raise wrong(TypeError, where, rule, kind)


def check_ndarray(where: str, name: str, value: object) -> None:
    # A masked array is an ndarray, too, but its masked values must not be read.
    if not isinstance(value, np.ndarray) or hasattr(value, "mask"):
        rule = f"{name} must be a numpy.ndarray without a mask"
        raise wrong(TypeError, where, rule, type(value).__name__)


def check_numbers(
    where: str,
    name: str,
    value: object,
    largest: int = 4 * MAX_VIEWS,
    limit: str = "must hold at most 2^20 views",
) -> NDArray[np.float64]:
    """A contiguous float64 copy, which other threads cannot change while it is read."""
    rule = f"{name} must be float32 or float64, or sequences of numbers"
    if isinstance(value, np.ndarray):
        check_ndarray(where, name, value)
        if value.dtype.kind != "f" or value.dtype.itemsize not in (4, 8):
            raise wrong(TypeError, where, rule, value.dtype)
        if value.size > largest:  # checked before the copy, because strides may be 0
            raise wrong(ValueError, where, f"{name} {limit}", list(value.shape))
    elif isinstance(value, Sequence):
        try:
            value = np.asarray(value)
        except Exception:  # rows of different lengths, or elements other than numbers
            raise wrong(ValueError, where, rule, "rows that do not form an array") from None
        if value.dtype.kind not in "fiu":
            raise wrong(TypeError, where, rule, value.dtype)
    else:
        raise wrong(TypeError, where, rule, type(value).__name__)
    return np.array(value, dtype=np.float64, order="C", subok=False)


def check_string(where: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise wrong(TypeError, where, f"{name} must be a string", type(value).__name__)


def check_words(where: str, **words: object) -> None:
    """Checks option strings, given by argument name, against ``OPTIONS``."""
    for name, word in words.items():
        check_string(where, name, word)
        options = get_args(OPTIONS[name])
        if word not in options:
            rule = f"{name} must be one of " + ", ".join(f"'{option}'" for option in options)
            raise wrong(ValueError, where, rule, _quoted(word))


def _quoted(word: object) -> str:
    """Quotes a string as csrc/srt/validation.cpp does: printable, at most 40 characters."""
    longest, text = 40, str(word)
    codes = (f"\\x{ord(c):02x}" if c < " " or c == "\x7f" else c for c in text[:longest])
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in codes)
    return f"'{shown}...'" if len(text) > longest else f"'{shown}'"


def _index(value: object) -> int:
    """Converts an integer of any library. Bools, floats and arrays [N] raise a TypeError."""
    dtype, shape = getattr(value, "dtype", ""), getattr(value, "shape", ())
    if isinstance(value, bool) or "bool" in str(dtype) or tuple(shape) != ():
        raise TypeError
    try:
        return index(value)  # type: ignore[arg-type]
    except RuntimeError:  # a meta tensor, which has no value
        raise TypeError from None


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of any library or a 0-d integer array; False for bools."""
    try:
        _index(value)
    except TypeError:
        return False
    return True


def check_pair(where: str, name: str, value: object, least: int = 1) -> tuple[int, int]:
    """Converts a sequence or an array [2] to (y, x). One integer applies to both axes."""
    rule = f"{name} must be an integer or a pair of integers (y, x), each >= {least}"
    several = isinstance(value, Sequence) or len(getattr(value, "shape", ())) == 1
    try:
        pair = list(map(_index, value if several else (value, value)))  # type: ignore[call-overload]
    except TypeError:
        raise wrong(TypeError, where, rule, repr(value)) from None
    if len(pair) != 2 or min(pair) < least:
        raise wrong(ValueError, where, rule, pair)
    if max(pair) >= 2**63:
        raise wrong(ValueError, where, f"{name} must be below 2^63", pair)
    return pair[0], pair[1]


def check_cells(where: str, grid: object, patch: object, stride: object) -> tuple[int, int]:
    """Returns the size (H', W') of the field for these settings."""
    names = {"grid": grid, "patch": patch, "stride": stride}
    grid, patch, stride = (check_pair(where, name, value) for name, value in names.items())
    pixels = [g * p for g, p in zip(grid, patch, strict=True)]
    if any(n % s for n, s in zip(pixels, stride, strict=True)):
        raise wrong(ValueError, where, f"stride must divide grid * patch = {pixels}", list(stride))
    return pixels[0] // stride[0], pixels[1] // stride[1]


def check_count(where: str, name: str, value: object, least: int, other: str = "") -> int:
    """``other``: further allowed values, appended to the rule, such as ", or 'auto'"."""
    rule = f"{name} must be an integer >= {least}{other}"
    try:
        count = _index(value)
    except TypeError:
        raise wrong(TypeError, where, rule, repr(value)) from None
    if count < least:
        raise wrong(ValueError, where, rule, count)
    return count


def check_number(where: str, rule: str, value: object) -> float:
    """Converts a real number of any library or a 0-d array to float. Bools raise a TypeError."""
    number = value
    if tuple(getattr(value, "shape", (1,))) == ():
        try:
            number = value.item()  # type: ignore[attr-defined]
        except RuntimeError:  # a meta tensor, which has no value
            raise wrong(TypeError, where, rule, repr(value)) from None
    if isinstance(number, bool) or not isinstance(number, Real):
        raise wrong(TypeError, where, rule, repr(value))
    try:
        return float(number)
    except OverflowError:
        return math.inf  # an integer too large for every rule
