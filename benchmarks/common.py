"""Shared by all benchmarks and studies: the folder of results, JSON, facts of the machine."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import srt_ext

RESULTS = Path(__file__).parent / "results"

# A model of timm; the default wherever a real model is measured.
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def quartiles(readings: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = (float(q) for q in np.percentile(readings, [25, 50, 75]))
    return {"q1": q1, "median": median, "q3": q3}


def output(*command: str) -> str:
    """The stdout of a command; empty if the command fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def save(results: dict[str, Any], path: Path) -> None:
    """Write the file atomically, because a run may be interrupted at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Facts of the machine, and of the GPU if ``device`` is one, for the JSON of each run."""
    model = [line for line in output("lscpu").splitlines() if line.startswith("Model name")]
    facts = {
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "kernels": torch.ops.srt._cpu_kernels(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "srt_ext": srt_ext.__version__,
        "commit": output("git", "describe", "--always", "--dirty"),
        "date": date.today().isoformat(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": output(*query).partition("\n")[0],
            "cuda": torch.version.cuda,
        }
    return facts


def slug(facts: dict[str, Any]) -> str:
    """The device in names of files: cpu, or cuda-NAME."""
    if "gpu" not in facts:
        return "cpu"
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
