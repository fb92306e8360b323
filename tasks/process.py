"""Runs a stage's work in a process of its own: its memory comes back, and its death is the stage's failure.

    python -m tasks.process <module>:<function>

reads the arguments as one JSON line and writes events as JSON lines, on pipes of their own, so that whatever the
libraries print does not mix with them. The child ends by itself when its parent is gone.
"""

import importlib
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tasks.store import StageFailed, UserError

Progress = Callable[[int, int, str], None]

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

_events: Any = None


def run(function: str, arguments: dict[str, Any], progress: Progress, logger: Any) -> dict[str, Any]:
    """Returns what `function` ("module:name") returned, with "measured": seconds and peak_rss_bytes added.

    Raises UserError as the function did, and StageFailed when it raised anything else or the process died.
    """
    receive, send = os.pipe()
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.process", function, str(send)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[send],
        env={**os.environ, **QUIET},
        text=True,
        errors="replace",
    )
    os.close(send)
    assert process.stdin is not None
    assert process.stdout is not None
    printed: list[str] = []
    reader = threading.Thread(target=_keep_tail, args=(process.stdout, printed), daemon=True)
    reader.start()
    outcome: dict[str, Any] = {}
    try:
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()  # It stays open: its end tells the child that the parent is gone.
        with os.fdopen(receive, encoding="utf-8") as events:
            for line in events:
                event = json.loads(line)
                if event["event"] == "progress":
                    progress(event["done"], event["total"], event["what"])
                elif event["event"] == "log":
                    logger.info(event["message"])
                else:
                    outcome = event
        process.wait()
    except BrokenPipeError:
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(timeout=5)
        process.stdin.close()
        process.stdout.close()
    if outcome.get("event") == "result":
        value: dict[str, Any] = outcome["value"]
        seconds = round(time.monotonic() - started, 2)
        value["measured"] = {
            "seconds": seconds,
            "peak_rss_bytes": outcome["peak_rss_bytes"],
            **value.pop("extra", {}),
        }
        return value
    if outcome.get("event") == "user_error":
        raise UserError(outcome["message"])
    tail = "".join(printed[-30:])
    if outcome.get("event") == "error":
        raise StageFailed(f"{outcome['message']}\n{tail}".strip())
    raise StageFailed(f"its process ended with {_describe_exit(process.returncode)}\n{tail}".strip())


def report_progress(done: int, total: int, what: str) -> None:
    """Tells the parent how far the work is; does nothing where no parent listens."""
    _emit({"event": "progress", "done": done, "total": total, "what": what})


def report(message: str) -> None:
    """Sends one line to the parent's log; does nothing where no parent listens."""
    _emit({"event": "log", "message": message})


def _emit(event: dict[str, Any]) -> None:
    if _events is not None:
        _events.write(json.dumps(event) + "\n")
        _events.flush()


def _describe_exit(code: int) -> str:
    if code == -9:
        return "SIGKILL (killed from outside, or the machine ran out of memory)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _keep_tail(stream: Any, lines: list[str]) -> None:
    for line in stream:
        lines.append(line)
        del lines[:-200]


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _main() -> None:
    global _events
    function, descriptor = sys.argv[1], int(sys.argv[2])
    _events = os.fdopen(descriptor, "w", encoding="utf-8")
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    module, name = function.split(":")
    try:
        value = getattr(importlib.import_module(module), name)(**arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _emit({"event": "result", "value": value, "peak_rss_bytes": peak})
    except UserError as error:
        _emit({"event": "user_error", "message": str(error)})
    except MemoryError:
        _emit({"event": "error", "message": "out of memory"})
    except Exception as error:
        logging.exception("the stage failed")
        _emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
    _events.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Some libraries' exit handlers take seconds or crash; everything is written by now.


if __name__ == "__main__":
    # As the imported module, so that stages that import it report through the same pipe.
    from tasks import process

    process._main()
