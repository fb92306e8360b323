# `make run` and `make test` install everything they need into .venv and then work; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check install

run: .venv/installed
	$(BIN)/quantize-gemma run

test: check
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: .venv/installed

# The stamp depends on what is to be installed, so a changed pin installs again.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
