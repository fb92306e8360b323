"""An artifact is complete and unchanged, or it is not there."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import store

KEY = "a" * 64


def write_file(target: Path) -> dict[str, Any]:
    (target / "weights.bin").write_bytes(b"12345678")
    return {"metadata": {"tensors": 1}, "measured": {"seconds": 1.0}}


def test_work_runs_once_for_one_key(tmp_path: Path) -> None:
    calls = []

    def work(target: Path) -> dict[str, Any]:
        calls.append(target)
        return write_file(target)

    first = store.produce("stage", KEY, work, tmp_path)
    assert store.produce("stage", KEY, work, tmp_path) == first
    assert len(calls) == 1
    assert first.files["weights.bin"].size == 8


def test_the_digest_depends_on_content_and_not_on_what_was_measured(tmp_path: Path) -> None:
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


def test_a_file_that_was_only_touched_is_still_trusted(tmp_path: Path) -> None:
    path = store.produce("stage", KEY, write_file, tmp_path).path / "weights.bin"
    os.utime(path, (1, 1))
    assert store.load("stage", KEY, tmp_path) is not None


def test_work_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def work(target: Path) -> dict[str, Any]:
        write_file(target)
        raise store.UserError("no")

    with pytest.raises(store.UserError):
        store.produce("stage", KEY, work, tmp_path)
    left = {path for path in tmp_path.rglob("*") if not path.name.startswith(".lock")}
    assert left == {tmp_path / store.MARK, tmp_path / "stage"}


def test_prune_removes_debris_of_dead_work_and_leaves_living_work_alone(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tasks import store\n"
        "def work(target):\n"
        "    (target / 'half').write_text('x'); print('working', flush=True); time.sleep(60)\n"
        f"store.produce('stage', {KEY!r}, work, Path({str(tmp_path)!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        assert store.prune(tmp_path).paths == []
        process.kill()
    assert store.load("stage", KEY, tmp_path) is None
    assert len(store.prune(tmp_path).paths) == 1
    assert not list(tmp_path.glob("*/.partial-*"))


def test_two_processes_that_want_one_key_do_the_work_once(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from tasks import store\n"
        "def work(target):\n"
        f"    Path({str(tmp_path)!r}, 'calls').open('a').write('x'); time.sleep(1)\n"
        "    (target / 'a').write_text('x'); return {}\n"
        f"print(store.produce('stage', {KEY!r}, work, Path({str(tmp_path)!r}, 'store')).digest)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate(timeout=60)[0] for process in both}
    assert len(digests) == 1
    assert (tmp_path / "calls").read_text() == "x"


def test_keys_do_not_depend_on_order_or_time() -> None:
    first = store.key("stage", 1, ["a"], {"x": 1, "y": 2}, ["torch"])
    time.sleep(0.01)
    assert store.key("stage", 1, ["a"], {"y": 2, "x": 1}, ["torch"]) == first
    assert store.key("stage", 2, ["a"], {"y": 2, "x": 1}, ["torch"]) != first


def test_a_refresh_replaces_the_artifact_and_a_failing_one_leaves_it(tmp_path: Path) -> None:
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
    assert [path.name for path in (tmp_path / "stage").iterdir() if path.name.startswith(store.PREFIX)] == []


def test_a_shared_file_that_was_damaged_is_linked_again_from_its_owner_and_no_other(tmp_path: Path) -> None:
    owner = store.produce("owner", KEY, write_file, tmp_path)

    def borrow(target: Path) -> dict[str, Any]:
        store.link(owner.path / "weights.bin", target / "weights.bin")
        return {}

    borrower = store.produce("borrower", KEY, borrow, tmp_path)
    os.truncate(borrower.path / "weights.bin", 3)
    # The same inode: both are damaged, and there is nothing to link again from.
    assert store.load("borrower", KEY, tmp_path) is None
    assert store.load("owner", KEY, tmp_path) is None
    store.produce("owner", KEY, write_file, tmp_path)
    assert store.load("borrower", KEY, tmp_path) == borrower
    assert (borrower.path / "weights.bin").read_bytes() == b"12345678"


def test_what_comes_from_outside_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"12345678")
    store.copy(tmp_path / "mine", tmp_path / "theirs")
    (tmp_path / "mine").write_bytes(b"changed")
    assert (tmp_path / "theirs").read_bytes() == b"12345678"


def test_evicting_starts_with_the_longest_unused_and_leaves_what_a_process_holds(tmp_path: Path) -> None:
    keys = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]
    for days, key in zip((40, 30, 20, 10), keys, strict=True):
        made = store.produce("stage", key, write_file, tmp_path)
        old = time.time() - days * 86_400
        for path in (made.path.parent / store.MANIFEST, made.path.parent):
            os.utime(path, (old, old))
    each = disk_usage(made.path.parent)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), keys[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        # Four are there; two may stay. The first is the oldest, but in use.
        before = store.size_of(tmp_path)
        evicted = store.evict(before - 2 * each, 1000 * 86_400, tmp_path)
        assert [path.name for path in evicted.paths] == keys[1:3]
        assert evicted.bytes == 2 * each
        assert [path.name for path in store.evict(1e9, 5 * 86_400, tmp_path).paths] == keys[3:]
    finally:
        holder.communicate()
    assert store.load("stage", keys[0], tmp_path) is not None
    assert [path.name for path in store.evict(0, 1e9, tmp_path).paths] == keys[:1]
    assert not list(tmp_path.glob("stage/*/*")), "nothing but locks"


def disk_usage(path: Path) -> int:
    return int(subprocess.run(["du", "-s", "-B1", path], capture_output=True, check=True).stdout.split()[0])


HOLD = """
import sys
from pathlib import Path
from tasks import store
store.pin("stage", sys.argv[2], Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
