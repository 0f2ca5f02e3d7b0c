# Two commands: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := bundles/pocket_int8-coreml

.PHONY: demo test lint bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

## demo: the embedded model as a validated INT8 Core ML bundle, and pictures from it
demo: $(INSTALLED)
	$(BIN)/python -m converters.coreml --recipe pocket_int8 --output $(DEMO) --force
	$(BIN)/python -m mobile_runtime generate $(DEMO) --demo --output bundles/demo --force

## test: linters and the default tests
test: $(INSTALLED) lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## bench: the figures of BENCHMARKS.md (the real sizes need 14 GB of memory and an hour)
bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.pocket
	$(BIN)/python -m tests.benchmarks.full_size

clean:
	rm -rf $(VENV) bundles
