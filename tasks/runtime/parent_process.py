"""What a worker process says to the process that started it, on pipes that no library prints to.

Stages report their progress from deep inside the loops and callbacks of libraries, so there is one connection in a
process, which main() in worker_main.py opens. Where it is not open, as in tests that call a stage's function, reports
go nowhere.
"""

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from quantize_gemma.tasks.runtime.strict_json import JsonObject, JsonValue


class _Connection:
    """The pipes to the parent: lines of JSON, in and out."""

    def __init__(self) -> None:
        self.events: TextIO | None = None
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # What is done before this part of the work, the part's share, and the whole.
        self.part: tuple[int, int, int] | None = None

    def open(self, descriptor: int) -> None:
        """Send events to a file descriptor, and read lines from stdin, whose end is the parent's."""
        self.events = os.fdopen(descriptor, "w", encoding="utf-8")
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, event: JsonObject) -> None:
        """Send an event."""
        if self.events is not None:
            self.events.write(json.dumps(event) + "\n")
            self.events.flush()

    def _read(self) -> None:
        for line in sys.stdin:
            self.lines.put(line)
        os._exit(1)


_parent = _Connection()


def connect(descriptor: int) -> None:
    """Open the connection, whose events go to a file descriptor; this process ends when the parent closes stdin."""
    _parent.open(descriptor)


def report_progress(done: int, total: int, unit: str) -> None:
    """Report that so many units of the work are done."""
    if _parent.part is not None:
        before, share, whole = _parent.part
        done, total = before + share * done // max(total, 1), whole
    _parent.send({"event": "progress", "done": done, "total": total, "what": unit})


@contextlib.contextmanager
def as_part(before: int, share: int, total: int) -> Iterator[None]:
    """Make the progress that the block reports that of a part of larger work: `share` of `total`, after `before`."""
    _parent.part = before, share, total
    try:
        yield
    finally:
        _parent.part = None


def log(message: str) -> None:
    """Write one line to the parent's log."""
    _parent.send({"event": "log", "message": message})


def receive() -> JsonValue:
    """Wait for the next value from the parent, and return it."""
    return json.loads(_parent.lines.get())


def send_result(value: JsonValue) -> None:
    """Send the result of the work."""
    _parent.send({"event": "result", "value": value, "peak_rss_bytes": _peak_rss_bytes()})


def send_user_error(message: str) -> None:
    """Send a mistake of the user's."""
    _parent.send({"event": "user_error", "message": message})


def send_failure(message: str, expected: bool, transient: bool = False, retry_after: float = 0) -> None:
    """Send a failure; if it is not `expected`, the parent adds what this process has printed last."""
    kind = "failed" if expected else "error"
    _parent.send({"event": kind, "message": message, "transient": transient, "retry_after": retry_after})


def _peak_rss_bytes() -> int:
    """Return this process's peak memory; getrusage's on Linux includes the parent's, which exec does not reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
