"""Speed and memory: see README.md in this folder."""

import time

STARTED = time.monotonic()  # before torch is imported, which takes seconds
