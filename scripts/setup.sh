#!/usr/bin/env bash
# Installs what is missing: system packages through apt-get and .venv with PyTorch from PyPI.
#
#   scripts/setup.sh build   what building, testing, measuring and the demo need
#   scripts/setup.sh lint    what 'make lint' and 'make format' need
#
# The README says what each package is for. Nothing is asked; nothing present is changed.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

case "${1:-}" in
  build)
    system=(g++ libhwy-dev nlohmann-json3-dev libcli11-dev libsentencepiece-dev libgtest-dev
            valgrind python3-venv)
    python=(torch==2.11.0 transformers==5.23.0 numpy matplotlib scikit-build-core pytest accelerate
            peft mkdocs-material mkdocstrings-python hatchling lm_eval)
    ;;
  lint)
    system=(clang-tidy shellcheck)
    python=(clang-format==14.0.6 ruff)
    ;;
  *) fail "expected one of build, lint" ;;
esac

# A stamp with this script's and the interpreter's state makes every further call quick.
interpreter="${PYTHON:-python3}"
stamp=".venv/.gdn-setup-$1"
state="$(sha256sum scripts/setup.sh | cut -d ' ' -f 1)"
if [[ -f $stamp && $(<"$stamp") == "$state" && -x .venv/bin/python ]]; then exit 0; fi

install_system_packages() {
  command -v dpkg-query > /dev/null || {
    echo "setup: not a Debian or Ubuntu system, so please see to these yourself: ${system[*]}" >&2
    return
  }
  local missing=() package
  for package in "${system[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q '^install ok installed$' ||
      missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  local as_root=()
  if ((EUID != 0)); then
    sudo -n true 2> /dev/null ||
      fail "missing system packages, run: sudo apt-get install -y ${missing[*]}"
    as_root=(sudo -n)
  fi
  echo "setup: installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq || fail "apt-get update failed: is there a network?"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null ||
    fail "apt-get could not install ${missing[*]}"
}

# The system's CMake and ninja serve where they are new enough; PyPI has both.
add_build_tools() {
  local version
  version="$({ cmake --version 2> /dev/null || true; } | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')"
  [[ $(printf '%s\n' 3.25 "${version:-0}" | sort -V | head -n 1) == 3.25 ]] ||
    python+=('cmake>=3.25')
  command -v ninja > /dev/null || python+=(ninja)
}

install_system_packages
add_build_tools
[[ -x .venv/bin/python ]] || "$interpreter" -m venv .venv || fail "$interpreter cannot make .venv"
echo "setup: ${python[*]} in .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${python[@]}" ||
  fail "pip could not install ${python[*]}: is there a network, and room on the disk (8 GB)?"
if [[ $1 == build ]]; then
  # The Python package as it lies here, which finds the library that CMake builds.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation -C wheel.cmake=false --editable . || fail "pip could not install python/"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --editable compat/fla || fail "pip could not install compat/fla"
fi
echo "$state" > "$stamp"
