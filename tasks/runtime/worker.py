"""Runs a stage's work in a process of its own: its memory comes back, and its death is the stage's failure.

Three modules share this: here is the parent's side, worker_main.py is what the process runs, and reporting.py is how
code in it reports.

multiprocessing's "spawn" starts a new interpreter as well, but passes on what a stage must not have: it gives the
process the parent's whole environment, with its tokens, and its sys.path, changes into its working directory, and
imports its main module. A run may be started in a directory that is no place to import from or to take settings from.
Nor does it end a process whose parent was killed, which would keep the memory and the GPU, or catch what native code
prints, which is often all that there is of an error. So it is subprocess, with a pipe of JSON lines for the results,
and lifetime.py for how it ends.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.lifetime import run_workers, start_process
from quantize_gemma.tasks.runtime.redact import redact
from quantize_gemma.tasks.runtime.store import home

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]
# Called with what is done, the total, and the unit.
Progress = Callable[[int, int, str], None]

# What worker_main.py sends: an "event", and what belongs to it.
Event = dict[str, Any]

# Environment variables that no worker inherits.
SECRETS = (
    "HF_TOKEN",
    "HF_TOKEN_WRITE",
    "HUGGING_FACE_HUB_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
)
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def run(
    function: str,
    arguments: Mapping[str, object],
    progress: Progress,
    logger: Logger | None,
    environment: dict[str, str] | None = None,
    seconds_allowed: float | None = None,
) -> dict[str, Any]:
    """Call a function in a process of its own.

    Args:
        function: "module:name".
        arguments: Its arguments: JSON values.
        progress: Called with the progress that it reports.
        logger: Logs the lines that it reports.
        environment: Further environment variables; tokens reach the process only here, and leave it in nothing that
            it prints or raises.
        seconds_allowed: The process is killed if it takes longer.

    Returns:
        What the function returned, with "measured" added: seconds and peak_rss_bytes.

    Raises:
        UserError: The function raised it.
        StageFailed: The function raised anything else, or the process died.
    """
    started = time.monotonic()
    with contextlib.closing(Worker(function, arguments, environment)) as process:
        event = process.wait(progress, logger, seconds_allowed)
    value: dict[str, Any] = event["value"]
    value["measured"] = {
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": event["peak_rss_bytes"],
        **value.pop("extra", {}),
    }
    return value


class Worker:
    """A process that works for this one. Whoever starts it ends it with close()."""

    def __init__(
        self, function: str, arguments: Mapping[str, object], environment: dict[str, str] | None = None
    ) -> None:
        """Start the process, which calls `function` ("module:name") with the arguments."""
        receive, send = os.pipe()
        inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
        start = functools.partial(
            subprocess.Popen,
            # In a directory of ours: the one where the run was started is no place to take settings from, as numba and
            # matplotlib do, or to import from, here or in what libraries start (torch lists packages with `pip`).
            [
                *(sys.executable, "-P", "-m", "quantize_gemma.tasks.runtime.worker_main"),
                *(function, str(send), str(os.getpid())),
            ],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[send],
            env={
                **inherited,
                **QUIET,
                "PYTHONSAFEPATH": "1",
                **machine.threads(),
                **_numba_cache(),
                **(environment or {}),
            },
            text=True,
            errors="replace",
        )
        self.process = start_process(start)
        os.close(send)
        self.events = os.fdopen(receive, encoding="utf-8")
        self.printed: list[str] = []
        self.reader = threading.Thread(target=_keep_tail, args=(self.process.stdout, self.printed), daemon=True)
        self.reader.start()
        self.killed = False
        self.workers = run_workers()
        self.workers.add(self)
        assert self.process.stdin is not None
        # Its input stays open: the end tells the process that this one is gone. If it is dead, wait() says why.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(arguments) + "\n")
            self.process.stdin.flush()

    def wait(self, progress: Progress, logger: Logger | None, seconds_allowed: float | None = None) -> Event:
        """Return the result, and pass on what is reported before it.

        Raises:
            UserError: The function raised it.
            StageFailed: The function raised anything else, or the process died.
        """
        started = time.monotonic()
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
        self.process.wait()
        self.reader.join(timeout=5)
        if self.killed or self.workers.stopping.is_set():
            raise StageFailed("stopped")
        tail = redact("".join(self.printed[-30:]))
        if event["event"] in ("failed", "error"):
            # The message of an expected failure is enough; for any other, the last lines say where it was raised.
            message = redact(event["message"]) + (f"\n{tail}" if event["event"] == "error" else "")
            raise StageFailed(message.strip(), event["transient"], event["retry_after"])
        if seconds_allowed and time.monotonic() - started >= seconds_allowed:
            raise StageFailed(f"it was ended after {seconds_allowed:,.0f} s, the longest that it may take")
        raise StageFailed(f"its process ended with {_describe_exit(self.process.returncode)}\n{tail}".strip())

    def _next_event(self, progress: Progress, logger: Logger | None) -> Event:
        """Return the next event that is neither progress nor a line for the log; "died" if there is none."""
        # The last line of a process that was killed may be half of one.
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
        """End the process at once. A caller that waits for it gets StageFailed("stopped")."""
        self.killed = True
        self.process.kill()

    def close(self) -> None:
        """End the process and free its resources."""
        self.workers.remove(self)
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=5)
        self.events.close()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _numba_cache() -> dict[str, str]:
    """Return where numba keeps compiled code if it cannot be beside the source: in the store, which is writable."""
    if "NUMBA_CACHE_DIR" in os.environ or os.access(Path(__file__).parent, os.W_OK):
        return {}
    return {"NUMBA_CACHE_DIR": str(home() / ".numba")}


def _keep_tail(stream: Iterable[str], lines: list[str]) -> None:
    """Keep the last lines of a process's output."""
    for line in stream:
        lines.append(line)
        del lines[:-200]


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL (killed from outside, or the machine ran out of memory)"
    if code == -signal.SIGBUS:
        return "SIGBUS (a disk was full, or a file became shorter while it was read)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
