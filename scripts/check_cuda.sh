#!/usr/bin/env bash
# Compiles every CUDA kernel as far as PTX, and the code that calls them. Needs nvcc, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh build
export PATH="$PWD/.venv/bin:$PATH"

if ! command -v nvcc > /dev/null; then
  echo "check_cuda: there is no nvcc in PATH: CUDA code is not checked"
  exit 0
fi
[[ -f build/cuda-ptx/build.ninja ]] || cmake --preset cuda-ptx
cmake --build build/cuda-ptx --parallel "${JOBS:-$(nproc)}" --target gdn_kernels_cuda gdn_ops_cuda
