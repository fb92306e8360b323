"""The lifetime of processes: workers end with the run, immediately if it is interrupted or killed."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.errors import StageFailed

if TYPE_CHECKING:
    from quantize_gemma.tasks.runtime.fork_server import ForkServer

# prctl's options (linux/prctl.h): a signal when the parent dies, and this process's name.
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15

StartProcess = Callable[[], "subprocess.Popen[str]"]


class Workers:
    """The worker processes of a run.

    Attributes:
        for_run: Whether the workers belong to a run, which has many of them.
        stopping: Set when the run is interrupted or over. Then nothing waits for a lock or a retry anymore, and no
            worker starts.
    """

    def __init__(self, for_run: bool) -> None:
        self.for_run = for_run
        self.stopping = threading.Event()
        self._server: ForkServer | None = None
        self._lock = threading.Lock()

    def fork_server(self, start: Callable[[], "ForkServer"]) -> "ForkServer":
        """Return the process that forks the workers; start it if there is none.

        Raises:
            StageFailed: The run is interrupted or over.
        """
        with self._lock:
            if self.stopping.is_set():
                raise StageFailed("stopped")
            if self._server is None or not self._server.is_alive:
                self._end_server()
                self._server = start()
            return self._server

    def stop(self) -> None:
        """Kill all workers, and prevent new ones from starting."""
        self.stopping.set()
        with self._lock:
            if self._server is not None:
                self._server.stop()

    def close(self) -> None:
        """End all workers, and prevent new ones from starting."""
        self.stopping.set()
        with self._lock:
            self._end_server()

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


# Prefect copies the context of the flow into the threads of its tasks.
_run_workers: ContextVar[Workers] = ContextVar("run_workers")


def run_workers() -> Workers:
    """Return the workers of this thread's run; outside of a run, return workers that are never interrupted."""
    return _run_workers.get(None) or Workers(for_run=False)


def start_process(start: StartProcess) -> "subprocess.Popen[str]":
    """Start a process from a thread that lives as long as the process, for die_with_parent()."""
    process_future: Future[subprocess.Popen[str]] = Future()

    def work() -> None:
        try:
            process = start()
        except BaseException as error:
            process_future.set_exception(error)
            return
        process_future.set_result(process)
        # WNOWAIT leaves the exit code to the process's owner.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    threading.Thread(target=work, daemon=True, name="starter").start()
    return process_future.result()


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """End the workers when the block ends, immediately if Ctrl-C or a termination signal interrupts it.

    Otherwise, Prefect would wait for its threads, which wait for the workers, in an export for minutes.
    """
    workers = Workers(for_run=True)
    token = _run_workers.set(workers)
    try:
        with _hangup_terminates():
            yield
    except Exception:
        raise
    except BaseException:
        workers.stop()
        raise
    finally:
        _run_workers.reset(token)
        workers.close()


@contextlib.contextmanager
def _hangup_terminates() -> Iterator[None]:
    """Turn SIGHUP, from a closed terminal, into a termination, which Prefect handles; under nohup, keep ignoring it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it, or the process `parent`, ends.

    A thread of this process could not do that, because native code may hold the GIL for minutes.
    """
    # Only Linux has this; on other systems, the worker ends when its input ends.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """Name this process in `top` and `ps`, by the first 15 characters."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())
