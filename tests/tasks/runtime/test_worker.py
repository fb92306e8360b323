"""A stage's own process: what is said of its failure, and that it ends with its parent."""

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantize_gemma.tasks.runtime import parent_process, worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import fingerprint

ROOT = Path(__file__).parents[3]


def fail(known: bool) -> dict[str, Any]:
    """Prints what libraries print, and fails."""
    print("a library's noise", file=sys.stderr)
    raise StageFailed("the answer is empty") if known else ValueError("not thought of")


def write(target: Path) -> dict[str, Any]:
    """Leaves a file."""
    (target / "file").touch()
    return {}


def failure(known: bool) -> str:
    with pytest.raises(StageFailed) as caught:
        worker.run(
            "tests.tasks.runtime.test_worker:fail", {"known": known}, lambda *_: None, None, {"PYTHONPATH": str(ROOT)}
        )
    return str(caught.value)


def test_code_that_was_changed_during_the_run_makes_nothing_under_the_old_key(tmp_path: Path) -> None:
    function = "tests.tasks.runtime.test_worker:write"
    arguments = {"function": function, "target": str(tmp_path), "paths": {}, "values": {}}
    here = fingerprint(function)
    there = {"PYTHONPATH": str(ROOT)}
    worker.run(
        "quantize_gemma.tasks.runtime.worker_main:call", {**arguments, "made_by": here}, lambda *_: None, None, there
    )
    assert (tmp_path / "file").exists()
    (tmp_path / "file").unlink()
    with pytest.raises(StageFailed, match="other code of this program: it was changed during the run, start the run"):
        worker.run(
            "quantize_gemma.tasks.runtime.worker_main:call",
            {**arguments, "made_by": {**here, "code": "0"}},
            lambda *_: None,
            None,
            there,
        )
    assert not (tmp_path / "file").exists()


def test_a_failure_that_a_stage_explains_is_all_that_is_said() -> None:
    assert failure(known=True) == "the answer is empty"


def test_an_error_that_nobody_thought_of_comes_with_its_last_lines() -> None:
    said = failure(known=False)
    assert said.startswith("ValueError: not thought of\n")
    assert "a library's noise" in said
    assert f"{Path(__file__).name}" in said


def hold_the_interpreter(descendants: int) -> dict[str, Any]:
    """Starts so many more, each by the one before, and has native code hold the interpreter for an hour."""
    if descendants:
        arguments = {"descendants": descendants - 1}
        worker.Worker("tests.tasks.runtime.test_worker:hold_the_interpreter", arguments, {"PYTHONPATH": str(ROOT)})
    Path(os.environ["STARTED"], str(os.getpid())).touch()
    ctypes.PyDLL(None).sleep(3600)
    return {}


def test_stages_whose_native_code_holds_the_interpreter_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import threading; from quantize_gemma.tasks.runtime import worker\n"
        "start = lambda: worker.Worker('tests.tasks.runtime.test_worker:hold_the_interpreter', {'descendants': 1})\n"
        "threading.Thread(target=start).start(); threading.Event().wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STARTED": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as parent:
        while len(list(tmp_path.iterdir())) < 2:
            assert parent.poll() is None
        stages = psutil.Process(parent.pid).children(recursive=True)
        assert {str(stage.pid) for stage in stages} == {path.name for path in tmp_path.iterdir()}
        parent.kill()
    _, alive = psutil.wait_procs(stages, timeout=60)
    assert alive == []


def answer() -> dict[str, Any]:
    """Answers when it is asked to."""
    return {"answer": parent_process.receive()}


def test_a_stage_outlives_the_thread_that_started_it() -> None:
    children: list[worker.Worker] = []

    def start() -> None:
        children.append(worker.Worker("tests.tasks.runtime.test_worker:answer", {}, {"PYTHONPATH": str(ROOT)}))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (child,) = children
    child.send(42)
    assert child.receive(lambda *_: None, None)["value"] == {"answer": 42}
    child.close()


def write_too_much(library: str, folder: str) -> dict[str, Any]:
    """Writes a file that is larger than this process may write."""
    if library == "safetensors":
        import torch
        from safetensors.torch import save_file

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save_file({"weight": torch.zeros(1000)}, Path(folder, "file"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    Path(folder, "file").write_bytes(bytes(2000))
    return {}


@pytest.mark.parametrize("library", ["python", "safetensors"])
def test_a_file_that_the_disk_does_not_take_is_one_sentence_whichever_library_meets_it(
    library: str, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed) as caught:
        worker.run(
            "tests.tasks.runtime.test_worker:write_too_much",
            {"library": library, "folder": str(tmp_path)},
            lambda *_: None,
            None,
            {"PYTHONPATH": str(ROOT), "QUANTIZE_GEMMA_HOME": str(tmp_path)},
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
            {"PYTHONPATH": str(ROOT), "QUANTIZE_GEMMA_HOME": str(tmp_path)},
        )
    assert re.fullmatch(r"the disk of \S+ is full: make room .*: it continues from here", str(caught.value))
    assert not caught.value.transient


def fill_the_disk() -> dict[str, Any]:
    """Writes to the kernel's own full device."""
    with Path("/dev/full").open("wb", buffering=0) as stream:
        stream.write(b"x")
    return {}


def test_a_stage_works_elsewhere_than_where_the_run_was_started(tmp_path: Path) -> None:
    """What it starts imports from the environment alone, too, and it has no password of the Prefect server."""
    script = """
import json, sys
from quantize_gemma.tasks.runtime import parent_process, worker
print(json.dumps(worker.run("tests.tasks.runtime.test_worker:surroundings", {}, lambda *_: None, None)))
"""
    (tmp_path / "pip.py").write_text("print('theirs')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_AUTH_STRING": "a:b"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["directory"] != str(tmp_path)
    assert seen["pip"].startswith("pip ")
    assert seen["password"] is None


def surroundings() -> dict[str, Any]:
    """Returns what a stage sees around it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pip.py").write_text("print('theirs')")
        pip = subprocess.run([sys.executable, "-mpip", "--version"], cwd=folder, capture_output=True, text=True)
    return {"directory": os.getcwd(), "pip": pip.stdout, "password": os.environ.get("PREFECT_API_AUTH_STRING")}
