"""A run's workers are forked from a process that has imported the libraries."""

import contextlib
import os
import re
import signal
import sys
import time
from contextvars import copy_context
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
    """Return the surroundings of the function when it is called."""
    result: dict[str, Any] = {"torch": "torch" in sys.modules, "server": os.getppid(), "token": os.environ.get("TOKEN")}
    if result["torch"]:
        result["threads"] = sys.modules["torch"].get_num_threads()
    return result


def end(sent: int) -> dict[str, Any]:
    """Send a signal to the process that forked this one."""
    os.kill(os.getppid(), sent)
    return {"paused": signal.pause()}


def descriptors() -> dict[str, Any]:
    """Return the kinds of this process's open file descriptors."""
    kinds = []
    for number in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(OSError):
            kinds.append(os.readlink(f"/proc/self/fd/{number}").split(":")[0])
    return {"kinds": kinds, "terminated": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL}


def remembers(first: str, second: str) -> dict[str, Any]:
    """Return whether this process's memory contains the two texts in a row.

    They are passed separately, so that this call does not write them in a row itself.
    """
    before, after = first.encode(), second.encode()
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            if line.split()[1] != "rw-p":
                continue
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            memory.seek(start)
            content = memory.read(end - start)
            places = (match.end() for match in re.finditer(re.escape(before), content))
            if any(content[place : place + len(after)] == after for place in places):
                return {"found": True}
    return {"found": False}


def wait_for(file: str) -> dict[str, Any]:
    """Wait until the file exists."""
    while not Path(file).exists():
        time.sleep(0.01)
    return {"done": True}


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import no libraries, for tests that do not need them."""
    monkeypatch.setattr(worker, "LIBRARIES", ())


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


@pytest.mark.usefixtures("no_libraries")
def test_environment_variables_reach_only_one_worker() -> None:
    with stop_on_interrupt():
        assert call("facts", {"TOKEN": "one"})["token"] == "one"
        assert call("facts")["token"] is None


def test_a_workers_share_of_the_cores_applies_to_libraries_that_were_already_imported() -> None:
    with stop_on_interrupt():
        for threads in (1, 2, 3):
            assert call("facts", {"OMP_NUM_THREADS": str(threads)})["threads"] == threads


def test_with_a_gpu_each_worker_imports_the_libraries_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA fails in a process that is forked from one that has looked for a GPU."""
    # Any library can stand in for the driver: only its presence is checked.
    libc = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)
    (tmp_path / "libcuda.so.1").symlink_to(libc)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with stop_on_interrupt():
        assert not call("facts")["torch"]


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_whose_fork_server_ends_fails_and_the_next_stage_gets_a_new_one(sent: signal.Signals) -> None:
    with stop_on_interrupt():
        with pytest.raises(StageFailed, match=r"^its process ended with SIGKILL \(killed from outside"):
            call("end", sent=int(sent))
        assert not call("facts")["torch"]


def test_a_fork_server_that_does_not_start_is_a_failure_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageFailed, match=r"^the process that starts stages ended with exit code 1$"):
        call("facts")


@pytest.mark.usefixtures("no_libraries")
def test_a_stage_that_has_not_started_survives_the_end_of_the_fork_server() -> None:
    with stop_on_interrupt():
        for _ in range(5):
            os.kill(call("facts")["server"], signal.SIGKILL)
            assert not call("facts")["torch"]


@pytest.mark.usefixtures("no_libraries")
def test_the_token_of_one_stage_is_not_in_the_memory_of_another() -> None:
    token = ("hf_not", "anybodys")
    with stop_on_interrupt():
        assert call("facts", {"TOKEN": "".join(token)})["token"] == "".join(token)
        for _ in range(3):
            assert not call("remembers", first=token[0], second=token[1])["found"]
        assert call("remembers", {"TOKEN": "".join(token)}, first=token[0], second=token[1])["found"]


@pytest.mark.usefixtures("no_libraries")
def test_a_worker_has_only_its_own_pipes_and_ends_when_it_is_terminated() -> None:
    with stop_on_interrupt():
        result = call("descriptors")
    assert result == {"kinds": ["pipe"] * 4, "terminated": True, "measured": result["measured"]}


@pytest.mark.usefixtures("no_libraries")
def test_many_stages_leave_no_file_open_in_the_run() -> None:
    with stop_on_interrupt():
        call("facts")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            call("facts")
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("of_children", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_worker_that_ends_does_not_end_another(of_children: signal.Handlers, tmp_path: Path) -> None:
    """Not even if the run was started by a process that ignores SIGCHLD."""
    before = signal.signal(signal.SIGCHLD, of_children)
    try:
        with stop_on_interrupt():
            other = worker.Worker(f"{__name__}:wait_for", {"file": str(tmp_path / "go")})
            killed = worker.Worker("signal:pause", {})
            killed.kill()
            with pytest.raises(StageFailed, match=r"^stopped$"):
                killed.wait(lambda *_: None, None)
            killed.close()
            call("facts")
            (tmp_path / "go").touch()
            assert other.wait(lambda *_: None, None)["value"] == {"done": True}
            other.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("no_libraries")
def test_no_worker_starts_after_its_run_has_ended() -> None:
    with stop_on_interrupt():
        context = copy_context()
    with pytest.raises(StageFailed, match=r"^stopped$"):
        context.run(call, "facts")
