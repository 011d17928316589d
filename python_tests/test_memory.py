"""The free memory of a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from process import needs_proc, run_python

from srt_ext._memory import free_bytes

V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
V1_USED, V2_USED = "memory.usage_in_bytes", "memory.current"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 2**32),  # not Linux
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\n"}, 4096),
        ({"/proc/meminfo": "MemAvailable: 0 kB\n"}, 0),
        ({f"{V2}/memory.max": "10000\n"}, 10000),  # in a container with its own root
        (
            {
                f"{V2}/memory.max": "10000",
                f"{V2}/{V2_USED}": "9000",
                f"{V2}/memory.stat": "anon 1000\ninactive_file 8000\n",  # reclaimable cache
            },
            9000,
        ),
        ({f"{V2}/memory.max": "10", f"{V2}/{V2_USED}": "20"}, 0),
        (
            {
                "/proc/self/cgroup": "1:name=x:/a\nb\n0::/slurm/job_7/step\n",
                f"{V2}/slurm/job_7/step/memory.max": "max",
                f"{V2}/slurm/job_7/memory.max": "7000",
                f"{V2}/slurm/job_7/{V2_USED}": "1000",
                f"{V2}/slurm/memory.max": "9000",
            },
            6000,
        ),
        ({"/proc/self/cgroup": "0::/a.slice\n", f"{V2}/a.slice/memory.high": "5"}, 5),
        ({"/proc/self/cgroup": "0::/../x\n", f"{V2}/memory.max": "5"}, 5),
        (
            {
                "/proc/self/cgroup": "5:cpu,memory:/job/7\n1:name=systemd:/x\n0::/y\n",
                f"{V1}/memory.limit_in_bytes": str(2**63 - 4096),  # no limit
                f"{V1}/job/7/memory.limit_in_bytes": "9000",
                f"{V1}/job/7/{V1_USED}": "5000",
                f"{V1}/job/7/memory.stat": "inactive_file 1\ntotal_inactive_file 3000",
                f"{V1}/job/memory.limit_in_bytes": "8000",
                f"{V2}/x/memory.max": "1",  # of another hierarchy
            },
            7000,
        ),
        # A container sees its cgroup, or one below it, as the root; the path is that of the host.
        ({"/proc/self/cgroup": "4:memory:/docker/c", f"{V1}/memory.limit_in_bytes": "8"}, 8),
        ({"/proc/self/cgroup": "4:memory:/docker/c/d", f"{V1}/d/memory.limit_in_bytes": "8"}, 8),
    ],
)
def test_free_bytes_are_the_minimum_of_the_machine_and_its_cgroups(
    files: dict[str, str], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_bytes(torch.device("cpu")) == free


@needs_proc
def test_free_bytes_are_limited_by_the_address_space() -> None:
    script = (
        "import resource, torch; from srt_ext._memory import free_bytes\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)\n"
        "print(free_bytes(torch.device('cpu')))"
    )
    assert 2**29 < int(run_python("-c", script).stdout) <= 2**30
