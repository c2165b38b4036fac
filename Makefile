# The project's commands. Each sets up what it needs: an environment in .venv, with this package in it.

PYTHON ?= python3
VENV ?= .venv
OUT ?= results/bench
BIN := $(VENV)/bin

.PHONY: help quickstart bench gpu test test-slow test-oldest test-avx2 test-engines check docs format clean

help:
	@echo "make quickstart    set up, run the quickstart sweep and print its tables (about three minutes on two cores)"
	@echo "make bench         set up, measure time and memory of training steps; BENCH='--help' lists the options"
	@echo "make gpu           run the tests and all measurements of a GPU in nine minutes, write OUT (results/bench);"
	@echo "                   DATA=DIR has PACS, REHEARSE=1 tries it on the CPU, GPU='--help' lists the options"
	@echo "make test          set up, run the tests that take less than five seconds each; show the slowest ten"
	@echo "make test-slow     set up, run the other tests"
	@echo "make test-oldest   set up .venv-oldest with the oldest supported versions, run the tests on them"
	@echo "make test-avx2     set up, run the tests marked numbers as on an x86 processor without AVX-512"
	@echo "make test-engines  set up, run the tests on Slurm, if it is installed, and on a local Ray"
	@echo "make check         set up, check format, lint, types, import order and spelling; build the docs"
	@echo "make docs          set up, build the documentation site in site/"
	@echo "make format        format the code as make check expects it, and write the tables of docs/methods.md and the schemas"
	@echo "make clean         remove the environments and what tools left behind"

quickstart: $(VENV)/installed
	$(BIN)/python -m domainbed_ext.sweep launch

bench: $(VENV)/installed
	$(BIN)/python -m vitlorafa.bench $(BENCH)

# A machine with a GPU may have no network: nothing is installed where its own Python runs this checkout as it is.
gpu:
	@python=$(PYTHON); \
	see='import domainbed_ext.bench.__main__, pytest, torch; exit(None if torch.cuda.is_available() else "it sees no GPU")'; \
	why=$$($(PYTHON) -c "$$see" 2>&1) || { \
		echo "$(PYTHON) is not used, but $(VENV): $$(echo "$$why" | tail -n 1)"; \
		python=$(BIN)/python; $(MAKE) --no-print-directory $(VENV)/installed-dev; \
	} && \
	$$python -m domainbed_ext.bench card --output_dir $(OUT) $(if $(DATA),--data_dir $(DATA)) $(if $(REHEARSE),--rehearse) $(GPU)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $$(nproc 2>/dev/null || echo 2)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow -n $$(nproc 2>/dev/null || echo 2)

test-oldest:
	$(PYTHON) .ci/oldest.py > .oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/.oldest.txt $(MAKE) test VENV=.venv-oldest

test-avx2: $(VENV)/installed-dev
	@case $$(uname -m) in \
	x86_64 | amd64) \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m numbers -n $$(nproc 2>/dev/null || echo 2) ;; \
	*) echo "AVX2 can be imitated on x86 processors only: skipped." ;; \
	esac

test-engines: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]'
	$(BIN)/python -m pytest -m 'slurm or ray' -rs

check: $(VENV)/installed-dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m codespell_lib

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/methods_tables.py
	for name in run sweep; do $(BIN)/python -m domainbed_ext.schema $$name > sweeps/$$name.schema.json; done

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .oldest.txt build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
