"""Flows that spread an evaluation, for tests, each in a process of its own: `python -m tests.spreading '{…}'`.

The last line of stdout is the result as JSON. {"stage": "evaluate", …} evaluates tiny-gemma3 on the built-in questions
with those settings of the stage; {"stage": "lengths", …} answers some words with their lengths, which needs no model.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.evaluate import evaluate_mmlu, shards
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, open_artifact, ref_of
from quantize_gemma.tasks.runtime.errors import RunError
from quantize_gemma.tasks.runtime.lifetime import stop_on_interrupt
from quantize_gemma.tasks.runtime.prefect_stage import as_task
from quantize_gemma.tasks.runtime.stage import Output, stage


def load_lengths(loaded: str, seconds: float) -> Callable[[list[str]], list[int]]:
    """Load a scorer of words by their lengths; it dies of "SIGKILL", and leaves a line when it is loaded."""
    with open(loaded, "a", encoding="utf-8") as stream:
        stream.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")

    def score(words: list[str]) -> list[int]:
        time.sleep(seconds)
        if "fail" in words:
            raise ValueError("a word that cannot be measured")
        if "SIGKILL" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        taken = b"x" * 500_000_000 if "large" in words else b""
        lengths = [len(word) + 0 * len(taken) for word in words]
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(f"{loaded}.peak").write_text(str(1024 * kilobytes), encoding="utf-8")
        return lengths

    return score


@stage(ignored=("loaded", "seconds", "workers", "cluster"))
def lengths(
    target: Path, words: dict[str, list[str]], loaded: str, seconds: float, workers: int, cluster: str | None
) -> Output:
    """Writes each list's lengths."""
    responses = shards.respond(
        words,
        scorer="tests.spreading:load_lengths",
        settings={"loaded": loaded, "seconds": seconds},
        paths={},
        identity={},
        root=store.home(),
        workers=workers,
        cluster=cluster,
    )
    (target / "lengths.json").write_text(json.dumps(responses), encoding="utf-8")
    return {}


@flow
def spread_evaluation(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the artifact's directory, what it took, and how many shards each process has answered."""
    inputs = {"workers": 1, "cluster": None, **settings}
    if stage == "evaluate":
        inputs = {"limit": None, "batch_size": "auto", "device": "cpu", **inputs}
        inputs |= {"checkpoint": in_the_store(BUILTIN["tiny-gemma3"])}
        inputs |= {"dataset": in_the_store(BUILTIN_BENCHMARKS["mmlu-mini"])}
    options = as_task({"evaluate": evaluate_mmlu, "lengths": lengths}[stage]).with_options(
        task_run_name=f"{stage} · test", result_storage=store.home()
    )
    with stop_on_interrupt():
        artifact = open_artifact(options.submit(**inputs).result())
    manifests = store.home().glob("responses/[0-9a-f]*/manifest.json")
    by = [json.loads(path.read_text(encoding="utf-8"))["measured"]["process"] for path in manifests]
    return {"folder": str(artifact.path), "measured": artifact.measured, "answered": Counter(by)}


def in_the_store(source: Path) -> ArtifactRef:
    """Return the reference of a directory's copy in the store."""

    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(source, target, dirs_exist_ok=True)
        return {}

    return ref_of(store.produce("download", store.key("test", [], {"name": source.name}, {}), copy))


if __name__ == "__main__":
    # As the imported module: a cluster's workers look the flow's names up there.
    from tests import spreading

    given = json.loads(sys.argv[1])
    try:
        print(json.dumps(spreading.spread_evaluation(given.pop("stage"), given)))
    except RunError as error:
        sys.exit(f"{type(error).__name__}: {error}")
