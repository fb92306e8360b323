"""Tables show numbers with the right unit and precision, and name what they measure."""

from typing import Any

import pytest

from quantize_gemma.tasks.card import render
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.metrics import Check, parse_columns, parse_metrics
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.models.tables import quality_rows, verdict_rows
from tests.metrics import INFO, MMLU, example_json


def with_benchmark(name: str, **score: Any) -> dict[str, Any]:
    """Return a metrics.json with a second benchmark, on which the base model and the checkpoint have scores."""
    content = example_json()
    content["benchmarks"][name] = {**find_benchmark(name).card_inputs(), "dataset": INFO["dataset"]}
    for column in ("base", "quantized"):
        content[column][name] = {**MMLU, "groups": {}, "tasks": {}, **score}
    return content


@pytest.mark.parametrize("has_benchmarks", [True, False])
@pytest.mark.parametrize("name", ["wikitext", "pile_10k"])
def test_a_perplexity_is_not_shown_in_percent(name: str, has_benchmarks: bool) -> None:
    """Not even for a task without a row in the table of benchmarks, or in a run's summary, which has only columns."""
    content = with_benchmark(name, value=20.5, stderr=None, metric="word_perplexity", samples=62)
    columns = {column: content[column] for column in ("base", "quantized", "program")}
    rows = quality_rows(parse_metrics(content) if has_benchmarks else parse_columns(columns))
    (row,) = [row for row in rows if "62 samples" in row["metric"]]
    assert row["base"] == "20.50"


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.2549, 0.004, "0.2549 ± 0.0040"),
        (0.063, 0.0034, "0.0630 ± 0.0034"),
        (2.03, 0.29, "2.03 ± 0.29"),
        (0.2504, None, "0.2504"),
        (100.0, 0.0, "100"),
        (3, None, "3"),
    ],
)
def test_a_value_just_over_its_limit_does_not_look_equal_to_it(value: float, stderr: float | None, text: str) -> None:
    numbers = {"value": value, "limit": 0.25, "margin": 0.25 - value, "stderr": stderr, "confidence": None}
    check = Check(name="max_kl", status="fail", low_confidence=False, message="", **numbers)
    assert verdict_rows([check])[0]["value"] == text


def test_texts_are_compared_by_score_and_choices_by_answer() -> None:
    content = with_benchmark("gsm8k", value=0.5)
    texts = {**content["program"]["mmlu"], "agreement_act_quant": None, "differing": None, "agreement": 0.9}
    answer = {"answer": "4", "margin": None}
    answers = {"checkpoint": answer, "no_act_quant": None, "program": answer}
    disagreement = {"task": "gsm8k", "doc_id": 0, "prompt": "2 + 2?", "target": "4", **answers}
    content["program"]["gsm8k"] = {**texts, "disagreements": [disagreement]}
    metrics = parse_metrics(content)
    cells = {row["metric"]: row["program"] for row in quality_rows(metrics)}
    assert cells["GSM8K, same score as the checkpoint, % of questions"] == "90.0"
    assert cells["MMLU, same answers as the checkpoint, %"] == "100.0"
    assert "GSM8K, same answers as the checkpoint, %" not in cells
    card = render(metrics, load_recipe("HQQ-INT8-INT4"), {})
    assert "questions on which the program and the checkpoint have different scores are in `metrics.json`" in card
