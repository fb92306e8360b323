"""Evaluate the program on a sample of the questions that the checkpoint was evaluated on, and compare their answers.

Quantized activations, and bfloat16, change answers whose scores are close: in the program other ones than in the
checkpoint. The activation-quantization baseline says how many: the checkpoint is also evaluated in float32 without
quantized activations. A correct program is no further from that than the checkpoint is.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.evaluate import lm_eval_dataset, read_samples, sorted_samples
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.paired_stats import count_pairs
from quantize_gemma.tasks.runtime.stage import Output, stage

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# Fixed: with another seed for each run, a release that fails could be run until a sample passes.
SEED = 20
COLUMNS = ("checkpoint", "no_act_quant", "program")


@stage(memory=1.6)
def evaluate_program(
    target: Path, checkpoint: Path, program: Path, dataset: Path, evaluation: Path, sample_size: int
) -> Output:
    """Write results.json, see summarize(), and samples.jsonl: log-likelihoods of the choices, in nats, by column.

    The columns are "checkpoint"; "no_act_quant", the checkpoint in float32 without quantized activations; and
    "program". Questions that are longer than the program's sequences are left out.

    Args:
        target: The directory to write to.
        checkpoint: The quantized checkpoint.
        program: The directory of model.pte.
        dataset: A directory in the layout of cais/mmlu.
        evaluation: The checkpoint's evaluation on it.
        sample_size: How many of its questions to draw; all if there are fewer.

    Raises:
        UserError: No question fits into the program.
        StageFailed: Scores are not finite.
    """
    sample = draw_sample(read_samples(evaluation), sample_size)
    with lm_eval_dataset(dataset):
        from quantize_gemma.tasks.evaluate.packed_lm import PackedLM
        from quantize_gemma.tasks.evaluate.program_lm import ProgramLM

        model = ProgramLM(checkpoint, program)
        responses = _evaluate(model, sample)
        # The checkpoint would see the start of a longer question, the program would not.
        fitting = [model.fits(*response["arguments"][0]) for response in responses]
        sample, responses = (list(itertools.compress(rows, fitting)) for rows in (sample, responses))
        if not responses:
            raise UserError(f"no question fits into a program of {model.program.max_seq_len} tokens: raise max_seq_len")
        del model
        gc.collect()  # The checkpoint takes as much again.
        baseline = _score_again(PackedLM(checkpoint, "cpu", "auto", no_act_quant=True), responses)
    rows = [
        {
            "subject": row["subject"],
            "doc_id": row["doc_id"],
            "target": row["target"],
            "checkpoint": row["loglikelihoods"],
            "no_act_quant": no_act_quant,
            "program": [choice[0] for choice in response["filtered_resps"]],
        }
        for row, no_act_quant, response in zip(sample, baseline, responses, strict=True)
    ]
    for row in rows:
        if not all(math.isfinite(score) for column in COLUMNS for score in row[column]):
            raise StageFailed(f"the scores of question {row['doc_id']} of {row['subject']} are not finite: {row}")
    results = summarize(rows, [response["doc"] for response in responses])
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (target / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    headline = {name: results[name] for name in ("accuracy", "questions", "agreement", "agreement_act_quant")}
    return {"metadata": {**headline, "sample_size": sample_size}}


def draw_sample(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Return `size` of the rows, sorted by subject and number: always the same, whatever their order."""
    rows = sorted(rows, key=lambda row: (row["subject"], row["doc_id"]))
    chosen = random.Random(SEED).sample(range(len(rows)), min(size, len(rows)))
    return [rows[number] for number in sorted(chosen)]


def summarize(rows: list[dict[str, Any]], docs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        rows: Rows of samples.jsonl.
        docs: The dataset's documents, in the same order.

    Returns:
        "accuracy" and "stderr" of the program, and those of "checkpoint" and "no_act_quant"; "agreement", the share of
        questions with the same answer in program and checkpoint, and "agreement_act_quant", in checkpoint and
        no_act_quant; "differing", for how many questions both answers, only the program's (first), only the
        checkpoint's (second), or neither differs from no_act_quant; and "disagreements", the questions on which
        program and checkpoint differ, with the "margin" of each answer over the next best, in nats.
    """
    answers = {column: [_best(row[column]) for row in rows] for column in COLUMNS}
    scores = {column: _score(rows, answers[column]) for column in COLUMNS}
    checkpoint, no_act_quant, program = (answers[column] for column in COLUMNS)
    differing = [(p != b, c != b) for c, b, p in zip(checkpoint, no_act_quant, program, strict=True)]
    return {
        "questions": len(rows),
        **scores["program"],
        "checkpoint": scores["checkpoint"],
        "no_act_quant": scores["no_act_quant"],
        "agreement": _agreement(program, checkpoint),
        "agreement_act_quant": _agreement(checkpoint, no_act_quant),
        "differing": count_pairs(differing),
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
            for row, doc in zip(rows, docs, strict=True)
            if _best(row["program"]) != _best(row["checkpoint"])
        ],
    }


def _evaluate(model: LM, sample: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lm-eval's samples of these questions, in their order."""
    from lm_eval import simple_evaluate

    doc_ids: dict[str, list[int]] = {}
    for row in sample:
        doc_ids.setdefault(f"mmlu_{row['subject']}", []).append(row["doc_id"])
    output = simple_evaluate(model, tasks=list(doc_ids), samples=doc_ids, log_samples=True)
    if output is None:
        raise StageFailed("lm-eval returned no result")
    samples = sorted_samples(output)
    expected = [(row["subject"], row["doc_id"]) for row in sample]
    assert [(subject, one["doc_id"]) for subject, one in samples] == expected, "lm-eval evaluated other questions"
    return [one for _, one in samples]


def _score_again(model: LM, samples: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return another model's log-likelihoods of the same choices."""
    from lm_eval.api.instance import Instance

    pairs = [(number, pair) for number, sample in enumerate(samples) for pair in sample["arguments"]]
    requests = [Instance("loglikelihood", doc={}, arguments=pair, idx=0) for _, pair in pairs]
    scores: list[list[float]] = [[] for _ in samples]
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
    """Return accuracy and standard error of a random sample; the standard error of a single question is None."""
    count = len(rows)
    accuracy = sum(answer == row["target"] for answer, row in zip(answers, rows, strict=True)) / count
    stderr = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
    return {"accuracy": accuracy, "stderr": stderr}
