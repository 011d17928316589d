"""Studies of quality, views, sub-pixel tokens, stored fields and running medians: see README.md."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
