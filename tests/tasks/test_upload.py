"""A publish is one commit, or nothing; done again it finishes without sending twice."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import process
from tasks.store import StageFailed, UserError
from tests.hub.server import Hub, serve

WRITER, READER, SCOPED = "hf_writer000000", "hf_reader000000", "hf_scoped000000"
TARGET = "me/tiny-HQQ"
METRICS = {
    "recipe": "HQQ-INT8-INT4",
    "base_model": "team/tiny",
    "base_revision": "a" * 40,
    "recipe_hash": "b" * 64,
    "run_id": "c0ffee",
}
KEEP = [".gitattributes", "*.jpg"]


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
    return folder


def publish(hub: Hub, release: Path, token: str = WRITER, **settings: Any) -> dict[str, Any]:
    """Publishes from a process of its own: the Hub's address is read when its client is imported."""
    how = {"branch": None, "create_pr": False, "private": False, "tagged": False, "keep": KEEP, **settings}
    values = {"repository": TARGET, "metrics": METRICS, **how}
    return in_process("publish_in_process", hub, token, {"release": str(release)}, values)


def in_process(function: str, hub: Hub, token: str, paths: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    call = {"function": f"tests.tasks.test_upload:{function}", "target": "/", "paths": paths, "values": values}
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN_WRITE": token,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return process.run("tasks.process:call", call, lambda *_: None, None, environment)["metadata"]


def publish_in_process(_target: Path, release: Path, **settings: Any) -> dict[str, Any]:
    from tasks.upload import publish

    return {"metadata": publish(release, **settings)}


def check_in_process(_target: Path, repository: str, create_pr: bool) -> dict[str, Any]:
    from tasks.upload import check_target

    check_target(repository, create_pr)
    return {"metadata": {}}


def contents(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    return {name: hub.read("model", TARGET, name, revision) for name in hub.files("model", TARGET, revision)}


def files_of(release: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in release.iterdir()}


def commits(hub: Hub) -> int:
    return len(hub.served("POST", "/commit/"))


def test_one_commit_brings_the_whole_release_and_says_what_it_is(hub: Hub, release: Path) -> None:
    outcome = publish(hub, release, tagged=True)
    assert outcome["state"] == "published"
    assert commits(hub) == 1
    there = contents(hub)
    assert {name: there[name] for name in files_of(release)} == files_of(release)
    repo = hub.storage.load("model", TARGET)
    commit = repo["commits"][hub.head("model", TARGET)]
    assert outcome["commit"] == hub.head("model", TARGET) == hub.head("model", TARGET, outcome["tag"])
    assert outcome["tag"].endswith("-bbbbbbbb")
    said = json.dumps(commit)
    for word in ("HQQ-INT8-INT4 of team/tiny at aaaaaaaaaaaa", "a" * 40, "b" * 64, "c0ffee"):
        assert word in said


def test_the_same_release_again_makes_no_commit_and_sends_nothing(hub: Hub, release: Path) -> None:
    publish(hub, release)
    hub.log.clear()
    outcome = publish(hub, release)
    assert outcome["state"] == "already published"
    assert commits(hub) == 0
    assert not hub.served("PUT", "")


def test_files_of_the_release_before_go_and_a_persons_files_stay(hub: Hub, release: Path, tmp_path: Path) -> None:
    publish(hub, release)
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "screenshot.jpg").write_bytes(b"a picture")
    hub.add("model", TARGET, extra)
    (release / "model.pte").unlink()
    (release / "vocab.json").write_text("{}")
    hub.log.clear()
    publish(hub, release)
    assert commits(hub) == 1
    assert set(contents(hub)) == {*files_of(release), "screenshot.jpg", ".gitattributes"}
    # What did not change is not sent again.
    assert not hub.served("PUT", "")


def test_a_head_that_moves_meanwhile_is_read_again(hub: Hub, release: Path) -> None:
    publish(hub, release)
    (release / "config.json").write_text('{"changed": true}')
    hub.faults.add(method="POST", path="/commit/", status=412, times=2)
    assert publish(hub, release)["state"] == "published"
    assert contents(hub)["config.json"] == b'{"changed": true}'


def test_a_head_that_never_rests_is_an_error(hub: Hub, release: Path) -> None:
    hub.faults.add(method="POST", path="/commit/", status=412)
    with pytest.raises(UserError, match="moved 5 times"):
        publish(hub, release)


def test_a_crash_before_the_commit_changes_nothing_and_the_next_try_does_not_send_again(
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
    assert len(hub.served("PUT", "")) == 3
    hub.log.clear()
    assert publish(hub, release)["state"] == "published"
    assert not hub.served("PUT", "")
    assert contents(hub)["model.safetensors"] == files_of(release)["model.safetensors"]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, release: Path) -> None:
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
    # One that was turned down does not stand for the release.
    hub.close_pull_request("model", TARGET, 1)
    assert "discussions/2" in publish(hub, release, create_pr=True)["url"]


def test_every_release_of_a_day_has_a_tag_and_a_lost_one_is_made_up_for(hub: Hub, release: Path) -> None:
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


def test_a_repository_that_holds_something_else_than_was_sent_is_named(
    hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.storage.commit

    def lose_a_file(kind: str, name: str, ref: str, added: dict[str, Any], *rest: Any, **more: Any) -> Any:
        return commit(kind, name, ref, {n: file for n, file in added.items() if n != "model.pte"}, *rest, **more)

    monkeypatch.setattr(hub.storage, "commit", lose_a_file)
    with pytest.raises(StageFailed, match=f"{TARGET} at .* holds something else than was sent: model.pte"):
        publish(hub, release)


@pytest.mark.parametrize(
    ("token", "repository", "words"),
    [
        (READER, TARGET, ["may only read", "HF_TOKEN_WRITE"]),
        ("hf_unknown00000", TARGET, ["refuses the token", "valid"]),
        (WRITER, "stranger/tiny", ["stranger", "me"]),
        (WRITER, "not a name", ["not a name"]),
        (SCOPED, "me/tiny", ["'me'", "in team"]),
    ],
)
def test_a_target_that_cannot_be_written_is_found_before_anything_starts(
    hub: Hub, token: str, repository: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        in_process("check_in_process", hub, token, {}, {"repository": repository, "create_pr": False})
    for word in words:
        assert word in str(refusal.value)
    assert not hub.served("PUT", "")
    assert commits(hub) == 0


def test_a_target_that_can_be_written_passes(hub: Hub, release: Path, tmp_path: Path) -> None:
    in_process("check_in_process", hub, WRITER, {}, {"repository": TARGET, "create_pr": False})
    publish(hub, release)
    in_process("check_in_process", hub, WRITER, {}, {"repository": TARGET, "create_pr": False})
    shutil.rmtree(release)
