"""Upload: the Hub repository becomes the release in one commit, or does not change."""

import hashlib
import json
import logging
import random
import re
import time
from datetime import UTC, datetime
from typing import Any

from quantize_gemma.tasks.runtime import hub
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.store import Artifact, check_file, file_changed, read_file

logger = logging.getLogger(__name__)

# How often the head may move under our hands before that is somebody's to look at.
ATTEMPTS = 5
# Lists the other files of a release: what the next release may remove.
MANIFEST = "release.json"
# What releases without a manifest have written.
WRITTEN_BEFORE = (
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
SHARDS_WRITTEN_BEFORE = r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json"
# Files of at most so many bytes are read once, and sent as they were hashed. Larger ones are always LFS files, whose
# hash the Hub's client takes of what it sends.
MOST_BYTES_READ = 20_000_000
# More than any metrics.json or README.md has.
MOST_BYTES_ASKED = 16_000_000


def publish(
    release: Artifact,
    repository: str,
    branch: str | None,
    create_pr: bool,
    private: bool,
    tagged: bool,
    adopt: bool,
) -> dict[str, Any]:
    """Returns {"state": "published" or "already published", "url", "commit", "tag"}.

    Nothing goes out that is not what the release's manifest says. The large files go first, and one commit on top of
    the head that was read then shows all of it at once; if the head has moved meanwhile, it is read and decided again.
    Files that the release before wrote and this one does not have are removed in that commit, and no others. What the
    Hub has afterwards is compared with the manifest, file by file.

    Raises UserError where the Hub refuses, or holds what no release of ours wrote unless `adopt`; StageFailed where a
    file here or there is not what it should be.
    """
    from huggingface_hub import CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    contents = _read_release(release)
    metrics = json.loads(contents["metrics.json"])
    api = HfApi(token=hub.token(write=True) or False)
    tag = f"v{datetime.now(UTC):%Y-%m-%d}-{metrics['recipe_hash'][:8]}" if tagged else None
    with hub.explained("model", repository, branch):
        # Not asked for is not public: an organization may make its repositories private.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        for _ in range(ATTEMPTS):
            head = api.model_info(repository, revision=branch, files_metadata=True)
            there = {file.rfilename: file for file in head.siblings or []}
            written = _written_before(repository, head, adopt)
            left = [name for name in written if name in there and name not in release.files]
            gone = [name for name in left if _has(repository, str(head.sha), there[name], written[name])]
            changed = [name for name in release.files if not _is_same(release, contents, name, there)]
            if not gone and not changed:
                named = _tag(api, repository, tag, str(head.sha)) if tag else None
                return _outcome(api, repository, "already published", head.sha, named)
            if create_pr and (proposed := _proposal(api, repository, release, contents, gone)):
                return proposed
            additions = _send(api, repository, release, contents, changed, branch, create_pr)
            try:
                commit = api.create_commit(
                    repository,
                    [*additions, *(CommitOperationDelete(name, is_folder=False) for name in gone)],
                    commit_message=f"{metrics['recipe']} of {metrics['base_model']} at {metrics['base_revision'][:12]}",
                    commit_description=f"Base revision {metrics['base_revision']}, recipe hash "
                    f"{metrics['recipe_hash']}, run {metrics['run_id']}.",
                    revision=branch,
                    create_pr=create_pr,
                    parent_commit=head.sha,
                )
                break
            except HfHubHTTPError as error:
                if error.response.status_code not in (409, 412):
                    raise
                logger.info("upload: the head of %s has moved; reading it again", repository)
                time.sleep(random.uniform(0.5, 1.5))
        else:
            raise UserError(
                f"the head of {repository} moved {ATTEMPTS} times while it was published: who else writes there?"
            )
        _compare(api, repository, commit.pr_revision or commit.oid, release, contents)
        named = _tag(api, repository, tag, commit.oid) if tag else None
    return _outcome(api, repository, "published", commit.oid, named, commit.pr_url)


def _read_release(release: Artifact) -> dict[str, bytes]:
    """Hashes every file; returns the contents of the small ones. Raises StageFailed that names one that has changed."""
    contents = {}
    for name, file in release.files.items():
        if file.size <= MOST_BYTES_READ:
            contents[name] = read_file(release, name)
        else:
            check_file(release, name)
    return contents


def _send(
    api: Any,
    repository: str,
    release: Artifact,
    contents: dict[str, bytes],
    names: list[str],
    branch: str | None,
    create_pr: bool,
) -> list[Any]:
    """Sends the large files among those named; returns what adds all of them to a commit."""
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, contents.get(name, release.path / name)) for name in names]
    api.preupload_lfs_files(repository, additions, revision=branch, create_pr=create_pr)
    for name, addition in zip(names, additions, strict=True):
        if addition.upload_info.sha256.hex() != release.files[name].sha256:
            raise file_changed(release, name)
    return additions


def _is_same(release: Artifact, contents: dict[str, bytes], name: str, there: dict[str, Any]) -> bool:
    """Tells whether the Hub has the file as the manifest describes it."""
    if name not in there or there[name].size != release.files[name].size:
        return False
    if there[name].lfs is not None:
        return bool(there[name].lfs.sha256 == release.files[name].sha256)
    return name in contents and hub.git_sha1(contents[name]) == there[name].blob_id


def check_target(repository: str, branch: str | None, create_pr: bool, adopt: bool) -> None:
    """Asks the Hub and changes nothing.

    Raises UserError if the token may not write to the repository, or make it, or if it holds what no release of ours
    wrote, unless `adopt`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    value = hub.token(write=True)
    if value is None:
        raise UserError(
            f"no token to publish to {repository} with: set HF_TOKEN_WRITE or HF_TOKEN, or run `hf auth login`"
        )
    api = HfApi(token=value)
    with hub.explained("model", repository):
        validate_repo_id(repository)
        me = api.whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                f"the token may only read, not publish to {repository}: set HF_TOKEN_WRITE to one that may write"
            )
        try:
            api.auth_check(repository, write=not create_pr)
            try:
                head = api.model_info(repository, revision=branch, files_metadata=True)
            except RevisionNotFoundError:
                # The branch is made from the default one.
                head = api.model_info(repository, files_metadata=True)
            _written_before(repository, head, adopt)
            return
        except RepositoryNotFoundError:
            pass
        allowed = _namespaces(me)
        if repository.split("/")[0] not in allowed:
            raise UserError(
                f"the token may not make a repository in {repository.split('/')[0]!r}: "
                f"it may in {', '.join(allowed) or 'none'}"
            )


def _namespaces(me: dict[str, Any]) -> list[str]:
    """Returns where the token's owner may make repositories: a fine-grained token's scopes, else all of the owner's."""
    access = me.get("auth", {}).get("accessToken", {})
    if access.get("role") == "fineGrained":
        scopes = access.get("fineGrained", {}).get("scoped", [])
        return [scope["entity"]["name"] for scope in scopes if "repo.write" in scope.get("permissions", [])]
    organizations = [org["name"] for org in me.get("orgs", []) if org.get("roleInOrg") != "read"]
    return [me["name"], *organizations]


def published_metrics(repository: str, branch: str | None) -> dict[str, Any] | None:
    """Returns the metrics.json at the head of the repository, None if there is none.

    Anybody may have written it: the result is empty where it is not a JSON object.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=hub.token(write=True) or False)
    with hub.explained("model", repository, branch):
        try:
            head = api.model_info(repository, revision=branch, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
        there = {file.rfilename: file for file in head.siblings or []}
        return _read_json(repository, str(head.sha), there["metrics.json"]) if "metrics.json" in there else None


def _read_json(repository: str, revision: str, file: Any) -> dict[str, Any]:
    """Returns the JSON object in a file of the repository, an empty one if it is none, or is far too large."""
    if file.size > MOST_BYTES_ASKED:
        return {}
    try:
        value = json.loads(_read(repository, revision, file))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _written_before(repository: str, head: Any, adopt: bool) -> dict[str, str | None]:
    """Returns the files that the release before has written there, each with its SHA-256 if it is known.

    Raises UserError if there are files, and no release of ours, unless `adopt`.
    """
    there = {file.rfilename: file for file in head.siblings or [] if file.rfilename != ".gitattributes"}
    if MANIFEST in there:
        listed = _read_json(repository, head.sha, there[MANIFEST]).get("files")
        if isinstance(listed, dict) and all(isinstance(file, dict) for file in listed.values()):
            return {name: str(file.get("sha256")) for name, file in listed.items()}
    if "metrics.json" in there and _is_ours(_read_json(repository, head.sha, there["metrics.json"])):
        return {name: None for name in there if name in WRITTEN_BEFORE or re.fullmatch(SHARDS_WRITTEN_BEFORE, name)}
    others = [name for name in there if name != "README.md" or not _is_stub(repository, head.sha, there[name])]
    if others and not adopt:
        some = ", ".join(others[:3]) + (" and more" if len(others) > 3 else "")
        raise UserError(
            f"{repository} holds files that no release of quantize-gemma wrote ({some}): give another target, or "
            "--adopt to publish there all the same, which replaces those of the release's names and removes none"
        )
    return {}


def _has(repository: str, revision: str, file: Any, sha256: str | None) -> bool:
    """Tells whether a file of the repository has this content, if it is known what it should be."""
    if sha256 is None:
        return True
    if file.lfs is not None:
        return bool(file.lfs.sha256 == sha256)
    return file.size <= MOST_BYTES_ASKED and hashlib.sha256(_read(repository, revision, file)).hexdigest() == sha256


def _read(repository: str, revision: str, file: Any) -> bytes:
    return hub.read("model", repository, revision, file, hub.token(write=True))


def _is_ours(metrics: dict[str, Any]) -> bool:
    """Tells whether a metrics.json has the shape that ours has."""
    texts = all(isinstance(metrics.get(name), str) for name in ("base_model", "base_revision", "recipe", "run_id"))
    recipe_hash = metrics.get("recipe_hash")
    hashed = isinstance(recipe_hash, str) and re.fullmatch("[0-9a-f]{64}", recipe_hash) is not None
    return (
        texts and hashed and all(isinstance(metrics.get(name), dict) for name in ("versions", "quantized", "program"))
    )


def _is_stub(repository: str, revision: str, file: Any) -> bool:
    """Tells whether a README.md is the one that the Hub makes with a repository: a licence and no text."""
    if file.size > MOST_BYTES_ASKED:
        return False
    text = _read(repository, revision, file).decode("utf-8", "replace")
    return re.fullmatch(r"\s*(---\s*(license(_name|_link)?:.*\s)*---\s*)?", text) is not None


def _proposal(
    api: Any, repository: str, release: Artifact, contents: dict[str, bytes], gone: list[str]
) -> dict[str, Any] | None:
    """Returns the outcome of an open pull request that proposes this release already, if there is one."""
    for request in api.get_repo_discussions(repository, discussion_type="pull_request", discussion_status="open"):
        head = api.model_info(repository, revision=f"refs/pr/{request.num}", files_metadata=True)
        there = {file.rfilename: file for file in head.siblings}
        same = all(_is_same(release, contents, name, there) for name in release.files)
        if same and not any(name in there for name in gone):
            return _outcome(api, repository, "already published", head.sha, None, request.url)
    return None


def _tag(api: Any, repository: str, name: str, commit: str) -> str:
    """Returns the name under which the commit is tagged: the next free one, for there may be two releases in a day."""
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repository).tags}
    number = 1
    while True:
        free = name if number == 1 else f"{name}-{number}"
        if tags.get(free) == commit:
            return free
        if free not in tags:
            api.create_tag(repository, tag=free, revision=commit)
            return free
        number += 1


def _compare(api: Any, repository: str, revision: str, release: Artifact, contents: dict[str, bytes]) -> None:
    head = api.model_info(repository, revision=revision, files_metadata=True)
    there = {file.rfilename: file for file in head.siblings}
    wrong = [name for name in release.files if not _is_same(release, contents, name, there)]
    if wrong:
        raise StageFailed(f"{repository} at {revision} holds something else than was sent: {', '.join(wrong)}")


def _outcome(
    api: Any, repository: str, state: str, commit: str | None, tag: str | None, url: str | None = None
) -> dict[str, Any]:
    return {
        "state": state,
        "url": url or f"{api.endpoint}/{repository}/commit/{commit}",
        "commit": commit,
        "tag": tag,
    }
