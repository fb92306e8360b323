"""Processes that keep a model loaded and answer with it as often as they are asked.

An answerer is a function "module:name" that takes settings, JSON values, and returns a function which answers a list of
requests with a list of answers, JSON values too. All that work on one evaluation in this process share its residents:
one for each that works at a time. On the machine of the run they end with the evaluation. A cluster's worker is told of
no end: there they end when nobody has asked them for a while, or another evaluation begins.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from quantize_gemma.tasks.runtime import parent_process, worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.stage import import_function

SECONDS_UNASKED = 30.0
# What takes longer over one list of requests hangs.
SECONDS_ALLOWED = 24 * 3600.0

logger = logging.getLogger(__name__)
_pools: dict[str, "Pool"] = {}
_one_at_a_time = threading.Lock()


class Pool:
    """The residents of one evaluation. `progress` is called with a part's number and how much of it is done."""

    def __init__(
        self,
        environment: dict[str, str] | None = None,
        progress: Callable[[int, float], None] = lambda _part, _done: None,
        seconds_unasked: float | None = None,
    ) -> None:
        self.environment = environment
        self.progress = progress
        self.seconds_unasked = seconds_unasked
        self.alive: list[worker.Worker] = []
        self.idle: list[worker.Worker] = []
        self.waiting: threading.Timer | None = None
        self.closed = False
        self.lock = threading.Lock()

    def answers(
        self, answerer: str, settings: dict[str, Any], requests: list[Any], part: int
    ) -> tuple[list[Any], int, int]:
        """Returns the answers, the process that gave them, and the most memory that it has taken, in bytes."""

        def progress(done: int, total: int, _what: str) -> None:
            self.progress(part, done / max(total, 1))

        with self._resident(answerer, settings) as resident:
            resident.send(requests)
            event = resident.receive(progress, logger, SECONDS_ALLOWED)
        answers: list[Any] = event["value"]
        if len(answers) != len(requests):
            raise StageFailed(f"{answerer} gave {len(answers)} answers to {len(requests)} requests")
        return answers, resident.process.pid, event["peak_rss_bytes"]

    @contextlib.contextmanager
    def _resident(self, answerer: str, settings: dict[str, Any]) -> Iterator[worker.Worker]:
        with self.lock:
            if self.closed:
                raise StageFailed("stopped")
            if self.waiting:
                self.waiting.cancel()
            if self.idle:
                resident = self.idle.pop()
            else:
                arguments = {"answerer": answerer, "settings": settings, "number": len(self.alive)}
                resident = worker.Worker(
                    "quantize_gemma.tasks.runtime.model_workers:serve", arguments, self.environment
                )
                self.alive.append(resident)
        try:
            yield resident
        except BaseException:
            self._end(resident)
            raise
        with self.lock:
            kept = not self.closed
            if kept:
                self.idle.append(resident)
            if kept and self.seconds_unasked is not None:
                if self.waiting:
                    self.waiting.cancel()
                self.waiting = threading.Timer(self.seconds_unasked, self.close_idle)
                self.waiting.daemon = True
                self.waiting.start()
        if not kept:
            self._end(resident)

    def close_idle(self) -> None:
        """Ends the residents that nobody uses."""
        with self.lock:
            idle, self.idle = self.idle, []
        for resident in idle:
            self._end(resident)

    def close(self) -> None:
        """Ends all residents; who waits for one is told that it was stopped."""
        with self.lock:
            self.closed = True
            for resident in self.alive:
                resident.kill()
        self.close_idle()

    def _end(self, resident: worker.Worker) -> None:
        resident.close()
        with self.lock:
            self.alive.remove(resident)


@contextlib.contextmanager
def pool(evaluation: str, residents: Pool) -> Iterator[None]:
    """Makes this the evaluation's pool in this process, and ends its residents in the end."""
    _pools[evaluation] = residents
    try:
        yield
    finally:
        residents.close()
        _pools.pop(evaluation, None)


def pool_of(evaluation: str) -> Pool:
    """Returns the evaluation's pool in this process; on a cluster's worker it is made here."""
    with _one_at_a_time:
        if evaluation not in _pools:
            for other in list(_pools):
                _pools.pop(other).close_idle()
            _pools[evaluation] = Pool(seconds_unasked=SECONDS_UNASKED)
        return _pools[evaluation]


def serve(answerer: str, settings: dict[str, Any], number: int) -> None:
    """Loads the answerer, in a process of its own, and answers each line of requests. Residents share out the GPUs."""
    if settings.get("device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"{socket.gethostname()} has no CUDA device: use device cpu, or give its workers GPUs")
        settings = {**settings, "device": f"cuda:{number % torch.cuda.device_count()}"}
    answer = import_function(answerer)(**settings)
    while True:
        parent_process.send_result(answer(parent_process.receive()))
