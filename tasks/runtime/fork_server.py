"""Fork a run's worker processes from one that has imported their libraries, which takes longer than many stages.

    python -m quantize_gemma.tasks.runtime.fork_server <file descriptor of its socket> <parent's id> <library>…

multiprocessing has a fork server, too, but it passes on things that a stage must not have: the parent's whole
environment, including tokens, its sys.path, and its main module. (A run may be started in a directory from which
no modules or settings may be loaded.) It also does not end processes whose parent was killed, which would keep
memory and the GPU in use, and does not capture the output of native code, which is often the only trace of an error.
lifetime.py describes how the processes of this server end.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quantize_gemma.tasks.runtime import machine, worker_main
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.lifetime import die_with_parent, start_process
from quantize_gemma.tasks.runtime.strict_json import JsonObject

# A request names a function or a process; its answer is a number or a message.
MAX_BYTES = 2**16


class ServerEnded(StageFailed):
    """The server has ended without forking the process."""


class ForkServer:
    """The process that forks workers. It ends with the process that started it, and the workers end with it."""

    def __init__(self, environment: Mapping[str, str], libraries: Sequence[str]) -> None:
        """Start the process with these environment variables. The first fork waits until the libraries are imported."""
        self._channel, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        start = functools.partial(
            subprocess.Popen,
            # Start it in a trusted directory: numba and matplotlib read settings from the working directory, and
            # processes that libraries start (torch lists packages with `pip`) import modules from it.
            [
                *(sys.executable, "-P", "-m", "quantize_gemma.tasks.runtime.fork_server"),
                *(str(channel.fileno()), str(os.getpid()), *libraries),
            ],
            cwd=Path(__file__).parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[channel.fileno()],
            env={**environment, "PYTHONSAFEPATH": "1"},
            text=True,
            errors="replace",
        )
        with channel:
            self._process = start_process(start)
        self._output_tail: list[str] = []
        self._reader = threading.Thread(target=keep_tail, args=(self._process.stdout, self._output_tail), daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        """Whether the server can fork."""
        return self._process.poll() is None

    def fork(self, function: str, events: int, stdin: int, output: int) -> "ForkedProcess":
        """Fork a process that calls a function; see worker_main.work().

        Args:
            function: "module:name".
            events: The file descriptor that gets the events.
            stdin: Its standard input.
            output: Its standard output and error.

        Raises:
            ServerEnded: The server has ended.
            StageFailed: The server cannot fork.
        """
        answer = self.request({"fork": function}, [events, stdin, output])
        if answer is None:
            self._reader.join(timeout=5)
            tail = "".join(self._output_tail[-30:])
            raise ServerEnded(
                f"the process that starts stages ended with {describe_exit(self._process.returncode)}\n{tail}".strip()
            )
        if isinstance(answer, str):
            raise StageFailed(f"no process could be started: {answer}")
        return ForkedProcess(answer, self)

    def request(self, request: JsonObject, descriptors: Sequence[int] = ()) -> Any:
        """Return the server's answer; None if the server has ended."""
        with self._lock:
            try:
                socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
                answer = self._channel.recv(MAX_BYTES)
            except OSError:
                answer = b""
        if not answer:
            # Afterwards, `is_alive` is false.
            self._process.terminate()
            self._process.wait()
            return None
        return json.loads(answer)["answer"]

    def stop(self) -> None:
        """End the server and its workers immediately."""
        self._process.terminate()

    def close(self) -> None:
        """End the server and its workers, and free its resources."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            # A worker in an uninterruptible system call delays its end.
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)
        assert self._process.stdout is not None
        self._process.stdout.close()
        with self._lock:
            self._channel.close()


class ForkedProcess:
    """A worker process.

    Attributes:
        pid: Its id.
        returncode: Its exit code, negative for a signal; None until it has ended.
    """

    def __init__(self, pid: int, server: ForkServer) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def kill(self) -> None:
        """End the process immediately."""
        if self.returncode is None:
            self._server.request({"kill": self.pid})

    def wait(self) -> int:
        """Wait until the process has ended; return its exit code."""
        while self.returncode is None:
            answer = self._server.request({"poll": self.pid})
            if answer is None:
                # It has ended with the server.
                self.returncode = -signal.SIGKILL
            elif answer == "running":
                time.sleep(0.01)
            else:
                self.returncode = answer
        return self.returncode


def keep_tail(stream: Iterable[str], lines: list[str]) -> None:
    """Keep the last lines of a process's output."""
    for line in stream:
        lines.append(line)
        del lines[:-200]


def describe_exit(code: int) -> str:
    """Describe how a process ended."""
    if code == -signal.SIGKILL:
        return "SIGKILL (killed from outside, or the machine ran out of memory)"
    if code == -signal.SIGBUS:
        return "SIGBUS (a disk was full, or a file was truncated while it was being read)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main() -> None:
    """Import the libraries, and answer requests until the parent ends."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    die_with_parent(int(sys.argv[2]))
    # Workers that end must become zombies until they are waited for, even if the parent inherited an ignored SIGCHLD.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        # The parent gets them as well, and ends this process when it ends the run. A handler, unlike SIG_IGN, ends with
        # exec: the programs that stages start do not ignore them.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    # CUDA does not work in a process that was forked after a library queried the GPU, as libraries do on import.
    if not machine.has_cuda_driver():
        for library in sys.argv[3:]:
            # A stage that needs the library reports why it cannot be imported.
            with contextlib.suppress(Exception, SystemExit):
                importlib.import_module(library)
    # The warning is about the threads of numeric libraries, which restart them after a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    # Existing objects are shared with the workers until something writes to them, and garbage collection writes.
    gc.collect()
    gc.freeze()
    # Otherwise, each worker would print it again.
    sys.stdout.flush()
    serve(channel)


def serve(channel: socket.socket) -> NoReturn:
    """Answer requests until the other end of the channel is closed, or this process is terminated."""
    running: set[int] = set()
    # Exit codes of workers that have been waited for.
    codes: dict[int, int] = {}
    own_pid = os.getpid()

    def end(*_: object) -> NoReturn:
        """End the workers first: only this process can wait for them."""
        for act in (lambda pid: os.kill(pid, signal.SIGKILL), lambda pid: os.waitpid(pid, 0)):
            for pid in running:
                # The process may have been waited for when this began.
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    act(pid)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MAX_BYTES, 3)
        if not message:
            end()
        request = json.loads(message)
        answer: object = None
        if "fork" in request:
            try:
                pid = os.fork()
            except OSError as error:
                answer = str(error)
            else:
                if pid == 0:
                    channel.close()
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    events, stdin, output = descriptors
                    worker_main.work(request["fork"], events, stdin, output, own_pid)
                running.add(pid)
                answer = pid
            for descriptor in descriptors:
                os.close(descriptor)
        elif "kill" in request:
            # The id cannot be reused before the process has been waited for.
            if request["kill"] in running:
                os.kill(request["kill"], signal.SIGKILL)
            answer = "killed"
        elif request["poll"] in running:
            ended_pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(ended_pid)
            codes[request["poll"]] = os.waitstatus_to_exitcode(status)
            answer = codes[request["poll"]] if ended_pid else "running"
        else:
            answer = codes[request["poll"]]
        channel.send(json.dumps({"answer": answer}).encode())


if __name__ == "__main__":
    main()
