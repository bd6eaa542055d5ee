# Every target sets up what it needs in $(VENV) by itself; a second run starts at once. After a
# change outside the project (another compiler, IMF_KERNELS_NO_EXT=1): `make clean` first.
#
#   make test VENV=/tmp/venv PYTHON=python3.12 ARGS="-k euler"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

py := $(VENV)/bin/python
installed := $(VENV)/.imf_kernels-installed
client := $(VENV)/.f5_tts-installed
log := $(VENV)/imf_kernels-install.log

.PHONY: help demo test test-hosts test-build test-gpu bench bench-cpu bench-streaming bench-gpu \
	bench-gpu-full bench-deployment bench-distillation bench-report count simulate kernels docs figures lint clean

help: ## This list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(installed) ## The whole method on speech of espeak-ng, on a laptop (options: ARGS=...)
	$(py) -m examples.quickstart $(ARGS)

test: $(installed) ## The tests, in a process per core (options: ARGS="-k euler")
	OMP_NUM_THREADS=1 $(py) -m pytest -n logical --maxprocesses 8 $(ARGS)

test-hosts: $(client) ## The F5-TTS host against F5-TTS itself
	$(py) -m pytest -rs tests/hosts/test_f5_tts_upstream.py $(ARGS)

test-build: $(installed) ## The extension against a CUDA build of torch (needs nvcc, no GPU)
	$(py) -m pytest -m build -rs -s tests/test_build.py $(ARGS)

test-gpu: $(installed) ## Only the tests that need a CUDA device
	$(py) -m pytest -m gpu $(ARGS)

bench: $(client) ## All suites on this CPU, into benchmarks/results/cpu/ (10 minutes)
	OMP_NUM_THREADS=2 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000 \
		$(py) -m benchmarks --device cpu --minutes 9.5 $(ARGS)

bench-gpu: $(client) ## All suites on a CUDA device, into benchmarks/results/<device>/ (10 minutes)
	$(py) -m benchmarks --device cuda --minutes 9 $(ARGS)

bench-gpu-full: $(client) ## The same, every contender for every shape (hours: it compiles each)
	$(py) -m benchmarks --device cuda --selection full $(ARGS)

bench-cpu: $(client) ## F5-TTS's own sampler against ours on this CPU (10 minutes)
	OMP_NUM_THREADS=2 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000 \
		$(py) -m benchmarks.f5_sampler --out benchmarks/results/cpu/f5_sampler.json $(ARGS)

bench-streaming: $(installed) ## Streams against solving the prefix again, on this CPU (10 minutes)
	OMP_NUM_THREADS=2 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000 \
		$(py) -m benchmarks.streaming --out benchmarks/results/cpu/streaming.json $(ARGS)

bench-deployment: $(installed) ## Exported files beside our own kernels, on this CPU (5 minutes)
	OMP_NUM_THREADS=2 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000 \
		$(py) -m benchmarks.deployment --out benchmarks/results/cpu/deployment.json $(ARGS)

count: $(installed) ## Operations, FLOPs and bytes of one evaluation, beside F5-TTS's own
	$(py) -m benchmarks.count $(ARGS)

bench-distillation: $(installed) ## What a supervised interval costs, counted (2 minutes)
	$(py) -m benchmarks.distillation --device cpu --out benchmarks/results/cpu/distillation.json $(ARGS)

bench-report: $(installed) ## benchmarks/REPORT.md and its plots, of all results that there are
	$(py) -m benchmarks.report $(ARGS)

simulate: $(installed) ## What solves would take on an H200 and on an A100, without one (3 minutes)
	$(py) -m benchmarks.simulate --out benchmarks/results/simulated $(ARGS)

kernels: $(installed) ## Registers, stack and shared memory of every kernel, compiled without a GPU
	$(py) -m benchmarks.kernels --out benchmarks/results/simulated/kernels.json $(ARGS)

docs: $(installed) ## The documents and the reference as a site, in out/docs
	$(py) -m sphinx -b html -W --keep-going -n -q docs out/docs $(ARGS)

figures: $(installed) ## The documents' figures, from the committed results
	$(py) -m docs.figures

lint: $(installed) ## Style, formatting and types
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(py) -m mypy

clean: ## Remove what was built; the environment stays
	rm -rf build dist *.egg-info imf_kernels/_C.*.so .pytest_cache .mypy_cache .ruff_cache $(installed) $(client)
	find imf_kernels tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Torch and the build tools come first: the extension is built against the torch that will run it,
# hence without build isolation.
$(installed): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
	@test -x $(py) || $(PYTHON) -m venv $(VENV)
	$(py) -m pip install -c constraints.txt torch setuptools cmake ninja
	$(py) -m pip install -c constraints.txt --no-build-isolation -v -e '.[dev,demo,docs,train,lora,eval,export,profile]' >$(log) 2>&1 \
		|| { tail -n 60 $(log); exit 1; }
	@grep -E 'error:|CMake Error|imf_kernels: (C\+\+|PURE)' $(log)
	@touch $@

# f5-tts without its dependencies, of which solves and updates need these; torchaudio is not one
$(client): $(installed)
	$(py) -m pip install -q -c constraints.txt --no-deps f5-tts
	$(py) -m pip install -q -c constraints.txt torchdiffeq x-transformers librosa ema-pytorch \
		accelerate wandb datasets rjieba pypinyin
	@touch $@
