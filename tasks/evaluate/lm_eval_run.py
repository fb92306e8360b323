"""Run lm-eval as a library on a benchmark's dataset, offline."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import import_function

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from quantize_gemma.tasks.models.benchmarks import RequestInputs

# Called with an lm-eval model, a limit, and, instead of a limit, documents by task; returns lm-eval's output.
Evaluate = Callable[..., dict[str, object]]
# Our own tasks: {name: function that returns lm-eval's configuration for a dataset and a limit}.
OWN_TASKS = {"chartqa": "quantize_gemma.tasks.evaluate.chartqa:make_chartqa_task"}
# The name of the group with the tasks to run.
GROUP = "quantize-gemma"


@contextlib.contextmanager
def run_lm_eval(dataset: Path, benchmark: RequestInputs) -> Iterator[Evaluate]:
    """Yield a function that runs lm-eval on a dataset, offline.

    Use it before lm-eval is imported, and only once per process: the libraries remember where they looked first.

    Args:
        dataset: The dataset's directory.
        benchmark: See Benchmark.request_inputs().
    """
    dataset = dataset.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        # Other files that a task needs; otherwise, importing the task would download them.
        os.environ["NLTK_DATA"] = str(dataset / ".nltk_data")

        def evaluate(model: Any, limit: int | None, doc_ids: dict[str, list[int]] | None = None) -> dict[str, Any]:
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager

            name = benchmark["task"]
            use_template = model.uses_chat_template(benchmark["chat_template"])
            if name in OWN_TASKS:
                # Its limit applies to each kind of question, and its model creates the prompts.
                tasks, limit, use_template = [import_function(OWN_TASKS[name])(dataset, limit)], None, False
                manager = TaskManager(include_defaults=False)
            else:
                # Select only the tasks of a group that have documents: lm-eval would run the others in full.
                names = [name] if doc_ids is None else list(doc_ids)
                manager = make_task_manager(name, write_group(Path(folder) / "tasks", names, dataset))
                tasks = list(manager.load([GROUP])["groups"][GROUP])
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


def write_group(folder: Path, names: list[str], dataset: Path) -> Path:
    """Write lm-eval's YAML file for a group whose tasks read the dataset's directory; return its path.

    A group's settings override those of its members, at every depth: here, the directory replaces the repository on the
    Hub.
    """
    folder.mkdir()
    path = folder / f"{GROUP}.yaml"
    path.write_text(json.dumps({"group": GROUP, "task": names, "dataset_path": str(dataset)}), encoding="utf-8")
    return path


def make_task_manager(task: str, group: Path) -> TaskManager:
    """Return lm-eval's task manager with only a task and a group; reading all of its YAML files would take seconds."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / task.split("_")[0]
    if folder.is_dir():
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[folder, group.parent])
        if task in manager.all_tasks:
            return manager
    return lm_eval.tasks.TaskManager(include_path=group.parent)
