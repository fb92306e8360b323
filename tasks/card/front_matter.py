"""The card's front matter: what the Hub reads of a card, as YAML."""

from typing import Any

import yaml

from quantize_gemma.tasks.card.metrics import GEMMA_TERMS
from quantize_gemma.tasks.models.license import clean_license


class _Dumper(yaml.SafeDumper):
    """Quotes what another version of YAML would take for a number (a commit such as 12e34…) or for a line break."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    quoted = value[:1] in tuple("0123456789.+-") or not value.isprintable()
    style = '"' if quoted else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def front_matter(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's metadata, of metrics.json."""
    multimodal = metrics["program"]["task"] == "multimodal-text-to-text"
    base: dict[str, Any] = {}
    if not metrics["fixture_model"] and "/" in metrics["base_model"]:
        base = {"base_model": metrics["base_model"], "base_model_relation": "quantized"}
    results = [
        _result(
            ("multiple-choice", "Multiple choice"),
            (metrics["benchmark"], "mmlu-mini (fixture)" if metrics["fixture_benchmark"] else "MMLU"),
            metrics["benchmark_revision"],
            ("accuracy", "accuracy", metrics["quantized"]["mmlu"]["accuracy"]),
        )
    ]
    charts = metrics["charts"]
    if charts:
        score = metrics["quantized"]["chartqa"]["relaxed_accuracy"]["overall"]["accuracy"]
        results.append(
            _result(
                ("visual-question-answering", "Visual question answering"),
                (charts["name"], "chartqa-mini (fixture)" if charts["fixture"] else "ChartQA"),
                charts["revision"],
                ("relaxed_accuracy", "relaxed accuracy", score),
            )
        )
    return {
        **base,
        "library_name": "transformers",
        **(clean_license(metrics["license"]) or GEMMA_TERMS),
        "pipeline_tag": "image-text-to-text" if multimodal else "text-generation",
        "language": ["en"],
        "tags": ["transformers", "torchao", "executorch", "gemma3"],
        "model-index": [{"name": f"{metrics['base_model'].split('/')[-1]}-{metrics['recipe']}", "results": results}],
    }


def as_yaml(metadata: dict[str, Any]) -> str:
    """Returns the metadata as the lines of YAML between a card's two lines of dashes."""
    text: str = yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _result(
    task: tuple[str, str], dataset: tuple[str, str], revision: str, metric: tuple[str, str, float]
) -> dict[str, Any]:
    kind, name, value = metric
    return {
        "task": {"type": task[0], "name": task[1]},
        "dataset": {"type": dataset[0], "name": dataset[1], "revision": revision},
        "metrics": [{"type": kind, "name": name, "value": round(100 * value, 2)}],
    }
