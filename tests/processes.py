"""The processes of a run, as tests look for them."""

import contextlib

import psutil

FORK_SERVER = "quantize_gemma.tasks.runtime.fork_server"


def stage_processes(run: int) -> list[psutil.Process]:
    """Returns the processes of the stages that a run is in: the children of its fork server."""
    processes = []
    for child in psutil.Process(run).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = child.parent()
            if parent and FORK_SERVER in parent.cmdline() and FORK_SERVER in child.cmdline():
                processes.append(child)
    return processes
