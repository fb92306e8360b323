"""Evaluate: lm-eval's own `mmlu` task group on a checkpoint, as a library. (Card section: Model Quality.)"""

from __future__ import annotations

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
    dataset: Path,
    limit: int | None,
    batch_size: int | str,
    device: str,
    workers: int = 1,
    cluster: str | None = None,
    refresh: bool = False,
) -> Output:
    """Write results.json (accuracy and standard error overall, per category, per subject) and samples.jsonl.

    It has more than seven parameters because each is a value of the stage's key, or says who answers.

    Accuracies are fractions; the standard error of a single question is None. If the checkpoint is in the store, each
    subject's responses are stored as soon as they are complete, and read from there unless `refresh`.

    Args:
        target: The directory to write to.
        checkpoint: A plain or quantized checkpoint.
        dataset: A directory in the layout of cais/mmlu.
        limit: Questions per subject; None for all.
        batch_size: The most questions of a batch; "auto" limits the tokens only.
        device: "cpu" or "cuda".
        workers: Processes that respond, in a flow run.
        cluster: Address of a Dask or Ray cluster that responds instead.
        refresh: Compute responses again that are in the store.
    """
    with lm_eval_dataset(dataset) as folder:
        from lm_eval import simple_evaluate

        from quantize_gemma.tasks.evaluate.sharded_lm import ShardedLM

        digest, root = locate_in_store(checkpoint, folder)
        # On a CPU the results are the same to the bit, whatever the batches.
        batches = {} if device == "cpu" else {"batch_size": batch_size}
        respond = functools.partial(
            shards.respond,
            scorer="quantize_gemma.tasks.evaluate.packed_lm:load_checkpoint_scorer",
            settings={"device": device, "batch_size": batch_size},
            paths={"checkpoint": checkpoint},
            identity={"checkpoint": digest, "device": device, **batches},
            root=root,
            workers=workers,
            cluster=cluster,
            refresh=refresh,
        )
        output = simple_evaluate(ShardedLM(respond), tasks=["mmlu"], limit=limit, log_samples=True)
    if output is None:
        raise StageFailed("lm-eval returned no result")
    results = {**_summarize(output), "device": device, "limit": limit}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (target / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for subject, sample in sorted_samples(output):
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
def lm_eval_dataset(dataset: Path) -> Iterator[Path]:
    """Make lm-eval's tasks read `dataset`, in the layout of cais/mmlu. Yield a temporary directory.

    Use it before lm-eval is imported, and once in a process: the libraries remember where they looked first.
    """
    with tempfile.TemporaryDirectory() as folder:
        # `datasets` reads a directory of that name instead of the repository: lm-eval's tasks stay as they are.
        os.makedirs(f"{folder}/cais")
        os.symlink(dataset.resolve(), f"{folder}/cais/mmlu")
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.chdir(folder)
        yield Path(folder)
        os.chdir("/")


def sorted_samples(output: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return lm-eval's samples as (subject, sample), sorted by subject and number."""
    return [
        (task.removeprefix("mmlu_"), sample)
        for task in sorted(output["samples"])
        for sample in sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
    ]


def read_samples(evaluation: Path) -> list[dict[str, Any]]:
    """Return the rows of an evaluation's samples.jsonl."""
    return [json.loads(line) for line in (evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def locate_in_store(artifact: Path, temporary: Path) -> tuple[str, Path]:
    """Return the artifact's digest and the store it is in; a temporary store if it is in none."""
    try:
        return store.read_artifact(artifact).digest, store.root_of(artifact)
    except StageFailed:
        return "not in a store", temporary / "store"


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
