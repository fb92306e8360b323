"""A worker process reports its result or its failure, and ends with its parent."""

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import fingerprint

ROOT = Path(__file__).parents[3]


def fail(expected: bool) -> dict[str, Any]:
    """Print a line, as libraries do, and fail."""
    print("a library's output", file=sys.stderr)
    raise StageFailed("the answer is empty") if expected else ValueError("unexpected")


def write(target: Path) -> dict[str, Any]:
    """Write a file."""
    (target / "file").touch()
    return {}


@pytest.fixture(autouse=True)
def workers_find_these_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def failure_message(expected: bool) -> str:
    with pytest.raises(StageFailed) as caught:
        worker.run(
            "tests.tasks.runtime.test_worker:fail",
            {"expected": expected},
            lambda *_: None,
            None,
        )
    return str(caught.value)


def test_a_worker_whose_code_differs_from_the_runs_fails_and_writes_nothing(tmp_path: Path) -> None:
    function = "tests.tasks.runtime.test_worker:write"
    arguments = {"function": function, "target": str(tmp_path), "paths": {}, "values": {}}
    here = fingerprint(function)
    worker.run("quantize_gemma.tasks.runtime.worker_main:call", {**arguments, "made_by": here}, lambda *_: None, None)
    assert (tmp_path / "file").exists()
    (tmp_path / "file").unlink()
    with pytest.raises(StageFailed, match=r"changed during the run \(a different version of quantize-gemma\): start"):
        worker.run(
            "quantize_gemma.tasks.runtime.worker_main:call",
            {**arguments, "made_by": {**here, "code": "0"}},
            lambda *_: None,
            None,
        )
    assert not (tmp_path / "file").exists()


def test_an_expected_failure_is_reported_as_its_message() -> None:
    assert failure_message(expected=True) == "the answer is empty"


def test_an_unexpected_error_is_reported_with_the_last_lines_of_output() -> None:
    message = failure_message(expected=False)
    assert message.startswith("ValueError: unexpected\n")
    assert "a library's output" in message
    assert Path(__file__).name in message


def hold_the_gil(descendants: int) -> dict[str, Any]:
    """Start a chain of `descendants` workers, and have native code hold the GIL for an hour."""
    child = None
    if descendants:
        arguments = {"descendants": descendants - 1}
        child = worker.Worker("tests.tasks.runtime.test_worker:hold_the_gil", arguments)
    Path(os.environ["STARTED"], str(os.getpid())).touch()
    ctypes.PyDLL(None).sleep(3600)
    return {"child": child}


def test_workers_in_native_code_die_with_their_parent(tmp_path: Path) -> None:
    script = (
        "import threading; from quantize_gemma.tasks.runtime import worker\n"
        "function, started = 'tests.tasks.runtime.test_worker:hold_the_gil', []\n"
        "start = lambda: started.append(worker.Worker(function, {'descendants': 1}))\n"
        "threading.Thread(target=start).start(); threading.Event().wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STARTED": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as parent:
        while len(list(tmp_path.iterdir())) < 2:
            assert parent.poll() is None
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert {str(process.pid) for process in workers} > {path.name for path in tmp_path.iterdir()}
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def answer_later(folder: str) -> dict[str, Any]:
    """Wait until the file "go" exists."""
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    return {"answer": 42}


def test_a_worker_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    started: list[worker.Worker] = []

    def start() -> None:
        function, arguments = "tests.tasks.runtime.test_worker:answer_later", {"folder": str(tmp_path)}
        started.append(worker.Worker(function, arguments))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (process,) = started
    (tmp_path / "go").touch()
    assert process.wait(lambda *_: None, None)["value"] == {"answer": 42}
    process.close()


def leave_a_process(killed: bool, folder: str) -> dict[str, Any]:
    """Start a process that inherits this one's output and outlives it, then return or be killed."""
    child = subprocess.Popen(["sleep", "20"])
    Path(folder, "child").write_text(str(child.pid))
    print("the last line", end="", flush=True)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.parametrize("killed", [False, True])
def test_a_process_that_outlives_its_stage_delays_neither_the_result_nor_the_failure(
    killed: bool, tmp_path: Path
) -> None:
    function = "tests.tasks.runtime.test_worker:leave_a_process"
    arguments = {"killed": killed, "folder": str(tmp_path)}
    with pytest.raises(StageFailed, match=r"SIGKILL .*\nthe last line$") if killed else contextlib.nullcontext():
        worker.run(function, arguments, lambda *_: None, None)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    assert child.status() != psutil.STATUS_ZOMBIE
    child.kill()


def write_too_much(library: str, folder: str) -> dict[str, Any]:
    """Write a file that exceeds this process's file size limit."""
    if library == "safetensors":
        import torch
        from safetensors.torch import save_file

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save_file({"weight": torch.zeros(1000)}, Path(folder, "file"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    Path(folder, "file").write_bytes(bytes(2000))
    return {}


@pytest.mark.parametrize("library", ["python", "safetensors"])
def test_a_file_too_large_for_the_disk_is_one_sentence_whichever_library_writes_it(
    library: str, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed) as caught:
        worker.run(
            "tests.tasks.runtime.test_worker:write_too_much",
            {"library": library, "folder": str(tmp_path)},
            lambda *_: None,
            None,
            {"QUANTIZE_GEMMA_HOME": str(tmp_path)},
        )
    assert str(caught.value).startswith("a file was too large for the disk of ")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        worker.run(
            "tests.tasks.runtime.test_worker:fill_the_disk",
            {},
            lambda *_: None,
            None,
            {"QUANTIZE_GEMMA_HOME": str(tmp_path)},
        )
    assert re.fullmatch(r"the disk of \S+ is full: free some space, .*: it resumes where it stopped", str(caught.value))
    assert not caught.value.transient


def fill_the_disk() -> dict[str, Any]:
    """Write to /dev/full, the kernel's full device."""
    with Path("/dev/full").open("wb", buffering=0) as stream:
        stream.write(b"x")
    return {}


def test_a_worker_imports_nothing_from_the_runs_working_directory_and_has_no_password(tmp_path: Path) -> None:
    """Nor does a process that the worker starts."""
    script = """
import json, sys
from quantize_gemma.tasks.runtime import worker
print(json.dumps(worker.run("tests.tasks.runtime.test_worker:surroundings", {}, lambda *_: None, None)))
"""
    (tmp_path / "pip.py").write_text("print('theirs')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_AUTH_STRING": "a:b"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    facts = json.loads(result.stdout)
    assert facts["directory"] != str(tmp_path)
    assert facts["pip"].startswith("pip ")
    assert facts["password"] is None


def surroundings() -> dict[str, Any]:
    """Return the surroundings of a worker: its directory, modules, and environment."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pip.py").write_text("print('theirs')")
        pip = subprocess.run([sys.executable, "-mpip", "--version"], cwd=folder, capture_output=True, text=True)
    return {"directory": os.getcwd(), "pip": pip.stdout, "password": os.environ.get("PREFECT_API_AUTH_STRING")}
