"""Record: collect the requests that lm-eval makes in one benchmark, without a model.

The requests depend on the dataset, the chat template, and the task's settings, not on the weights, so they are recorded
once for all columns. They are divided into shards, which are answered and stored one by one; see answer.py.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.evaluate.lm_eval_run import run_lm_eval
from quantize_gemma.tasks.models.requests import CHAT_TEMPLATE, count_documents, shard_requests, write_requests
from quantize_gemma.tasks.runtime.stage import Output, stage

if TYPE_CHECKING:
    from quantize_gemma.tasks.models.benchmarks import RequestInputs


@stage()
def record(target: Path, checkpoint: Path, dataset: Path, benchmark: "RequestInputs", limit: int | None) -> Output:
    """Write the requests of a benchmark, one file for each shard, and whether they are in the chat template.

    Args:
        target: The directory to write to.
        checkpoint: A checkpoint, for its tokenizer and its chat template.
        dataset: The benchmark's dataset.
        benchmark: The fields that its requests depend on; see Benchmark.request_inputs().
        limit: The maximum number of documents per task; None for all.
    """
    with run_lm_eval(dataset, benchmark) as evaluate:
        from quantize_gemma.tasks.evaluate.replay_lm import RecordingLM

        model = RecordingLM(checkpoint)
        evaluate(model, limit)
    shards = shard_requests(model.requests)
    write_requests(shards, target)
    # A base model has no chat template, even if the benchmark would use it.
    has_template = model.uses_chat_template(benchmark["chat_template"])
    (target / CHAT_TEMPLATE).write_text(json.dumps(has_template), encoding="utf-8")
    return {"metadata": {"shards": len(shards), "questions": count_documents(model.requests)}}
