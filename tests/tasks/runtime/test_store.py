"""An artifact is complete and unchanged, or it is not there."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.evaluate import shards
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import open_artifact, ref_of
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError

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
        raise UserError("no")

    with pytest.raises(UserError):
        store.produce("stage", KEY, work, tmp_path)
    assert [path for path in tmp_path.rglob("*") if not path.name.startswith(".lock")] == [tmp_path / "stage"]


def test_prune_removes_debris_of_dead_work_and_leaves_living_work_alone(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from quantize_gemma.tasks.runtime import store\n"
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
        "import time; from pathlib import Path; from quantize_gemma.tasks.runtime import store\n"
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
    first = store.key("stage", ["a"], {"x": 1, "y": 2}, {"code": "1"})
    time.sleep(0.01)
    assert store.key("stage", ["a"], {"y": 2, "x": 1}, {"code": "1"}) == first
    assert store.key("stage", ["a"], {"y": 2, "x": 1}, {"code": "2"}) != first


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
    each = disk_usage(made.path.parents[1])
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
from quantize_gemma.tasks.runtime import store
store.pin("stage", sys.argv[2], Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def write(text: str) -> Callable[[Path], dict[str, Any]]:
    def work(target: Path) -> dict[str, Any]:
        for name in ("a", "b"):
            (target / name).write_text(text)
        return {}

    return work


def test_what_a_run_has_opened_stays_as_it_was_when_another_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    store.produce("stage", KEY, write("old"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        assert reader.stdout.readline() == "held\n"
        old = store.load("stage", KEY)
        assert old is not None
        new = store.produce("stage", KEY, write("new"), refresh=True)
        store.prune()
        assert [(old.path / name).read_text() for name in ("a", "b")] == ["old", "old"]
        assert [(new.path / name).read_text() for name in ("a", "b")] == ["new", "new"]
        # Its reference finds it, though another one is current.
        assert open_artifact(ref_of(old)).path == old.path
        assert store.load("stage", KEY) == new
        # This process has it open now.
        reader.stdin.close()
    store.prune()
    assert old.path.exists()


def test_a_generation_that_nobody_holds_goes_when_it_is_replaced_and_its_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    old = store.produce("stage", KEY, write("old"))
    store.produce("stage", KEY, write("new"), refresh=True)
    assert not old.path.exists()
    with pytest.raises(StageFailed, match="was made again by another run, with another content: start this run again"):
        open_artifact(ref_of(old))
    shutil.rmtree(tmp_path)
    with pytest.raises(StageFailed, match="has gone from it: start the run again"):
        open_artifact(ref_of(old))


def test_a_file_that_the_disk_has_changed_is_no_input_and_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    made = store.produce("stage", KEY, write("good"))
    times = (made.path / "a").stat()
    (made.path / "a").write_text("gooe")
    os.utime(made.path / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StageFailed, match="was damaged in the store"):
        open_artifact(ref_of(made), whole=True)
    assert "a was changed" in caplog.text
    assert (store.produce("stage", KEY, write("good")).path / "a").read_text() == "good"


def scorer(root: str, removed: str) -> Callable[[list[Any]], list[Any]]:
    def score(requests: list[Any]) -> list[Any]:
        # A prune beside the evaluation, once, when some shards were answered.
        if any(path.parent.name == shards.STAGE for path in store._places(Path(root))) and not os.path.exists(removed):
            Path(removed).write_text("\n".join(map(str, store.evict(0, 0, Path(root)).paths)))
        return [f"answer to {request}" for request in requests]

    return score


@pytest.mark.parametrize("cluster", [None, "tcp://elsewhere:1"])
def test_shards_that_are_pruned_from_a_running_evaluation_are_held_or_answered_again(
    tmp_path: Path, cluster: str | None
) -> None:
    asked = {name: [f"{name}{number}" for number in range(150)] for name in ("x", "y", "z")}
    settings = {"root": str(tmp_path / "store"), "removed": str(tmp_path / "removed")}
    answered = shards.respond(
        asked, "tests.tasks.runtime.test_store:scorer", settings, {}, {}, tmp_path / "store", cluster=cluster
    )
    assert answered == {name: [f"answer to {request}" for request in requests] for name, requests in asked.items()}
    removed = (tmp_path / "removed").read_text()
    assert ("responses" in removed) == (cluster is not None)


def test_size_is_what_du_says_and_pruning_counts_what_it_frees(tmp_path: Path) -> None:
    def large(target: Path) -> dict[str, Any]:
        (target / "weights").write_bytes(os.urandom(1 << 20))
        (target / "config").write_text("{}")
        return {}

    base = store.produce("download", "a" * 64, large, tmp_path)

    def borrow(target: Path) -> dict[str, Any]:
        store.link(base.path / "weights", target / "weights")
        return {}

    store.produce("untie", "b" * 64, borrow, tmp_path)
    assert store.size_of(tmp_path) == disk_usage(tmp_path)
    for path in (base.path.parent, base.path.parent / store.MANIFEST):
        os.utime(path, (0, 0))
    evicted = store.evict(1e18, 86_400, tmp_path)
    assert [path.parent.name for path in evicted.paths] == ["download"]
    assert evicted.bytes < 1 << 20, "its weights are the untied checkpoint's, too"
    assert store.size_of(tmp_path) == disk_usage(tmp_path)
    before = disk_usage(tmp_path)
    assert store.evict(0, 0, tmp_path).bytes == before - disk_usage(tmp_path) > 1 << 20


def test_a_store_is_read_once_to_be_emptied(tmp_path: Path) -> None:
    for number in range(40):
        store.produce("stage", f"{number:064x}"[::-1], write_file, tmp_path)
    script = (
        "import sys; from pathlib import Path; from quantize_gemma.tasks.runtime import store; opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        f"assert len(store.evict(0, 0, Path({str(tmp_path)!r})).paths) == 40\n"
        "print(sum(path.endswith(store.MANIFEST) for path in opened))\n"
    )
    opened = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(opened) <= 3 * 40


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "project" / "app"
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text('{"name": "app", "stage": "beta", "key": 1}')
    (tmp_path / "project" / ".partial-upload").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for remove in (store.prune, lambda root: store.evict(0, 0, root)):
        with pytest.raises(UserError, match=f"{tmp_path} is no store of quantize-gemma, and nothing was removed"):
            remove(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    # A run was started here by mistake: what it wrote is ours, and nothing else.
    store.produce("stage", KEY, write_file, tmp_path)
    store.prune(tmp_path)
    assert [path.name for path in store.evict(0, 0, tmp_path).paths] == [KEY]
    assert set(before) <= set(tmp_path.rglob("*"))


def test_an_artifact_of_the_version_before_is_a_miss_and_goes_when_its_time_has_come(tmp_path: Path) -> None:
    made = store.produce("stage", KEY, write_file, tmp_path)
    manifest = json.loads((made.path.parent / store.MANIFEST).read_text())
    del manifest["checksum"]
    old = tmp_path / "before" / "stage" / KEY
    shutil.copytree(made.path.parent, old)
    (old.parent / f".lock-{KEY[:16]}").touch()
    (old / store.MANIFEST).write_text(json.dumps(manifest))
    assert store.load("stage", KEY, tmp_path / "before") is None
    assert [path.name for path in store.evict(0, 0, tmp_path / "before").paths] == [KEY]
    assert not old.exists()


def test_a_full_disk_leaves_nothing_and_what_was_there_before(tmp_path: Path) -> None:
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
