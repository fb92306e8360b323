"""Stages as Prefect tasks: cache keys, persistence, retries.

A stage's result is cached under its store key, as JSON inside its artifact, so that a removed or damaged artifact is a
cache miss and the stage runs again.
"""

import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.logging import get_run_logger
from prefect.results import ResultStore

from quantize_gemma.tasks.runtime import machine, store, worker
from quantize_gemma.tasks.runtime.artifact_ref import (
    ArtifactRef,
    digest_of_files,
    load_artifact,
    open_artifact,
    ref_of,
)
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.lifetime import run_workers
from quantize_gemma.tasks.runtime.prefect_progress import StageProgress
from quantize_gemma.tasks.runtime.prefect_slots import ACCELERATOR, MEMORY, take_slots
from quantize_gemma.tasks.runtime.retries import is_retryable
from quantize_gemma.tasks.runtime.stage import SECONDS_ALLOWED, Stage
from quantize_gemma.tasks.runtime.store import Artifact
from quantize_gemma.tasks.runtime.strict_json import JsonObject
from quantize_gemma.tasks.runtime.units import human_size

terminal = logging.getLogger(__name__)

# A stage's inputs by name: references to artifacts, lists of references, and plain JSON values.
Inputs = JsonObject
AnyTask = Task[..., object]
Decorator = Callable[[Callable[..., ArtifactRef]], Callable[..., ArtifactRef]]


class RetryOptions(TypedDict, total=False):
    """Options of a Prefect task."""

    retries: int
    retry_condition_fn: Callable[[AnyTask, TaskRun, State[object]], bool]


def as_task(stage: Stage[...], decorator: Decorator = lambda run: run) -> Task[..., ArtifactRef]:
    """Return the Prefect task for a stage.

    It takes the stage's inputs by keyword: references to artifacts, lists of references, and plain JSON values. It
    returns a reference to the stage's artifact.

    Args:
        stage: The stage.
        decorator: Decorates the function that the task runs unless its result is cached.
    """

    def run(**inputs: object) -> ArtifactRef:
        return run_stage(stage, inputs)

    run.__name__ = stage.name
    run.__doc__ = stage.work.__doc__
    # The task has no tags: for each tag, Prefect would ask the server for a concurrency limit, which is slow.
    decorate = task(
        name=stage.name,
        cache_key_fn=lambda context, parameters: _cache_key(stage, context, parameters["inputs"]),
        persist_result=True,
        result_serializer="json",
        on_failure=[_log_failure, _discard_failure],
        **retried(stage.retries),
    )
    return decorate(decorator(run))


def key_of(stage: Stage[...], inputs: Inputs) -> str:
    """Return the key of a stage's artifact for these references and plain values.

    For a list of artifacts, only the files are part of the key: the number of parts depends on the number of workers.
    """
    ignored_inputs = stage.ignored + (stage.ignored_on_cpu if inputs.get("device") == "cpu" else ())
    key_inputs = {field: value for field, value in sorted(inputs.items()) if field not in ignored_inputs}
    refs = {field: _refs(value) for field, value in key_inputs.items()}
    digests = [
        f"{field}={value.digest if isinstance(value, ArtifactRef) else digest_of_files(refs[field])}"
        for field, value in key_inputs.items()
        if refs[field]
    ]
    parameters = {field: value for field, value in key_inputs.items() if not refs[field]}
    return store.key(stage.name, digests, parameters, fingerprint(stage.function))


def _refs(value: object) -> list[ArtifactRef]:
    """Return the references in an input."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, ArtifactRef)]


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run will submit.

    Attributes:
        stage: The stage.
        inputs: Its inputs, except for artifacts.
        artifacts: {input: name of the stage whose artifact it takes}.
    """

    stage: Stage[...]
    inputs: Inputs
    artifacts: Mapping[str, str] = field(default_factory=dict)


def missing_stages(stages: Collection[PlannedStage], refresh: Collection[str]) -> list[str]:
    """Return the stages that have to run because the store does not have their artifacts.

    Args:
        stages: The stages, each after those whose artifacts it takes.
        refresh: The stages that run again even if the store has their artifacts.
    """
    artifacts = stored_artifacts(stages)
    return [name for name in (planned.stage.name for planned in stages) if name not in artifacts or name in refresh]


def stored_artifacts(stages: Iterable[PlannedStage]) -> dict[str, ArtifactRef]:
    """Return the artifacts of planned stages that are in the store, by stage; each stage is after those it needs."""
    refs: dict[str, ArtifactRef] = {}
    for planned in stages:
        if all(stage in refs for stage in planned.artifacts.values()):
            inputs = {key: refs[stage] for key, stage in planned.artifacts.items()}
            artifact = store.load(planned.stage.name, key_of(planned.stage, {**planned.inputs, **inputs}))
            if artifact is not None:
                refs[planned.stage.name] = ref_of(artifact)
    return refs


def retried(times: int) -> RetryOptions:
    """Return the options of a task that is retried after transient failures, with backoff and jitter."""
    return {"retries": times, "retry_condition_fn": _wait_for_retry} if times else {}


def failure_of(state: State[object]) -> BaseException | None:
    """Return the exception of a failed state."""
    try:
        state.result()
    except BaseException as error:
        return error
    return None


def _cache_key(stage: Stage[...], context: TaskRunContext, inputs: Inputs) -> str:
    """Return where Prefect stores the result, relative to the store; remove the result if its artifact is missing."""
    key = key_of(stage, inputs)
    name = f"{stage.name}/{key}/result.json"
    # Do not pin an artifact that will be replaced, so that it can be removed.
    if not context.task.refresh_cache:
        # Loading checks every file: without an artifact, its cached result is a miss.
        artifact = store.pin(stage.name, key)
        path = store.home() / name
        if artifact is None or not _is_result_of(artifact, path):
            path.unlink(missing_ok=True)
    return name


def _is_result_of(artifact: Artifact, path: Path) -> bool:
    """Tell whether Prefect's cached reference is to this artifact: another run may have rebuilt it."""
    try:
        results = ResultStore(result_storage=LocalFileSystem(basepath=str(path.parent)))
        return bool(results.read(path.name).result == ref_of(artifact))
    except Exception:
        return False


def run_stage(stage: Stage[...], inputs: Inputs, on_cluster: bool = False) -> ArtifactRef:
    """Build a stage's artifact unless the store has it, in a task run.

    Args:
        stage: The stage.
        inputs: Its inputs.
        on_cluster: Whether this process belongs to a cluster. It outlives the run, so it must not pin anything.
    """
    context = TaskRunContext.get()
    assert context is not None
    label = _label(context.task_run)
    refresh = bool(context.task.refresh_cache)

    def work(target: Path) -> JsonObject:
        return _run_in_worker(stage, inputs, target, refresh, on_cluster)

    artifact = store.produce(stage.name, key_of(stage, inputs), work, refresh=refresh, pinned=not on_cluster)
    line = f"{label}: {_describe(artifact)}"
    get_run_logger().info(line)
    terminal.info(line)
    return ref_of(artifact)


def _run_in_worker(stage: Stage[...], inputs: Inputs, target: Path, refresh: bool, on_cluster: bool) -> JsonObject:
    """Call a stage's function in a worker process, once the server has free slots for it; return its output."""
    refs = {field: _refs(value) for field, value in inputs.items()}
    take = load_artifact if on_cluster else open_artifact
    # Hash the inputs first: disk errors do not change modification times.
    folders = {field: [str(take(ref, rehash=True).path) for ref in items] for field, items in refs.items()}
    paths = {field: items if isinstance(inputs[field], list) else items[0] for field, items in folders.items() if items}
    values = {field: value for field, value in inputs.items() if not refs[field]}
    if stage.resumes:
        values["refresh"] = refresh
    # This server does not manage the memory, GPUs, and cores of a cluster's machines.
    bytes_read = sum(ref.size for items in refs.values() for ref in items)
    parts = inputs.get("parts", 1)
    assert isinstance(parts, int)
    threads = {} if on_cluster else machine.threads(parts)
    with (
        take_slots(ACCELERATOR, int(stage.accelerated and inputs.get("device") != "cpu" and not on_cluster)),
        take_slots(MEMORY, math.ceil(1 + stage.memory * bytes_read / 2**30) if stage.memory and not on_cluster else 0),
        StageProgress(stage.name) as progress,
    ):
        return worker.run(
            "quantize_gemma.tasks.runtime.worker_main:call",
            {
                "function": stage.function,
                "target": str(target),
                "paths": paths,
                "values": values,
                "made_by": fingerprint(stage.function),
            },
            progress,
            get_run_logger(),
            {**stage.environment(), **threads},
            SECONDS_ALLOWED,
        )


def _describe(artifact: Artifact) -> str:
    """Describe a stage's time, memory, and output size."""
    measured = artifact.measured
    return (
        f"{measured['seconds']:.1f} s, {human_size(measured['peak_rss_bytes'])} of peak memory, "
        f"{human_size(artifact.size)} written"
    )


def _label(run: TaskRun) -> str:
    """Return the stage's name in a task run's name."""
    return run.name.split(" · ")[0]


def _wait_for_retry(_task: AnyTask, run: TaskRun, state: State[object]) -> bool:
    """Tell Prefect whether to retry, after a backoff with jitter, or after the time that the server requests.

    The wait is here, where it can be interrupted; Prefect's own delay cannot be.
    """
    retryable, seconds = is_retryable(failure_of(state))
    stopping = run_workers().stopping
    if retryable:
        stopping.wait(max(seconds, 2.0 ** max(run.run_count, 1) * random.uniform(0.5, 1.5)))
    return retryable and not stopping.is_set()


def _log_failure(_task: AnyTask, run: TaskRun, state: State[object]) -> None:
    """Log a failure immediately: stages that do not depend on this one finish first, which may take hours."""
    terminal.error(f"{_label(run)}: {failure_of(state)}")


def _discard_failure(_task: AnyTask, _run: TaskRun, state: State[object]) -> None:
    """Remove a failure's exception, which Prefect stores as a file in the result storage, here the store."""
    name = getattr(getattr(state.data, "metadata", state.data), "storage_key", None)
    if name is not None and Path(name).parent == store.home():
        Path(name).unlink(missing_ok=True)
