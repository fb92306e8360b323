"""Evaluate: lm-eval's scores for one column on one benchmark, from stored answers.

Section "Model Quality" of PyTorch's card.

A benchmark's requests are recorded once (record.py) and answered in parts (answer.py); here, lm-eval's own code replays
the answers and computes the scores.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.evaluate.lm_eval_run import run_lm_eval
from quantize_gemma.tasks.evaluate.scores import make_samples, summarize
from quantize_gemma.tasks.models.requests import CHAT_TEMPLATE, Request, Shards, read_requests
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.strict_json import JsonObject as JsonObject

if TYPE_CHECKING:
    from quantize_gemma.tasks.models.benchmarks import ScoreInputs


@stage()
def evaluate(
    target: Path,
    requests: Path,
    answers: list[Path],
    dataset: Path,
    benchmark: "ScoreInputs",
    limit: int | None,
    device: str,
) -> Output:
    """Write results.json, the benchmark's scores and their standard errors, and samples.jsonl, a row per document.

    Args:
        target: The directory to write to.
        requests: The recorded requests.
        answers: The parts of the answers to the requests.
        dataset: The benchmark's dataset.
        benchmark: The fields that the requests and the scores depend on; see Benchmark.score_inputs().
        limit: The maximum number of documents per task; None for all.
        device: The device that computed the answers.

    Raises:
        UserError: No document fits into the program's sequence length.
    """
    name, metric = benchmark["name"], benchmark["metric"]
    shards = read_requests(requests)
    by_document: dict[tuple[str, int], list[Request]] = {}
    for request in [request for shard in shards.values() for request in shard]:
        by_document.setdefault((request.task, request.doc_id), []).append(request)
    responses, left_out = _read_answers(shards, answers)
    if not responses:
        raise UserError(f"no document of {name} fits into the program's sequence length: raise --max-seq-len")
    doc_ids = _documents_of_a_sample(responses, len(by_document))
    with run_lm_eval(dataset, benchmark) as evaluate_with_lm_eval:
        from quantize_gemma.tasks.evaluate.replay_lm import ReplayLM

        output = evaluate_with_lm_eval(ReplayLM(responses, doc_ids), limit, doc_ids)
    results = summarize(output, name, benchmark["task"], metric, benchmark["metrics"])
    has_template = json.loads((requests / CHAT_TEMPLATE).read_text(encoding="utf-8"))
    results |= {"chat_template": has_template, "left_out": left_out, "device": device, "limit": limit}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (target / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for row in make_samples(output, name, metric, by_document):
            stream.write(json.dumps(row) + "\n")
    return {"metadata": {"value": results["value"], "samples": results["samples"], "left_out": left_out}}


def _read_answers(shards: Shards, parts: list[Path]) -> tuple[dict[tuple[str, int, int], object], int]:
    """Return the answers by (task, doc_id, index), and the number of documents that were left out."""
    responses: dict[tuple[str, int, int], object] = {}
    left_out = 0
    for part in parts:
        for path in sorted(part.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            left_out += len(content["left_out"])
            for request, value in zip(shards[path.stem], content["answers"], strict=True):
                if value is not None:
                    responses[request.task, request.doc_id, request.index] = value
    return responses, left_out


def _documents_of_a_sample(keys: Iterable[tuple[str, int, int]], count: int) -> dict[str, list[int]] | None:
    """Return the documents that were answered, by task; None if that is all of them."""
    documents = sorted({(task, doc_id) for task, doc_id, _ in keys})
    doc_ids: dict[str, list[int]] = {}
    for task, doc_id in documents:
        doc_ids.setdefault(task, []).append(doc_id)
    return doc_ids if len(documents) < count else None
