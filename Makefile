# PYTHON makes the environment; VENV is where it lies. THREADS is what tests and benches compute with: a shared machine
# spins at barriers with more threads than it has cores free, so it is never left to the library.
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 1
BIN = $(VENV)/bin

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/.installed
	$(BIN)/forgedit demo --out out/demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels/native/*

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.ops

# On a machine with its own CUDA torch and no network: nothing is installed, PYTHON is that machine's.
gpu:
	PYTHONPATH=runtime:kernels:$$PYTHONPATH $(PYTHON) -m pytest -q -m gpu

clean:
	rm -rf $(VENV) build out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: the tree's own files run. Changed C++ or metadata install again.
SOURCES = pyproject.toml CMakeLists.txt $(wildcard kernels/native/*)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python $(SOURCES)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ $(VENV)/.installed
