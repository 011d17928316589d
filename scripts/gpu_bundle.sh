#!/usr/bin/env bash
# Builds the folder gpu_bundle, which git ignores. It contains the binaries that scripts/gpu_check.sh runs
# on a machine with a GPU, so that nothing is compiled there: _C.so, _C_cuda.so and the program
# cuda_sanitize, stripped, for one architecture. They work with every version of Python and torch, and
# need at most glibc 2.34 and a driver for the CUDA version of nvcc. If jaxlib is installed, the folder
# also contains _xla.so and _xla_cuda.so, which work with this version of jaxlib and later ones. The
# build does not use a GPU and takes three minutes on two cores.
#
#   scripts/gpu_bundle.sh [ARCHITECTURE]
#
# ARCHITECTURE is a value of CMAKE_CUDA_ARCHITECTURES (default 90-real, for H100 and H200). The folder
# also contains the commit of the sources and their digest, which gpu_check.sh compares.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$root/gpu_bundle
build=$root/build/gpu_bundle # kept, so that the next bundle compiles only changed sources

cmake -G Ninja -S "$root" -B "$build" -DPython3_EXECUTABLE="$(command -v python3)" \
  -DSRT_CUDA=1 -DSRT_CUDA_ARCHS="${1:-90-real}" -DSRT_SANITIZE=ON
files=(_C.so _C_cuda.so cuda_sanitize)
if python3 -c "import jaxlib" 2>/dev/null; then files+=(_xla.so _xla_cuda.so); fi
cmake --build "$build" --target "${files[@]%.so}"

rm -rf "$folder.part"
mkdir "$folder.part"
for file in "${files[@]}"; do
  strip -o "$folder.part/$file" "$build/$file"
  if objdump -p "$folder.part/$file" | grep 'NEEDED.*python'; then
    echo "$file links a Python library" >&2
    exit 1
  fi
  glibc=$(objdump -T "$folder.part/$file" | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -n 1)
  if [ "${glibc#GLIBC_2.}" -gt 34 ]; then
    echo "$file needs $glibc; at most glibc 2.34 is allowed" >&2
    exit 1
  fi
done
commit=$(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
echo "$commit" >"$folder.part/commit"
bash "$root/scripts/kernel_digest.sh" >"$folder.part/digest"
rm -rf "$folder"
mv "$folder.part" "$folder"
ls -l "$folder"
