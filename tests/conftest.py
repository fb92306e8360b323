"""Shared fixtures: a command line in its own process, and one release for all tests of a session."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from quantize_gemma.tasks.builtin import BUILTIN

# Set these before any library reads them: progress bars would clutter captured logs.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"


def pytest_configure() -> None:
    """Let the processes that tests start be interrupted, however pytest was started.

    In the background (`make test &`) and under nohup, these signals are ignored, and child processes inherit that. A
    signal with a handler is reset to its default in a child process.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # The tests themselves survive a hangup, which is what nohup is for.
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make test-fast` leaves out, and order the test files for two processes.

    Tests of whole runs are marked `slow`, in addition to those that are marked explicitly. One process creates the
    finished run for the first file, while the other runs tests that do not need it.
    """
    whole_runs: Counter[Path] = Counter()
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "finished_run" in names or "command_line" in names or item.get_closest_marker("long"):
            item.add_marker("slow")
        if "finished_run" in names:
            whole_runs[item.path] += 1
    first = max(whole_runs, key=whole_runs.__getitem__, default=None)
    items.sort(key=lambda item: 0 if item.path == first else 2 if item.path in whole_runs else 1)


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
    """`quantize-gemma` with its own store and Prefect home."""

    home: Path
    prefect: Path
    processes: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return {**inherited, "QUANTIZE_GEMMA_HOME": str(self.home), "PREFECT_HOME": str(self.prefect)}

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize_gemma.flows.cli", *arguments],
            env={**self.environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """Kill the processes that a failed test left running, so that no other test fails because of them."""
        for process in self.processes:
            process.kill()
            process.communicate()

    def __call__(self, *arguments: str, **environment: str) -> Outcome:
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=900)
        return Outcome(process.returncode, stdout, stderr)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: the directory with its store and its Prefect home, and its outcome there."""

    folder: Path
    outcome: Outcome

    def copy_to(self, target: CommandLine) -> Outcome:
        """Copy the run, and return its outcome in the copy."""
        shutil.copytree(self.folder, target.home.parent, symlinks=True, dirs_exist_ok=True)
        home = str(Path(self.outcome.summary["release"]).parents[2])
        streams = (text.replace(home, str(target.home)) for text in (self.outcome.stdout, self.outcome.stderr))
        return Outcome(self.outcome.code, *streams)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Run the built-in model through every stage, once for all pytest-xdist processes. Tests work on copies."""
    # Each process has its own folder in a shared one.
    folder = tmp_path_factory.getbasetemp()
    run_folder = folder.parent / "finished" if "PYTEST_XDIST_WORKER" in os.environ else folder / "finished"
    with FileLock(f"{run_folder}.lock"):
        if not run_folder.exists():
            partial = run_folder.with_suffix(".partial")
            run = CommandLine(partial / "store", partial / "prefect")
            outcome = run("run", "--json")
            assert outcome.code == 0, outcome.stderr[-5000:]
            (partial / "outcome.json").write_text(json.dumps({"stdout": outcome.stdout, "stderr": outcome.stderr}))
            partial.rename(run_folder)
    return FinishedRun(run_folder, Outcome(0, **json.loads((run_folder / "outcome.json").read_text())))


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """`quantize-gemma` with a store that the tests of one module share."""
    folder = tmp_path_factory.mktemp("module")
    with closing(CommandLine(folder / "store", folder / "prefect")) as line:
        yield line


@pytest.fixture(scope="module")
def released(finished_run: FinishedRun, command_line: CommandLine) -> Outcome:
    """The release of the built-in model, in the module's store."""
    return finished_run.copy_to(command_line)


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Callable[[], Path]:
    """Copy tiny-gemma3, for a test that damages it."""

    def copy() -> Path:
        return Path(shutil.copytree(BUILTIN["tiny-gemma3"], tmp_path / "model"))

    return copy
