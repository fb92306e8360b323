"""The store returns a complete and unchanged artifact, or none."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.runtime import store, store_layout
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError

KEY = "a" * 64


def write_file(target: Path) -> dict[str, Any]:
    (target / "weights.bin").write_bytes(b"12345678")
    return {"metadata": {"tensors": 1}, "measured": {"seconds": 1.0}}


def test_an_artifact_is_made_once(tmp_path: Path) -> None:
    calls = []

    def work(target: Path) -> dict[str, Any]:
        calls.append(target)
        return write_file(target)

    first = store.produce("stage", KEY, work, tmp_path)
    assert store.produce("stage", KEY, work, tmp_path) == first
    assert len(calls) == 1
    assert first.files["weights.bin"].size == 8


def test_the_digest_depends_on_content_and_not_on_measurements(tmp_path: Path) -> None:
    def slower(target: Path) -> dict[str, Any]:
        return {**write_file(target), "measured": {"seconds": 9.0}}

    def other(target: Path) -> dict[str, Any]:
        (target / "weights.bin").write_bytes(b"87654321")
        return {"metadata": {"tensors": 1}}

    digests = [store.produce("stage", KEY, work, tmp_path / str(i)).digest for i, work in
               enumerate([write_file, slower, other])]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "no manifest", "torn manifest"])
def test_a_damaged_artifact_is_a_miss_that_names_the_file(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.produce("stage", KEY, write_file, tmp_path).path / "weights.bin"
    manifest = path.parent.parent / "manifest.json"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 3)
    elif damage == "changed":
        path.write_bytes(b"12345679")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        os.truncate(manifest, 20)
    with caplog.at_level(logging.WARNING):
        assert store.load("stage", KEY, tmp_path) is None
    assert ("manifest" if "manifest" in damage else "weights.bin") in caplog.text
    assert store.produce("stage", KEY, write_file, tmp_path).files["weights.bin"].size == 8


def test_an_artifact_whose_file_was_only_touched_is_complete(tmp_path: Path) -> None:
    path = store.produce("stage", KEY, write_file, tmp_path).path / "weights.bin"
    os.utime(path, (1, 1))
    assert store.load("stage", KEY, tmp_path) is not None


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def work(target: Path) -> dict[str, Any]:
        write_file(target)
        raise UserError("no")

    with pytest.raises(UserError):
        store.produce("stage", KEY, work, tmp_path)
    assert [path for path in tmp_path.rglob("*") if not path.name.startswith(".lock")] == [tmp_path / "stage"]


def test_if_two_processes_need_an_artifact_one_of_them_builds_it(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from quantize_gemma.tasks.runtime import store\n"
        "def work(target):\n"
        f"    Path({str(tmp_path)!r}, 'calls').open('a').write('x'); time.sleep(1)\n"
        "    (target / 'a').write_text('x'); return {}\n"
        f"print(store.produce('stage', {KEY!r}, work, Path({str(tmp_path)!r}, 'store')).digest)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate(timeout=60)[0] for process in processes}
    assert len(digests) == 1
    assert (tmp_path / "calls").read_text() == "x"


def test_a_key_does_not_depend_on_the_order_of_parameters_or_the_time() -> None:
    first = store.key("stage", ["a"], {"x": 1, "y": 2}, {"code": "1"})
    time.sleep(0.01)
    assert store.key("stage", ["a"], {"y": 2, "x": 1}, {"code": "1"}) == first
    assert store.key("stage", ["a"], {"y": 2, "x": 1}, {"code": "2"}) != first


def test_a_refresh_replaces_the_artifact_and_a_failing_refresh_keeps_it(tmp_path: Path) -> None:
    before = store.produce("stage", KEY, write_file, tmp_path)

    def fail(target: Path) -> dict[str, Any]:
        (target / "weights.bin").write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.produce("stage", KEY, fail, tmp_path, refresh=True)
    assert store.load("stage", KEY, tmp_path) == before
    after = store.produce(
        "stage", KEY, lambda target: {**write_file(target), "measured": {"seconds": 2.0}}, tmp_path, refresh=True
    )
    assert after.digest == before.digest
    assert after.measured == {"seconds": 2.0}
    assert [path.name for path in (tmp_path / "stage").iterdir() if path.name.startswith(store_layout.PARTIAL)] == []


def test_an_artifact_in_a_copy_without_links_is_replaced_unless_a_process_reads_it(tmp_path: Path) -> None:
    store.produce("stage", KEY, write_file, tmp_path / "store")
    copy = shutil.copytree(tmp_path / "store", tmp_path / "copy")
    before = store.load("stage", KEY, copy)
    assert before is not None
    assert before.path.parent.name == store_layout.CURRENT
    lock = store_layout.lock_for_reading(before.path.parent / store_layout.MANIFEST)
    assert lock is not None
    with pytest.raises(StageFailed, match=f"{copy}/stage/{KEY} cannot be replaced, because another run is reading it"):
        store.produce("stage", KEY, write_file, copy, refresh=True)
    assert store.load("stage", KEY, copy) == before
    assert not list(copy.glob("*/.partial-*"))
    os.close(lock)
    assert store.produce("stage", KEY, write_file, copy, refresh=True).path.parent.name != store_layout.CURRENT


def test_a_damaged_shared_file_is_linked_again_from_its_owner_and_no_other(tmp_path: Path) -> None:
    owner = store.produce("owner", KEY, write_file, tmp_path)

    def borrow(target: Path) -> dict[str, Any]:
        store.link(owner.path / "weights.bin", target / "weights.bin")
        return {}

    borrower = store.produce("borrower", KEY, borrow, tmp_path)
    os.truncate(borrower.path / "weights.bin", 3)
    # Both have the same inode, so both are damaged, and there is no intact file to link again.
    assert store.load("borrower", KEY, tmp_path) is None
    assert store.load("owner", KEY, tmp_path) is None
    store.produce("owner", KEY, write_file, tmp_path)
    assert store.load("borrower", KEY, tmp_path) == borrower
    assert (borrower.path / "weights.bin").read_bytes() == b"12345678"


def test_a_copy_into_the_store_does_not_change_with_its_source(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"12345678")
    store.copy(tmp_path / "mine", tmp_path / "theirs")
    (tmp_path / "mine").write_bytes(b"changed")
    assert (tmp_path / "theirs").read_bytes() == b"12345678"


def test_a_full_disk_leaves_nothing_behind_and_keeps_the_existing_artifact(tmp_path: Path) -> None:
    before = store.produce("stage", KEY, write_file, tmp_path)

    def fill(target: Path) -> dict[str, Any]:
        (target / "half").write_text("half")
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"x")
        return {}

    with pytest.raises(StageFailed, match=f"the disk of {tmp_path} is full"):
        store.produce("stage", KEY, fill, tmp_path, refresh=True)
    assert store.load("stage", KEY, tmp_path) == before
    assert not list(tmp_path.glob("*/.partial-*"))


@pytest.mark.parametrize("folder", ["/a", "/a/b/c/d/e"])
def test_a_directory_that_is_in_no_store_has_no_digest_and_gets_a_temporary_store(folder: str) -> None:
    with store.open_store({"checkpoint": Path(folder)}) as (root, digests):
        assert digests == {}
        assert root.is_dir()
    assert not root.exists()
