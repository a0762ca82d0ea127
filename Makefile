# make train ARGS="--model 3 --scheduler onecycle"    sets up and trains
# make test                                           sets up and tests
# make check                                          ruff, formatting, types
# VENV=... keeps the environment elsewhere; PYTHON=... makes it with another interpreter.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: train test check format clean
.DELETE_ON_ERROR:

train: $(VENV)/.core
	$(BIN)/python main.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

# The environment is made once, and again only when a list of requirements changes.
$(VENV)/.core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv: install it (Debian: python3-venv), or make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core requirements-dev.txt requirements-tools.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@
