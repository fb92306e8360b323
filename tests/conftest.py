"""Shared fixtures: a command line in its own process, and one release for all tests of a session."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from quantize_gemma.tasks.builtin import BUILTIN

# Before any library reads them: a captured log is no place for progress bars.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"


def pytest_configure() -> None:
    """Let the processes that tests start be interrupted, wherever the tests were started.

    A shell that runs `make test &`, and nohup, have these signals ignored, and whatever is started inherits that. A
    signal with a handler is back at its default in a process that is started.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # The tests themselves survive the end of the terminal, as nohup is asked for.
        signal.signal(signal.SIGHUP, lambda *_: None)


@dataclass
class Outcome:
    """The result of a run of the command line: exit code, streams, and the JSON object that it printed last."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def cached(self) -> dict[str, bool]:
        return {stage["name"]: stage["cached"] for stage in self.summary["stages"] if stage["key"]}


@dataclass
class CommandLine:
    """`quantize-gemma` with a store and a Prefect home of its own."""

    home: Path
    prefect: Path

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return {**inherited, "QUANTIZE_GEMMA_HOME": str(self.home), "PREFECT_HOME": str(self.prefect)}

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "quantize_gemma.flows.cli", *arguments],
            env={**self.environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: str, **environment: str) -> Outcome:
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=900)
        return Outcome(process.returncode, stdout, stderr)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The store of the release below. Tests that change it take a copy, see tests/flows/test_run.py."""
    folder = tmp_path_factory.mktemp("session")
    return CommandLine(folder / "store", folder / "prefect")


@pytest.fixture(scope="session")
def command_line(shared_store: CommandLine) -> CommandLine:
    return shared_store


@pytest.fixture(scope="session")
def released(shared_store: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The built-in model, through every stage. Each process of pytest-xdist has its own copy of one run's store."""
    # Each process has a folder of its own in one that they share.
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent / "released" if "PYTEST_XDIST_WORKER" in os.environ else folder / "released"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            outcome = shared_store("run", "--json")
            assert outcome.code == 0, outcome.stderr[-5000:]
            partial = shared.with_suffix(".partial")
            shutil.copytree(shared_store.home.parent, partial, symlinks=True)
            streams = {"home": str(shared_store.home), "stdout": outcome.stdout, "stderr": outcome.stderr}
            (partial / "outcome.json").write_text(json.dumps(streams))
            partial.rename(shared)
            return outcome
    streams = json.loads((shared / "outcome.json").read_text())
    outcome = Outcome(0, streams["stdout"], streams["stderr"])
    return copy_release(shared, Path(streams["home"]), outcome, shared_store)


def copy_release(source: Path, home: Path, outcome: Outcome, target: CommandLine) -> Outcome:
    """Copies a finished run, the directory of its store and its Prefect home, and returns its outcome there."""
    shutil.copytree(source, target.home.parent, symlinks=True, dirs_exist_ok=True)
    return Outcome(
        outcome.code,
        outcome.stdout.replace(str(home), str(target.home)),
        outcome.stderr.replace(str(home), str(target.home)),
    )


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Callable[[], Path]:
    """Copies tiny-gemma3, for a test that damages it."""

    def copy() -> Path:
        return Path(shutil.copytree(BUILTIN["tiny-gemma3"], tmp_path / "model"))

    return copy
