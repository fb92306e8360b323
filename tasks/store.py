"""The artifact store: directories that are complete or do not exist, found by the digest of what made them.

    <home>/<stage>/<key>/manifest.json   what the artifact is; written last
    <home>/<stage>/<key>/data/           its files
    <home>/<stage>/<key>/result.json     Prefect's cached result, so that it goes when the artifact goes

The key is the SHA-256 of the stage, its version, its inputs' content digests, its parameters and the versions of
the libraries that shape its output; no path, clock or run id is in it, so equal inputs give equal keys anywhere.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = ".partial-"


class UserError(Exception):
    """A mistake that the person who started the run can mend: one sentence that says what and how."""


class StageFailed(Exception):
    """A stage that could not finish for a reason that is not the user's input."""


@dataclass(frozen=True)
class File:
    """One file of an artifact: its size in bytes, its SHA-256, and its modification time when it was hashed."""

    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Artifact:
    """A complete directory in the store. `digest` depends on the files' names and contents alone."""

    stage: str
    key: str
    path: Path
    digest: str
    files: dict[str, File]
    metadata: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def home() -> Path:
    """Returns the store's directory: $QUANTIZE_GEMMA_HOME, or ~/.cache/quantize-gemma."""
    given = os.environ.get("QUANTIZE_GEMMA_HOME")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "quantize-gemma"


def key(stage: str, stage_version: int, inputs: list[str], parameters: dict[str, Any], libraries: list[str]) -> str:
    """Returns the artifact's key, 64 hexadecimal digits. `inputs` are content digests."""
    content = {
        "stage": stage,
        "version": stage_version,
        "inputs": inputs,
        "parameters": parameters,
        "libraries": {name: version(name).split("+")[0] for name in libraries},
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def produce(
    stage: str, artifact_key: str, work: Callable[[Path], dict[str, Any]], root: Path | None = None
) -> Artifact:
    """Returns the artifact `stage`/`artifact_key`, made by `work` unless it is complete already.

    `work` fills the empty directory it is given and returns {"metadata": …, "measured": …}; metadata is part of
    what the artifact says, measured (seconds, memory) is not. Of two processes that want the same key one works
    and the other waits for its result. If `work` raises, nothing is left.
    """
    root = root or home()
    with _lock(root, stage, artifact_key):
        found = load(stage, artifact_key, root)
        if found is not None:
            return found
        partial = root / stage / f"{PREFIX}{artifact_key[:16]}-{uuid.uuid4().hex[:8]}"
        try:
            (partial / "data").mkdir(parents=True)
            record = work(partial / "data")
            _write_manifest(partial, stage, artifact_key, record)
            os.rename(partial, root / stage / artifact_key)
            _fsync(root / stage)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        made = load(stage, artifact_key, root)
        assert made is not None, f"{stage}/{artifact_key} vanished right after it was written"
        return made


def load(stage: str, artifact_key: str, root: Path | None = None) -> Artifact | None:
    """Returns the artifact if it is complete and unchanged, else None.

    A file is trusted when size and modification time are those of the manifest, and hashed again when the time
    differs. An artifact with a missing or changed file is removed, with a warning that names the file.
    """
    folder = (root or home()) / stage / artifact_key
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: File(**file) for name, file in manifest["files"].items()}
        manifest_digest = manifest["digest"]
    except FileNotFoundError:
        if folder.exists():
            logger.warning("%s/%s has no manifest: removed, the stage runs again", stage, artifact_key[:12])
            shutil.rmtree(folder)
        return None
    except (ValueError, KeyError, TypeError):
        logger.warning("%s/%s has an unreadable manifest: removed, the stage runs again", stage, artifact_key[:12])
        shutil.rmtree(folder)
        return None
    for name, file in files.items():
        fault = _fault(folder / "data" / name, file)
        if fault:
            logger.warning("%s/%s: %s %s; the stage runs again", stage, artifact_key[:12], name, fault)
            shutil.rmtree(folder)
            return None
    return Artifact(
        stage=stage,
        key=artifact_key,
        path=folder / "data",
        digest=manifest_digest,
        files=files,
        metadata=manifest["metadata"],
        measured=manifest["measured"],
    )


def at(path: Path) -> Artifact:
    """Returns the artifact whose files are in this directory, as its manifest describes it."""
    stage, artifact_key = path.parent.parent.name, path.parent.name
    artifact = load(stage, artifact_key, path.parent.parent.parent)
    if artifact is None:
        raise StageFailed(f"{stage}/{artifact_key[:12]} has gone from the store: start the run again")
    return artifact


def prune(root: Path | None = None) -> list[Path]:
    """Removes what no run can use: directories of work that died. Returns them. Work in progress holds its lock."""
    removed = []
    for partial in sorted((root or home()).glob(f"*/{PREFIX}*")):
        stage, short = partial.parent.name, partial.name[len(PREFIX) :].split("-")[0]
        locks = list(partial.parent.glob(f".lock-{short}*"))
        if any(_is_locked(path) for path in locks):
            continue
        shutil.rmtree(partial, ignore_errors=True)
        logger.info("removed %s/%s", stage, partial.name)
        removed.append(partial)
    return removed


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link, or a copy on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def digest_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fault(path: Path, expected: File) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return "is missing"
    if status.st_size != expected.size:
        return f"has {status.st_size:,} bytes instead of {expected.size:,}"
    if status.st_mtime_ns != expected.mtime_ns and digest_file(path) != expected.sha256:
        return "was changed"
    return None


def _write_manifest(partial: Path, stage: str, artifact_key: str, record: dict[str, Any]) -> None:
    data = partial / "data"
    files = {}
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(data).as_posix()] = File(
            size=path.stat().st_size, sha256=digest_file(path), mtime_ns=path.stat().st_mtime_ns
        )
    metadata = record.get("metadata", {})
    contents = {name: [file.size, file.sha256] for name, file in files.items()}
    manifest = {
        "stage": stage,
        "key": artifact_key,
        "digest": hashlib.sha256(canonical_json({"files": contents, "metadata": metadata})).hexdigest(),
        "files": {name: asdict(file) for name, file in files.items()},
        "metadata": metadata,
        "measured": record.get("measured", {}),
    }
    with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _fsync(partial)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(root: Path, stage: str, artifact_key: str) -> Iterator[None]:
    """Holds the artifact's lock. The kernel lets go of it when the process dies, however it dies."""
    (root / stage).mkdir(parents=True, exist_ok=True)
    with (root / stage / f".lock-{artifact_key[:16]}").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_locked(path: Path) -> bool:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
