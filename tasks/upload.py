"""Upload: pushes the release to the Hub as one commit, or does nothing where no target is given."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from tasks.policies import open_record


def push_release(release: Path, repository: str, message: str) -> str:
    """Returns the URL of the commit that made the repository equal to the release; large files go first."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    head = api.model_info(repository).sha
    operations = [
        CommitOperationAdd(path.relative_to(release).as_posix(), path)
        for path in sorted(release.rglob("*"))
        if path.is_file()
    ]
    api.preupload_lfs_files(repository, operations)
    commit = api.create_commit(repository, operations, commit_message=message, parent_commit=head)
    return str(commit.commit_url)


@task(name="upload", task_run_name="upload", persist_result=False)
def upload(release: dict[str, Any], repository: str | None, message: str) -> str | None:
    """Publish the release, or say that it was not asked for."""
    if repository is None:
        get_run_logger().info("upload: skipped, no target was given")
        return None
    return push_release(open_record(release).path, repository, message)
