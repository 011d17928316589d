#!/usr/bin/env bash
# Settles the CUDA kernels on a machine with a GPU, without a network, in under eight minutes: builds
# for that GPU, tests, runs the kernels under compute-sanitizer, measures. Every step runs, whatever
# failed before it; the exit status is 1 if one failed, 2 if something that it needs is missing.
#
#   scripts/gpu_check.sh [--dry-run] [OUTPUT [COMMIT]]
#
# OUTPUT (default benchmarks/results) gets cuda-NAME.json and the logs. COMMIT names the sources where
# git does not. --dry-run: what needs no GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
output=${1:-$root/benchmarks/results}
limit=470 # seconds for everything: what is left goes to the step that runs

# ---- what is missing ----------------------------------------------------------------------------
missing=()
for tool in nvcc cmake ninja python3; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
for module in torch numpy pytest hypothesis timm torchvision typer; do
  python3 -c "import $module" 2>/dev/null || missing+=("python3 -m $module")
done
arch=90
if [ -z "$dry" ]; then
  arch=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) ||
    missing+=("a GPU that torch sees")
fi
if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}"
  exit 2
fi
sanitizer=$(command -v compute-sanitizer || true)
[ -n "$sanitizer" ] || echo "WARNING: no compute-sanitizer: its steps are SKIPPED"
for module in cupy jax; do
  python3 -c "import $module" 2>/dev/null || echo "WARNING: no $module: its tests are SKIPPED"
done
# Threads that wait for each other on cores which the machine does not really have take minutes.
export OMP_NUM_THREADS=$(($(nproc) < 8 ? $(nproc) : 8))

# ---- steps --------------------------------------------------------------------------------------
mkdir -p "$output"
output=$(cd "$output" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
commit=${2:-$(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)}
# A copy, so that the libraries that are built here do not replace those of the checkout.
mkdir "$work/tree"
cp -r "$root"/{srt_ext,python_tests,benchmarks,pyproject.toml,README.md} "$work/tree"
rm -f "$work"/tree/srt_ext/*.so
[ ! -d "$root/../shared" ] || ln -s "$root/../shared" "$work/shared" # published outputs, for tests
cd "$work/tree"

summary=$output/summary.txt
failed=0
{ nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"; } |
  sed "s/^/commit $commit, sm_$arch, /" | tee "$summary"

# step NAME SECONDS LOG COMMAND...: runs it, appends to LOG, never longer than what is left.
step() {
  local name=$1 seconds=$2 log=$output/$3 begin=$SECONDS status=0 left=$((limit - SECONDS))
  shift 3
  printf '\n=== [%3d s] %s\n' "$SECONDS" "$name" | tee -a "$log"
  [ "$left" -lt "$seconds" ] || left=$seconds
  if [ "$left" -le 0 ]; then
    status=124
  else
    timeout -k 5 "$left" "$@" >"$work/step.log" 2>&1 || status=$?
    cat "$work/step.log" >>"$log"
    tail -n "${shown:-12}" "$work/step.log"
  fi
  case $status in
    0) name="ok      $name" ;;
    124 | 137) name="TIMEOUT $name" ;;
    *) name="FAILED  $name ($status)" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  printf '%4d s  %s\n' $((SECONDS - begin)) "$name" | tee -a "$summary"
  return 0
}

for log in build.log ptxas.txt tests.log sanitizer.log benchmark.log; do : >"$output/$log"; done

build=$work/build
step "configure" 60 build.log cmake -G Ninja -S "$root" -B "$build" \
  -DPython3_EXECUTABLE="$(command -v python3)" -DSRT_CUDA=1 -DSRT_CUDA_ARCHS="$arch" \
  -DSRT_SANITIZE=ON
shown=3 step "build" 200 build.log cmake --build "$build"
step "install" 10 build.log cmake --install "$build" --component python --prefix srt_ext
shown=40 step "registers, no spills" 10 ptxas.txt \
  python3 "$root/scripts/cuda_resources.py" "$output/build.log"

pytest=(python3 -m pytest -p no:cacheprovider)
step "CPU kernels" 60 tests.log "${pytest[@]}" python_tests/test_ensemble.py -k "golden or test_out"
if [ -n "$dry" ]; then
  step "CUDA tests, collected" 60 tests.log "${pytest[@]}" python_tests/test_cuda.py \
    python_tests/test_cuda_autograd.py python_tests/test_array.py \
    python_tests/test_backbones.py::test_on_a_gpu --collect-only
  step "benchmark, on the CPU" 120 benchmark.log \
    python3 -m benchmarks --extent walk --results "$work/results" --commit "$commit"
else
  step "CUDA tests" 150 tests.log "${pytest[@]}" -v --durations=10 \
    python_tests/test_cuda.py python_tests/test_cuda_autograd.py python_tests/test_array.py \
    python_tests/test_backbones.py::test_on_a_gpu
  tail -n 1 "$output/tests.log" >>"$summary" # how many ran
  step "cuda_sanitize" 30 sanitizer.log "$build/cuda_sanitize"
  # Some virtual machines lend a GPU that the sanitizer cannot watch.
  if [ -n "$sanitizer" ] && timeout 60 "$sanitizer" "$build/cuda_sanitize" --probe 2>&1 |
    grep -q "Device not supported"; then
    echo "WARNING: compute-sanitizer does not support this device: its steps are SKIPPED" | tee -a "$summary"
    sanitizer=
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    if [ -n "$sanitizer" ]; then
      step "$tool" 60 sanitizer.log "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$build/cuda_sanitize"
    else
      echo "   0 s  SKIPPED $tool: compute-sanitizer cannot run" | tee -a "$summary"
    fi
  done
  shown=80 step "benchmark" 210 benchmark.log python3 -m benchmarks --device cuda \
    --rounds 20 --results "$output" --commit "$commit" --seconds $((limit - SECONDS < 210 ? limit - SECONDS - 15 : 195))
fi

printf '\n'
cat "$summary"
printf '%4d s  in all; logs in %s\n' "$SECONDS" "$output"
exit "$failed"
