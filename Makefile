# The ways in: 'make demo' and 'make test' on a fresh machine need nothing else done by hand.
# PRESET=debug or asan chooses another build, JOBS the number of parallel jobs.

PRESET ?= release
# A compiler that reads torch's headers takes up to 2 GB.
JOBS ?= $(shell awk -v cores=$$(nproc) '/MemAvailable/ { n = int($$2 / 2^21) } \
          END { print n < 1 ? 1 : n < cores ? n : cores }' /proc/meminfo)
BUILD := build/$(PRESET)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := build
.PHONY: help setup build test test-gpu budget demo wheel bench lint format install clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup:  ## install what is missing: system packages and .venv with PyTorch
	@scripts/setup.sh build

build: setup  ## build everything into build/$(PRESET)
	@test -f $(BUILD)/build.ninja || cmake --preset $(PRESET)
	@cmake --build $(BUILD) --parallel $(JOBS)

test: build  ## run every test
	@# Programs side by side share the cores: threads that wait must not spin.
	@OMP_WAIT_POLICY=PASSIVE ctest --test-dir $(BUILD) --no-tests=error --output-on-failure \
	  --parallel $(JOBS)

test-gpu:  ## run the tests that need an NVIDIA GPU (and CUDA 12.8 or newer to build them)
	@$(MAKE) --no-print-directory build PRESET=cuda
	@ctest --test-dir build/cuda --no-tests=error --output-on-failure --label-regex '^cuda$$'

budget: build  ## count the CPU kernels' instructions: no more than benchmarks/cpu_budget.json
	@scripts/cpu_budget.py --benchmark $(BUILD)/bin/gdn_bench_cpu_kernels

demo: build  ## train a small language model on Python's standard library, and compare it
	@scripts/demo.py --gdn $(BUILD)/bin/gdn --out demo

wheel: build  ## build the Python package as dist/*.whl
	@.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation -C build-dir=build/package \
	  -C cmake.define.GDN_BUILT_IN=$(CURDIR)/$(BUILD) -w dist .

bench: build  ## measure, beside PyTorch and transformers
	@scripts/bench.sh $(BUILD)

lint:  ## check format and code (changes nothing)
	@scripts/setup.sh lint
	@scripts/lint.sh $(BUILD)

format:  ## format C++ and Python
	@scripts/setup.sh lint
	@scripts/format.sh

install: build  ## install under PREFIX (default /usr/local)
	@cmake --install $(BUILD) $(if $(PREFIX),--prefix $(PREFIX))

clean:  ## remove every build
	@rm -rf build
