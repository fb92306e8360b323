"""What Prefect does with a stage: cache key, persistence, retries, time-out. The only file that knows.

A stage's result is cached under its store key and kept as JSON inside its artifact, so that an artifact that is
removed or damaged is a miss and runs again.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from tasks import process, store
from tasks.store import Artifact, StageFailed, UserError

Work = Callable[..., dict[str, Any]]

_seconds_between_updates = 2.0


def stage(
    work: Work,
    name: str,
    version: int = 1,
    libraries: tuple[str, ...] = (),
    retries: int = 0,
    ignored: tuple[str, ...] = (),
) -> Task[..., dict[str, Any]]:
    """Returns the Prefect task over `work(target, **inputs)`, which fills `target` in a process of its own.

    The task takes artifact records and plain JSON values by keyword and returns the record {"stage", "key",
    "digest", "size"} of the artifact. Inputs named in `ignored` shape no output and do not count in its key.
    """

    def key_of(inputs: dict[str, Any]) -> str:
        counted = {field: value for field, value in sorted(inputs.items()) if field not in ignored}
        digests = [f"{field}={value['digest']}" for field, value in counted.items() if is_record(value)]
        parameters = {field: value for field, value in counted.items() if not is_record(value)}
        return store.key(name, version, digests, parameters, list(libraries))

    def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        key = key_of(parameters["inputs"])
        # Loading looks at every file and removes a damaged artifact, the cached result inside it too.
        store.load(name, key)
        return f"{name}/{key}/result.json"

    def run(**inputs: Any) -> dict[str, Any]:
        logger = get_run_logger()

        def make(target: Path) -> dict[str, Any]:
            arguments = {
                field: str(open_record(value).path) if is_record(value) else value for field, value in inputs.items()
            }
            function = f"{work.__module__}:{work.__name__}"
            with _Progress(name) as progress:
                return process.run(
                    "tasks.policies:call",
                    {"function": function, "target": str(target), "arguments": arguments},
                    progress,
                    logger,
                )

        artifact = store.produce(name, key_of(inputs), make)
        return record(artifact)

    run.__name__ = name.replace("-", "_")
    run.__doc__ = work.__doc__
    decorate = task(
        name=name,
        cache_key_fn=cache_key,
        persist_result=True,
        result_serializer="json",
        retries=retries,
        retry_delay_seconds=[2.0**attempt for attempt in range(1, retries + 1)] or 0,
        retry_jitter_factor=1.0 if retries else None,
        retry_condition_fn=_is_transient,
        on_failure=[_discard_failure],
    )
    return decorate(run)


def call(function: str, target: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Calls a stage's work inside its own process; arguments that are paths of artifacts arrive as Path."""
    import importlib

    module, name = function.split(":")
    work: Work = getattr(importlib.import_module(module), name)
    root = str(store.home())
    paths = {
        field: Path(value) if isinstance(value, str) and value.startswith(root) else value
        for field, value in arguments.items()
    }
    return work(Path(target), **paths)


def record(artifact: Artifact) -> dict[str, Any]:
    """Returns what stages hand to each other: which artifact it is, and the digest of its content."""
    return {"stage": artifact.stage, "key": artifact.key, "digest": artifact.digest, "size": artifact.size}


def is_record(value: Any) -> bool:
    """Tells a record of an artifact from a plain value."""
    return isinstance(value, dict) and set(value) == {"stage", "key", "digest", "size"}


def open_record(value: dict[str, Any]) -> Artifact:
    """Returns the artifact of a record. Raises StageFailed if it has gone since."""
    artifact = store.load(value["stage"], value["key"])
    if artifact is None:
        raise StageFailed(f"{value['stage']}/{value['key'][:12]} has gone from the store: start the run again")
    return artifact


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    try:
        state.result()
    except (UserError, MemoryError):
        return False
    except StageFailed as error:
        message = str(error)
        return any(word in message for word in ("ConnectionError", "Timeout", "429", "50", "ConnectError"))
    except BaseException:
        return False
    return False


def _discard_failure(_task: Any, _run: Any, state: Any) -> None:
    """Prefect keeps a failure's exception as a file in the result storage, which here is the store: nothing stays."""
    kept = getattr(getattr(state.data, "metadata", state.data), "storage_key", None)
    if kept is not None and Path(kept).parent == store.home():
        Path(kept).unlink(missing_ok=True)


class _Progress:
    """A stage's progress: a bar in the terminal, and an artifact in Prefect's UI."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.artifact: UUID | None = None
        self.updated = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.artifact is not None:
            update_progress_artifact(self.artifact, progress=100.0)

    def __call__(self, done: int, total: int, what: str) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self.bar is None or self.bar.total != total:
                self.bar = tqdm(total=total, desc=f"{self.name}: {what}", leave=False)
            self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if now - self.updated < _seconds_between_updates:
            return
        self.updated = now
        percent = 100.0 * done / max(total, 1)
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, key=f"progress-{self.name}", description=what)  # type: ignore[assignment]
        else:
            update_progress_artifact(self.artifact, progress=percent)
