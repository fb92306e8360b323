"""Pruning removes what no process reads, and reports the space that this frees."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.evaluate.answer import STAGE, Scorer, respond
from quantize_gemma.tasks.models.requests import Request
from quantize_gemma.tasks.runtime import pruning, store, store_layout
from quantize_gemma.tasks.runtime.errors import UserError
from tests.tasks.runtime.test_store import KEY, write_file

PIN = """
import sys
from pathlib import Path
from quantize_gemma.tasks.runtime import store
with store.keep_pinned():
    store.pin("stage", sys.argv[2], Path(sys.argv[1]))
    print("pinned", flush=True)
    sys.stdin.read()
"""


def disk_usage(path: Path) -> int:
    return int(subprocess.run(["du", "-s", "-B1", path], capture_output=True, check=True).stdout.split()[0])


def test_pruning_removes_unfinished_work_and_keeps_work_in_progress(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from quantize_gemma.tasks.runtime import store\n"
        "def work(target):\n"
        "    (target / 'half').write_text('x'); print('working', flush=True); time.sleep(60)\n"
        f"store.produce('stage', {KEY!r}, work, Path({str(tmp_path)!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        assert pruning.remove_unfinished(tmp_path).paths == []
        process.kill()
    assert store.load("stage", KEY, tmp_path) is None
    assert len(pruning.remove_unfinished(tmp_path).paths) == 1
    assert not list(tmp_path.glob("*/.partial-*"))


REMEMBER = """
from quantize_gemma.tasks import download
from quantize_gemma.tasks.models.resolved import ResolvedDataset
download.remember(ResolvedDataset("a/b", "0" * 40, "a/b", False, True), "main")
"""
LINK_AGAIN = f"""
from quantize_gemma.tasks.runtime import store
store.load("borrower", {KEY!r})
"""


@pytest.mark.parametrize("script", [REMEMBER, LINK_AGAIN])
def test_pruning_removes_the_file_of_a_process_that_was_killed_before_it_renamed_it(
    script: str, tmp_path: Path
) -> None:
    owner = store.produce("owner", KEY, write_file, tmp_path)

    def borrow(target: Path) -> dict[str, Any]:
        store.link(owner.path / "weights.bin", target / "weights.bin")
        return {}

    borrower = store.produce("borrower", KEY, borrow, tmp_path)
    (borrower.path / "weights.bin").unlink()
    (borrower.path / "weights.bin").write_bytes(b"damaged")
    killed = "import os, sys\nsys.addaudithook(lambda event, _: event == 'os.rename' and os.kill(os.getpid(), 9))\n"
    environment = {**os.environ, "QUANTIZE_GEMMA_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", killed + script], env=environment).returncode == -signal.SIGKILL
    # The unfinished file must not become part of the artifact.
    assert [path.name for path in borrower.path.iterdir()] == ["weights.bin"]
    assert len(pruning.remove_unfinished(tmp_path).paths) == 1
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(store_layout.PARTIAL)]


def test_eviction_starts_with_the_least_recently_used_and_keeps_artifacts_in_use(tmp_path: Path) -> None:
    keys = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]
    for days, key in zip((40, 30, 20, 10), keys, strict=True):
        artifact = store.produce("stage", key, write_file, tmp_path)
        old = time.time() - days * 86_400
        for path in (artifact.path.parent / store_layout.MANIFEST, artifact.path.parent):
            os.utime(path, (old, old))
    each = disk_usage(artifact.path.parents[1])
    reader = subprocess.Popen(
        [sys.executable, "-c", PIN, str(tmp_path), keys[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"pinned\n"
    try:
        # There are four artifacts, and two may stay. The first is the oldest, but is in use.
        before = pruning.store_size(tmp_path)
        evicted = pruning.evict(before - 2 * each, 1000 * 86_400, tmp_path)
        assert [path.name for path in evicted.paths] == keys[1:3]
        assert evicted.bytes == 2 * each
        assert [path.name for path in pruning.evict(1e9, 5 * 86_400, tmp_path).paths] == keys[3:]
    finally:
        reader.communicate()
    assert store.load("stage", keys[0], tmp_path) is not None
    assert [path.name for path in pruning.evict(0, 1e9, tmp_path).paths] == keys[:1]
    assert not list(tmp_path.glob("stage/*/*")), "nothing but locks"


def scorer(artifact: str, root: str, removed: str) -> Callable[[list[Any]], list[Any]]:
    def score(requests: list[Any]) -> list[Any]:
        # Prune once during the evaluation, when some shards are complete.
        stages = {path.parent.name for path in store_layout.artifact_folders(Path(root))}
        if STAGE in stages and not os.path.exists(removed):
            Path(removed).write_text("\n".join(map(str, pruning.evict(0, 0, Path(root)).paths)))
        return [f"answer to {request.arguments[0]}" for request in requests]

    return score


def test_answers_that_are_pruned_while_others_are_computed_are_not_lost(tmp_path: Path) -> None:
    def write(target: Path) -> dict[str, Any]:
        (target / "file").write_text("content")
        return {}

    artifact = store.produce("quantize", "0" * 64, write, tmp_path / "store").path
    shards = {
        name: [Request(name, number, 0, "generate_until", [f"{name}{number}"]) for number in range(150)]
        for name in ("x", "y", "z")
    }
    settings = {"root": str(tmp_path / "store"), "removed": str(tmp_path / "removed")}
    answers = respond(shards, Scorer("tests.tasks.runtime.test_pruning:scorer", {"artifact": artifact}, settings))
    assert answers == {name: [f"answer to {name}{number}" for number in range(150)] for name in shards}
    assert "responses" in (tmp_path / "removed").read_text()


def test_sizes_match_those_of_du(tmp_path: Path) -> None:
    def large(target: Path) -> dict[str, Any]:
        (target / "weights").write_bytes(os.urandom(1 << 20))
        (target / "config").write_text("{}")
        return {}

    base = store.produce("download", "a" * 64, large, tmp_path)

    def borrow(target: Path) -> dict[str, Any]:
        store.link(base.path / "weights", target / "weights")
        return {}

    store.produce("untie", "b" * 64, borrow, tmp_path)
    assert pruning.store_size(tmp_path) == disk_usage(tmp_path)
    for path in (base.path.parent, base.path.parent / store_layout.MANIFEST):
        os.utime(path, (0, 0))
    evicted = pruning.evict(1e18, 86_400, tmp_path)
    assert [path.parent.name for path in evicted.paths] == ["download"]
    assert evicted.bytes < 1 << 20, "its weights are the untied checkpoint's, too"
    assert pruning.store_size(tmp_path) == disk_usage(tmp_path)
    before = disk_usage(tmp_path)
    assert pruning.evict(0, 0, tmp_path).bytes == before - disk_usage(tmp_path) > 1 << 20


def test_eviction_reads_each_manifest_a_few_times_at_most(tmp_path: Path) -> None:
    for number in range(40):
        store.produce("stage", f"{number:064x}"[::-1], write_file, tmp_path)
    script = (
        "import sys; from pathlib import Path; from quantize_gemma.tasks.runtime import pruning, store_layout\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        f"assert len(pruning.evict(0, 0, Path({str(tmp_path)!r})).paths) == 40\n"
        "print(sum(path.endswith(store_layout.MANIFEST) for path in opened))\n"
    )
    opened = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(opened) <= 3 * 40


def test_a_directory_that_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "project" / "app"
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text('{"name": "app", "stage": "beta", "key": 1}')
    (tmp_path / "project" / ".partial-upload").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for remove in (pruning.remove_unfinished, lambda root: pruning.evict(0, 0, root)):
        with pytest.raises(UserError, match=f"{tmp_path} is not a quantize-gemma store, and nothing was removed"):
            remove(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    # If a run is started here by mistake, only the files that it wrote are ours.
    store.produce("stage", KEY, write_file, tmp_path)
    pruning.remove_unfinished(tmp_path)
    assert [path.name for path in pruning.evict(0, 0, tmp_path).paths] == [KEY]
    assert set(before) <= set(tmp_path.rglob("*"))


def test_an_artifact_of_an_earlier_version_is_a_miss_and_is_evicted(tmp_path: Path) -> None:
    artifact = store.produce("stage", KEY, write_file, tmp_path)
    manifest = json.loads((artifact.path.parent / store_layout.MANIFEST).read_text())
    del manifest["checksum"]
    old = tmp_path / "before" / "stage" / KEY
    shutil.copytree(artifact.path.parent, old)
    (old.parent / f".lock-{KEY[:16]}").touch()
    (old / store_layout.MANIFEST).write_text(json.dumps(manifest))
    assert store.load("stage", KEY, tmp_path / "before") is None
    assert [path.name for path in pruning.evict(0, 0, tmp_path / "before").paths] == [KEY]
    assert not old.exists()


def test_removing_an_artifact_twice_frees_nothing_and_is_not_an_error(tmp_path: Path) -> None:
    artifact = store.produce("stage", KEY, write_file, tmp_path)
    generation = artifact.path.parent
    assert store_layout.remove(generation, KEY) is not None
    assert store_layout.remove(generation, KEY) is None
    assert store_layout.remove(generation.parent, KEY) is not None
    assert store_layout.remove(generation.parent, KEY) is None
