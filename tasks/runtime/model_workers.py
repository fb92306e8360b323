"""Worker processes that keep a model loaded and score lists of requests with it.

A scorer is loaded by a function "module:name", which takes settings, JSON values, and returns a function from a list of
requests to the list of their responses, JSON values too. All parts of one evaluation in this process share its model
workers: one for each part that is computed at a time. On the machine of the run they end with the evaluation. A
cluster's worker is not told of its end: there, they end when they have had no requests for a while, or when another
evaluation begins.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator

from quantize_gemma.tasks.runtime import parent_process, worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.stage import import_function
from quantize_gemma.tasks.runtime.strict_json import JsonObject, JsonValue

# A cluster's model workers end when they had no requests for so long.
SECONDS_IDLE = 30.0
# What takes longer over one list of requests hangs.
SECONDS_ALLOWED = 24 * 3600.0

logger = logging.getLogger(__name__)
# The pools of this process by evaluation: a cluster sends its tasks to the process, and they find their pool here.
_pools: dict[str, "Pool"] = {}
_pools_lock = threading.Lock()


class Pool:
    """The model workers of one evaluation."""

    def __init__(
        self,
        environment: dict[str, str] | None = None,
        progress: Callable[[int, float], None] = lambda _part, _done: None,
        seconds_idle: float | None = None,
    ) -> None:
        """Start no worker yet.

        Args:
            environment: Environment variables of the workers.
            progress: Called with a part's number and the fraction of it that is done.
            seconds_idle: The workers end when they had no requests for so long.
        """
        self.environment = environment
        self.progress = progress
        self.seconds_idle = seconds_idle
        self.workers: list[worker.Worker] = []
        self.idle: list[worker.Worker] = []
        self.timer: threading.Timer | None = None
        self.closed = False
        self.lock = threading.Lock()

    def respond(
        self, scorer: str, settings: JsonObject, requests: list[JsonValue], part: int
    ) -> tuple[list[JsonValue], int, int]:
        """Return the responses to the requests, the id of the process that gave them, and its peak memory in bytes."""

        def progress(done: int, total: int, _unit: str) -> None:
            self.progress(part, done / max(total, 1))

        with self._take_worker(scorer, settings) as model_worker:
            model_worker.send(requests)
            event = model_worker.receive(progress, logger, SECONDS_ALLOWED)
        responses: list[JsonValue] = event["value"]
        if len(responses) != len(requests):
            raise StageFailed(f"{scorer} gave {len(responses)} answers to {len(requests)} requests")
        return responses, model_worker.process.pid, event["peak_rss_bytes"]

    @contextlib.contextmanager
    def _take_worker(self, scorer: str, settings: JsonObject) -> Iterator[worker.Worker]:
        """Take an idle worker, or start one; it is idle again afterwards, and ends if the block fails."""
        with self.lock:
            if self.closed:
                raise StageFailed("stopped")
            if self.timer:
                self.timer.cancel()
            if self.idle:
                model_worker = self.idle.pop()
            else:
                arguments = {"scorer": scorer, "settings": settings, "number": len(self.workers)}
                serve = "quantize_gemma.tasks.runtime.model_workers:serve"
                model_worker = worker.Worker(serve, arguments, self.environment)
                self.workers.append(model_worker)
        try:
            yield model_worker
        except BaseException:
            self._end(model_worker)
            raise
        with self.lock:
            is_open = not self.closed
            if is_open:
                self.idle.append(model_worker)
            if is_open and self.seconds_idle is not None:
                if self.timer:
                    self.timer.cancel()
                self.timer = threading.Timer(self.seconds_idle, self.close_idle)
                self.timer.daemon = True
                self.timer.start()
        if not is_open:
            self._end(model_worker)

    def close_idle(self) -> None:
        """End the workers that are idle."""
        with self.lock:
            idle, self.idle = self.idle, []
        for model_worker in idle:
            self._end(model_worker)

    def close(self) -> None:
        """End all workers. A caller that waits for one gets StageFailed("stopped")."""
        with self.lock:
            self.closed = True
            for model_worker in self.workers:
                model_worker.kill()
        self.close_idle()

    def _end(self, model_worker: worker.Worker) -> None:
        model_worker.close()
        with self.lock:
            self.workers.remove(model_worker)


@contextlib.contextmanager
def use_pool(evaluation: str, pool: Pool) -> Iterator[None]:
    """Make this the evaluation's pool in this process during the block, and end its workers after it."""
    _pools[evaluation] = pool
    try:
        yield
    finally:
        pool.close()
        _pools.pop(evaluation, None)


def pool_of(evaluation: str) -> Pool:
    """Return the evaluation's pool in this process; on a cluster's worker it is made here."""
    with _pools_lock:
        if evaluation not in _pools:
            for other in list(_pools):
                _pools.pop(other).close_idle()
            _pools[evaluation] = Pool(seconds_idle=SECONDS_IDLE)
        return _pools[evaluation]


def serve(scorer: str, settings: JsonObject, number: int) -> None:
    """Load the scorer, in a worker process, and respond to each line of requests. The workers share out the GPUs."""
    if settings.get("device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"{socket.gethostname()} has no CUDA device: use device cpu, or give its workers GPUs")
        settings = {**settings, "device": f"cuda:{number % torch.cuda.device_count()}"}
    score = import_function(scorer)(**settings)
    while True:
        parent_process.send_result(score(parent_process.receive()))
