"""Reads how much memory this process can still allocate."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

# Root, file of the usage, name of its reclaimable file cache in memory.stat, files of the limits.
_Version = tuple[str, str, str, tuple[str, ...]]
_V1: _Version = (
    "/sys/fs/cgroup/memory",
    "memory.usage_in_bytes",
    "total_inactive_file",
    ("memory.limit_in_bytes",),
)
_V2: _Version = (
    "/sys/fs/cgroup",
    "memory.current",
    "inactive_file",
    ("memory.max", "memory.high"),
)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be allocated on ``device``.

    On the CPU this is the minimum of the machine's available memory, the memory that each cgroup of
    the process leaves (from its own cgroup up to the root), and the remaining address space.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free = [*_cgroups(), *_address_space()]
    available = _number("/proc/meminfo", "MemAvailable:")
    if available is not None:
        free.append(available * 1024)
    return max(0, min(free, default=2**32))  # 4 GiB outside Linux


def _cgroups() -> Iterator[int]:
    """Yields the remaining bytes of each cgroup that has a limit."""
    for version, path in _memberships():
        root, usage, cache, limits = version
        for folder in _folders(root, path):
            used = _number(f"{folder}/{usage}") or 0
            used -= _number(f"{folder}/memory.stat", cache) or 0
            for name in limits:
                limit = _number(f"{folder}/{name}")
                if limit is not None:  # "max" means no limit
                    yield limit - max(0, used)


def _memberships() -> Iterator[tuple[_Version, str]]:
    """Yields the cgroups of the process: version, and path below the root.

    Both versions may be mounted. The roots are always included: in a container they are its own
    cgroups.
    """
    for line in ["0::/", "0:memory:/", *_read("/proc/self/cgroup").splitlines()]:
        if line.count(":") < 2:  # the rest of a name with a line break
            continue
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _V2, path
        elif "memory" in controllers.split(","):
            yield _V1, path


def _folders(root: str, path: str) -> set[str]:
    """The possible folders of a cgroup and its parents: a container hides the first path parts."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    ends = range(len(parts) + 1)
    return {"/".join([root, *parts[first:last]]) for last in ends for first in range(last + 1)}


def _address_space() -> Iterator[int]:
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _number("/proc/self/statm")
    if limit != resource.RLIM_INFINITY and pages is not None:
        yield limit - pages * resource.getpagesize()


def _read(path: str) -> str:
    """Returns the text of a file, or an empty string if it cannot be read."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeError):
        return ""


def _number(path: str, name: str = "") -> int | None:
    """Returns the number in a file (the one after ``name``, if given), or None."""
    words = _read(path).split()
    try:
        return int(words[words.index(name) + 1 if name else 0])
    except (ValueError, IndexError):
        return None
