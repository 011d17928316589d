#!/usr/bin/env bash
# Prints a checksum of the sources of the native libraries and of cuda_sanitize. gpu_check.sh uses it to
# check, without git, that gpu_bundle was built from the sources of the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
find CMakeLists.txt csrc scripts/cuda_sanitize.cu -type f -regex '.*\.\(txt\|in\|h\|cpp\|cuh\|cu\)' |
  LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16
