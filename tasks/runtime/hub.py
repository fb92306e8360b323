"""Download files from the Hugging Face Hub, verify them against its hashes, and resume interrupted downloads.

hub_client.py handles tokens and timeouts, and hub_errors.py explains the Hub's errors.
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.hub_errors import translate_hub_errors

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo
    from huggingface_hub.hf_api import RepoSibling

REPORTED_BYTES = 8 * 1024 * 1024


def repo_info(kind: str, repository: str, revision: str | None, token: str | None) -> "ModelInfo | DatasetInfo":
    """Return the Hub's description of a repository at a revision: its commit, and its files with sizes and hashes.

    Args:
        kind: "model" or "dataset".
        repository: The repository's name.
        revision: A branch, tag, or commit; None for the default branch.
        token: The Hub token.

    Raises:
        UserError: There is no such repository, or the token has no access to its files.
        StageFailed: The Hub fails.
    """
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo

    api = HfApi(token=token or False)
    with translate_hub_errors(kind, repository, revision):
        info = api.repo_info(repository, repo_type=kind, revision=revision, files_metadata=True)
        assert isinstance(info, ModelInfo | DatasetInfo)
        # The list of a gated repository's files is public, but the files are not.
        if info.gated or info.private:
            api.auth_check(repository, repo_type=kind)
        return info


def download_files(
    folder: Path,
    kind: str,
    repository: str,
    revision: str,
    is_needed: Callable[[str], bool],
    progress: Callable[[int, int], None],
) -> None:
    """Download the files of a commit into a folder, and verify the size and hash that the Hub lists for each of them.

    Correct files that already exist are kept; a partial one is resumed; a wrong one is downloaded once more.

    Args:
        folder: The folder.
        kind: "model" or "dataset".
        repository: The repository's name.
        revision: The commit.
        is_needed: Tells whether to download a file, by its path.
        progress: Called with the number of downloaded bytes and their total.

    Raises:
        UserError: The Hub rejects the request.
        StageFailed: The Hub fails, or a file is wrong twice.
    """
    from huggingface_hub import get_token

    # The parent has set it in the environment: a worker process does not ask Prefect for it.
    token = get_token()
    info = repo_info(kind, repository, revision, token)
    files = [file for file in info.siblings or [] if is_needed(file.rfilename)]
    total = sum(file.size or 0 for file in files)
    bytes_done = 0

    def report(count: int) -> None:
        progress(bytes_done + count, total)

    for file in files:
        path = folder / file.rfilename
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            if not (path.is_file() and is_same(path, file)):
                with translate_hub_errors(kind, repository, revision):
                    _download(path, kind, repository, revision, file, token, report)
            if is_same(path, file):
                break
            path.unlink()
        else:
            raise StageFailed(
                f"{file.rfilename} of {repository} was downloaded twice and did not match the Hub's hash: it was not "
                "kept; check the network or the proxy, and start the run again"
            )
        bytes_done += file.size or 0
        report(0)


def read_file(kind: str, repository: str, revision: str, file: "RepoSibling", token: str | None) -> bytes:
    """Return the content of a small file that the Hub describes.

    Raises:
        UserError: The Hub rejects the request.
        StageFailed: The Hub fails, or the content does not match its description.
    """
    with tempfile.TemporaryDirectory() as folder, translate_hub_errors(kind, repository, revision):
        path = Path(folder) / "file"
        _download(path, kind, repository, revision, file, token, lambda _: None)
        if not is_same(path, file):
            raise StageFailed(f"{file.rfilename} of {repository} does not match the Hub's hash", True)
        return path.read_bytes()


def is_same(path: Path, file: "RepoSibling") -> bool:
    """Tell whether a file has the size and hash that the Hub lists: SHA-256, or git's SHA-1 for small files."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        with path.open("rb") as stream:
            return bool(hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256)
    return git_sha1(path.read_bytes()) == file.blob_id


def git_sha1(content: bytes) -> str:
    """Return a file's hash as git computes it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _download(
    path: Path,
    kind: str,
    repository: str,
    revision: str,
    file: "RepoSibling",
    token: str | None,
    report: Callable[[int], None],
) -> None:
    """Download one file, resuming a partial download: the client's own download starts over."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    size = file.size or 0
    partial = path.with_name(f"{path.name}.incomplete")
    offset = partial.stat().st_size if partial.is_file() else 0
    if offset >= size:
        partial.unlink(missing_ok=True)
        offset = 0
    # Disable compression, which would make it impossible to resume a partial file.
    headers = {**build_hf_headers(token=token or False), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    url = hf_hub_url(repository, file.rfilename, repo_type=kind, revision=revision)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        with partial.open("ab" if response.status_code == 206 else "wb") as stream:
            last_report = 0
            for chunk in response.iter_raw():
                stream.write(chunk)
                # A response that is too long is wrong, and might never end.
                if stream.tell() > size:
                    break
                if stream.tell() - last_report >= REPORTED_BYTES:
                    last_report = stream.tell()
                    report(last_report)
    partial.replace(path)
