"""Gate: a release that lost too much, or whose program is another model, is not published."""

import math
import statistics
import textwrap
from typing import Any

from quantize_gemma.tasks.runtime.errors import RunError
from quantize_gemma.tasks.runtime.paired_stats import confidence, share_difference, share_ratio

# Below this, in nats per token, or in mean squares of one, rounding in float32 alone makes the difference.
FLOOR = 1e-6
# What holds with less confidence is weak; a disagreement is refused when it is as sure that it is too wide.
CONFIDENT = 0.95
LIMITS = ("max_mmlu_drop", "max_chartqa_drop", "min_recovery", "max_disagreement", "max_kl_ratio")
BENCHMARKS = {"mmlu": "MMLU", "chartqa": "ChartQA"}
# What of the program was compared with the checkpoint, and how it is called.
COMPARED = {
    "last": "at the end of the longest sequence",
    "step_by_step": "token by token",
    "prompts": "in its answers to long prompts",
    "image": "after an image",
}
SHOWN = 5
# What two MMLU scores must have in common to be compared, and where it stands in metrics.json.
MEASURED_ON = {
    "benchmark": ("benchmark",),
    "benchmark revision": ("benchmark_revision",),
    "fixture benchmark": ("fixture_benchmark",),
    "fixture model": ("fixture_model",),
    "task": ("quantized", "mmlu", "task"),
    "task version": ("quantized", "mmlu", "task_version"),
    "number of examples": ("quantized", "mmlu", "num_fewshot"),
    "limit": ("quantized", "mmlu", "limit"),
    "number of questions": ("quantized", "mmlu", "questions"),
    "version of lm-eval": ("versions", "lm-eval"),
}
MISSING = object()

Check = dict[str, Any]


class GateRefused(RunError):
    """The release does not reach the bar; `verdict` says which checks it failed, the message shows all of them."""

    def __init__(self, verdict: dict[str, Any], disagreements: list[dict[str, Any]]) -> None:
        failed = [check for check in verdict["checks"] if not check["passed"]]
        parts = [f"the gate refuses the release: {'; '.join(check['message'] for check in failed)}"]
        parts.append(text_table(verdict["checks"]))
        if any(check["name"] == "program_disagreement" for check in failed):
            parts.append(_as_text(disagreements))
        super().__init__("\n\n".join(parts))
        self.verdict = verdict


def required_checks(multimodal: bool, charts: bool, published: bool) -> list[str]:
    """Returns the names of the checks without which no release passes.

    `charts` says whether ChartQA was to be measured, `published` whether the release is to follow another one.
    """
    parts = ["", "_last", "_step_by_step", "_prompts", *["_image"] * multimodal]
    return [
        *(f"{name}_{kind}" for name in ("mmlu", *["chartqa"] * charts) for kind in ("drop", "recovery")),
        "program_disagreement",
        *(f"program_kl{part}" for part in parts),
        *["vision_encoder"] * multimodal,
        *["regression"] * published,
    ]


def gate(metrics: dict[str, Any], required: list[str], regression: Check | None = None) -> dict[str, Any]:
    """Returns the verdict of metrics.json, and whether the release is good enough to follow the published one.

    `required` are the checks that there must be; `regression` is compare_with_published()'s. Raises GateRefused.
    """
    checks = [*metrics["gate"]["checks"], *([regression] if regression else [])]
    there = {check["name"] for check in checks}
    checks += [
        _check(name, f"{name.replace('_', ' ')} was not measured", math.nan, math.nan, False, math.nan, None)
        for name in required
        if name not in there
    ]
    verdict = _verdict(checks)
    if not verdict["passed"]:
        raise GateRefused(verdict, metrics["program"]["mmlu"]["disagreements"])
    return verdict


def compare_with_published(metrics: dict[str, Any], published: dict[str, Any] | None, max_regression: float) -> Check:
    """Returns the check that MMLU is at most so many points below what is published.

    `published` is the metrics.json at the target's head, None if there is none; anybody may have written it. Only like
    is compared with like: what was measured otherwise says nothing, and the check then says that it does not.
    """
    why = _unlike(metrics, published)
    if why:
        return _uninformative("regression", f"MMLU is not compared with what is published: {why}", max_regression)
    assert published is not None
    accuracy = published["quantized"]["mmlu"]["accuracy"]
    loss = round(100 * (accuracy - metrics["quantized"]["mmlu"]["accuracy"]), 4)
    what = f"MMLU is {abs(loss):.2f} points {'below' if loss >= 0 else 'above'} what is published"
    # How sure the published number was is not known.
    return _at_most("regression", what, loss, max_regression)


def _unlike(metrics: dict[str, Any], published: dict[str, Any] | None) -> str | None:
    """Returns why the two cannot be compared, None if they can."""
    if published is None:
        return "there is no metrics.json yet"
    for what, path in MEASURED_ON.items():
        here, there = _look_up(metrics, path), _look_up(published, path)
        if here is MISSING or type(here) is not type(there) or here != there:
            return f"its {what} is {_shown(here)} here and {_shown(there)} there"
    accuracy = _look_up(published, ("quantized", "mmlu", "accuracy"))
    if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
        return f"its accuracy is {_shown(accuracy)} there"
    return None


def _look_up(metrics: Any, path: tuple[str, ...]) -> Any:
    """Returns what stands there, or MISSING."""
    for name in path:
        if not isinstance(metrics, dict) or name not in metrics:
            return MISSING
        metrics = metrics[name]
    return metrics


def _shown(value: Any) -> str:
    """Returns a value of unknown origin as a few characters."""
    if value is MISSING or value is None:
        return "not said" if value is MISSING else "none"
    if not isinstance(value, (str, int, float)):
        return "no plain value"
    return textwrap.shorten(repr(value), 60, placeholder="…")


def _uninformative(name: str, message: str, limit: float) -> Check:
    said = {"name": name, "status": "uninformative", "passed": True, "weak": False, "limit": limit, "message": message}
    return {**said, **dict.fromkeys(("value", "margin", "stderr", "confidence"))}


def judge(metrics: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """Returns {"passed", "weak", "checks": [{"name", "status", "passed", "weak", "value", "limit", "margin", …}]}.

    `limits` are those of LIMITS, parameters of the flow: the drops in points of accuracy; `min_recovery` in percent of
    the base's score; `max_disagreement` in points, how many percent more of the questions the program may answer
    differently from the checkpoint in float32, without quantized activations, than the checkpoint itself does;
    `max_kl_ratio` bounds the KL divergence between checkpoint and program, and the vision encoder's squared error, by
    the activation-quantization baseline.

    A check's `margin` is what it holds by, less than 0 if it does not. `stderr` is the value's standard error, from
    the questions on which the columns differ (the margin's, from their positions, for answers to long prompts), and
    `confidence` the probability that the true value is within the limit; both are None elsewhere. Its `status` is
    "pass", "fail", or "uninformative" if there was nothing to compare; what is no finite number fails, and is None.

    The value decides, however sure it is: a run on few questions is as good as its number, and `weak` tells that its
    number says little. The disagreement and the answers to long prompts are the exception, for their samples are
    small and activations round differently in any program, a good one too: they are refused when the confidence is
    below 5%, beyond what chance explains.
    """
    checks = []
    for name, title in BENCHMARKS.items():
        if name in metrics["pairs"]:
            pairs = metrics["pairs"][name]
            checks += [_drop(name, title, pairs, limits[f"max_{name}_drop"])]
            checks += [_recovery(name, title, pairs, limits["min_recovery"])]
    checks += [_disagreement(metrics["program"]["mmlu"]["differing"], limits["max_disagreement"])]
    checks += _distances(metrics["program"]["agreement"], limits["max_kl_ratio"])
    return _verdict(checks)


def _drop(name: str, title: str, pairs: dict[str, int], limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_difference(pairs))
    what = f"{title} {'falls' if value >= 0 else 'rises'} by {abs(value):.2f} ± {stderr:.2f} points"
    return _at_most(f"{name}_drop", what, value, limit, stderr)


def _recovery(name: str, title: str, pairs: dict[str, int], limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_ratio(pairs))
    what = f"{title} keeps {value:.2f} ± {stderr:.2f} % of the base's score, at least {limit:.4g}"
    return _check(f"{name}_recovery", what, value, limit, value >= limit, round(value - limit, 4), stderr)


def _disagreement(differing: dict[str, int], limit: float) -> Check:
    value, stderr = (round(100 * number, 4) for number in share_difference(differing))
    both = differing["both"]
    what = (
        f"of {sum(differing.values())} questions the program answers {both + differing['first']} differently from the "
        f"checkpoint without activation quantization, the checkpoint {both + differing['second']}: "
        f"{value:.2f} ± {stderr:.2f} points more, at most {limit:.4g}"
    )
    margin = round(limit - value, 4)
    passed = confidence(margin, stderr) >= 1 - CONFIDENT
    return _check("program_disagreement", what, value, limit, passed, margin, stderr)


def _distances(agreement: dict[str, Any], max_ratio: float) -> list[Check]:
    checks = []
    parts = {"": agreement, **{name: agreement[name] for name in COMPARED if name in agreement}}
    for name, part in parts.items():
        value, limit = _as_number(part["kl_program"]), max(max_ratio * _as_number(part["kl_act_quant"]), FLOOR)
        what = f"the program is {value:.6f} nats from the checkpoint {COMPARED.get(name, '')}".strip()
        stderr = _stderr_of_excess(part["positions"], max_ratio) if "positions" in part else None
        checks.append(_unless_chance(f"program_kl_{name}".rstrip("_"), what, value, limit, stderr))
    if "vision_encoder" in agreement:
        error, baseline = (_as_number(agreement["vision_encoder"][name]) for name in ("error", "error_act_quant"))
        what = f"the vision encoder's squared error is {error:.2g}"
        checks.append(_at_most("vision_encoder", what, error, max(max_ratio * baseline, FLOOR)))
    return checks


def _stderr_of_excess(positions: dict[str, list[float]], max_ratio: float) -> float | None:
    """Return the standard error of the program's KL divergence beyond the activation-quantization baseline."""
    excess = [
        kl - max_ratio * baseline
        for kl, baseline in zip(positions["kl_program"], positions["kl_act_quant"], strict=True)
    ]
    stderr = statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return stderr or None


def _unless_chance(name: str, what: str, value: float, limit: float, stderr: float | None) -> Check:
    """Returns a check that is refused, if its value is measured on a few positions, beyond what chance explains."""
    margin = round(limit - value, 12)
    passed = value <= limit if stderr is None else confidence(margin, stderr) >= 1 - CONFIDENT
    return _check(name, f"{what}, at most {limit:.4g}", value, limit, passed, margin, stderr)


def _at_most(name: str, what: str, value: float, limit: float, stderr: float | None = None) -> Check:
    margin = round(limit - value, 12)
    return _check(name, f"{what}, at most {limit:.4g}", value, limit, value <= limit, margin, stderr)


def _check(
    name: str, what: str, value: float, limit: float, passed: bool, margin: float, stderr: float | None
) -> Check:
    numbers = {"value": value, "limit": limit, "margin": margin}
    finite = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
    passed = passed and None not in finite.values()
    sure = None if stderr is None or None in finite.values() else confidence(margin, stderr)
    outcome = f"{'held' if margin >= 0 else 'failed'} by {abs(margin):.3g}"
    if passed and margin < 0:
        outcome = f"over by {-margin:.3g}, which chance explains"
    if None in finite.values():
        outcome = "failed, for that is no number"
    return {
        "name": name,
        "status": "pass" if passed else "fail",
        "passed": passed,
        "weak": passed and sure is not None and sure < CONFIDENT,
        **finite,
        "stderr": stderr,
        "confidence": None if sure is None else round(sure, 6),
        "message": f"{what}: {outcome}" + ("" if sure is None else f", confidence {_percent(sure)}"),
    }


def _verdict(checks: list[Check]) -> dict[str, Any]:
    return {
        "passed": all(check["passed"] for check in checks),
        "weak": any(check["weak"] for check in checks),
        "checks": checks,
    }


def gate_table(checks: list[Check]) -> list[dict[str, str]]:
    """Returns the checks as a table's rows of text, for people."""
    return [
        {
            "check": check["name"].replace("_", " "),
            "value": _number(check["value"], check["stderr"]),
            "limit": ("≥ " if check["name"].endswith("recovery") else "≤ ") + _number(check["limit"], None),
            "margin": _number(check["margin"], None),
            "confidence": "" if check["confidence"] is None else _percent(check["confidence"]),
            "verdict": _as_word(check),
        }
        for check in checks
    ]


def text_table(checks: list[Check]) -> str:
    """Returns the checks as lines of text in columns."""
    lines = gate_table(checks)
    lines = [{name: name for name in lines[0]}, *lines]
    widths = {name: max(len(line[name]) for line in lines) for name in lines[0]}
    return "\n".join("  ".join(line[name].ljust(widths[name]) for name in widths).rstrip() for line in lines)


def _as_text(disagreements: list[dict[str, Any]]) -> str:
    lines = [f"{len(disagreements)} questions that program and checkpoint answer differently:"]
    for one in disagreements[:SHOWN]:
        choices = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", one["choices"], strict=True))
        answers = ", ".join(
            f"{name} {one[name]['answer']} by {one[name]['margin']:.2f} nats"
            for name in ("checkpoint", "no_act_quant", "program")
        )
        question = textwrap.shorten(f"{one['question']} {choices}", 300, placeholder=" …")
        lines.append(f"- {one['subject'].replace('_', ' ')} {one['doc_id']}: {question} ({one['target']}; {answers})")
    return "\n".join(lines + ["…"] * (len(disagreements) > SHOWN))


def _as_word(check: Check) -> str:
    if check["status"] == "uninformative":
        return "not compared"
    return "refused" if not check["passed"] else "held, weakly" if check["weak"] else "held"


def _as_number(value: Any) -> float:
    """Returns a measured value; what is none, or infinite, is not a number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _number(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    if stderr is None:
        return f"{value:.3g}"
    return f"{value:.2f} ± {stderr:.2f}" if stderr >= 0.005 else f"{value:.2g} ± {stderr:.2g}"


def _percent(share: float) -> str:
    if share > 0.999:
        return "over 99.9 %"
    return "under 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
