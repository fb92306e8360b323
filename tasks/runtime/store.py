"""The artifact store: directories that are complete or do not exist, found by the digest of what made them.

    <home>/.quantize-gemma-store         says that this is a store, in which `prune` and `evict` may remove things
    <home>/<stage>/<key>/                an artifact
        <generation>/                    its directory, with a name that is never used again:
            manifest.json                    what the artifact is; written last
            data/                            its files
        current                          a symbolic link to the generation that counts
        manifest.json, data              links to what is in that
        result.json                      Prefect's cached result, so that it goes when the artifact goes

The key is the SHA-256 of the stage, its inputs' content digests, its parameters, and the fingerprint of the code and
the libraries that shape its output; no path, clock or run id is in it, so equal inputs give equal keys anywhere.

A generation never changes once it is complete: making an artifact again makes another and points `current` there.
Whoever reads holds a shared lock on the manifest, and nobody removes a generation whose lock is held. So a reader sees
one generation, whole, whatever is refreshed and pruned beside it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime.disk import translate_disk_errors
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.lifetime import workers

logger = logging.getLogger(__name__)

MARK = ".quantize-gemma-store"
MANIFEST = "manifest.json"
CURRENT = "current"
PREFIX = ".partial-"
# What arrives from elsewhere and is gone on with after a failure.
INCOMING = ".incoming-"
# Linux's request for a copy-on-write clone of a file (linux/fs.h).
FICLONE = 0x40049409
# How long what another process may still want is left alone.
SECONDS_TO_RESUME = 86_400.0
# Manifests that are locked until the process ends, when the system closes them; and those whose files were all hashed.
_pinned: dict[Path, int] = {}
_hashed: set[Path] = set()
_pinning = threading.Lock()


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


def output_folders() -> list[Path]:
    """Return where a run writes: the store, temporary files, and Prefect's home."""
    prefect = os.environ.get("PREFECT_HOME") or "~/.prefect"
    return [home(), Path(tempfile.gettempdir()), Path(prefect).expanduser()]


def key(stage: str, inputs: list[str], parameters: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Returns the artifact's key, 64 hexadecimal digits.

    `inputs` are content digests, `made_by` is the fingerprint of what makes it, see fingerprint.py.
    """
    content = {"stage": stage, "inputs": inputs, "parameters": parameters, "made_by": made_by}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def produce(
    stage: str,
    artifact_key: str,
    work: Callable[[Path], dict[str, Any]],
    root: Path | None = None,
    refresh: bool = False,
    pinned: bool = False,
) -> Artifact:
    """Returns the artifact `stage`/`artifact_key`, made by `work` unless it is complete already.

    `work` fills the empty directory it is given and returns {"metadata": …, "measured": …}; metadata is part of
    what the artifact says, measured (seconds, memory) is not. Of two processes that want the same key one works
    and the other waits for its result. If `work` raises, nothing is left, and what was there before stays; `refresh`
    replaces what is there. With `pinned` nothing removes it before pin() could. Raises StageFailed if the disk is full.
    """
    root = root or home()
    take = pin if pinned else load
    with translate_disk_errors(root), _lock(root, stage, artifact_key):
        artifact = None if refresh else take(stage, artifact_key, root)
        if artifact is not None:
            return artifact
        partial = root / stage / f"{PREFIX}{artifact_key[:16]}-{uuid.uuid4().hex[:8]}"
        try:
            (partial / "data").mkdir(parents=True)
            record = work(partial / "data")
            _write_manifest(partial, stage, artifact_key, record)
            _publish(partial, root / stage, artifact_key)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        made = take(stage, artifact_key, root)
        assert made is not None, f"{stage}/{artifact_key} vanished right after it was written"
        for old in _generations(root / stage / artifact_key):
            if old != made.path.parent:
                _remove(old, artifact_key)
        return made


def load(
    stage: str, artifact_key: str, root: Path | None = None, digest: str | None = None, whole: bool = False
) -> Artifact | None:
    """Returns the artifact if it is complete and unchanged, else None; a warning names the file that is not.

    A file is trusted when size and modification time are those of the manifest, and hashed again when the time
    differs, or if `whole`. A shared file that was damaged through another artifact is linked again from the one whose
    own it is. With `digest`, an older generation of that content will do, if somebody still holds it.
    """
    opened = _open(root or home(), stage, artifact_key, digest, whole)
    if opened is None:
        return None
    artifact, lock = opened
    os.close(lock)
    return artifact


def pin(
    stage: str, artifact_key: str, root: Path | None = None, digest: str | None = None, whole: bool = False
) -> Artifact | None:
    """Loads an artifact and keeps its directory as it is until this process ends.

    It counts as used now. `whole` hashes all of its files, once in a process.
    """
    opened = _open(root or home(), stage, artifact_key, digest, whole)
    if opened is None:
        return None
    artifact, lock = opened
    manifest = artifact.path.parent / MANIFEST
    with _pinning:
        if manifest in _pinned:
            os.close(lock)
        else:
            _pinned[manifest] = lock
        if whole:
            _hashed.add(manifest)
    os.utime(manifest.parent)
    return artifact


def at(path: Path) -> Artifact:
    """Returns the artifact whose files are in this directory, as its manifest describes it."""
    artifact = _read(path.parent, root_of(path))
    if artifact is None:
        raise StageFailed(f"{path.parent} is no artifact, or has gone from the store: start the run again")
    return artifact


def root_of(path: Path) -> Path:
    """Returns the store that an artifact's directory of files is in."""
    return path.parents[3]


@dataclass
class Removed:
    """What was removed, and how many bytes of the disk that has freed."""

    paths: list[Path] = field(default_factory=list)
    bytes: int = 0

    def add(self, path: Path, freed: int) -> None:
        """Counts a directory that was removed."""
        self.paths.append(path)
        self.bytes += freed


def prune(root: Path | None = None) -> Removed:
    """Removes what nobody will read: work that died half-way, and generations that were replaced.

    Downloads that died would be continued: they stay for a day. Work in progress holds its lock. Raises UserError if
    the directory is no store.
    """
    root = root or home()
    _check_store(root)
    removed = Removed()
    for incoming in sorted(root.glob(f"*/{INCOMING}*")):
        # A download lets go of its lock between two tries.
        touched = max((path.stat().st_mtime for path in incoming.rglob("*")), default=0.0)
        busy = any(_is_locked(path) for path in incoming.parent.glob(".lock-*"))
        if time.time() - touched > SECONDS_TO_RESUME and not busy:
            removed.add(incoming, _delete(incoming))
    for partial in sorted(root.glob(f"*/{PREFIX}*-*")):
        short = partial.name[len(PREFIX) :].split("-")[0]
        if re.fullmatch("[0-9a-f]{16}", short) and not _is_locked(partial.parent / f".lock-{short}"):
            removed.add(partial, _delete(partial))
    for place in sorted(root.glob(f"*/{'[0-9a-f]' * 64}")):
        old = set(_generations(place)) - {_current(place)}
        if not old or _is_locked(place.parent / f".lock-{place.name[:16]}"):
            continue
        for generation in sorted(old):
            freed = _remove(generation, place.name)
            if freed is not None:
                removed.add(generation, freed)
    for path in removed.paths:
        logger.info("removed %s", path.relative_to(root))
    return removed


def evict(max_bytes: float, max_age_seconds: float, root: Path | None = None) -> Removed:
    """Removes artifacts that were not used for so long, then the longest unused until the store fits.

    What a running process holds stays, whatever its age and size. Raises UserError if the directory is no store.
    """
    root = root or home()
    _check_store(root)
    size = size_of(root)
    unused = []
    for place in _places(root):
        with contextlib.suppress(OSError):
            manifest = (place / MANIFEST).resolve()
            unused.append((max(manifest.stat().st_mtime, manifest.parent.stat().st_mtime), place))
    evicted = Removed()
    for used, place in sorted(unused):
        age = time.time() - used
        if age <= max_age_seconds and size - evicted.bytes <= max_bytes:
            continue
        lock = place.parent / f".lock-{place.name[:16]}"
        if _is_locked(lock):
            continue
        with _lock(root, place.parent.name, place.name):
            freed = _remove(place, place.name)
            if freed is None:
                continue
        logger.info("removed %s/%s, last used %.0f days ago", place.parent.name, place.name[:12], age / 86_400)
        evicted.add(place, freed)
    return evicted


def size_of(root: Path | None = None) -> int:
    """Returns the bytes of the disk that the store takes, as `du` counts: a file with several names counts once."""
    return _disk_usage(root or home())


def size_of_incoming(stage: str, revision: str, root: Path | None = None) -> int:
    """Returns the bytes of a download that was interrupted and will be continued."""
    return _disk_usage((root or home()) / stage / f"{INCOMING}{revision[:16]}")


def path_of(stage: str, artifact_key: str, root: Path | None = None) -> Path:
    """Returns where an artifact's files are found, whichever generation they are of."""
    return (root or home()) / stage / artifact_key / "data"


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


def read_file(artifact: Artifact, name: str) -> bytes:
    """Returns the content of an artifact's file. Raises StageFailed if it is not what the manifest says."""
    try:
        content = (artifact.path / name).read_bytes()
    except OSError:
        raise file_changed(artifact, name) from None
    if hashlib.sha256(content).hexdigest() != artifact.files[name].sha256:
        raise file_changed(artifact, name)
    return content


def check_file(artifact: Artifact, name: str) -> None:
    """Hashes an artifact's file. Raises StageFailed if it is not what the manifest says."""
    try:
        digest = digest_file(artifact.path / name)
    except OSError:
        raise file_changed(artifact, name) from None
    if digest != artifact.files[name].sha256:
        raise file_changed(artifact, name)


def file_changed(artifact: Artifact, name: str) -> StageFailed:
    """Returns the failure that a damaged file is, and has the store look at it, so that the next run makes it again."""
    path = artifact.path / name
    # A file is trusted as long as its time is the manifest's; hard links share it, so this reaches all of them.
    with contextlib.suppress(OSError):
        os.utime(path)
    return StageFailed(
        f"{path} is not what it was when it was made: start the run again, which makes it again, and check the disk"
    )


def _publish(partial: Path, stage: Path, artifact_key: str) -> None:
    """Makes a complete directory the artifact's current generation, at once: readers see the one before or this one."""
    place, name = stage / artifact_key, uuid.uuid4().hex[:8]
    if place.exists() and not (place / CURRENT).is_symlink():
        # The version before wrote it, or somebody has copied it without links.
        _remove(place, artifact_key)
    place.mkdir(exist_ok=True)
    link = place / f".{name}"
    try:
        if not (stage.parent / MARK).exists():
            (stage.parent / MARK).touch()
        for entry in (MANIFEST, "data"):
            if not (place / entry).is_symlink():
                os.symlink(f"{CURRENT}/{entry}", place / entry)
        os.symlink(name, link)
        partial.rename(place / name)
        link.replace(place / CURRENT)
    except BaseException:
        link.unlink(missing_ok=True)
        shutil.rmtree(place / name, ignore_errors=True)
        raise
    _fsync(place)
    _fsync(stage)


def _open(root: Path, stage: str, artifact_key: str, digest: str | None, whole: bool) -> tuple[Artifact, int] | None:
    """Returns an artifact that is whole, with the descriptor of its shared lock."""
    place = root / stage / artifact_key
    while True:
        folder = _current(place)
        lock = _lock_shared(folder / MANIFEST)
        if _current(place) == folder:
            break
        # It was made again meanwhile.
        if lock is not None:
            os.close(lock)
    if lock is not None and (place / MANIFEST).exists():
        artifact = _read(folder, root, whole)
        wanted = artifact is not None and (artifact.stage, artifact.key) == (stage, artifact_key)
        if artifact is not None and wanted and digest in (None, artifact.digest):
            return artifact, lock
    elif (folder / "data").exists():
        logger.warning("%s/%s has no manifest; the stage runs again", stage, artifact_key[:12])
    if lock is not None:
        os.close(lock)
    for folder in _generations(place) if digest is not None else []:
        lock = _lock_shared(folder / MANIFEST)
        if lock is not None:
            artifact = _read(folder, root, whole)
            if artifact is not None and artifact.digest == digest:
                return artifact, lock
            os.close(lock)
    return None


def _current(place: Path) -> Path:
    """Returns the generation of an artifact that counts; in a copy without links it has no name of its own."""
    try:
        return place / os.readlink(place / CURRENT)
    except OSError:
        return place / CURRENT


def _lock_shared(manifest: Path) -> int | None:
    """Returns the descriptor of a shared lock on a manifest, or None if it is not there, or no longer."""
    try:
        lock = os.open(manifest, os.O_RDONLY)
    except OSError:
        return None
    fcntl.flock(lock, fcntl.LOCK_SH)
    # Whoever removes a directory takes it away under its name while the lock is theirs.
    if manifest.exists():
        return lock
    os.close(lock)
    return None


def _read(folder: Path, root: Path, whole: bool = False) -> Artifact | None:
    """Returns the artifact in a directory if it is unchanged, else None."""
    whole = whole and folder / MANIFEST not in _hashed
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stage, artifact_key = manifest["stage"], manifest["key"]
        artifact = Artifact(
            stage=stage,
            key=artifact_key,
            path=folder / "data",
            digest=manifest["digest"],
            files={name: File(**file) for name, file in manifest["files"].items()},
            metadata=manifest["metadata"],
            measured=manifest["measured"],
        )
        if manifest["checksum"] != _checksum(manifest):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s has an unreadable manifest; the stage runs again", folder)
        return None
    for name, file in artifact.files.items():
        path = artifact.path / name
        fault = _fault(path, file, whole)
        if fault and file.shared and path.exists() and _link_again(path, file, root):
            fault = None
        if fault:
            logger.warning("%s/%s: %s %s; the stage runs again", stage, artifact_key[:12], name, fault)
            return None
    return artifact


def _fault(path: Path, expected: File, whole: bool) -> str | None:
    try:
        status = path.stat()
        if status.st_size != expected.size:
            return f"has {status.st_size:,} bytes instead of {expected.size:,}"
        if (whole or status.st_mtime_ns != expected.mtime_ns) and digest_file(path) != expected.sha256:
            # Whoever looks next hashes it, too.
            os.utime(path)
            return "was changed"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return None


def _places(root: Path) -> list[Path]:
    """Returns the artifacts of a store, wherever a manifest says that it belongs where it is."""
    places = []
    for manifest in root.glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(manifest.read_text(encoding="utf-8"))
            if (said["stage"], said["key"]) == (manifest.parent.parent.name, manifest.parent.name):
                places.append(manifest.parent)
    return places


def _generations(place: Path) -> list[Path]:
    try:
        return [path for path in place.iterdir() if re.fullmatch("[0-9a-f]{8}", path.name)]
    except OSError:
        return []


def _check_store(root: Path) -> None:
    """Raises UserError if nothing in the directory says that it is a store: what is there is somebody else's."""
    if not root.exists() or (root / MARK).exists() or not any(root.iterdir()):
        return
    # The version before made no mark, nor has a run that died in its first stage.
    if not any(re.fullmatch(r"\.lock-[0-9a-f]{16}", path.name) for path in root.glob("*/.lock-*")):
        raise UserError(
            f"{root} is no store of quantize-gemma, and nothing was removed: set QUANTIZE_GEMMA_HOME to the store"
        )


def _remove(folder: Path, artifact_key: str) -> int | None:
    """Removes an artifact or one generation of it, at once for readers, unless somebody holds it.

    Returns the bytes that this frees.
    """
    stage = folder.parent if folder.name == artifact_key else folder.parent.parent
    aside = stage / f"{PREFIX}{artifact_key[:16]}-{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as locks:
        for manifest in {path.resolve() for path in (folder / MANIFEST, *folder.glob(f"*/{MANIFEST}"))}:
            try:
                stream = locks.enter_context(manifest.open("r+"))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                return None
        folder.rename(aside)
    return _delete(aside)


def _delete(folder: Path) -> int:
    """Deletes a directory; returns the bytes that this frees: those of files that have no other name elsewhere."""
    before = _disk_usage(folder, only_here=True)
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    return before - _disk_usage(folder, only_here=True)


def _disk_usage(folder: Path, only_here: bool = False) -> int:
    """Returns the bytes of the disk's blocks that a directory takes, each inode once.

    `only_here` leaves out files that have names elsewhere, too. What vanishes meanwhile counts as nothing.
    """
    names: dict[tuple[int, int], int] = {}
    total = 0
    pending = [folder]
    while pending:
        path = pending.pop()
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            inode = (status.st_dev, status.st_ino)
            names[inode] = names.get(inode, 0) + 1
            directory = stat.S_ISDIR(status.st_mode)
            if names[inode] == (1 if directory or not only_here else status.st_nlink):
                total += status.st_blocks * 512
            if directory:
                pending.extend(path.iterdir())
    return total


def _link_again(path: Path, expected: File, root: Path) -> bool:
    """Replaces a damaged shared file by a link to an intact one with the same content, if there is one."""
    for manifest in [path / MANIFEST for path in _places(root)]:
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
    # As it is read back: JSON makes strings of numbers that are keys.
    manifest = json.loads(json.dumps(manifest))
    manifest["checksum"] = _checksum(manifest)
    with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _fsync(partial)


def _checksum(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of what a manifest says, but for the checksum itself."""
    said = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(canonical_json(said)).hexdigest()


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
                if workers.stopping.is_set():
                    raise StageFailed("the run was stopped while it waited for another one") from None
                if not waiting:
                    logger.info("%s: another run is at it; waiting for its result", stage)
                waiting = True
                time.sleep(0.1)
        yield


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
