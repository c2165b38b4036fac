# The project's commands. Each sets up what it needs: an environment in .venv, with this package in it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart bench test test-avx2 test-engines check format clean

help:
	@echo "make quickstart  set up, run the quickstart sweep, print its tables and plot"
	@echo "make bench       set up, time training steps and weigh their memory; BENCH='--help' for its options"
	@echo "make test        set up, run the tests"
	@echo "make test-avx2   set up, run the tests that are sensitive to numbers as on an x86 processor without AVX-512"
	@echo "make test-engines  set up, run the tests on a real Slurm, if one is installed, and a local Ray"
	@echo "make check       set up, then format, lint, types and import order"
	@echo "make format      put the code into the format that check wants"
	@echo "make clean       remove the environment and what tools left behind"

quickstart: $(VENV)/installed
	$(BIN)/python -m domainbed_ext.sweep launch

bench: $(VENV)/installed
	$(BIN)/python -m vitlorafa.bench $(BENCH)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $$(nproc 2>/dev/null || echo 2)

test-avx2: $(VENV)/installed-dev
	@case $$(uname -m) in \
	x86_64 | amd64) \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m numbers -n $$(nproc 2>/dev/null || echo 2) ;; \
	*) echo "AVX2 can be imitated on x86 processors alone: skipped." ;; \
	esac

test-engines: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]'
	$(BIN)/python -m pytest -m 'slurm or ray' -rs

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
