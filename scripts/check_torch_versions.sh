#!/usr/bin/env bash
# Builds once, with the newest torch, in a clone of what is committed, and tests that binary under the
# newest torch and under each version named (default: the minimum and 2.13.0). Downloads torch for
# each: several GB.
#
#   scripts/check_torch_versions.sh [VERSION ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -gt 0 ] || set -- 2.10.0 2.13.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q "$root" "$work/srt_ext"
[ ! -d "$root/../shared" ] || ln -s "$(cd "$root/../shared" && pwd)" "$work/shared"
cd "$work/srt_ext"

python3 -m venv "$work/newest"
"$work/newest/bin/pip" install -q -e . torch pytest hypothesis
built=$(sha256sum srt_ext/_C.so)
"$work/newest/bin/python" -m pytest python_tests
rm -rf "$work/newest"

for version in "$@"; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "torch==$version" numpy pytest hypothesis
  # From the source folder, where the editable install left the binary.
  "$work/$version/bin/python" -c "import torch, srt_ext; print('torch', torch.__version__)"
  "$work/$version/bin/python" -m pytest python_tests
  rm -rf "${work:?}/$version"
done
[ "$built" = "$(sha256sum srt_ext/_C.so)" ]
echo "one binary: $built"
