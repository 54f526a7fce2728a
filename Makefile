# make run    set up and run the quickstart sweep
# make test   set up and run the tests (those of lm-evaluation-harness are skipped without the extra lm-eval: .ci/run has it)
# make bench  set up and run the benchmarks (minutes; the machine should be otherwise idle)
# make bench-curvature  the same beside PyHessian and curvlinops (half an hour; trains a model first, once)
# make bench-sft  fine-tuning stages beside those of an earlier revision, and beside TRL (12 minutes; likewise)
# make gpu    the training path, the flatness and the quickstart on a machine with a GPU, torch, transformers and accelerate
#             (also without Ray and network); PARTS=throughput-1B,flatness runs some; DEVICE=cpu all at tiny sizes
# make wheels what `make gpu` needs beside these, fetched beforehand into ./wheels for the Python of that machine (3.12)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
STORE ?= raysweep-store
# Real text and tasks for the sweeps and tests that use them; without it they are skipped.
export RAYSWEEP_DATA ?= $(abspath ../shared/data)

run: $(VENV)/.ready
	$(BIN)/raysweep run search_spaces/quickstart.yaml --store $(STORE)

# Three at once. Two clusters with heads of their own get into each other's way, so all tests that start Ray, by their
# mark, are in one part. It waits much of its time, and its ranks for one another, so the others give way to it and take
# what it leaves of the CPUs. With PYTEST_ARGS, such as -m "not slow", all one after the other.
NUMBERS := tests/numerics tests/unit
OTHERS := $(filter-out $(NUMBERS:%=%/),$(wildcard tests/*/))
ifdef PYTEST_ARGS
test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
test: $(VENV)/.ready
	$(MAKE) --no-print-directory --jobs 3 --keep-going test-runs test-local test-numbers
endif

test-runs:
	$(BIN)/python -m pytest -m ray tests/unit/runners $(OTHERS)

# Shown when they are done, so that the lines of two parts are not mixed.
test-local: TESTS := -m "not ray" tests/unit/runners $(OTHERS)
test-numbers: TESTS := $(NUMBERS) --ignore=tests/unit/runners
test-local test-numbers:
	@mkdir -p .pytest_cache
	@OMP_NUM_THREADS=1 nice -n 5 $(BIN)/python -m pytest $(TESTS) > .pytest_cache/$@.log 2>&1; \
	  code=$$?; cat .pytest_cache/$@.log; exit $$code

bench: $(VENV)/.ready
	$(BIN)/python tests/benchmarks

# In an environment of its own, so that no peer's dependency gets between the tests and what they test.
bench-curvature: $(BENCH)/.ready
	$(BENCH)/bin/python -m pytest -q tests/numerics/test_peers.py
	OMP_NUM_THREADS=1 STORE=$(STORE) $(BENCH)/bin/python tests/benchmarks/curvature

bench-sft: $(BENCH)/.ready
	$(BENCH)/bin/python tests/benchmarks/sft.py --store $(STORE) --trl-python $(BENCH)/bin/python

# Rows are kept in GPU_TABLE, and only what is missing is measured.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_TABLE ?= gpu-table
# By version: what is compiled for one Python breaks another.
GPU_PACKAGES = $(CURDIR)/.wheels/$(shell $(GPU_PYTHON) -c "import sys; print(sys.implementation.cache_tag)")
PARTS ?=
DEVICE ?= cuda

gpu:
	$(GPU_PYTHON) tests/benchmarks/gpu/carry.py unpack wheels --to "$(GPU_PACKAGES)"
	DEVICE=$(DEVICE) HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$(CURDIR):$(GPU_PACKAGES)" \
	  $(GPU_PYTHON) tests/benchmarks/gpu --to "$(GPU_TABLE)" --parts "$(PARTS)"

wheels: $(VENV)/.ready
	$(BIN)/python tests/benchmarks/gpu/carry.py fetch wheels --python $(or $(FOR_PYTHON),3.12)

$(BENCH)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench,test]"
	$(BENCH)/bin/pip uninstall --quiet --yes torchvision
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/benchmarks/gpu
	$(BIN)/lint-imports

# torch alone first and pinned, so that no other package draws in a newer build with CUDA. `doctor` also compiles the
# one operator that DeepSpeed needs on a CPU, which would otherwise hold up the first training step.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/raysweep doctor --store $(STORE)
	touch $@

.PHONY: run test test-numbers test-runs bench bench-curvature bench-sft gpu wheels lint
