"""The gate's first checks, which compare texts with the base model, and the treatment of benchmarks at chance."""

import math
from typing import Any

import pytest

from quantize_gemma.tasks.gate.checks import GateFailed, add_missing, judge, judge_fidelity, require_pass
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.metrics import Verdict, parse_metrics, to_json
from quantize_gemma.tasks.models.tables import benchmark_rows, distance_rows, verdict_rows
from tests.metrics import INFO, MMLU, example_json

LIMITS: dict[str, float | None] = {
    "max_kl": 0.25,
    "min_same_top": 70.0,
    "max_mmlu_drop": 5.0,
    "min_recovery": 80.0,
    "max_disagreement": 2.0,
    "max_kl_ratio": 2.0,
}
# gemma-3-270m, dequantized from Q4_K_M, with the card's recipe, and with a calibrated recipe of the same size.
CARD = {"kl_mean": 0.464, "kl_mean_stderr": 0.013, "same_top": 0.6233, "same_top_stderr": 0.0101}
GOOD = {"kl_mean": 0.131, "kl_mean_stderr": 0.005, "same_top": 0.779, "same_top_stderr": 0.006}
# That model's score on 285 questions of MMLU, before and after quantization, is at chance.
BASE, RELEASE = {"value": 0.214, "stderr": 0.024, "samples": 285}, {"value": 0.270, "stderr": 0.026, "samples": 285}
PAIRS = {"both": 30, "first": 31, "second": 47, "neither": 177}


def measured(fidelity: dict[str, Any], at_chance: bool = False) -> dict[str, Any]:
    content = example_json()
    content["quantized"]["fidelity"] = {**content["quantized"]["fidelity"], **fidelity}
    if at_chance:
        content["base"]["mmlu"] = {**MMLU, **BASE}
        content["quantized"]["mmlu"] = {**MMLU, **RELEASE}
        content["pairs"]["mmlu"] = PAIRS
    return content


def verdict_on(content: dict[str, Any], **limits: float | None) -> Verdict:
    parsed = parse_metrics(content)
    return judge(parsed.benchmarks, parsed, parsed.pairs, {**LIMITS, **limits})


def statuses(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.status for check in verdict.checks}


def test_the_cards_recipe_fails_the_gate_on_270m_and_a_calibrated_one_passes() -> None:
    bad, good = verdict_on(measured(CARD)), verdict_on(measured(GOOD))
    assert list(statuses(bad).items())[:2] == [("max_kl", "fail"), ("min_same_top", "fail")]
    assert list(statuses(good).items())[:2] == [("max_kl", "pass"), ("min_same_top", "pass")]
    assert good.passed
    assert not good.low_confidence
    with pytest.raises(GateFailed) as error:
        require_pass(parse_metrics({**measured(CARD), "gate": to_json(bad)}), [])
    assert str(error.value).startswith(
        "the release fails the gate: on 5,110 tokens of text, the KL divergence from the base model is 0.4640 nats "
        "(limit ≤ 0.25): fail, margin -0.214, confidence under 0.1%"
    )
    shipped = distance_rows(parse_metrics(measured(CARD)), bad.checks)[0]
    assert shipped["KL, nats"] == "0.4640 ± 0.0130"
    assert shipped["gate"] == "KL ≤ 0.25: fail, same top ≥ 70: fail"


def test_a_pass_within_sampling_error_has_low_confidence() -> None:
    kl, top, *_ = verdict_on(measured({**GOOD, "kl_mean": 0.249, "same_top": 0.701})).checks
    assert kl.status == top.status == "pass"
    assert kl.low_confidence
    assert top.low_confidence


def test_without_a_limit_the_value_is_recorded_and_not_judged() -> None:
    verdict = verdict_on(measured(CARD), max_kl=None, min_same_top=None)
    kl, top, *_ = verdict.checks
    assert (kl.status, kl.value, kl.limit) == ("uninformative", 0.464, None)
    assert (top.status, top.value) == ("uninformative", 62.33)
    assert [row["result"] for row in verdict_rows([kl, top])] == ["recorded", "recorded"]
    assert verdict.passed
    assert parse_metrics({**measured(CARD), "gate": to_json(verdict)}).gate == verdict


@pytest.mark.parametrize("limits", [{}, {"max_kl": None, "min_same_top": None}])
def test_windows_with_equal_values_have_no_standard_error(limits: dict[str, None]) -> None:
    equal = {**GOOD, "kl_mean_stderr": 0.0, "same_top": 1.0, "same_top_stderr": 0.0}
    kl, top, *_ = verdict_on(measured(equal), **limits).checks
    assert kl.stderr is top.stderr is kl.confidence is top.confidence is None
    assert [row["value"] for row in verdict_rows([kl, top])] == ["0.131", "100"]


@pytest.mark.parametrize("limit", [0.25, None])
def test_a_divergence_that_is_not_finite_fails_whatever_the_limit(limit: float | None) -> None:
    parsed = parse_metrics(measured({**GOOD, "kl_mean": math.nan}))
    assert judge_fidelity(parsed.quantized.fidelity, limit, limit)[0].status == "fail"


def test_a_single_window_is_judged_without_confidence() -> None:
    kl, top, *_ = verdict_on(measured({**GOOD, "kl_mean_stderr": None, "same_top_stderr": None})).checks
    assert (kl.status, kl.confidence) == ("pass", None)
    assert (top.status, top.confidence) == ("pass", None)


def test_a_benchmark_at_chance_is_uninformative_and_the_gate_can_pass_on_fidelity_alone() -> None:
    content = measured(GOOD, at_chance=True)
    verdict = verdict_on(content)
    assert verdict.passed
    assert statuses(verdict) | {"mmlu_drop": "uninformative", "mmlu_recovery": "uninformative"} == statuses(verdict)
    # No required check is missing, and the program's answers are still compared with the checkpoint's.
    assert add_missing(verdict, ["max_kl", "mmlu_drop", "mmlu_recovery", "mmlu_disagreement"]) == verdict
    drop = next(check for check in verdict.checks if check.name == "mmlu_drop")
    assert (
        drop.message == "mmlu drop is uninformative: the base model's 21.4 ± 2.4% on MMLU "
        "cannot be distinguished from guessing (25%)"
    )
    assert "MMLU, 285 samples (base at chance: uninformative)" in benchmark_rows(parse_metrics(content), "mmlu")
    blind = verdict_on(content, max_kl=None, min_same_top=None)
    assert not blind.passed
    assert [check.name for check in blind.checks if check.status == "fail"] == ["informative"]
    assert not verdict_on(measured(CARD, at_chance=True)).passed


def test_a_model_that_solves_nothing_has_nothing_to_lose_on_a_benchmark_without_guesses() -> None:
    content = measured(GOOD)
    content["benchmarks"]["gsm8k"] = {**find_benchmark("gsm8k").card_inputs(), "dataset": INFO["dataset"]}
    content["base"]["gsm8k"] = {**MMLU, "value": 0.01, "stderr": 0.01, "samples": 100}
    content["quantized"]["gsm8k"] = {**MMLU, "value": 0.0, "stderr": 0.0, "samples": 100}
    content["pairs"]["gsm8k"] = {"both": 0, "first": 1, "second": 0, "neither": 99}
    assert statuses(verdict_on(content, max_gsm8k_drop=10.0))["gsm8k_recovery"] == "uninformative"
    content["base"]["gsm8k"] |= {"value": 0.1, "stderr": 0.03}
    content["pairs"]["gsm8k"] = {"both": 0, "first": 10, "second": 0, "neither": 90}
    assert statuses(verdict_on(content, max_gsm8k_drop=10.0))["gsm8k_recovery"] == "fail"
