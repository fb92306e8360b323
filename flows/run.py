"""The bookkeeping of one flow run: submit its stages, collect the summary, and find the first failure."""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, ParamSpec, TypeVar

from prefect import Task, allow_failure, runtime, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture

from quantize_gemma.flows.summary import Interrupted, StageSummary, Summary
from quantize_gemma.flows.timeline import Times, show_timeline
from quantize_gemma.tasks.gate.checks import GateFailed
from quantize_gemma.tasks.models.metrics import to_json
from quantize_gemma.tasks.runtime import machine, store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, open_artifact
from quantize_gemma.tasks.runtime.disk import disk_failure
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError
from quantize_gemma.tasks.runtime.lifetime import stop_on_interrupt
from quantize_gemma.tasks.runtime.patches.private_api import retry_refused_connections
from quantize_gemma.tasks.runtime.prefect_cluster import run_on_cluster
from quantize_gemma.tasks.runtime.prefect_stage import as_task, failure_of, retried
from quantize_gemma.tasks.runtime.redact import keep_secrets, redact, redact_logs
from quantize_gemma.tasks.runtime.stage import Stage
from quantize_gemma.tasks.runtime.store import Artifact

# The future of a stage's artifact, or those of the artifacts of its parts.
Future = PrefectFuture[Any]
Futures = dict[str, Future | list[Future]]
P = ParamSpec("P")
R = TypeVar("R")

# Stages that have a model in memory and may run at the same time as an evaluation: a smoke test, and the export.
OTHER_STAGES = 2
RETRIES = 3


@contextlib.contextmanager
def start_run(label: str, refresh: Collection[str]) -> Iterator["Run"]:
    """Start the bookkeeping of a flow run, and complete its summary however the run ends.

    Args:
        label: The model and the recipe; part of every task run's name.
        refresh: Names of stages that run again even if their results are cached.

    Yields:
        The run.

    Raises:
        RunError: The failure of the first stage that failed, not one of those that it caused; its `summary` is the
            run's.
        Interrupted: The run was interrupted.
    """
    redact_logs()
    keep_secrets()
    retry_refused_connections()
    run = Run(label, refresh)
    with store.keep_pinned():
        try:
            with stop_on_interrupt():
                try:
                    yield run
                except Exception:
                    # Let stages that do not depend on the failed one finish, so that they are cached for the next run.
                    run.finish()
                    raise
                run.finish()
        except Exception as error:
            cause = run.first_failure(error)
            if isinstance(cause, GateFailed):
                run.summary.gate = to_json(cause.verdict)
            run.summary.error = redact(str(cause))
            cause.summary = run.summary.to_json()
            raise cause from error
        except KeyboardInterrupt:
            run.summary.error = "interrupted"
            run.collect_stages()
            raise Interrupted(run.summary.to_json()) from None


class Run:
    """The stages of one flow run, and its summary.

    Attributes:
        futures: The futures of the submitted stages by name, in the order of submission; a list for a stage in parts.
        summary: What the run has done so far.
    """

    def __init__(self, label: str, refresh: Collection[str]) -> None:
        self.label = label
        self.refresh = refresh
        self.futures: Futures = {}
        self.summary = Summary()
        self._times: Times = {}
        self._steps: dict[str, StageSummary] = {}
        self._exclusive: list[Future] = []
        self._one_at_a_time = False

    def submit(self, stage: Stage[...], name: str | None = None, exclusive: bool = False, **inputs: Any) -> Future:
        """Submit a stage as a Prefect task.

        Args:
            stage: The stage.
            name: Its name in this run, if the run has the stage several times.
            exclusive: Whether it uses every core or measures speed, and so waits for earlier exclusive stages.
            **inputs: The stage's inputs: futures of other stages, and plain values.

        Returns:
            The future of the reference of the stage's artifact.
        """
        name = name or stage.name
        future: Future = self._make_task(stage, name).submit(**inputs, wait_for=self._wait_for(exclusive))
        self.futures[name] = future
        if exclusive:
            self._exclusive = [future]
        return future

    def map(
        self, stage: Stage[...], name: str, parts: int, cluster: str | None = None, **inputs: Any
    ) -> list[Future] | Future:
        """Submit the parts of a stage, which together use every core: they wait for earlier exclusive stages.

        Args:
            stage: The stage, with the inputs `part` and `parts`.
            name: Its name in this run.
            parts: The number of parts.
            cluster: The address of a Dask or Ray cluster that runs them.
            **inputs: The stage's other inputs.

        Returns:
            The futures of the references of the parts' artifacts; on a cluster, the future of their list.
        """
        wait_for = self._wait_for(exclusive=True)
        futures: list[Future]
        if cluster is None:
            shared_inputs: dict[str, Any] = {
                field: unmapped(value) for field, value in {**inputs, "parts": parts}.items()
            }
            futures = list(self._make_task(stage, name).map(part=range(parts), wait_for=wait_for, **shared_inputs))
        else:
            label = f"{name.replace('_', ' ')} · {self.label}"
            # It is a task, so that the flow does not wait for it.
            on_cluster: Task[..., Any] = task(
                name=name, task_run_name=label, cache_policy=NO_CACHE, persist_result=False
            )(self._timed(name)(run_on_cluster))
            refresh = name in self.refresh
            futures = [on_cluster.submit(stage, label, cluster, parts, refresh, inputs, wait_for=wait_for)]
        self._exclusive = futures
        self.futures[name] = futures if cluster is None else futures[0]
        return self.futures[name]

    def _make_task(self, stage: Stage[...], name: str) -> Task[..., ArtifactRef]:
        return as_task(stage, self._timed(name)).with_options(
            task_run_name=f"{name.replace('_', ' ')} · {self.label}",
            refresh_cache=name in self.refresh,
            result_storage=store.home(),
        )

    def _wait_for(self, exclusive: bool) -> list[Any]:
        """Return what a stage has to wait for besides its inputs.

        These are stages that only share the machine with it, so they may fail.
        """
        earlier = self._exclusive if exclusive else []
        if self._one_at_a_time:
            earlier = [future for name in self.futures for future in self.all_futures(name)]
        return [allow_failure(future) for future in earlier]

    def all_futures(self, name: str) -> list[Future]:
        """Return the futures of a stage: one, or one for each part."""
        futures = self.futures[name]
        return futures if isinstance(futures, list) else [futures]

    def call(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function that takes seconds and writes no artifact, as a task in this process."""
        start = time.monotonic()
        state = "FAILED"
        task_run_name = f"{name.replace('_', ' ')} · {self.label}"
        try:
            value = task(name=name, task_run_name=task_run_name, persist_result=False, **retried(RETRIES))(
                self._timed(name)(function)
            )(*args, **kwargs)
            state = "COMPLETED"
        finally:
            self._steps[name] = StageSummary(name, state, seconds=round(time.monotonic() - start, 2))
        return value

    def _timed(self, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Return a decorator that records when the work of a stage starts and ends; cached stages do no work."""

        # The closure must not include the run, which cannot be pickled: Prefect sends it to a cluster.
        times = self._times

        def decorate(work: Callable[P, R]) -> Callable[P, R]:
            @functools.wraps(work)
            def timed(*args: P.args, **kwargs: P.kwargs) -> R:
                start = time.time()
                try:
                    return work(*args, **kwargs)
                finally:
                    times.setdefault(name, []).append((start, time.time()))

            return timed

        return decorate

    def fit_into_memory(self, bytes_per_model: int, workers: int) -> None:
        """Run one stage at a time if the available memory is not enough for an evaluation and OTHER_STAGES.

        Args:
            bytes_per_model: The memory that a process with a model takes.
            workers: The number of processes of an evaluation.
        """
        self._one_at_a_time = bytes_per_model * (workers + OTHER_STAGES) > machine.available_memory()

    def rename(self, name: str) -> None:
        """Rename the flow run in Prefect."""
        with get_client(sync_client=True) as client:
            client.update_flow_run(runtime.flow_run.id, name=name)

    def changed_nothing(self) -> bool:
        """Tell whether every stage was cached and nothing new was published."""
        publication = self.summary.publication
        cached = all(future.state.name == "Cached" for name in self.futures for future in self.all_futures(name))
        return cached and (publication is None or publication["state"] == "already published")

    def collect_stages(self) -> None:
        """Put one line for each stage into the summary: checks, then stages, then gate and publishing."""
        last_names = ("read_published", "check_gate", "publish")
        first_steps = [step for name, step in self._steps.items() if name not in last_names]
        last_steps = [step for name, step in self._steps.items() if name in last_names]
        self.summary.stages = (
            first_steps + [summarize(name, self.all_futures(name)) for name in self.futures] + last_steps
        )

    def finish(self) -> None:
        """Wait for the end of every stage that was submitted, collect the summary, and show the timeline."""
        for stage in self.futures:
            for future in self.all_futures(stage):
                future.wait()
        self.collect_stages()
        if self._times.keys() & self.futures.keys():
            show_timeline(self.label, self.summary.stages, self._times)

    def first_failure(self, error: Exception) -> RunError:
        """Return why the run failed: the failure of the first stage that failed, or else the error.

        A stage whose input failed never starts, and reports only that. A mistake of the user is reported as a UserError
        only if no stage has produced a result: if the Hub rejects a request after hours, the run has failed.
        """
        cause: BaseException = error
        name = next((step.name for step in self._steps.values() if step.state == "FAILED"), None)
        states = [(stage, future.state) for stage in self.futures for future in self.all_futures(stage)]
        for stage, state in states:
            if state.is_failed() or state.is_crashed():
                name, cause = stage, failure_of(state) or error
                break
        completed = any(state.is_completed() and state.name != "Cached" for _, state in states)
        if isinstance(cause, GateFailed) or (isinstance(cause, UserError) and not completed and name != "publish"):
            return cause
        cause = disk_failure(cause, *store.output_folders()) or cause
        message = str(cause) if isinstance(cause, RunError) else redact(f"{type(cause).__name__}: {cause}")
        return StageFailed(f"{name.replace('_', ' ')}: {message}" if name else message)


def summarize(name: str, futures: list[Future]) -> StageSummary:
    """Return the cost of a stage and whether it was cached; UNKNOWN if Prefect's API no longer answers.

    A stage in parts takes as long as its longest part, and is cached if all of its parts are.
    """
    state_name, cached = "UNKNOWN", False
    artifacts: list[Artifact] = []
    try:
        states = [future.state for future in futures]
        state_name = next((state.type.value for state in states if not state.is_completed()), "COMPLETED")
        cached = all(state.name == "Cached" for state in states)
        if state_name == "COMPLETED":
            artifacts = [open_artifact(ref) for future in futures for ref in _as_list(future.result())]
    except Exception:
        # The API or the artifact is gone, but the run still reports how it ended.
        artifacts = []
    if not artifacts:
        return StageSummary(name, state_name, cached)
    return StageSummary(
        name,
        state_name,
        cached,
        seconds=max(artifact.measured["seconds"] for artifact in artifacts),
        peak_rss_bytes=max(artifact.measured["peak_rss_bytes"] for artifact in artifacts),
        size_bytes=sum(artifact.size for artifact in artifacts),
        key=artifacts[0].key,
    )


def _as_list(result: ArtifactRef | list[ArtifactRef]) -> list[ArtifactRef]:
    return result if isinstance(result, list) else [result]
