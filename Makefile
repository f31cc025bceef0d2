# Every target works on a fresh machine with Python >= 3.11: the first one that needs the environment makes it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs/demo
OLDEST := .venv-oldest

.PHONY: help setup demo test test-oldest lint fmt type check bench clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12

setup: $(STAMP)  ## create .venv and install thermoe with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "thermoe needs Python 3.11 or newer; run: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)   ## convert, route, train, adapt and compare on real text (5 minutes on two cores)
	$(BIN)/thermoe demo --out $(OUT)

test: $(STAMP)   ## run every test (under 6 minutes on two cores)
	$(BIN)/python -m pytest

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed  ## run what touches transformers on the oldest version supported
	$(OLDEST)/bin/python -m pytest -m 'not tuned' tests/contract tests/unit/models tests/unit/adapt tests/unit/training tests/unit/test_energy_callback.py tests/unit/test_sensitivity.py

lint: $(STAMP)   ## check style and format
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

fmt: $(STAMP)    ## format the code and mend what can be mended
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

type: $(STAMP)   ## check types strictly
	$(BIN)/mypy

bench: $(STAMP)  ## time the routers against plain top-k on this machine (a minute)
	$(BIN)/python benchmarks/routers.py

check: lint type test test-oldest  ## all that CI runs

clean:           ## remove the environment and the caches
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache
