#!/usr/bin/env bash
# Format and code checks of every file that git knows; changes nothing, fails at the first finding.
#
# clang-tidy reads the kernels, for one instruction set: with torch's headers it needs 10 s a file.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t cpp < <(git ls-files '*.h' '*.cpp')
mapfile -t shell < <(git ls-files '*.sh' .ci/run)

echo "lint: clang-format"
clang-format --dry-run --Werror "${cpp[@]}"

echo "lint: clang-tidy"
mapfile -t light < <(git ls-files 'src/kernels/*.cpp')
include="$(mktemp -d)"
trap 'rm -r "$include"' EXIT
ln -s "$PWD/src" "$include/gdn"
printf '%s\0' "${light[@]}" | xargs -0 -P "$(nproc)" -I {} clang-tidy --quiet {} -- \
  -x c++ -std=c++20 -I "$include" -DHWY_COMPILE_ONLY_STATIC 2> /dev/null

echo "lint: ruff"
ruff check --quiet .
ruff format --check --quiet .

echo "lint: shellcheck"
shellcheck "${shell[@]}"
