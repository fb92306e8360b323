"""Evaluate: lm-eval's own `mmlu` task group on a checkpoint, as a library. (Card section: Model Quality.)"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tasks.builtin import BUILTIN_BENCHMARKS
from tasks.policies import stage
from tasks.store import StageFailed, UserError

CATEGORIES = ("stem", "humanities", "social_sciences", "other")


def evaluate_checkpoint(
    target: Path, checkpoint: Path, benchmark: str, limit: int | None, batch_size: str, device: str
) -> dict[str, Any]:
    """Writes results.json (accuracy and standard error overall, per category, per subject) and samples.jsonl.

    `benchmark` is mmlu-mini or cais/mmlu; `limit` is questions per subject. Accuracies are fractions.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device on this machine: use device auto or cpu")
    with tempfile.TemporaryDirectory() as folder:
        # datasets takes a directory of that name for the repository: lm-eval's tasks stay as they are.
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        if benchmark in BUILTIN_BENCHMARKS:
            os.makedirs(f"{folder}/cais")
            os.symlink(BUILTIN_BENCHMARKS[benchmark].resolve(), f"{folder}/cais/mmlu")
            os.environ["HF_DATASETS_OFFLINE"] = "1"
            os.chdir(folder)
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=str(checkpoint), device=device, batch_size=_batch_size(batch_size), dtype="bfloat16")
        output = simple_evaluate(model, tasks=["mmlu"], limit=limit, log_samples=True)
        os.chdir("/")
    if output is None:
        raise StageFailed("lm-eval returned no result")
    results = _summarize(output, benchmark)
    results["device"] = device
    results["limit"] = limit
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (target / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for task in sorted(output["samples"]):
            for sample in sorted(output["samples"][task], key=lambda sample: sample["doc_id"]):
                scores = [response[0] for response in sample["filtered_resps"]]
                row = {
                    "subject": task.removeprefix("mmlu_"),
                    "doc_id": sample["doc_id"],
                    "loglikelihoods": scores,
                    "prediction": max(range(4), key=lambda choice: scores[choice]),
                    "target": int(sample["target"]),
                }
                stream.write(json.dumps(row) + "\n")
    return {"metadata": {"accuracy": results["accuracy"], "questions": results["questions"]}}


def _batch_size(given: str) -> str | int:
    return given if given.startswith("auto") else int(given)


def _summarize(output: dict[str, Any], benchmark: str) -> dict[str, Any]:
    def score(task: str) -> dict[str, float]:
        result = output["results"][task]
        return {"accuracy": result["acc,none"], "stderr": result["acc_stderr,none"]}

    samples = {task: len(rows) for task, rows in output["samples"].items()}
    subjects = {task.removeprefix("mmlu_"): {**score(task), "questions": samples[task]} for task in sorted(samples)}
    return {
        "benchmark": benchmark,
        "fixture": benchmark in BUILTIN_BENCHMARKS,
        "task": "mmlu",
        "task_version": output["versions"].get("mmlu"),
        "num_fewshot": 0,
        "questions": sum(samples.values()),
        **score("mmlu"),
        "categories": {category: score(f"mmlu_{category}") for category in CATEGORIES},
        "subjects": subjects,
    }


evaluate = stage(
    evaluate_checkpoint,
    name="evaluate",
    libraries=("torch", "torchao", "transformers", "lm-eval"),
    ignored=("batch_size",),
)
