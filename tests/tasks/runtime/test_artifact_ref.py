"""A reference opens exactly its own artifact, or fails."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.runtime import pruning, store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, digest_of_files, open_artifact, ref_of
from quantize_gemma.tasks.runtime.errors import StageFailed
from tests.tasks.runtime.test_pruning import PIN
from tests.tasks.runtime.test_store import KEY


def write(text: str) -> Callable[[Path], dict[str, Any]]:
    def work(target: Path) -> dict[str, Any]:
        for name in ("a", "b"):
            (target / name).write_text(text)
        return {}

    return work


def test_an_opened_artifact_stays_when_another_run_rebuilds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    store.produce("stage", KEY, write("old"))
    with subprocess.Popen(
        [sys.executable, "-c", PIN, str(tmp_path), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        assert reader.stdout.readline() == "pinned\n"
        old = store.load("stage", KEY)
        assert old is not None
        new = store.produce("stage", KEY, write("new"), refresh=True)
        pruning.remove_unfinished()
        assert [(old.path / name).read_text() for name in ("a", "b")] == ["old", "old"]
        assert [(new.path / name).read_text() for name in ("a", "b")] == ["new", "new"]
        with store.keep_pinned():
            # Its reference still opens it, although another artifact is current.
            assert open_artifact(ref_of(old)).path == old.path
            assert store.load("stage", KEY) == new
            # Now only this process has it open.
            reader.stdin.close()
            reader.wait()
            pruning.remove_unfinished()
            assert old.path.exists()
    pruning.remove_unfinished()
    assert not old.path.exists()


def test_an_unused_replaced_artifact_is_removed_and_its_reference_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    old = store.produce("stage", KEY, write("old"))
    store.produce("stage", KEY, write("new"), refresh=True)
    assert not old.path.exists()
    with (
        store.keep_pinned(),
        pytest.raises(StageFailed, match="was rebuilt by another run with different content: start this run again"),
    ):
        open_artifact(ref_of(old))
    shutil.rmtree(tmp_path)
    with store.keep_pinned(), pytest.raises(StageFailed, match="is damaged or missing in the store: start"):
        open_artifact(ref_of(old))


def test_a_corrupted_artifact_fails_and_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    artifact = store.produce("stage", KEY, write("good"))
    times = (artifact.path / "a").stat()
    (artifact.path / "a").write_text("gooe")
    os.utime(artifact.path / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    with store.keep_pinned(), pytest.raises(StageFailed, match="is damaged or missing in the store"):
        open_artifact(ref_of(artifact), rehash=True)
    assert "a was changed" in caplog.text
    assert (store.produce("stage", KEY, write("good")).path / "a").read_text() == "good"


def test_the_digest_of_several_artifacts_has_every_file_and_not_how_they_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))

    def produce(**contents: str) -> ArtifactRef:
        def work(target: Path) -> dict[str, Any]:
            for name, text in contents.items():
                (target / name).write_text(text)
            return {}

        return ref_of(store.produce("stage", store.key("stage", [], {**contents}, {}), work))

    whole = digest_of_files([produce(a="1", b="2")])
    assert digest_of_files([produce(a="1"), produce(b="2")]) == whole
    assert digest_of_files([produce(b="2"), produce(a="1")]) == whole
    digests = [digest_of_files([produce(order=text), produce(order="last")]) for text in ("one", "another", "last")]
    assert len(set(digests)) == 3
