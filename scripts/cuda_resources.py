#!/usr/bin/env python3
"""Tabulates the registers and spills of each kernel, from the output of ptxas -v in a build log.

    python3 scripts/cuda_resources.py LOG

The exit status is 1 if a kernel spills, or if the log contains no kernel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    command = ["c++filt", *names]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # srt::cuda::(anonymous namespace)::kernel<T>(parameters) -> kernel<T>
    plain = (re.sub(r"(void |srt::|cuda::|\(anonymous namespace\)::)", "", line) for line in lines)
    return [line.split("(")[0] for line in plain]


def main() -> int:
    found = [match.groupdict() for match in KERNEL.finditer(Path(sys.argv[1]).read_text())]
    for kernel, name in zip(found, demangled([k["name"] for k in found]), strict=True):
        kernel["name"] = name
    architectures = sorted({k["arch"] for k in found}, key=lambda a: int(a.rstrip("af")))
    print("registers (+ bytes of spills), by architecture:", *(f"sm_{a}" for a in architectures))
    cells: dict[str, dict[str, str]] = {}
    for k in found:
        spilled = int(k["stores"]) + int(k["loads"])
        text = k["registers"] + (f"+{spilled}" if spilled else "")
        cells.setdefault(k["name"], {})[k["arch"]] = text
    for name in sorted(cells):
        print(f"  {name:44}", *(f"{cells[name].get(a, ''):>6}" for a in architectures))
    spills = [k for k in found if k["stores"] != "0" or k["loads"] != "0"]
    return 1 if spills or not found else 0


if __name__ == "__main__":
    sys.exit(main())
