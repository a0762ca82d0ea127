# make train ARGS="--model 3 --scheduler onecycle"    sets up and trains
# make web                                            sets up and serves the page: draw, compare, watch
# make test                                           sets up and tests: the first tier, in minutes
# make test-long                                      the tests that take longer
# make coverage                                       which lines the first tier runs
# make evaluate                                       measures the three shipped networks anew
# make check                                          ruff, clang-format, types
# make export                                         the three networks' files for phones and browsers
# make html                                           one file each that reads digits in a browser, from disk
# make gpu-check                                      a GPU's tests and figures, into GPU_RESULTS=gpu_check
# make format clean                                   formats the code; removes the environment
# make help                                           these lines
# VENV=... keeps the environment elsewhere; PYTHON=... makes it with another interpreter.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
GPU_RESULTS ?= gpu_check
# A worker a core, of one thread each; one that is done takes over what another has not begun.
PARALLEL := -n logical --dist worksteal

.PHONY: train test test-long coverage evaluate export html gpu-check web check format clean help
.DELETE_ON_ERROR:

train: $(VENV)/.core
	$(BIN)/python main.py $(ARGS)

web: $(VENV)/.tools
	$(BIN)/python -m tools.web $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m "long and not alone" $(PARALLEL) $(ARGS)
	$(BIN)/python -m pytest -m alone $(ARGS)

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) --cov $(ARGS)

evaluate: $(VENV)/.tools
	$(BIN)/python -m tools.evaluate --name mnist_model_1
	$(BIN)/python -m tools.evaluate --name mnist_model_2
	$(BIN)/python -m tools.evaluate --name mnist_model_3

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror models/*.cpp

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i models/*.cpp

export: $(VENV)/.tools
	for model in 1 2 3; do $(BIN)/python -m tools.export --model $$model $(ARGS) || exit; done

html: $(VENV)/.tools
	for model in 1 2 3; do $(BIN)/python -m tools.export --model $$model --format html $(ARGS) || exit; done

# Of a machine that has a GPU but no network: by $(PYTHON) as it is.
gpu-check:
	mkdir -p $(GPU_RESULTS)
	$(PYTHON) -m pytest tests/training/test_gpu.py -p no:cacheprovider --junitxml $(GPU_RESULTS)/tests.xml
	$(PYTHON) -m tools.benchmark throughput --device cuda --models 1 3 --images 12800 --rounds 3 --output_dir $(GPU_RESULTS)
	$(PYTHON) -m tools.benchmark accuracy --device cuda --config fast --seeds 10 --output_dir $(GPU_RESULTS)
	$(PYTHON) -m tools.benchmark accuracy --device cuda --together 10 --scheduler onecycle --epochs 15 --output_dir $(GPU_RESULTS)

clean:
	rm -rf $(VENV)

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

# The environment is made once, and again only when a list of requirements changes.
$(VENV)/.core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv: install it (Debian: python3-venv), or make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.tools: $(VENV)/.core requirements-tools.txt
	$(BIN)/pip install --quiet -r requirements-tools.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core requirements-dev.txt requirements-tools.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@
