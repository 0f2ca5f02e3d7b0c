# Two commands: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := bundles/pocket_turbo_int8-coreml
PROMPTS := \
	"a large red star in the center on navy" \
	"a small cyan ring in the top left on a cream background" \
	"a big yellow heart, bottom right, on plum" \
	"on a mint background, a tiny purple diamond in the middle" \
	"a large green cross in the upper right corner on gray" \
	"a small orange triangle left of a large blue circle on cream" \
	"a large pink square in the bottom left on navy" \
	"a little red circle above a big yellow ring on gray"

.PHONY: demo test lint bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

## demo: the embedded model in two steps as a validated INT8 Core ML bundle, and pictures from it
demo: $(INSTALLED)
	$(BIN)/python -m converters.coreml --recipe pocket_turbo_int8 --output $(DEMO) --force
	$(BIN)/python -m mobile_runtime generate $(DEMO) $(PROMPTS) --output bundles/demo --force

## test: linters and the default tests
test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## bench: the figures of BENCHMARKS.md (the real sizes need 17 GB of memory; seven hours in all, of which the small recipes train three)
bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.pocket
	$(BIN)/python -m tests.benchmarks.small
	$(BIN)/python -m tests.benchmarks.full_size
	$(BIN)/python -m tests.benchmarks.full_size_stages

clean:
	rm -rf $(VENV) bundles
