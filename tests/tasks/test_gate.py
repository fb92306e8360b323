"""The gate applies its limits exactly, and reports the confidence of each check."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.gate.checks import (
    GateFailed,
    add_missing,
    compare_with_published,
    judge,
    require_pass,
    required_checks,
)
from quantize_gemma.tasks.gate.metrics import find_chance
from quantize_gemma.tasks.gate.program_sample import compare_answers
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.metrics import Check, Metrics, Verdict, parse_metrics, to_json
from quantize_gemma.tasks.models.tables import verdict_rows
from quantize_gemma.tasks.runtime.paired_stats import confidence, count_pairs, share_difference, share_ratio
from quantize_gemma.tasks.runtime.store import Artifact
from tests.metrics import CHARTQA_INFO, DIVERGENCE, INFO, MMLU, example_json

LIMITS: dict[str, float | None] = {
    "max_kl": 0.25,
    "min_same_top": 70.0,
    "max_mmlu_drop": 5.0,
    "max_chartqa_drop": 10.0,
    "min_recovery": 80.0,
    "max_disagreement": 2.0,
    "max_kl_ratio": 2.0,
}


def pairs(both: int, first: int, second: int, neither: int) -> dict[str, int]:
    return {"both": both, "first": first, "second": second, "neither": neither}


def metrics(mmlu: dict[str, int], kl_program: float = 0.0, differing: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a metrics.json with these counts of correct answers and of answers that the program changes."""
    measured = example_json()
    measured["pairs"]["mmlu"] = mmlu
    for column, right in (("base", "first"), ("quantized", "second")):
        measured[column]["mmlu"] = {**MMLU, "value": (mmlu["both"] + mmlu[right]) / sum(mmlu.values())}
    measured["program"]["agreement"]["kl_program"] = kl_program
    measured["program"]["mmlu"]["differing"] = differing or pairs(0, 0, 0, 100)
    return measured


def verdict_on(measured: dict[str, Any], limits: dict[str, float | None] = LIMITS) -> Verdict:
    parsed = parse_metrics(measured)
    return judge(parsed.benchmarks, parsed, parsed.pairs, limits)


def judged(measured: dict[str, Any]) -> Metrics:
    return parse_metrics({**measured, "gate": to_json(verdict_on(measured))})


def failed_checks(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if check.status == "fail"]


def check_named(verdict: Verdict, name: str) -> Check:
    return next(check for check in verdict.checks if check.name == name)


# The base model answers 1,800 of 2,000 questions correctly, 90%.
@pytest.mark.parametrize(
    ("mmlu", "kl_program", "failed"),
    [
        (pairs(1700, 100, 0, 200), 0.06, []),
        (pairs(1650, 150, 50, 150), 0.06, []),
        (pairs(1800, 0, 100, 100), 0.0, []),
        (pairs(1699, 101, 0, 200), 0.06, ["mmlu_drop"]),
        (pairs(1700, 100, 0, 200), 0.061, ["program_kl"]),
        (pairs(1000, 800, 0, 200), 2.0, ["mmlu_drop", "mmlu_recovery", "program_kl"]),
        (pairs(1700, 100, 0, 200), math.nan, ["program_kl"]),
    ],
)
def test_a_release_fails_beyond_the_largest_drop_or_kl_divergence(
    mmlu: dict[str, int], kl_program: float, failed: list[str]
) -> None:
    verdict = verdict_on(metrics(mmlu, kl_program))
    assert failed_checks(verdict) == failed
    assert verdict.passed == (not failed)


@pytest.mark.parametrize(("right", "failed"), [(240, []), (239, ["mmlu_recovery"])])
def test_a_release_fails_when_it_recovers_too_little_of_a_low_score(right: int, failed: list[str]) -> None:
    """The base model has 300 of 2,000 correct; 60 fewer are 3 points and a fifth of its score. Guesses score 0."""
    measured = metrics(pairs(right, 300 - right, 0, 1700))
    measured["benchmarks"]["mmlu"] = {**INFO, "chance": None}
    verdict = verdict_on(measured)
    assert failed_checks(verdict) == failed
    check = check_named(verdict, "mmlu_recovery")
    assert check.value == pytest.approx(100 * right / 300, abs=1e-4)
    assert check.margin == pytest.approx(check.value - 80, abs=1e-4)


def test_each_benchmark_with_a_limit_is_judged_where_it_was_measured() -> None:
    measured = metrics(pairs(90, 0, 0, 10))
    assert not any("chartqa" in check.name for check in verdict_on(measured).checks)
    measured["benchmarks"]["chartqa"] = CHARTQA_INFO
    measured["pairs"]["chartqa"] = pairs(880, 100, 0, 20)
    assert verdict_on(measured).passed
    measured["pairs"]["chartqa"] = pairs(879, 101, 0, 20)
    assert failed_checks(verdict_on(measured)) == ["chartqa_drop"]
    unlimited = {name: limit for name, limit in LIMITS.items() if name != "max_chartqa_drop"}
    assert not any("chartqa" in check.name for check in verdict_on(measured, unlimited).checks)


@pytest.mark.parametrize(("perplexity", "failed"), [(21.9, []), (22.1, ["wikitext_drop"]), (18.0, [])])
def test_a_perplexity_is_judged_by_how_much_it_rises(perplexity: float, failed: list[str]) -> None:
    measured = metrics(pairs(90, 0, 0, 10))
    measured["benchmarks"]["wikitext"] = {**find_benchmark("wikitext").card_inputs(), "dataset": INFO["dataset"]}
    for column, value in (("base", 20.0), ("quantized", perplexity)):
        measured[column]["wikitext"] = {**MMLU, "value": value, "stderr": None, "metric": "word_perplexity"}
    verdict = verdict_on(measured, {**LIMITS, "max_wikitext_drop": 10.0})
    assert failed_checks(verdict) == failed
    assert check_named(verdict, "wikitext_drop").value == pytest.approx(5 * (perplexity - 20))
    assert "wikitext_recovery" not in {check.name for check in verdict.checks}


@pytest.mark.parametrize(
    ("after", "program", "failed"),
    [
        (0.47, 0.46, []),
        (0.39, 0.39, ["truthfulqa_gen_drop", "truthfulqa_gen_recovery"]),
        # Worse than the limit, but within the standard errors of the two scores.
        (0.47, 0.40, []),
        (0.47, 0.20, ["truthfulqa_gen_program_drop"]),
    ],
)
def test_scores_between_0_and_1_are_judged_too(after: float, program: float, failed: list[str]) -> None:
    measured = metrics(pairs(90, 0, 0, 10))
    info = {**find_benchmark("gsm8k").card_inputs(), "title": "TruthfulQA", "dataset": INFO["dataset"]}
    measured["benchmarks"]["truthfulqa_gen"] = info
    score = {**MMLU, "stderr": 0.05, "metric": "bleu_acc"}
    measured["base"]["truthfulqa_gen"] = {**score, "value": 0.5}
    measured["quantized"]["truthfulqa_gen"] = {**score, "value": after}
    checkpoint = {"value": after, "stderr": 0.05, "samples": 50}
    sample = {**measured["program"]["mmlu"], "value": program, "stderr": 0.05, "checkpoint": checkpoint}
    measured["program"]["truthfulqa_gen"] = {**sample, "differing": None, "pairs": None}
    verdict = verdict_on(measured, {**LIMITS, "max_truthfulqa_gen_drop": 5.0})
    assert failed_checks(verdict) == failed
    required = required_checks(False, [replace(find_benchmark("gsm8k"), name="truthfulqa_gen")])
    names = {check.name for check in verdict.checks}
    assert {name for name in required if name.startswith("truthfulqa")} <= names


@pytest.mark.parametrize(
    ("before", "after", "stderr", "change"),
    [
        # For an error rate of 20%, 3 points are 15%.
        (0.2, 0.23, 0.001, "worsens by 15.00 ± 0.71% "),
        (0.2, 0.18, None, "improves by 10.00% "),
        (0.0, 0.1, None, "fail, not a finite number"),
    ],
)
def test_an_error_rate_of_the_program_is_judged_by_how_much_it_rises(
    before: float, after: float, stderr: float | None, change: str
) -> None:
    measured = metrics(pairs(90, 0, 0, 10))
    info = {**find_benchmark("wikitext").card_inputs(), "title": "WMT", "dataset": INFO["dataset"]}
    measured["benchmarks"]["wmt"] = info
    checkpoint = {"value": before, "stderr": stderr, "samples": 50}
    sample = {**measured["program"]["mmlu"], "value": after, "stderr": stderr, "checkpoint": checkpoint}
    measured["program"]["wmt"] = {**sample, "differing": None, "pairs": None}
    check = check_named(verdict_on(measured, {**LIMITS, "max_wmt_drop": 10.0}), "wmt_program_drop")
    assert (check.status == "pass") == ("improves" in change)
    assert change in check.message
    json.dumps(to_json(check), allow_nan=False)


# The expected standard error has half a question added to each count:
# sqrt(first + second - (first - second)^2 / total) / total.
@pytest.mark.parametrize(
    ("counts", "difference", "stderr"),
    [
        (pairs(0, 0, 0, 100), 0.0, math.sqrt(1) / 102),
        (pairs(98, 0, 0, 0), 0.0, 0.01),
        (pairs(80, 10, 5, 3), 5 / 98, math.sqrt(16 - 25 / 100) / 100),
        (pairs(0, 0, 1, 0), -1.0, math.sqrt(2 - 1 / 3) / 3),
    ],
)
def test_the_standard_error_of_a_difference_comes_from_the_questions_that_differ(
    counts: dict[str, int], difference: float, stderr: float
) -> None:
    assert share_difference(counts) == (pytest.approx(difference), pytest.approx(stderr))


def test_a_standard_error_matches_the_spread_of_many_samples() -> None:
    import random

    generator = random.Random(0)
    kinds, weights = [(True, True), (True, False), (False, True), (False, False)], (0.6, 0.1, 0.05, 0.25)
    samples = [count_pairs(generator.choices(kinds, weights, k=400)) for _ in range(2000)]
    for estimate, truth in ((share_difference, 0.1 - 0.05), (share_ratio, 0.65 / 0.7)):
        values, stderrs = zip(*map(estimate, samples), strict=True)
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        assert mean == pytest.approx(truth, abs=0.003)
        assert sum(stderrs) / len(stderrs) == pytest.approx(spread, rel=0.05)


def test_a_base_with_no_correct_answer_has_nothing_to_lose() -> None:
    ratio, stderr = share_ratio(pairs(0, 0, 3, 97))
    assert ratio == 1.0
    assert math.isfinite(stderr)


@pytest.mark.parametrize(("margin", "expected"), [(0.0, 0.5), (1.96, 0.975), (-1.645, 0.05), (10.0, 1.0)])
def test_confidence_follows_the_normal_distribution(margin: float, expected: float) -> None:
    assert confidence(margin, 1.0) == pytest.approx(expected, abs=1e-4)


def test_a_check_has_its_margin_and_its_confidence() -> None:
    """Of MMLU's 14,042 questions, 1,000 are lost and 715 gained."""
    check = check_named(verdict_on(metrics(pairs(7000, 1000, 715, 5327))), "mmlu_drop")
    assert check.value == pytest.approx(100 * 285 / 14042, abs=1e-4)
    stderr = 100 * math.sqrt(1716 - 285**2 / 14044) / 14044
    assert check.stderr == pytest.approx(stderr, abs=1e-4)
    assert check.margin == pytest.approx(5 - check.value)
    assert check.confidence > 0.999
    assert not check.low_confidence
    assert check.message == ("MMLU drops by 2.03 ± 0.29 points (limit ≤ 5): pass, margin 2.97, confidence over 99.9%")


def test_few_questions_lower_the_confidence_and_do_not_fail() -> None:
    verdict = verdict_on(metrics(pairs(18, 1, 0, 1)), {**LIMITS, "max_mmlu_drop": 5.0})
    check = check_named(verdict, "mmlu_drop")
    assert check.value == check.limit == 5.0
    assert check.status == "pass"
    assert check.confidence == 0.5
    assert check.low_confidence
    assert verdict.low_confidence
    assert not verdict_on(metrics(pairs(1800, 0, 0, 200))).low_confidence


@pytest.mark.parametrize(
    ("differing", "failed"),
    [
        # It changes as many answers as the checkpoint does, whichever they are: this is only rounding.
        (pairs(0, 12, 12, 76), []),
        (pairs(12, 0, 0, 88), []),
        # 4 points more, with a standard error of 5.
        (pairs(2, 14, 10, 74), []),
        (pairs(0, 6, 0, 94), []),
        (pairs(0, 8, 0, 92), ["mmlu_disagreement"]),
        (pairs(5, 30, 5, 60), ["mmlu_disagreement"]),
        (pairs(0, 100, 0, 0), ["mmlu_disagreement"]),
        # The more questions, the smaller the sampling error.
        (pairs(200, 1400, 1000, 7400), ["mmlu_disagreement"]),
    ],
)
def test_a_program_fails_when_its_answers_differ_beyond_sampling_error_and_activation_quantization(
    differing: dict[str, int], failed: list[str]
) -> None:
    verdict = verdict_on(metrics(pairs(90, 0, 0, 10), differing=differing))
    assert failed_checks(verdict) == failed


def test_a_disagreement_within_sampling_error_passes_with_low_confidence() -> None:
    check = check_named(verdict_on(metrics(pairs(90, 0, 0, 10), differing=pairs(2, 14, 10, 74))), "mmlu_disagreement")
    assert check.status == "pass"
    assert check.low_confidence
    assert check.value == 4.0
    assert check.margin == -2.0
    assert check.message.startswith(
        "compared with the checkpoint's 100 answers to MMLU without activation quantization, the program changes 16, "
        "and activation quantization alone changes 12: "
        "a difference of 4.00 ± 4.89 points (limit ≤ 2): pass, 2 over the limit but within sampling error, "
        "confidence 34.1%"
    )


@pytest.mark.parametrize(
    ("counts", "failed"),
    [(pairs(30, 5, 2, 13), []), (pairs(20, 20, 0, 10), ["gsm8k_program_drop"]), (pairs(0, 0, 5, 45), [])],
)
def test_texts_of_the_program_fail_when_they_are_worse_beyond_sampling_error(
    counts: dict[str, int], failed: list[str]
) -> None:
    measured = metrics(pairs(90, 0, 0, 10))
    measured["benchmarks"]["gsm8k"] = {**find_benchmark("gsm8k").card_inputs(), "dataset": INFO["dataset"]}
    measured["program"]["gsm8k"] = {**measured["program"]["mmlu"], "differing": None, "pairs": counts}
    verdict = verdict_on(measured, {**LIMITS, "max_gsm8k_drop": 2.0})
    assert failed_checks(verdict) == failed
    lost = 100 * (counts["first"] - counts["second"]) / 50
    assert check_named(verdict, "gsm8k_program_drop").value == pytest.approx(lost)


def with_accuracy(accuracy: float) -> dict[str, Any]:
    """Return the metrics.json of a release with this accuracy on MMLU."""
    measured = example_json()
    measured["quantized"]["mmlu"]["value"] = accuracy
    return measured


@pytest.mark.parametrize(("published", "failed"), [(0.9, []), (0.91, []), (0.9101, ["mmlu_regression"])])
def test_a_release_fails_when_it_is_worse_than_the_published_one(published: float, failed: list[str]) -> None:
    measured = judged(with_accuracy(0.9))
    checks = compare_with_published(measured, with_accuracy(published), 1.0)
    if not failed:
        assert require_pass(measured, ["mmlu_regression"], checks).passed
        assert checks[0].status == "pass"
        return
    with pytest.raises(GateFailed, match=r"1\.01 points below the published release \(limit ≤ 1\)") as error:
        require_pass(measured, ["mmlu_regression"], checks)
    assert failed_checks(error.value.verdict) == failed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dataset.name": "mmlu-mini"}, "the dataset differs (here: 'cais/mmlu', published: 'mmlu-mini')"),
        ({"dataset.revision": "d" * 40}, "the dataset revision differs (here: "),
        ({"dataset.fixture": True}, "the fixture dataset differs (here: False, published: True)"),
        ({"dataset.fixture": 0}, "the fixture dataset differs (here: False, published: 0)"),
        ({"fixture_model": True}, "the fixture model differs (here: "),
        ({"versions": {"lm-eval": "0.4.12"}}, "the lm-eval version differs (here: '0.4.13', published: '0.4.12')"),
        ({"versions": None}, "the lm-eval version differs (here: '0.4.13', published: missing)"),
        ({"quantized": []}, "the task differs (here: 'mmlu', published: missing)"),
        ({"limit": 20}, "the limit differs (here: null, published: 20)"),
        ({"task_version": "1"}, "the task version differs (here: '2', published: '1')"),
        ({"num_fewshot": 5}, "the number of few-shot examples differs (here: 0, published: 5)"),
        ({"samples": 1140}, "the number of samples differs (here: 14042, published: 1140)"),
        ({"samples": {}}, "the number of samples differs (here: 14042, published: not a scalar)"),
        ({"task": "x\n" * 1000}, "the task differs (here: 'mmlu', published: "),
        ({"value": "0.95"}, "the published score is '0.95'"),
        ({"value": None}, "the published score is null"),
        ({"value": True}, "the published score is True"),
        ({"value": 95.0}, "the published score is 95.0"),
        ({"value": math.nan}, "the published score is nan"),
    ],
)
def test_scores_that_were_measured_differently_are_not_compared_and_the_verdict_says_why(
    change: dict[str, Any], why: str
) -> None:
    measured = judged(with_accuracy(0.5))
    published = with_accuracy(0.95)
    for name, value in change.items():
        place = published if name in published else published["quantized"]["mmlu"]
        if name.startswith("dataset."):
            place = published["benchmarks"]["mmlu"]["dataset"]
        place[name.removeprefix("dataset.")] = value
    verdict = require_pass(measured, ["mmlu_regression"], compare_with_published(measured, published, 1.0))
    check = check_named(verdict, "mmlu_regression")
    assert check.status == "uninformative"
    assert check.message.startswith(f"MMLU is not compared with the published release: {why}")
    assert len(check.message) < 200
    assert "\n" not in check.message
    assert verdict_rows([check])[0]["result"] == "not compared"


@pytest.mark.parametrize("published", [None, {}])
def test_the_verdict_says_if_there_is_nothing_to_compare_with(published: dict[str, Any] | None) -> None:
    (check,) = compare_with_published(parse_metrics(with_accuracy(0.5)), published, 1.0)
    assert check.status == "uninformative"
    assert ("the target has no metrics.json" if published is None else "published: missing") in check.message


@pytest.mark.parametrize(
    ("multimodal", "names", "more"),
    [
        (False, ["mmlu"], {"mmlu_drop", "mmlu_recovery", "mmlu_disagreement"}),
        (True, ["mmlu"], {"mmlu_drop", "mmlu_recovery", "mmlu_disagreement", "program_kl_image", "vision_encoder"}),
        (
            True,
            ["chartqa"],
            {"chartqa_drop", "chartqa_recovery", "chartqa_program_drop", "program_kl_image", "vision_encoder"},
        ),
        (False, ["gsm8k", "wikitext"], {"gsm8k_drop", "gsm8k_recovery", "gsm8k_program_drop", "wikitext_drop"}),
    ],
)
def test_a_release_without_a_required_check_fails(multimodal: bool, names: list[str], more: set[str]) -> None:
    required = required_checks(multimodal, [find_benchmark(name) for name in names])
    kl = {"program_kl", "program_kl_prompts"}
    assert required[:2] == ["max_kl", "min_same_top"]
    runner = {f"runner_{name}" for name in ("tokenizer", "prompts", "past_window", "full_length", "stop")}
    runner |= {"runner_conversations", *(("runner_two_images", "runner_late_image") if multimodal else ())}
    assert set(required) == {*required[:2], *kl, *runner, *more}
    measured = parse_metrics(example_json())
    verdict = verdict_on(example_json())
    every = [replace(verdict.checks[0], name=name) for name in required]
    for absent in range(len(required)):
        checks = every[:absent] + every[absent + 1 :]
        incomplete = replace(measured, gate=replace(verdict, checks=checks))
        with pytest.raises(GateFailed, match=f"{required[absent].replace('_', ' ')} was not measured") as error:
            require_pass(incomplete, required)
        assert failed_checks(error.value.verdict) == [required[absent]]
        # The stage's own verdict, which is on the card, also has this check.
        assert failed_checks(add_missing(incomplete.gate, required)) == [required[absent]]
    assert require_pass(replace(measured, gate=replace(verdict, checks=every)), required).passed


@pytest.mark.parametrize(("name", "reason"), [("stop", "did not end its turn"), ("past_window", "are too short")])
def test_a_runner_check_that_was_not_tested_has_no_value(name: str, reason: str) -> None:
    measured = example_json()
    measured["program"]["runner"] = [{"name": name, "cases": 0, "failed": 0, "examples": []}]
    check = check_named(verdict_on(measured), f"runner_{name}")
    assert reason in check.message
    (row,) = verdict_rows([check])
    assert (row["value"], row["result"]) == ("—", "not measured")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["kl_program", "kl_act_quant"])
def test_a_number_that_is_not_finite_fails_and_leaves_valid_json(value: float, place: str) -> None:
    measured = metrics(pairs(90, 0, 0, 10), 0.01)
    measured["program"]["agreement"]["prompts"][place] = value
    verdict = verdict_on(measured)
    assert failed_checks(verdict) == ["program_kl_prompts"]
    json.dumps(to_json(verdict), allow_nan=False)
    assert "not a finite number" in check_named(verdict, "program_kl_prompts").message
    with pytest.raises(GateFailed, match="not a finite number"):
        require_pass(judged(measured), [])


def test_a_failure_shows_all_checks_and_the_questions_that_the_program_answers_differently() -> None:
    measured = metrics(pairs(80, 20, 0, 0), differing=pairs(0, 8, 0, 92))
    answer = {"answer": "B", "margin": 0.25}
    measured["program"]["mmlu"]["disagreements"] = [
        {
            "task": "world_religions",
            "doc_id": number,
            "prompt": f"About religions.\n\nQuestion {number}?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
            "target": "B",
            "checkpoint": answer,
            "no_act_quant": answer,
            "program": {"answer": "D", "margin": 1.5},
        }
        for number in range(8)
    ]
    with pytest.raises(GateFailed) as error:
        require_pass(judged(measured), [])
    sentence, table, questions = str(error.value).split("\n\n")
    assert sentence.startswith(
        "the release fails the gate: MMLU drops by 20.00 ± 4.05 points (limit ≤ 5): fail, margin -15"
    )
    assert [line.split("  ")[0] for line in table.splitlines()] == [
        "check",
        "max kl",
        "min same top",
        "mmlu drop",
        "mmlu recovery",
        "mmlu disagreement",
        "program kl",
        "program kl prompts",
        "runner stop",
    ]
    assert [line.rsplit("  ")[-1] for line in table.splitlines()[1:]] == [
        "pass",
        "pass",
        "fail",
        "pass (low confidence)",
        "fail",
        "pass",
        "pass",
        "pass",
    ]
    assert questions.splitlines()[0] == "Questions that the program and the checkpoint answer differently (8):"
    assert questions.splitlines()[1] == (
        "- world religions 0: About religions. Question 0? A. w B. x C. y D. z Answer: "
        "(correct B; checkpoint B by 0.25 nats, without activation quantization B by 0.25 nats, program D by 1.50 nats)"
    )
    assert len(questions.splitlines()) == 1 + 5 + 1


@pytest.mark.parametrize("part", ["prompts", "image"])
def test_a_program_that_is_far_from_the_checkpoint_anywhere_fails(part: str) -> None:
    measured = metrics(pairs(90, 0, 0, 10), 0.01)
    agreement = measured["program"]["agreement"]
    agreement["image"] = {**DIVERGENCE, "kl_causal_image": 1.0}
    for name in ("prompts", "image"):
        agreement[name]["kl_program"] = 0.0301 if name == part else 0.0299
    verdict = verdict_on(measured, {**LIMITS, "max_kl_ratio": 1.0})
    assert failed_checks(verdict) == [f"program_kl_{part}"]
    assert check_named(verdict, f"program_kl_{part}").confidence is None


@pytest.mark.parametrize(("error", "failed"), [(0.9e-5, []), (1.1e-5, ["vision_encoder"])])
def test_a_vision_encoder_that_is_far_from_the_checkpoints_fails(error: float, failed: list[str]) -> None:
    measured = metrics(pairs(90, 0, 0, 10))
    vision_encoder = {"max": 0.1, "mean": 0.001, "error": error, "error_act_quant": 1e-5}
    measured["program"]["agreement"]["vision_encoder"] = vision_encoder
    assert failed_checks(verdict_on(measured, {**LIMITS, "max_kl_ratio": 1.0})) == failed


@pytest.mark.parametrize(
    ("kl", "passed"),
    [
        # One position rounds badly, or all of them do.
        ([0.01] * 7 + [0.4], True),
        ([0.1, 0.05, 0.08, 0.07] * 2, False),
        # The answer to one prompt of five is that of another model.
        ([0.01, 0.02, 0.005, 0.015] * 8 + [3.0, 5.0, 4.0, 8.0, 2.0, 6.0, 1.0, 4.0], False),
        # A single position has a value, but no standard error.
        ([0.1], False),
        ([0.01], True),
    ],
)
def test_answers_to_long_prompts_fail_beyond_sampling_error(kl: list[float], passed: bool) -> None:
    measured = metrics(pairs(90, 0, 0, 10), 0.01)
    baseline = [0.01 + 0.001 * (number % 3) for number in range(len(kl))]
    measured["program"]["agreement"]["prompts"] |= {
        "kl_program": sum(kl) / len(kl),
        "kl_act_quant": sum(baseline) / len(baseline),
        "positions": {"kl_program": kl, "kl_act_quant": baseline},
    }
    verdict = verdict_on(measured, {**LIMITS, "max_kl_ratio": 2.0})
    assert failed_checks(verdict) == ([] if passed else ["program_kl_prompts"])


def test_agreement_counts_which_answers_differ() -> None:
    a, b = [-1.0, -2.0, -3.0, -4.0], [-2.0, -1.5, -3.0, -4.0]

    def row(doc_id: int, responses: list[float]) -> dict[str, Any]:
        prediction = responses.index(max(responses))
        shared = {"task": "s", "doc_id": doc_id, "target": "0", "prompt": f"Question {doc_id}?"}
        answers = {"choices": list("wxyz"), "responses": responses, "prediction": prediction}
        return {**shared, **answers, "score": float(prediction == 0)}

    combinations = [(a, a, a), (a, a, b), (b, a, a), (b, a, b), (b, b, b)]
    checkpoint, no_act_quant, program = (
        [row(number, one[place]) for number, one in enumerate(combinations)] for place in range(3)
    )
    # The checkpoint has answered more questions than the sample has, in a different order.
    result = compare_answers(program, [row(9, a), *checkpoint[::-1]], no_act_quant)
    assert result["checkpoint"]["value"] == 0.4
    assert result["no_act_quant"] == {"value": 0.8, "stderr": pytest.approx(0.2), "samples": 5}
    assert result["agreement"] == 0.6
    assert result["agreement_act_quant"] == 0.6
    assert result["pairs"] == pairs(1, 1, 1, 2)
    assert result["differing"] == {"both": 1, "first": 1, "second": 1, "neither": 2}
    assert [one["doc_id"] for one in result["disagreements"]] == [1, 2]
    assert result["disagreements"][0] == {
        "task": "s",
        "doc_id": 1,
        "prompt": "Question 1?",
        "target": "A",
        "checkpoint": {"answer": "A", "margin": 1.0},
        "no_act_quant": {"answer": "A", "margin": 1.0},
        "program": {"answer": "B", "margin": 0.5},
    }


def test_texts_disagree_if_only_one_of_them_is_correct() -> None:
    def rows(*answers: tuple[str, float]) -> list[dict[str, Any]]:
        return [
            {"task": "t", "doc_id": place, "target": "7", "prompt": "3 + 4?", "prediction": text, "score": score}
            for place, (text, score) in enumerate(answers)
        ]

    program = rows(("7", 1.0), ("8", 0.0), ("9", 0.0))
    result = compare_answers(program, rows(("7 ", 1.0), ("7", 1.0), ("6", 0.0)), None)
    assert result["agreement"] == pytest.approx(2 / 3)
    assert result["no_act_quant"] is result["differing"] is result["agreement_act_quant"] is None
    assert [one["program"] for one in result["disagreements"]] == [{"answer": "8", "margin": None}]


def test_a_choice_that_is_the_best_only_by_length_has_no_margin() -> None:
    def rows(prediction: int) -> list[dict[str, Any]]:
        shared = {"task": "t", "doc_id": 0, "target": "0", "prompt": "It", "score": float(prediction == 0)}
        return [{**shared, "choices": [" runs", " a"], "responses": [-4.4, -1.2], "prediction": prediction}]

    (row,) = compare_answers(rows(0), rows(1), None)["disagreements"]
    assert (row["program"], row["checkpoint"]) == ({"answer": "A", "margin": None}, {"answer": "B", "margin": 3.2})


def test_choices_agree_even_if_a_single_document_has_no_score() -> None:
    """CoLA's score is a correlation over all documents."""
    row = {"task": "t", "doc_id": 0, "target": "0", "prompt": "It", "choices": [" a", " b"], "score": None}
    rows = [{**row, "responses": [-1.0, -2.0], "prediction": 0}]
    result = compare_answers(rows, rows, rows)
    assert (result["agreement"], result["agreement_act_quant"]) == (1.0, 1.0)
    assert result["differing"] == pairs(0, 0, 0, 1)
    assert result["checkpoint"] is result["pairs"] is None


@pytest.mark.parametrize(
    ("rows", "chance"),
    [
        ([{"choices": [" a", " b"], "score": 1.0}, {"choices": [" a", " b", " c", " d"], "score": 0.0}], 0.375),
        # A correlation over all documents, a single word that must be the greedy one, and a text have no chance.
        ([{"choices": [" a", " b"], "score": None}], None),
        ([{"choices": [" word"], "score": 1.0}], None),
        ([{"score": 1.0}], None),
    ],
)
def test_chance_is_computed_from_the_number_of_choices(
    rows: list[dict[str, Any]], chance: float | None, tmp_path: Path
) -> None:
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifacts = {"evaluate_boolq_base": Artifact("evaluate", "0" * 64, tmp_path, "0" * 64, {})}
    assert find_chance(None, artifacts, "boolq") == chance
    assert find_chance(0.25, artifacts, "boolq") == 0.25
    assert find_chance(None, {}, "boolq") is None
