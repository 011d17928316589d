"""Errors as one line of text. Does not import torch."""

from __future__ import annotations

import re
import unicodedata


def one_line(text: str) -> str:
    """Escapes characters that end the line, move the cursor or cannot be encoded."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char
        for char in text
    )


# Control characters, surrogates (from names that are not UTF-8), line and paragraph separators.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")

# Messages of torch, of its libraries and of srt_ext.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can.?(no)?t allocate|bad_alloc|ALLOC_FAILED|failed to map segment"
    r"|can't start new thread|could not (create|execute) a primitive",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    kinds = (RuntimeError, OSError, ImportError)
    return isinstance(error, MemoryError) or (
        isinstance(error, kinds) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def describe(error: BaseException) -> str:
    """The error as one line; if memory ran out, with the options to change."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    if "new thread" in text:
        return (
            f"not enough memory or threads ({text}): use a smaller size, fewer workers and "
            "OMP_NUM_THREADS=1, or a larger ulimit -u"
        )
    if is_out_of_memory(error):
        return (
            f"not enough memory ({text or type(error).__name__}): use a smaller size or scale, "
            "a larger stride, smaller batches or fewer views"
        )
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
