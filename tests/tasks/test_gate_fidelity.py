"""The gate's first checks: the distance from the base model on text."""

import math
from dataclasses import fields, replace
from typing import Any

from quantize_gemma.tasks.gate.checks import judge_fidelity
from quantize_gemma.tasks.models.text_fidelity import Distances, Histogram


def distances(**values: Any) -> Distances:
    numbers: dict[str, Any] = {field.name: 0.0 for field in fields(Distances)}
    return Distances(**{**numbers, "tokens": 5110, "kl_histogram": Histogram(edges=[], counts=[]), **values})


# gemma-3-270m, its weights Q4_K_M dequantized, with the card's recipe.
CARD = distances(kl_mean=0.464, kl_mean_stderr=0.013, same_top=0.6233, same_top_stderr=0.0101)
GOOD = distances(kl_mean=0.131, kl_mean_stderr=0.005, same_top=0.779, same_top_stderr=0.006)


def test_the_cards_recipe_is_refused_on_270m_and_a_calibrated_one_passes() -> None:
    refused, good = judge_fidelity(CARD, 0.25, 70.0), judge_fidelity(GOOD, 0.25, 70.0)
    assert [(check.name, check.status) for check in refused] == [("max_kl", "fail"), ("min_same_top", "fail")]
    assert [check.status for check in good] == ["pass", "pass"]
    assert not any(check.low_confidence for check in good)
    assert refused[0].message.startswith(
        "on 5,110 tokens of text, the KL divergence from the base model is 0.4640 nats"
    )


def test_a_pass_within_sampling_error_has_low_confidence() -> None:
    kl, top = judge_fidelity(replace(GOOD, kl_mean=0.249, same_top=0.701), 0.25, 70.0)
    assert kl.status == top.status == "pass"
    assert kl.low_confidence
    assert top.low_confidence


def test_without_a_limit_the_value_is_recorded_and_not_judged() -> None:
    kl, top = judge_fidelity(CARD, None, None)
    assert (kl.status, kl.value, kl.limit) == ("uninformative", 0.464, None)
    assert (top.status, top.value) == ("uninformative", 62.33)


def test_a_divergence_that_is_not_finite_fails_whatever_the_limit() -> None:
    for limit in (0.25, None):
        assert judge_fidelity(replace(CARD, kl_mean=math.nan), limit, limit)[0].status == "fail"


def test_a_single_window_is_judged_without_confidence() -> None:
    kl, top = judge_fidelity(replace(GOOD, kl_mean_stderr=None, same_top_stderr=None), 0.25, 70.0)
    assert (kl.status, kl.confidence) == ("pass", None)
    assert (top.status, top.confidence) == ("pass", None)
