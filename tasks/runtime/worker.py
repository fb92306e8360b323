"""Runs a stage's work in a process of its own: its memory comes back, and its death is the stage's failure.

    python -m quantize_gemma.tasks.runtime.worker <module>:<function>

reads the arguments as one JSON line and writes events as JSON lines, on pipes of their own, so that whatever the
libraries print does not mix with them. The child ends when its parent is gone: the kernel kills it, whatever it is at.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.fingerprint import Fingerprint, difference, fingerprint
from quantize_gemma.tasks.runtime.redact import redact
from quantize_gemma.tasks.runtime.store import disk_failure, home, stopping

Progress = Callable[[int, int, str], None]
Spread = Callable[[str, list[dict[str, Any]], int, str | None], int]

TOKENS = (
    "HF_TOKEN",
    "HF_TOKEN_WRITE",
    "HUGGING_FACE_HUB_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
)
# Whoever wants to be asked again later than in so many seconds has failed for this run.
MOST_SECONDS_TO_WAIT = 900.0
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

# prctl's request for a signal at the parent's death (linux/prctl.h).
PR_SET_PDEATHSIG = 1

_events: Any = None
_lines: "queue.SimpleQueue[str]" = queue.SimpleQueue()
_running: "set[Child]" = set()
# What the work was before this part, this part, and all of it.
_part: tuple[int, int, int] | None = None


def run(
    function: str,
    arguments: dict[str, Any],
    progress: Progress,
    logger: Any,
    environment: dict[str, str] | None = None,
    seconds_allowed: float | None = None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Returns what `function` ("module:name") returned, with "measured": seconds and peak_rss_bytes added.

    Tokens reach the process only in `environment`, and leave it in nothing that it prints or raises. `spread` does what
    the function hands out with spread_parts(), and returns the most memory that one of its processes took.

    Raises UserError as the function did, and StageFailed when it raised anything else or the process died.
    """
    started = time.monotonic()
    peak = 0
    with contextlib.closing(Child(function, arguments, environment)) as child:
        while (event := child.receive(progress, logger, seconds_allowed))["event"] == "spread":
            if spread is not None:
                peak = max(peak, spread(event["function"], event["parts"], event["workers"], event["cluster"]))
            child.send(spread is not None)
    value: dict[str, Any] = event["value"]
    value["measured"] = {
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": max(peak, event["peak_rss_bytes"]),
        **value.pop("extra", {}),
    }
    return value


class Child:
    """A process that works for this one, on lines of JSON. Whoever starts it ends it with close()."""

    def __init__(self, function: str, arguments: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        """Starts `function` ("module:name") with the arguments."""
        receive, send = os.pipe()
        kept = {name: value for name, value in os.environ.items() if name not in TOKENS}
        start = functools.partial(
            subprocess.Popen,
            # In a directory of ours: the one where the run was started is no place to take settings from, as numba and
            # matplotlib do, or to import from, here or in what libraries start (torch lists packages with `pip`).
            [sys.executable, "-P", "-m", "quantize_gemma.tasks.runtime.worker", function, str(send), str(os.getpid())],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[send],
            env={**kept, **QUIET, "PYTHONSAFEPATH": "1", **machine.threads(), **_cache(), **(environment or {})},
            text=True,
            errors="replace",
        )
        self.process: subprocess.Popen[str] = _starter().submit(start).result()
        os.close(send)
        self.events = os.fdopen(receive, encoding="utf-8")
        self.printed: list[str] = []
        self.reader = threading.Thread(target=_keep_tail, args=(self.process.stdout, self.printed), daemon=True)
        self.reader.start()
        self.killed = False
        _running.add(self)
        if stopping.is_set():
            self.kill()
        self.send(arguments)

    def send(self, value: Any) -> None:
        """Sends the process a line. It stays open for more: its end tells the process that this one is gone."""
        assert self.process.stdin is not None
        # What it died of, receive() says.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()

    def receive(self, progress: Progress, logger: Any, seconds_allowed: float | None = None) -> dict[str, Any]:
        """Returns the next event that is no progress and no line for the log: a result, or parts to be spread.

        Raises UserError and StageFailed as run() does.
        """
        started = time.monotonic()
        watch = threading.Timer(seconds_allowed, self.process.kill) if seconds_allowed else None
        if watch:
            watch.start()
        event: dict[str, Any] = {"event": "died"}
        try:
            # The last line of a process that was killed may be half of one.
            while (line := self.events.readline()).endswith("\n"):
                said = json.loads(line)
                if said["event"] == "progress":
                    progress(said["done"], said["total"], said["what"])
                elif said["event"] == "log":
                    logger.info(redact(said["message"]))
                else:
                    event = said
                    break
        finally:
            if watch:
                watch.cancel()
        if event["event"] in ("result", "spread"):
            return event
        if event["event"] == "user_error":
            raise UserError(redact(event["message"]))
        self.process.wait()
        self.reader.join(timeout=5)
        if self.killed or stopping.is_set():
            raise StageFailed("stopped")
        tail = redact("".join(self.printed[-30:]))
        if event["event"] in ("failed", "error"):
            # What a stage says of its failure is enough; of an error nobody thought of, its last lines say where.
            message = redact(event["message"]) + (f"\n{tail}" if event["event"] == "error" else "")
            raise StageFailed(message.strip(), event["transient"], event["retry_after"])
        if seconds_allowed and time.monotonic() - started >= seconds_allowed:
            raise StageFailed(f"it was ended after {seconds_allowed:,.0f} s, the longest that it may take")
        raise StageFailed(f"its process ended with {_describe_exit(self.process.returncode)}\n{tail}".strip())

    def kill(self) -> None:
        """Ends the process at once; whoever waits for it is told that it was stopped."""
        self.killed = True
        self.process.kill()

    def close(self) -> None:
        """Ends the process and frees what it took."""
        _running.discard(self)
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=5)
        self.events.close()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def call(
    function: str, target: str, paths: dict[str, str], values: dict[str, Any], made_by: Fingerprint | None = None
) -> dict[str, Any]:
    """Calls a stage's work inside its own process, with artifacts as paths of their directories.

    Raises StageFailed if its code is not that whose fingerprint `made_by` is in the key, if there is a key.
    """
    changed = difference(made_by, fingerprint(function)) if made_by else None
    if changed:
        raise StageFailed(f"{changed}: it was changed during the run, start the run again")
    work = named(function)
    result: dict[str, Any] = work(Path(target), **{field: Path(path) for field, path in paths.items()}, **values)
    return result


def named(function: str) -> Callable[..., Any]:
    """Returns the function of a name "module:function"."""
    module, name = function.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


@contextlib.contextmanager
def ended_on_interrupt() -> Iterator[None]:
    """Ends all stages' processes when Ctrl-C or a termination signal interrupts what is inside.

    Prefect waits for its threads then, and they wait for these processes, an export's for minutes.
    """
    stopping.clear()
    try:
        with _hangup_terminates():
            yield
    except Exception:
        raise
    except BaseException:
        stopping.set()
        kill_all()
        raise


@contextlib.contextmanager
def _hangup_terminates() -> Iterator[None]:
    """Makes a terminal that is closed a termination signal, which Prefect handles; under nohup it stays ignored."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def kill_all() -> None:
    """Ends all processes that this one has started and waits for."""
    for child in list(_running):
        child.kill()


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends, and with it the process `parent`.

    A thread of ours could not: native code may hold the interpreter for minutes.
    """
    # Linux's alone; elsewhere the end of the pipe has to do.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@functools.cache
def _starter() -> "_Starter":
    return _Starter()


# A fork has no threads but its own.
os.register_at_fork(after_in_child=_starter.cache_clear)


class _Starter:
    """Starts processes from a thread that lasts as long as this process: threads of a pool end earlier."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[tuple[Future[subprocess.Popen[str]], Callable[[], subprocess.Popen[str]]]]
        self.requests = queue.SimpleQueue()
        threading.Thread(target=self._start, daemon=True, name="starter").start()

    def submit(self, start: "Callable[[], subprocess.Popen[str]]") -> "Future[subprocess.Popen[str]]":
        """Has the thread call `start`."""
        future: Future[subprocess.Popen[str]] = Future()
        self.requests.put((future, start))
        return future

    def _start(self) -> None:
        while True:
            future, start = self.requests.get()
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)


def _cache() -> dict[str, str]:
    """Returns where numba keeps what it compiled, if that cannot be beside the code; the store can be written to."""
    if "NUMBA_CACHE_DIR" in os.environ or os.access(Path(__file__).parent, os.W_OK):
        return {}
    return {"NUMBA_CACHE_DIR": str(home() / ".numba")}


def disks() -> list[Path]:
    """Returns where a run writes."""
    prefect = os.environ.get("PREFECT_HOME") or "~/.prefect"
    return [home(), Path(tempfile.gettempdir()), Path(prefect).expanduser()]


def trim_memory() -> None:
    """Gives freed memory back to the system: reading Gemma's tokenizer leaves 0.3 GB of it behind."""
    # glibc's alone; elsewhere there is nothing to do.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def report_progress(done: int, total: int, what: str) -> None:
    """Tells the parent how far the work is; does nothing where no parent listens."""
    if _part is not None:
        before, size, whole = _part
        done, total = before + size * done // max(total, 1), whole
    _emit({"event": "progress", "done": done, "total": total, "what": what})


@contextlib.contextmanager
def as_part(before: int, size: int, total: int) -> Iterator[None]:
    """Makes what is reported inside a part of something larger."""
    global _part
    _part = before, size, total
    try:
        yield
    finally:
        _part = None


def spread_parts(function: str, parts: list[dict[str, Any]], workers: int, cluster: str | None) -> bool:
    """Has the parent call `function` ("module:name") with each of the parts, in so many processes or on a cluster.

    Returns False, and nothing was done, where no parent does such a thing. If a part fails, the parent ends this
    process.
    """
    _emit({"event": "spread", "function": function, "parts": parts, "workers": workers, "cluster": cluster})
    return _events is not None and bool(next_line())


def next_line() -> Any:
    """Waits for what the parent sends next, and returns it."""
    return json.loads(_lines.get())


def give(value: Any) -> None:
    """Sends the parent a result."""
    _emit({"event": "result", "value": value, "peak_rss_bytes": _peak_rss_bytes()})


def report(message: str) -> None:
    """Sends one line to the parent's log; does nothing where no parent listens."""
    _emit({"event": "log", "message": message})


def _emit(event: dict[str, Any]) -> None:
    if _events is not None:
        _events.write(json.dumps(event) + "\n")
        _events.flush()


def is_transient(error: BaseException | None) -> tuple[bool, float]:
    """Tells whether the same work may succeed later, and after how many seconds the server asked to come back.

    So are: an interrupted or refused connection, a time-out, and the answers 408, 429 and 5xx; wherever in the chain
    of causes, because the Hub's client wraps them. A user's mistake is not, and neither is a server that wants to be
    left alone for longer than MOST_SECONDS_TO_WAIT.
    """
    import httpx

    while error is not None:
        if isinstance(error, UserError):
            return False, 0.0
        if isinstance(error, StageFailed):
            return error.transient, error.retry_after
        response = getattr(error, "response", None)
        if response is not None:
            status, seconds = response.status_code, asked_to_wait(response.headers)
            # 507 is a quota that is used up.
            passes = status in (408, 429) or (status >= 500 and status != 507)
            return (True, seconds) if passes and seconds <= MOST_SECONDS_TO_WAIT else (False, 0.0)
        if isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError)):
            return True, 0.0
        # What was raised `from None` does not follow from what was handled just then.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False, 0.0


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Returns the seconds after which the server wants to be asked again: the Hub's rate limit, else Retry-After.

    0 if it does not say so in a way that can be read; it may be infinite.
    """
    from email.utils import parsedate_to_datetime

    limit = re.search(r"\br=0\b.*\bt=([0-9]+)", headers.get("RateLimit", ""))
    if limit:
        return float(limit.group(1)) + 1
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]+", after):
        return float(after)
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _peak_rss_bytes() -> int:
    """Returns the process's own peak; getrusage's on Linux has the parent's in it, which exec does not reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL (killed from outside, or the machine ran out of memory)"
    if code == -signal.SIGBUS:
        return "SIGBUS (a disk was full, or a file became shorter while it was read)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _keep_tail(stream: Any, lines: list[str]) -> None:
    for line in stream:
        lines.append(line)
        del lines[:-200]


def _listen() -> None:
    """Takes what the parent sends; the end of it is the parent's."""
    for line in sys.stdin:
        _lines.put(line)
    os._exit(1)


def main() -> None:
    """Does the work that the arguments and the first line of the input name, and ends this process."""
    global _events
    function, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    end_with_parent(parent)
    _events = os.fdopen(descriptor, "w", encoding="utf-8")
    threading.Thread(target=_listen, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    try:
        give(named(function)(**next_line()))
    except UserError as error:
        _emit({"event": "user_error", "message": str(error)})
    except MemoryError:
        _emit({"event": "error", "message": "out of memory", "transient": False, "retry_after": 0})
    except Exception as error:
        logging.exception("the stage failed")
        error = disk_failure(error, *disks()) or error
        transient, retry_after = is_transient(error)
        failed = isinstance(error, StageFailed)
        message = str(error) if failed else f"{type(error).__name__}: {error}"
        kind = "failed" if failed else "error"
        _emit({"event": kind, "message": message, "transient": transient, "retry_after": retry_after})
    _events.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Some libraries' exit handlers take seconds or crash; everything is written by now.


if __name__ == "__main__":
    # As the imported module, so that stages that import it report through the same pipe.
    from quantize_gemma.tasks.runtime import worker

    worker.main()
