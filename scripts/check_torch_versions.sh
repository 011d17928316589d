#!/usr/bin/env bash
# Builds once, with the newest torch, and tests that binary under the newest torch and under each
# version named (default: the minimum, 2.10.0, and 2.13.0). Downloads torch for each: several GB.
#
#   scripts/check_torch_versions.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
test_packages=(numpy pytest hypothesis)

python3 -m venv "$work/build"
"$work/build/bin/pip" install -q -e ".[torch]" "${test_packages[@]}"
echo "binary: $(sha256sum srt_ext/_C.so)"
"$work/build/bin/python" -m pytest python_tests
rm -rf "$work/build"

for version in "${@:-2.10.0 2.13.0}"; do
  for v in $version; do
    python3 -m venv "$work/$v"
    "$work/$v/bin/pip" install -q "torch==$v" "${test_packages[@]}"
    # From the source folder, where the editable install left the binary.
    "$work/$v/bin/python" -c "import torch, srt_ext; print('torch', torch.__version__)"
    "$work/$v/bin/python" -m pytest python_tests
    rm -rf "${work:?}/$v"
  done
done
echo "binary: $(sha256sum srt_ext/_C.so)"
