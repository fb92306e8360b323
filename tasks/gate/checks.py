"""The gate's checks: how much accuracy a release may lose, and how far its program may be from its checkpoint."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from quantize_gemma.tasks.models.benchmarks import Benchmark
from quantize_gemma.tasks.models.metrics import (
    ABOVE_CHANCE,
    Agreement,
    Answer,
    BenchmarkInfo,
    Check,
    Columns,
    Disagreement,
    Divergence,
    Metrics,
    Positions,
    PromptDivergence,
    RunnerCheck,
    SampleScore,
    Score,
    Verdict,
    to_json,
)
from quantize_gemma.tasks.models.runner_checks import RUNNER_CHECKS, runner_checks
from quantize_gemma.tasks.models.tables import format_percent, verdict_text
from quantize_gemma.tasks.models.text_fidelity import Distances
from quantize_gemma.tasks.runtime.errors import RunError
from quantize_gemma.tasks.runtime.paired_stats import Pairs, confidence, share_difference, share_ratio

# Smaller values, in nats per token or as a relative squared error, can come from float32 arithmetic alone.
FLOOR = 1e-6
# A check that passes with less confidence than this is marked `low_confidence`; a disagreement fails only if it exceeds
# the limit with at least this confidence.
CONFIDENT = 0.95
LIMITS = ("max_kl", "min_same_top", "min_recovery", "max_disagreement", "max_kl_ratio")
Limits = dict[str, float | None]
# The checks of the distance from the base model on text.
FIDELITY = ("max_kl", "min_same_top")
# The number of disagreements that the message of a failure lists.
MAX_SHOWN = 5
# The maximum number of characters of a prompt in that message.
MAX_PROMPT = 300
MISSING = object()


class GateFailed(RunError):
    """The release fails the gate. `verdict` has all checks; the message explains the failed ones, and lists all."""

    def __init__(self, verdict: Verdict, disagreements: Sequence[Disagreement]) -> None:
        failed = [check for check in verdict.checks if check.status == "fail"]
        parts = [f"the release fails the gate: {'; '.join(check.message for check in failed)}"]
        parts.append(verdict_text(verdict.checks))
        if any(check.name.endswith("_disagreement") for check in failed):
            parts.append(_list_disagreements(disagreements))
        super().__init__("\n\n".join(parts))
        self.verdict = verdict


def required_checks(multimodal: bool, benchmarks: Sequence[Benchmark]) -> list[str]:
    """Return the names of the checks that every release must have.

    Args:
        multimodal: Whether the model has a vision tower.
        benchmarks: The benchmarks with a limit on their drop.
    """
    parts = ["", "_prompts", *["_image"] * multimodal]
    return [
        *FIDELITY,
        *(f"{row.name}_drop" for row in benchmarks),
        *(f"{row.name}_recovery" for row in benchmarks if row.higher_is_better),
        *(f"{row.name}_disagreement" for row in benchmarks if "no_act_quant" in row.columns()),
        *(f"{row.name}_program_drop" for row in benchmarks if row.columns()[-1] == "program"),
        *(f"program_kl{part}" for part in parts),
        *["vision_encoder"] * multimodal,
        *(f"runner_{name}" for name in runner_checks(multimodal)),
    ]


def require_pass(metrics: Metrics, required: Sequence[str], regressions: Sequence[Check] = ()) -> Verdict:
    """Return the verdict on a release, including the comparison with the published one.

    Args:
        metrics: The metrics of the release.
        required: The names of the required checks.
        regressions: The results of `compare_with_published`, if the release is to be published.

    Raises:
        GateFailed: A check fails or is missing.
    """
    checks = [*metrics.gate.checks, *regressions]
    verdict = add_missing(_make_verdict(checks, metrics.gate.limits), required)
    if not verdict.passed:
        samples = [score for score in metrics.program.scores.values() if score is not None]
        raise GateFailed(verdict, [disagreement for score in samples for disagreement in score.disagreements])
    return verdict


def add_missing(verdict: Verdict, required: Sequence[str]) -> Verdict:
    """Return the verdict with a failed check for each required one that was not measured."""
    names = {check.name for check in verdict.checks}
    missing = [
        replace(
            _make_check(name, "", math.nan, math.nan, False, math.nan, None),
            message=f"{name.replace('_', ' ')} was not measured",
        )
        for name in required
        if name not in names
    ]
    return _make_verdict([*verdict.checks, *missing], verdict.limits)


def compare_with_published(
    metrics: Metrics, published: Mapping[str, object] | None, max_regression: float
) -> list[Check]:
    """Return a check for each benchmark: its score is at most `max_regression` points below the published release's.

    Scores that were measured differently are not compared: the check is then uninformative, and its message says why.

    Args:
        metrics: The metrics of the release.
        published: The metrics.json at the target's head, from an untrusted author; None if there is none.
        max_regression: The limit, in points; for a metric whose smaller values are better, in percent.
    """
    own_metrics = to_json(metrics)
    return [
        _check_regression(name, info, metrics.quantized.scores.get(name), own_metrics, published, max_regression)
        for name, info in metrics.benchmarks.items()
    ]


def _check_regression(
    name: str,
    info: BenchmarkInfo,
    score: Score | None,
    metrics: Mapping[str, object],
    published: Mapping[str, object] | None,
    max_regression: float,
) -> Check:
    reason = f"{info.title} was not measured" if score is None else _incomparable(name, info, metrics, published)
    value = _look_up(published, ("quantized", name, "value"))
    if reason is not None or score is None or not isinstance(value, (int, float)):
        return Check(
            name=f"{name}_regression",
            status="uninformative",
            low_confidence=False,
            value=None,
            limit=max_regression,
            margin=None,
            stderr=None,
            confidence=None,
            message=f"{info.title} is not compared with the published release: {reason}",
        )
    loss = round(100 * (value - score.value if info.higher_is_better else score.value / max(value, 1e-9) - 1), 4)
    unit, worse, better = (" points", "below", "above") if info.higher_is_better else ("%", "above", "below")
    text = f"{info.title} is {abs(loss):.2f}{unit} {worse if loss >= 0 else better} the published release"
    # The standard error of the published score is not known.
    return _check_at_most(f"{name}_regression", text, loss, max_regression)


def _incomparable(
    name: str, info: BenchmarkInfo, metrics: Mapping[str, object], published: Mapping[str, object] | None
) -> str | None:
    """Return why the two scores of a benchmark cannot be compared; None if they can."""
    if published is None:
        return "the target has no metrics.json"
    dataset, score = ("benchmarks", name, "dataset"), ("quantized", name)
    # What two scores must have in common to be comparable, and its path in metrics.json.
    comparable = {
        "dataset": (*dataset, "name"),
        "dataset revision": (*dataset, "revision"),
        "fixture dataset": (*dataset, "fixture"),
        "fixture model": ("fixture_model",),
        "task": (*score, "task"),
        "task version": (*score, "task_version"),
        "metric": (*score, "metric"),
        "number of few-shot examples": (*score, "num_fewshot"),
        "limit": (*score, "limit"),
        "number of samples": (*score, "samples"),
        "lm-eval version": ("versions", "lm-eval"),
    }
    for title, path in comparable.items():
        own_value, published_value = _look_up(metrics, path), _look_up(published, path)
        if own_value is MISSING or type(own_value) is not type(published_value) or own_value != published_value:
            return f"the {title} differs (here: {_shorten(own_value)}, published: {_shorten(published_value)})"
    value = _look_up(published, (*score, "value"))
    largest = 1.0 if info.higher_is_better else 1e30
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest:
        return f"the published score is {_shorten(value)}"
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
    benchmarks: Mapping[str, BenchmarkInfo], columns: Columns, pairs: Mapping[str, Pairs], limits: Limits
) -> Verdict:
    """Return the verdict on the measurements.

    The value decides, whatever its confidence: a check on few questions passes if its value is within the limit, and
    `low_confidence` marks it. The exceptions are measurements on the program's sample, and the answers to long prompts.
    Their samples are small, and activations round differently even in a correct program, so they fail only beyond
    sampling error, when the confidence is below 5%.

    The distance from the base model comes first. A benchmark on which the base model scores at chance level cannot show
    a loss: its drop and its recovery are uninformative. If no check measures the loss, the release fails.

    Args:
        benchmarks: The benchmarks that were measured.
        columns: The scores, and the program's distances from the checkpoint.
        pairs: By benchmark, the documents that base (first) and checkpoint (second) answer correctly.
        limits: Values by the names in LIMITS, and `max_<benchmark>_drop`, in points, for each benchmark that has a
            limit. `max_kl`, in nats, and `min_same_top`, in percent, may be None: then the values are only recorded.
            `min_recovery` is in percent of the base model's score; `max_disagreement`, in points, is the share of
            answers that the program changes minus the share that activation quantization alone changes;
            `max_kl_ratio` limits the program's KL divergence from the checkpoint, and the vision encoder's squared
            error, as a multiple of the value that activation quantization alone causes.
    """
    checks = judge_fidelity(columns.quantized.fidelity, limits["max_kl"], limits["min_same_top"])
    for name, info in benchmarks.items():
        limit = limits.get(f"max_{name}_drop")
        if limit is not None:
            checks += _check_losses(name, info, columns, pairs.get(name), limit, _require_limit(limits, "min_recovery"))
    if all(check.status == "uninformative" for check in checks):
        checks.append(_fail_unmeasured_loss())
    for name, info in benchmarks.items():
        sample = columns.program.scores.get(name)
        limit = limits.get(f"max_{name}_drop")
        if sample is not None and sample.differing is not None:
            checks += [
                _check_disagreement(name, info.title, sample.differing, _require_limit(limits, "max_disagreement"))
            ]
        elif sample is not None and limit is not None:
            if sample.pairs is not None:
                checks.append(_check_program_drop(name, info.title, sample.pairs, limit))
            else:
                checks.append(_check_unpaired_program_drop(name, info, sample, limit))
    checks += _check_distances(columns.program.agreement, _require_limit(limits, "max_kl_ratio"))
    checks += [_check_runner(check) for check in columns.program.runner]
    return _make_verdict(checks, limits)


def _require_limit(limits: Limits, name: str) -> float:
    """Return a limit that is always set."""
    limit = limits[name]
    assert limit is not None, name
    return limit


def _check_losses(
    name: str, info: BenchmarkInfo, columns: Columns, pairs: Pairs | None, limit: float, min_recovery: float
) -> list[Check]:
    """Return the checks of a benchmark's drop from base model to checkpoint; none if it was not measured."""
    base, quantized = columns.base.scores.get(name), columns.quantized.scores.get(name)
    if pairs is not None:
        checks = [_check_drop(name, info.title, pairs, limit), _check_recovery(name, info.title, pairs, min_recovery)]
    elif base is not None and quantized is not None:
        checks = [_check_unpaired_drop(name, info, base, quantized, limit)]
        if info.higher_is_better:
            checks.append(_check_unpaired_recovery(name, info, base, quantized, min_recovery))
    else:
        return []
    if base is None or not info.higher_is_better or not base.is_at_chance(info.chance):
        return checks
    score = f"{100 * base.value:.1f}" + ("" if base.stderr is None else f" ± {100 * base.stderr:.1f}")
    chance = f"guessing ({100 * (info.chance or 0):.0f}%)"
    reason = f"the base model's {score}% on {info.title} cannot be distinguished from {chance}"
    return [
        _make_uninformative(check, f"{check.name.replace('_', ' ')} is uninformative: {reason}") for check in checks
    ]


def _make_uninformative(check: Check, message: str) -> Check:
    return replace(check, status="uninformative", low_confidence=False, margin=None, confidence=None, message=message)


def _fail_unmeasured_loss() -> Check:
    """Return the failed check of a release whose quality loss no check measures."""
    check = _make_check("informative", "", math.nan, math.nan, False, math.nan, None)
    message = (
        "no check measures how much quality the release lost, because its distance from the base model has no limit, "
        "and the base model scores at chance level on the benchmarks: set --max-kl"
    )
    return replace(check, message=message)


def _check_drop(name: str, title: str, pairs: Pairs, limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_difference(pairs))
    noise = ", within sampling error" if abs(value) < ABOVE_CHANCE * stderr else ""
    text = f"{title} {'drops' if value >= 0 else 'rises'} by {abs(value):.2f} ± {stderr:.2f} points{noise}"
    return _check_at_most(f"{name}_drop", text, value, limit, stderr)


def _check_recovery(name: str, title: str, pairs: Pairs, limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_ratio(pairs))
    text = f"{title} recovers {value:.2f} ± {stderr:.2f}% of the base model's score (limit ≥ {limit:.4g})"
    return _make_check(f"{name}_recovery", text, value, limit, value >= limit, round(value - limit, 4), stderr)


def _check_unpaired_drop(name: str, info: BenchmarkInfo, base: Score, quantized: Score, limit: float) -> Check:
    """Return the check of a metric that is not a mean over documents: its drop, or the increase of a perplexity.

    Its standard error is not known.
    """
    value, unit = _drop(info, base, quantized)
    verb = "drops" if (value >= 0) == info.higher_is_better else "rises"
    return _check_at_most(f"{name}_drop", f"{info.title} {verb} by {abs(value):.2f}{unit}", value, limit)


def _drop(info: BenchmarkInfo, before: Score, after: Score) -> tuple[float, str]:
    """Return by how much a score is worse than before, and the unit: " points", or "%" of a perplexity."""
    if info.higher_is_better:
        return round(100 * (before.value - after.value), 4), " points"
    return round(100 * (after.value / before.value - 1), 4) if before.value else math.nan, "%"


def _check_unpaired_recovery(name: str, info: BenchmarkInfo, base: Score, quantized: Score, limit: float) -> Check:
    value = round(100 * quantized.value / base.value, 4) if base.value else 100.0
    text = f"{info.title} recovers {value:.2f}% of the base model's score (limit ≥ {limit:.4g})"
    return _make_check(f"{name}_recovery", text, value, limit, value >= limit, round(value - limit, 4), None)


def _check_disagreement(name: str, title: str, differing: Pairs, limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_difference(differing))
    both = differing["both"]
    text = (
        f"compared with the checkpoint's {sum(differing.values())} answers to {title} without activation "
        f"quantization, the program changes {both + differing['first']}, and activation quantization alone changes "
        f"{both + differing['second']}: a difference of {value:.2f} ± {stderr:.2f} points (limit ≤ {limit:.4g})"
    )
    margin = round(limit - value, 4)
    passed = confidence(margin, stderr) >= 1 - CONFIDENT
    return _make_check(f"{name}_disagreement", text, value, limit, passed, margin, stderr)


def _check_program_drop(name: str, title: str, pairs: Pairs, limit: float) -> Check:
    """Return the check of the program's texts, which have no baseline: it fails only beyond sampling error."""
    value, stderr = (round(100 * number, 4) for number in share_difference(pairs))
    change = f"{'drops' if value >= 0 else 'rises'} by {abs(value):.2f} ± {stderr:.2f} points"
    text = f"{title} {change} from the checkpoint to the program on {sum(pairs.values())} samples"
    margin = round(limit - value, 4)
    passed = confidence(margin, stderr) >= 1 - CONFIDENT
    name = f"{name}_program_drop"
    return _make_check(name, f"{text} (limit ≤ {limit:.4g})", value, limit, passed, margin, stderr)


def _check_unpaired_program_drop(name: str, info: BenchmarkInfo, sample: SampleScore, limit: float) -> Check:
    """Return the check of texts with scores other than 0 and 1; it fails only beyond the scores' standard errors."""
    checkpoint = sample.checkpoint
    if checkpoint is None:
        check = _make_check(f"{name}_program_drop", "", math.nan, limit, True, math.nan, None)
        return _make_uninformative(
            check,
            f"{info.title} is not measured on the program: its metric is not a mean over documents, so it cannot "
            "be computed for a sample",
        )
    value, unit = _drop(info, checkpoint, sample)
    scale = 100 if info.higher_is_better or not checkpoint.value else 100 / checkpoint.value
    stderr = round(scale * math.hypot(checkpoint.stderr or 0.0, sample.stderr or 0.0), 4) or None
    error = "" if stderr is None else f" ± {stderr:.2f}"
    change = f"{'worsens' if value >= 0 else 'improves'} by {abs(value):.2f}{error}{unit}"
    text = f"{info.title} {change} from the checkpoint to the program on {sample.samples} samples (limit ≤ {limit:.4g})"
    margin = round(limit - value, 4)
    passed = margin >= 0 or (stderr is not None and confidence(margin, stderr) >= 1 - CONFIDENT)
    return _make_check(f"{name}_program_drop", text, value, limit, passed, margin, stderr)


def _check_distances(agreement: Agreement, max_ratio: float) -> list[Check]:
    parts: dict[str, tuple[str, Divergence | None]] = {
        "program_kl": ("", agreement),
        "program_kl_prompts": (" in the answers to long prompts", agreement.prompts),
        "program_kl_image": (" after an image", agreement.image),
        "program_kl_late_image": (" after an image that follows a long text", agreement.late_image),
    }
    checks = []
    for name, (location, part) in parts.items():
        if part is None:
            continue
        value = _or_nan(part.kl_program)
        limit = max(max_ratio * _or_nan(part.kl_act_quant), FLOOR)
        positions = part.positions if isinstance(part, PromptDivergence) else None
        stderr = None if positions is None else _stderr_of_excess(positions, max_ratio)
        text = f"the program's KL divergence from the checkpoint{location} is {value:.6f} nats"
        checks.append(_check_unless_chance(name, text, value, limit, stderr))
    if agreement.vision_encoder is not None:
        error, baseline = _or_nan(agreement.vision_encoder.error), _or_nan(agreement.vision_encoder.error_act_quant)
        text = f"the vision encoder's relative squared error is {error:.2g}"
        checks.append(_check_at_most("vision_encoder", text, error, max(max_ratio * baseline, FLOOR)))
    return checks


def _check_runner(check: RunnerCheck) -> Check:
    """Return the check that the C++ runner behaves like the program in the Python runtime."""
    name, text = f"runner_{check.name}", f"the C++ runner, {RUNNER_CHECKS[check.name]}"
    if not check.cases:
        reason = (
            "the model did not end its turn"
            if check.name == "stop"
            else "the program's maximum sequence length or the answers are too short"
        )
        unmeasured = _make_check(name, "", math.nan, 0, True, math.nan, None)
        return _make_uninformative(unmeasured, f"{text}: not tested, because {reason}")
    first = f": {check.examples[0]}" if check.failed else ""
    return _check_at_most(name, f"{text}: {check.failed} of {check.cases} cases differ{first}", check.failed, 0)


def _stderr_of_excess(positions: Positions, max_ratio: float) -> float | None:
    """Return the standard error of the program's KL divergence in excess of the limit."""
    excess = [
        kl - max_ratio * baseline for kl, baseline in zip(positions.kl_program, positions.kl_act_quant, strict=True)
    ]
    stderr = statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return stderr or None


def _check_unless_chance(name: str, text: str, value: float, limit: float, stderr: float | None) -> Check:
    """Return a check that, if its value was measured on few positions, fails only beyond sampling error."""
    margin = round(limit - value, 12)
    passed = value <= limit if stderr is None else confidence(margin, stderr) >= 1 - CONFIDENT
    return _make_check(name, f"{text} (limit ≤ {limit:.4g})", value, limit, passed, margin, stderr)


def _check_at_most(name: str, text: str, value: float, limit: float, stderr: float | None = None) -> Check:
    margin = round(limit - value, 12)
    return _make_check(name, f"{text} (limit ≤ {limit:.4g})", value, limit, value <= limit, margin, stderr)


def judge_fidelity(fidelity: Distances, max_kl: float | None, min_same_top: float | None) -> list[Check]:
    """Return the checks of the distance from the base model on text, which come first in a gate.

    Args:
        fidelity: The quantized checkpoint's distances, as shipped.
        max_kl: The maximum mean KL divergence, in nats; None to record it without a limit.
        min_same_top: The minimum share of tokens with the same most likely token, in percent; None to record it without
            a limit.
    """
    # A standard error of 0, of windows with equal values, gives no confidence.
    kl, kl_stderr = _or_nan(fidelity.kl_mean), fidelity.kl_mean_stderr or None
    top, top_stderr = 100 * _or_nan(fidelity.same_top), 100 * (fidelity.same_top_stderr or 0) or None
    text = f"on {fidelity.tokens:,} tokens of text, the KL divergence from the base model is {kl:.4f}"
    tops = f"the most likely token is the base model's at {top:.1f}% of the positions"
    return [
        _record_check("max_kl", f"{text} nats", kl, kl_stderr)
        if max_kl is None
        else _check_at_most("max_kl", f"{text} nats", kl, max_kl, kl_stderr),
        _record_check("min_same_top", tops, top, top_stderr)
        if min_same_top is None
        else _make_check(
            "min_same_top",
            f"{tops} (limit ≥ {min_same_top:.4g})",
            top,
            min_same_top,
            top >= min_same_top,
            round(top - min_same_top, 12),
            top_stderr,
        ),
    ]


def _record_check(name: str, text: str, value: float, stderr: float | None) -> Check:
    """Return a check that records a value without a limit; it still fails if the value is not a finite number."""
    if not math.isfinite(value):
        return _make_check(name, text, value, math.nan, False, math.nan, None)
    return Check(
        name=name,
        status="uninformative",
        low_confidence=False,
        value=value,
        limit=None,
        margin=None,
        stderr=stderr,
        confidence=None,
        message=f"{text}: recorded, no limit was set",
    )


def _make_check(
    name: str, text: str, value: float, limit: float, passed: bool, margin: float, stderr: float | None
) -> Check:
    """Return a check. It fails if a number is not finite; such numbers become None."""
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
        message=f"{text}: {outcome}" + ("" if certainty is None else f", confidence {format_percent(certainty)}"),
    )


def _make_verdict(checks: list[Check], limits: Limits) -> Verdict:
    return Verdict(
        passed=all(check.status != "fail" for check in checks),
        low_confidence=any(check.low_confidence for check in checks),
        limits=limits,
        checks=checks,
    )


def _list_disagreements(disagreements: Sequence[Disagreement]) -> str:
    lines = [f"Questions that the program and the checkpoint answer differently ({len(disagreements)}):"]
    for disagreement in disagreements[:MAX_SHOWN]:
        answers: dict[str, Answer | None] = {
            "checkpoint": disagreement.checkpoint,
            "without activation quantization": disagreement.no_act_quant,
            "program": disagreement.program,
        }
        answer_texts = ", ".join(f"{name} {_show(answer)}" for name, answer in answers.items() if answer is not None)
        # The question is at the end of the prompt.
        prompt = " ".join(disagreement.prompt.split())[-MAX_PROMPT:]
        question = f"{disagreement.task.replace('_', ' ')} {disagreement.doc_id}: {prompt}"
        lines.append(f"- {question} (correct {disagreement.target}; {answer_texts})")
    return "\n".join(lines + ["…"] * (len(disagreements) > MAX_SHOWN))


def _show(answer: Answer) -> str:
    text = textwrap.shorten(answer.answer, 60, placeholder=" …")
    return text if answer.margin is None else f"{text} by {answer.margin:.2f} nats"


def _or_nan(value: float) -> float:
    """Return a measured value, or NaN if it is infinite."""
    return value if math.isfinite(value) else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
