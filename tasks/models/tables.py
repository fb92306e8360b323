"""Scores and gate checks as rows of text for the card, Prefect's UI, and the terminal. A dash means not measured."""

import math
from collections.abc import Callable, Sequence

from quantize_gemma.tasks.models.benchmarks import Benchmark, find_benchmark
from quantize_gemma.tasks.models.metrics import BenchmarkInfo, BenchmarkScore, Check, Columns, Metrics, Score
from quantize_gemma.tasks.models.text_fidelity import fidelity_rows
from quantize_gemma.tasks.runtime.units import human_size

NOT_MEASURED = "—"
COLUMNS = ("base", "quantized", "program")

Row = dict[str, str]


def format_score(score: Score | None, percent: bool = True) -> str:
    """Return a score with its standard error if it has one; fractions as percentages."""
    if score is None:
        return NOT_MEASURED
    scale = 100 if percent else 1
    text = f"{scale * score.value:.2f}"
    return text if score.stderr is None else f"{text} ± {scale * score.stderr:.2f}"


def benchmark_rows(columns: Columns, name: str) -> dict[str, Row]:
    """Return {title: {column: score}} of a benchmark; empty if it was not measured."""
    info = _describe(columns, name)
    title, percent = info.title, info.higher_is_better
    measured = {"base": columns.base.scores.get(name), "quantized": columns.quantized.scores.get(name)}
    measured_scores = [score for score in measured.values() if score is not None]
    sample = columns.program.scores.get(name)

    def cells(part: Callable[[BenchmarkScore], Score | None]) -> Row:
        scores = {column: None if score is None else part(score) for column, score in measured.items()}
        return {column: format_score(score, percent) for column, score in scores.items()} | {"program": NOT_MEASURED}

    rows: dict[str, Row] = {}
    if measured_scores:
        samples = max(score.samples or 0 for score in measured_scores)
        base = measured["base"]
        chance = percent and base is not None and base.is_at_chance(info.chance)
        note = " (base at chance: uninformative)" if chance else ""
        rows[f"{title}, {samples:,} samples{note}"] = cells(lambda score: score)
    for group in dict.fromkeys(group for score in measured_scores for group in score.groups):
        rows[f"{title}, {group.replace('_', ' ')}"] = cells(lambda score, group=group: score.groups.get(group))  # type: ignore[misc]
    for metric in dict.fromkeys(metric for score in measured_scores for metric in score.metrics):
        words = info.metrics.get(metric, metric)
        rows[f"{title}, {words}"] = cells(lambda score, metric=metric: score.metrics.get(metric))  # type: ignore[misc]
    if sample is not None:
        left_out = f" ({sample.left_out:,} more do not fit into its sequence length)" if sample.left_out else ""
        rows[f"{title}, the program's {sample.samples:,} samples{left_out}"] = {
            "base": NOT_MEASURED,
            "quantized": format_score(sample.checkpoint, percent),
            "program": format_score(sample, percent),
        }
    return rows


def summary_rows(columns: Columns) -> list[Row]:
    """Return the summary table: size, distance from the base model, main scores, and speed."""
    quantized, program = columns.quantized.fidelity, columns.program.fidelity
    speed = columns.program.speed["text"]
    rows = [
        {"metric": "size", **{name: human_size(getattr(columns, name).bytes) for name in COLUMNS}},
        {
            "metric": "KL divergence from the base model, nats",
            "quantized": _four_digits(quantized.kl_mean, quantized.kl_mean_stderr),
            "program": _four_digits(program.kl_mean, program.kl_mean_stderr),
        },
        {
            "metric": "same top token as the base model",
            "quantized": f"{100 * quantized.same_top:.1f}%",
            "program": f"{100 * program.same_top:.1f}%",
        },
    ]
    for name in dict.fromkeys([*columns.base.scores, *columns.quantized.scores, *columns.program.scores]):
        benchmark = list(benchmark_rows(columns, name).items())
        if not benchmark:
            continue
        sample = columns.program.scores.get(name)
        # The first row has the scores on all samples, the last one those on the program's.
        cells = dict(benchmark[0][1])
        if sample is not None:
            cells["program"] = f"{benchmark[-1][1]['program']} ({sample.samples:,} samples)"
        rows.append({"metric": _describe(columns, name).title, **cells})
    rows.append({"metric": "speed, tokens/s", "program": _format_speed(speed.decode_tokens_per_second)})
    return [{"metric": "", **dict.fromkeys(COLUMNS, NOT_MEASURED), **row} for row in rows]


def quality_rows(columns: Columns) -> list[Row]:
    """Return the quality table of a run: one row per metric, one cell per column."""
    agreement = columns.program.agreement
    rows: list[Row] = [
        {"metric": "size", **{name: human_size(getattr(columns, name).bytes) for name in COLUMNS}},
    ]
    for name in dict.fromkeys([*columns.base.scores, *columns.quantized.scores, *columns.program.scores]):
        rows += [{"metric": title, **cells} for title, cells in benchmark_rows(columns, name).items()]
        sample = columns.program.scores.get(name)
        if sample is not None and sample.agreement is not None:
            title, share = _describe(columns, name).title, f"{100 * sample.agreement:.1f}"
            if sample.agreement_act_quant is None:
                # Texts are rarely equal, so their scores are compared.
                rows.append({"metric": f"{title}, same score as the checkpoint, % of questions", "program": share})
            else:
                prefix, baseline = f"{title}, same answers as", f"{100 * sample.agreement_act_quant:.1f}"
                rows.append({"metric": f"{prefix} the checkpoint, %", "program": share})
                rows.append({"metric": f"{prefix} without activation quantization, %", "quantized": baseline})
    rows += [
        {"metric": "KL from the checkpoint, nats", "program": f"{agreement.kl_program:.2g}"},
        {"metric": "KL due to activation quantization, nats", "quantized": f"{agreement.kl_act_quant:.2g}"},
        {"metric": "same top token as the checkpoint, %", "program": f"{100 * agreement.same_argmax:.1f}"},
    ]
    return [{"metric": "", **dict.fromkeys(COLUMNS, NOT_MEASURED), **row} for row in rows]


def distance_rows(columns: Columns, checks: Sequence[Check]) -> list[Row]:
    """Return the table of the distance from the base model on text, with the results of the gate's checks."""
    names = {"max_kl": "KL", "min_same_top": "same top"}
    results = [
        f"{names[check.name]}{'' if check.limit is None else ' ' + _format_limit(check)}: {_format_result(check)}"
        for check in checks
        if check.name in names
    ]
    quantized = columns.quantized
    return fidelity_rows(quantized.fidelity, columns.program.fidelity, results, quantized.reference)


def verdict_rows(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Return the gate's checks as rows of a table."""
    return [
        {
            "check": check.name.replace("_", " "),
            "value": _with_stderr(check.value, check.stderr),
            "limit": _format_limit(check),
            "margin": NOT_MEASURED if check.margin is None else f"{check.margin:.3g}",
            "confidence": "" if check.confidence is None else format_percent(check.confidence),
            "result": _format_result(check),
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


def _describe(columns: Columns, name: str) -> BenchmarkInfo | Benchmark:
    """Return a benchmark's entry in metrics.json; a run's summary has only the columns."""
    return columns.benchmarks[name] if isinstance(columns, Metrics) else find_benchmark(name)


def _four_digits(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _format_speed(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


def _format_limit(check: Check) -> str:
    if check.limit is None:
        return NOT_MEASURED
    sign = "≥" if check.name.endswith("_recovery") or check.name.startswith("min_") else "≤"
    return f"{sign} {_with_stderr(check.limit, None)}"


def _format_result(check: Check) -> str:
    if check.status == "uninformative":
        if check.value is None:
            return "not compared" if check.name.endswith("_regression") else "not measured"
        return "recorded" if check.limit is None else check.status
    return "pass (low confidence)" if check.low_confidence else check.status


def _with_stderr(value: float | None, stderr: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if not stderr:
        return f"{value:.4g}"
    # Two digits of a small error, so that a value that is just over its limit does not look equal to it.
    digits = 2 if stderr >= 0.005 else 1 - math.floor(math.log10(stderr))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"
