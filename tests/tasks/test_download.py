"""Downloads are what the Hub says they are, go on where they stopped, and name what is wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import hub as client
from tasks import process, store
from tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from tasks.store import StageFailed, UserError
from tests.hub.server import Hub, serve

TOKEN = "hf_reader000000"
WEIGHTS = "model.safetensors"
NAME = "team/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub", {TOKEN: {"user": "reader", "role": "read"}}) as running:
        yield running


def download(hub: Hub, tmp_path: Path, revision: str, token: str | None = None, offline: bool = False) -> Path:
    """Runs the stage's work in a process of its own, as the flow does; returns the directory that it filled."""
    target = tmp_path / "store" / "download" / ".partial-x" / "data"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    values = {"source": NAME, "revision": revision, "offline": offline}
    call = {"function": "tasks.download:download_checkpoint", "target": str(target), "paths": {}, "values": values}
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "2", **({"HF_TOKEN": token} if token else {})}
    process.run("tasks.process:call", call, lambda *_: None, None, environment)
    return target


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_release_needs_is_fetched_and_is_the_same(hub: Hub, tmp_path: Path) -> None:
    source = shutil.copytree(BUILTIN["tiny-gemma3"], tmp_path / "source")
    for name in ("pytorch_model.bin", "training_args.bin", "code.py", "checkpoint-500/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not wanted")
    sha = hub.add("model", NAME, source)
    target = download(hub, tmp_path, sha)
    assert names_of(target) == names_of(BUILTIN["tiny-gemma3"]) - {"README.md"}
    for path in target.iterdir():
        assert path.read_bytes() == (BUILTIN["tiny-gemma3"] / path.name).read_bytes()
    assert not hub.served("GET", r"\.bin|\.py|checkpoint-500")


def test_a_pinned_commit_is_fetched_though_the_branch_has_moved(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    changed = shutil.copytree(BUILTIN["tiny-gemma3"], tmp_path / "changed")
    (changed / "generation_config.json").write_text("{}")
    hub.add("model", NAME, changed)
    target = download(hub, tmp_path, sha)
    assert (target / "generation_config.json").read_text() != "{}"


def test_a_cut_transfer_goes_on_from_its_last_byte(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    size = (BUILTIN["tiny-gemma3"] / WEIGHTS).stat().st_size
    hub.faults.add(method="GET", path=r"/lfs/", cut=300_000, times=1)
    with pytest.raises(StageFailed) as failure:
        download(hub, tmp_path, sha)
    assert failure.value.transient
    kept = [entry["sent"] for entry in hub.served("GET", "/lfs/")]
    hub.log.clear()
    target = download(hub, tmp_path, sha)
    assert (target / WEIGHTS).read_bytes() == (BUILTIN["tiny-gemma3"] / WEIGHTS).read_bytes()
    resumed = [entry for entry in hub.served("GET", "/lfs/") if entry["range"]]
    assert len(resumed) == 1
    assert max(kept) >= 300_000
    assert resumed[0]["sent"] <= size - 300_000
    # The files that had arrived whole are not fetched again.
    assert not hub.served("GET", r"resolve/.*/config\.json")


def test_a_wrong_file_is_fetched_again_and_named_if_it_is_wrong_again(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="/lfs/", wrong_bytes=True, times=1)
    target = download(hub, tmp_path, sha)
    assert (target / WEIGHTS).read_bytes() == (BUILTIN["tiny-gemma3"] / WEIGHTS).read_bytes()
    hub.faults.clear()
    hub.faults.add(method="GET", path=r"config\.json", wrong_bytes=True)
    with pytest.raises(StageFailed, match=r"config\.json of team/tiny arrived twice with other content"):
        download(hub, tmp_path, sha)


@pytest.mark.parametrize(
    ("fault", "retry_after"),
    [
        ({"status": 429, "headers": {"Retry-After": "3"}}, 3.0),
        ({"status": 429, "headers": {"RateLimit": '"api";r=0;t=41'}}, 42.0),
        ({"status": 500}, 0.0),
        ({"status": 522}, 0.0),
        ({"delay": 4}, 0.0),
        ({"status": 503}, 0.0),
        ({"cut": 10}, 0.0),
    ],
)
def test_what_may_pass_by_itself_is_marked_so(
    hub: Hub, tmp_path: Path, fault: dict[str, Any], retry_after: float
) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="resolve", **fault)
    with pytest.raises(StageFailed) as failure:
        download(hub, tmp_path, sha)
    assert failure.value.transient
    assert failure.value.retry_after == retry_after


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 401}, ["token", "valid"]),
        ({"status": 403}, ["forbids", "HF_TOKEN"]),
        ({"status": 404, "error_code": "EntryNotFound"}, ["lacks a file"]),
        ({"status": 404, "error_code": "RevisionNotFound"}, ["no revision"]),
    ],
)
def test_a_refusal_says_what_to_do(hub: Hub, tmp_path: Path, fault: dict[str, Any], words: list[str]) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.faults.add(method="GET", path="resolve", **fault)
    with pytest.raises(UserError) as refusal:
        download(hub, tmp_path, sha, TOKEN)
    for word in [NAME, *words]:
        assert word in str(refusal.value)


def test_a_gated_repository_names_the_page_where_its_terms_are_accepted(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    hub.restrict("model", NAME, gated=True)
    with pytest.raises(UserError, match=f"{NAME} is gated: accept its terms at {hub.url}/{NAME}"):
        download(hub, tmp_path, sha, TOKEN)


def test_offline_nothing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("model", NAME, BUILTIN["tiny-gemma3"])
    with pytest.raises(UserError, match="is not in the store: run once without --offline"):
        download(hub, tmp_path, sha, offline=True)
    assert hub.log == []


def test_files_match_the_hubs_hashes_only_if_they_are_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.add("dataset", "cais/mmlu", BUILTIN_BENCHMARKS["mmlu-mini"])
    path = tmp_path / "anatomy.parquet"
    shutil.copy(BUILTIN_BENCHMARKS["mmlu-mini"] / "anatomy" / "test-00000-of-00001.parquet", path)

    class File:
        entry = hub.files("dataset", "cais/mmlu")["anatomy/test-00000-of-00001.parquet"]
        size = entry["size"]
        blob_id = entry["blob_id"]
        lfs = type("Lfs", (), {"sha256": store.digest_file(path)})

    assert client.is_file(path, File)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert not client.is_file(path, File)
