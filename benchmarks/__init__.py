"""Speed and memory: see README.md beside this file."""

import time

STARTED = time.monotonic()  # before torch is imported, which takes seconds
