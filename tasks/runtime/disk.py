"""Turn errors from a full disk, or from a file that is too large, into one sentence that says what to do."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import RunError, StageFailed

# A disk with fewer free bytes counts as full even if no error says so.
MIN_FREE_BYTES = 1 << 16
# The messages of Rust and C++ libraries, whose exceptions have no errno.
FULL_MESSAGES = "No space left on device|Disk quota exceeded|database or disk is full"
TOO_LARGE_MESSAGE = "File too large"


def disk_failure(error: BaseException | None, *folders: Path) -> StageFailed | None:
    """Return the failure to report if an error, or one of its causes, is due to a full disk; otherwise None.

    Args:
        error: The error.
        folders: The directories that the work writes to; the message names the one with the least free space.
    """
    folder = min(folders, key=_free_bytes)
    if isinstance(error, RunError):
        return None
    is_full = error is not None and _free_bytes(folder) < MIN_FREE_BYTES
    while error is not None and not is_full:
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.EFBIG or re.search(TOO_LARGE_MESSAGE, str(error)):
            return StageFailed(
                f"a file was too large for the disk of {folder}, or for this user's limit: raise the limit "
                "(`ulimit -f`), or set QUANTIZE_GEMMA_HOME to another disk"
            )
        is_full = code in (errno.ENOSPC, errno.EDQUOT) or re.search(FULL_MESSAGES, str(error)) is not None
        error = error.__cause__ or error.__context__
    if not is_full:
        return None
    return StageFailed(
        f"the disk of {folder} is full: free some space, for example with `quantize-gemma prune --max-age-days 30`, "
        "and start the same run again: it resumes where it stopped"
    )


@contextlib.contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Raise StageFailed, with one sentence, if the block fails because the disk of a folder is full."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        failure = disk_failure(error, folder)
        if failure is None:
            raise
        raise failure from error


def _free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return float("inf")
