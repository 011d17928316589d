#!/usr/bin/env bash
# Builds the CPU code with the sanitizers of GCC and runs it. Deliberate faults are run first, and the
# sanitizers must report them. The exit status is 1 if a sanitizer reports any other error.
#
#   scripts/sanitize.sh address [PYTEST ARGUMENT ...]
#       AddressSanitizer and UndefinedBehaviorSanitizer. Runs cpu_sanitize, also for leaks, and the tests of
#       the ops and bindings (or those that the arguments select) with one thread and with two.
#
#   scripts/sanitize.sh thread [ROUNDS [INSTRUCTION SET]]
#       ThreadSanitizer. Runs cpu_sanitize on the thread pool of srt_ext.numpy. torch is not used, because
#       its OpenMP runtime is not instrumented.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-}
shift || true
python=$(command -v python3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # FLAGS TARGET ...
  local flags=$1
  shift
  cmake -G Ninja -S . -B "$work/build" -DSRT_CUDA=0 -DSRT_SANITIZE=1 -DPython3_EXECUTABLE="$python" \
    -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -g1" >/dev/null
  cmake --build "$work/build" --target "$@" | tail -n 1
}

reports() { # TEXT COMMAND ...: the command must fail and print TEXT
  local text=$1
  shift
  if "$@" >"$work/report" 2>&1 || ! grep -q "$text" "$work/report"; then
    cat "$work/report"
    echo "expected a report of '$text' from: $*" && exit 1
  fi
  echo "reported as expected: $text"
}

thread() {
  build "-fsanitize=thread -fno-omit-frame-pointer" cpu_sanitize
  reports "data race" "$work/build/cpu_sanitize" --fault race
  "$work/build/cpu_sanitize" "$@"
}

# Calls an op of NAME on tokens that exceed their memory. The sanitizer must report it, which shows that the
# kernels are instrumented.
overrun() { # NAME: torch or numpy
  reports heap-buffer-overflow sanitized -c "
import ctypes, numpy, srt_ext, srt_ext.numpy, torch
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
memory = (ctypes.c_float * 10000).from_address(malloc(ctypes.c_size_t(20000)))
tokens = numpy.frombuffer(memory, numpy.float32).reshape(4, 1, 25, 100)
if '$1' == 'torch':
    srt_ext.ensemble(torch.from_numpy(tokens), torch.zeros(4, 2), (5, 5), (2, 2))
else:
    srt_ext.numpy.ensemble(tokens, [(0, 0)] * 4, (5, 5), (2, 2))"
}

# Runs Python under the sanitizers. Python is not instrumented, so AddressSanitizer must be loaded before it.
# Python also leaks, so leaks are only checked by cpu_sanitize. An allocation of 2^60 bytes must fail as it
# does without the sanitizer.
sanitized() { # ARGUMENTS of Python
  local libraries
  libraries=$(for name in asan ubsan stdc++; do "${CXX:-c++}" -print-file-name=lib$name.so; done | paste -sd:)
  LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONMALLOC=malloc \
    UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=PASSIVE "$python" "$@"
}

address() {
  build "-fsanitize=address,undefined,float-divide-by-zero,float-cast-overflow -fno-sanitize-recover=all \
-fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS" all
  for text in overflow leak undefined; do
    reports "ERROR: .*$text\|runtime error: .*overflow" "$work/build/cpu_sanitize" --fault "$text"
  done
  "$work/build/cpu_sanitize"

  # The tests import the package next to them, so they run in a copy with the sanitized libraries.
  git ls-files -z | xargs -0 cp --parents -t "$work"
  cmake --install "$work/build" --component python --prefix "$work/srt_ext" >/dev/null
  cd "$work"
  overrun torch
  overrun numpy
  [ $# -gt 0 ] || set -- -m "not slow and not interp" \
    python_tests/test_{kernels,ensemble,shift,windows,median,streams,numpy,dlpack,ops,errors,gradients}.py
  for threads in 1 2; do
    echo "$threads threads: pytest $*"
    OMP_NUM_THREADS=$threads sanitized -m pytest -p no:cacheprovider "$@"
  done
}

case $kind in
  address | thread) "$kind" "$@" ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2 && exit 2 ;;
esac
