# PYTHON makes the environment; VENV is where it lies. THREADS is what tests and benches compute with: a shared machine
# spins at barriers with more threads than it has cores free, so it is never left to the library. WORKERS is how many
# processes share the tests, a file each: some 2 GB of memory a process.
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 1
WORKERS ?= 2
BIN = $(VENV)/bin

.PHONY: demo test lint bench tables gpu clean

demo: $(VENV)/.installed
	$(BIN)/forgedit demo --out out/demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels/native/*

# Appends rows to bench/results/, then makes the README's tables and pictures from them. Some thirty minutes on two free cores.
STAGES = -m pytest -q -rs bench/stages.py --benchmark-columns=median,rounds --threads $(THREADS)
bench: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python $(STAGES)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.sessions --pairs 5 --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.ops --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.denoise --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.tune --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.edit --pictures 12 --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.equality --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m bench.learned --threads $(THREADS)
	$(MAKE) tables

tables: $(VENV)/.installed-dev
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.world.plot_findings
	$(BIN)/python -m bench.tables

# The tests and benches that need a GPU, on a machine with its own CUDA torch and no network: nothing is installed, PYTHON
# is that machine's. With OUT set, rows and log land there. COMMIT names the commit where the tree is no checkout.
GPU = PYTHONPATH=runtime:kernels:$$PYTHONPATH $(PYTHON)
LOGS = $(or $(OUT),out)
TO = --results $(if $(OUT),$(OUT)/results,bench/results) $(if $(COMMIT),--commit $(COMMIT))
gpu: SHELL = bash
gpu:
	mkdir -p $(LOGS)
	set -o pipefail; { \
	    $(GPU) -m pytest -q -rs -m gpu; tests=$$?; \
	    $(GPU) $(STAGES) -m gpu $(TO); stages=$$?; \
	    $(GPU) -m bench.fused --model sd14 --compiled --device cuda $(TO); fused=$$?; \
	    $(GPU) -m bench.equality --device cuda $(TO); equal=$$?; \
	    $(GPU) -m bench.learned --device cuda $(TO); learned=$$?; \
	    $(GPU) -m bench.denoise --device cuda $(TO); \
	    $(GPU) -m bench.denoise --model sd14 --device cuda $(TO); denoise=$$?; \
	    $(GPU) -m bench.tune --device cuda $(TO); \
	    $(GPU) -m bench.tune --model sd14 --compiled --device cuda $(TO); tune=$$?; \
	    $(GPU) -m bench.edit --device cuda $(TO); \
	    $(GPU) -m bench.edit --model sd14 --device cuda $(TO); exit $$((tests | stages | fused | equal | learned | denoise | tune | $$?)); \
	} 2>&1 | tee $(LOGS)/gpu.log

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
