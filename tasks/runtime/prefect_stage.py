"""What Prefect does with a stage: cache key, persistence, retries. The only file that knows.

A stage's result is cached under its store key and kept as JSON inside its artifact, so that an artifact that is
removed or damaged is a miss and runs again.
"""

import contextlib
import functools
import logging
import math
import os
import queue
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect import Task, task, unmapped
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.results import ResultStore
from prefect.task_runners import ThreadPoolTaskRunner

from quantize_gemma.tasks.runtime import machine, model_workers, store, worker
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, open_artifact, ref_of
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.lifetime import workers
from quantize_gemma.tasks.runtime.retries import is_retryable
from quantize_gemma.tasks.runtime.stage import Stage, import_function
from quantize_gemma.tasks.runtime.store import Artifact
from quantize_gemma.tasks.runtime.units import human_size

terminal = logging.getLogger(__name__)

_seconds_between_updates = 2.0
# What takes longer hangs: gemma-3-27b's evaluation on a CPU is the longest that is known.
SECONDS_ALLOWED = 24 * 3600.0
# Global concurrency limits of a Prefect server that `make deploy` has set up: one accelerator, and memory in GiB.
SECONDS_BETWEEN_ASKING = 10.0
SECONDS_OF_LEASE = 1800.0
ACCELERATOR = "quantize-gemma-accelerator"
MEMORY = "quantize-gemma-memory"


def as_task(stage: Stage[...]) -> Task[..., ArtifactRef]:
    """Returns the Prefect task over a stage.

    It takes the stage's inputs by keyword, references of artifacts and plain JSON values, and returns the reference of
    the artifact that the stage makes.
    """
    name, function = stage.name, stage.function

    def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        key = key_of(stage, parameters["inputs"])
        result = f"{name}/{key}/result.json"
        # What is to be replaced is left unpinned, so that it can go.
        if not context.task.refresh_cache:
            # Loading looks at every file: without an artifact its cached result is a miss.
            artifact = store.pin(name, key)
            if artifact is None or not _is_result_of(artifact, store.home() / result):
                (store.home() / result).unlink(missing_ok=True)
        return result

    def run(**inputs: Any) -> ArtifactRef:
        logger = get_run_logger()
        context = TaskRunContext.get()
        assert context is not None
        refresh = bool(context.task.refresh_cache)

        def make(target: Path) -> dict[str, Any]:
            # What a stage computes with is hashed first: a disk's own errors change no time of modification.
            refs = {field: value for field, value in inputs.items() if isinstance(value, ArtifactRef)}
            paths = {field: str(open_artifact(ref, whole=True).path) for field, ref in refs.items()}
            values = {field: value for field, value in inputs.items() if field not in paths}
            if stage.resumes:
                values["refresh"] = refresh
            call = {"function": function, "target": str(target), "paths": paths, "values": values}
            sizes = sum(ref.size for ref in refs.values()) * inputs.get("workers", 1)
            # What a cluster's machines have is not this server's to share out.
            here = not inputs.get("cluster")
            with (
                _slots(ACCELERATOR, int(stage.accelerated and inputs.get("device") != "cpu" and here)),
                _slots(MEMORY, math.ceil(1 + stage.memory * sizes * here / 2**30) if stage.memory else 0),
                _Progress(name) as progress,
            ):
                return worker.run(
                    "quantize_gemma.tasks.runtime.worker_main:call",
                    {**call, "made_by": fingerprint(function)},
                    progress,
                    logger,
                    stage.environment(),
                    SECONDS_ALLOWED,
                    functools.partial(_spread, context.task_run.name.split(" · ")[0], progress),
                )

        artifact = store.produce(name, key_of(stage, inputs), make, refresh=refresh, pinned=True)
        line = f"{context.task_run.name.split(' · ')[0]}: {describe(artifact)}"
        logger.info(line)
        terminal.info(line)
        return ref_of(artifact)

    run.__name__ = name
    run.__doc__ = stage.work.__doc__
    decorate = task(
        name=name,
        tags=["quantize-gemma", name],
        cache_key_fn=cache_key,
        persist_result=True,
        result_serializer="json",
        on_failure=[_tell_failure, _discard_failure],
        **retried(stage.retries),
    )
    return decorate(run)


def key_of(stage: Stage[...], inputs: dict[str, Any]) -> str:
    """Return the key of what a stage makes of these references and plain values."""
    ignored = stage.ignored + (stage.ignored_on_cpu if inputs.get("device") == "cpu" else ())
    counted = {field: value for field, value in sorted(inputs.items()) if field not in ignored}
    digests = [f"{field}={value.digest}" for field, value in counted.items() if isinstance(value, ArtifactRef)]
    parameters = {field: value for field, value in counted.items() if not isinstance(value, ArtifactRef)}
    return store.key(stage.name, digests, parameters, fingerprint(stage.function))


def missing(chain: list[tuple[Stage[...], dict[str, Any]]], refresh: Collection[str]) -> list[str]:
    """Returns the stages of a chain that have to run, because the store does not have what they make.

    Each stage's `checkpoint` is what the one before it made.
    """
    to_run: list[str] = []
    before: dict[str, Any] = {}
    for number, (stage, inputs) in enumerate(chain):
        artifact = store.load(stage.name, key_of(stage, {**inputs, **before}))
        if artifact is None:
            return to_run + [stage.name for stage, _ in chain[number:]]
        if stage.name in refresh:
            to_run.append(stage.name)
        before = {"checkpoint": ref_of(artifact)}
    return to_run


def describe(artifact: Artifact) -> str:
    """Returns what a stage took and made, for people."""
    measured = artifact.measured
    return (
        f"{measured['seconds']:.1f} s, {human_size(measured['peak_rss_bytes'])} of memory at most, "
        f"{human_size(artifact.size)} written"
    )


def _is_result_of(artifact: Artifact, path: Path) -> bool:
    """Tells whether what Prefect has cached is the reference of this artifact: another run may have made it again."""
    try:
        results = ResultStore(result_storage=LocalFileSystem(basepath=str(path.parent)))
        return bool(results.read(path.name).result == ref_of(artifact))
    except Exception:
        return False


def retried(times: int) -> dict[str, Any]:
    """Returns the options of a task that is tried again after what may pass by itself, with back-off and jitter."""
    if not times:
        return {}
    return {
        "retries": times,
        "retry_condition_fn": _is_retried,
    }


def _is_retried(_task: Any, run: Any, state: Any) -> bool:
    """Tells Prefect whether to try again, after a back-off with jitter or as long as the server asked for.

    It waits here, where an interrupt ends it; Prefect's own delay sleeps through one.
    """
    transient, retry_after = is_retryable(failure_of(state))
    if transient:
        workers.stopping.wait(max(retry_after, 2.0 ** max(run.run_count, 1) * random.uniform(0.5, 1.5)))
    return transient and not workers.stopping.is_set()


def failure_of(state: Any) -> BaseException | None:
    """Returns the exception of a failed state."""
    try:
        state.result()
    except BaseException as error:
        return error
    return None


def _tell_failure(_task: Any, run: Any, state: Any) -> None:
    """Says it at once: what does not need this stage comes to its end first, and that may take hours."""
    terminal.error(f"{run.name.split(' · ')[0]}: {failure_of(state)}")


def _discard_failure(_task: Any, _run: Any, state: Any) -> None:
    """Prefect keeps a failure's exception as a file in the result storage, which here is the store: nothing stays."""
    kept = getattr(getattr(state.data, "metadata", state.data), "storage_key", None)
    if kept is not None and Path(kept).parent == store.home():
        Path(kept).unlink(missing_ok=True)


def _spread(
    of: str,
    progress: worker.Progress,
    function: str,
    parts: list[dict[str, Any]],
    workers: int,
    cluster: str | None,
) -> int:
    """Runs `function` as a task for each of the parts; returns the most memory that its process took, in bytes.

    The first failure ends the others; what they have finished is in the store.
    """
    evaluation = uuid4().hex
    total = sum(part["questions"] for part in parts)
    done = [0.0] * len(parts)

    def show() -> None:
        answered = sum(part["questions"] * fraction for part, fraction in zip(parts, done, strict=True))
        progress(round(answered), total, "questions")

    here = model_workers.Pool(machine.threads(workers), done.__setitem__)
    peak = 0
    try:
        # At the first failure the pool is closed before the runner is, which waits for what it has started; and it is
        # known until then, so that what starts late is told that it was stopped.
        with (
            model_workers.pool(evaluation, here),
            _runner(workers, cluster) as runner,
            contextlib.closing(here),
        ):
            same = {"function": unmapped(function), "evaluation": unmapped(evaluation)}
            names = [f"{of} · {part['name']}" for part in parts]
            futures = list(runner.map(answer, {"name": names, "number": range(len(parts)), "part": parts, **same}))
            for future in _as_they_finish(futures, show):
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
    if cluster is None:
        return ThreadPoolTaskRunner(max_workers=workers)
    if cluster.startswith("ray://"):
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=cluster)
    from prefect_dask import DaskTaskRunner

    return DaskTaskRunner(address=cluster)


def _as_they_finish(futures: list[PrefectFuture[int]], show: Callable[[], None]) -> Iterator[PrefectFuture[int]]:
    """Yields each future when it is done, and shows the progress while it waits."""
    finished: queue.SimpleQueue[PrefectFuture[int]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    for _ in futures:
        while True:
            try:
                yield finished.get(timeout=0.5)
                break
            except queue.Empty:
                if workers.stopping.is_set():
                    raise StageFailed("stopped") from None
                show()


# Without tags: for each of a task's the server is asked whether it has a limit.
@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def answer(name: str, function: str, evaluation: str, number: int, part: dict[str, Any]) -> int:
    """Answers some shards of an evaluation."""
    peak: int = import_function(function)(evaluation, number, part)
    return peak


@contextlib.contextmanager
def _slots(name: str, wanted: int) -> Iterator[None]:
    """Holds so many slots of a global concurrency limit, or all if it has fewer.

    A server that the command line started for one run is nobody else's: there is nothing to wait for, and a run that
    is killed would leave its slots taken.
    """
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency
    from prefect.exceptions import ObjectNotFound

    if not wanted or "QUANTIZE_GEMMA_LOCAL_SERVER" in os.environ:
        yield
        return
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name).limit
        except ObjectNotFound:
            raise UserError(f"the Prefect server has no limit {name}: set it up with `make deploy`") from None
    with contextlib.ExitStack() as held:
        while True:
            # A server that is away for some minutes is no reason to end a stage: the lease outlives that.
            slots = concurrency(
                name,
                occupy=max(1, min(wanted, limit)),
                timeout_seconds=SECONDS_BETWEEN_ASKING,
                strict=True,
                lease_duration=SECONDS_OF_LEASE,
                raise_on_lease_renewal_failure=False,
            )
            try:
                held.enter_context(slots)
                break
            except TimeoutError:
                if workers.stopping.is_set():
                    raise StageFailed(f"the run was stopped while it waited for {name}") from None
        yield


class _Progress:
    """A stage's progress: a bar in the terminal, and an artifact in Prefect's UI."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.artifact: UUID | None = None
        self.updated = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.artifact is not None and failed is None:
            self.publish(100.0, "done")

    def __call__(self, done: int, total: int, what: str) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self.bar is None or self.bar.total != total:
                scaled = {"unit": "B", "unit_scale": True} if what == "bytes" else {}
                self.bar = tqdm(total=total, desc=f"{self.name}: {what}", leave=False, **scaled)
            self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if now - self.updated < _seconds_between_updates:
            return
        self.updated = now
        self.publish(100.0 * done / max(total, 1), what)

    def publish(self, percent: float, what: str) -> None:
        """Updates the artifact; that the API is away for a moment is no reason to end a stage."""
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, key=f"progress-{self.name}", description=what)  # type: ignore[assignment]
            else:
                update_progress_artifact(self.artifact, progress=percent)
        except Exception as error:
            get_run_logger().warning("progress could not be shown: %s", error)
