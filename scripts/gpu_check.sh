#!/usr/bin/env bash
# Tests, profiles and measures the CUDA kernels on a machine with one GPU, in two runs. `first` takes at
# most 330 seconds and contains the most important steps; `second` takes at most 270 seconds and contains
# the rest.
#
#   scripts/gpu_check.sh [--dry-run] [--output FOLDER] first
#   scripts/gpu_check.sh [--dry-run] [--output FOLDER] second [TEST ...]
#
# The runs use the binaries in gpu_bundle, which scripts/gpu_bundle.sh builds. If that folder does not
# exist, it is built first, which takes up to 240 seconds more.
#
# FOLDER (default benchmarks/results) receives a summary, a log, JSON files, the clocks of the GPU and the
# report of Nsight Compute. They are written step by step, so a run that is stopped early keeps its
# results. Each step has a time limit and runs even if an earlier step failed; the last steps are skipped
# if no time is left. `second` first runs each TEST (a pytest node id); `first` ends by printing the
# command that repeats its failed tests. --dry-run runs the steps that need no GPU, on the CPU.
#
# Exit status: 1 if a step failed, 2 if a requirement is missing.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}
dry=
output=$root/benchmarks/results
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --output) output=${2:?--output needs a folder} && shift ;;
    -*) usage ;;
    *) break ;;
  esac
  shift
done
run=${1:-}
[ $# -eq 0 ] || shift
failed_before=("$@")
case $run in
  first) limit=330 && [ $# -eq 0 ] || usage ;;
  second) limit=270 ;;
  *) usage ;;
esac
# A dry run measures tiny shapes; its results must not replace those of the repository.
[ -z "$dry" ] || [ "$output" != "$root/benchmarks/results" ] || output=$(mktemp -d)
output=$(mkdir -p "$output" && cd "$output" && pwd)
device=${dry:+cpu}
device=${device:-cuda}
bundle=$root/gpu_bundle

# ---- requirements -------------------------------------------------------------------------------
missing=()
need() { command -v "$1" >/dev/null || missing+=("$1${2:+ ($2)}"); }
need python3
[ -n "$dry" ] || need nvidia-smi "use --dry-run without a GPU"
if [ ! -d "$bundle" ]; then
  hint="or build gpu_bundle elsewhere with scripts/gpu_bundle.sh and copy it here"
  for tool in nvcc cmake ninja; do need $tool "$hint"; done
elif [ "$(cat "$bundle/digest" 2>/dev/null)" != "$(bash "$root/scripts/kernel_digest.sh")" ]; then
  missing+=("a gpu_bundle of these sources: it was built from commit $(cat "$bundle/commit" 2>/dev/null),\
 and csrc, CMakeLists.txt or cuda_sanitize.cu differ; run scripts/gpu_bundle.sh again")
fi
absent=
# Modules are located, not imported, because each import takes seconds.
while read -r module; do
  case $module in
    cupy | jax | triton)
      echo "WARNING: $module is not installed: its tests are SKIPPED"
      absent+=" $module"
      ;;
    xdist) missing+=("the Python module xdist (pip install pytest-xdist)") ;;
    *) missing+=("the Python module $module") ;;
  esac
done < <(python3 - torch numpy pytest hypothesis timm torchvision typer xdist cupy jax triton <<'PY'
import sys
from importlib.util import find_spec
for name in sys.argv[1:]:
    if find_spec(name) is None:
        print(name)
PY
)
for tool in ncu compute-sanitizer; do
  command -v $tool >/dev/null || echo "WARNING: $tool was not found: its steps are SKIPPED"
done
if [ -z "$dry" ] && [ ${#missing[@]} -eq 0 ] && [ -d "$bundle" ]; then
  chmod +x "$bundle/cuda_sanitize" # copying may have removed the permission
  error=$("$bundle/cuda_sanitize" --probe 2>&1) || missing+=("a GPU that supports the bundle: $error")
fi
if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}" >&2
  exit 2
fi

# ---- steps --------------------------------------------------------------------------------------
work=$(mktemp -d)
sampler=
child=
finish() {
  [ -z "$child" ] || kill -INT -- "-$child" 2>/dev/null || true
  [ -z "$sampler" ] || kill "$sampler" 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
trap 'echo "interrupted" | tee -a "$summary"; exit 130' INT TERM
summary=$output/summary-$run.txt
log=$output/log-$run.txt
: >"$summary"
: >"$log"
failed=0

# step NAME SECONDS COMMAND...: runs a command and appends its output to the log. It ends after SECONDS or
# the remaining time by an interrupt, so that pytest still prints the failed tests.
grace=12
step() {
  local name=$1 seconds=$2 begin=$SECONDS status=0 left=$((limit - SECONDS - grace)) from
  shift 2
  if [ "$left" -le 0 ]; then
    failed=1
    printf '   0 s  NOT RUN %s: no time left\n' "$name" | tee -a "$summary"
    return
  fi
  [ "$left" -lt "$seconds" ] || left=$seconds
  printf '\n=== [%3d s] %s\n' "$SECONDS" "$name" | tee -a "$log"
  from=$(wc -l <"$log")
  # Runs in its own process group in the background, so that an interrupt of this script ends it, too.
  set -m
  timeout -s INT -k $((grace - 2)) "$left" "$@" </dev/null >>"$log" 2>&1 &
  child=$!
  set +m
  wait "$child" || status=$?
  child=
  tail -n "+$((from + 1))" "$log" | tail -n "${shown:-15}"
  case $status in
    0) name="ok      $name" ;;
    124 | 137) name="TIMEOUT $name" ;;
    *) name="FAILED  $name ($status)" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  printf '%4d s  %s\n' $((SECONDS - begin)) "$name" | tee -a "$summary"
}
skip() { printf '   0 s  SKIPPED %s\n' "$*" | tee -a "$summary"; }

export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE XLA_PYTHON_CLIENT_PREALLOCATE=false
# Virtual machines can report more cores than they have. More threads than cores then take minutes to
# synchronise.
cores=$(nproc)
export OMP_NUM_THREADS=$((cores < 8 ? cores : 8))

if [ ! -d "$bundle" ]; then
  limit=$((limit + 240))
  step "gpu_bundle" 240 bash "$root/scripts/gpu_bundle.sh" native
  [ "$failed" -eq 0 ] || { echo "gpu_bundle failed: see $log" >&2 && exit 2; }
fi
commit=$(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null ||
  cat "$bundle/commit" 2>/dev/null || echo unknown)

# Runs in a copy, so that the libraries of the bundle do not replace those of the checkout.
mkdir "$work/tree"
cp -r "$root"/{srt_ext,python_tests,benchmarks,scripts,pyproject.toml,README.md} "$work/tree"
rm -f "$work"/tree/srt_ext/*.so
cp "$bundle"/*.so "$work/tree/srt_ext"
[ ! -d "$root/../shared" ] || ln -s "$root/../shared" "$work/shared" # optional evaluation data
cd "$work/tree"
export PYTHONPATH=$work/tree

if [ -z "$dry" ]; then
  facts=name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,power.limit
  card=$(nvidia-smi --query-gpu=$facts --format=csv,noheader) || card="no GPU"
  # Samples the clocks during the run, because they differ from those of an idle GPU.
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv \
    --loop-ms=500 >"$output/clocks-$run.csv" 2>/dev/null &
  sampler=$!
else
  card="the CPU (dry run)"
fi
echo "$run run of commit $commit on $card" | tee -a "$summary"

smoke() { step "smoke$1" "$2" python3 scripts/gpu_smoke.py --device "$device" "${@:3}"; }
benchmark() { # EXTENT SECONDS
  local extent=$1 left=$((limit - SECONDS - grace - 20))
  [ -z "$dry" ] || extent=walk
  shown=60 step "benchmark: $1" $(($2 + 15)) python3 -m benchmarks --device "$device" \
    --extent "$extent" --seconds $(($2 < left ? $2 : left)) --rounds 20 --results "$output" \
    --commit "$commit"
}
# Tests marked cuda are selected from these files.
tests=(python_tests/test_{cuda,kernels,ensemble,median,shift,windows,streams,gradients,ops,errors}.py
  python_tests/test_{backbones,dlpack}.py)
pytest() { # NAME SECONDS WORKERS ARGUMENT...
  local workers=$3
  [ -z "$dry" ] || set -- "$@" --collect-only
  OMP_NUM_THREADS=$((workers > 0 ? 1 : OMP_NUM_THREADS)) step "$1" "$2" python3 -m pytest \
    -p no:cacheprovider -n "$workers" -v --tb=short --durations=5 "${@:4}"
}
jax_handlers() { # SECONDS
  if [ ! -e "$bundle/_xla_cuda.so" ]; then
    skip "JAX handlers: gpu_bundle was built without jaxlib"
  elif [[ $absent == *jax* ]]; then
    skip "JAX handlers: jax is not installed"
  else
    pytest "JAX handlers" "$1" 0 -m cuda python_tests/test_jax.py
  fi
}
sanitize() { # TOOL SECONDS
  local probe
  if [ -n "$dry" ]; then
    skip "$1: dry run"
    return
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$1: compute-sanitizer was not found"
    return
  fi
  # compute-sanitizer does not support the GPUs of some virtual machines.
  probe=$(timeout 15 compute-sanitizer "$bundle/cuda_sanitize" --probe 2>&1 || true)
  case $probe in
    *"not supported"*) skip "$1: compute-sanitizer does not support this GPU" ;;
    *) step "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 1 \
      "$bundle/cuda_sanitize" --reduced ;;
  esac
}
nsight_compute() { # SECONDS
  local call=(python3 -m benchmarks.profile --device "$device" --once)
  local kernels='regex:mean_kernel|per_view_kernel|shift_kernel' # without the kernels that build tables
  for name in mean-float32 mean-bfloat16 median-float32 shift-float32; do call+=(--only "$name"); done
  if [ -n "$dry" ]; then
    step "the calls that Nsight Compute profiles" "$1" "${call[@]}"
  elif ! command -v ncu >/dev/null; then
    skip "Nsight Compute: ncu was not found"
  else
    shown=5 step "Nsight Compute" "$1" ncu --clock-control none --set full --target-processes all \
      --profile-from-start off --kernel-name "$kernels" --page details --export "$output/kernels" \
      --force-overwrite "${call[@]}"
  fi
}

# ---- the two runs -------------------------------------------------------------------------------
if [ "$run" = first ]; then
  smoke "" 30
  if [ -z "$dry" ]; then
    smoke ", first call in a CUDA graph" 20 --graph
    step "cuda_sanitize" 30 "$bundle/cuda_sanitize"
  else
    skip "first call in a CUDA graph, cuda_sanitize: dry run"
  fi
  benchmark core 80
  shown=60 step "profile" 25 python3 -m benchmarks.profile --device "$device" --results "$output" \
    --commit "$commit"
  nsight_compute 40
  pytest "value tests" 60 "$((cores < 12 ? cores : 12))" -m "cuda and not serial and not slow" \
    "${tests[@]}"
  pytest "graphs, streams, synchronisation, compile" 45 0 -m "cuda and (serial or slow)" "${tests[@]}"
  sanitize memcheck 40
else
  [ ${#failed_before[@]} -eq 0 ] || pytest "tests that failed before" 30 0 -m "" "${failed_before[@]}"
  for tool in racecheck initcheck synccheck; do sanitize "$tool" 25; done
  jax_handlers 25
  if [ -z "$dry" ]; then
    benchmark rest 100
  else
    skip "benchmark: rest: dry run (the first run covers it)"
  fi
fi

printf '\n'
cat "$summary"
printf '%4d s  in total; all results are in %s\n' "$SECONDS" "$output"
mapfile -t again < <(sed -n 's/^FAILED \(python_tests[^ ]*::[^]]*\]\{0,1\}\).*/\1/p' "$log" | sort -u)
if [ "$run" = first ] && [ ${#again[@]} -gt 0 ]; then
  echo "to repeat the failed tests:"
  printf '%q ' scripts/gpu_check.sh --output "$output" second "${again[@]}"
  printf '\n'
fi
exit "$failed"
