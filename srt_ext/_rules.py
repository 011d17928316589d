"""The rules for words and sizes: those that need no tensors, and so no torch."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PIXELS = 2**24
WINDOW_PLANES = 8  # of the state of a running median: 7 values, and the place of the median
REDUCES = ("mean", "median")
UPSAMPLES = ("nearest", "bilinear")
BORDERS = ("coverage", "zeros", "clamp")
PADDINGS = ("zeros", "border", "reflect", "circular")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def wrong(
    kind: type[ValueError] | type[TypeError], where: str, rule: str, got: object
) -> ValueError | TypeError:
    """The error of an argument that breaks a rule; to be raised."""
    return kind(f"{where}: {rule}; got {got}")


def check_word(where: str, name: str, word: str, words: Sequence[str]) -> None:
    if not isinstance(word, str):
        raise wrong(TypeError, where, f"{name} must be a string", type(word).__name__)
    if word not in words:
        rule = f"{name} must be one of " + ", ".join(f"'{w}'" for w in words)
        raise wrong(ValueError, where, rule, f"'{word}'")


def check_pair(
    where: str, name: str, value: object, integers: tuple[type, ...] = (int,)
) -> tuple[int, int]:
    """(y, x); one integer stands for both. ``integers`` are the types that count as one."""

    def is_integer(i: object) -> bool:
        return isinstance(i, integers) and not isinstance(i, bool)

    rule = f"{name} must be two integers >= 1, (y, x)"
    if is_integer(value):
        value = (value, value)
    if not isinstance(value, Sequence) or not all(map(is_integer, value)):
        raise wrong(TypeError, where, rule, repr(value))
    if len(value) != 2 or value[0] < 1 or value[1] < 1:
        raise wrong(ValueError, where, rule, list(value))
    return value[0], value[1]


def check_count(where: str, name: str, value: object, least: int) -> int:
    rule = f"{name} must be an integer >= {least}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong(TypeError, where, rule, repr(value))
    if value < least:
        raise wrong(ValueError, where, rule, value)
    return value
