# Two commands work on a bare machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo test test-all test-mmseg test-natten checks-table proof check bench cards explorer

setup: .setup-done

.setup-done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.demo-done: Makefile pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,seg,det]"
	touch $@

demo: .demo-done
	$(BIN)/python tools/demo.py

test: setup check
	$(PYTEST) -n 2 --dist loadgroup -m "not slow and not gpu and not network"

checks-table: setup
	$(PYTEST) -n 2 --dist loadgroup -m "not slow" --suite-table docs/checks.md tests/backbones/test_registry.py

test-all: setup check
	$(PYTEST) -n 2 --dist loadgroup -m "not gpu and not network"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m vitzoo bench models

proof: setup
	$(BIN)/python -m benchmarks.proof

cards: setup
	$(BIN)/python tools/cards.py

explorer: setup
	$(BIN)/python tools/explorer.py

# mmsegmentation asks for old packages: an environment of its own.
.mmseg-done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-mmseg
	.venv-mmseg/bin/python -m pip install --quiet --upgrade pip
	.venv-mmseg/bin/python -m pip install --quiet -c constraints.txt -e ".[mmseg]" pytest scikit-image
	touch $@

test-mmseg: .mmseg-done
	OMP_NUM_THREADS=1 .venv-mmseg/bin/python -m pytest tests/integrations

# natten is built where it is installed, without kernels if there is no CUDA compiler.
.natten-done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-natten
	.venv-natten/bin/python -m pip install --quiet --upgrade pip setuptools wheel hatchling editables
	.venv-natten/bin/python -m pip install --quiet -c constraints.txt -e . pytest
	.venv-natten/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[natten]"
	touch $@

test-natten: .natten-done
	OMP_NUM_THREADS=1 .venv-natten/bin/python -m pytest tests/integrations/test_natten.py
