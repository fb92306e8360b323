"""Publishing makes one commit or none; if repeated, it finishes without sending a file twice."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.card import write_file_list
from quantize_gemma.tasks.runtime import store, worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.store import Artifact
from tests.hub.server import Hub, serve

pytestmark = pytest.mark.slow

WRITER, READER, SCOPED = "hf_writer000000", "hf_reader000000", "hf_scoped000000"
TARGET = "me/tiny-HQQ"
METRICS = {
    "recipe": "HQQ-INT8-INT4",
    "base_model": "team/tiny",
    "base_revision": "a" * 40,
    "recipe_hash": "b" * 64,
    "run_id": "c0ffee",
    "versions": {},
    "quantized": {},
    "program": {},
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    tokens: Any = {
        WRITER: {"user": "me", "role": "write"},
        READER: {"user": "me", "role": "read"},
        SCOPED: {"user": "me", "role": "fineGrained", "namespaces": ["team"]},
    }
    with serve(tmp_path / "hub", tokens) as running:
        yield running


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A release\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (folder / "model.pte").write_bytes(bytes(range(255, -1, -1)) * 2000)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "mmlu.yaml").write_text("- value: 90.0\n")
    return folder


def publish(hub: Hub, release: Path, token: str = WRITER, **settings: Any) -> dict[str, Any]:
    """Put the files into a store, as the stage `card` does, and publish the artifact."""
    return send(hub, make(release), token, **settings)


def make(release: Path) -> Artifact:
    """Return an artifact with these files and their list, like that of the stage `card`."""
    files = sorted(files_of(release).items())
    key = hashlib.sha256(b"".join(name.encode() + content for name, content in files)).hexdigest()

    def fill(target: Path) -> dict[str, Any]:
        shutil.copytree(release, target, dirs_exist_ok=True)
        write_file_list(target, {})
        return {}

    return store.produce("card", key, fill, release.parent / "store")


def send(hub: Hub, artifact: Artifact, token: str = WRITER, **settings: Any) -> dict[str, Any]:
    """Publish from a separate process, because the client reads the Hub's URL on import."""
    how = {"private": False, "tagged": False, **settings}
    return in_process("publish_in_process", hub, token, {"release": str(artifact.path)}, {"repository": TARGET, **how})


METRICS_TEXT = json.dumps(METRICS)


@pytest.fixture(autouse=True)
def workers_find_these_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def in_process(function: str, hub: Hub, token: str, paths: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    call = {"function": f"tests.tasks.test_publish:{function}", "target": "/", "paths": paths, "values": values}
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN_WRITE": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    return worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, environment)[
        "metadata"
    ]


def publish_in_process(_target: Path, /, release: Path, private: bool, tagged: bool, **settings: Any) -> dict[str, Any]:
    from quantize_gemma.tasks.publish import Target, publish

    return {"metadata": asdict(publish(store.read_artifact(release), Target(**settings), private, tagged))}


def check(hub: Hub, token: str = WRITER, repository: str = TARGET, **settings: Any) -> None:
    in_process("check_in_process", hub, token, {}, {"repository": repository, **settings})


def check_in_process(_target: Path, /, **settings: Any) -> dict[str, Any]:
    from quantize_gemma.tasks.publish import Target, check_target

    check_target(Target(**settings))
    return {"metadata": {}}


def contents(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    return {name: hub.read("model", TARGET, name, revision) for name in hub.files("model", TARGET, revision)}


def files_of(release: Path) -> dict[str, bytes]:
    return {path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*") if path.is_file()}


def commits(hub: Hub) -> int:
    return len(hub.requests("POST", "/commit/"))


def test_one_commit_publishes_the_whole_release_and_describes_it(hub: Hub, release: Path) -> None:
    outcome = publish(hub, release, tagged=True)
    assert outcome["state"] == "published"
    assert commits(hub) == 1
    published = contents(hub)
    assert {name: published[name] for name in files_of(release)} == files_of(release)
    repo = hub.storage.load("model", TARGET)
    commit = repo["commits"][hub.head("model", TARGET)]
    assert outcome["commit"] == hub.head("model", TARGET) == hub.head("model", TARGET, outcome["tag"])
    assert outcome["tag"].endswith("-bbbbbbbb")
    description = json.dumps(commit)
    for word in ("HQQ-INT8-INT4 of team/tiny at aaaaaaaaaaaa", "a" * 40, "b" * 64, "c0ffee"):
        assert word in description


def test_the_same_release_again_makes_no_commit_and_sends_nothing(hub: Hub, release: Path) -> None:
    publish(hub, release)
    hub.log.clear()
    outcome = publish(hub, release)
    assert outcome["state"] == "already published"
    assert commits(hub) == 0
    assert not hub.requests("PUT", "")


def test_files_of_the_previous_release_are_deleted_and_a_users_files_stay(
    hub: Hub, release: Path, tmp_path: Path
) -> None:
    publish(hub, release)
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "screenshot.jpg").write_bytes(b"an image")
    hub.add("model", TARGET, extra)
    (release / "model.pte").unlink()
    (release / ".eval_results" / "mmlu.yaml").rename(release / ".eval_results" / "gsm8k.yaml")
    (release / "vocab.json").write_text("{}")
    hub.log.clear()
    publish(hub, release)
    assert commits(hub) == 1
    assert set(contents(hub)) == {*files_of(release), "release.json", "screenshot.jpg", ".gitattributes"}
    # Unchanged files are not sent again.
    assert not hub.requests("PUT", "")


def test_a_head_that_moves_in_the_meantime_is_read_again(hub: Hub, release: Path) -> None:
    publish(hub, release)
    (release / "config.json").write_text('{"changed": true}')
    hub.faults.add(method="POST", path="/commit/", status=412, times=2)
    assert publish(hub, release)["state"] == "published"
    assert contents(hub)["config.json"] == b'{"changed": true}'


def test_a_head_that_keeps_moving_is_an_error(hub: Hub, release: Path) -> None:
    hub.faults.add(method="POST", path="/commit/", status=412)
    with pytest.raises(UserError, match="moved 5 times"):
        publish(hub, release)


def test_a_crash_before_the_commit_changes_nothing_and_the_next_attempt_does_not_send_again(
    hub: Hub, release: Path
) -> None:
    publish(hub, release)
    before = contents(hub)
    (release / "model.safetensors").write_bytes(bytes(range(200)) * 5000)
    hub.faults.add(method="POST", path="/commit/", cut=1, times=1)
    with pytest.raises(StageFailed) as failure:
        publish(hub, release)
    assert failure.value.transient
    assert contents(hub) == before
    assert len(hub.requests("PUT", "")) == 3
    hub.log.clear()
    assert publish(hub, release)["state"] == "published"
    assert not hub.requests("PUT", "")
    assert contents(hub)["model.safetensors"] == files_of(release)["model.safetensors"]


def test_a_commit_whose_response_was_lost_is_not_made_twice(hub: Hub, release: Path) -> None:
    hub.faults.add(method="POST", path="/commit/", status=503, after_work=True, times=1)
    with pytest.raises(StageFailed) as failure:
        publish(hub, release)
    assert failure.value.transient
    assert publish(hub, release)["state"] == "already published"
    assert commits(hub) == 1


def test_a_pull_request_leaves_the_branch_alone_and_is_not_opened_twice(hub: Hub, release: Path) -> None:
    publish(hub, release)
    before = contents(hub)
    (release / "config.json").write_text('{"changed": true}')
    outcome = publish(hub, release, create_pr=True)
    assert outcome["state"] == "published"
    assert "discussions/1" in outcome["url"]
    assert contents(hub) == before
    assert contents(hub, "refs/pr/1")["config.json"] == b'{"changed": true}'
    again = publish(hub, release, create_pr=True)
    assert again["state"] == "already published"
    assert again["url"].endswith("discussions/1")
    # A pull request that was closed does not count as published.
    hub.close_pull_request("model", TARGET, 1)
    assert "discussions/2" in publish(hub, release, create_pr=True)["url"]


def test_every_release_of_a_day_has_a_tag_and_a_missing_tag_is_created_later(hub: Hub, release: Path) -> None:
    publish(hub, release)
    first = publish(hub, release, tagged=True)
    assert first["state"] == "already published"
    assert hub.head("model", TARGET, first["tag"]) == hub.head("model", TARGET)
    (release / "config.json").write_text('{"changed": true}')
    second = publish(hub, release, tagged=True)
    assert second["tag"] == f"{first['tag']}-2"
    assert hub.head("model", TARGET, second["tag"]) == hub.head("model", TARGET) != first["commit"]


def test_a_release_goes_to_a_branch_and_to_a_private_repository(hub: Hub, release: Path) -> None:
    publish(hub, release, branch="next", private=True)
    assert set(contents(hub)) == {".gitattributes"}
    assert set(files_of(release)) < set(contents(hub, "next"))
    assert hub.storage.load("model", TARGET)["private"]


def test_a_repository_that_differs_from_what_was_sent_is_reported(
    hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.storage.commit

    def lose_a_file(kind: str, name: str, ref: str, added: dict[str, Any], *rest: Any, **more: Any) -> Any:
        return commit(kind, name, ref, {n: file for n, file in added.items() if n != "model.pte"}, *rest, **more)

    monkeypatch.setattr(hub.storage, "commit", lose_a_file)
    with pytest.raises(StageFailed, match=f"{TARGET} at .* differs from the release after the upload: check model.pte"):
        publish(hub, release)


@pytest.mark.parametrize(
    ("token", "repository", "words"),
    [
        (READER, TARGET, ["is read-only", "HF_TOKEN_WRITE"]),
        ("hf_unknown00000", TARGET, ["rejects the token", "valid"]),
        (WRITER, "stranger/tiny", ["stranger", "me"]),
        (WRITER, "not a name", ["not a name"]),
        (SCOPED, "me/tiny", ["'me'", "(team)"]),
    ],
)
def test_a_target_that_cannot_be_written_is_rejected_before_anything_starts(
    hub: Hub, token: str, repository: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        check(hub, token, repository)
    for word in words:
        assert word in str(raised.value)
    assert not hub.requests("PUT", "")
    assert commits(hub) == 0


def test_a_target_that_can_be_written_passes(hub: Hub, release: Path, tmp_path: Path) -> None:
    check(hub)
    publish(hub, release)
    check(hub)
    check(hub, branch="next")


def add(hub: Hub, folder: Path, **files: str) -> None:
    """Add a person's files to the target."""
    for name, text in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name.replace("__", ".")).write_text(text)
    hub.add("model", TARGET, folder)


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_repository_with_content_that_no_release_wrote_is_rejected_unless_it_is_adopted(
    hub: Hub, release: Path, tmp_path: Path, create_pr: bool
) -> None:
    add(hub, tmp_path / "person", COPYING="all of it", weights__gguf="GGUF", config__json="mine")
    head = hub.head("model", TARGET)
    for attempt in (lambda: check(hub, create_pr=create_pr), lambda: publish(hub, release, create_pr=create_pr)):
        with pytest.raises(
            UserError, match=r"contains files that quantize-gemma did not write \(COPYING, .*\): .* --adopt"
        ):
            attempt()
    assert hub.head("model", TARGET) == head
    assert not hub.requests("PUT", "")
    check(hub, create_pr=create_pr, adopt=True)
    publish(hub, release, create_pr=create_pr, adopt=True)
    published = contents(hub, "refs/pr/1" if create_pr else "main")
    assert published["COPYING"] == b"all of it"
    assert published["config.json"] == b"{}"
    assert set(published) == {*files_of(release), "release.json", "COPYING", "weights.gguf", ".gitattributes"}
    # From now on, the repository has a release of ours.
    if not create_pr:
        (release / "config.json").unlink()
        publish(hub, release)
        assert set(contents(hub)) == {*files_of(release), "release.json", "COPYING", "weights.gguf", ".gitattributes"}


@pytest.mark.parametrize(
    ("readme", "content"),
    [
        ("---\nlicense: mit\n---\n", False),
        ("---\r\nlicense: other\r\nlicense_name: acme\r\nlicense_link: LICENSE\r\n---\r\n", False),
        ("", False),
        ("---\nlicense: mit\n---\n# My notes\n", True),
        ("---\nbase_model: me/gemma\n---\n", True),
        ("My notes", True),
    ],
)
def test_the_readme_that_the_hub_creates_is_not_content(hub: Hub, tmp_path: Path, readme: str, content: bool) -> None:
    add(hub, tmp_path / "person", README__md=readme)
    if content:
        with pytest.raises(UserError, match=r"quantize-gemma did not write \(README\.md\)"):
            check(hub)
    else:
        check(hub)


@pytest.mark.parametrize(
    "claim",
    [
        {"metrics__json": "[" * 100_000},
        {"metrics__json": '{"accuracy": 1}'},
        {"metrics__json": json.dumps({**METRICS, "recipe_hash": "a hash"})},
        {"release__json": "null"},
        {"release__json": '{"files": ["COPYING"]}'},
        {"release__json": '{"files": {"COPYING": null}}'},
    ],
)
def test_a_file_that_only_looks_like_a_releases_does_not_count_as_a_release(
    hub: Hub, tmp_path: Path, claim: dict[str, str]
) -> None:
    add(hub, tmp_path / "person", COPYING="all of it", **claim)
    with pytest.raises(UserError, match="that quantize-gemma did not write"):
        check(hub)


def test_a_release_of_an_older_version_is_recognized_by_its_metrics_and_only_its_files_are_deleted(
    hub: Hub, release: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(release, tmp_path / "old")
    (old / "mmlu-by-subject.png").write_bytes(b"a chart")
    (old / "model-00001-of-00002.safetensors").write_bytes(b"a shard")
    hub.add("model", TARGET, old)
    add(hub, tmp_path / "person", notes__md="mine", model__gguf="mine")
    check(hub)
    publish(hub, release)
    assert set(contents(hub)) == {*files_of(release), "release.json", "notes.md", "model.gguf", ".gitattributes"}


def test_a_file_of_the_previous_release_that_someone_has_changed_stays(hub: Hub, release: Path, tmp_path: Path) -> None:
    (release / "vocab.json").write_text("{}")
    (release / "merges.json").write_text("{}")
    publish(hub, release)
    add(hub, tmp_path / "person", vocab__json='{"mine": 1}')
    for name in ("vocab.json", "merges.json"):
        (release / name).unlink()
    publish(hub, release)
    published = contents(hub)
    assert published["vocab.json"] == b'{"mine": 1}'
    assert "merges.json" not in published


def flip(path: Path) -> None:
    """Flip a bit as a bad disk does: the file's size and times stay the same."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as stream:
        stream.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.pte", "metrics.json", "README.md", "release.json"])
def test_a_flipped_bit_is_not_published_and_the_store_records_it(hub: Hub, release: Path, name: str) -> None:
    artifact = make(release)
    flip(artifact.path / name)
    assert store.load("card", artifact.key, release.parent / "store") is not None, "nothing has checked it yet"
    with pytest.raises(StageFailed, match=f"{name} was changed or damaged after it was written: start the run again"):
        send(hub, artifact)
    assert hub.log == []
    assert store.load("card", artifact.key, release.parent / "store") is None


def test_a_flipped_bit_in_a_release_that_is_already_published_is_found_too(hub: Hub, release: Path) -> None:
    artifact = make(release)
    send(hub, artifact)
    flip(artifact.path / "model.safetensors")
    with pytest.raises(StageFailed, match=r"model\.safetensors was changed or damaged"):
        send(hub, artifact)
    assert contents(hub)["model.safetensors"] == files_of(release)["model.safetensors"]


def test_a_damaged_file_of_a_stage_is_damaged_in_the_release_that_links_it(hub: Hub, release: Path) -> None:
    root = release.parent / "store"

    def fill(target: Path) -> dict[str, Any]:
        (target / "model.pte").write_bytes(b"a program" * 1000)
        return {}

    def link(target: Path) -> dict[str, Any]:
        store.link(exported.path / "model.pte", target / "model.pte")
        (target / "metrics.json").write_text(json.dumps(METRICS))
        return {}

    exported = store.produce("export", "e" * 64, fill, root)
    card = store.produce("card", "c" * 64, link, root)
    flip(exported.path / "model.pte")
    with pytest.raises(StageFailed, match="was changed or damaged"):
        send(hub, card)
    assert store.load("export", "e" * 64, root) is None
    assert store.load("card", "c" * 64, root) is None
    rebuilt = store.produce("export", "e" * 64, fill, root)
    assert (rebuilt.path / "model.pte").read_bytes() == b"a program" * 1000


def test_a_file_that_changes_while_it_is_sent_is_not_published(hub: Hub, release: Path) -> None:
    (release / "model.safetensors").write_bytes(bytes(range(256)) * 100_000)
    artifact = make(release)
    hub.faults.add(method="POST", path="/preupload/", delay=1, times=1)

    def change() -> None:
        while not hub.requests("POST", "/preupload/"):
            time.sleep(0.01)
        flip(artifact.path / "model.safetensors")

    thread = threading.Thread(target=change)
    thread.start()
    with pytest.raises(StageFailed, match=r"model\.safetensors was changed or damaged"):
        send(hub, artifact)
    thread.join()
    assert commits(hub) == 0


@pytest.mark.parametrize("path", ["/preupload/", "/info/lfs/objects/batch", "/commit/"])
def test_a_retry_after_of_years_ends_the_upload_immediately(hub: Hub, release: Path, path: str) -> None:
    hub.faults.add(method="POST", path=path, status=429, headers={"Retry-After": "99999999999"})
    with pytest.raises(StageFailed, match="does not allow another request for more than a year") as failure:
        publish(hub, release)
    assert not failure.value.transient
    assert len(hub.requests("POST", path)) == 1


def published_in_process(_target: Path, repository: str) -> dict[str, Any]:
    from quantize_gemma.tasks.publish import published_metrics

    return {"metadata": {"metrics": published_metrics(repository, None)}}


@pytest.mark.parametrize("text", [None, METRICS_TEXT, "[1]", "{", "[" * 100_000, "1" * 9000, '{"a": "\\ud800"}'])
def test_the_published_metrics_are_read_at_the_head_whatever_they_contain(
    hub: Hub, tmp_path: Path, text: str | None
) -> None:
    add(hub, tmp_path / "person", notes__md="mine", **({} if text is None else {"metrics__json": text}))
    expected = {None: None, METRICS_TEXT: METRICS, '{"a": "\\ud800"}': {"a": "\ud800"}}.get(text, {})
    metrics = in_process("published_in_process", hub, WRITER, {}, {"repository": TARGET})["metrics"]
    assert metrics == expected
