"""Evaluate: lm-eval's own `mmlu` task group on a checkpoint, as a library. (Card section: Model Quality.)"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.evaluate import shards
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import Output, stage

CATEGORIES = ("stem", "humanities", "social_sciences", "other")


@stage(ignored=("workers", "cluster"), ignored_on_cpu=("batch_size",), resumes=True, memory=2.5, accelerated=True)
def evaluate_mmlu(
    target: Path,
    checkpoint: Path,
    questions: Path,
    limit: int | None,
    batch_size: int | str,
    device: str,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> Output:
    """Writes results.json (accuracy and standard error overall, per category, per subject) and samples.jsonl.

    `questions` is a directory in the layout of cais/mmlu; `limit` is questions per subject. Accuracies are fractions;
    the standard error of a single question is None. Each subject's answers are kept in the store when they are there,
    if the checkpoint is of the store, and read from there unless `refresh`. In a flow run `workers` processes answer,
    or the cluster of that address.
    """
    with benchmark(questions) as folder:
        from lm_eval import simple_evaluate

        from quantize_gemma.tasks.evaluate.lm import ShardedLM

        digest, root = kept(checkpoint, folder)
        # On a CPU the same to the bit, whatever is answered together.
        batches = {} if device == "cpu" else {"batch_size": batch_size}
        ask = functools.partial(
            shards.answers,
            answerer="quantize_gemma.tasks.evaluate.model:load_packed",
            settings={"device": device, "batch_size": batch_size},
            paths={"checkpoint": checkpoint},
            identity={"checkpoint": digest, "device": device, **batches},
            root=root,
            workers=workers,
            cluster=cluster,
            refresh=refresh,
        )
        output = simple_evaluate(ShardedLM(ask), tasks=["mmlu"], limit=limit, log_samples=True)
    if output is None:
        raise StageFailed("lm-eval returned no result")
    results = {**_summarize(output), "device": device, "limit": limit}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (target / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for subject, sample in in_order(output):
            scores = [response[0] for response in sample["filtered_resps"]]
            row = {
                "subject": subject,
                "doc_id": sample["doc_id"],
                "loglikelihoods": scores,
                "prediction": max(range(4), key=lambda choice: scores[choice]),
                "target": int(sample["target"]),
            }
            stream.write(json.dumps(row) + "\n")
    return {"metadata": {"accuracy": results["accuracy"], "questions": results["questions"]}}


@contextlib.contextmanager
def benchmark(questions: Path) -> Iterator[Path]:
    """Lets lm-eval's tasks find these questions, in the layout of cais/mmlu. Yields a directory that goes afterwards.

    Before lm-eval is imported, and once in a process: the libraries keep where they looked first.
    """
    with tempfile.TemporaryDirectory() as folder:
        # datasets takes a directory of that name for the repository: lm-eval's tasks stay as they are.
        os.makedirs(f"{folder}/cais")
        os.symlink(questions.resolve(), f"{folder}/cais/mmlu")
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.chdir(folder)
        yield Path(folder)
        os.chdir("/")


def in_order(output: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns lm-eval's samples as (subject, sample), by subject and number."""
    return [
        (task.removeprefix("mmlu_"), sample)
        for task in sorted(output["samples"])
        for sample in sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
    ]


def read_samples(evaluated: Path) -> list[dict[str, Any]]:
    """Returns the rows of an evaluation's samples.jsonl."""
    return [json.loads(line) for line in (evaluated / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def kept(checkpoint: Path, otherwise: Path) -> tuple[str, Path]:
    """Returns the checkpoint's digest and the store that it is in."""
    try:
        return store.at(checkpoint).digest, store.root_of(checkpoint)
    except StageFailed:
        return "not in a store", otherwise / "store"


def _summarize(output: dict[str, Any]) -> dict[str, Any]:
    def score(task: str) -> dict[str, float | None]:
        result = output["results"][task]
        stderr = result["acc_stderr,none"]
        return {"accuracy": result["acc,none"], "stderr": stderr if isinstance(stderr, float) else None}

    samples = {task: len(rows) for task, rows in output["samples"].items()}
    subjects = {task.removeprefix("mmlu_"): {**score(task), "questions": samples[task]} for task in sorted(samples)}
    return {
        "task": "mmlu",
        "task_version": output["versions"].get("mmlu"),
        "num_fewshot": 0,
        "questions": sum(samples.values()),
        **score("mmlu"),
        "categories": {category: score(f"mmlu_{category}") for category in CATEGORIES},
        "subjects": subjects,
    }
