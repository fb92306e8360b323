"""Run a flow with a stage in parts, in a separate process, for tests: `python -m tests.parts '{…}'`.

The last line of stdout is the result as JSON. {"stage": "evaluate", …} evaluates tiny-gemma3 on the built-in MMLU;
{"stage": "lengths", "words": …} returns the lengths of some words, which needs no model.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from quantize_gemma.flows.run import Run, start_run
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.evaluate import evaluate
from quantize_gemma.tasks.evaluate.answer import Scorer, answer, choose_part, respond
from quantize_gemma.tasks.evaluate.record import record
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.requests import Request
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, open_artifact, ref_of
from quantize_gemma.tasks.runtime.errors import RunError
from quantize_gemma.tasks.runtime.stage import Output, stage

# Passed in the environment, so that they are not part of a key.
LOG_VARIABLE, SECONDS_VARIABLE = "LENGTHS_LOADED", "LENGTHS_SECONDS"


def load_lengths() -> Callable[[list[Request]], list[int]]:
    """Return the function that measures words, and write a line to the log. The word "SIGKILL" kills the process."""
    with open(os.environ[LOG_VARIABLE], "a", encoding="utf-8") as stream:
        stream.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")

    def score(requests: list[Request]) -> list[int]:
        words = [str(request.arguments[0]) for request in requests]
        time.sleep(float(os.environ[SECONDS_VARIABLE]))
        if "fail" in words:
            raise ValueError("a word that cannot be measured")
        if "SIGKILL" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        return [len(word) for word in words]

    return score


@stage(resumes=True)
def lengths(target: Path, words: dict[str, list[str]], part: int = 0, parts: int = 1, refresh: bool = False) -> Output:
    """Write the lengths of each list of words."""
    names = choose_part({name: len(part_words) for name, part_words in words.items()}, part, parts)
    shards = {
        name: [Request(name, number, 0, "generate_until", [word]) for number, word in enumerate(words[name])]
        for name in names
    }
    for name, answers in respond(shards, Scorer("tests.parts:load_lengths", {}), part, refresh).items():
        (target / f"{name}.json").write_text(json.dumps(answers), encoding="utf-8")
    return {}


@flow
def run_parts(stage: str, workers: int, cluster: str | None, words: dict[str, list[str]]) -> dict[str, Any]:
    """Return the files that the stage wrote, its line in the summary, and how many shards each process answered."""
    with start_run("test", ()) as run:
        if stage == "evaluate":
            artifacts = [submit_evaluation(run, workers, cluster)]
        else:
            run.map(lengths, stage, workers, cluster, words=words)
            results = [future.result() for future in run.all_futures(stage)]
            artifacts = results[0] if cluster else results
        paths = [path for ref in artifacts for path in open_artifact(ref).path.iterdir()]
    manifests = store.home().glob("responses/[0-9a-f]*/manifest.json")
    process_ids = [json.loads(path.read_text(encoding="utf-8"))["measured"]["process"] for path in manifests]
    lines = {line["name"]: line for line in run.summary.to_json()["stages"]}
    return {"files": sorted(map(str, paths)), "answered": Counter(process_ids), "stages": lines}


def submit_evaluation(run: Run, workers: int, cluster: str | None) -> ArtifactRef:
    """Evaluate tiny-gemma3 as the flow does; return the reference of its results."""
    row = find_benchmark("mmlu")
    checkpoint, dataset = in_the_store(BUILTIN["tiny-gemma3"]), in_the_store(BUILTIN_BENCHMARKS["mmlu-mini"])
    data = {"dataset": dataset, "limit": None}
    requests = run.submit(record, checkpoint=checkpoint, benchmark=row.request_inputs(), **data)
    inputs = {"requests": requests, "checkpoint": checkpoint, "dataset": dataset, "device": "cpu"}
    answers = run.map(answer, "answer", workers, cluster, **inputs)
    scores = {"requests": requests, "answers": answers, "benchmark": row.score_inputs(), "device": "cpu"}
    result: ArtifactRef = run.submit(evaluate, **scores, **data).result()
    return result


def in_the_store(source: Path) -> ArtifactRef:
    """Return the reference of a directory's copy in the store."""

    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(source, target, dirs_exist_ok=True)
        return {"measured": {"seconds": 0.0, "peak_rss_bytes": 0}}

    return ref_of(store.produce("download", store.key("test", [], {"name": source.name}, {}), copy))


if __name__ == "__main__":
    # Call the imported module, because a cluster's workers look up the flow's names there.
    from tests import parts

    arguments = {"workers": 1, "cluster": None, "words": {}, **json.loads(sys.argv[1])}
    try:
        print(json.dumps(parts.run_parts(**arguments)))
    except RunError as error:
        sys.exit(f"{type(error).__name__}: {error}")
