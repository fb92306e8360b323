"""Compare the program's answers to a sample of a benchmark's documents with those of the checkpoint.

Quantized activations and bfloat16 change answers whose scores are close, but not the same ones in the program and the
checkpoint. The activation-quantization baseline shows how many to expect: the checkpoint also answers in float32
without quantized activations. A correct program is no further from these answers than the checkpoint is.
"""

import math
from collections.abc import Sequence
from typing import Any

from quantize_gemma.tasks.runtime.paired_stats import count_pairs

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def compare_answers(
    program: Sequence[Row], checkpoint: Sequence[Row], no_act_quant: Sequence[Row] | None
) -> dict[str, Any]:
    """Return the fields of SampleScore other than the program's score.

    Args:
        program: The rows of the program's samples.jsonl.
        checkpoint: The checkpoint's rows, which include these documents.
        no_act_quant: The rows of the checkpoint without activation quantization, if it was measured.
    """
    by_document = {(row["task"], row["doc_id"]): row for row in checkpoint}
    checkpoint = [by_document[row["task"], row["doc_id"]] for row in program]
    by_document = {(row["task"], row["doc_id"]): row for row in no_act_quant or []}
    baseline = [by_document[row["task"], row["doc_id"]] for row in program] if no_act_quant is not None else None
    differing = pairs = None
    if baseline is not None:
        rows = zip(program, checkpoint, baseline, strict=True)
        differing = count_pairs(
            (_differ(program_row, baseline_row), _differ(checkpoint_row, baseline_row))
            for program_row, checkpoint_row, baseline_row in rows
        )
    if all(row["score"] in (0, 1) for row in [*program, *checkpoint]):
        pairs = count_pairs(
            (checkpoint_row["score"] == 1, program_row["score"] == 1)
            for checkpoint_row, program_row in zip(checkpoint, program, strict=True)
        )
    return {
        "checkpoint": mean_score(checkpoint),
        "no_act_quant": None if baseline is None else mean_score(baseline),
        "agreement": _agreement(program, checkpoint),
        "agreement_act_quant": None if baseline is None else _agreement(checkpoint, baseline),
        "differing": differing,
        "pairs": pairs,
        "disagreements": [
            {
                **{name: row[name] for name in ("task", "doc_id", "prompt")},
                "target": _letter(row, row["target"]),
                "checkpoint": _answer(checkpoint_row),
                "no_act_quant": None if baseline is None else _answer(baseline[index]),
                "program": _answer(row),
            }
            for index, (row, checkpoint_row) in enumerate(zip(program, checkpoint, strict=True))
            if _differ(row, checkpoint_row)
        ],
    }


def mean_score(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the mean score and its standard error (None for a single document); None if a score is not a number."""
    scores = [row["score"] for row in rows]
    if not scores or None in scores:
        return None
    count = len(scores)
    mean = sum(scores) / count
    variance = sum((score - mean) ** 2 for score in scores) / count
    return {"value": mean, "stderr": math.sqrt(variance / (count - 1)) if count > 1 else None, "samples": count}


def _differ(first: Row, second: Row) -> bool:
    """Tell whether two answers differ: in their choice, or, for texts, if only one of them is correct."""
    name = "prediction" if "choices" in first else "score"
    return bool(first[name] != second[name])


def _agreement(rows: Sequence[Row], other_rows: Sequence[Row]) -> float | None:
    if not rows or any("choices" not in row and row["score"] is None for row in rows):
        return None
    return sum(not _differ(first, second) for first, second in zip(rows, other_rows, strict=True)) / len(rows)


def _letter(row: Row, choice: Any) -> str:
    """Return the letter of a choice; return anything else as text."""
    number = int(choice) if "choices" in row and str(choice).isdigit() else None
    return str(choice) if number is None or number >= len(LETTERS) else LETTERS[number]


def _answer(row: Row) -> dict[str, Any]:
    if "choices" not in row:
        return {"answer": row["prediction"], "margin": None}
    responses = row["responses"]
    best, second, *_ = [*sorted(responses, reverse=True), -math.inf]
    has_margin = math.isfinite(best - second) and responses.index(best) == row["prediction"]
    return {"answer": _letter(row, row["prediction"]), "margin": round(best - second, 4) if has_margin else None}
