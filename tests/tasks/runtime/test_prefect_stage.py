"""A stage is a Prefect task whose cached result is the reference of an artifact that is still in the store."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quantize_gemma.flows.run import Run
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, open_artifact
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.prefect_stage import as_task, key_of
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage

ROOT = Path(__file__).parents[3]


@stage()
def write(target: Path, text: str) -> Output:
    """Write a file."""
    (target / "file").write_text(text)
    return {}


@stage()
def double(target: Path, source: Path) -> Output:
    """Write the content of another stage's file twice."""
    (target / "file").write_text((source / "file").read_text() * 2)
    return {}


@stage()
def count_up(target: Path) -> Output:
    """Report progress, in a stage whose name has an underscore."""
    report_progress(1, 4, "steps")
    (target / "file").write_text("done")
    return {}


@stage()
def fail(target: Path) -> Output:
    """Fail."""
    raise StageFailed(f"nothing is written to {target.name}")


@pytest.mark.slow
def test_a_stage_is_cached_as_long_as_its_cached_result_is_the_reference_of_its_artifact(tmp_path: Path) -> None:
    environment = {**os.environ, "QUANTIZE_GEMMA_HOME": str(tmp_path), "QUANTIZE_GEMMA_LOCAL_SERVER": "1"}
    command = [sys.executable, "-m", "tests.tasks.runtime.test_prefect_stage"]
    result = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert outcomes.pop("progress") == [100.0]
    # The second stage only had to wait for the first one, and the third one needed its result.
    assert outcomes.pop("after a failure") == ["Failed", "Completed", "NotReady"]
    assert outcomes.pop("first") == ["Completed", "Completed", "texttext"]
    assert outcomes.pop("second") == ["Cached", "Cached", "texttext"]
    # The artifact still exists, so the stage that uses it is cached.
    assert set(map(tuple, outcomes.values())) == {("Completed", "Cached", "texttext")}
    assert len(outcomes) == 4


def test_a_key_depends_on_the_content_of_an_input_and_not_on_where_it_comes_from() -> None:
    ref = ArtifactRef("write", "a" * 64, "b" * 64, 1)
    same = [ref, replace(ref, stage="download", key="c" * 64, size=2)]
    assert len({key_of(double, {"source": one}) for one in same}) == 1
    assert key_of(double, {"source": replace(ref, digest="c" * 64)}) != key_of(double, {"source": ref})


def main() -> None:
    """Run the stages with each kind of cached result; print the names of their states and their output as JSON."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.filesystems import LocalFileSystem
    from prefect.results import ResultStore
    from prefect.serializers import JSONSerializer
    from prefect.testing.utilities import prefect_test_harness

    @flow
    def run_stages() -> list[str]:
        options = {"task_run_name": "stage · test", "result_storage": store.home()}
        with store.keep_pinned():
            first = as_task(write).with_options(**options).submit(text="text")
            second = as_task(double).with_options(**options).submit(source=first)
            text = (open_artifact(second.result()).path / "file").read_text()
            return [first.state.name, second.state.name, text]

    place = store.home() / "write" / key_of(write, {"text": "text"})
    path = place / "result.json"

    def results() -> ResultStore:
        """Return a new result store, whose in-memory cache is empty."""
        return ResultStore(result_storage=LocalFileSystem(basepath=str(place)), serializer=JSONSerializer())

    def damaged(damage: Callable[[ArtifactRef], object]) -> list[str]:
        ref = results().read(path.name).result
        assert isinstance(ref, ArtifactRef)
        damage(ref)
        outcome = run_stages()
        assert results().read(path.name).result == ref
        return outcome

    @flow
    def show_progress() -> list[float | None]:
        with store.keep_pinned():
            as_task(count_up).with_options(task_run_name="stage · test", result_storage=store.home()).submit().result()
        with get_client(sync_client=True) as client:
            artifacts = client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["progress-count-up"]))
            )
        return [artifact.data for artifact in artifacts]

    @flow
    def continue_after_failure() -> list[str]:
        run = Run("test", ())
        run.fit_into_memory(2**60, 1)  # Run one stage at a time.
        with store.keep_pinned():
            failed = run.submit(fail)
            futures = [failed, run.submit(write, text="another text"), run.submit(double, source=failed)]
            for future in futures:
                future.wait()
        return [future.state.name for future in futures]

    with prefect_test_harness(server_startup_timeout=120):
        outcomes = {
            "after a failure": continue_after_failure(),
            "progress": show_progress(),
            "first": run_stages(),
            "second": run_stages(),
            # Earlier versions cached references like this.
            "a dictionary": damaged(lambda ref: results().write(asdict(ref), path.name)),
            "another artifact": damaged(lambda ref: results().write(replace(ref, digest="0" * 64), path.name)),
            "half a file": damaged(lambda _: os.truncate(path, path.stat().st_size // 2)),
            "no file": damaged(lambda _: path.unlink()),
        }
    print(json.dumps(outcomes))


if __name__ == "__main__":
    # Call the imported module, where a worker finds the stages.
    from tests.tasks.runtime import test_prefect_stage

    test_prefect_stage.main()
