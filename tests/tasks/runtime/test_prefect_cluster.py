"""A stage in parts has the same results in one process, in several, and on a cluster."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, load_artifact
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.prefect_cluster import run_part
from tests.parts import LOG_VARIABLE, SECONDS_VARIABLE
from tests.processes import stage_processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server for all runs of this file."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = subprocess.Popen(
            [sys.executable, "-m", "quantize_gemma.flows.local_server", str(listener.fileno()), str(os.getpid())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, **QUIET, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))},
        )
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    assert server.stdin is not None
    server.stdin.close()
    server.wait(20)


@dataclass
class Parts:
    """tests/parts.py with its own store."""

    home: Path
    api: str
    loaded: Path
    seconds: float = 0

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        ours = {"QUANTIZE_GEMMA_HOME": str(self.home), "QUANTIZE_GEMMA_LOCAL_SERVER": "1", "PYTHONPATH": str(ROOT)}
        words = {LOG_VARIABLE: str(self.loaded), SECONDS_VARIABLE: str(self.seconds)}
        return {**kept, **ours, **words, "PREFECT_API_URL": self.api, "PREFECT_HOME": f"{self.home}-prefect"}

    def start(self, stage: str, **settings: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.parts", json.dumps({"stage": stage, **settings})],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, stage: str, **settings: Any) -> dict[str, Any]:
        process = self.start(stage, **settings)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr[-3000:]
        return json.loads(stdout.splitlines()[-1])

    def fails(self, stage: str, **settings: Any) -> str:
        """Return the last lines of a run that must fail."""
        process = self.start(stage, **settings)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 1
        return stderr.split("StageFailed: ")[-1]

    def shards(self) -> dict[str, int]:
        """Return when each shard was finished."""
        return {
            path.parent.name: path.stat().st_mtime_ns for path in self.home.glob("responses/[0-9a-f]*/manifest.json")
        }


@pytest.fixture
def parts(tmp_path: Path, api: str) -> Parts:
    return Parts(tmp_path / "store", api, tmp_path / "loaded")


def files(outcome: dict[str, Any]) -> dict[str, bytes]:
    return {Path(path).name: Path(path).read_bytes() for path in outcome["files"]}


def lengths_of(outcome: dict[str, Any]) -> dict[str, list[int]]:
    return {name.removesuffix(".json"): json.loads(content) for name, content in files(outcome).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, api: str) -> dict[str, Any]:
    """The evaluation of tiny-gemma3 in one process."""
    folder = tmp_path_factory.mktemp("alone")
    parts = Parts(folder / "store", api, folder / "loaded")
    return {**parts("evaluate"), "keys": set(parts.shards())}


def test_by_default_one_process_answers_all_shards(alone: dict[str, Any]) -> None:
    assert list(alone["answered"].values()) == [57]


def test_two_parts_share_the_shards_with_the_same_results(alone: dict[str, Any], parts: Parts) -> None:
    outcome = parts("evaluate", workers=2)
    assert sorted(outcome["answered"].values()) == [28, 29]
    assert files(outcome) == files(alone)
    assert set(parts.shards()) == alone["keys"]
    # The scores are the same artifact for any number of parts.
    assert outcome["stages"]["evaluate"]["key"] == alone["stages"]["evaluate"]["key"]


@pytest.fixture
def cluster(parts: Parts) -> Iterator[str]:
    """A Dask cluster with two workers that share the store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--host", address, "--no-dashboard"]
    worker = [*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    folder = parts.home.parent
    processes = [
        subprocess.Popen(command, env=parts.environment(), cwd=folder, stderr=subprocess.DEVNULL)
        for command in (scheduler, worker, worker)
    ]
    yield address
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def test_a_dask_cluster_shares_the_shards_with_the_same_results(
    alone: dict[str, Any], parts: Parts, cluster: str
) -> None:
    outcome = parts("evaluate", cluster=cluster, workers=2)
    assert sorted(outcome["answered"].values()) == [28, 29]
    assert files(outcome) == files(alone)
    assert set(parts.shards()) == alone["keys"]
    assert outcome["stages"]["evaluate"]["key"] == alone["stages"]["evaluate"]["key"]


def test_a_failed_part_on_the_cluster_fails_the_stage_with_its_message(parts: Parts, cluster: str) -> None:
    message = parts.fails("lengths", words={"a": ["fail"], "b": ["two"]}, cluster=cluster, workers=2)
    assert message.startswith("lengths: ValueError: a word that cannot be measured")


def test_a_machine_with_other_code_or_libraries_computes_nothing() -> None:
    function = "quantize_gemma.tasks.untie:untie"
    here = fingerprint(function)
    other = {**here, "libraries": {"torch": "1.0"}}
    with pytest.raises(
        StageFailed, match=r"has torch \S+ instead of 1\.0: install the same versions as on the run's machine"
    ):
        run_part.fn(function, other, {}, 0, 1)
    with pytest.raises(StageFailed, match="has a different version of quantize-gemma: install"):
        run_part.fn(function, {**here, "code": "0"}, {}, 0, 1)


def test_a_machine_without_the_runs_store_fails_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path / "another"))
    with pytest.raises(
        StageFailed, match=r"record/0000 is not in .*another: all machines of a run must share one store"
    ):
        load_artifact(ArtifactRef("record", "0000", "0" * 64, 1))


WORDS = {f"list{number}": [f"{number}-{word}" for word in range(60)] for number in range(6)}


def test_a_part_loads_its_model_once_and_has_its_share_of_the_cores(parts: Parts) -> None:
    parts.seconds = 0.2
    outcome = parts("lengths", words=WORDS)
    assert lengths_of(outcome) == {name: [len(word) for word in words] for name, words in WORDS.items()}
    (line,) = parts.loaded.read_text().splitlines()
    assert line.split() == [*outcome["answered"], "None"]
    shutil.rmtree(parts.home)
    parts.loaded.unlink()
    outcome = parts("lengths", words=WORDS, workers=2)
    lines = [line.split() for line in parts.loaded.read_text().splitlines()]
    assert {pid for pid, _ in lines} == set(outcome["answered"])
    assert len(lines) == 2
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    assert {threads for _, threads in lines} == {str(max(1, cores // 2))}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fail", "lengths: ValueError: a word that cannot be measured"),
        ("SIGKILL", "lengths: its process ended with SIGKILL (killed from outside, or the machine ran out of memory)"),
    ],
)
def test_a_failed_part_fails_the_stage_and_finished_shards_are_kept(parts: Parts, word: str, message: str) -> None:
    # This list is answered last, because the largest lists come first.
    words = {**WORDS, "last": [word]}
    assert parts.fails("lengths", words=words).startswith(message)
    before = parts.shards()
    assert len(before) == 6
    assert not list(parts.home.glob("*/.partial-*"))
    words["last"] = ["fixed"]
    outcome = parts("lengths", words=words)
    after = parts.shards()
    assert {key: after[key] for key in before} == before
    assert len(after) == 7
    assert lengths_of(outcome)["last"] == [5]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_run_leaves_no_process_and_loses_only_unfinished_shards(
    parts: Parts, tmp_path: Path, sent: signal.Signals
) -> None:
    parts.seconds = 3
    process = parts.start("lengths", words=WORDS, workers=2)
    deadline = time.monotonic() + 120
    while not parts.shards():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(stage_processes(process.pid)) == 2
    process.send_signal(sent)
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    before = parts.shards()
    assert 0 < len(before) < 6
    parts.seconds = 0
    outcome = parts("lengths", words=WORDS, workers=2)
    after = parts.shards()
    assert {key: after[key] for key in before} == before
    assert len(after) == len(lengths_of(outcome)) == 6


def test_finished_shards_are_reused_and_a_larger_limit_has_its_own_shards(parts: Parts) -> None:
    few = {name: words[:2] for name, words in WORDS.items()}
    parts("lengths", words=few)
    before = parts.shards()
    shutil.rmtree(parts.home / "lengths")
    parts.loaded.unlink()
    again = parts("lengths", words=few)
    assert parts.shards() == before
    # No model is loaded if all shards are in the store.
    assert not parts.loaded.exists()
    outcome = parts("lengths", words={**few, "list3": WORDS["list3"]})
    after = parts.shards()
    assert {key: after[key] for key in before} == before
    assert len(after) == 7
    assert len(lengths_of(outcome)["list3"]) == 60
    assert len(lengths_of(again)["list3"]) == 2
