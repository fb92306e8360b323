"""Find the processes of a run."""

import contextlib
from collections.abc import Iterator

import psutil

FORK_SERVER = "quantize_gemma.tasks.runtime.fork_server"


def stage_processes(run: int) -> list[psutil.Process]:
    """Return the processes of the stages that a run is executing: the children of its fork server."""
    return [child for child, is_forked in _fork_server_and_children(run) if is_forked]


def fork_servers(run: int) -> list[psutil.Process]:
    """Return the process that forks a run's stages, in a list that is empty before the process starts."""
    return [child for child, is_forked in _fork_server_and_children(run) if not is_forked]


def _fork_server_and_children(run: int) -> Iterator[tuple[psutil.Process, bool]]:
    for child in psutil.Process(run).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # A forked process has the command line of its parent.
            if FORK_SERVER in child.cmdline():
                parent = child.parent()
                yield child, parent is not None and FORK_SERVER in parent.cmdline()
