"""Tables say what their numbers are."""

from typing import Any

import pytest

from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.metrics import parse_columns, parse_metrics
from quantize_gemma.tasks.models.tables import quality_rows
from tests.metrics import INFO, MMLU, example_json


def with_benchmark(name: str, **score: Any) -> dict[str, Any]:
    """Return a metrics.json with a second benchmark, which base model and checkpoint have answered."""
    content = example_json()
    content["benchmarks"][name] = {**find_benchmark(name).card_inputs(), "dataset": INFO["dataset"]}
    for column in ("base", "quantized"):
        content[column][name] = {**MMLU, "groups": {}, "tasks": {}, **score}
    return content


@pytest.mark.parametrize("has_benchmarks", [True, False])
@pytest.mark.parametrize("name", ["wikitext", "pile_10k"])
def test_a_perplexity_is_not_shown_in_percent(name: str, has_benchmarks: bool) -> None:
    """Also of a task without a row in the table of benchmarks, and in a run's summary, which has only the columns."""
    content = with_benchmark(name, value=20.5, stderr=None, metric="word_perplexity", samples=62)
    columns = {column: content[column] for column in ("base", "quantized", "program")}
    rows = quality_rows(parse_metrics(content) if has_benchmarks else parse_columns(columns))
    (row,) = [row for row in rows if "62 samples" in row["metric"]]
    assert row["base"] == "20.50"
