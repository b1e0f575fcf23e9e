# make train · make test · make bench · make lint · make docs: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Build isolation resolves its own environment: the constraints must reach it too, or an unpinned torch comes in.
# pip older than 25.3 takes PIP_CONSTRAINT there as well, newer ones want PIP_BUILD_CONSTRAINT.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export IMGOPT_REQUIRE_NATIVE := 1

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc cmake build_backend src -type f \
             -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: train test bench lint format docs stub cuda clean
train: $(VENV)/.installed
	$(BIN)/imgopt-fast train

# A file is one process' work from begin to end: its fixtures train networks. Each process has one thread, because two
# that have two each wait for one another.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: $(VENV)/.peers
	$(BIN)/imgopt-fast bench

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')
	$(BIN)/codespell

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q '.[docs]'
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

# Compiles the CUDA kernels, for every architecture that a release has; needs nvcc, no GPU. What it prints is their
# registers and spills.
cuda: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DIMGOPT_CUDA=ON -DIMGOPT_WERROR=ON -DCMAKE_CUDA_FLAGS=-Xptxas=-v
	$(BIN)/cmake --build build/cuda --target _torch_ops_cuda

# The committed types of the compiled module; a test compares them with a fresh set.
stub: $(VENV)/.installed
	$(BIN)/python -m pybind11_stubgen imgopt_fast._core -o src

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q torch numpy
	$(BIN)/python -m pip install -q '.[dev]'
	touch $@

$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install -q '.[dev,peers]'
	touch $@

clean:
	rm -rf build $(VENV)
