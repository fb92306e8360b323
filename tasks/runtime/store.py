"""The artifact store: directories that are complete or do not exist, addressed by a digest of their inputs and code.

    <home>/.quantize-gemma-store         says that this is a store, whose artifacts may be removed
    <home>/<stage>/<key>/                an artifact
        <generation>/                    its directory, with a name that is never reused:
            manifest.json                    the artifact's description; written last
            data/                            its files
        current                          a symbolic link to the current generation
        manifest.json, data              links into the current generation
        result.json                      Prefect's cached result, which is removed with the artifact

The key is the SHA-256 of the stage, its inputs' content digests, its parameters, and the fingerprint of the code and
the libraries that affect its output. It contains no paths, times, or run ids, so equal inputs give equal keys anywhere.

A generation never changes once it is complete: rebuilding an artifact creates another one and points `current` to it.
A reader of a generation holds a shared lock on its manifest, and a locked generation is never removed. So a reader sees
a single complete generation, whatever is refreshed or pruned at the same time.

This module writes and reads artifacts; pruning.py removes them.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime.disk import translate_disk_errors
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.store_layout import (
    CURRENT,
    MANIFEST,
    MARK,
    artifact_folders,
    current_generation,
    generations,
    hold_lock,
    lock_for_reading,
    partial_path,
    remove,
)
from quantize_gemma.tasks.runtime.strict_json import JsonObject, JsonValue

logger = logging.getLogger(__name__)

# Linux's request for a copy-on-write clone of a file (linux/fs.h).
FICLONE = 0x40049409


@dataclass(frozen=True)
class File:
    """One file of an artifact.

    Attributes:
        size: Its size in bytes.
        sha256: The digest of its content.
        mtime_ns: Its modification time when it was hashed.
        shared: Whether it is a hard link to a file of another artifact.
    """

    size: int
    sha256: str
    mtime_ns: int
    shared: bool = False


@dataclass(frozen=True)
class Artifact:
    """A complete directory in the store.

    Attributes:
        stage: The stage that wrote it.
        key: Its key.
        path: The directory of its files.
        digest: The digest of its content: the files' names and contents, and the metadata.
        files: Its files by their paths.
        metadata: The metadata that the stage returned.
        measured: The time and memory that the stage took.
    """

    stage: str
    key: str
    path: Path
    digest: str
    files: dict[str, File]
    metadata: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files.values())


class _Pins:
    """The locked manifests of the artifacts that a run reads."""

    def __init__(self) -> None:
        self._locks: dict[Path, int] = {}
        self._hashed: set[Path] = set()
        self._lock = threading.Lock()

    def add(self, manifest: Path, lock: int, hashed: bool) -> None:
        """Keep the descriptor of a manifest's lock; `hashed`: whether all files of the artifact were hashed."""
        with self._lock:
            if manifest in self._locks:
                os.close(lock)
            else:
                self._locks[manifest] = lock
            if hashed:
                self._hashed.add(manifest)

    def were_hashed(self, manifest: Path) -> bool:
        """Tell whether all files of a pinned artifact were hashed."""
        return manifest in self._hashed

    def release(self) -> None:
        """Release all locks."""
        with self._lock:
            for lock in self._locks.values():
                os.close(lock)
            self._locks.clear()


# Prefect copies the context of the flow into the threads of its tasks.
_run_pins: ContextVar[_Pins] = ContextVar("run_pins")


def home() -> Path:
    """Return the store's directory: $QUANTIZE_GEMMA_HOME, or ~/.cache/quantize-gemma."""
    setting = os.environ.get("QUANTIZE_GEMMA_HOME")
    return Path(setting).expanduser().absolute() if setting else Path.home() / ".cache" / "quantize-gemma"


def output_folders() -> list[Path]:
    """Return the directories that a run writes to: the store, temporary files, and Prefect's home."""
    prefect = os.environ.get("PREFECT_HOME") or "~/.prefect"
    return [home(), Path(tempfile.gettempdir()), Path(prefect).expanduser()]


def key(stage: str, inputs: list[str], parameters: JsonObject, made_by: Mapping[str, object]) -> str:
    """Return an artifact's key, 64 hexadecimal digits.

    Args:
        stage: The stage's name.
        inputs: Content digests.
        parameters: JSON values.
        made_by: The fingerprint of the code that makes the artifact, see fingerprint.py.
    """
    content = {"stage": stage, "inputs": inputs, "parameters": parameters, "made_by": made_by}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def canonical_json(value: JsonValue) -> bytes:
    """Return the canonical JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def produce(
    stage: str,
    artifact_key: str,
    work: Callable[[Path], JsonObject],
    root: Path | None = None,
    refresh: bool = False,
    pinned: bool = False,
) -> Artifact:
    """Return an artifact; build it if the store does not have it.

    If two processes need the same key, one of them works, and the other waits for its result. If `work` raises an
    exception, nothing is left behind, and an existing artifact is kept.

    Args:
        stage: The stage's name.
        artifact_key: The artifact's key.
        work: Fills the empty directory that it is called with, and returns {"metadata": …, "measured": …}. Metadata is
            part of the artifact's content; measurements (seconds, memory) are not.
        root: The store. [default: home()]
        refresh: Build the artifact even if the store has it, and replace it.
        pinned: Pin the artifact before anything can remove it.

    Raises:
        StageFailed: The disk is full.
    """
    root = root or home()
    artifact_folder = root / stage / artifact_key
    take = pin if pinned else load
    with translate_disk_errors(root), hold_lock(artifact_folder):
        artifact = None if refresh else take(stage, artifact_key, root)
        if artifact is not None:
            return artifact
        partial = partial_path(artifact_folder)
        try:
            (partial / "data").mkdir(parents=True)
            result = work(partial / "data")
            _write_manifest(partial, stage, artifact_key, result)
            _make_current(partial, artifact_folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        artifact = take(stage, artifact_key, root)
        assert artifact is not None, f"{stage}/{artifact_key} vanished right after it was written"
        for generation in generations(artifact_folder):
            if generation != artifact.path.parent:
                remove(generation, artifact_key)
        return artifact


def load(
    stage: str, artifact_key: str, root: Path | None = None, digest: str | None = None, rehash: bool = False
) -> Artifact | None:
    """Return an artifact if it is complete and unchanged, otherwise None; a warning names the file that is not.

    A file is trusted if its size and modification time match the manifest, and hashed again if the time differs. A
    damaged file that is shared with another artifact is replaced by a link to the intact file.

    Args:
        stage: The stage's name.
        artifact_key: The artifact's key.
        root: The store. [default: home()]
        digest: The expected digest of the content. An older generation with this digest is also returned, as long as a
            process reads it.
        rehash: Whether to hash all files.
    """
    opened_generation = _open_generation(root or home(), stage, artifact_key, digest, rehash)
    if opened_generation is None:
        return None
    artifact, lock = opened_generation
    os.close(lock)
    return artifact


@contextlib.contextmanager
def keep_pinned() -> Iterator[None]:
    """Keep artifacts that are pinned in the block unchanged until the block or the process ends."""
    pins = _Pins()
    token = _run_pins.set(pins)
    try:
        yield
    finally:
        _run_pins.reset(token)
        pins.release()


def pin(
    stage: str, artifact_key: str, root: Path | None = None, digest: str | None = None, rehash: bool = False
) -> Artifact | None:
    """Load an artifact, and keep its directory unchanged until the block of keep_pinned() ends.

    This marks it as used now. `rehash` hashes all of its files, once per block. The other arguments are those of
    load().
    """
    opened_generation = _open_generation(root or home(), stage, artifact_key, digest, rehash)
    if opened_generation is None:
        return None
    artifact, lock = opened_generation
    manifest = artifact.path.parent / MANIFEST
    _run_pins.get().add(manifest, lock, rehash)
    os.utime(manifest.parent)
    return artifact


def read_artifact(path: Path) -> Artifact:
    """Return the artifact whose files are in this directory, as its manifest describes it.

    Raises:
        StageFailed: The artifact is missing or damaged.
    """
    # A store's artifacts are four directories deep.
    artifact = _read_generation(path.parent, root_of(path)) if len(path.parents) > 3 else None
    if artifact is None:
        raise StageFailed(f"{path.parent} is damaged or missing in the store: start the run again")
    return artifact


def root_of(path: Path) -> Path:
    """Return the store that contains an artifact's directory of files."""
    return path.parents[3]


def path_of(stage: str, artifact_key: str) -> Path:
    """Return the path of an artifact's files that stays the same when the artifact is rebuilt."""
    return home() / stage / artifact_key / "data"


@contextlib.contextmanager
def open_store(artifacts: Mapping[str, Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the store that contains these artifacts, and their digests by name.

    If one of them is not in a store, yield a temporary store and no digests: nothing outlives the context.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            digests = {name: read_artifact(path).digest for name, path in artifacts.items()}
            root = next((root_of(path) for path in artifacts.values()), home())
        except StageFailed:
            digests, root = {}, Path(folder)
        yield root, digests


def link(source: Path, target: Path) -> None:
    """Create `target` in an artifact as a hard link to the file `source` of another artifact.

    On another file system, it is a copy. Files from outside the store are copied, too, so that later changes to them do
    not affect the store.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file into an artifact; the copy shares the disk's blocks if the file system can do that."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, reader.fileno())
        except OSError:
            shutil.copyfile(source, target)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_file(artifact: Artifact, name: str) -> bytes:
    """Return the content of an artifact's file. Raises StageFailed if it does not match the manifest."""
    try:
        content = (artifact.path / name).read_bytes()
    except OSError:
        raise file_changed(artifact, name) from None
    if hashlib.sha256(content).hexdigest() != artifact.files[name].sha256:
        raise file_changed(artifact, name)
    return content


def check_file(artifact: Artifact, name: str) -> None:
    """Hash an artifact's file. Raises StageFailed if it does not match the manifest."""
    try:
        digest = digest_file(artifact.path / name)
    except OSError:
        raise file_changed(artifact, name) from None
    if digest != artifact.files[name].sha256:
        raise file_changed(artifact, name)


def file_changed(artifact: Artifact, name: str) -> StageFailed:
    """Return the failure to raise for a damaged file, and make the next run hash the file, so that it is rebuilt."""
    path = artifact.path / name
    # A file is trusted as long as its time matches the manifest. Hard links share the time, so all are affected.
    with contextlib.suppress(OSError):
        os.utime(path)
    return StageFailed(
        f"{path} was changed or damaged after it was written: start the run again to rebuild it, and check the disk"
    )


def _make_current(partial: Path, artifact_folder: Path) -> None:
    """Atomically make a complete directory the artifact's current generation: readers see the old one or this one.

    Raises:
        StageFailed: A process reads the artifact in a copy of a store without links, where it cannot be replaced.
    """
    stage, name = artifact_folder.parent, uuid.uuid4().hex[:8]
    if artifact_folder.exists() and not (artifact_folder / CURRENT).is_symlink():
        # An earlier version wrote the artifact, or it was copied without links.
        bytes_freed = remove(artifact_folder, artifact_folder.name)
        if bytes_freed is None and artifact_folder.exists():
            raise StageFailed(
                f"{artifact_folder} cannot be replaced, because another run is reading it, and the store was copied "
                "without its links: start the run again when the other run has ended"
            )
    artifact_folder.mkdir(exist_ok=True)
    link = artifact_folder / f".{name}"
    try:
        if not (stage.parent / MARK).exists():
            (stage.parent / MARK).touch()
        for entry in (MANIFEST, "data"):
            if not (artifact_folder / entry).is_symlink():
                os.symlink(f"{CURRENT}/{entry}", artifact_folder / entry)
        os.symlink(name, link)
        partial.rename(artifact_folder / name)
        link.replace(artifact_folder / CURRENT)
    except BaseException:
        link.unlink(missing_ok=True)
        shutil.rmtree(artifact_folder / name, ignore_errors=True)
        raise
    _fsync(artifact_folder)
    _fsync(stage)


def _open_generation(
    root: Path, stage: str, artifact_key: str, digest: str | None, rehash: bool
) -> tuple[Artifact, int] | None:
    """Return an artifact that is complete and unchanged, with the descriptor of its shared lock."""
    artifact_folder = root / stage / artifact_key
    while True:
        folder = current_generation(artifact_folder)
        lock = lock_for_reading(folder / MANIFEST)
        if current_generation(artifact_folder) == folder:
            break
        # It was rebuilt in the meantime.
        if lock is not None:
            os.close(lock)
    if lock is not None and (artifact_folder / MANIFEST).exists():
        artifact = _read_generation(folder, root, rehash)
        belongs_here = artifact is not None and (artifact.stage, artifact.key) == (stage, artifact_key)
        if artifact is not None and belongs_here and digest in (None, artifact.digest):
            return artifact, lock
    elif (folder / "data").exists():
        logger.warning("%s/%s has no manifest; the stage runs again", stage, artifact_key[:12])
    if lock is not None:
        os.close(lock)
    for folder in generations(artifact_folder) if digest is not None else []:
        lock = lock_for_reading(folder / MANIFEST)
        if lock is not None:
            artifact = _read_generation(folder, root, rehash)
            if artifact is not None and artifact.digest == digest:
                return artifact, lock
            os.close(lock)
    return None


def _read_generation(folder: Path, root: Path, rehash: bool = False) -> Artifact | None:
    """Return the artifact in a generation's directory if it is unchanged, else None."""
    pins = _run_pins.get(None)
    rehash = rehash and not (pins and pins.were_hashed(folder / MANIFEST))
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
        fault = _find_fault(path, file, rehash)
        if fault and file.shared and path.exists() and _link_again(path, file, folder.parent, root):
            fault = None
        if fault:
            logger.warning("%s/%s: %s %s; the stage runs again", stage, artifact_key[:12], name, fault)
            return None
    return artifact


def _find_fault(path: Path, expected: File, rehash: bool) -> str | None:
    """Describe what is wrong with a file, as the end of a sentence; None if it is unchanged."""
    try:
        status = path.stat()
        if status.st_size != expected.size:
            return f"has {status.st_size:,} bytes instead of {expected.size:,}"
        if (rehash or status.st_mtime_ns != expected.mtime_ns) and digest_file(path) != expected.sha256:
            # Make the next reader hash it, too.
            os.utime(path)
            return "was changed"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return None


def _link_again(path: Path, expected: File, artifact_folder: Path, root: Path) -> bool:
    """Replace an artifact's damaged shared file with a link to an intact one with the same content, if there is any."""
    for manifest in [path / MANIFEST for path in artifact_folders(root)]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for name, fields in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
                file, source = File(**fields), manifest.parent / "data" / name
                if file.sha256 == expected.sha256 and not file.shared and digest_file(source) == expected.sha256:
                    # Not beside the file: if this process is killed, the artifact must not have another file.
                    new_link = partial_path(artifact_folder)
                    os.link(source, new_link)
                    new_link.replace(path)
                    return True
    return False


def _write_manifest(partial: Path, stage: str, artifact_key: str, result: JsonObject) -> None:
    """Write the manifest of the files in a directory, and flush everything to disk."""
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
    metadata = result.get("metadata", {})
    contents = {name: [file.size, file.sha256] for name, file in files.items()}
    manifest = {
        "stage": stage,
        "key": artifact_key,
        "digest": hashlib.sha256(canonical_json({"files": contents, "metadata": metadata})).hexdigest(),
        "files": {name: asdict(file) for name, file in files.items()},
        "metadata": metadata,
        "measured": result.get("measured", {}),
    }
    # Normalize it to what is read back: JSON turns keys that are numbers into strings.
    manifest = json.loads(json.dumps(manifest))
    manifest["checksum"] = _checksum(manifest)
    with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _fsync(partial)


def _checksum(manifest: JsonObject) -> str:
    """Return the SHA-256 of a manifest's content, except for the checksum itself."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
