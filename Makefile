# Targets are what CI runs. They need a bare Python (3.11 or newer) and git, and make their own virtual environment.
#   make PYTHON=python3.12 VENV=.venv312 test     another interpreter, another environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq -c constraints.txt

export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs both unit deploy real bench clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

demo: $(VENV)/.demo ## the digits experiment: no download, under a minute
	$(BIN)/polyrank run

test: lint types docs both real ## everything CI checks

lint: $(VENV)/.dev ## ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## mypy, strict on core and methods
	$(BIN)/mypy

docs: $(VENV)/.dev ## the documentation, into site/
	$(BIN)/mkdocs build --strict --quiet

both: $(VENV)/.dev ## unit and deploy side by side, each told of at its end: a deployment mostly waits
	$(MAKE) -j 2 -O unit deploy

unit: export OMP_NUM_THREADS := 1
unit: export MKL_NUM_THREADS := 1
unit: export POLYRANK_SCREENSHOTS := build/screenshots
unit: $(VENV)/.dev ## tests that need nothing but the checkout, on two processes of one thread
	$(BIN)/pytest -m 'not real and not deploy' -n 2 -rs --durations=10

deploy: export OMP_NUM_THREADS := 1
deploy: $(VENV)/.dev ## a deployment of Flower on loopback, one for all of its tests
	$(BIN)/pytest -m deploy -n 0 -rs --durations=10

real: $(VENV)/.dev ## real models and data, where they are present; says what it skips
	$(BIN)/pytest -m real -n 0 -v -rs --durations=10

bench: $(VENV)/.dev ## ratios against the usual ways, goals beside figures, one table
	$(BIN)/python bench/table.py

clean: ## removes caches and site/; keeps runs/ and the virtual environment
	rm -rf site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests bench -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamps: what `polyrank` needs to run, and on top of it what development needs. torch goes first, alone, so that
# its pinned build is in place before any other package's range asks for one.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("polyrank needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]'
	@touch $@
