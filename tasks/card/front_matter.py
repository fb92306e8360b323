"""The card's front matter: the metadata of a model card that the Hub reads, as YAML."""

from typing import Any

import yaml

from quantize_gemma.tasks.models.license import GEMMA_TERMS, clean_license
from quantize_gemma.tasks.models.metrics import Dataset, Metrics


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what another version of YAML would read as a number (a commit such as 12e34…) or as a line break."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    quoted = value[:1] in tuple("0123456789.+-") or not value.isprintable()
    style = '"' if quoted else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def front_matter(metrics: Metrics) -> dict[str, Any]:
    """Return the card's metadata: license, base model, and the results that were measured."""
    multimodal = metrics.program.task == "multimodal-text-to-text"
    base: dict[str, str] = {}
    if not metrics.fixture_model and "/" in metrics.base_model:
        base = {"base_model": metrics.base_model, "base_model_relation": "quantized"}
    return {
        **base,
        "library_name": "transformers",
        **(clean_license(metrics.license) or GEMMA_TERMS),
        "pipeline_tag": "image-text-to-text" if multimodal else "text-generation",
        "language": ["en"],
        "tags": ["transformers", "torchao", "executorch", "gemma3"],
        "model-index": [
            {"name": f"{metrics.base_model.split('/')[-1]}-{metrics.recipe}", "results": _results(metrics)}
        ],
    }


def as_yaml(metadata: dict[str, Any]) -> str:
    """Return the metadata as the YAML between a card's two lines of dashes."""
    text: str = yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _results(metrics: Metrics) -> list[dict[str, Any]]:
    mmlu, chartqa = metrics.quantized.mmlu, metrics.quantized.chartqa
    results = []
    if mmlu is not None:
        dataset = Dataset(
            name=metrics.benchmark, revision=metrics.benchmark_revision, fixture=metrics.fixture_benchmark
        )
        task, metric = ("multiple-choice", "Multiple choice"), ("accuracy", "accuracy")
        results.append(_result(task, dataset, ("MMLU", "mmlu-mini"), metric, mmlu.accuracy))
    if chartqa is not None and metrics.chartqa is not None:
        task, metric = (
            ("visual-question-answering", "Visual question answering"),
            ("relaxed_accuracy", "relaxed accuracy"),
        )
        accuracy = chartqa.relaxed_accuracy["overall"].accuracy
        results.append(_result(task, metrics.chartqa, ("ChartQA", "chartqa-mini"), metric, accuracy))
    return results


def _result(
    task: tuple[str, str], dataset: Dataset, titles: tuple[str, str], metric: tuple[str, str], value: float
) -> dict[str, Any]:
    """Return one result of the model index; `titles` are the dataset's and its fixture's."""
    title = f"{titles[1]} (fixture)" if dataset.fixture else titles[0]
    return {
        "task": {"type": task[0], "name": task[1]},
        "dataset": {"type": dataset.name, "name": title, "revision": dataset.revision},
        "metrics": [{"type": metric[0], "name": metric[1], "value": round(100 * value, 2)}],
    }
