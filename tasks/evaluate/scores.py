"""The output of an evaluation: scores from lm-eval's output, and a row for each document."""

from __future__ import annotations

import math
from typing import Any

from quantize_gemma.tasks.models.benchmarks import PERCENT_METRICS
from quantize_gemma.tasks.models.requests import Request

Json = dict[str, Any]


def summarize(output: Json, name: str, task: str, metric: str, metrics: list[str]) -> Json:
    """Return the content of results.json; metrics.py describes the fields.

    Args:
        output: What lm-eval returned.
        name: The benchmark's name.
        task: The lm-eval task or group.
        metric: The headline metric, with its filter if that is not "none".
        metrics: Further metrics.
    """
    results, samples = output["results"], output["samples"]
    counts = {leaf: len(documents(rows)) for leaf, rows in samples.items()}
    # A group may aggregate no metric, or another one.
    measured = [name for name in results if _key(metric) in results[name]]
    top = results[task] if task in measured else _average([(results[leaf], counts[leaf]) for leaf in counts], metric)
    leaves = sorted(samples) if list(samples) != [task] else []
    groups = [group for group in measured if group not in samples and group != task]
    headline = _score(top, metric, _count(samples, metric))
    if headline["stderr"] is None:
        headline["stderr"] = _stderr_of_share(samples, metric, headline["value"])
    versions = output["versions"]
    version = versions.get(task, versions.get(next(iter(samples))))
    return {
        "task": task,
        "task_version": None if version is None else str(version),
        "num_fewshot": max(output["n-shot"].get(leaf, 0) for leaf in samples),
        "metric": metric,
        **headline,
        "metrics": {extra: _score(top, extra, _count(samples, extra)) for extra in metrics if _key(extra) in top},
        "groups": {_short_name(group, name): _score(results[group], metric, None) for group in groups},
        "tasks": {_short_name(leaf, name): _score(results[leaf], metric, counts[leaf]) for leaf in leaves},
    }


def make_samples(output: Json, name: str, metric: str, requests: dict[tuple[str, int], list[Request]]) -> list[Json]:
    """Return the rows of samples.jsonl, sorted by task and document.

    A row has "task", "doc_id", "target", "prompt", "choices" for a multiple-choice task, "responses" (the choices'
    log-likelihoods in nats, or the text), "prediction" (the number of a choice; if there is only one, whether greedy
    decoding gives it; or the filtered text), and "score", the headline metric, which is None if it is not defined for a
    single document.
    """
    rows = []
    column, _, filter_name = metric.partition(",")
    for leaf in sorted(output["samples"]):
        samples = documents(output["samples"][leaf], filter_name or "none")
        for doc_id in sorted(samples):
            sample, document_requests = samples[doc_id], requests[leaf, doc_id]
            score = sample.get(column)
            row = {
                "task": _short_name(leaf, name),
                "doc_id": doc_id,
                "target": sample["target"],
                "prompt": document_requests[0].arguments[0],
                "score": _as_share(column, float(score)) if isinstance(score, int | float) else None,
            }
            delimiter = output["configs"][leaf]["target_delimiter"]
            rows.append({**row, **_answers(sample, document_requests, column, delimiter)})
    return rows


def documents(rows: list[Json], filter_name: str | None = None) -> dict[int, Json]:
    """Return lm-eval's samples by document; if there are several filters, those of one of them."""
    names = {row["filter"] for row in rows}
    name = filter_name if filter_name in names else next(iter(names))
    return {row["doc_id"]: row for row in rows if row["filter"] == name}


def _score(results: Json, metric: str, samples: int | None) -> Json:
    """Return a metric with its standard error; None if there is none."""
    name, _, filter_name = _key(metric).partition(",")
    stderr = results.get(f"{name}_stderr,{filter_name}")
    has_stderr = isinstance(stderr, float) and math.isfinite(stderr)
    return {
        "value": _as_share(name, results[_key(metric)]),
        "stderr": _as_share(name, stderr) if has_stderr else None,
        "samples": samples,
    }


def _as_share(metric: str, value: Any) -> Any:
    """Return a metric's value, with percentages as fractions."""
    return value / 100 if metric in PERCENT_METRICS else value


def _key(metric: str) -> str:
    return metric if "," in metric else f"{metric},none"


def _count(samples: Json, metric: str) -> int:
    """Return the number of documents with a metric: some metrics cover only some of them."""
    name = metric.partition(",")[0]
    return sum(len({row["doc_id"] for row in rows if name in row}) for rows in samples.values())


def _average(parts: list[tuple[Json, int]], metric: str) -> Json:
    """Return the mean of a metric over tasks whose group does not have it, weighted by their number of documents."""
    total = sum(count for _, count in parts)
    return {_key(metric): sum(results[_key(metric)] * count for results, count in parts) / total}


def _stderr_of_share(samples: Json, metric: str, share: float) -> float | None:
    """Return the standard error of a share of correct documents; None for any other score, and for a single document.

    lm-eval has none for a group if one of its tasks has a single document.
    """
    column, _, filter_name = metric.partition(",")
    rows = [row for leaf_rows in samples.values() for row in documents(leaf_rows, filter_name or "none").values()]
    scores = [row[column] for row in rows if column in row]
    if len(scores) < 2 or any(score not in (0, 1) for score in scores):
        return None
    if not math.isclose(sum(scores), share * len(scores), abs_tol=1e-6):
        return None
    return math.sqrt(share * (1 - share) / (len(scores) - 1))


def _short_name(task: str, name: str) -> str:
    """Return a task's name without the benchmark's."""
    return task.removeprefix(f"{name}_")


def _answers(sample: Json, requests: list[Request], metric: str, delimiter: str) -> Json:
    """Return the answers to a document; the task's delimiter is at the start of each choice."""
    import numpy as np

    responses = sample["filtered_resps"]
    if requests[0].kind != "loglikelihood":
        return {"responses": [response[0] for response in sample["resps"]], "prediction": str(responses[0])}
    scores = [response[0] for response in responses]
    contexts, choices = ([str(request.arguments[place]) for request in requests] for place in range(2))
    # As in lm-eval, lengths are in characters.
    lengths = [len(choice.removeprefix(delimiter)) if metric == "acc_norm" else 1 for choice in choices]
    return {
        # WinoGrande's choices are contexts, with the same continuation.
        "choices": choices if len(choices) == 1 or len(set(choices)) > 1 else contexts,
        "responses": scores,
        # For a single continuation, lm-eval scores whether greedy decoding gives it.
        "prediction": responses[0][1] if len(choices) == 1 else int(np.argmax(np.array(scores) / lengths)),
    }
