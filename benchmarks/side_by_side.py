"""Shared code of the benchmarks: run steps in fresh processes, on files that are not in the page cache."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.machine import processor
from quantize_gemma.tasks.runtime.units import human_size

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torchao", "transformers", "executorch", "optimum-executorch", "lm-eval")


def run(function: str, environment: dict[str, str] | None = None, /, **arguments: Any) -> dict[str, Any]:
    """Call "module:name" in a separate process; return its result with "seconds" and "peak_rss_bytes" added.

    The clock stops when all output is on disk. Arguments are JSON values and paths.
    """
    values = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    for value in arguments.values():
        if isinstance(value, Path):
            drop_from_page_cache(value)
    start = time.monotonic()
    # Workers do not import from the working directory.
    os.environ["PYTHONPATH"] = str(ROOT)
    result = worker.run(function, values, lambda *_: None, None, environment)
    os.sync()
    return {**result, "seconds": time.monotonic() - start, "peak_rss_bytes": result["measured"]["peak_rss_bytes"]}


def empty_folder(path: Path) -> Path:
    """Create an empty directory, replacing an existing one, and return it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def drop_from_page_cache(folder: Path) -> None:
    """Drop a directory's files from the page cache, so that the next read goes to the disk."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def machine() -> str:
    """Return a description of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{processor()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB, {platform.system()} {platform.machine()}"


def version() -> str:
    """Return the commit that is measured."""
    process = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


def describe(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON fields that say what was measured, and where."""
    return {
        "name": name,
        "machine": machine(),
        "version": version(),
        "versions": {library: installed(library).split("+")[0] for library in LIBRARIES},
        "case": case,
    }


def make_result(
    name: str, case: dict[str, Any], reference: dict[str, Any] | None, ours: dict[str, Any], equal: bool | None
) -> dict[str, Any]:
    """Return the JSON fields of a comparison, from steps {"seconds", "peak_rss_bytes"}; ratio: reference / ours."""
    costs = {"time": "seconds", "memory": "peak_rss_bytes"}
    steps = {"reference": reference, "ours": ours}
    return {
        **describe(name, case),
        **{side: {key: step[key] for key in costs.values()} for side, step in steps.items() if step},
        "ratio": {cost: reference[key] / ours[key] for cost, key in costs.items()} if reference else None,
        "equal": equal,
    }


def format_line(name: str, step: dict[str, Any]) -> str:
    """Return one line of a benchmark's table."""
    return f"{name:28} {step['seconds']:9.1f} s {human_size(step['peak_rss_bytes']):>10}"


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print the results of a benchmark, as one JSON object or as lines. Exit with 1 if they are not equal."""
    print(json.dumps(result) if as_json else "\n".join(result["lines"]))
    if result["equal"] is False:
        sys.exit(1)
