# `make run` and `make test` install everything they need into .venv and then work; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
# Two files of tests at a time: half of it is waiting, for servers above all. OpenMP's threads wait without spinning:
# with more of them than cores, that takes a quarter of the processor's time.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test test-fast test-ci test-all check docs campaign compatibility update install hub-demo deploy \
	worker serve

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1 \2/p' Makefile | awk '{name = $$2; $$1 = $$2 = ""; printf "  make %-15s%s\n", name, $$0}'

run: .venv/installed ## run every stage on the tiny built-in model
	$(BIN)/quantize-gemma run

test: check ## make check, and all tests that take at most half a minute
	$(PYTEST) -m "not long"

# For example `make test-fast TESTS=tests/tasks`.
test-fast: .venv/installed ## the tests without a run or a server, for the inner loop
	$(PYTEST) -m "not slow" $(TESTS)

test-ci: check ## what CI runs: make check, and all tests but the longest
	$(PYTEST) -m "not longest"

test-all: check ## make check, and all tests
	$(PYTEST)

check: docs ## formatting, lint, types, imports, spelling, and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: .venv/installed ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each prints its cases, its failures and its seed.
campaign: .venv/installed ## random faults and hostile inputs at full size: hours
	$(BIN)/python -m tests.campaigns.starting_place
	$(BIN)/python -m tests.campaigns.input_fuzz
	$(BIN)/python -m tests.campaigns.hub_faults
	$(BIN)/python -m tests.campaigns.store
	$(BIN)/python -m tests.campaigns.kill_points

# In virtual environments of their own.
compatibility: .venv/installed ## the card's loading code with the pinned and the newest transformers
	$(BIN)/python -m tests.compatibility.loading

update: .venv/installed ## the newest version of every library: resolved, tested, and measured
	$(BIN)/python -m tests.update

install: .venv/installed ## install into .venv, and do nothing else

hub-demo: .venv/installed ## a run from a local Hub to a local Hub
	$(BIN)/python -m tests.hub.demo

# In a directory without settings, and importing from the environment alone: Prefect takes both from where it is started.
deploy: .venv/installed ## create the work pool, limits, and deployments on a Prefect server
	cd deployments && PYTHONSAFEPATH=1 $(abspath $(BIN))/python -m quantize_gemma.deployments.deploy

worker: .venv/installed ## start a worker for them
	cd deployments && PYTHONSAFEPATH=1 PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
		$(abspath $(BIN))/prefect worker start --pool quantize-gemma

serve: .venv/installed ## a Prefect server, its deployments, and a worker on this machine
	PYTHONSAFEPATH=1 $(BIN)/python -m quantize_gemma.deployments.serve

# The stamp depends on what is to be installed, so a changed pin installs again.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
