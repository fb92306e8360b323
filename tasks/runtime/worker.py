"""Run a stage's work in its own process: its memory is freed at the end, and if it dies, only the stage fails.

This module runs in the process of the run; fork_server.py starts the worker processes, worker_main.py runs in them, and
reporting.py sends their reports. Reports and results are lines of JSON in a pipe.
"""

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.fork_server import ForkedProcess, ForkServer, ServerEnded, describe_exit, keep_tail
from quantize_gemma.tasks.runtime.lifetime import run_workers
from quantize_gemma.tasks.runtime.redact import AUTH_STRINGS, TOKENS, WEBHOOKS, redact
from quantize_gemma.tasks.runtime.store import home

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]
# Called with the amount done, the total, and the unit.
Progress = Callable[[int, int, str], None]

# A message from worker_main.py: an "event", and its fields.
Event = dict[str, Any]

# Environment variables that no worker inherits.
SECRETS = (*TOKENS, *AUTH_STRINGS, *WEBHOOKS)
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Libraries that most stages import, which takes seconds; without `datasets`, which reads environment variables that a
# stage sets.
LIBRARIES = ("torch", "torchao.quantization", "transformers.models.gemma3.modeling_gemma3")
# Marks the end of a process's output: the pipe stays open if the process has left a child running.
END_OF_OUTPUT = "\0\n"


def run(
    function: str,
    arguments: Mapping[str, object],
    progress: Progress,
    logger: Logger | None,
    environment: dict[str, str] | None = None,
    seconds_allowed: float | None = None,
) -> dict[str, Any]:
    """Call a function in a separate process.

    Args:
        function: "module:name".
        arguments: Its arguments: JSON values.
        progress: Called with the progress that it reports.
        logger: Logs the lines that it reports.
        environment: Further environment variables. This is the only way in which tokens reach the process, and they are
            redacted from everything that it prints or raises.
        seconds_allowed: The time limit, after which the process is killed.

    Returns:
        What the function returned, with "measured" added: seconds and peak_rss_bytes.

    Raises:
        UserError: The function raised it.
        StageFailed: The function raised anything else, or the process died.
    """
    start = time.monotonic()
    with contextlib.closing(Worker(function, arguments, environment)) as process:
        event = process.wait(progress, logger, seconds_allowed)
    value: dict[str, Any] = event["value"]
    value["measured"] = {
        "seconds": round(time.monotonic() - start, 2),
        "peak_rss_bytes": event["peak_rss_bytes"],
        **value.pop("extra", {}),
    }
    return value


class Worker:
    """A process that works for this one. End it with close()."""

    def __init__(
        self, function: str, arguments: Mapping[str, object], environment: dict[str, str] | None = None
    ) -> None:
        """Start the process, which calls `function` ("module:name") with the arguments.

        Raises:
            StageFailed: The process did not start.
        """
        self.killed = False
        self.workers = run_workers()
        events_reader, events_writer = os.pipe()
        stdin, stdin_writer = os.pipe()
        output_reader, self.output_writer = os.pipe()
        self.events = os.fdopen(events_reader, encoding="utf-8")
        # Keep it open: when it closes, the worker knows that this process has ended.
        self.stdin = os.fdopen(stdin_writer, "w", encoding="utf-8")
        self.output = os.fdopen(output_reader, encoding="utf-8", errors="replace")
        self.output_tail: list[str] = []
        try:
            self.process = self._fork(function, events_writer, stdin, self.output_writer)
        except StageFailed as error:
            stopped = self.workers.stopping.is_set()
            self._free()
            raise StageFailed("stopped") if stopped else error from None
        finally:
            for descriptor in (events_writer, stdin):
                os.close(descriptor)
        lines = itertools.takewhile(lambda line: line != END_OF_OUTPUT, self.output)
        self.reader = threading.Thread(target=keep_tail, args=(lines, self.output_tail), daemon=True)
        self.reader.start()
        # If the process is dead, wait() reports why.
        with contextlib.suppress(BrokenPipeError):
            # Use the pipe, not the server, so that no other worker has this one's tokens in memory.
            self.stdin.write(json.dumps({"environment": environment or {}, "arguments": arguments}) + "\n")
            self.stdin.flush()

    def _fork(self, function: str, events: int, stdin: int, output: int) -> ForkedProcess:
        server = self.workers.fork_server(self._start_server)
        try:
            return server.fork(function, events, stdin, output)
        except ServerEnded:
            # The server was just killed without forking a process, so start another server.
            return self.workers.fork_server(self._start_server).fork(function, events, stdin, output)

    def _start_server(self) -> ForkServer:
        inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
        environment = {**inherited, **QUIET, **machine.threads(), **_numba_cache()}
        return ForkServer(environment, LIBRARIES if self.workers.for_run else ())

    def wait(self, progress: Progress, logger: Logger | None, seconds_allowed: float | None = None) -> Event:
        """Return the result, and pass on all reports before it.

        Raises:
            UserError: The function raised it.
            StageFailed: The function raised anything else, or the process died.
        """
        start = time.monotonic()
        timer = threading.Timer(seconds_allowed, self.process.kill) if seconds_allowed else None
        if timer:
            timer.start()
        try:
            event = self._next_event(progress, logger)
        finally:
            if timer:
                timer.cancel()
        if event["event"] == "result":
            return event
        if event["event"] == "user_error":
            raise UserError(redact(event["message"]))
        code = self.process.wait()
        self._end_output()
        if self.killed or self.workers.stopping.is_set():
            raise StageFailed("stopped")
        tail = redact("".join(self.output_tail[-30:]))
        if event["event"] in ("failed", "error"):
            # The message of an expected failure is enough; for any other, the last lines show where it was raised.
            message = redact(event["message"]) + (f"\n{tail}" if event["event"] == "error" else "")
            raise StageFailed(message.strip(), event["transient"], event["retry_after"])
        if seconds_allowed and time.monotonic() - start >= seconds_allowed:
            raise StageFailed(f"it was stopped after {seconds_allowed:,.0f} s, the time limit of a stage")
        raise StageFailed(f"its process ended with {describe_exit(code)}\n{tail}".strip())

    def _next_event(self, progress: Progress, logger: Logger | None) -> Event:
        """Return the next event that is neither progress nor a log line; "died" if there is none."""
        # The last line of a killed process may be incomplete.
        while (line := self.events.readline()).endswith("\n"):
            event: Event = json.loads(line)
            if event["event"] == "progress":
                progress(event["done"], event["total"], event["what"])
            elif event["event"] != "log":
                return event
            elif logger is not None:
                logger.info(redact(event["message"]))
        return {"event": "died"}

    def kill(self) -> None:
        """End the process immediately. A caller that waits for it gets StageFailed("stopped")."""
        self.killed = True
        self.process.kill()

    def close(self) -> None:
        """End the process and free its resources."""
        self.process.kill()
        self.process.wait()
        self._end_output()
        self._free()

    def _end_output(self) -> None:
        """Wait until everything that the process has printed is read."""
        # Nothing reads the pipe after the end marker, so another write could block.
        if self.reader.is_alive():
            os.write(self.output_writer, f"\n{END_OF_OUTPUT}".encode())
            self.reader.join()

    def _free(self) -> None:
        self.events.close()
        self.output.close()
        os.close(self.output_writer)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        if not self.workers.for_run:
            self.workers.close()


def _numba_cache() -> dict[str, str]:
    """Return where numba caches compiled code if it cannot write next to the source: the store, which is writable."""
    if "NUMBA_CACHE_DIR" in os.environ or os.access(Path(__file__).parent, os.W_OK):
        return {}
    return {"NUMBA_CACHE_DIR": str(home() / ".numba")}
