"""The stages of an evaluation, each in its own process, as the flow runs them."""

from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.runtime import worker

PACKAGE = "quantize_gemma.tasks.evaluate"


def run_stage(function: str, target: Path, paths: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Run a stage's function; return its output, and the progress that it reported."""
    target.mkdir(parents=True, exist_ok=True)
    progress: list[tuple[int, int, str]] = []
    path_names = {
        name: [str(item) for item in path] if isinstance(path, list) else str(path) for name, path in paths.items()
    }
    call = {"function": function, "target": str(target), "paths": path_names, "values": values}
    output = worker.run(
        "quantize_gemma.tasks.runtime.worker_main:call", call, lambda *item: progress.append(item), None
    )
    return {**output, "progress": progress}


def record(folder: Path, checkpoint: Path, dataset: Path, name: str, limit: int | None) -> Path:
    """Record a benchmark's requests; return their directory."""
    paths = {"checkpoint": checkpoint, "dataset": dataset}
    run_stage(f"{PACKAGE}.record:record", folder, paths, benchmark=find_benchmark(name).request_inputs(), limit=limit)
    return folder


def evaluate(
    folder: Path, checkpoint: Path, dataset: Path, name: str, limit: int | None, **answering: Any
) -> dict[str, Any]:
    """Evaluate a checkpoint or a program; write to the folders requests, answers, and results in `folder`.

    Args:
        folder: Where to write.
        checkpoint: The checkpoint.
        dataset: The benchmark's dataset.
        name: The benchmark's name.
        limit: Documents per task.
        **answering: Inputs of `answer`.

    Returns:
        The output of `answer`, with its progress.
    """
    requests = folder / "requests"
    if not requests.exists():
        record(requests, checkpoint, dataset, name, limit)
    values = {"device": "cpu", **answering}
    paths = {"requests": requests, "checkpoint": checkpoint, "dataset": dataset}
    if "program" in values:
        paths["program"] = values.pop("program")
    output = run_stage(f"{PACKAGE}.answer:answer", folder / "answers", paths, **values)
    score_paths = {"requests": requests, "answers": [folder / "answers"], "dataset": dataset}
    inputs = {"benchmark": find_benchmark(name).score_inputs(), "limit": limit, "device": values["device"]}
    run_stage(f"{PACKAGE}:evaluate", folder / "results", score_paths, **inputs)
    return output
