"""The processes of a run, as tests look for them."""

import contextlib
from collections.abc import Iterator

import psutil

FORK_SERVER = "quantize_gemma.tasks.runtime.fork_server"


def stage_processes(run: int) -> list[psutil.Process]:
    """Returns the processes of the stages that a run is in: the children of its fork server."""
    return [child for child, forked in _forking_and_forked(run) if forked]


def fork_servers(run: int) -> list[psutil.Process]:
    """Returns the process that forks a run's stages, if it has one yet."""
    return [child for child, forked in _forking_and_forked(run) if not forked]


def _forking_and_forked(run: int) -> Iterator[tuple[psutil.Process, bool]]:
    for child in psutil.Process(run).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # A forked process has the command line of its parent.
            if FORK_SERVER in child.cmdline():
                parent = child.parent()
                yield child, parent is not None and FORK_SERVER in parent.cmdline()
