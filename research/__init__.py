"""Studies of what SRT is worth, of designs of views and of running medians: see README.md."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
