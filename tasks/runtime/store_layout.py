"""The layout of the store, and the locks that prevent one process from removing what another one uses.

store.py describes the layout. The functions here take directories of a store, wherever it is.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.lifetime import run_workers

logger = logging.getLogger(__name__)

# The file that marks a directory as a store.
MARK = ".quantize-gemma-store"
MANIFEST = "manifest.json"
CURRENT = "current"
# The prefixes of unfinished work, and of unfinished downloads, which are resumed.
PARTIAL = ".partial-"
INCOMING = ".incoming-"
LOCK = ".lock-"


def current_generation(artifact_folder: Path) -> Path:
    """Return the current generation of an artifact; in a copy without links, the directory `current`."""
    try:
        return artifact_folder / os.readlink(artifact_folder / CURRENT)
    except OSError:
        return artifact_folder / CURRENT


def generations(artifact_folder: Path) -> list[Path]:
    """Return all generations of an artifact."""
    try:
        return [path for path in artifact_folder.iterdir() if re.fullmatch("[0-9a-f]{8}", path.name)]
    except OSError:
        return []


def artifact_folders(root: Path) -> list[Path]:
    """Return the directories of a store's artifacts: those whose manifest matches their path."""
    folders = []
    for manifest in root.glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(manifest.read_text(encoding="utf-8"))
            if (content["stage"], content["key"]) == (manifest.parent.parent.name, manifest.parent.name):
                folders.append(manifest.parent)
    return folders


def lock_path(artifact_folder: Path) -> Path:
    """Return the file that is locked while an artifact is built or removed."""
    return artifact_folder.parent / f"{LOCK}{artifact_folder.name[:16]}"


def partial_path(artifact_folder: Path) -> Path:
    """Return a new path for unfinished work on an artifact. It can be removed as long as nobody holds the lock."""
    return artifact_folder.parent / f"{PARTIAL}{artifact_folder.name[:16]}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def hold_lock(artifact_folder: Path) -> Iterator[None]:
    """Hold the lock of an artifact. The kernel releases the lock when the process ends, however it ends.

    Raises:
        StageFailed: The run was interrupted while it waited for another run.
    """
    artifact_folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(artifact_folder).open("w") as stream:
        waiting = False
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if run_workers().stopping.is_set():
                    raise StageFailed("the run was stopped while it waited for another run") from None
                if not waiting:
                    logger.info(
                        "%s: another run is computing the same result; waiting for it", artifact_folder.parent.name
                    )
                waiting = True
                time.sleep(0.1)
        yield


def is_locked(path: Path) -> bool:
    """Tell whether a process holds the lock on a file; no process does if there is no such file."""
    if not path.exists():
        return False
    with path.open("r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_for_reading(manifest: Path) -> int | None:
    """Return the descriptor of a shared lock on a manifest; None if the manifest does not exist or was just removed."""
    try:
        lock = os.open(manifest, os.O_RDONLY)
    except OSError:
        return None
    fcntl.flock(lock, fcntl.LOCK_SH)
    # A directory is renamed under the lock before it is removed.
    if manifest.exists():
        return lock
    os.close(lock)
    return None


def remove(folder: Path, artifact_key: str) -> int | None:
    """Remove an artifact or one of its generations, atomically for readers, unless a process is reading it.

    Returns:
        The bytes that this frees on disk; None if a process is reading it, or another process has removed it.
    """
    stage = folder.parent if folder.name == artifact_key else folder.parent.parent
    trash = partial_path(stage / artifact_key)
    with contextlib.ExitStack() as locks:
        for manifest in {
            (path / MANIFEST).resolve() for path in (folder, current_generation(folder), *generations(folder))
        }:
            try:
                stream = locks.enter_context(manifest.open("r+"))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                return None
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return None
    return delete(trash)


def delete(path: Path) -> int:
    """Delete a directory or a file; return the bytes that this frees: those of files without links elsewhere."""
    before = disk_usage(path, exclusive=True)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
    return before - disk_usage(path, exclusive=True)


def disk_usage(folder: Path, exclusive: bool = False) -> int:
    """Return the disk usage of a directory in bytes, counting each inode once, as `du` does.

    Files that vanish in the meantime are ignored.

    Args:
        folder: The directory.
        exclusive: Leave out files with links elsewhere.
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
            if names[inode] == (1 if directory or not exclusive else status.st_nlink):
                total += status.st_blocks * 512
            if directory:
                pending.extend(path.iterdir())
    return total
