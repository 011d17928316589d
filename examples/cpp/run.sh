#!/usr/bin/env bash
# Builds the programs of this folder against an installed srt and runs them. Most of the time is spent
# compiling LibTorch's headers and the model.
#
#   cmake --install build --prefix PREFIX
#   examples/cpp/run.sh PREFIX [BUILD]
#
# LibTorch is the torch package of `python3`. srt_ext must be installed there, too, to compile the model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
prefix=$(cd "$1" && pwd)
build=${2:-$(mktemp -d)}

cmake -S "$here" -B "$build" -DCMAKE_PREFIX_PATH="$prefix" \
  -DLIBTORCH="$(python3 -c 'import torch; print(torch.__path__[0])')"
cmake --build "$build" --parallel 2
python3 "$here/export.py" "$build"

"$build/kernels"
"$build/ops"
"$build/aoti" "$build"
if ldd "$build/aoti" | grep -E '^\s*lib(torch_)?python' || ldd "$build/kernels" | grep -E 'lib(torch|c10)'; then
  echo "a program links a library that it must not need"
  exit 1
fi
