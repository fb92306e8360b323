"""One evaluation as a stage of a flow run, in a process of its own: `python -m tests.one_evaluation '{"workers": 2}'`.

The checkpoint is tiny-gemma3, and its questions are the built-in ones; the last line of stdout is the result as JSON.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from prefect import flow

from tasks import process, store
from tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from tasks.evaluate import evaluate
from tasks.policies import as_task, open_record, record


@flow
def one_evaluation(checkpoint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the evaluation's directory, what it took, and who answered how many of its subjects."""
    asked = {"limit": None, "batch_size": "auto", "device": "cpu", "workers": 1, "cluster": None, **settings}
    stage = as_task(evaluate).with_options(task_run_name="evaluate base · test", result_storage=store.home())
    records = {"checkpoint": in_the_store(Path(checkpoint)), "questions": in_the_store(BUILTIN_BENCHMARKS["mmlu-mini"])}
    with process.ended_on_interrupt():
        artifact = open_record(stage.submit(**records, **asked).result())
    answered: dict[str, int] = {}
    for manifest in store.home().glob("evaluate-shard/*/manifest.json"):
        by = json.loads(manifest.read_text(encoding="utf-8"))["measured"]
        answered[f"{by['host']}:{by['process']}"] = answered.get(f"{by['host']}:{by['process']}", 0) + 1
    return {"folder": str(artifact.path), "measured": artifact.measured, "answered": answered}


def in_the_store(source: Path) -> dict[str, Any]:
    """Returns the record of a directory's copy in the store."""

    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(source, target, dirs_exist_ok=True)
        return {}

    return record(store.produce("download", store.key("test", 1, [], {"name": source.name}, []), copy))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    chosen = given.pop("checkpoint", str(BUILTIN["tiny-gemma3"]))
    print(json.dumps(one_evaluation(chosen, given)))
    sys.stdout.flush()
    os._exit(0)
