"""The worker process that fork_server.py forks: call a function, and send its reports and its result."""

import contextlib
import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from quantize_gemma.tasks.runtime.disk import disk_failure
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.fingerprint import Fingerprint, difference, fingerprint
from quantize_gemma.tasks.runtime.lifetime import die_with_parent, name_process
from quantize_gemma.tasks.runtime.reporting import Events
from quantize_gemma.tasks.runtime.retries import is_retryable
from quantize_gemma.tasks.runtime.stage import import_function
from quantize_gemma.tasks.runtime.store import keep_pinned, output_folders
from quantize_gemma.tasks.runtime.strict_json import JsonObject

# The increase of /proc/self/oom_score_adj, in thousandths of the memory.
OOM_SCORE = 200


def work(function: str, events: int, stdin: int, output: int, parent: int) -> NoReturn:
    """Call a function, send its result, and end this process.

    The input's first line is {"environment": further environment variables, "arguments": the function's}.

    Args:
        function: "module:name".
        events: The file descriptor for the events.
        stdin: The file descriptor of the input.
        output: The file descriptor for what the function and its libraries print.
        parent: The id of the process that forked this one.
    """
    # Skip exit handlers: those of some libraries take seconds or crash, and those of the parent must not run here.
    code = 1
    try:
        die_with_parent(parent)
        _let_memory_run_out_here()
        for descriptor, standard_descriptor in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, standard_descriptor)
        os.close(stdin)
        os.close(output)
        os.set_inheritable(events, False)
        request = json.loads(sys.stdin.readline())
        _set_environment(request["environment"])
        threading.Thread(target=_end_with_input, daemon=True).start()
        stream = Events(os.fdopen(events, "w", encoding="utf-8"))
        stream.listen()
        logging.basicConfig(level=logging.WARNING)
        stream.send(_call(function, request["arguments"]))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _let_memory_run_out_here() -> None:
    """When memory runs out, have the kernel kill this process, not the one that forked it, along with all workers."""
    with contextlib.suppress(OSError):
        path = Path("/proc/self/oom_score_adj")
        path.write_text(str(min(int(path.read_text()) + OOM_SCORE, 1000)))


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment and "torch" in sys.modules:
        # torch has read this variable on import.
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))


def _call(function: str, arguments: JsonObject) -> JsonObject:
    """Call the function; return the event with its result or its failure."""
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
        is_expected = isinstance(error, StageFailed)
        transient, retry_after = is_retryable(error)
        return {
            "event": "failed" if is_expected else "error",
            "message": str(error) if is_expected else f"{type(error).__name__}: {error}",
            "transient": transient,
            "retry_after": retry_after,
        }
    return {"event": "result", "value": value, "peak_rss_bytes": _peak_rss_bytes()}


def _end_with_input() -> None:
    """End this process when the parent closes its input, on systems where the kernel does not kill it."""
    sys.stdin.read()
    os._exit(1)


def _peak_rss_bytes() -> int:
    """Return this process's peak memory, including the libraries that it shares with its parent.

    getrusage would also include the parent's earlier memory.
    """
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
        StageFailed: The code here does not match the fingerprint.
    """
    name_process(function.split(":")[1])
    mismatch = difference(made_by, fingerprint(function)) if made_by else None
    if mismatch:
        raise StageFailed(f"the code or a library changed during the run ({mismatch}): start the run again")
    work = import_function(function)
    inputs = {
        field: [Path(item) for item in path] if isinstance(path, list) else Path(path) for field, path in paths.items()
    }
    result: JsonObject = work(Path(target), **inputs, **values)
    return result
