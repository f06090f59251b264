#!/usr/bin/env bash
# Formats every C++ and Python file that git knows.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files -z '*.h' '*.cpp' | xargs -0 clang-format -i
ruff check --quiet --fix --select I .
ruff format --quiet .
