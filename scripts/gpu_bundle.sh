#!/usr/bin/env bash
# Builds gpu_bundle, a folder that git ignores: what scripts/gpu_check.sh runs on a machine with a GPU, so
# that nothing is compiled there. It has _C.so, _C_cuda.so and the program cuda_sanitize, stripped, for
# one architecture. They are not tied to a version of Python or torch, and need glibc 2.34 at most and a
# driver for the CUDA version of nvcc. No GPU is used. Takes three minutes on two cores.
#
#   scripts/gpu_bundle.sh [ARCHITECTURE]
#
# ARCHITECTURE (default 90-real: H100, H200) is what CMAKE_CUDA_ARCHITECTURES takes. The folder also gets
# the commit of the sources and their digest, which gpu_check.sh compares.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$root/gpu_bundle
build=$root/build/gpu_bundle # compiles only what changed since the last bundle

cmake -G Ninja -S "$root" -B "$build" -DPython3_EXECUTABLE="$(command -v python3)" \
  -DSRT_CUDA=1 -DSRT_CUDA_ARCHS="${1:-90-real}" -DSRT_SANITIZE=ON
cmake --build "$build" --target _C _C_cuda cuda_sanitize

rm -rf "$folder.part"
mkdir "$folder.part"
for file in _C.so _C_cuda.so cuda_sanitize; do
  strip -o "$folder.part/$file" "$build/$file"
  if objdump -p "$folder.part/$file" | grep 'NEEDED.*python'; then
    echo "$file needs a library of Python" >&2
    exit 1
  fi
  glibc=$(objdump -T "$folder.part/$file" | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -n 1)
  if [ "${glibc#GLIBC_2.}" -gt 34 ]; then
    echo "$file needs $glibc; 2.34 is the newest that it may need" >&2
    exit 1
  fi
done
commit=$(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
echo "$commit" >"$folder.part/commit"
bash "$root/scripts/kernel_digest.sh" >"$folder.part/digest"
rm -rf "$folder"
mv "$folder.part" "$folder"
ls -l "$folder"
