"""The main module of a worker process, which worker.py starts.

    python -m quantize_gemma.tasks.runtime.worker_main <module>:<function> <file descriptor for events> <parent's id>

It reads the function's arguments as one line of JSON, calls it, and sends its result or its failure. It ends when its
parent is gone: the kernel kills it, whatever it is doing.
"""

import logging
import os
import sys
from pathlib import Path

from quantize_gemma.tasks.runtime import parent_process
from quantize_gemma.tasks.runtime.disk import disk_failure
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.fingerprint import Fingerprint, difference, fingerprint
from quantize_gemma.tasks.runtime.lifetime import die_with_parent
from quantize_gemma.tasks.runtime.retries import is_retryable
from quantize_gemma.tasks.runtime.stage import import_function
from quantize_gemma.tasks.runtime.store import output_folders
from quantize_gemma.tasks.runtime.strict_json import JsonObject


def main() -> None:
    """Do the work that the arguments and the first line of the input name, and end this process."""
    function, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)
    parent_process.connect(descriptor)
    logging.basicConfig(level=logging.WARNING)
    try:
        parent_process.send_result(import_function(function)(**parent_process.receive()))
    except UserError as error:
        parent_process.send_user_error(str(error))
    except MemoryError:
        parent_process.send_failure("out of memory", expected=False)
    except Exception as error:
        logging.exception("the stage failed")
        error = disk_failure(error, *output_folders()) or error
        expected = isinstance(error, StageFailed)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        parent_process.send_failure(message, expected, *is_retryable(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Some libraries' exit handlers take seconds or crash; everything is written by now.


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
