"""Speed, memory and quality: see README.md beside this file."""

import time

STARTED = time.monotonic()  # before torch is imported, which takes seconds
