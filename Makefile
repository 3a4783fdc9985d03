# Everything a person or CI runs. `make venv` is implied by the others.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests out, each with its own pool of workers.
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-all test-gpu check format bench clean

venv: $(STAMP)

# torch first and by name: a bare range would fetch the newest build with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

demo: venv
	$(BIN)/python examples/demo.py

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not full and not gpu and not multi_gpu"

test-all: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not multi_gpu"

# Runs in the Python on the PATH: a GPU machine brings its own torch build.
test-gpu:
	$(PYTHON) -m pytest -m "gpu or multi_gpu"

bench:
	$(PYTHON) -m benchmarks.compare

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
