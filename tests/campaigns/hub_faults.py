"""Inject every kind of Hub fault at every request of a download and of a publish.

    python -m tests.campaigns.hub_faults [--cases N] [--seed S]

Most cases call the flow's functions in this process, and retry as the flow does, but without waiting; every hundredth
case is followed by a whole `quantize-gemma run` on a store that has all other results. In each case, no wrong file is
accepted, the target is unchanged or contains the release, the error is one sentence without a token, and the next
attempt completes with one commit.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from tests.campaigns import campaign
from tests.hub.access import Tokens
from tests.hub.server import Hub, serve
from tests.texts import WIKITEXT, write_wikitext

TOKEN = "hf_MARKED000000"
MODEL, BENCHMARK, CHARTS = "team/tiny-gemma3", "cais/mmlu", "HuggingFaceM4/ChartQA"
SECONDS = 1
METRICS = {
    "recipe": "HQQ-INT8-INT4",
    "base_model": MODEL,
    "base_revision": "a" * 40,
    "recipe_hash": "b" * 64,
    "run_id": "c0ffee",
    "versions": {},
    "quantized": {},
    "program": {},
}
TRANSIENT: dict[str, dict[str, Any]] = {
    "slow": {"delay": 1.5 * SECONDS},
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
    "500": {"status": 500},
    "503": {"status": 503},
    "cut": {"cut": 1},
    "wrong bytes": {"wrong_bytes": True},
    "lost response": {"status": 503, "after_work": True},
    "lost connection": {"cut": 0, "after_work": True},
    "moved head": {"delay": 0.2},
}
PERMANENT: dict[str, dict[str, Any]] = {
    "429 for years": {"status": 429, "headers": {"Retry-After": "99999999999"}},
    "401": {"status": 401},
    "403": {"status": 403},
    "404": {"status": 404},
    "no such entry": {"status": 404, "error_code": "EntryNotFound"},
    "no such revision": {"status": 404, "error_code": "RevisionNotFound"},
    "412": {"status": 412},
    "507": {"status": 507},
}
FAULTS = TRANSIENT | PERMANENT
PROCESS_EVERY = 100


@dataclass(frozen=True)
class Case:
    """A fault at one request of a scenario, or at that request and all later ones."""

    scenario: str
    request: int
    fault: str
    once: bool

    def __str__(self) -> str:
        return f"{self.scenario}, {self.fault} at request {self.request}{'' if self.once else ' and all later ones'}"


def run(cases: int, rng: random.Random) -> Iterator[str | None]:
    """Yield what went wrong in each case, or None."""
    tokens: Tokens = {TOKEN: {"user": "team", "role": "write", "namespaces": []}}
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "hub", tokens) as hub, client_of(hub):
        hub.add("model", MODEL, BUILTIN["tiny-gemma3"])
        hub.add("dataset", BENCHMARK, BUILTIN_BENCHMARKS["mmlu-mini"])
        hub.add("dataset", CHARTS, BUILTIN_BENCHMARKS["chartqa-mini"])
        hub.add("dataset", WIKITEXT, write_wikitext(Path(folder) / "wikitext"))
        trials = Trials(hub, Path(folder))
        case_list = all_cases(trials)
        rng.shuffle(case_list)
        for number, case in enumerate(case_list[:cases]):
            yield trials.try_case(case)
            if number % PROCESS_EVERY == PROCESS_EVERY - 1:
                yield trials.try_process(case)


@contextmanager
def client_of(hub: Hub) -> Iterator[None]:
    """Point this process's Hub client at the local Hub, and shorten the client's own retry delays."""
    assert "huggingface_hub" not in sys.modules, "the client reads the Hub's URL on import"
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(SECONDS),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "critical",
    }
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 100)
    try:
        yield
    finally:
        time.sleep = sleep


def all_cases(trials: "Trials") -> list[Case]:
    """Return each fault at each request that a fault-free run of each scenario makes."""
    cases = []
    for scenario in trials.scenarios:
        trials.number += 1
        trials.hub.log.clear()
        trials.scenarios[scenario]()
        requests = len(trials.hub.log)
        cases += [
            Case(scenario, request, fault, once)
            for request in range(requests)
            for fault in FAULTS
            for once in (True, False)
        ]
    return cases


class Trials:
    """The scenarios, and the invariants after each of them."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        from quantize_gemma.tasks.runtime import store

        self.hub = hub
        self.folder = folder
        self.number = 0
        self.store = CommandStore(hub, folder)
        self.old, self.new = (self.release(store, name) for name in ("old", "new"))
        self.scenarios: dict[str, Callable[[], None]] = {
            "download": self.download,
            "publish": partial(self.publish, "publish"),
            "publish over a release": partial(self.publish, "publish over a release", over_release=True),
            "propose": partial(self.publish, "propose", over_release=True, create_pr=True),
        }

    def release(self, store: Any, name: str) -> Any:
        """Return an artifact like that of the stage `card`; old and new each have one file that the other lacks."""
        from quantize_gemma.tasks.card import write_file_list

        def fill(target: Path) -> dict[str, Any]:
            for path in BUILTIN["tiny-gemma3"].iterdir():
                shutil.copy(path, target / path.name)
            (target / "model.pte").write_bytes(name.encode() * 50_000)
            (target / f"{name}.json").write_text("{}")
            (target / "README.md").write_text(f"---\nlicense: cc0-1.0\n---\n# {name}\n")
            (target / "metrics.json").write_text(json.dumps(METRICS))
            write_file_list(target, {})
            return {}

        return store.produce("card", name.ljust(64, "0"), fill, self.folder / "releases")

    def try_case(self, case: Case) -> str | None:
        """Return what is wrong with the case's outcome, or None."""
        self.number += 1
        self.hub.faults.clear()
        self.hub.log.clear()
        self.hub.faults.add(after=case.request, times=1 if case.once else None, **FAULTS[case.fault])
        # Publishing to a repository that was empty when it was checked fails if someone else has added files since.
        name = ".gitattributes" if case.scenario == "publish" else "somebody.txt"
        mover = self.move_head(case.request, name) if case.fault == "moved head" else None
        try:
            problem = self.judge_case(case)
        finally:
            self.hub.faults.clear()
            if mover:
                mover()
        return f"{case}: {problem}" if problem else None

    def judge_case(self, case: Case) -> str | None:
        """Run the case and check its results, then run it again without the fault."""
        from quantize_gemma.tasks.runtime.errors import RunError

        try:
            self.scenarios[case.scenario]()
        except RunError as error:
            message = str(error)
            if "\n" in message or len(message) > 600 or "MARKED" in message:
                return f"not one clean sentence: {message!r}"
            if case.once and case.fault in TRANSIENT:
                return f"did not recover: {message}"
        except AssertionError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self.hub.faults.clear()
        try:
            self.scenarios[case.scenario]()
        except Exception as error:
            return f"the next run: {type(error).__name__}: {error}"
        return None

    def move_head(self, request: int, name: str) -> Callable[[], None]:
        """Commit to the target and the model from another thread during the request; return a function that ends it."""
        has_ended = threading.Event()

        def commit() -> None:
            while len(self.hub.log) <= request and not has_ended.wait(0.01):
                pass
            note = self.folder / f"note-{self.number}"
            note.mkdir()
            (note / name).write_text(f"# {self.number}\n")
            for repository in (MODEL, self.target()):
                if self.hub.storage.find("model", repository) and not has_ended.is_set():
                    self.hub.add("model", repository, note)

        thread = threading.Thread(target=commit)
        thread.start()

        def end() -> None:
            has_ended.set()
            thread.join()

        return end

    def target(self) -> str:
        return f"team/release-{self.number}"

    def download(self) -> None:
        """Resolve and download the model; the files must be those of the commit."""
        from quantize_gemma.tasks.download import download, resolve_model

        resolved = retry(3, resolve_model, MODEL, None, False)
        stage = self.folder / "download" / str(self.number)
        incoming = stage / "partial"

        def fill() -> Path:
            shutil.rmtree(incoming, ignore_errors=True)
            (incoming / "data").mkdir(parents=True)
            download(incoming / "data", MODEL, resolved.revision, False)
            return incoming / "data"

        data = retry(5, fill)
        expected = self.hub.files("model", MODEL, resolved.revision)
        for path in data.iterdir():
            content = self.hub.storage.object(expected[path.name]["sha256"]).read_bytes()
            assert path.read_bytes() == content, f"{path.name} is not the Hub's"
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in data.iterdir()}
        shutil.rmtree(stage)

    def publish(self, scenario: str, over_release: bool = False, create_pr: bool = False) -> None:
        """Publish as the flow does.

        At the end, the target must contain the release; before that, it may only contain the release or its previous
        files.
        """
        from quantize_gemma.tasks.publish import Target, check_target, publish, published_metrics

        target = self.target()
        if over_release and self.hub.storage.find("model", target) is None:
            files = {path.name: self.hub.storage.add_file(path, path.name) for path in self.old.path.iterdir()}
            self.hub.storage.create("model", target, "team")
            self.hub.storage.commit("model", target, "main", files, title="old", author="team")
        try:
            retry(3, check_target, Target(target, create_pr=create_pr))
            retry(3, published_metrics, target, None)
            publication = retry(3, publish, self.new, Target(target, create_pr=create_pr), False, not create_pr)
        finally:
            self.check_target_contents(target, over_release, create_pr)
        contents = self.contents(target, "refs/pr/1" if create_pr else "main")
        assert self.is_release(contents, self.new), f"published {sorted(contents)}"
        assert "old.json" not in contents, "a file of the previous release is still there"
        assert publication.url.startswith(self.hub.url)
        assert create_pr or self.hub.head("model", target, publication.tag) == publication.commit

    def check_target_contents(self, target: str, over_release: bool, create_pr: bool) -> None:
        """Assert that the target has a whole release or its previous files, and that nothing was committed twice."""
        repo = self.hub.storage.find("model", target)
        if repo is None:
            return
        commits = [commit for commit in repo["commits"].values() if commit["title"].startswith("HQQ-INT8-INT4 of ")]
        assert len(commits) <= 1, f"{len(commits)} commits"
        assert sum(ref.startswith("refs/pr/") for ref in repo["refs"]) <= 1, "two pull requests"
        main = self.contents(target, "main")
        if create_pr or not commits:
            expected = set(self.old.files) if over_release else set()
            assert set(main) == expected, f"main has {sorted(main)}"
        else:
            assert self.is_release(main, self.new), f"an incomplete release: {sorted(main)}"

    def contents(self, target: str, revision: str) -> dict[str, str]:
        """Return the SHA-256 of each file of the target, without the files that the Hub and the other thread add."""
        files = self.hub.files("model", target, revision)
        ignored_names = (".gitattributes", "somebody.txt")
        return {name: file["sha256"] for name, file in files.items() if name not in ignored_names}

    def is_release(self, contents: dict[str, str], release: Any) -> bool:
        return contents == {name: file.sha256 for name, file in release.files.items()}

    def try_process(self, case: Case) -> str | None:
        """Return what is wrong with a whole run that encounters the case's fault, or None."""
        self.number += 1
        self.hub.faults.clear()
        self.store.fill()
        self.hub.log.clear()
        self.hub.faults.add(after=case.request, times=1, **FAULTS[case.fault])
        code, stdout, stderr = self.store("--refresh", "download", "--target", self.target())
        self.hub.faults.clear()
        problem = self.judge_process(code, stdout, stderr)
        return f"quantize-gemma run, {case.fault} at request {case.request}: {problem}" if problem else None

    def judge_process(self, code: int, stdout: str, stderr: str) -> str | None:
        if "MARKED" in stdout + stderr or "Traceback" in stderr:
            return f"a token or a traceback: {stderr[-2000:]}"
        try:
            summary = json.loads(stdout.splitlines()[-1])
        except (ValueError, IndexError):
            return f"no JSON: {stdout[-500:]!r}; {stderr[-2000:]}"
        error = summary["error"]
        has_output = any(stage["key"] and not stage["cached"] for stage in summary["stages"])
        has_publish_stage = any(stage["name"] == "publish" for stage in summary["stages"])
        if (code == 0) != (error is None) or code not in (0, 1, 2):
            return f"exit code {code} with {error!r}"
        if code == 2 and (has_output or has_publish_stage):
            return f"exit code 2 after a stage produced a result: {error}"
        if error is not None and ("\n" in error or f"quantize-gemma: {error}" not in stderr):
            return f"not one sentence: {error!r}"
        repository = self.hub.storage.find("model", self.target())
        files = self.contents(self.target(), "main") if repository else {}
        if (code == 0) != ("model.pte" in files) and not (code and "model.pte" in files and has_publish_stage):
            return f"exit code {code}, and the target has {sorted(files)}"
        return None


class CommandStore:
    """The command line with its own store, which has the results of all stages."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.home = folder / "home"
        self.prefect = folder / "prefect"

    def fill(self) -> None:
        """Run all stages, once."""
        if not self.home.exists():
            code, _, stderr = self()
            assert code == 0, stderr[-2000:]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own_variables = {
            "QUANTIZE_GEMMA_HOME": str(self.home),
            "PREFECT_HOME": str(self.prefect),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }
        command = [
            sys.executable,
            "-m",
            "quantize_gemma.flows.cli",
            "run",
            "--model",
            MODEL,
            "--json",
        ]
        process = subprocess.run(
            [*command, *arguments], env={**inherited, **own_variables}, capture_output=True, text=True
        )
        return process.returncode, process.stdout, process.stderr


def retry(times: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and retry transient failures as the flow does, but without waiting."""
    from quantize_gemma.tasks.runtime.retries import is_retryable

    while True:
        try:
            return work(*arguments)
        except Exception as error:
            times -= 1
            if times < 0 or not is_retryable(error)[0]:
                raise


if __name__ == "__main__":
    campaign("hub_faults", run, 5000)
