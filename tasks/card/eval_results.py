"""Evaluation results that the Hub shows next to a model and on leaderboards: .eval_results/*.yaml."""

from typing import Any

from quantize_gemma.tasks.models.metrics import BenchmarkInfo, BenchmarkScore, Metrics

FOLDER = ".eval_results"


def eval_results(metrics: Metrics) -> dict[str, list[dict[str, Any]]]:
    """Return {path: content} of the files: the quantized checkpoint's scores on benchmarks.

    They are limited to datasets on the Hub, which a result must name, and to scores on whole datasets, which are the
    only ones that leaderboards compare.
    """
    scores = {name: metrics.quantized.scores.get(name) for name in metrics.benchmarks}
    return {
        f"{FOLDER}/{name}.yaml": _entries(metrics, metrics.benchmarks[name], score)
        for name, score in scores.items()
        if score is not None and score.limit is None and _is_on_hub(metrics.benchmarks[name])
    }


def _is_on_hub(info: BenchmarkInfo) -> bool:
    # The name of a local directory contains no slash.
    return not info.dataset.fixture and "/" in info.dataset.name


def _entries(metrics: Metrics, info: BenchmarkInfo, score: BenchmarkScore) -> list[dict[str, Any]]:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    factor = 100 if info.higher_is_better else 1
    stderr = "" if score.stderr is None else f", standard error {factor * score.stderr:.2f}"
    shots = f"{score.num_fewshot}-shot" if score.num_fewshot else "zero-shot"
    entry = EvalResultEntry(
        dataset_id=info.dataset.name,
        task_id=score.task,
        value=round(factor * score.value, 2),
        dataset_revision=info.dataset.revision,
        notes=f"{info.metric} of {metrics.recipe}, {shots}, lm-eval {metrics.versions['lm-eval']}{stderr}",
    )
    return eval_result_entries_to_yaml([entry])
