"""Parts of an evaluation as mapped Prefect tasks: in model workers of this machine, or on a Dask or Ray cluster."""

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from quantize_gemma.tasks.runtime import machine, model_workers, worker
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed
from quantize_gemma.tasks.runtime.lifetime import workers as running_workers
from quantize_gemma.tasks.runtime.stage import import_function
from quantize_gemma.tasks.runtime.strict_json import JsonObject


def spread(
    label: str,
    progress: worker.Progress,
    function: str,
    parts: list[JsonObject],
    workers: int,
    cluster: str | None,
) -> int:
    """Run a function as a task for each of the parts; the first failure ends the others.

    What the others have completed by then is in the store.

    Args:
        label: What the task runs' names start with.
        progress: Called with the progress in questions.
        function: "module:name".
        parts: Its arguments: JSON values.
        workers: How many model workers work at a time.
        cluster: Address of a cluster that works instead.

    Returns:
        The peak memory of one model worker in bytes.

    Raises:
        StageFailed: A part failed.
    """
    evaluation = uuid4().hex
    total = sum(part["questions"] for part in parts)
    done = [0.0] * len(parts)

    def show() -> None:
        answered = sum(part["questions"] * fraction for part, fraction in zip(parts, done, strict=True))
        progress(round(answered), total, "questions")

    pool = model_workers.Pool(machine.threads(workers), done.__setitem__)
    peak = 0
    try:
        # At the first failure the pool closes before the runner does, which waits for the tasks it has started. Until
        # then the pool stays registered, so that a task that starts late fails with "stopped".
        with (
            model_workers.use_pool(evaluation, pool),
            _runner(workers, cluster) as runner,
            contextlib.closing(pool),
        ):
            same = {"function": unmapped(function), "evaluation": unmapped(evaluation)}
            names = [f"{label} · {part['name']}" for part in parts]
            futures = list(runner.map(answer, {"name": names, "number": range(len(parts)), "part": parts, **same}))
            for future in _as_completed(futures, show):
                peak = max(peak, future.result())
                done[futures.index(future)] = 1.0
        show()
    except RunError:
        raise
    except Exception as error:
        where = f"on {cluster}" if cluster else "here"
        raise StageFailed(f"it could not be spread {where}: {type(error).__name__}: {error}") from error
    return peak


def _runner(workers: int, cluster: str | None) -> Any:
    """Return Prefect's task runner: threads of this process, or a cluster's, whose libraries have no types."""
    if cluster is None:
        return ThreadPoolTaskRunner(max_workers=workers)
    if cluster.startswith("ray://"):
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=cluster)
    from prefect_dask import DaskTaskRunner

    return DaskTaskRunner(address=cluster)


def _as_completed(futures: list[PrefectFuture[int]], show: Callable[[], None]) -> Iterator[PrefectFuture[int]]:
    """Yield each future when it is done, and show the progress while waiting."""
    completed: queue.SimpleQueue[PrefectFuture[int]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(completed.put)
    for _ in futures:
        while True:
            try:
                yield completed.get(timeout=0.5)
                break
            except queue.Empty:
                if running_workers.stopping.is_set():
                    raise StageFailed("stopped") from None
                show()


# Without tags: for each tag of a task, the server is asked whether it has a limit.
@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def answer(name: str, function: str, evaluation: str, number: int, part: JsonObject) -> int:
    """Compute one part; return the peak memory in bytes."""
    peak: int = import_function(function)(evaluation, number, part)
    return peak
