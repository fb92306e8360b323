"""Repositories on disk: objects by SHA-256, and one JSON file per repository with its refs and commits."""

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# {"size", "sha256", "blob_id", "lfs"}; the blob id is git's; for an LFS file, it is that of the pointer.
Entry = dict[str, Any]
# {"private", "gated", "refs": {ref: sha}, "commits": {sha: {"parent", "title", "message", "date", "author", "files"}}}
Repo = dict[str, Any]

LFS_PATTERNS = ("*.safetensors", "*.pte", "*.parquet", "*.png", "tokenizer.json")
LARGE = 10_000_000
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)


class HubError(Exception):
    """An error response, with the fields from which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


class Storage:
    """All repositories under one root; safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        for name in ("objects", "partial"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def partial(self) -> Path:
        """Return a new path for an object that is not complete yet."""
        return self.root / "partial" / uuid.uuid4().hex

    def add_object(self, partial: Path, sha256: str | None = None) -> str:
        """Move a complete file to the objects; return its SHA-256. Raises HubError if it is not the expected one."""
        with partial.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 not in (None, digest):
            partial.unlink()
            raise HubError(400, f"the object's SHA-256 is {digest}, not {sha256}")
        os.replace(partial, self.object(digest))
        return digest

    def object(self, sha256: str) -> Path:
        """Return the path of an object, whether or not it exists."""
        return self.root / "objects" / sha256

    def has(self, sha256: str, size: int) -> bool:
        """Return whether the object is stored, with that size."""
        path = self.object(sha256)
        return path.is_file() and path.stat().st_size == size

    def add_bytes(self, content: bytes, lfs: bool = False) -> Entry:
        """Store the content and return its entry."""
        partial = self.partial()
        partial.write_bytes(content)
        return self.entry(self.add_object(partial), lfs)

    def add_file(self, path: Path, name: str) -> Entry:
        """Store a copy of the file, which is `name` in its repository, and return its entry."""
        partial = self.partial()
        shutil.copyfile(path, partial)
        return self.entry(self.add_object(partial), is_lfs(name, path.stat().st_size))

    def entry(self, sha256: str, lfs: bool) -> Entry:
        """Return the entry of a stored object. Raises HubError if there is no such object."""
        path = self.object(sha256)
        if not path.is_file():
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = path.stat().st_size
        content = lfs_pointer(sha256, size) if lfs else path.read_bytes()
        return {"size": size, "sha256": sha256, "blob_id": git_blob_id(content), "lfs": lfs}

    def create(self, kind: str, repo_id: str, author: str, private: bool = False) -> bool:
        """Create a repository with the Hub's first commit, a .gitattributes; return False if it exists already."""
        with self.lock:
            if self.find(kind, repo_id):
                return False
            repo: Repo = {"private": private, "gated": False, "refs": {}, "commits": {}}
            files = {".gitattributes": self.add_bytes(GIT_ATTRIBUTES.encode())}
            repo["refs"]["refs/heads/main"] = add_commit(repo, repo_id, None, files, "initial commit", "", author)
            self.save(kind, repo_id, repo)
            return True

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """Return the repository, or None."""
        path = self._path(kind, repo_id)
        return json.loads(path.read_bytes()) if path.is_file() else None

    def load(self, kind: str, repo_id: str) -> Repo:
        """Return the repository. Raises HubError if there is none."""
        repo = self.find(kind, repo_id)
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def save(self, kind: str, repo_id: str, repo: Repo) -> None:
        """Replace the repository atomically: a reader sees the old or the new state."""
        path = self._path(kind, repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.partial()
        partial.write_text(json.dumps(repo))
        os.replace(partial, path)

    def commit(
        self,
        kind: str,
        repo_id: str,
        revision: str,
        additions: dict[str, Entry],
        deletions: Iterable[str] = (),
        *,
        title: str,
        message: str = "",
        author: str,
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[str, str]:
        """Commit to the branch, deletions first (a folder's name ends with a slash); return the sha and the ref.

        With create_pr, the ref is that of a new pull request, which starts at `parent`. Otherwise, raises HubError if
        `parent` is not the branch's head. Also raises HubError if a file to delete does not exist.
        """
        with self.lock:
            repo = self.load(kind, repo_id)
            refs = repo["refs"]
            if create_pr:
                ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in refs)}"
                head = resolve(repo, parent or revision)
            else:
                ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
                head = resolve(repo, ref)
                if parent and not head.startswith(parent):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo["commits"][head]["files"])
            for name in deletions:
                deleted_paths = [
                    path for path in files if path == name or (name.endswith("/") and path.startswith(name))
                ]
                if not deleted_paths:
                    raise HubError(404, f"A file with this name doesn't exist: {name}", "EntryNotFound")
                for path in deleted_paths:
                    del files[path]
            files.update(additions)
            refs[ref] = add_commit(repo, repo_id, head, files, title, message, author)
            self.save(kind, repo_id, repo)
            return refs[ref], ref

    def add_ref(self, kind: str, repo_id: str, ref: str, revision: str) -> None:
        """Make the ref point to the revision. Raises HubError if the ref exists."""
        with self.lock:
            repo = self.load(kind, repo_id)
            if ref in repo["refs"]:
                raise HubError(409, f"Reference already exists: {ref}")
            repo["refs"][ref] = resolve(repo, revision)
            self.save(kind, repo_id, repo)

    def _path(self, kind: str, repo_id: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
            raise HubError(404, f"not the name of a repository: {repo_id}", "RepoNotFound")
        return self.root / f"{kind}s" / f"{repo_id}.json"


def is_lfs(path: str, size: int) -> bool:
    """Return whether the Hub would store this file in LFS."""
    name = Path(path).name
    return size > LARGE or any(Path(name).match(pattern) for pattern in LFS_PATTERNS)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return the text that git stores instead of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_blob_id(content: bytes) -> str:
    """Return git's SHA-1 of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def add_commit(
    repo: Repo, repo_id: str, parent: str | None, files: dict[str, Entry], title: str, message: str, author: str
) -> str:
    """Add a commit, to which no ref points yet, and return its sha, which does not depend on the date."""
    content = json.dumps([repo_id, parent, title, message, files], sort_keys=True)
    sha = hashlib.sha1(content.encode()).hexdigest()
    date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    commit = {"parent": parent, "title": title, "message": message, "date": date, "author": author, "files": files}
    repo["commits"][sha] = commit
    return sha


def resolve(repo: Repo, revision: str) -> str:
    """Return the sha of a branch, tag, ref, or sha. Raises HubError if it is none of them."""
    for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
        if ref in repo["refs"]:
            return str(repo["refs"][ref])
    if revision in repo["commits"]:
        return revision
    raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def history(repo: Repo, sha: str | None) -> list[str]:
    """Return the shas from this commit to the first."""
    shas = []
    while sha:
        shas.append(sha)
        sha = repo["commits"][sha]["parent"]
    return shas
