#!/usr/bin/env bash
# Prints one checksum of all that the native libraries and cuda_sanitize are built from. Where there is
# no git it says whether a build belongs to the sources beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
find CMakeLists.txt csrc scripts/cuda_sanitize.cu -type f | LC_ALL=C sort | xargs sha256sum |
  sha256sum | cut -c1-16
