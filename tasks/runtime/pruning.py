"""Makes room in the store: removes what nobody will read, and what was not used for long."""

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
    artifact_places,
    current_generation,
    delete,
    disk_usage,
    generations,
    is_locked,
    lock_path,
    locked,
    remove,
)

logger = logging.getLogger(__name__)

# For so long a download that was interrupted is kept for another run to continue it.
SECONDS_TO_RESUME = 86_400.0


@dataclass
class Removed:
    """What was removed, and how many bytes of the disk that has freed."""

    paths: list[Path] = field(default_factory=list)
    bytes: int = 0

    def add(self, path: Path, freed: int) -> None:
        """Count a directory that was removed."""
        self.paths.append(path)
        self.bytes += freed


def remove_unfinished(root: Path | None = None) -> Removed:
    """Remove what nobody will read: work that died half-way, and generations that were replaced.

    Work in progress holds its lock. Interrupted downloads stay for a day, because the next run continues them.

    Raises:
        UserError: The directory is not a store.
    """
    root = root or home()
    _check_store(root)
    removed = Removed()
    for incoming in sorted(root.glob(f"*/{INCOMING}*")):
        # A download releases its lock between two tries.
        # It may just have been completed, and is gone then.
        touched = _last_touched(incoming) or time.time()
        busy = any(is_locked(path) for path in incoming.parent.glob(f"{LOCK}*"))
        if time.time() - touched > SECONDS_TO_RESUME and not busy:
            removed.add(incoming, delete(incoming))
    for partial in sorted(root.glob(f"*/{PARTIAL}*-*")):
        short = partial.name[len(PARTIAL) :].split("-")[0]
        if re.fullmatch("[0-9a-f]{16}", short) and not is_locked(lock_path(partial.parent / short)):
            removed.add(partial, delete(partial))
    for place in sorted(root.glob(f"*/{'[0-9a-f]' * 64}")):
        replaced = set(generations(place)) - {current_generation(place)}
        if not replaced or is_locked(lock_path(place)):
            continue
        for generation in sorted(replaced):
            freed = remove(generation, place.name)
            if freed is not None:
                removed.add(generation, freed)
    for path in removed.paths:
        logger.info("removed %s", path.relative_to(root))
    return removed


def evict(max_bytes: float, max_age_seconds: float, root: Path | None = None) -> Removed:
    """Remove artifacts that were not used for so long, then the longest unused ones until the store fits.

    What a running process reads stays, whatever its age and size.

    Raises:
        UserError: The directory is not a store.
    """
    root = root or home()
    _check_store(root)
    size = disk_usage(root)
    unused = []
    for place in artifact_places(root):
        with contextlib.suppress(OSError):
            manifest = (place / MANIFEST).resolve()
            unused.append((max(manifest.stat().st_mtime, manifest.parent.stat().st_mtime), place))
    evicted = Removed()
    for used, place in sorted(unused):
        age = time.time() - used
        if age <= max_age_seconds and size - evicted.bytes <= max_bytes:
            continue
        if is_locked(lock_path(place)):
            continue
        with locked(place):
            freed = remove(place, place.name)
            if freed is None:
                continue
        logger.info("removed %s/%s, last used %.0f days ago", place.parent.name, place.name[:12], age / 86_400)
        evicted.add(place, freed)
    return evicted


def store_size(root: Path | None = None) -> int:
    """Return the bytes of the disk that the store takes, as `du` counts: a file with several names counts once."""
    return disk_usage(root or home())


def incoming_size(stage: str, revision: str, root: Path | None = None) -> int:
    """Return the bytes of a download that was interrupted and will be continued."""
    return disk_usage((root or home()) / stage / f"{INCOMING}{revision[:16]}")


def _last_touched(folder: Path) -> float:
    """Return the latest modification time of what is in a directory; what vanishes meanwhile does not count."""
    latest = 0.0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            with contextlib.suppress(FileNotFoundError):
                latest = max(latest, os.stat(path).st_mtime)
    return latest


def _check_store(root: Path) -> None:
    """Raise UserError if nothing in the directory says that it is a store: what is there is somebody else's."""
    if not root.exists() or (root / MARK).exists() or not any(root.iterdir()):
        return
    # Earlier versions made no mark, nor has a run that died in its first stage.
    if not any(re.fullmatch(re.escape(LOCK) + "[0-9a-f]{16}", path.name) for path in root.glob(f"*/{LOCK}*")):
        raise UserError(
            f"{root} is not a quantize-gemma store, and nothing was removed: set QUANTIZE_GEMMA_HOME to the store"
        )
