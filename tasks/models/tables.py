"""Scores and gate checks as rows of text for the card, Prefect's UI, and the terminal. A dash means not measured."""

from collections.abc import Sequence

from quantize_gemma.tasks.models.metrics import ChartqaScore, Check, Columns, Score
from quantize_gemma.tasks.runtime.units import human_size

NOT_MEASURED = "—"
COLUMNS = ("base", "quantized", "program")


def format_score(score: Score | None) -> str:
    """Return an accuracy in percent, with its standard error if it has one."""
    if score is None:
        return NOT_MEASURED
    text = f"{100 * score.accuracy:.2f}"
    return text if score.stderr is None else f"{text} ± {100 * score.stderr:.2f}"


def chartqa_rows(columns: Columns) -> dict[str, dict[str, str]]:
    """Return {title: {column: score}} for ChartQA; empty if ChartQA was not measured."""
    measured = {name: getattr(columns, name).chartqa for name in COLUMNS}
    parts = [part for score in measured.values() if score is not None for part in score.relaxed_accuracy]
    rows = {
        f"ChartQA, {part}": {name: format_score(_relaxed(score, part)) for name, score in measured.items()}
        for part in dict.fromkeys(parts)
    }
    if parts:
        rows["ChartQA, normalized"] = {
            name: format_score(None if score is None else score.normalized["overall"])
            for name, score in measured.items()
        }
    return rows


def quality_rows(columns: Columns) -> list[dict[str, str]]:
    """Return the quality table of a run: one row per metric, one cell per column."""
    base, quantized, program = columns.base, columns.quantized, columns.program
    agreement, sample = program.agreement, program.mmlu
    rows = [
        {"metric": "size", **{name: human_size(getattr(columns, name).bytes) for name in COLUMNS}},
        {"metric": "MMLU, %", "base": format_score(base.mmlu), "quantized": format_score(quantized.mmlu)},
    ]
    if sample is not None:
        scores = {"quantized": format_score(sample.checkpoint), "program": format_score(sample)}
        rows += [
            {"metric": f"MMLU, {sample.questions} questions, %", **scores},
            {"metric": "same answers as the checkpoint, %", "program": f"{100 * sample.agreement:.1f}"},
            {
                "metric": "same answers without activation quantization, %",
                "quantized": f"{100 * sample.agreement_act_quant:.1f}",
            },
        ]
    rows += [{"metric": f"{title}, %", **cells} for title, cells in chartqa_rows(columns).items()]
    rows += [
        {"metric": "KL from the checkpoint, nats", "program": _two_digits(agreement.kl_program)},
        {"metric": "KL due to activation quantization, nats", "quantized": _two_digits(agreement.kl_act_quant)},
    ]
    if agreement.same_argmax is not None:
        rows.append({"metric": "same top token, %", "program": f"{100 * agreement.same_argmax:.1f}"})
    return [{"metric": "", **dict.fromkeys(COLUMNS, NOT_MEASURED), **row} for row in rows]


def verdict_rows(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Return the gate's checks as rows of a table."""
    return [
        {
            "check": check.name.replace("_", " "),
            "value": _with_stderr(check.value, check.stderr),
            "limit": ("≥ " if check.name.endswith("recovery") else "≤ ") + _with_stderr(check.limit, None),
            "margin": _with_stderr(check.margin, None),
            "confidence": "" if check.confidence is None else format_percent(check.confidence),
            "result": _result(check),
        }
        for check in checks
    ]


def verdict_text(checks: Sequence[Check]) -> str:
    """Return the gate's checks as aligned columns of text."""
    lines = verdict_rows(checks)
    lines = [{name: name for name in lines[0]}, *lines] if lines else []
    widths = {name: max(len(line[name]) for line in lines) for name in lines[0]} if lines else {}
    return "\n".join("  ".join(line[name].ljust(widths[name]) for name in widths).rstrip() for line in lines)


def format_percent(share: float) -> str:
    """Return a probability in percent."""
    if share > 0.999:
        return "over 99.9%"
    return "under 0.1%" if share < 0.001 else f"{100 * share:.1f}%"


def _relaxed(score: ChartqaScore | None, part: str) -> Score | None:
    return None if score is None else score.relaxed_accuracy.get(part)


def _two_digits(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2g}"


def _result(check: Check) -> str:
    if check.status == "uninformative":
        return "not compared"
    return "pass (low confidence)" if check.low_confidence else check.status


def _with_stderr(value: float | None, stderr: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if stderr is None:
        return f"{value:.3g}"
    return f"{value:.2f} ± {stderr:.2f}" if stderr >= 0.005 else f"{value:.2g} ± {stderr:.2g}"
