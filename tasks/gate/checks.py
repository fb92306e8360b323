"""The gate's checks: how much accuracy a release may lose, and how far its program may be from its checkpoint."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from quantize_gemma.tasks.models.metrics import (
    Agreement,
    Answer,
    Check,
    Disagreement,
    Divergence,
    Metrics,
    Positions,
    PromptDivergence,
    Verdict,
    to_json,
)
from quantize_gemma.tasks.models.tables import format_percent, verdict_text
from quantize_gemma.tasks.models.text_fidelity import Distances
from quantize_gemma.tasks.runtime.errors import RunError
from quantize_gemma.tasks.runtime.paired_stats import Pairs, confidence, share_difference, share_ratio

# Smaller values, in nats per token or as a relative squared error, come from float32 arithmetic alone.
FLOOR = 1e-6
# A check that passes with less has low confidence; a disagreement fails if it is too large with this confidence.
CONFIDENT = 0.95
LIMITS = ("max_mmlu_drop", "max_chartqa_drop", "min_recovery", "max_disagreement", "max_kl_ratio")
BENCHMARKS = {"mmlu": "MMLU", "chartqa": "ChartQA"}
# The number of disagreements that the message of a failure lists.
MAX_SHOWN = 5
# What two MMLU scores must have in common to be comparable, and its path in metrics.json.
COMPARABLE = {
    "benchmark": ("benchmark",),
    "benchmark revision": ("benchmark_revision",),
    "fixture benchmark": ("fixture_benchmark",),
    "fixture model": ("fixture_model",),
    "task": ("quantized", "mmlu", "task"),
    "task version": ("quantized", "mmlu", "task_version"),
    "number of few-shot examples": ("quantized", "mmlu", "num_fewshot"),
    "limit": ("quantized", "mmlu", "limit"),
    "number of questions": ("quantized", "mmlu", "questions"),
    "lm-eval version": ("versions", "lm-eval"),
}
ACCURACY = ("quantized", "mmlu", "accuracy")
MISSING = object()


class GateRefused(RunError):
    """The release fails the gate. `verdict` has all checks; the message explains the failed ones and lists all."""

    def __init__(self, verdict: Verdict, disagreements: Sequence[Disagreement]) -> None:
        failed = [check for check in verdict.checks if check.status == "fail"]
        parts = [f"the release fails the gate: {'; '.join(check.message for check in failed)}"]
        parts.append(verdict_text(verdict.checks))
        if any(check.name == "program_disagreement" for check in failed):
            parts.append(_list_disagreements(disagreements))
        super().__init__("\n\n".join(parts))
        self.verdict = verdict


def required_checks(multimodal: bool, chartqa: bool, published: bool) -> list[str]:
    """Return the names of the checks that every release must have.

    Args:
        multimodal: Whether the model has a vision tower.
        chartqa: Whether ChartQA is measured.
        published: Whether the release is published, and is compared with the one before.
    """
    parts = ["", "_last", "_step_by_step", "_prompts", *["_image"] * multimodal]
    return [
        *(f"{name}_{kind}" for name in ("mmlu", *["chartqa"] * chartqa) for kind in ("drop", "recovery")),
        "program_disagreement",
        *(f"program_kl{part}" for part in parts),
        *["vision_encoder"] * multimodal,
        *["regression"] * published,
    ]


def require_pass(metrics: Metrics, required: Sequence[str], regression: Check | None = None) -> Verdict:
    """Return the verdict on a release, including the comparison with the published one.

    Args:
        metrics: The metrics of the release.
        required: The names of the required checks.
        regression: The result of `compare_with_published`, if the release is to be published.

    Raises:
        GateRefused: A check fails or is missing.
    """
    checks = [*metrics.gate.checks, *([regression] if regression else [])]
    verdict = add_missing(_verdict(checks, metrics.gate.limits), required)
    if not verdict.passed:
        sample = metrics.program.mmlu
        raise GateRefused(verdict, sample.disagreements if sample else [])
    return verdict


def add_missing(verdict: Verdict, required: Sequence[str]) -> Verdict:
    """Return the verdict with a failed check for each required one that was not measured."""
    names = {check.name for check in verdict.checks}
    missing = [
        replace(
            _check(name, "", math.nan, math.nan, False, math.nan, None),
            message=f"{name.replace('_', ' ')} was not measured",
        )
        for name in required
        if name not in names
    ]
    return _verdict([*verdict.checks, *missing], verdict.limits)


def compare_with_published(metrics: Metrics, published: Mapping[str, object] | None, max_regression: float) -> Check:
    """Return the check that MMLU is at most `max_regression` points below the published release's score.

    Scores that were measured differently are not compared: the check is then uninformative, and its message says why.

    Args:
        metrics: The metrics of the release.
        published: The metrics.json at the target's head, from an untrusted author; None if there is none.
        max_regression: The limit, in points of accuracy.
    """
    score = metrics.quantized.mmlu
    reason = "MMLU was not measured" if score is None else _incomparable(to_json(metrics), published)
    accuracy = _look_up(published, ACCURACY)
    if reason is not None or score is None or not isinstance(accuracy, (int, float)):
        return Check(
            name="regression",
            status="uninformative",
            low_confidence=False,
            value=None,
            limit=max_regression,
            margin=None,
            stderr=None,
            confidence=None,
            message=f"MMLU is not compared with the published release: {reason}",
        )
    loss = round(100 * (accuracy - score.accuracy), 4)
    what = f"MMLU is {abs(loss):.2f} points {'below' if loss >= 0 else 'above'} the published release"
    # The standard error of the published score is not known.
    return _at_most("regression", what, loss, max_regression)


def _incomparable(metrics: Mapping[str, object], published: Mapping[str, object] | None) -> str | None:
    """Return why the two cannot be compared, None if they can."""
    if published is None:
        return "the target has no metrics.json"
    for what, path in COMPARABLE.items():
        ours, theirs = _look_up(metrics, path), _look_up(published, path)
        if ours is MISSING or type(ours) is not type(theirs) or ours != theirs:
            return f"the {what} differs (here: {_shorten(ours)}, published: {_shorten(theirs)})"
    accuracy = _look_up(published, ACCURACY)
    if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
        return f"the published accuracy is {_shorten(accuracy)}"
    return None


def _look_up(value: object, path: tuple[str, ...]) -> object:
    """Return the value at a path of keys, or MISSING."""
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def _shorten(value: object) -> str:
    """Return an untrusted value as a short text."""
    if value is MISSING or value is None:
        return "missing" if value is MISSING else "null"
    if not isinstance(value, (str, int, float)):
        return "not a scalar"
    return textwrap.shorten(repr(value), 60, placeholder="…")


def judge(
    pairs: Mapping[str, Pairs], differing: Pairs | None, agreement: Agreement, limits: dict[str, float]
) -> Verdict:
    """Return the verdict on what was measured.

    The value decides, whatever its confidence: a run on few questions passes if its value is within the limit, and
    `low_confidence` marks it. The exceptions are the disagreement and the answers to long prompts. Their samples are
    small, and activations quantize differently even in a correct program, so they fail only beyond sampling error, when
    the confidence is below 5%.

    Args:
        pairs: By benchmark, the questions that base (first) and checkpoint (second) answer correctly.
        differing: The questions that program (first) and checkpoint (second) answer differently from the checkpoint
            in float32 without activation quantization; None if they were not measured.
        agreement: The program's distances from the checkpoint.
        limits: Values by the names in LIMITS: the drops in points of accuracy; `min_recovery` in percent of the base
            model's score; `max_disagreement` in points, the share of answers that the program changes more than the
            checkpoint; `max_kl_ratio` bounds the KL divergence between checkpoint and program, and the vision
            encoder's squared error, as a multiple of what activation quantization alone causes.
    """
    checks = []
    for name, title in BENCHMARKS.items():
        if name in pairs:
            checks += [_drop(name, title, pairs[name], limits[f"max_{name}_drop"])]
            checks += [_recovery(name, title, pairs[name], limits["min_recovery"])]
    if differing is not None:
        checks += [_disagreement(differing, limits["max_disagreement"])]
    checks += _distances(agreement, limits["max_kl_ratio"])
    return _verdict(checks, limits)


def _drop(name: str, title: str, pairs: Pairs, limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_difference(pairs))
    what = f"{title} {'drops' if value >= 0 else 'rises'} by {abs(value):.2f} ± {stderr:.2f} points"
    return _at_most(f"{name}_drop", what, value, limit, stderr)


def _recovery(name: str, title: str, pairs: Pairs, limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_ratio(pairs))
    what = f"{title} recovers {value:.2f} ± {stderr:.2f}% of the base model's score (limit ≥ {limit:.4g})"
    return _check(f"{name}_recovery", what, value, limit, value >= limit, round(value - limit, 4), stderr)


def _disagreement(differing: Pairs, limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_difference(differing))
    both = differing["both"]
    what = (
        f"of {sum(differing.values())} answers without activation quantization, the program changes "
        f"{both + differing['first']} and activation quantization alone {both + differing['second']}: "
        f"{value:.2f} ± {stderr:.2f} points more (limit ≤ {limit:.4g})"
    )
    margin = round(limit - value, 4)
    passed = confidence(margin, stderr) >= 1 - CONFIDENT
    return _check("program_disagreement", what, value, limit, passed, margin, stderr)


def _distances(agreement: Agreement, max_ratio: float) -> list[Check]:
    parts: dict[str, tuple[str, Divergence | None]] = {
        "program_kl": ("", agreement),
        "program_kl_last": (" at the end of the longest sequence", agreement.last),
        "program_kl_step_by_step": (" when decoding one token at a time", agreement.step_by_step),
        "program_kl_prompts": (" in the answers to long prompts", agreement.prompts),
        "program_kl_image": (" after an image", agreement.image),
    }
    checks = []
    for name, (where, part) in parts.items():
        if part is None:
            continue
        value = _or_nan(part.kl_program)
        limit = max(max_ratio * _or_nan(part.kl_act_quant), FLOOR)
        positions = part.positions if isinstance(part, PromptDivergence) else None
        stderr = None if positions is None else _stderr_of_excess(positions, max_ratio)
        what = f"the program's KL divergence from the checkpoint{where} is {value:.6f} nats"
        checks.append(_unless_chance(name, what, value, limit, stderr))
    if agreement.vision_encoder is not None:
        error, baseline = _or_nan(agreement.vision_encoder.error), _or_nan(agreement.vision_encoder.error_act_quant)
        what = f"the vision encoder's relative squared error is {error:.2g}"
        checks.append(_at_most("vision_encoder", what, error, max(max_ratio * baseline, FLOOR)))
    return checks


def _stderr_of_excess(positions: Positions, max_ratio: float) -> float | None:
    """Return the standard error of the program's KL divergence beyond the activation-quantization baseline."""
    excess = [
        kl - max_ratio * baseline for kl, baseline in zip(positions.kl_program, positions.kl_act_quant, strict=True)
    ]
    stderr = statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return stderr or None


def _unless_chance(name: str, what: str, value: float, limit: float, stderr: float | None) -> Check:
    """Return a check that, if its value was measured on few positions, fails only beyond sampling error."""
    margin = round(limit - value, 12)
    passed = value <= limit if stderr is None else confidence(margin, stderr) >= 1 - CONFIDENT
    return _check(name, f"{what} (limit ≤ {limit:.4g})", value, limit, passed, margin, stderr)


def _at_most(name: str, what: str, value: float, limit: float, stderr: float | None = None) -> Check:
    margin = round(limit - value, 12)
    return _check(name, f"{what} (limit ≤ {limit:.4g})", value, limit, value <= limit, margin, stderr)


def judge_fidelity(fidelity: Distances, max_kl: float | None, min_same_top: float | None) -> list[Check]:
    """Return the checks of the distance from the base model on text, the first of a gate.

    Args:
        fidelity: The quantized checkpoint's, as shipped.
        max_kl: The largest mean KL divergence in nats; None records it without judging.
        min_same_top: The smallest share of tokens with the same most likely token, in percent; None likewise.
    """
    kl, kl_stderr = _or_nan(fidelity.kl_mean), fidelity.kl_mean_stderr
    top, top_stderr = 100 * _or_nan(fidelity.same_top), fidelity.same_top_stderr
    top_stderr = None if top_stderr is None else 100 * top_stderr
    text = f"on {fidelity.tokens:,} tokens of text, the KL divergence from the base model is {kl:.4f}"
    tops = f"{top:.1f}% of its most likely tokens are those of the base model"
    return [
        _recorded("max_kl", f"{text} nats", kl, kl_stderr)
        if max_kl is None
        else _at_most("max_kl", f"{text} nats", kl, max_kl, kl_stderr or None),
        _recorded("min_same_top", tops, top, top_stderr)
        if min_same_top is None
        else _check(
            "min_same_top",
            f"{tops} (limit ≥ {min_same_top:.4g})",
            top,
            min_same_top,
            top >= min_same_top,
            round(top - min_same_top, 12),
            top_stderr or None,
        ),
    ]


def _recorded(name: str, what: str, value: float, stderr: float | None) -> Check:
    """Return a check that records a value without judging it; one that is not a finite number fails all the same."""
    if not math.isfinite(value):
        return _check(name, what, value, math.nan, False, math.nan, None)
    return Check(
        name=name,
        status="uninformative",
        low_confidence=False,
        value=value,
        limit=None,
        margin=None,
        stderr=stderr,
        confidence=None,
        message=f"{what}: recorded, no limit was set",
    )


def _check(
    name: str, what: str, value: float, limit: float, passed: bool, margin: float, stderr: float | None
) -> Check:
    """Return a check; numbers that are not finite make it fail, and become None."""
    finite = all(math.isfinite(number) for number in (value, limit, margin))
    status: Literal["pass", "fail"] = "pass" if passed and finite else "fail"
    certainty = None if stderr is None or not finite else confidence(margin, stderr)
    outcome = f"{status}, margin {margin:.3g}"
    if status == "pass" and margin < 0:
        outcome = f"pass, {-margin:.3g} over the limit but within sampling error"
    if not finite:
        outcome = "fail, not a finite number"
    return Check(
        name=name,
        status=status,
        low_confidence=status == "pass" and certainty is not None and certainty < CONFIDENT,
        value=_finite(value),
        limit=_finite(limit),
        margin=_finite(margin),
        stderr=stderr,
        confidence=None if certainty is None else round(certainty, 6),
        message=f"{what}: {outcome}" + ("" if certainty is None else f", confidence {format_percent(certainty)}"),
    )


def _verdict(checks: list[Check], limits: dict[str, float]) -> Verdict:
    return Verdict(
        passed=all(check.status != "fail" for check in checks),
        low_confidence=any(check.low_confidence for check in checks),
        limits=limits,
        checks=checks,
    )


def _list_disagreements(disagreements: Sequence[Disagreement]) -> str:
    lines = [f"{len(disagreements)} questions that the program and the checkpoint answer differently:"]
    for one in disagreements[:MAX_SHOWN]:
        choices = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", one.choices, strict=True))
        answers: dict[str, Answer] = {
            "checkpoint": one.checkpoint,
            "without activation quantization": one.no_act_quant,
            "program": one.program,
        }
        shown = ", ".join(f"{name} {answer.answer} by {answer.margin:.2f} nats" for name, answer in answers.items())
        question = textwrap.shorten(f"{one.question} {choices}", 300, placeholder=" …")
        lines.append(f"- {one.subject.replace('_', ' ')} {one.doc_id}: {question} (correct {one.target}; {shown})")
    return "\n".join(lines + ["…"] * (len(disagreements) > MAX_SHOWN))


def _or_nan(value: float | None) -> float:
    """Return a measured value, or NaN if it is missing or infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
