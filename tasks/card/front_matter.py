"""The card's front matter: the metadata of a model card that the Hub reads, as YAML."""

from collections.abc import Mapping, Sequence

import yaml

from quantize_gemma.tasks.models.license import GEMMA_TERMS, clean_license
from quantize_gemma.tasks.models.metrics import BenchmarkInfo, BenchmarkScore, Metrics


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quote text that another version of YAML would read as a number (a commit such as 12e34…) or as a line break."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    needs_quotes = value[:1] in tuple("0123456789.+-") or not value.isprintable()
    style = '"' if needs_quotes else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def front_matter(metrics: Metrics) -> dict[str, object]:
    """Return the card's metadata: license, base model, and the results that were measured."""
    base: dict[str, str] = {}
    if not metrics.fixture_model and "/" in metrics.base_model:
        base = {"base_model": metrics.base_model, "base_model_relation": "quantized"}
    return {
        **base,
        "library_name": "transformers",
        **(clean_license(metrics.license) or GEMMA_TERMS),
        "pipeline_tag": "image-text-to-text" if metrics.program.multimodal else "text-generation",
        "language": ["en"],
        "tags": ["transformers", "torchao", "executorch", "gemma3"],
        **_calibrated_on(metrics),
        "model-index": [
            {"name": f"{metrics.base_model.split('/')[-1]}-{metrics.recipe}", "results": _results(metrics)}
        ],
    }


def _calibrated_on(metrics: Metrics) -> dict[str, object]:
    """Return the calibration dataset if it is on the Hub; a text file has no page there."""
    calibration = metrics.calibration
    if calibration is None or calibration.dataset.fixture or "/" not in calibration.dataset.name:
        return {}
    return {"datasets": [calibration.dataset.name]}


def as_yaml(content: Mapping[str, object] | Sequence[Mapping[str, object]]) -> str:
    """Return a value as YAML, such as a card's front matter."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _results(metrics: Metrics) -> list[dict[str, object]]:
    """Return the results of the model index: the quantized checkpoint's headline metrics."""
    scores = {name: metrics.quantized.scores.get(name) for name in metrics.benchmarks}
    return [_result(metrics.benchmarks[name], score) for name, score in scores.items() if score is not None]


def _result(info: BenchmarkInfo, score: BenchmarkScore) -> dict[str, object]:
    title = f"{info.dataset.name} (fixture)" if info.dataset.fixture else info.title
    value = 100 * score.value if info.higher_is_better else score.value
    metric, _, filtered = info.metric.partition(",")
    name = (f"{metric} ({filtered})" if filtered else metric).replace("_", " ").replace("-", " ")
    if score.limit is not None and score.samples is not None:
        # Otherwise, it would be taken for the score on the whole dataset.
        name = f"{name}, {score.samples:,} samples"
    return {
        "task": {"type": info.task_type, "name": info.task_type.replace("-", " ").capitalize()},
        "dataset": {"type": info.dataset.name, "name": title, "revision": info.dataset.revision},
        "metrics": [{"type": metric, "name": name, "value": round(value, 2)}],
    }
