# Everything happens in .venv, made with PYTHON (3.10 or newer): make PYTHON=python3.12 test
# torch comes from the package index that pip is set up with: on Linux that is a build for CUDA, some gigabytes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types docs bench clean

demo: .venv/demos.stamp
	$(BIN)/lightning-methods demo ikl

test: .venv/dev.stamp
	$(BIN)/pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/dev.stamp
	$(BIN)/mypy

docs: .venv/dev.stamp
	$(BIN)/mkdocs build --strict

bench: .venv/dev.stamp
	mkdir -p benchmarks/results
	set -e; for file in benchmarks/[!_]*.py; do \
		$(BIN)/python $$file --json benchmarks/results/$$(basename $$file .py).json; done

clean:
	rm -rf .venv site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp says which extra is installed; it is redone when pyproject.toml changes.
.venv/%.stamp: pyproject.toml | .venv
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
