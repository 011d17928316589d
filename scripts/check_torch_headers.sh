#!/usr/bin/env bash
# Compiles csrc/torch against the headers of the given torch versions. The default is the two oldest
# supported versions, whose headers lack some later additions. The wheels are unpacked without their
# dependencies, because nothing is linked.
#
#   scripts/check_torch_headers.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 2.10.0 2.11.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in "$@"; do
  python3 -m pip download -q --no-deps --dest "$work" "torch==$version"
  python3 - "$work" <<'PY'
import sys, zipfile
from pathlib import Path
[wheel] = Path(sys.argv[1]).glob("torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    headers = [name for name in archive.namelist() if name.startswith("torch/include/")]
    archive.extractall(Path(sys.argv[1], "wheel"), headers)
PY
  for source in csrc/torch/*.cpp; do
    "${CXX:-c++}" -std=c++17 -fsyntax-only -fvisibility=hidden -Wall -Wextra -Wconversion -Werror \
      -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$work/wheel/torch/include" \
      "$source"
  done
  echo "csrc/torch compiles against torch $version"
  rm -rf "${work:?}"/*
done
