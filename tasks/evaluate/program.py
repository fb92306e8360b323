"""Evaluate the program: a sample of the questions that the checkpoint answered, and those that they answer differently.

Rounding, to int8 activations and to bfloat16, turns answers that are close: in the program others than in the
checkpoint. How many it turns is known, for the checkpoint answers the same questions without, too. A program that is
right is no further from that than the checkpoint is.
"""

import gc
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.evaluate import benchmark, in_order, read_samples
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.paired_stats import count_pairs
from quantize_gemma.tasks.runtime.stage import Output, stage

# Another seed would be another sample, and a release that was refused could be tried until one passes.
SEED = 20
COLUMNS = ("checkpoint", "unrounded", "program")


@stage(memory=1.6)
def evaluate_program(
    target: Path, checkpoint: Path, program: Path, questions: Path, answered: Path, sample_size: int
) -> Output:
    """Writes results.json, see `summarize`, and samples.jsonl: log-likelihoods of the choices, in nats, by column.

    `answered` is the checkpoint's evaluation, of whose questions `sample_size` are drawn, or all; those that are longer
    than the program's sequences are left out. The columns are
    "checkpoint"; "unrounded", the same in float32 with activations that are not quantized; and "program".
    """
    sample = draw(read_samples(answered), sample_size)
    with benchmark(questions):
        from quantize_gemma.tasks.evaluate.model import PackedLM
        from quantize_gemma.tasks.evaluate.program_lm import ProgramLM

        model = ProgramLM(checkpoint, program)
        asked = _ask(model, sample)
        # The checkpoint would see the start of a longer question, the program not.
        fitting = [model.fits(*found["arguments"][0]) for found in asked]
        sample, asked = (list(itertools.compress(rows, fitting)) for rows in (sample, asked))
        if not asked:
            raise UserError(f"no question fits into a program of {model.methods.max_seq_len} tokens: raise max_seq_len")
        del model
        gc.collect()  # The checkpoint takes as much again.
        without = _ask_again(PackedLM(checkpoint, "cpu", "auto", unrounded=True), asked)
    rows = [
        {
            "subject": row["subject"],
            "doc_id": row["doc_id"],
            "target": row["target"],
            "checkpoint": row["loglikelihoods"],
            "unrounded": unrounded,
            "program": [response[0] for response in found["filtered_resps"]],
        }
        for row, unrounded, found in zip(sample, without, asked, strict=True)
    ]
    for row in rows:
        if not all(math.isfinite(score) for column in COLUMNS for score in row[column]):
            raise StageFailed(f"the scores of question {row['doc_id']} of {row['subject']} are not finite: {row}")
    results = summarize(rows, [found["doc"] for found in asked])
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (target / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = {name: results[name] for name in ("accuracy", "questions", "agreement", "noise_agreement")}
    return {"metadata": {**shown, "sample_size": sample_size}}


def draw(answered: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Returns so many of the rows, by subject and number: always the same, whatever order they come in."""
    rows = sorted(answered, key=lambda row: (row["subject"], row["doc_id"]))
    chosen = random.Random(SEED).sample(range(len(rows)), min(size, len(rows)))
    return [rows[number] for number in sorted(chosen)]


def summarize(rows: list[dict[str, Any]], asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what results.json says of the sample.

    The program's "accuracy" and "stderr", and those of "checkpoint" and "unrounded"; "agreement", the share of
    questions that program and checkpoint answer alike, and "noise_agreement", checkpoint and unrounded; "differing",
    of how many both, only the program's (first), only the checkpoint's (second), or neither answer is another one
    than unrounded; and "disagreements", the questions on which program and checkpoint differ, with the "margin" of
    each answer over the next best, in nats.
    """
    answers = {column: [_best(row[column]) for row in rows] for column in COLUMNS}
    scores = {column: _score(rows, answers[column]) for column in COLUMNS}
    checkpoint, unrounded, program = (answers[column] for column in COLUMNS)
    apart = [(p != u, c != u) for c, u, p in zip(checkpoint, unrounded, program, strict=True)]
    return {
        "questions": len(rows),
        **scores["program"],
        "checkpoint": scores["checkpoint"],
        "unrounded": scores["unrounded"],
        "agreement": _agreement(program, checkpoint),
        "noise_agreement": _agreement(checkpoint, unrounded),
        "differing": count_pairs(apart),
        "disagreements": [
            {
                "subject": row["subject"],
                "doc_id": row["doc_id"],
                "question": doc["question"],
                "choices": doc["choices"],
                "target": "ABCD"[row["target"]],
                **{
                    column: {"answer": "ABCD"[_best(row[column])], "margin": round(_margin(row[column]), 4)}
                    for column in COLUMNS
                },
            }
            for row, doc in zip(rows, asked, strict=True)
            if _best(row["program"]) != _best(row["checkpoint"])
        ],
    }


def _ask(model: Any, sample: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns lm-eval's samples of these questions, in their order."""
    from lm_eval import simple_evaluate

    chosen: dict[str, list[int]] = {}
    for row in sample:
        chosen.setdefault(f"mmlu_{row['subject']}", []).append(row["doc_id"])
    output = simple_evaluate(model, tasks=list(chosen), samples=chosen, log_samples=True)
    if output is None:
        raise StageFailed("lm-eval returned no result")
    found = in_order(output)
    given = [(row["subject"], row["doc_id"]) for row in sample]
    assert [(subject, one["doc_id"]) for subject, one in found] == given, "lm-eval asked other questions"
    return [one for _, one in found]


def _ask_again(model: Any, asked: list[dict[str, Any]]) -> list[list[float]]:
    """Returns another model's log-likelihoods of the same choices."""
    from lm_eval.api.instance import Instance

    pairs = [(number, pair) for number, sample in enumerate(asked) for pair in sample["arguments"]]
    requests = [Instance("loglikelihood", doc={}, arguments=pair, idx=0) for _, pair in pairs]
    scores: list[list[float]] = [[] for _ in asked]
    for (number, _), (score, _) in zip(pairs, model.loglikelihood(requests, disable_tqdm=True), strict=True):
        scores[number].append(score)
    return scores


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=lambda choice: scores[choice])


def _margin(scores: list[float]) -> float:
    best, second = sorted(scores, reverse=True)[:2]
    return best - second


def _agreement(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _score(rows: list[dict[str, Any]], answers: list[int]) -> dict[str, float | None]:
    """Returns accuracy and standard error of a random sample, the latter None for a single question."""
    count = len(rows)
    accuracy = sum(answer == row["target"] for answer, row in zip(answers, rows, strict=True)) / count
    stderr = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
    return {"accuracy": accuracy, "stderr": stderr}
