"""An evaluation has the same results in one process, in several, and on a cluster, as mapped tasks."""

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

import httpx
import psutil
import pytest

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
class Spreading:
    """tests/spreading.py on a store of its own."""

    home: Path
    api: str

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        ours = {"QUANTIZE_GEMMA_HOME": str(self.home), "QUANTIZE_GEMMA_LOCAL_SERVER": "1", "PYTHONPATH": str(ROOT)}
        return {**kept, **ours, "PREFECT_API_URL": self.api, "PREFECT_HOME": f"{self.home}-prefect"}

    def start(self, stage: str, **settings: Any) -> "subprocess.Popen[str]":
        asked = json.dumps({"stage": stage, **settings})
        return subprocess.Popen(
            [sys.executable, "-m", "tests.spreading", asked],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, stage: str, **settings: Any) -> dict[str, Any]:
        started = self.start(stage, **settings)
        stdout, stderr = started.communicate(timeout=300)
        assert started.returncode == 0, stderr[-3000:]
        return {**json.loads(stdout.splitlines()[-1]), "log": stderr}

    def fails(self, stage: str, **settings: Any) -> str:
        """Return the last lines of a run that must fail."""
        started = self.start(stage, **settings)
        _, stderr = started.communicate(timeout=300)
        assert started.returncode == 1
        return stderr.split("StageFailed: ")[-1]

    def shards(self) -> dict[str, int]:
        """Return when each shard was finished."""
        return {
            path.parent.name: path.stat().st_mtime_ns for path in self.home.glob("responses/[0-9a-f]*/manifest.json")
        }


@pytest.fixture
def spreading(tmp_path: Path, api: str) -> Spreading:
    return Spreading(tmp_path / "store", api)


def files(found: dict[str, Any]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(found["folder"]).iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, api: str) -> dict[str, Any]:
    """The evaluation of tiny-gemma3 by one worker."""
    spreading = Spreading(tmp_path_factory.mktemp("alone") / "store", api)
    return {**spreading("evaluate"), "keys": set(spreading.shards())}


def names_of_task_runs(api: str) -> list[str]:
    found = httpx.post(f"{api}/task_runs/filter", json={"sort": "EXPECTED_START_TIME_DESC"}, timeout=30).json()
    return [run["name"] for run in found]


def test_by_default_one_model_worker_computes_all_shards_as_mapped_tasks(alone: dict[str, Any], api: str) -> None:
    assert list(alone["answered"].values()) == [57]
    # Mapped tasks of at least 100 of the 228 questions.
    names = [name for name in names_of_task_runs(api) if name.startswith("evaluate · mmlu_")]
    assert sorted(names) == [
        "evaluate · mmlu_abstract_algebra and 24 more",
        "evaluate · mmlu_high_school_mathematics and 24 more",
        "evaluate · mmlu_professional_psychology and 6 more",
    ]


def test_two_model_workers_share_the_shards_with_the_same_results(alone: dict[str, Any], spreading: Spreading) -> None:
    found = spreading("evaluate", workers=2)
    assert len(found["answered"]) == 2
    assert sum(found["answered"].values()) == 57
    assert files(found) == files(alone)
    assert set(spreading.shards()) == alone["keys"]


@pytest.fixture
def cluster(spreading: Spreading) -> Iterator[str]:
    """A Dask cluster of two workers that share the store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--host", address, "--no-dashboard"]
    worker = [*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    folder = spreading.home.parent
    started = [
        subprocess.Popen(command, env=spreading.environment(), cwd=folder, stderr=subprocess.DEVNULL)
        for command in (scheduler, worker, worker)
    ]
    yield address
    for one in started:
        one.kill()
    for one in started:
        one.wait()


@pytest.mark.long
def test_a_dask_cluster_shares_the_shards_with_the_same_results(
    alone: dict[str, Any], spreading: Spreading, cluster: str
) -> None:
    found = spreading("evaluate", cluster=cluster)
    assert len(found["answered"]) == 2
    assert sum(found["answered"].values()) == 57
    assert files(found) == files(alone)
    assert set(spreading.shards()) == alone["keys"]
    # A model worker of a cluster ends when it has had no requests for a while.
    _, alive = psutil.wait_procs([psutil.Process(int(pid)) for pid in found["answered"]], timeout=60)
    assert alive == []


def test_a_failed_part_on_the_cluster_fails_the_stage_with_its_message(
    spreading: Spreading, cluster: str, tmp_path: Path
) -> None:
    words = {"a": ["fail"], "b": ["two"]}
    message = spreading.fails("lengths", words=words, loaded=str(tmp_path / "loaded"), seconds=0, cluster=cluster)
    assert message.startswith("ValueError: a word that cannot be measured")


WORDS = {f"list{number}": [f"{number}-{word}" for word in range(60)] for number in range(6)}


def test_a_model_worker_loads_once_and_has_its_share_of_the_cores(spreading: Spreading, tmp_path: Path) -> None:
    found = spreading("lengths", words=WORDS, loaded=str(tmp_path / "one"), seconds=0.2)
    assert json.loads(files(found)["lengths.json"]) == {name: [len(w) for w in words] for name, words in WORDS.items()}
    (line,) = (tmp_path / "one").read_text().splitlines()
    assert line.split() == [*found["answered"], "None"]
    shutil.rmtree(spreading.home)
    found = spreading("lengths", words=WORDS, loaded=str(tmp_path / "two"), seconds=0.2, workers=2)
    lines = [line.split() for line in (tmp_path / "two").read_text().splitlines()]
    assert {pid for pid, _ in lines} == set(found["answered"])
    assert len(lines) == 2
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    assert {threads for _, threads in lines} == {str(max(1, cores // 2))}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fail", "ValueError: a word that cannot be measured"),
        ("SIGKILL", "its process ended with SIGKILL (killed from outside, or the machine ran out of memory)"),
    ],
)
def test_a_failed_part_fails_the_stage_and_finished_shards_are_kept(
    spreading: Spreading, tmp_path: Path, word: str, message: str
) -> None:
    # The third of three tasks: the largest lists come first.
    words = {**WORDS, "last": [word]}
    settings = {"loaded": str(tmp_path / "loaded"), "seconds": 0.2}
    assert spreading.fails("lengths", words=words, **settings).startswith(message)
    before = spreading.shards()
    assert len(before) >= 4
    assert not list(spreading.home.glob("*/.partial-*"))
    words["last"] = ["mended"]
    found = spreading("lengths", words=words, **settings)
    after = spreading.shards()
    assert {key: after[key] for key in before} == before
    assert len(after) == 7
    assert json.loads(files(found)["lengths.json"])["last"] == [6]


def test_a_stages_peak_memory_is_that_of_its_largest_process(spreading: Spreading, tmp_path: Path) -> None:
    settings = {"loaded": str(tmp_path / "loaded"), "seconds": 0}
    reported = spreading("lengths", words={"a": ["large"]}, **settings)["measured"]["peak_rss_bytes"]
    # What the scorer, which takes the most, has read of itself.
    scorer = int((tmp_path / "loaded.peak").read_text())
    assert reported >= scorer


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_run_leaves_no_process_and_loses_only_unfinished_shards(
    spreading: Spreading, tmp_path: Path, sent: signal.Signals
) -> None:
    settings = {"words": WORDS, "loaded": str(tmp_path / "loaded"), "workers": 2}
    started = spreading.start("lengths", **settings, seconds=3)
    deadline = time.monotonic() + 120
    while not spreading.shards():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    # The stage's process and two model workers.
    children = psutil.Process(started.pid).children(recursive=True)
    assert sum("quantize_gemma.tasks.runtime.model_workers:serve" in child.cmdline() for child in children) == 2
    started.send_signal(sent)
    started.communicate(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    before = spreading.shards()
    assert 0 < len(before) < 6
    found = spreading("lengths", **settings, seconds=0)
    after = spreading.shards()
    assert {key: after[key] for key in before} == before
    assert len(after) == len(json.loads(files(found)["lengths.json"])) == 6


def test_finished_shards_are_reused_and_a_larger_limit_has_its_own_shards(spreading: Spreading, tmp_path: Path) -> None:
    few = {name: words[:2] for name, words in WORDS.items()}
    settings = {"seconds": 0, "loaded": str(tmp_path / "loaded")}
    spreading("lengths", words=few, **settings)
    before = spreading.shards()
    more = {**few, "list3": WORDS["list3"]}
    shutil.rmtree(spreading.home / "lengths")
    (tmp_path / "loaded").unlink()
    again = spreading("lengths", words=few, **settings)
    assert spreading.shards() == before
    assert not (tmp_path / "loaded").exists()
    found = spreading("lengths", words=more, **settings)
    after = spreading.shards()
    assert {key: after[key] for key in before} == before
    assert len(after) == 7
    assert len(json.loads(files(found)["lengths.json"])["list3"]) == 60
    assert len(json.loads(files(again)["lengths.json"])["list3"]) == 2
