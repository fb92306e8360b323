"""A run's workers are forked from a process that has imported the libraries."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.lifetime import stop_on_interrupt


@pytest.fixture(autouse=True)
def workers_find_these_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def facts() -> dict[str, Any]:
    """Return what the function finds when it is called."""
    found: dict[str, Any] = {"torch": "torch" in sys.modules, "server": os.getppid(), "token": os.environ.get("TOKEN")}
    if found["torch"]:
        found["threads"] = sys.modules["torch"].get_num_threads()
    return found


def end(sent: int) -> dict[str, Any]:
    """Send a signal to the process that forked this one."""
    os.kill(os.getppid(), sent)
    return {"paused": signal.pause()}


def call(function: str, environment: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    return worker.run(f"{__name__}:{function}", arguments, lambda *_: None, None, environment)


def test_the_libraries_are_imported_once_in_a_run() -> None:
    with stop_on_interrupt():
        first, second = call("facts"), call("facts")
    assert first["torch"]
    assert first["server"] == second["server"]
    assert not psutil.pid_exists(first["server"])


def test_a_worker_outside_of_a_run_imports_what_it_needs() -> None:
    assert not call("facts")["torch"]


def test_environment_variables_are_those_of_one_worker() -> None:
    with stop_on_interrupt():
        assert call("facts", {"TOKEN": "one"})["token"] == "one"
        assert call("facts")["token"] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_a_workers_share_of_the_cores_reaches_what_was_imported_before(threads: int) -> None:
    with stop_on_interrupt():
        assert call("facts", {"OMP_NUM_THREADS": str(threads)})["threads"] == threads


def test_with_a_gpu_each_worker_imports_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA fails in a process that is forked from one that has asked for a GPU."""
    # Any library does for the driver: it is only asked for.
    libc = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)
    (tmp_path / "libcuda.so.1").symlink_to(libc)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with stop_on_interrupt():
        assert not call("facts")["torch"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_whose_fork_server_ends_fails_and_the_next_has_another(sent: signal.Signals) -> None:
    with stop_on_interrupt():
        with pytest.raises(StageFailed, match=r"^its process ended with SIGKILL \(killed from outside"):
            call("end", sent=int(sent))
        assert call("facts")["torch"]


def test_a_fork_server_that_does_not_start_is_a_failure_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageFailed, match=r"^the process that starts stages ended with exit code 1$"):
        call("facts")
