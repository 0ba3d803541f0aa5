# Needs Python >= 3.11, make and git. Everything else is installed into .venv, pinned by requirements.lock.
#   make run ARGS="method=ptq4dm bits=w8a8"     make test ARGS="-k quant"     make install PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline
ARGS ?=
unexport PYTHONDONTWRITEBYTECODE  # without caches, importing torch costs seconds in every process

.DEFAULT_GOAL := help
.PHONY: help install run test check smoke bench tables clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with the pinned versions; nothing happens when it is up to date

$(STAMP): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "dqbench needs Python 3.11 or newer ($(or $(PYTHON),none) found): make install PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@rm -f $@
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "dqbench needs Python's venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

run: $(STAMP) ## one cell: the embedded default, minutes on a CPU (ARGS="method=ptq4dm bits=w8a8")
	$(BIN)/python -m dqbench $(ARGS)

test: $(STAMP) ## the test suite, no network (ARGS="-k quant")
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

check: $(STAMP) ## lint and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

smoke: $(STAMP) ## every method, seconds each
	$(OFFLINE) $(BIN)/python -m dqbench -m debug=tiny 'method=glob(*)' tracking=none paths.results=$$(mktemp -d) $(ARGS)

bench: $(STAMP) ## speed against a plain implementation of the same maths
	$(OFFLINE) $(BIN)/python -m bench $(ARGS)

tables: $(STAMP) ## results/tables: papers' numbers beside ours, claims, one page; no GPU
	$(BIN)/python -m dqbench.tables $(ARGS)

clean: ## remove .venv and caches; results/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info outputs multirun
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
