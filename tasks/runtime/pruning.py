"""Free space in the store: remove unfinished and replaced results, and results that have not been used for long."""

import contextlib
import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.store import home
from quantize_gemma.tasks.runtime.store_layout import (
    INCOMING,
    LOCK,
    MANIFEST,
    MARK,
    PARTIAL,
    artifact_folders,
    current_generation,
    delete,
    disk_usage,
    generations,
    hold_lock,
    is_locked,
    lock_path,
    remove,
)

logger = logging.getLogger(__name__)

# How long an interrupted download is kept, so that another run can resume it.
SECONDS_TO_RESUME = 86_400.0


@dataclass
class Removal:
    """The removed directories, and the number of bytes that this freed on disk."""

    paths: list[Path] = field(default_factory=list)
    bytes: int = 0

    def add(self, path: Path, bytes_freed: int) -> None:
        """Count a directory that was removed."""
        self.paths.append(path)
        self.bytes += bytes_freed


def remove_unfinished(root: Path | None = None) -> Removal:
    """Remove unfinished work, and generations that have been replaced.

    Work in progress holds a lock, so it stays. Interrupted downloads stay for a day, because the next run resumes them.

    Raises:
        UserError: The directory is not a store.
    """
    root = root or home()
    _check_store(root)
    removal = Removal()
    for incoming in sorted(root.glob(f"*/{INCOMING}*")):
        # A download releases its lock between two attempts.
        # It may just have been completed, and then no longer exists.
        last_change = _last_change(incoming) or time.time()
        busy = any(is_locked(path) for path in incoming.parent.glob(f"{LOCK}*"))
        if time.time() - last_change > SECONDS_TO_RESUME and not busy:
            removal.add(incoming, delete(incoming))
    for partial in sorted(root.glob(f"*/{PARTIAL}*-*")):
        key_prefix = partial.name[len(PARTIAL) :].split("-")[0]
        if re.fullmatch("[0-9a-f]{16}", key_prefix) and not is_locked(lock_path(partial.parent / key_prefix)):
            removal.add(partial, delete(partial))
    for artifact_folder in sorted(root.glob(f"*/{'[0-9a-f]' * 64}")):
        old_generations = set(generations(artifact_folder)) - {current_generation(artifact_folder)}
        if not old_generations or is_locked(lock_path(artifact_folder)):
            continue
        for generation in sorted(old_generations):
            bytes_freed = remove(generation, artifact_folder.name)
            if bytes_freed is not None:
                removal.add(generation, bytes_freed)
    for path in removal.paths:
        logger.info("removed %s", path.relative_to(root))
    return removal


def evict(max_bytes: float, max_age_seconds: float, root: Path | None = None) -> Removal:
    """Remove artifacts that have not been used for this long, then the least recently used ones until the size fits.

    Artifacts that a running process reads are kept, whatever their age and size.

    Raises:
        UserError: The directory is not a store.
    """
    root = root or home()
    _check_store(root)
    size = disk_usage(root)
    candidates = []
    for artifact_folder in artifact_folders(root):
        with contextlib.suppress(OSError):
            manifest = (artifact_folder / MANIFEST).resolve()
            candidates.append((max(manifest.stat().st_mtime, manifest.parent.stat().st_mtime), artifact_folder))
    removal = Removal()
    for last_use, artifact_folder in sorted(candidates):
        age = time.time() - last_use
        if age <= max_age_seconds and size - removal.bytes <= max_bytes:
            continue
        if is_locked(lock_path(artifact_folder)):
            continue
        with hold_lock(artifact_folder):
            bytes_freed = remove(artifact_folder, artifact_folder.name)
            if bytes_freed is None:
                continue
        logger.info(
            "removed %s/%s, last used %.0f days ago",
            artifact_folder.parent.name,
            artifact_folder.name[:12],
            age / 86_400,
        )
        removal.add(artifact_folder, bytes_freed)
    return removal


def store_size(root: Path | None = None) -> int:
    """Return the disk usage of the store in bytes, as `du` counts it: a file with several names counts once."""
    return disk_usage(root or home())


def incoming_size(stage: str, revision: str) -> int:
    """Return the size in bytes of interrupted downloads of a commit, which will be resumed."""
    return sum(disk_usage(path) for path in (home() / stage).glob(f"{INCOMING}{revision[:16]}*"))


def _last_change(folder: Path) -> float:
    """Return the latest modification time in a directory, ignoring files that vanish in the meantime."""
    latest_time = 0.0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            with contextlib.suppress(FileNotFoundError):
                latest_time = max(latest_time, os.stat(path).st_mtime)
    return latest_time


def _check_store(root: Path) -> None:
    """Raise UserError if nothing in the directory shows that it is a store: its files must not be removed."""
    if not root.exists() or (root / MARK).exists() or not any(root.iterdir()):
        return
    # The file that marks a store is missing in stores of earlier versions, and if a run was killed in its first stage.
    if not any(re.fullmatch(re.escape(LOCK) + "[0-9a-f]{16}", path.name) for path in root.glob(f"*/{LOCK}*")):
        raise UserError(
            f"{root} is not a quantize-gemma store, and nothing was removed: set QUANTIZE_GEMMA_HOME to the store"
        )
