# make run    set up and run the quickstart sweep
# make test   set up and run the tests
# make bench  set up and run the benchmarks (minutes; the machine should be otherwise idle)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= raysweep-store
# Real text and tasks for the sweeps and tests that use them; without it they are skipped.
export RAYSWEEP_DATA ?= $(abspath ../shared/data)

run: $(VENV)/.ready
	$(BIN)/raysweep run search_spaces/quickstart.yaml --store $(STORE)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.ready
	$(BIN)/python tests/benchmarks

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch alone first and pinned, so that no other package draws in a newer build with CUDA. `doctor` also compiles the
# one operator that DeepSpeed needs on a CPU, which would otherwise hold up the first training step.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/raysweep doctor --store $(STORE)
	touch $@

.PHONY: run test bench lint
