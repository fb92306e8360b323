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
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = ".partial-"
# What arrives from elsewhere and is gone on with after a failure.
INCOMING = ".incoming-"
# Linux's request for a copy-on-write clone of a file (linux/fs.h).
FICLONE = 0x40049409
# Files that are locked until the process ends, when the system closes them.
_held: dict[Path, int] = {}
# Set when the run is to end: nobody waits for a lock then.
stopping = threading.Event()


class RunError(Exception):
    """Why a run ended; `summary` is what it had done by then, as `quantize-gemma run --json` prints it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.summary: dict[str, Any] = {}


class UserError(RunError):
    """A mistake that the person who started the run can mend: one sentence that says what and how."""


class StageFailed(RunError):
    """A stage that could not finish for a reason that is not the user's input.

    `transient` says that the same work may succeed later, `retry_after` after how many seconds at the earliest.
    """

    def __init__(self, message: str, transient: bool = False, retry_after: float = 0) -> None:
        super().__init__(message)
        self.transient = transient
        self.retry_after = retry_after


@dataclass(frozen=True)
class File:
    """One file of an artifact: its size in bytes, its SHA-256, and its modification time when it was hashed.

    A `shared` file is a hard link to one of another artifact, whose own it is.
    """

    size: int
    sha256: str
    mtime_ns: int
    shared: bool = False


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


def key(
    stage: str, stage_version: int | str, inputs: list[str], parameters: dict[str, Any], libraries: list[str]
) -> str:
    """Returns the artifact's key, 64 hexadecimal digits. `inputs` are content digests."""
    content = {
        "stage": stage,
        "version": stage_version,
        "inputs": inputs,
        "parameters": parameters,
        "libraries": versions(libraries),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Returns the versions of installed libraries, without what they were built for."""
    return {name: version(name).split("+")[0] for name in libraries}


def canonical_json(value: Any) -> bytes:
    """Returns the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def produce(
    stage: str,
    artifact_key: str,
    work: Callable[[Path], dict[str, Any]],
    root: Path | None = None,
    refresh: bool = False,
) -> Artifact:
    """Returns the artifact `stage`/`artifact_key`, made by `work` unless it is complete already.

    `work` fills the empty directory it is given and returns {"metadata": …, "measured": …}; metadata is part of
    what the artifact says, measured (seconds, memory) is not. Of two processes that want the same key one works
    and the other waits for its result. If `work` raises, nothing is left, and what was there before stays; `refresh`
    replaces what is there.
    """
    root = root or home()
    folder = root / stage / artifact_key
    with _lock(root, stage, artifact_key):
        found = None if refresh else load(stage, artifact_key, root)
        if found is not None:
            return found
        partial = root / stage / f"{PREFIX}{artifact_key[:16]}-{uuid.uuid4().hex[:8]}"
        try:
            (partial / "data").mkdir(parents=True)
            record = work(partial / "data")
            _write_manifest(partial, stage, artifact_key, record)
            # A directory is renamed over an empty one only: what is damaged or refreshed goes aside first.
            if folder.exists():
                folder.rename(partial.with_name(partial.name + "-old"))
            partial.rename(folder)
            _fsync(root / stage)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(partial.with_name(partial.name + "-old"), ignore_errors=True)
        made = load(stage, artifact_key, root)
        assert made is not None, f"{stage}/{artifact_key} vanished right after it was written"
        return made


def load(stage: str, artifact_key: str, root: Path | None = None) -> Artifact | None:
    """Returns the artifact if it is complete and unchanged, else None; a warning names the file that is not.

    A file is trusted when size and modification time are those of the manifest, and hashed again when the time
    differs. A shared file that was damaged through another artifact is linked again from the one whose own it is.
    """
    root = root or home()
    folder = root / stage / artifact_key
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        artifact = Artifact(
            stage=stage,
            key=artifact_key,
            path=folder / "data",
            digest=manifest["digest"],
            files={name: File(**file) for name, file in manifest["files"].items()},
            metadata=manifest["metadata"],
            measured=manifest["measured"],
        )
    except FileNotFoundError:
        if (folder / "data").exists():
            logger.warning("%s/%s has no manifest; the stage runs again", stage, artifact_key[:12])
        return None
    except (ValueError, KeyError, TypeError):
        logger.warning("%s/%s has an unreadable manifest; the stage runs again", stage, artifact_key[:12])
        return None
    for name, file in artifact.files.items():
        path = artifact.path / name
        fault = _fault(path, file)
        if fault and file.shared and path.exists() and _link_again(path, file, root):
            fault = None
        if fault:
            logger.warning("%s/%s: %s %s; the stage runs again", stage, artifact_key[:12], name, fault)
            return None
    return artifact


def at(path: Path) -> Artifact:
    """Returns the artifact whose files are in this directory, as its manifest describes it."""
    stage, artifact_key = path.parent.parent.name, path.parent.name
    artifact = load(stage, artifact_key, path.parent.parent.parent)
    if artifact is None:
        raise StageFailed(f"{stage}/{artifact_key[:12]} has gone from the store: start the run again")
    return artifact


def prune(root: Path | None = None) -> list[Path]:
    """Removes what died half-way: directories of work, and of downloads, which would be gone on with. Returns them.

    Work in progress holds its lock.
    """
    removed = []
    for incoming in sorted((root or home()).glob(f"*/{INCOMING}*")):
        # A download lets go of its lock between two tries.
        touched = max((path.stat().st_mtime for path in incoming.rglob("*")), default=0.0)
        if time.time() - touched > 86_400 and not any(_is_locked(path) for path in incoming.parent.glob(".lock-*")):
            shutil.rmtree(incoming, ignore_errors=True)
            removed.append(incoming)
    for partial in sorted((root or home()).glob(f"*/{PREFIX}*")):
        stage, short = partial.parent.name, partial.name[len(PREFIX) :].split("-")[0]
        locks = list(partial.parent.glob(f".lock-{short}*"))
        if any(_is_locked(path) for path in locks):
            continue
        shutil.rmtree(partial, ignore_errors=True)
        logger.info("removed %s/%s", stage, partial.name)
        removed.append(partial)
    return removed


def hold(stage: str, artifact_key: str, root: Path | None = None) -> None:
    """Marks an artifact as used by this process until it ends, and as used now: `evict` leaves it alone."""
    root = root or home()
    name = root / stage / f".use-{artifact_key[:16]}"
    name.parent.mkdir(parents=True, exist_ok=True)
    while name not in _held:
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(file, fcntl.LOCK_SH)
        # Whoever evicted the artifact while this waited has removed the file too.
        if name.exists() and os.fstat(file).st_ino == name.stat().st_ino:
            _held[name] = file
        else:
            os.close(file)
    os.utime(name)


def evict(max_bytes: float, max_age_seconds: float, root: Path | None = None) -> list[Path]:
    """Removes artifacts that were not used for so long, then the longest unused until the rest fits; returns them.

    What a running process holds stays, whatever its age and size.
    """
    root = root or home()
    unused: list[tuple[float, Path]] = []
    for manifest in root.glob(f"*/*/{MANIFEST}"):
        mark = manifest.parent.parent / f".use-{manifest.parent.name[:16]}"
        used = max(path.stat().st_mtime for path in (manifest, mark) if path.exists())
        unused.append((used, manifest.parent))
    evicted = []
    for used, folder in sorted(unused):
        if time.time() - used <= max_age_seconds and size_of(root) <= max_bytes:
            continue
        mark = folder.parent / f".use-{folder.name[:16]}"
        if _is_locked(folder.parent / f".lock-{folder.name[:16]}"):
            continue
        with _lock(root, folder.parent.name, folder.name), mark.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder)
            mark.unlink()
        logger.info(
            "removed %s/%s, last used %.0f days ago",
            folder.parent.name,
            folder.name[:12],
            (time.time() - used) / 86_400,
        )
        evicted.append(folder)
    return evicted


def size_of(root: Path | None = None) -> int:
    """Returns the bytes of all complete artifacts; a file that several share counts for the one whose own it is."""
    total = 0
    for path in (root or home()).glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            files = json.loads(path.read_text(encoding="utf-8"))["files"].values()
            total += sum(file["size"] for file in files if not file["shared"])
    return total


def size_of_incoming(root: Path | None = None) -> int:
    """Returns the bytes of downloads that were interrupted and will be gone on with."""
    return sum(path.stat().st_size for path in (root or home()).glob(f"*/{INCOMING}*/**/*") if path.is_file())


def link(source: Path, target: Path) -> None:
    """Makes `target`, in an artifact, the same file as `source` of another artifact.

    A hard link, or a copy on another file system. Files from outside the store are copied instead: what happens to
    them later must not reach into the store.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def copy(source: Path, target: Path) -> None:
    """Copies a file into an artifact; the copy shares the disk's blocks where the file system can do that."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, reader.fileno())
        except OSError:
            shutil.copyfile(source, target)


def digest_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def human_size(count: float) -> str:
    """Returns bytes as text, with decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


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


def _link_again(path: Path, expected: File, root: Path) -> bool:
    """Replaces a damaged shared file by a link to an intact one with the same content, if there is one."""
    for manifest in root.glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for name, fields in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
                file, source = File(**fields), manifest.parent / "data" / name
                if file.sha256 == expected.sha256 and not file.shared and digest_file(source) == expected.sha256:
                    fresh = path.with_name(f"{PREFIX}{uuid.uuid4().hex[:8]}")
                    os.link(source, fresh)
                    fresh.replace(path)
                    return True
    return False


def _write_manifest(partial: Path, stage: str, artifact_key: str, record: dict[str, Any]) -> None:
    data = partial / "data"
    files = {}
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(data).as_posix()] = File(
            size=path.stat().st_size,
            sha256=digest_file(path),
            mtime_ns=path.stat().st_mtime_ns,
            shared=path.stat().st_nlink > 1,
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
        waiting = False
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stopping.is_set():
                    raise StageFailed("the run was stopped while it waited for another one") from None
                if not waiting:
                    logger.info("%s: another run is at it; waiting for its result", stage)
                waiting = True
                time.sleep(0.1)
        yield


def _is_locked(path: Path) -> bool:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
