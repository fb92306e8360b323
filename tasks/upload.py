"""Upload: the Hub repository becomes the release in one commit, or does not change."""

import fnmatch
import logging
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks import hub
from tasks.store import StageFailed, UserError

logger = logging.getLogger(__name__)

# How often the head may move under our hands before that is somebody's to look at.
ATTEMPTS = 5


def publish(
    release: Path,
    repository: str,
    metrics: dict[str, Any],
    branch: str | None,
    create_pr: bool,
    private: bool,
    tagged: bool,
    keep: list[str],
) -> dict[str, Any]:
    """Returns {"state": "published" or "already published", "url", "commit", "tag"}; `metrics` is metrics.json.

    The large files go first, and one commit on top of the head that was read then shows all of it at once; if the
    head has moved meanwhile, it is read and decided again. Files that the release does not have are removed in that
    commit, except those that match `keep`. What the Hub has afterwards is compared, file by file. Raises UserError
    where the Hub refuses, StageFailed where it holds something else than was sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=hub.token(write=True) or False)
    tag = f"v{datetime.now(UTC):%Y-%m-%d}-{metrics['recipe_hash'][:8]}" if tagged else None
    files = sorted(path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file())
    with hub.explained("model", repository, branch):
        # Not asked for is not public: an organization may make its repositories private.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        for _ in range(ATTEMPTS):
            head = api.model_info(repository, revision=branch, files_metadata=True)
            there = {file.rfilename: file for file in head.siblings or []}
            gone = [name for name in there if name not in files and not _matches(name, [*keep, ".gitattributes"])]
            changed = [name for name in files if name not in there or not hub.is_file(release / name, there[name])]
            if not gone and not changed:
                named = _tag(api, repository, tag, str(head.sha)) if tag else None
                return _outcome(api, repository, "already published", head.sha, named)
            if create_pr and (proposed := _proposal(api, repository, release, files, gone)):
                return proposed
            additions = [CommitOperationAdd(name, release / name) for name in changed]
            api.preupload_lfs_files(repository, additions, revision=branch, create_pr=create_pr)
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
        _compare(api, repository, commit.pr_revision or commit.oid, release, files)
        named = _tag(api, repository, tag, commit.oid) if tag else None
    return _outcome(api, repository, "published", commit.oid, named, commit.pr_url)


def check_target(repository: str, create_pr: bool) -> None:
    """Raises UserError if the token may not write to the repository, or make it. Asks the Hub, changes nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
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


def published_accuracy(repository: str, branch: str | None, metrics: dict[str, Any]) -> float | None:
    """Returns the accuracy in percent that the repository's card claims on the same benchmark, or None."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=hub.token(write=True) or False)
    with hub.explained("model", repository, branch):
        try:
            card = api.model_info(repository, revision=branch).card_data
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
    for result in (card and card.eval_results) or []:
        if result.dataset_type == metrics["benchmark"] and result.metric_type == "accuracy":
            return float(result.metric_value)
    return None


def _proposal(api: Any, repository: str, release: Path, files: list[str], gone: list[str]) -> dict[str, Any] | None:
    """Returns the outcome of an open pull request that proposes this release already, if there is one."""
    for request in api.get_repo_discussions(repository, discussion_type="pull_request", discussion_status="open"):
        head = api.model_info(repository, revision=f"refs/pr/{request.num}", files_metadata=True)
        there = {file.rfilename: file for file in head.siblings}
        same = all(name in there and hub.is_file(release / name, there[name]) for name in files)
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


def _compare(api: Any, repository: str, revision: str, release: Path, files: list[str]) -> None:
    there = {
        file.rfilename: file for file in api.model_info(repository, revision=revision, files_metadata=True).siblings
    }
    wrong = [name for name in files if name not in there or not hub.is_file(release / name, there[name])]
    if wrong:
        raise StageFailed(f"{repository} at {revision} holds something else than was sent: {', '.join(wrong)}")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _outcome(
    api: Any, repository: str, state: str, commit: str | None, tag: str | None, url: str | None = None
) -> dict[str, Any]:
    return {
        "state": state,
        "url": url or f"{api.endpoint}/{repository}/commit/{commit}",
        "commit": commit,
        "tag": tag,
    }
