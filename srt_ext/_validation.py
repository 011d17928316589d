"""Checks in Python, for settings and for what torch's dispatcher refuses before C++ runs.

The rules for the arguments of the ops are those of csrc/srt/validation.cpp. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import get_args

from .options import OPTIONS

Wrong = type[ValueError] | type[TypeError]

MAX_VIEWS = 2**20  # in one call: kMaxViews of csrc/srt/types.h
MAX_WINDOWS = 2**26  # in one call: kMaxWindows of csrc/srt/windows.h


def wrong(kind: Wrong, where: str, rule: str, got: object) -> ValueError | TypeError:
    """The error of an argument that breaks a rule; to be raised."""
    return kind(f"{where}: {rule}; got {got}")


def stated_error(message: str) -> ValueError | TypeError | None:
    """The error that srt::Error states in the message of a RuntimeError; to be raised."""
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


def check_string(where: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise wrong(TypeError, where, f"{name} must be a string", type(value).__name__)


def check_words(where: str, **words: object) -> None:
    """``words``: the values of options, by the names of their arguments."""
    for name, word in words.items():
        check_string(where, name, word)
        options = get_args(OPTIONS[name])
        if word not in options:
            rule = f"{name} must be one of " + ", ".join(f"'{option}'" for option in options)
            raise wrong(ValueError, where, rule, _quoted(word))


def _quoted(word: object) -> str:
    """The word in quotes, printable and cut to a line, as csrc/srt/validation.cpp quotes it."""
    longest, text = 40, str(word)
    codes = (f"\\x{ord(c):02x}" if c < " " or c == "\x7f" else c for c in text[:longest])
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in codes)
    return f"'{shown}...'" if len(text) > longest else f"'{shown}'"


def _index(value: object) -> int:
    """The integer that ``value`` is, of any library; TypeError for bools, floats and arrays [N]."""
    dtype, shape = getattr(value, "dtype", ""), getattr(value, "shape", ())
    if isinstance(value, bool) or "bool" in str(dtype) or tuple(shape) != ():
        raise TypeError
    try:
        return index(value)  # type: ignore[arg-type]
    except RuntimeError:  # a meta tensor, which has no value
        raise TypeError from None


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of any library, also a 0-d array or tensor; no bool."""
    try:
        _index(value)
    except TypeError:
        return False
    return True


def check_pair(where: str, name: str, value: object, least: int = 1) -> tuple[int, int]:
    """(y, x), in a sequence or an array [2]; one integer stands for both."""
    rule = f"{name} must be two integers >= {least}, (y, x)"
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
    """(H', W') of the field that has these settings."""
    names = {"grid": grid, "patch": patch, "stride": stride}
    grid, patch, stride = (check_pair(where, name, value) for name, value in names.items())
    pixels = [g * p for g, p in zip(grid, patch, strict=True)]
    if any(n % s for n, s in zip(pixels, stride, strict=True)):
        raise wrong(ValueError, where, f"stride must divide grid * patch = {pixels}", list(stride))
    return pixels[0] // stride[0], pixels[1] // stride[1]


def check_count(where: str, name: str, value: object, least: int, other: str = "") -> int:
    """``other``: what the message offers beside an integer, as ", or 'auto'"."""
    rule = f"{name} must be an integer >= {least}{other}"
    try:
        count = _index(value)
    except TypeError:
        raise wrong(TypeError, where, rule, repr(value)) from None
    if count < least:
        raise wrong(ValueError, where, rule, count)
    return count


def check_number(where: str, rule: str, value: object) -> float:
    """A real number of any library, also a 0-d array or tensor; no bool."""
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
        return math.inf  # a huge integer, which every rule refuses
