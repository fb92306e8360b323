"""Runs lm-eval as a library on a benchmark's dataset, offline."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import import_function
from quantize_gemma.tasks.runtime.strict_json import JsonObject

# Called with an lm-eval model, a limit, and, instead of a limit, documents by task; returns lm-eval's output.
Evaluate = Callable[..., dict[str, Any]]
# Our own tasks: a function that returns lm-eval's configuration of a dataset and a limit.
OWN_TASKS = {"chartqa": "quantize_gemma.tasks.evaluate.chartqa:make_chartqa_task"}


@contextlib.contextmanager
def run_lm_eval(dataset: Path, benchmark: JsonObject) -> Iterator[Evaluate]:
    """Yield a function that runs lm-eval on a dataset, offline.

    Use it before lm-eval is imported, and once in a process: the libraries remember where they looked first.

    Args:
        dataset: The dataset's directory.
        benchmark: See Benchmark.request_inputs().
    """
    with tempfile.TemporaryDirectory() as folder:
        # `datasets` reads a directory of that name instead of the repository: lm-eval's tasks stay as they are.
        place = Path(folder) / benchmark["dataset"]
        place.parent.mkdir(parents=True)
        place.symlink_to(dataset.resolve())
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        # What a task needs besides; without it, its import would download it.
        os.environ["NLTK_DATA"] = str(dataset.resolve() / "nltk_data")
        os.chdir(folder)

        def evaluate(model: Any, limit: int | None, doc_ids: dict[str, list[int]] | None = None) -> dict[str, Any]:
            from lm_eval import simple_evaluate

            task: Any = benchmark["task"]
            manager = task_manager(task)
            use_template = model.uses_chat_template(benchmark["chat_template"])
            if task in OWN_TASKS:
                # Its limit is one per kind of question, and its model makes the prompts.
                task, limit, use_template = import_function(OWN_TASKS[task])(dataset, limit), None, False
            # Of a group, only the tasks with documents: lm-eval would ask all questions of the others.
            tasks = [task] if doc_ids is None or isinstance(task, dict) else list(doc_ids)
            output = simple_evaluate(
                model,
                tasks=tasks,
                num_fewshot=benchmark["num_fewshot"],
                apply_chat_template=use_template,
                limit=None if doc_ids is not None else limit,
                samples=doc_ids,
                log_samples=True,
                task_manager=manager,
            )
            if output is None:
                raise StageFailed("lm-eval returned no result")
            return dict(output)

        yield evaluate
        os.chdir("/")


def task_manager(task: str) -> Any:
    """Return lm-eval's task manager with the task; reading all of its thousands of YAML files takes seconds."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / task.split("_")[0]
    if folder.is_dir():
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
        if task in OWN_TASKS or task in manager.all_tasks:
            return manager
    return lm_eval.tasks.TaskManager()
