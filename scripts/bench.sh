#!/usr/bin/env bash
# Runs every benchmark of a build: scripts/bench.sh build/release
set -euo pipefail
cd "$(dirname "$0")/.."
for benchmark in benchmarks/*.py; do
  echo "== $benchmark"
  .venv/bin/python "$benchmark" --library "$1/lib/libgdn_ops.so"
done
for benchmark in "$1"/bin/gdn_bench_*; do
  [[ -x $benchmark ]] || continue
  echo "== $benchmark"
  "$benchmark"
done
