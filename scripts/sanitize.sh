#!/usr/bin/env bash
# Tests of the kernels and operators, and the quick ones of the rest, under ASan and UBSan.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh build
export PATH="$PWD/.venv/bin:$PATH"

# libtorch is not instrumented: what it keeps until the process ends looks like leaks, so leaks are
# not looked for. Nor is use after return: g++ 12's stand-in for the stack aligns to less than the 64
# bytes of AVX-512's arrays, and the first aligned store faults.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_WAIT_POLICY=PASSIVE  # programs side by side share the cores

programs=(gdn_test_kernels gdn_test_ops)
[[ -f build/asan/build.ninja ]] || cmake --preset asan
cmake --build build/asan --parallel "${JOBS:-$(nproc)}" --target "${programs[@]}"
ctest --test-dir build/asan --no-tests=error --output-on-failure --parallel "${JOBS:-$(nproc)}" \
  --label-regex '^(kernels|ops)$'
