# `make run` and `make test` install everything they need into .venv first; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
# Two test files at a time: half of the time is spent waiting, mostly for servers. OpenMP's threads wait without
# spinning: with more threads than cores, spinning takes a quarter of the CPU time.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test test-fast test-ci test-all check docs campaign compatibility update install hub-demo deploy \
	worker serve

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1 \2/p' Makefile | awk '{name = $$2; $$1 = $$2 = ""; printf "  make %-15s%s\n", name, $$0}'

run: .venv/installed ## run every stage on the tiny built-in model
	$(BIN)/quantize-gemma run

test: check ## run make check and all tests that take at most half a minute each
	$(PYTEST) -m "not long"

# For example `make test-fast TESTS=tests/tasks`.
test-fast: .venv/installed ## run the tests that start no flow run and no server
	$(PYTEST) -m "not slow" $(TESTS)

test-ci: check ## run make check and all tests except the longest; CI runs this
	$(PYTEST) -m "not longest"

test-all: check ## run make check and all tests
	$(PYTEST)

check: docs ## check formatting, lint, types, imports, spelling, and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: .venv/installed ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each campaign prints its cases, its failures, and its seed.
campaign: .venv/installed ## test with random faults and hostile inputs, at full size; takes hours
	$(BIN)/python -m tests.campaigns.starting_place
	$(BIN)/python -m tests.campaigns.input_fuzz
	$(BIN)/python -m tests.campaigns.hub_faults
	$(BIN)/python -m tests.campaigns.store
	$(BIN)/python -m tests.campaigns.kill_points

# In separate virtual environments.
compatibility: .venv/installed ## test the card's loading code with the pinned and the newest transformers
	$(BIN)/python -m tests.compatibility.loading

update: .venv/installed ## update every library to its newest version, then test and measure
	$(BIN)/python -m tests.update

install: .venv/installed ## only install into .venv

hub-demo: .venv/installed ## run against a local Hub: download from it and publish to it
	$(BIN)/python -m tests.hub.demo

# Run in a directory without settings, and import from the environment only: by default, Prefect reads settings and
# imports modules from the working directory.
deploy: .venv/installed ## create the work pool, limits, and deployments on a Prefect server
	cd deployments && PYTHONSAFEPATH=1 $(abspath $(BIN))/python -m quantize_gemma.deployments.deploy

worker: .venv/installed ## start a worker for the deployments
	cd deployments && PYTHONSAFEPATH=1 PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
		$(abspath $(BIN))/prefect worker start --pool quantize-gemma

serve: .venv/installed ## start a Prefect server, its deployments, and a worker on this machine
	PYTHONSAFEPATH=1 $(BIN)/python -m quantize_gemma.deployments.serve

# The stamp depends on the files with the requirements, so that a changed pin installs again.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
