# Everything that is run here, each by one command; `make help` lists them. A machine needs Python >= 3.10 with venv, a
# C++20 compiler and make: the environment is kept in .venv, and whatever is stale is built first.
#
# ARGS goes to the command that a target runs: make test ARGS="-k stablemax -x"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ifeq ($(origin CXX),default)
CXX := c++
endif
TORCH_VERSION := 2.13.0
ARGS ?=
EXAMPLE ?= grokking compander imbalanced_regression monge_map imbalanced_clustering

python := .venv/bin/python
pip := $(python) -m pip --disable-pip-version-check
# Without build isolation: the extension is built against the torch that it will run in.
build := --no-build-isolation --no-deps
nvcc := $(or $(and $(CUDA_HOME),$(wildcard $(CUDA_HOME)/bin/nvcc)),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
# One folder and one configuration for the editable installation, the wheel, the GPU kernels' report and the packaging
# tests: nothing is compiled twice. They differ in the targets that they build. A torch without CUDA needs the CPU's only.
native_build := build/native
cpu_only := --config-settings build.targets=_C --config-settings install.components=cpu
compilers := CXX=$(CXX) $(if $(nvcc),CUDACXX=$(nvcc))

# ---- the environment ----

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "pyreg needs Python >= 3.10, and $(PYTHON) was not found; name one with: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "pyreg needs Python >= 3.10, and $(PYTHON) is $$($(PYTHON) -V); name another with: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot create environments: install its venv module (Debian, Ubuntu: python3-venv)"; exit 1; }
	@echo 'template <typename T> concept Any = true; int main() {}' | $(CXX) -std=c++20 -x c++ -fsyntax-only - 2>/dev/null \
	  || { echo "pyreg needs a C++20 compiler, and $(CXX) is none; install g++ >= 11 or name one with: make CXX=..."; exit 1; }
	$(PYTHON) -m venv .venv

# torch first, alone and by its version: as the dependency of another package it would be whatever is newest.
.venv/torch-$(TORCH_VERSION): | .venv/bin/python
	$(pip) install -q torch==$(TORCH_VERSION)
	touch $@

extras := test lint bench examples docs wheel $(if $(wildcard triton_kernels/*.py),triton)

.venv/requirements.txt: pyproject.toml tools/requirements.py $(wildcard triton_kernels/*.py) .venv/torch-$(TORCH_VERSION)
	$(python) tools/requirements.py $(extras) > $@.new
	$(pip) install -q -r $@.new
	mv $@.new $@

# An editable install finds Python files where they lie, but only those that were there when it was made.
build/python_files: FORCE
	@mkdir -p build
	@find pyreg triton_kernels -name '*.py' 2>/dev/null | sort > $@.new || true
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

native := CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.venv/pyreg: $(native) build/python_files .venv/requirements.txt
	@echo "Building pyreg"
	parts=$$($(python) -c 'import torch; print("" if torch.version.cuda else "$(cpu_only)")'); \
	$(compilers) $(pip) install -q $(build) --config-settings build-dir=$(native_build) $$parts -e .
	touch $@

# ---- what is run ----

# Tests share the cores, a file at a time: what a file has set up serves all of its tests. Threads that wait for work
# then must not spin, for they would hold the cores that other tests need.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 8))')
lane := OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2 $(python)
shared := -n $(JOBS) --dist loadfile

# Where ARGS choose tests, a lane may have none of them: pytest's status 5.
maybe_none := $(if $(ARGS),|| [ $$? -eq 5 ])

.PHONY: help test sanitize fuzz demo soak bench tables docs wheel wheel-test cuda gpu lint format env clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 12

test: .venv/pyreg ## every test: CPU kernels, Triton kernels interpreted, CUDA kernels emulated; both of C++ under sanitizers
	$(lane) -m pytest tests $(shared) $(ARGS) $(maybe_none)
	$(lane) -m pytest tests $(shared) --backend=triton_on_cpu $(ARGS) $(maybe_none)
	$(lane) tests/cuda_on_cpu/run_sanitized.py tests $(shared) --backend=cuda_on_cpu $(ARGS) $(maybe_none)
	$(MAKE) sanitize

# For the instruction set of this processor. Under sanitizers the whole suite takes very long: SANITIZED=tests for it.
SANITIZED ?= tests/fuzz tests/sanitized

sanitize: .venv/pyreg ## CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; SANITIZED=tests for all tests
	isa=$$($(python) -c 'from pyreg import _extension; print(_extension.CPU.build_info["isa"])'); \
	CXX=$(CXX) .venv/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(python) -DCMAKE_BUILD_TYPE=Release -DPYREG_CUDA=OFF -DPYREG_SANITIZE=ON \
	  -DPYREG_ONLY_ISA=$$isa > build/sanitize.log
	.venv/bin/cmake --build build/sanitize > build/sanitize.log || { cat build/sanitize.log; exit 1; }
	$(lane) tests/cuda_on_cpu/run_sanitized.py $(SANITIZED) $(shared) --backend=cpu --extension=build/sanitize $(ARGS) $(maybe_none)

MINUTES ?= 10

fuzz: .venv/pyreg ## random arguments for every operator, against the reference; MINUTES=10 of them
	$(python) -m tests.fuzz $(MINUTES) $(ARGS)

demo: .venv/pyreg ## run the examples with the fused operators; EXAMPLE=compander for one of them
	for example in $(EXAMPLE); do $(python) examples/$$example.py $(ARGS); done

STEPS ?= 10000
soak: .venv/pyreg ## long trainings of every family: memory and drift; STEPS=10000, ARGS="sinkhorn conr" for some
	$(python) -m tests.soak --steps $(STEPS) $(ARGS)

bench: .venv/pyreg ## time every operator beside its rivals and its floor, 15 minutes; ARGS=--quick, 3 minutes
	$(python) -m bench $(ARGS)

RESULTS ?=
tables: .venv/pyreg ## fill the tables of README.md and docs from RESULTS="bench/results/A.csv B.csv", or those they name
	$(python) -m bench.markdown $(RESULTS) README.md $$(find docs -name '*.md')

docs: .venv/pyreg ## build/docs/index.html, the documentation
	$(python) -m sphinx -W --keep-going -q $(ARGS) docs build/docs
	@echo build/docs/index.html

# The wheel's tag says on which systems it runs; auditwheel finds it, and leaves torch's libraries out.
wheel: .venv/requirements.txt ## dist/: the wheel, with CUDA kernels where nvcc is found, and the sources
	rm -rf build/wheel dist/pyreg-*
	$(compilers) $(pip) wheel -q $(build) --config-settings build-dir=$(native_build) -w build/wheel $(ARGS) .
	PATH=$(CURDIR)/.venv/bin:$$PATH $(python) -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl
	$(python) -c 'from scikit_build_core.build import build_sdist; build_sdist("dist")'
	$(python) -m twine check --strict dist/*
	$(python) tools/check_wheel.py dist/*.whl

# With another Python and torch: make wheel-test PYTHON=python3.10 TORCH_VERSION=2.10.0
wheel-test: ## all tests against the wheel in dist/, installed in an environment without compilers, in a folder elsewhere
	@ls dist/*.whl > /dev/null || { echo "make wheel-test needs a wheel in dist: run make wheel first"; exit 1; }
	$(PYTHON) tools/wheel_test.py dist/*.whl build/wheel_test/$(notdir $(PYTHON))-torch-$(TORCH_VERSION) \
	  --torch $(TORCH_VERSION) $(ARGS)

lint: .venv/requirements.txt ## check format, style and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	find csrc tests/cuda_on_cpu -regex '.*\.\(h\|cpp\|cuh\|cu\)' | xargs .venv/bin/clang-format --dry-run -Werror

format: .venv/requirements.txt ## rewrite all files in the format that lint checks
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
	find csrc tests/cuda_on_cpu -regex '.*\.\(h\|cpp\|cuh\|cu\)' | xargs .venv/bin/clang-format -i

env: .venv/pyreg ## versions, what is built, what is loaded, and why not
	$(python) -m pyreg.env

clean: ## remove what was built, and the environment
	rm -rf build dist .venv

# ---- CUDA ----

cuda: .venv/pyreg ## compile every GPU kernel for every architecture: registers, shared memory, spills
	@test -n "$(nvcc)" || { echo "make cuda needs nvcc (CUDA >= 12.8): put it on the PATH or set CUDA_HOME"; exit 1; }
	@grep -qs '^build _C_cuda:' $(native_build)/build.ninja \
	  || { echo "$(native_build) was configured without nvcc: run make again after rm -r $(native_build) .venv/pyreg"; exit 1; }
	.venv/bin/cmake --build $(native_build) --target _C_cuda > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	$(python) tools/symbols.py $(native_build)/_C_cuda.*
	$(python) tools/cuda_report.py $(native_build) $(ARGS)
	$(python) tools/triton_report.py $(ARGS)

# On a machine with a GPU whose own Python has torch, Triton and the build tools: nothing is installed or fetched. The
# installed package must come before the sources in the current folder: hence PYTHONSAFEPATH and the import mode.
LOGS ?= build/gpu
BENCH_ARGS ?=
site := $(CURDIR)/build/gpu/site
gpu_python := PYTHONPATH=$(site):$(CURDIR) PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 $(PYTHON)

gpu: ## on a machine with a GPU: build for it, run all tests and benchmarks; ARGS for pytest, BENCH_ARGS for bench
	mkdir -p $(LOGS)
	architecture=$$($(PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'); \
	$(PYTHON) -m pip install $(build) --upgrade --target $(site) --config-settings build-dir=build/gpu/cmake \
	  --config-settings cmake.define.PYREG_CUDA_ARCHITECTURES=$$architecture . 2>&1 | tee $(LOGS)/build.log
	$(gpu_python) -m pyreg.env 2>&1 | tee $(LOGS)/env.log
	status=0; \
	$(gpu_python) -m pytest tests --import-mode=append --backend=auto $(ARGS) 2>&1 | tee $(LOGS)/test.log || status=1; \
	$(gpu_python) -m bench --device cuda $(BENCH_ARGS) 2>&1 | tee $(LOGS)/bench.log || status=1; \
	cp bench/results/*_cuda.csv $(LOGS) || status=1; \
	exit $$status
