"""Reports from a running stage: its progress, and lines for the run's log.

Reports are log records, because stages report from deep inside loops and callbacks of libraries, and logging delivers
records to any handler. In a worker process, worker_main.py sends them to the run; elsewhere, such as in tests that call
a stage's function, there is no handler.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import TextIO

from quantize_gemma.tasks.runtime.strict_json import JsonObject

logger = logging.getLogger(__name__)
# Handlers of other loggers do not show reports.
logger.propagate = False


def report_progress(count: int, total: int, unit: str) -> None:
    """Report how many units of the work are done."""
    logger.info("", extra={"progress": (count, total, unit)})


@contextlib.contextmanager
def as_part(before: int, share: int, total: int) -> Iterator[None]:
    """Scale the progress reported in the block to a part of larger work: `share` of `total`, after `before`."""

    def scale(record: logging.LogRecord) -> bool:
        progress = getattr(record, "progress", None)
        if progress is not None:
            count, part_total, unit = progress
            record.__dict__["progress"] = before + share * count // max(part_total, 1), total, unit
        return True

    logger.addFilter(scale)
    try:
        yield
    finally:
        logger.removeFilter(scale)


def log(message: str) -> None:
    """Write one line to the run's log."""
    logger.info("%s", message)


class Events(logging.Handler):
    """Write events, including reports, as lines of JSON to a stream that no library prints to."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def listen(self) -> None:
        """Write all reports from now on."""
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a report."""
        progress = getattr(record, "progress", None)
        if progress is None:
            self.send({"event": "log", "message": record.getMessage()})
        else:
            count, total, unit = progress
            self.send({"event": "progress", "done": count, "total": total, "what": unit})

    def send(self, event: JsonObject) -> None:
        """Write an event."""
        line = json.dumps(event) + "\n"
        with self.lock or contextlib.nullcontext():
            self.stream.write(line)
            self.stream.flush()
