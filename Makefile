# `make demo` and `make test` need Python >= 3.10 and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint proto clean

demo: .venv/installed
	$(BIN)/python -m benchmarks.demo --json runs/demo.json

test: .venv/installed lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python proto/generate.py

.venv/installed: pyproject.toml
	@echo "installing into .venv: some minutes and 6 GB the first time, most of it torch"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
