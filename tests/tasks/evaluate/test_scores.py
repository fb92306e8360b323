"""The scores of an evaluation, and the samples with the answers behind them."""

import math
from typing import Any

import pytest

from quantize_gemma.tasks.evaluate.scores import make_samples, summarize
from quantize_gemma.tasks.models.requests import Request


@pytest.mark.parametrize(("metric", "value", "share"), [("bleu", 27.5, 0.275), ("acc", 0.275, 0.275)])
def test_a_score_is_a_share_even_if_lm_eval_gives_a_percentage(metric: str, value: float, share: float) -> None:
    output = {
        "results": {"some_task": {f"{metric},none": value, f"{metric}_stderr,none": value / 10}},
        "samples": {"some_task": [{"doc_id": 0, "filter": "none", metric: value}]},
        "versions": {"some_task": 1},
        "n-shot": {"some_task": 0},
    }
    results = summarize(output, "some_task", "some_task", metric, [])
    assert results["value"] == pytest.approx(share)
    assert results["stderr"] == pytest.approx(share / 10)


def group_output(group: dict[str, Any]) -> dict[str, Any]:
    """Return lm-eval's output for a group of two tasks, with three documents and one, and a group of only the first."""
    scores = {"some_first": [1.0, 0.0, 0.0], "some_second": [1.0]}
    return {
        "results": {
            "some": {"alias": "some", "name": "some", **group},
            "some_part": {"alias": "part", "name": "some_part", **group},
            "some_first": {"acc,none": 1 / 3, "acc_stderr,none": 1 / 3},
            "some_second": {"acc,none": 1.0, "acc_stderr,none": "N/A"},
        },
        "samples": {
            leaf: [{"doc_id": number, "filter": "none", "acc": value} for number, value in enumerate(values)]
            for leaf, values in scores.items()
        },
        "versions": {"some_first": 1, "some_second": 1},
        "n-shot": {"some_first": 0, "some_second": 0},
    }


@pytest.mark.parametrize("group", [{}, {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.1}])
def test_a_group_without_the_metric_has_the_mean_over_its_documents(group: dict[str, Any]) -> None:
    results = summarize(group_output(group), "some", "some", "acc", [])
    assert (results["value"], results["samples"]) == (0.5, 4)
    # The standard error is computed from the documents, because the second task has none.
    assert results["stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert results["groups"] == {}
    assert {name: score["value"] for name, score in results["tasks"].items()} == {"first": 1 / 3, "second": 1.0}


def test_a_group_with_the_metric_has_its_own_aggregate() -> None:
    """Here, each task has the same weight."""
    results = summarize(group_output({"acc,none": 2 / 3, "acc_stderr,none": 0.2}), "some", "some", "acc", [])
    assert (results["value"], results["stderr"]) == (2 / 3, 0.2)
    assert results["groups"] == {"part": {"value": 2 / 3, "stderr": 0.2, "samples": None}}


def test_tasks_of_one_document_each_have_a_standard_error_together() -> None:
    output = group_output({"acc,none": 0.5, "acc_stderr,none": "N/A"})
    output["results"]["some_first"] = {"acc,none": 0.0, "acc_stderr,none": "N/A"}
    output["samples"]["some_first"] = [{"doc_id": 0, "filter": "none", "acc": 0.0}]
    results = summarize(output, "some", "some", "acc", [])
    assert (results["value"], results["stderr"], results["samples"]) == (0.5, 0.5, 2)


def test_a_score_that_is_not_the_share_of_correct_documents_has_no_other_standard_error() -> None:
    output = group_output({"acc,none": 2 / 3, "acc_stderr,none": "N/A"})
    assert summarize(output, "some", "some", "acc", [])["stderr"] is None


def answer_to(arguments: list[tuple[str, str]], responses: list[tuple[float, bool]], metric: str) -> dict[str, Any]:
    """Return the row of samples.jsonl for one document, from its requests and their (log-likelihood, is greedy)."""
    sample = {"doc_id": 0, "filter": "none", "target": "0", "filtered_resps": responses, metric: 1.0}
    output = {"samples": {"some": [sample]}, "configs": {"some": {"target_delimiter": " "}}}
    requests = [Request("some", 0, index, "loglikelihood", list(pair)) for index, pair in enumerate(arguments)]
    (row,) = make_samples(output, "some", metric, {("some", 0): requests})
    return row


@pytest.mark.parametrize("is_greedy", [True, False])
def test_the_prediction_of_a_single_continuation_is_whether_it_is_greedy(is_greedy: bool) -> None:
    row = answer_to([("The word", " is")], [(-1.5, is_greedy)], "acc")
    assert row["prediction"] is is_greedy
    assert row["choices"] == [" is"]


@pytest.mark.parametrize(("metric", "prediction"), [("acc", 1), ("acc_norm", 0)])
def test_the_prediction_is_the_choice_that_the_metric_scores(metric: str, prediction: int) -> None:
    """Per character, the longer choice is more likely, as long as the space before it does not count."""
    row = answer_to([("It", " runs"), ("It", " a")], [(-4.4, False), (-1.2, True)], metric)
    assert row["prediction"] == prediction
    assert row["responses"] == [-4.4, -1.2]


def test_choices_are_the_contexts_if_they_have_the_same_continuation() -> None:
    row = answer_to([("The cat", " sleeps"), ("The dog", " sleeps")], [(-2.0, False), (-1.0, True)], "acc")
    assert row["choices"] == ["The cat", "The dog"]
    assert row["prediction"] == 1
