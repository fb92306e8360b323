"""The local Hub behaves like the real one for the real clients."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantize_gemma.tasks.builtin import BUILTIN_BENCHMARKS
from tests.hub.access import Tokens
from tests.hub.server import Hub, serve
from tests.hub.storage import git_blob_id

TOKENS: Tokens = {
    "hf_writer": {"user": "ada", "role": "write", "namespaces": ["lab"], "gated": ["google/gated"]},
    "hf_reader": {"user": "ada", "role": "read", "namespaces": ["lab"]},
    "hf_other": {"user": "bob", "role": "write"},
}
WEIGHTS = bytes(range(256)) * 1000
CARD = b"---\nlicense: gemma\n---\n# A model\n"


@pytest.fixture(autouse=True)
def no_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_HUB_DISABLE_XET=1 does if it is set before the import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub", TOKENS) as hub:
        yield hub


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_writer")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_bytes(CARD)
    (folder / "sub dir" / "config.json").write_text("{}")
    return folder


def addition(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != ".gitattributes"}


def test_whoami_names_the_user_the_organizations_and_the_role(api: HfApi) -> None:
    me = api.whoami()
    assert me["name"] == "ada"
    assert [org["name"] for org in me["orgs"]] == ["lab"]
    assert me["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_unknown")


def test_create_repo_creates_a_repository_and_reports_an_existing_one(api: HfApi) -> None:
    url = api.create_repo("lab/new", private=True)
    assert url.repo_id == "lab/new"
    assert api.model_info("lab/new").private
    assert api.list_repo_files("lab/new") == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo("lab/new")
    assert error.value.response.status_code == 409
    assert api.create_repo("lab/new", exist_ok=True) == url
    data = api.create_repo("lab/new", repo_type="dataset")
    assert (data.repo_type, data.repo_id) == ("dataset", "lab/new")


@pytest.mark.parametrize(("repo_id", "token"), [("other/new", "hf_writer"), ("lab/new", "hf_reader")])
def test_create_repo_is_rejected_without_the_right_to_write(api: HfApi, repo_id: str, token: str) -> None:
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.create_repo(repo_id, token=token)


def test_create_repo_knows_models_and_datasets_only(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="not 'space'"):
        api.create_repo("lab/new", repo_type="space", space_sdk="static")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_snapshot_download_returns_the_added_files(hub: Hub, model: Path, tmp_path: Path, kind: str) -> None:
    first = hub.add(kind, "lab/m", model)
    (model / "sub dir" / "config.json").write_text('{"changed": true}')
    second = hub.add(kind, "lab/m", model)
    where = {"repo_type": kind, "endpoint": hub.url, "token": False, "cache_dir": tmp_path / "cache"}
    local = snapshot_download("lab/m", revision=first, local_dir=tmp_path / "local", **where)
    cached = snapshot_download("lab/m", **where)
    assert cached.endswith(second)
    assert contents(Path(cached)) == contents(model)
    assert contents(Path(local)) == contents(model) | {"sub dir/config.json": b"{}"}
    assert len(hub.requests("GET", "/lfs/")) == 2
    assert hub.requests("GET", "/lfs/")[0]["sent"] == len(WEIGHTS)


def test_an_interrupted_download_resumes_where_it_stopped(hub: Hub, model: Path, tmp_path: Path) -> None:
    weights = WEIGHTS * 50
    (model / "model.safetensors").write_bytes(weights)
    hub.add("model", "lab/m", model)
    hub.faults.add(method="GET", path="/lfs/", cut=11_000_000, times=1)
    path = hf_hub_download("lab/m", "model.safetensors", endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == weights
    requests = [(entry["status"], entry["sent"], entry["range"]) for entry in hub.requests("GET", "/lfs/")]
    # The client writes chunks of 10 MiB, and loses the part of the next chunk that it has received.
    kept = DOWNLOAD_CHUNK_SIZE
    assert requests == [(200, 11_000_000, None), (206, len(weights) - kept, f"bytes={kept}-")]


def test_an_lfs_file_redirects_to_a_signed_url_on_another_host(hub: Hub, model: Path) -> None:
    sha = hub.add("model", "lab/m", model)
    with httpx.Client() as client:
        response = client.head(f"{hub.url}/lab/m/resolve/main/model.safetensors")
        assert response.status_code == 302
        assert response.headers["X-Repo-Commit"] == sha
        assert response.headers["X-Linked-Size"] == str(len(WEIGHTS))
        sha256 = hub.files("model", "lab/m")["model.safetensors"]["sha256"]
        assert response.headers["X-Linked-Etag"] == f'"{sha256}"'
        location = response.headers["Location"]
        assert httpx.URL(location).host != httpx.URL(hub.url).host
        assert client.get(location, headers={"Range": "bytes=5-9"}).content == WEIGHTS[5:10]
        assert client.get(location, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416
        assert client.get(location.split("?")[0]).status_code == 403
        assert client.put(location, content=b"other").status_code == 403
        small = client.head(f"{hub.url}/lab/m/resolve/main/README.md")
        assert small.headers["ETag"] == f'"{git_blob_id(CARD)}"'
        assert small.headers["Content-Length"] == str(len(CARD))


def test_upload_folder_makes_one_commit_with_every_file(hub: Hub, api: HfApi, model: Path) -> None:
    api.create_repo("lab/m")
    commit = api.upload_folder(repo_id="lab/m", folder_path=model, commit_message="One", commit_description="Two")
    assert commit.oid == hub.head("model", "lab/m")
    assert commit.commit_url == f"{hub.url}/lab/m/commit/{commit.oid}"
    history = api.list_repo_commits("lab/m")
    assert [(each.title, each.message) for each in history] == [("One", "Two"), ("initial commit", "")]
    assert {path: hub.read("model", "lab/m", path) for path in contents(model)} == contents(model)
    again = api.upload_folder(repo_id="lab/m", folder_path=model)
    assert again.oid == commit.oid, "nothing changed, so the client makes no commit"


def test_an_existing_object_is_not_sent_again(hub: Hub, api: HfApi) -> None:
    api.create_repo("lab/m")
    api.preupload_lfs_files("lab/m", [addition("model.safetensors", WEIGHTS)])
    assert [entry["received"] for entry in hub.requests("PUT", "/lfs/")] == [len(WEIGHTS)]
    operation = addition("model.safetensors", WEIGHTS)
    api.preupload_lfs_files("lab/m", [operation])
    head = hub.head("model", "lab/m")
    commit = api.create_commit("lab/m", [operation], commit_message="Add", parent_commit=head)
    assert len(hub.requests("PUT", "/lfs/")) == 1
    assert hub.head("model", "lab/m") == commit.oid
    assert hub.read("model", "lab/m", "model.safetensors") == WEIGHTS


def test_a_commit_on_a_head_that_has_moved_is_rejected(hub: Hub, api: HfApi, model: Path) -> None:
    seen = hub.add("model", "lab/m", model)
    moved = hub.add("model", "lab/m", model, "Meanwhile")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("lab/m", [addition("a.txt", b"a")], commit_message="Add", parent_commit=seen)
    assert error.value.response.status_code == 412
    assert hub.head("model", "lab/m") == moved


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": "lfsFile", "value": {"path": "a.pte", "oid": "0" * 64}}, "a file that does not exist"),
        ({"key": "moved", "value": {}}, "unknown operation 'moved'"),
    ],
)
def test_a_commit_of_an_object_that_was_never_uploaded_is_rejected(
    hub: Hub, api: HfApi, line: dict[str, object], message: str
) -> None:
    api.create_repo("lab/m")
    header = {"key": "header", "value": {"summary": "Add", "description": ""}}
    response = httpx.post(
        f"{hub.url}/api/models/lab/m/commit/main",
        content="\n".join(json.dumps(each) for each in (header, line)),
        headers={"Authorization": "Bearer hf_writer"},
    )
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_an_object_is_stored_under_its_own_hash_only(hub: Hub, api: HfApi) -> None:
    api.create_repo("lab/m")
    item = {"oid": "0" * 64, "size": 5}
    headers = {"Authorization": "Bearer hf_writer"}
    batch = httpx.post(f"{hub.url}/lab/m.git/info/lfs/objects/batch", json={"objects": [item]}, headers=headers).json()
    actions = batch["objects"][0]["actions"]
    assert httpx.put(actions["upload"]["href"], content=b"other").status_code == 400
    assert httpx.post(actions["verify"]["href"], json=item, headers=headers).status_code == 404


def test_a_pull_request_leaves_main_as_it_was(hub: Hub, model: Path, tmp_path: Path) -> None:
    before = hub.add("model", "lab/m", model)
    bob = HfApi(endpoint=hub.url, token="hf_other")
    operations = [addition("model.safetensors", b"better"), addition("new.txt", b"new")]
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        bob.create_commit("lab/m", operations, commit_message="Better")
    commit = bob.create_commit("lab/m", operations, commit_message="Better", create_pr=True)
    assert commit.pr_url == f"{hub.url}/lab/m/discussions/1"
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert hub.head("model", "lab/m") == before
    folder = snapshot_download(
        "lab/m", revision="refs/pr/1", endpoint=hub.url, token=False, local_dir=tmp_path / "local"
    )
    assert (Path(folder) / "model.safetensors").read_bytes() == b"better"
    refs = bob.list_repo_refs("lab/m", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", commit.oid)]


def test_tags_and_branches_are_revisions(hub: Hub, api: HfApi, model: Path) -> None:
    first = hub.add("model", "lab/m", model)
    api.create_tag("lab/m", tag="v1")
    api.create_branch("lab/m", branch="feature/x", revision="v1")
    commit = api.create_commit("lab/m", [addition("a.txt", b"a")], commit_message="Add", revision="feature/x")
    assert hub.head("model", "lab/m") == hub.head("model", "lab/m", "v1") == first
    assert api.model_info("lab/m", revision="feature/x").sha == commit.oid
    refs = api.list_repo_refs("lab/m")
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [("v1", "refs/tags/v1", first)]
    assert [branch.name for branch in refs.branches] == ["main", "feature/x"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("lab/m", tag="v1")
    api.create_tag("lab/m", tag="v1", exist_ok=True)


def test_a_commit_deletes_files_and_folders(hub: Hub, api: HfApi, model: Path) -> None:
    hub.add("model", "lab/m", model)
    deletions = [CommitOperationDelete("model.safetensors"), CommitOperationDelete("sub dir/")]
    api.create_commit("lab/m", [*deletions, addition("new.txt", b"new")], commit_message="Replace")
    assert set(hub.files("model", "lab/m")) == {".gitattributes", "README.md", "new.txt"}
    with pytest.raises(EntryNotFoundError):
        api.create_commit("lab/m", deletions[:1], commit_message="Again")


def test_tree_and_paths_info_return_size_hash_and_last_commit(hub: Hub, api: HfApi, model: Path) -> None:
    sha = hub.add("model", "lab/m", model, "First")
    api.create_commit("lab/m", [addition("late.txt", b"late")], commit_message="Second")
    recursive = list(api.list_repo_tree("lab/m", recursive=True, expand=True))
    paths = [".gitattributes", "README.md", "late.txt", "model.safetensors", "sub dir", "sub dir/config.json"]
    assert [each.path for each in recursive] == paths
    titles = [each.last_commit.title for each in recursive if each.last_commit]
    assert titles == ["initial commit", "First", "Second", "First", "First", "First"]
    assert [each.path for each in api.list_repo_tree("lab/m")] == paths[:-1]
    assert [each.path for each in api.list_repo_tree("lab/m", "sub dir")] == paths[-1:]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("lab/m", "no folder"))
    requested_paths = ["model.safetensors", "README.md", "sub dir", "missing"]
    weights, card, folder = api.get_paths_info("lab/m", requested_paths, expand=True)
    assert (weights.size, weights.lfs.size, weights.lfs.sha256) == (
        len(WEIGHTS),
        len(WEIGHTS),
        hub.files("model", "lab/m")["model.safetensors"]["sha256"],
    )
    assert (card.size, card.blob_id, card.lfs) == (len(CARD), git_blob_id(CARD), None)
    assert (folder.path, folder.last_commit.oid) == ("sub dir", sha)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_info_returns_the_card_and_the_sizes_and_hashes_of_the_files(
    hub: Hub, api: HfApi, model: Path, kind: str
) -> None:
    sha = hub.add(kind, "lab/m", model)
    info = api.repo_info("lab/m", repo_type=kind, files_metadata=True)
    assert (info.sha, info.private, info.gated, info.card_data.license) == (sha, False, False, "gemma")
    files = {file.rfilename: file for file in info.siblings}
    assert files["model.safetensors"].lfs.sha256 == hub.files(kind, "lab/m")["model.safetensors"]["sha256"]
    assert (files["README.md"].size, files["README.md"].blob_id) == (len(CARD), git_blob_id(CARD))
    assert api.repo_info("lab/m", repo_type=kind).siblings[0].size is None


def test_missing_resources_raise_the_clients_own_exception(hub: Hub, api: HfApi, model: Path, tmp_path: Path) -> None:
    sha = hub.add("model", "lab/m", model)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/missing")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("lab/m", token=False)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("lab/m", revision="missing")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit("lab/m", [addition("a.txt", b"a")], commit_message="Add", revision="missing")
    with pytest.raises(EntryNotFoundError) as error:
        api.hf_hub_download("lab/m", "missing.txt", cache_dir=tmp_path)
    assert error.value.response.headers["X-Repo-Commit"] == sha


def test_a_private_repository_does_not_exist_for_others(hub: Hub, api: HfApi, model: Path, tmp_path: Path) -> None:
    hub.add("model", "lab/m", model)
    hub.restrict("model", "lab/m", private=True)
    assert api.model_info("lab/m", token="hf_reader").private
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("lab/m", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("lab/m", "README.md", token=token, cache_dir=tmp_path)


def test_a_gated_repository_shows_only_the_names_of_its_files(
    hub: Hub, api: HfApi, model: Path, tmp_path: Path
) -> None:
    hub.add("model", "google/gated", model)
    hub.restrict("model", "google/gated", gated=True)
    assert api.model_info("google/gated", token=False).gated == "manual"
    for token in (False, "hf_reader"):
        with pytest.raises(GatedRepoError, match="is restricted"):
            api.snapshot_download("google/gated", token=token, cache_dir=tmp_path)
        with pytest.raises(GatedRepoError):
            api.auth_check("google/gated", token=token)
    api.auth_check("google/gated")
    assert (Path(api.snapshot_download("google/gated", cache_dir=tmp_path)) / "README.md").read_bytes() == CARD


def test_writing_needs_a_token_with_write_access(hub: Hub, api: HfApi, model: Path) -> None:
    hub.add("model", "lab/m", model)
    messages = {"hf_reader": "403 Forbidden", "hf_other": "403 Forbidden", "hf_unknown": "Invalid credentials"}
    for token, message in messages.items():
        with pytest.raises(HfHubHTTPError, match=message):
            api.create_commit("lab/m", [addition("a.txt", b"a")], commit_message="Add", token=token)
        with pytest.raises(HfHubHTTPError, match=message):
            api.auth_check("lab/m", write=True, token=token)
    with pytest.raises(RepositoryNotFoundError, match="Invalid username or password"):
        api.preupload_lfs_files("lab/m", [addition("model.safetensors", WEIGHTS)], token=False)
    api.auth_check("lab/m", write=True)
    assert hub.requests("POST", "/commit/") == []


def test_a_card_that_is_not_yaml_is_rejected_and_one_without_metadata_gets_a_warning(api: HfApi) -> None:
    api.create_repo("lab/m")
    with pytest.raises(ValueError, match=re.escape("Invalid metadata in README.md")):
        api.create_commit("lab/m", [addition("README.md", b"---\na: [\n---\n")], commit_message="Add")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit("lab/m", [addition("README.md", b"# Bare\n")], commit_message="Add")


def test_429_tells_the_client_how_long_to_wait(hub: Hub, api: HfApi) -> None:
    api.create_repo("lab/m")
    hub.faults.add(path="/preupload/", status=429, headers={"Retry-After": "0"}, times=1)
    api.create_commit("lab/m", [addition("a.txt", b"a")], commit_message="Add")
    assert [entry["status"] for entry in hub.requests("POST", "/preupload/")] == [429, 200]
    hub.faults.add(path="/whoami-v2", status=429, headers={"Retry-After": "7"})
    with pytest.raises(HfHubHTTPError, match="rate limit") as error:
        api.whoami()
    assert error.value.response.headers["Retry-After"] == "7"


def test_an_error_has_the_status_code_and_message_of_its_rule(hub: Hub, api: HfApi, model: Path) -> None:
    hub.add("model", "lab/m", model)
    hub.faults.add(path="^/api/models/lab/m$", status=403, error_code="GatedRepo", error_message="not you", times=1)
    hub.faults.add(path="^/api/models/lab/m$", status=503, after=1, times=1)
    with pytest.raises(GatedRepoError, match="not you"):
        api.model_info("lab/m")
    assert api.model_info("lab/m").id == "lab/m"
    with pytest.raises(HfHubHTTPError, match="503"):
        api.model_info("lab/m")
    assert api.model_info("lab/m").id == "lab/m"


def test_an_upload_that_is_cut_or_fails_stores_nothing(hub: Hub, api: HfApi) -> None:
    api.create_repo("lab/m")
    hub.faults.add(method="PUT", cut=50_000, times=1)
    hub.faults.add(method="PUT", status=400, times=1)
    weights = WEIGHTS * 8
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.preupload_lfs_files("lab/m", [addition("model.safetensors", weights)])
    cut, failed = hub.requests("PUT", "/lfs/")
    assert cut["status"] is None
    assert 50_000 <= cut["received"] < len(weights)
    assert (failed["status"], failed["received"]) == (400, len(weights))
    stored = hub.storage.object(cut["path"].removeprefix("/lfs/"))
    assert not stored.exists()
    api.preupload_lfs_files("lab/m", [addition("model.safetensors", weights)])
    assert stored.read_bytes() == weights


def test_wrong_bytes_have_the_correct_length(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("model", "lab/m", model)
    hub.faults.add(method="GET", path="/lfs/", wrong_bytes=True)
    path = hf_hub_download("lab/m", "model.safetensors", endpoint=hub.url, token=False, local_dir=tmp_path / "local")
    assert Path(path).read_bytes() == bytes(255 - byte for byte in WEIGHTS)


@pytest.mark.parametrize("fault", [{"status": 500}, {"cut": 0}])
def test_a_commit_is_made_although_its_response_is_lost(hub: Hub, api: HfApi, fault: dict[str, int]) -> None:
    api.create_repo("lab/m")
    hub.faults.add(method="POST", path="/commit/", after_work=True, **fault)
    with pytest.raises((HfHubHTTPError, httpx.RemoteProtocolError)):
        api.create_commit("lab/m", [addition("a.txt", b"a")], commit_message="Add")
    assert hub.read("model", "lab/m", "a.txt") == b"a"


def test_a_delay_exceeds_the_clients_timeout(hub: Hub, api: HfApi, model: Path) -> None:
    hub.add("model", "lab/m", model)
    hub.faults.add(path="/api/models/", delay=0.3)
    with pytest.raises(httpx.ReadTimeout):
        api.model_info("lab/m", timeout=0.05)
    assert api.model_info("lab/m").id == "lab/m"


def test_a_cut_leaves_a_response_without_a_body_unsent(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("model", "lab/m", model)
    hub.faults.add(method="HEAD", path="/resolve/", cut=0, times=1)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        hf_hub_download("lab/m", "README.md", endpoint=hub.url, token=False, cache_dir=tmp_path)


def test_rules_and_log_are_accessible_over_http(hub: Hub) -> None:
    with httpx.Client(base_url=hub.url) as client:
        rule = {"path": "/whoami-v2", "status": 500, "times": 1}
        assert client.post("/_faults", json=[rule]).status_code == 200
        assert client.post("/_faults", json=[rule | {"cut": 1}]).status_code == 422
        assert client.post("/_faults", json=[rule | {"sttus": 1}]).status_code == 422
        headers = {"Authorization": "Bearer hf_writer"}
        assert [client.get("/api/whoami-v2", headers=headers).status_code for _ in range(2)] == [500, 200]
        log = client.get("/_log").json()
        assert [(entry["method"], entry["path"], entry["status"]) for entry in log] == [
            ("GET", "/api/whoami-v2", 500),
            ("GET", "/api/whoami-v2", 200),
        ]
        client.delete("/_log")
        assert client.get("/_log").json() == []


def test_commits_at_the_same_time_are_all_kept(hub: Hub, api: HfApi, model: Path) -> None:
    hub.add("model", "lab/m", model)

    def commit(number: int) -> None:
        if number % 2:
            hub.add("model", "lab/m", model, f"{number}")
        else:
            api.create_commit("lab/m", [addition(f"{number}.txt", b"")], commit_message=f"{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(commit, range(8)))
    titles = {commit.title for commit in api.list_repo_commits("lab/m")}
    assert titles == {"initial commit", "Add files", *map(str, range(8))}


def test_another_server_serves_the_same_repositories(hub: Hub, model: Path, tmp_path: Path) -> None:
    sha = hub.add("model", "lab/m", model)
    with serve(tmp_path / "hub", TOKENS) as later:
        assert HfApi(endpoint=later.url, token=False).model_info("lab/m").sha == sha


def test_load_dataset_reads_one_subject(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add("dataset", "cais/mmlu", BUILTIN_BENCHMARKS["mmlu-mini"])
    script = (
        "import json; from datasets import load_dataset; data = load_dataset('cais/mmlu', 'anatomy');"
        "print(json.dumps({name: [len(split), split[0]['question']] for name, split in data.items()}))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    splits = json.loads(run.stdout)
    assert set(splits) == {"test", "dev"}
    read = {path for path, entry in hub.files("dataset", "cais/mmlu", sha).items() if path.startswith("anatomy/")}
    assert len(hub.requests("GET", "/lfs/")) == len(read)


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub", "--root", str(tmp_path), "--port", "0", "--token", "hf_mine"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = "".join(process.stdout.readline() for _ in range(3))
    url = re.search(r"HF_ENDPOINT=(\S+) HF_TOKEN=hf_mine HF_HUB_DISABLE_XET=1", printed)
    assert url, printed
    assert HfApi(endpoint=url[1], token="hf_mine").create_repo("local/m").repo_id == "local/m"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 0
