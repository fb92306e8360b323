"""Publish: replace the content of the Hub repository with the release in one commit, or leave it unchanged."""

import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from quantize_gemma.tasks.runtime import hub
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.hub_client import find_token
from quantize_gemma.tasks.runtime.hub_errors import translate_hub_errors
from quantize_gemma.tasks.runtime.store import Artifact, check_file, file_changed, read_file

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoSibling

logger = logging.getLogger(__name__)

# How often the branch head may move during an upload before the run gives up.
ATTEMPTS = 5
# Lists the other files of a release, which the next release may delete.
MANIFEST = "release.json"
# The files of releases that were published before release.json existed.
LEGACY_FILES = (
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "delegation.json",
    "generation_config.json",
    "metrics.json",
    "mmlu-by-subject.png",
    "model.pte",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
LEGACY_SHARDS = r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json"
# Files of at most this many bytes are read once, so that the bytes that were hashed are sent. Larger files are always
# LFS files, which the Hub's client hashes as it sends them.
MAX_BYTES_IN_MEMORY = 20_000_000
# No metrics.json or README.md is larger than this.
MAX_BYTES_DOWNLOADED = 16_000_000


@dataclass(frozen=True)
class Target:
    """Where and how to publish a release.

    Attributes:
        repository: The Hub repository.
        branch: Its branch; None for the default branch.
        create_pr: Open a pull request instead of committing to the branch.
        adopt: Publish even if the repository contains files that quantize-gemma did not write.
    """

    repository: str
    branch: str | None = None
    create_pr: bool = False
    adopt: bool = False


@dataclass(frozen=True)
class Publication:
    """A published release: its URL, its commit, and its tag if there is one."""

    state: Literal["published", "already published"]
    url: str
    commit: str
    tag: str | None


def publish(release: Artifact, target: Target, private: bool = False, tagged: bool = False) -> Publication:
    """Replace the repository's content with the release in one commit, or leave it unchanged.

    Every file is compared with the release's manifest first. Large files are uploaded before the commit, which then
    adds everything at once on top of the branch head; if the head has moved in the meantime, it is read again. The
    commit deletes the files that the previous release wrote and this one does not contain, and no others. Afterwards,
    the repository is compared with the manifest, file by file.

    Args:
        release: The artifact of `card`.
        target: Where and how to publish it.
        private: Make the repository private if it has to be created.
        tagged: Tag the commit as v<date>-<recipe hash>.

    Raises:
        UserError: The Hub rejects the request, or the repository contains files that quantize-gemma did not write.
        StageFailed: A file differs from the release's manifest, here or on the Hub.
    """
    from huggingface_hub import HfApi

    contents = _read_release(release)
    recipe_hash = json.loads(contents["metrics.json"])["recipe_hash"]
    api = HfApi(token=find_token(write=True) or False)
    tag = f"v{datetime.now(UTC):%Y-%m-%d}-{recipe_hash[:8]}" if tagged else None
    with translate_hub_errors("model", target.repository, target.branch):
        # Without `private`, the organization's own default applies.
        api.create_repo(target.repository, private=private or None, exist_ok=True)
        if target.branch:
            api.create_branch(target.repository, branch=target.branch, exist_ok=True)
        for _ in range(ATTEMPTS):
            change = _plan(api, target, release, contents)
            if not change.upload and not change.delete:
                name = _tag(api, target.repository, tag, change.head) if tag else None
                return _publication(api, target.repository, "already published", change.head, name)
            if target.create_pr and (proposal := _open_proposal(api, target, release, contents, change)):
                return proposal
            commit = _commit(api, target, release, contents, change)
            if commit is not None:
                break
            logger.info("upload: the head of %s has moved; reading it again", target.repository)
            time.sleep(random.uniform(0.5, 1.5))
        else:
            raise UserError(
                f"the head of {target.repository} moved {ATTEMPTS} times during the upload: "
                "stop whatever else writes to it, and start the run again"
            )
        _verify_upload(api, target.repository, commit.pr_revision or commit.oid, release, contents)
        name = _tag(api, target.repository, tag, commit.oid) if tag else None
    return _publication(api, target.repository, "published", commit.oid, name, commit.pr_url)


def _read_release(release: Artifact) -> dict[str, bytes]:
    """Hash every file and return the contents of the small ones. Raises StageFailed if a file has changed."""
    contents = {}
    for name, file in release.files.items():
        if file.size <= MAX_BYTES_IN_MEMORY:
            contents[name] = read_file(release, name)
        else:
            check_file(release, name)
    return contents


@dataclass(frozen=True)
class _Change:
    """The files that a commit on top of `head` has to upload and delete."""

    head: str
    upload: list[str]
    delete: list[str]


def _plan(api: "HfApi", target: Target, release: Artifact, contents: dict[str, bytes]) -> _Change:
    """Return the difference between the repository and the release."""
    head = api.model_info(target.repository, revision=target.branch, files_metadata=True)
    remote_files, revision = _files_by_name(head), str(head.sha)
    previous_files = _previous_files(target.repository, head, target.adopt)
    stale = [name for name in previous_files if name in remote_files and name not in release.files]
    return _Change(
        head=revision,
        upload=[name for name in release.files if not _is_same(release, contents, name, remote_files)],
        # Keep a file that someone has changed since.
        delete=[
            name for name in stale if _has_sha256(target.repository, revision, remote_files[name], previous_files[name])
        ],
    )


def _files_by_name(head: "ModelInfo") -> "dict[str, RepoSibling]":
    return {file.rfilename: file for file in head.siblings or []}


def _is_same(release: Artifact, contents: dict[str, bytes], name: str, remote_files: "dict[str, RepoSibling]") -> bool:
    """Return whether the Hub has the file as the manifest describes it."""
    file = remote_files.get(name)
    if file is None or file.size != release.files[name].size:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == release.files[name].sha256)
    return name in contents and hub.git_sha1(contents[name]) == file.blob_id


def _open_proposal(
    api: "HfApi", target: Target, release: Artifact, contents: dict[str, bytes], change: _Change
) -> Publication | None:
    """Return the open pull request that already proposes this release, if there is one."""
    requests = api.get_repo_discussions(target.repository, discussion_type="pull_request", discussion_status="open")
    for request in requests:
        head = api.model_info(target.repository, revision=f"refs/pr/{request.num}", files_metadata=True)
        remote_files = _files_by_name(head)
        has_release = all(_is_same(release, contents, name, remote_files) for name in release.files)
        if has_release and not any(name in remote_files for name in change.delete):
            return _publication(api, target.repository, "already published", str(head.sha), None, request.url)
    return None


def _commit(
    api: "HfApi", target: Target, release: Artifact, contents: dict[str, bytes], change: _Change
) -> "CommitInfo | None":
    """Upload and commit a change; return the commit, or None if the head has moved."""
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    metrics = json.loads(contents["metrics.json"])
    additions = _upload_large_files(api, target, release, contents, change.upload)
    try:
        return api.create_commit(
            target.repository,
            [*additions, *(CommitOperationDelete(name, is_folder=False) for name in change.delete)],
            commit_message=f"{metrics['recipe']} of {metrics['base_model']} at {metrics['base_revision'][:12]}",
            commit_description=f"Base revision {metrics['base_revision']}, recipe hash "
            f"{metrics['recipe_hash']}, run {metrics['run_id']}.",
            revision=target.branch,
            create_pr=target.create_pr,
            parent_commit=change.head,
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (409, 412):
            raise
        return None


def _upload_large_files(
    api: "HfApi", target: Target, release: Artifact, contents: dict[str, bytes], names: list[str]
) -> "list[CommitOperationAdd]":
    """Upload the large files among `names`; return the operations that add all of the files to a commit."""
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, contents.get(name, release.path / name)) for name in names]
    api.preupload_lfs_files(target.repository, additions, revision=target.branch, create_pr=target.create_pr)
    for name, addition in zip(names, additions, strict=True):
        if addition.upload_info.sha256.hex() != release.files[name].sha256:
            raise file_changed(release, name)
    return additions


def _tag(api: "HfApi", repository: str, name: str, commit: str) -> str:
    """Tag the commit with this name, plus a number if another commit has it; return the tag."""
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repository).tags}
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        if tags.get(candidate) == commit:
            return candidate
        if candidate not in tags:
            api.create_tag(repository, tag=candidate, revision=commit)
            return candidate
        number += 1


def _verify_upload(api: "HfApi", repository: str, revision: str, release: Artifact, contents: dict[str, bytes]) -> None:
    """Raise StageFailed if the repository does not contain the release's files."""
    remote_files = _files_by_name(api.model_info(repository, revision=revision, files_metadata=True))
    differing_files = [name for name in release.files if not _is_same(release, contents, name, remote_files)]
    if differing_files:
        raise StageFailed(
            f"{repository} at {revision} differs from the release after the upload: check "
            f"{', '.join(differing_files)} there, and start the run again"
        )


def _publication(
    api: "HfApi",
    repository: str,
    state: Literal["published", "already published"],
    commit: str,
    tag: str | None,
    url: str | None = None,
) -> Publication:
    return Publication(state, url or f"{api.endpoint}/{repository}/commit/{commit}", commit, tag)


def check_target(target: Target) -> None:
    """Raise UserError if the release could not be published; change nothing on the Hub.

    The token may lack permission to write to the repository or to create it, or the repository may contain files that
    quantize-gemma did not write.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository = target.repository
    value = find_token(write=True)
    if value is None:
        raise UserError(
            f"there is no token to publish to {repository}: set HF_TOKEN_WRITE or HF_TOKEN, or run `hf auth login`"
        )
    api = HfApi(token=value)
    with translate_hub_errors("model", repository):
        validate_repo_id(repository)
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                f"the token is read-only and cannot publish to {repository}: set HF_TOKEN_WRITE to one that can write"
            )
        try:
            api.auth_check(repository, write=not target.create_pr)
            try:
                head = api.model_info(repository, revision=target.branch, files_metadata=True)
            except RevisionNotFoundError:
                # The branch is created from the default branch.
                head = api.model_info(repository, files_metadata=True)
            _previous_files(repository, head, target.adopt)
            return
        except RepositoryNotFoundError:
            pass
        namespaces = _namespaces(account)
        if repository.split("/")[0] not in namespaces:
            raise UserError(
                f"the token cannot create a repository in {repository.split('/')[0]!r}: "
                f"use another token, or a namespace that it can write to ({', '.join(namespaces) or 'none'})"
            )


def _namespaces(account: dict[str, Any]) -> list[str]:
    """Return the namespaces in which the token can create repositories: its scopes if it is fine-grained, else all."""
    access = account.get("auth", {}).get("accessToken", {})
    if access.get("role") == "fineGrained":
        scopes = access.get("fineGrained", {}).get("scoped", [])
        return [scope["entity"]["name"] for scope in scopes if "repo.write" in scope.get("permissions", [])]
    organizations = [org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"]
    return [account["name"], *organizations]


def published_metrics(repository: str, branch: str | None) -> dict[str, object] | None:
    """Return the metrics.json at the head of the repository; None if there is none.

    It is untrusted: the result is empty if it is not a JSON object.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=find_token(write=True) or False)
    with translate_hub_errors("model", repository, branch):
        try:
            head = api.model_info(repository, revision=branch, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
        file = _files_by_name(head).get("metrics.json")
        return None if file is None else _read_json(repository, str(head.sha), file)


def _read_json(repository: str, revision: str, file: "RepoSibling") -> dict[str, object]:
    """Return the JSON object in a file of the repository; an empty one if it is something else or far too large."""
    if (file.size or 0) > MAX_BYTES_DOWNLOADED:
        return {}
    try:
        value = json.loads(_download(repository, revision, file))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _previous_files(repository: str, head: "ModelInfo", adopt: bool) -> dict[str, str | None]:
    """Return the files that the previous release wrote, each with its SHA-256 if it is known.

    Raises UserError if the repository has files but no release of ours, unless `adopt` is set.
    """
    remote_files = {name: file for name, file in _files_by_name(head).items() if name != ".gitattributes"}
    revision = str(head.sha)
    if MANIFEST in remote_files:
        files = _read_json(repository, revision, remote_files[MANIFEST]).get("files")
        if isinstance(files, dict) and all(isinstance(file, dict) for file in files.values()):
            return {name: str(file.get("sha256")) for name, file in files.items()}
    if "metrics.json" in remote_files and _is_ours(_read_json(repository, revision, remote_files["metrics.json"])):
        return {name: None for name in remote_files if name in LEGACY_FILES or re.fullmatch(LEGACY_SHARDS, name)}
    foreign_files = [
        name for name, file in remote_files.items() if name != "README.md" or not _is_stub(repository, revision, file)
    ]
    if foreign_files and not adopt:
        examples = ", ".join(foreign_files[:3]) + (" and more" if len(foreign_files) > 3 else "")
        raise UserError(
            f"{repository} contains files that quantize-gemma did not write ({examples}): choose another target, or "
            "pass --adopt to publish there anyway, which overwrites files with the same names and deletes none"
        )
    return {}


def _is_ours(metrics: Mapping[str, object]) -> bool:
    """Return whether a metrics.json is one of ours, of any version."""
    has_texts = all(isinstance(metrics.get(name), str) for name in ("base_model", "base_revision", "recipe", "run_id"))
    recipe_hash = metrics.get("recipe_hash")
    has_hash = isinstance(recipe_hash, str) and re.fullmatch("[0-9a-f]{64}", recipe_hash) is not None
    return (
        has_texts
        and has_hash
        and all(isinstance(metrics.get(name), dict) for name in ("versions", "quantized", "program"))
    )


def _is_stub(repository: str, revision: str, file: "RepoSibling") -> bool:
    """Return whether a README.md is the one that the Hub creates with a repository: a license and no text."""
    if (file.size or 0) > MAX_BYTES_DOWNLOADED:
        return False
    text = _download(repository, revision, file).decode("utf-8", "replace")
    return re.fullmatch(r"\s*(---\s*(license(_name|_link)?:.*\s)*---\s*)?", text) is not None


def _has_sha256(repository: str, revision: str, file: "RepoSibling", sha256: str | None) -> bool:
    """Return whether a file of the repository has this SHA-256; True if it is not known."""
    if sha256 is None:
        return True
    if file.lfs is not None:
        return bool(file.lfs.sha256 == sha256)
    is_small = (file.size or 0) <= MAX_BYTES_DOWNLOADED
    return is_small and hashlib.sha256(_download(repository, revision, file)).hexdigest() == sha256


def _download(repository: str, revision: str, file: "RepoSibling") -> bytes:
    return hub.read_file("model", repository, revision, file, find_token(write=True))
