#!/usr/bin/env bash
# Builds what scripts/gpu_check.sh runs on a machine with a GPU, so that nothing is compiled there:
# _C.so, _C_cuda.so and the program cuda_sanitize, stripped, for one architecture. They are not tied to
# a version of Python or torch, and need glibc 2.34 at most. No GPU is used.
#
#   scripts/gpu_bundle.sh [FOLDER [ARCHITECTURE]]
#
# FOLDER (default gpu_bundle, which git ignores) also gets the commit of the sources and their digest,
# which gpu_check.sh compares. ARCHITECTURE (default 90-real) is what CMAKE_CUDA_ARCHITECTURES takes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "${1:-$root/gpu_bundle}" && cd "${1:-$root/gpu_bundle}" && pwd)
build=$root/build/gpu_bundle # compiles only what changed since the last bundle

cmake -G Ninja -S "$root" -B "$build" -DPython3_EXECUTABLE="$(command -v python3)" \
  -DSRT_CUDA=1 -DSRT_CUDA_ARCHS="${2:-90-real}" -DSRT_SANITIZE=ON
cmake --build "$build" --target _C _C_cuda cuda_sanitize

for file in _C.so _C_cuda.so cuda_sanitize; do
  strip -o "$folder/$file" "$build/$file"
  if objdump -p "$folder/$file" | grep 'NEEDED.*python'; then
    echo "$file needs a library of Python" >&2
    exit 1
  fi
  glibc=$(objdump -T "$folder/$file" | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -n 1)
  if [ "${glibc#GLIBC_2.}" -gt 34 ]; then
    echo "$file needs $glibc; 2.34 is the newest that it may need" >&2
    exit 1
  fi
done
git -C "$root" describe --always --dirty --exclude '*' | tee "$folder/commit"
"$root/scripts/kernel_digest.sh" >"$folder/digest"
ls -l "$folder"
