# `make run` and `make test` install everything they need into .venv and then work; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-fast test-ci test-all campaign update compatibility check install hub-demo deploy worker serve

run: .venv/installed
	$(BIN)/quantize-gemma run

# Two files of tests at a time: half of it is waiting, for servers above all.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) -m "not long"

# For the inner loop, for example `make test-fast TESTS=tests/tasks`.
test-fast: .venv/installed
	$(PYTEST) -m "not slow" $(TESTS)

# What CI tests, in half an hour.
test-ci: check
	$(PYTEST) -m "not longest"

test-all: check
	$(PYTEST)

# Attacks and accidents at random, each at its full size: hours. Each prints its cases, its failures and its seed.
campaign: .venv/installed
	$(BIN)/python -m tests.campaigns.starting_place
	$(BIN)/python -m tests.campaigns.input_fuzz
	$(BIN)/python -m tests.campaigns.hub_faults
	$(BIN)/python -m tests.campaigns.store
	$(BIN)/python -m tests.campaigns.kill_points

# The newest version of every library: resolved, tested and measured, in about an hour.
update: .venv/installed
	$(BIN)/python -m tests.update

# Runs the card's loading code in the pinned and in the newest transformers, in virtual environments of their own.
compatibility: .venv/installed
	$(BIN)/python -m tests.compatibility.loading

# The same against a Hugging Face Hub, a local one.
hub-demo: .venv/installed
	$(BIN)/python -m tests.hub.demo

# Operating it: a Prefect server's pool, limits and deployments; a worker; or all of it on this machine. In a directory
# without settings, and importing from the environment alone: Prefect takes both from where it is started.
deploy: .venv/installed
	cd deployments && PYTHONSAFEPATH=1 $(abspath $(BIN))/python -m quantize_gemma.deployments.deploy

worker: .venv/installed
	cd deployments && PYTHONSAFEPATH=1 PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
		$(abspath $(BIN))/prefect worker start --pool quantize-gemma

serve: .venv/installed
	PYTHONSAFEPATH=1 $(BIN)/python -m quantize_gemma.deployments.serve

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/installed

# The stamp depends on what is to be installed, so a changed pin installs again.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
