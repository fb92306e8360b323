"""How long processes live: workers end with the run, at once when it is interrupted or killed."""

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

# prctl's request for a signal at the parent's death (linux/prctl.h).
PR_SET_PDEATHSIG = 1

StartProcess = Callable[[], "subprocess.Popen[str]"]


class Killable(Protocol):
    """A worker process."""

    def kill(self) -> None:
        """End it at once."""


class Workers:
    """The worker processes of this process.

    Attributes:
        stopping: Set when the run is interrupted: then nobody waits for a lock or a retry, and no worker starts.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._running: set[Killable] = set()
        self._starter: _Starter | None = None
        self._lock = threading.Lock()

    def start(self, start: StartProcess) -> "subprocess.Popen[str]":
        """Call `start` in a thread that lives as long as this process, for die_with_parent(); return its process."""
        with self._lock:
            if self._starter is None:
                self._starter = _Starter()
        return self._starter.submit(start).result()

    def add(self, worker: Killable) -> None:
        """Have the worker killed when the run is interrupted; kill it now if the run is."""
        self._running.add(worker)
        if self.stopping.is_set():
            worker.kill()

    def remove(self, worker: Killable) -> None:
        """Forget a worker that has ended."""
        self._running.discard(worker)

    def kill_all(self) -> None:
        """Kill all workers."""
        for worker in list(self._running):
            worker.kill()

    def forget_starter(self) -> None:
        """Start the next worker from a new thread: a fork has no thread but its own."""
        self._starter, self._lock = None, threading.Lock()


class _Starter:
    """A thread that starts processes and lives as long as this process: threads of a pool end earlier."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[Future[subprocess.Popen[str]], StartProcess]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="starter").start()

    def submit(self, start: StartProcess) -> "Future[subprocess.Popen[str]]":
        """Have the thread call `start`."""
        future: Future[subprocess.Popen[str]] = Future()
        self._requests.put((future, start))
        return future

    def _work(self) -> None:
        while True:
            future, start = self._requests.get()
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)


# One for the process, as its signals are: an interrupt reaches every run and every worker in it.
workers = Workers()
os.register_at_fork(after_in_child=workers.forget_starter)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """Kill all workers when Ctrl-C or a termination signal interrupts the block.

    Prefect waits for its threads then, and they wait for the workers, an export's for minutes.
    """
    workers.stopping.clear()
    try:
        with _hangup_terminates():
            yield
    except Exception:
        raise
    except BaseException:
        workers.stopping.set()
        workers.kill_all()
        raise


@contextlib.contextmanager
def _hangup_terminates() -> Iterator[None]:
    """Turn the hangup of a closed terminal into a termination, which Prefect handles; nohup's stays ignored."""
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
    """Have the kernel kill this process when the thread that started it ends, and with it the process `parent`.

    A thread of this process could not: native code may hold the interpreter for minutes.
    """
    # Only Linux has it; elsewhere the worker ends when its input does.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
