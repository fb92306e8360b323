"""Kill points: send SIGKILL at a random moment of a random stage, then start another run, which must complete.

    python -m tests.campaigns.kill_points [--cases N] [--seed S]

The victim is the run, its process group, the stage's process, the process that forks stages, the Prefect server, a
deployment's worker, or every process on the worker's machine. Afterwards, none of the run's processes is alive. The
next run ends with the same digests as an uninterrupted run, with one commit of the release on the Hub, and with no
leftovers in the store.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.runtime import store, store_layout
from tests.campaigns import campaign
from tests.conftest import CommandLine, Outcome
from tests.hub.server import Hub, serve
from tests.operate.test_deployments import Operation
from tests.processes import fork_servers, stage_processes
from tests.texts import WIKITEXT, write_wikitext

MODEL, BENCHMARK, CHARTS = "team/tiny-gemma3", "cais/mmlu", "HuggingFaceM4/ChartQA"
WRITER = "hf_MARKEDwriter00"
# The stages that use each stage's result.
USED_BY = {
    "download": ("untie", "fidelity_base", "record_mmlu", "record_chartqa"),
    "download_text": ("fidelity_base",),
    "fidelity_base": ("fidelity_quantized", "fidelity_program"),
    "fidelity_quantized": ("fidelity",),
    "fidelity_program": ("fidelity",),
    "fidelity": ("gate",),
    "download_mmlu": ("record_mmlu",),
    "download_chartqa": ("record_chartqa",),
    "record_mmlu": (
        "answer_mmlu_base",
        "answer_mmlu_quantized",
        "answer_mmlu_program",
        "answer_mmlu_no_act_quant",
        "verify_tokenizer",
    ),
    "record_chartqa": ("answer_chartqa_base", "answer_chartqa_quantized", "answer_chartqa_program", "verify_tokenizer"),
    "untie": ("quantize",),
    "quantize": (
        "smoke",
        "fidelity_quantized",
        "answer_mmlu_quantized",
        "answer_mmlu_no_act_quant",
        "answer_chartqa_quantized",
        "answer_chartqa_program",
        "verify_tokenizer",
        "export",
    ),
    "answer_mmlu_base": ("evaluate_mmlu_base",),
    "answer_mmlu_quantized": ("evaluate_mmlu_quantized",),
    "answer_mmlu_program": ("evaluate_mmlu_program",),
    "answer_mmlu_no_act_quant": ("evaluate_mmlu_no_act_quant",),
    "answer_chartqa_base": ("evaluate_chartqa_base",),
    "answer_chartqa_quantized": ("evaluate_chartqa_quantized",),
    "answer_chartqa_program": ("evaluate_chartqa_program",),
    "evaluate_mmlu_base": ("gate",),
    "evaluate_mmlu_quantized": ("gate",),
    "evaluate_mmlu_program": ("gate",),
    "evaluate_mmlu_no_act_quant": ("gate",),
    "evaluate_chartqa_base": ("gate",),
    "evaluate_chartqa_quantized": ("gate",),
    "evaluate_chartqa_program": ("gate",),
    "smoke": ("gate",),
    "export": ("verify", "fidelity_program", "answer_mmlu_program", "answer_chartqa_program"),
    "verify": ("gate",),
    "verify_tokenizer": ("gate",),
    "gate": ("card",),
    "card": (),
    "publish": (),
}
COMMAND_VICTIMS = ("run", "group", "stage", "fork server", "server")
DEPLOYMENT_VICTIMS = ("server", "worker", "machine")
# Anything that takes longer counts as a hang; a whole run takes a few minutes on a busy machine.
SECONDS_OF_A_RUN = 900.0
SECONDS_TO_END = 60.0
# The fields of metrics.json about how the release was made, not about what it is.
MEASURED = ("run_id", "stages")
# Stages whose artifacts contain timings.
IRREPRODUCIBLE = ("gate", "card")


@dataclass(frozen=True)
class Case:
    """What is killed, in which stage, after what share of its duration, and which results are removed first."""

    stage: str
    victim: str
    deployed: bool
    part: float
    removed: tuple[str, ...]
    shards: float
    """The share of the separately stored answers that is removed from the store."""

    def __str__(self) -> str:
        origin = "deployed" if self.deployed else "command"
        return f"{self.victim} ({origin}) killed in {self.stage} at {self.part:.0%}, without {', '.join(self.removed)}"


def draw(rng: random.Random) -> Case:
    """Return a random case. On average, a third of the stages downstream of the killed one have to run again, too."""
    deployed = rng.random() < 0.3
    stage = rng.choice(list(USED_BY))
    victim = rng.choice(DEPLOYMENT_VICTIMS if deployed else COMMAND_VICTIMS)
    # Publishing is in the run's own process.
    victim = "run" if stage == "publish" and victim in ("stage", "fork server") else victim
    later_stages = [name for name in _downstream(stage) if rng.random() < 1 / 3]
    removed = () if stage == "publish" else (stage, *later_stages)
    return Case(stage, victim, deployed, rng.random(), removed, rng.random())


def run(cases: int, rng: random.Random) -> Iterator[str | None]:
    """Do an uninterrupted run, then yield what went wrong in each case, or None."""
    with tempfile.TemporaryDirectory() as folder, hub_of(Path(folder) / "hub") as hub:
        command_line = CommandLine(Path(folder) / "store", Path(folder) / "prefect")
        options = {"model": MODEL, "target": "team/uninterrupted"}
        outcome = command_line("run", "--json", *_flags(options), **environment_of(hub))
        assert outcome.code == 0, outcome.stderr
        with contextlib.closing(Trials(hub, command_line, outcome, options, Path(folder))) as trials:
            for number in range(cases):
                # A separate generator, because how many numbers a case draws depends on how far it gets.
                case_rng = random.Random(rng.random())
                yield trials.try_case(draw(case_rng), number, case_rng)


@contextlib.contextmanager
def hub_of(root: Path) -> Iterator[Hub]:
    """Serve a Hub with the built-in model and benchmarks, to read from and to publish to."""
    tokens: Any = {WRITER: {"user": "robot", "role": "write", "namespaces": ["team"]}}
    with serve(root, tokens) as hub:
        hub.add("model", MODEL, BUILTIN["tiny-gemma3"])
        hub.add("dataset", BENCHMARK, BUILTIN_BENCHMARKS["mmlu-mini"])
        hub.add("dataset", CHARTS, BUILTIN_BENCHMARKS["chartqa-mini"])
        hub.add("dataset", WIKITEXT, write_wikitext(root.with_name("wikitext")))
        yield hub


def environment_of(hub: Hub) -> dict[str, str]:
    """Return the environment variables that make a run use this Hub."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_TOKEN_WRITE": WRITER, "HF_HUB_DISABLE_XET": "1"}


class Trials:
    """Cases on copies of a finished run's store, each with its own repository to publish to."""

    def __init__(
        self, hub: Hub, command_line: CommandLine, finished: Outcome, options: dict[str, str], folder: Path
    ) -> None:
        self.hub = hub
        self.finished_home = command_line.home
        self.prefect = command_line.prefect
        self.options = options
        self.folder = folder
        lines = {line["name"]: line for line in finished.summary["stages"]}
        self.seconds = {name: max(line["seconds"] or 0.0, 0.5) for name, line in lines.items()} | {"publish": 1.0}
        self.keys = {name: line["key"] for name, line in lines.items() if line["key"]}
        # The directory of a stage's artifacts.
        self.folders = {name: next(self.finished_home.glob(f"*/{key}")).parent.name for name, key in self.keys.items()}
        self.digests = self.digests_in(self.finished_home)
        self.release = self.release_in(self.finished_home)
        self.operation: Operation | None = None

    def close(self) -> None:
        """Stop the server of the deployments."""
        if self.operation is not None:
            self.operation.server.terminate()
            self.operation.server.wait(SECONDS_TO_END)

    def try_case(self, case: Case, number: int, rng: random.Random) -> str | None:
        """Return what went wrong in a case, or None."""
        folder = self.folder / f"case-{number}"
        home = folder / "store"
        folder.mkdir()
        shutil.copytree(self.finished_home, home, symlinks=True)
        self.remove(case, home, rng)
        attempt = Attempt(self, case, home, f"team/case-{number}", f"{os.getpid()}-{number}")
        try:
            attempt.kill(rng)
            attempt.finish()
            faults = attempt.faults()
        except Exception as failure:
            # Continue with the next case.
            faults = [str(failure) if isinstance(failure, Failed) else f"{type(failure).__name__}: {failure}"]
        finally:
            attempt.end()
        shutil.rmtree(folder)
        return f"{case}: {'; '.join(faults)}" if faults else None

    def remove(self, case: Case, home: Path, rng: random.Random) -> None:
        """Remove what the run has to compute again: artifacts, and some of the separately stored answers."""
        folders = [home / self.folders[name] / self.keys[name] for name in case.removed]
        if any(name.startswith(("answer", "evaluate")) for name in case.removed):
            shards = sorted(home.glob("responses/[0-9a-f]*"))
            folders += rng.sample(shards, round(case.shards * len(shards)))
        for folder in folders:
            data = folder.resolve()
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(data)

    def digests_in(self, home: Path) -> dict[str, str | None]:
        """Return the digest of each artifact that contains no timings."""
        artifacts = {
            name: store.load(self.folders[name], key, home)
            for name, key in self.keys.items()
            if name not in IRREPRODUCIBLE
        }
        return {name: artifact.digest if artifact else None for name, artifact in artifacts.items()}

    def release_in(self, home: Path) -> dict[str, Any]:
        """Return what identifies the release: the digests of its files, and metrics.json without the timings."""
        artifact = self.newest_release(home)
        files = {name: file.sha256 for name, file in artifact.files.items()}
        metrics = json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8"))
        for name in MEASURED:
            del metrics[name]
        del metrics["program"]["speed"]
        # The card's text shows those measurements, and release.json has the digest of every other file.
        del files["release.json"]
        entries = json.loads((artifact.path / "release.json").read_text(encoding="utf-8"))["files"]
        if {name: entry["sha256"] for name, entry in entries.items()} != files:
            raise Failed("release.json does not list the release's files")
        del files["README.md"]
        return {**files, "metrics.json": metrics}

    def newest_release(self, home: Path) -> store.Artifact:
        """Return the newest release: its key is different if the gate's timings were measured again."""
        folders = (home / self.folders["card"]).glob("[0-9a-f]*")
        releases = [artifact for folder in folders if (artifact := store.load("card", folder.name, home))]
        if not releases:
            raise Failed("the store has no release")
        return max(releases, key=lambda artifact: (artifact.path / "release.json").stat().st_mtime_ns)

    def operate(self) -> Operation:
        """Return the server of the deployments, which is started for the first of these cases."""
        if self.operation is None:
            home = self.folder / "server"
            home.mkdir()
            with socket.create_server(("127.0.0.1", 0)) as listener:
                api = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            settings = {
                **CommandLine(self.folder / "nothing", home).environment(),
                "PREFECT_API_URL": api,
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
                **environment_of(self.hub),
            }
            self.operation = Operation(settings, api, None, home / "log")  # type: ignore[arg-type]
            self.operation.start_server()
            self.operation.deploy()
            # A machine that died holds its slots until their lease ends; the next case must not wait for that.
            limit = f"{api}/v2/concurrency_limits/quantize-gemma-memory"
            httpx.patch(limit, json={"limit": 1000}, timeout=60).raise_for_status()
        return self.operation


class Failed(Exception):
    """A case failed; the message says why."""


@dataclass
class Attempt:
    """A run that is killed, and the run after it. All processes that they start have `mark` in their environment."""

    trials: Trials
    case: Case
    home: Path
    target: str
    mark: str
    workers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    last_request: float = 0.0
    has_ended: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {**environment_of(self.trials.hub), "QUANTIZE_GEMMA_TEST_CASE": self.mark}

    @property
    def command_line(self) -> CommandLine:
        return CommandLine(self.home, self.trials.prefect)

    def kill(self, rng: random.Random) -> None:
        """Start a run, kill the victim, and wait until all processes of the run have ended."""
        if self.case.deployed:
            self.kill_deployed()
        else:
            self.kill_command(rng)
        # A process that does not end by itself hangs, except for a run that continues without its worker.
        self.wait(lambda: not self.alive(), "the killed run still has processes", SECONDS_OF_A_RUN)

    def kill_command(self, rng: random.Random) -> None:
        process = self.command_line.start("run", "--json", *self.flags(), **self.environment)
        self.wait_for_the_moment(lambda: process.poll() is None)
        if self.case.victim == "group":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        elif self.case.victim == "run" or not self.kill_child(process.pid, rng):
            process.kill()
        try:
            stdout, stderr = process.communicate(timeout=SECONDS_OF_A_RUN)
        except subprocess.TimeoutExpired:
            raise Failed("the run did not end") from None
        # The run may have ended before, or may no longer have needed the process that was killed.
        if process.returncode not in (0, 1, -signal.SIGKILL):
            raise Failed(f"the killed run ended with {process.returncode}: {stderr[-1000:]}")
        if process.returncode == 1 and not json.loads(stdout.splitlines()[-1])["error"]:
            raise Failed(f"the killed run reports no error: {stdout}")

    def kill_child(self, run: int, rng: random.Random) -> bool:
        """Kill a stage's process, the fork server, or the Prefect server of a run; return False if it has none."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.case.victim == "stage":
                victims = stage_processes(run)
            elif self.case.victim == "fork server":
                victims = fork_servers(run)
            else:
                victims = [
                    child
                    for child in psutil.Process(run).children(recursive=True)
                    if "quantize_gemma.flows.local_server" in child.cmdline()
                ]
            for process in rng.sample(victims, len(victims)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    return True
        return False

    def kill_deployed(self) -> None:
        operation = self.trials.operate()
        worker = self.start_worker()
        run = self.submit()
        self.wait_for_the_moment(lambda: not self.is_over(run))
        if self.case.victim == "server":
            operation.server.kill()
            operation.server.wait()
            operation.start_server()
            # The run continues with the restarted server, or ends.
            self.wait(lambda: self.is_over(run) or len(self.alive()) <= 1, "the run has not ended", SECONDS_OF_A_RUN)
            self.stop_worker(worker)
            return
        below = psutil.Process(worker.pid).children(recursive=True) if self.case.victim == "machine" else []
        for process in [psutil.Process(worker.pid), *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        worker.wait()

    def finish(self) -> None:
        """Run again, until the run completes."""
        if not self.case.deployed:
            outcome = self.command_line("run", "--json", *self.flags(), **self.environment)
            if outcome.code:
                raise Failed(f"the next run ended with {outcome.code}: {outcome.stderr[-2000:]}")
        else:
            worker = self.start_worker()
            run = self.submit()
            self.wait(lambda: self.is_over(run), "the next run has not ended", SECONDS_OF_A_RUN)
            state = self.trials.operate().read(f"flow_runs/{run}")["state"]
            if state["type"] != "COMPLETED":
                raise Failed(f"the next run is {state['name']}: {state['message']}")
            self.stop_worker(worker)
        self.wait(lambda: not self.alive(), "the next run still has processes", SECONDS_TO_END)

    def faults(self) -> list[str]:
        """Return the differences from what an uninterrupted run leaves."""
        faults = []
        for expected in (None, "removed 0 unfinished directories and 0 artifacts"):
            outcome = self.command_line("prune")
            if outcome.code or not outcome.stdout.startswith(expected or "removed"):
                faults.append(f"prune ended with {outcome.code}: {outcome.stdout}{outcome.stderr}")
        if leftovers := [path.name for path in self.home.glob("*/.incoming-*")]:
            faults.append(f"leftovers of a download: {leftovers}")
        digests = self.trials.digests_in(self.home)
        faults += [f"{name} differs" for name, digest in self.trials.digests.items() if digests[name] != digest]
        release = self.trials.release_in(self.home)
        expected_release = self.trials.release
        faults += [f"the release's {name} differs" for name in release if release[name] != expected_release[name]]
        if release.keys() != expected_release.keys():
            faults.append(f"the release has {sorted(release)}")
        return faults + self.faults_on_the_hub()

    def faults_on_the_hub(self) -> list[str]:
        repository = self.trials.hub.storage.load("model", self.target)
        commits = [commit for commit in repository["commits"].values() if "model.pte" in commit["files"]]
        if len(commits) != 1:
            return [f"{len(commits)} commits of a release on the Hub"]
        artifact = self.trials.newest_release(self.home)
        hub_digests = {name: entry["sha256"] for name, entry in self.trials.hub.files("model", self.target).items()}
        hub_digests.pop(".gitattributes", None)
        is_same = hub_digests == {name: file.sha256 for name, file in artifact.files.items()}
        return [] if is_same else ["the Hub's files are not the release's"]

    def wait_for_the_moment(self, is_running: Callable[[], bool]) -> None:
        """Wait until the stage has run for a share of its usual duration, or until the run has ended."""
        self.wait(lambda: self.has_started() or not is_running(), f"no sign of {self.case.stage}", SECONDS_OF_A_RUN)
        deadline = time.monotonic() + self.case.part * self.trials.seconds[self.case.stage]
        while time.monotonic() < deadline and is_running():
            time.sleep(min(0.05, max(deadline - time.monotonic(), 0)))

    def has_started(self) -> bool:
        """Tell whether the stage has begun: it has a partial directory, or publishing has sent a request to the Hub."""
        if self.case.stage == "publish":
            return any("repos/create" in line["path"] or self.target in line["path"] for line in self.writes())
        folder = self.home / self.trials.folders[self.case.stage]
        key = self.trials.keys[self.case.stage]
        return any(folder.glob(f"{store_layout.PARTIAL}{key[:16]}*"))

    def writes(self) -> list[dict[str, Any]]:
        """Return the requests of this case that write to the Hub: no other case runs at the same time."""
        log = self.trials.hub.log
        return [line for line in log if line["method"] == "POST" and "paths-info" not in line["path"]]

    def wait(self, is_done: Callable[[], bool], description: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > deadline:
                command_lines = [" ".join(process.cmdline()[:6]) for process in self.alive()]
                raise Failed(f"{description} after {seconds:.0f} s: {command_lines}")
            time.sleep(0.05)

    def alive(self) -> list[psutil.Process]:
        """Return the processes that this case has started."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                has_mark = process.environ().get("QUANTIZE_GEMMA_TEST_CASE") == self.mark
                if has_mark and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes

    def flags(self) -> list[str]:
        return _flags({**self.trials.options, "target": self.target})

    def start_worker(self) -> "subprocess.Popen[bytes]":
        operation = self.trials.operate()
        environment = {**operation.environment, "QUANTIZE_GEMMA_HOME": str(self.home), **self.environment}
        worker = Operation(environment, operation.api, operation.server, operation.log).start(
            "worker", "start", "--pool", "quantize-gemma"
        )
        self.workers.append(worker)
        return worker

    def stop_worker(self, worker: "subprocess.Popen[bytes]") -> None:
        worker.terminate()
        try:
            worker.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            # A worker that has lost its server may not react to the signal for a while.
            worker.kill()
            worker.wait()

    def submit(self) -> str:
        options = self.trials.options
        parameters = {
            "model": options["model"],
            "target": self.target,
        }
        self.has_ended = False
        return self.trials.operate().submit(
            "quantize-gemma/tiny", *(f"{name}={value}" for name, value in parameters.items())
        )

    def is_over(self, run: str) -> bool:
        """Tell whether a flow run had ended at the last request: at most one a second, because the server is busy."""
        if time.monotonic() - self.last_request > 1:
            # A server that is too busy to answer is asked again.
            with contextlib.suppress(httpx.TransportError):
                state = self.trials.operate().read(f"flow_runs/{run}")["state_type"]
                self.has_ended = state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            self.last_request = time.monotonic()
        return self.has_ended

    def end(self) -> None:
        """Kill the processes that a failure left behind."""
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for worker in self.workers:
            worker.wait()
        self.trials.hub.log.clear()


def _downstream(stage: str) -> list[str]:
    """Return the names of all stages downstream of a stage."""
    names: set[str] = set()
    waiting = [stage]
    while waiting:
        new_names = set(USED_BY[waiting.pop()]) - names
        names |= new_names
        waiting += new_names
    return sorted(names)


def _flags(options: dict[str, str]) -> list[str]:
    return list(itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items()))


if __name__ == "__main__":
    campaign("kill_points", run, 50)
