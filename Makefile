# make train   install, prepare a corpus, train configs/tiny.py, generate text; run it again to resume
# make test    the fast test suite
# make plans   compile every recipe for its target machines; writes docs/plans.json and the recipes' headers
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
RUN ?= runs/tiny
ARGS ?=
# Parallel test processes; each keeps about two cores busy compiling.
JOBS ?= 2
TESTS ?= tests

BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Known-good versions of all packages, if there is a file for this Python; otherwise whatever pyproject.toml allows.
CONSTRAINTS := $(wildcard .ci/constraints-$(VERSION).txt)
UV := $(shell command -v uv)
MAKE_VENV := $(if $(UV),uv venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
PIP := $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

.PHONY: train test test-all test-plans plans lint types clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	@$(BIN)/python -m launch.prepare --source=python-stdlib --tokenizer=char --min_frequency=100 --out=datasets/python-stdlib
	@$(BIN)/python -m launch.train --config=$(CONFIG) --workdir=$(RUN) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder $(TESTS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# The compilers for TPUs and GPUs have a separate environment: a CUDA plugin without CUDA is noisy in other commands.
PLAN_VENV ?= .venv-plan
PLAN_TESTS := tests/plan_test.py tests/hlo_test.py tests/topology_test.py
PLAN_OPTIONS ?=

test-plans:
	@$(MAKE) --no-print-directory VENV=$(PLAN_VENV) $(PLAN_VENV)/.installed-plan
	$(PLAN_VENV)/bin/python -m pytest -m slow --override-ini=faulthandler_timeout=3600 $(PLAN_OPTIONS) $(PLAN_TESTS)

plans:
	@$(MAKE) --no-print-directory VENV=$(PLAN_VENV) $(PLAN_VENV)/.installed-plan
	$(PLAN_VENV)/bin/python -m benchmarks.plans

SCRIPTS := $(shell git ls-files .ci/run 'launch/*.sh' launch/slurm/train.sbatch)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/shellcheck --external-sources $(SCRIPTS)
	$(BIN)/shfmt --indent=2 --diff $(SCRIPTS)

types: $(VENV)/.installed-dev
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: meshlm needs Python 3.11 or newer; this is %d.%d. Use make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Making $(VENV) with Python $(VERSION) …"
	@$(MAKE_VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing …"
	@$(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@$(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-parity: $(VENV)/.installed-dev
	@$(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev,parity]"
	@touch $@

$(VENV)/.installed-plan: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@$(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev,plan]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
