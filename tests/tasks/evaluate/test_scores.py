"""What the scores of an evaluation are."""

import pytest

from quantize_gemma.tasks.evaluate.scores import summarize


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
