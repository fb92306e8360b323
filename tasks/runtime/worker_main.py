"""The main module of a worker process, which worker.py starts.

    python -m quantize_gemma.tasks.runtime.worker_main <module>:<function> <file descriptor for events> <parent's id>

It reads the function's arguments as one line of JSON, calls it, and sends its result or its failure. It ends when its
parent is gone: the kernel kills it, whatever it is doing.
"""

import json
import logging
import os
import sys
import threading
from pathlib import Path

from quantize_gemma.tasks.runtime.disk import disk_failure
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.fingerprint import Fingerprint, difference, fingerprint
from quantize_gemma.tasks.runtime.lifetime import die_with_parent
from quantize_gemma.tasks.runtime.reporting import Events
from quantize_gemma.tasks.runtime.retries import is_retryable
from quantize_gemma.tasks.runtime.stage import import_function
from quantize_gemma.tasks.runtime.store import keep_pinned, output_folders
from quantize_gemma.tasks.runtime.strict_json import JsonObject


def main() -> None:
    """Do the work that the arguments and the first line of the input name, and end this process."""
    function, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    events = Events(os.fdopen(descriptor, "w", encoding="utf-8"))
    events.listen()
    logging.basicConfig(level=logging.WARNING)
    events.send(_call(function, arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Some libraries' exit handlers take seconds or crash; everything is written by now.


def _call(function: str, arguments: JsonObject) -> JsonObject:
    """Call the function; return the event of its result, or of its failure."""
    try:
        with keep_pinned():
            value = import_function(function)(**arguments)
    except UserError as error:
        return {"event": "user_error", "message": str(error)}
    except MemoryError:
        return {"event": "error", "message": "out of memory", "transient": False, "retry_after": 0}
    except Exception as error:
        logging.exception("the stage failed")
        error = disk_failure(error, *output_folders()) or error
        expected = isinstance(error, StageFailed)
        transient, retry_after = is_retryable(error)
        return {
            "event": "failed" if expected else "error",
            "message": str(error) if expected else f"{type(error).__name__}: {error}",
            "transient": transient,
            "retry_after": retry_after,
        }
    return {"event": "result", "value": value, "peak_rss_bytes": _peak_rss_bytes()}


def _end_with_input() -> None:
    """End this process with its input, whose other end is the parent's, where the kernel does not kill it."""
    sys.stdin.read()
    os._exit(1)


def _peak_rss_bytes() -> int:
    """Return this process's peak memory; getrusage's on Linux includes the parent's, which exec does not reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def call(
    function: str,
    target: str,
    paths: dict[str, str | list[str]],
    values: JsonObject,
    made_by: Fingerprint | None = None,
) -> JsonObject:
    """Call a stage's function.

    Args:
        function: "module:name".
        target: The directory that it fills.
        paths: Its inputs that are artifacts, or lists of artifacts: their directories.
        values: Its other inputs.
        made_by: The fingerprint in the artifact's key, if it has a key.

    Returns:
        The function's result.

    Raises:
        StageFailed: The code here is not the code of the fingerprint.
    """
    changed = difference(made_by, fingerprint(function)) if made_by else None
    if changed:
        raise StageFailed(f"{changed}: it was changed during the run, start the run again")
    work = import_function(function)
    inputs = {
        field: [Path(one) for one in path] if isinstance(path, list) else Path(path) for field, path in paths.items()
    }
    result: JsonObject = work(Path(target), **inputs, **values)
    return result


if __name__ == "__main__":
    main()
