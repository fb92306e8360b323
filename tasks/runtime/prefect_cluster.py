"""The parts of a stage on a Dask or Ray cluster: a subflow with the cluster's task runner."""

import socket
from typing import Any

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture

from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed
from quantize_gemma.tasks.runtime.fingerprint import Fingerprint, difference, fingerprint
from quantize_gemma.tasks.runtime.lifetime import run_workers
from quantize_gemma.tasks.runtime.prefect_stage import run_stage
from quantize_gemma.tasks.runtime.stage import Stage, import_function
from quantize_gemma.tasks.runtime.strict_json import JsonObject

SECONDS_BETWEEN_LOOKS = 0.5


def run_on_cluster(
    stage: Stage[...], label: str, cluster: str, parts: int, refresh: bool, inputs: JsonObject
) -> list[ArtifactRef]:
    """Run the parts of a stage on a cluster; return the references of their artifacts.

    Args:
        stage: The stage.
        label: What the task runs' names start with.
        cluster: The address of a Dask or Ray cluster, whose machines share the store.
        parts: How many parts there are.
        refresh: Run them again even if the store has their results.
        inputs: The stage's inputs, without `part` and `parts`.

    Raises:
        RunError: A part failed.
    """

    made_by = fingerprint(stage.function)

    @flow(name=label, task_runner=_task_runner(cluster), persist_result=False, validate_parameters=False)
    def map_parts() -> list[ArtifactRef]:
        part_task = run_part.with_options(task_run_name=f"{label} · {{part}}", refresh_cache=refresh)
        futures: list[PrefectFuture[ArtifactRef]] = part_task.map(
            unmapped(stage.function), unmapped(made_by), unmapped(inputs), range(parts), unmapped(parts)
        )
        return [_wait(future) for future in futures]

    try:
        refs = map_parts()
    except RunError:
        raise
    except Exception as error:
        raise StageFailed(f"it could not be run on {cluster}: {type(error).__name__}: {error}") from error
    if any(store.load(ref.stage, ref.key, digest=ref.digest) is None for ref in refs):
        raise StageFailed(f"the results of {cluster} are not in {store.home()}: all machines must share one store")
    return refs


# The task has no tags: for each tag, Prefect would ask the server for a concurrency limit.
@task(cache_policy=NO_CACHE, persist_result=False)
def run_part(function: str, made_by: Fingerprint, inputs: JsonObject, part: int, parts: int) -> ArtifactRef:
    """Run one part on the cluster. Raises StageFailed if its code or libraries differ from those of the run."""
    mismatch = difference(made_by, fingerprint(function))
    if mismatch:
        raise StageFailed(f"{socket.gethostname()} has {mismatch}: install the same versions as on the run's machine")
    stage: Any = import_function(function)
    return run_stage(stage, {**inputs, "part": part, "parts": parts}, on_cluster=True)


def _wait(future: PrefectFuture[ArtifactRef]) -> ArtifactRef:
    """Return the future's result. Raises StageFailed if the run is interrupted first."""
    while not future.state.is_final():
        future.wait(SECONDS_BETWEEN_LOOKS)
        if run_workers().stopping.is_set():
            raise StageFailed("stopped")
    return future.result()


def _task_runner(cluster: str) -> Any:
    """Return Prefect's task runner for a cluster, whose libraries have no types."""
    if cluster.startswith("ray://"):
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=cluster)
    from prefect_dask import DaskTaskRunner

    return DaskTaskRunner(address=cluster)
