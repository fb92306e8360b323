"""An interrupt ends a run's workers immediately."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import psutil
import pytest

from quantize_gemma.tasks.runtime.lifetime import Workers, run_workers, stop_on_interrupt

ROOT = Path(__file__).parents[3]
# Start a worker that never finishes, and print which exception ended the block around it.
RUN = """
import json, signal, sys
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.lifetime import run_workers, stop_on_interrupt
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
worker.LIBRARIES = ()
try:
    with stop_on_interrupt():
        workers = run_workers()
        process = worker.Worker("signal:pause", {})
        print(process.process.pid, flush=True)
        signal.pause()
except BaseException as error:
    print(json.dumps([type(error).__name__, process.process.wait(), workers.stopping.is_set()]))
"""


@pytest.mark.parametrize(
    ("sent", "raised"),
    [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit"), (signal.SIGHUP, "SystemExit")],
)
def test_an_interrupt_kills_the_workers(sent: signal.Signals, raised: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = psutil.Process(int(run.stdout.readline()))
        run.send_signal(sent)
        assert json.loads(run.stdout.readline()) == [raised, -signal.SIGKILL, True]
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert alive == []


def test_a_failure_does_not_stop_other_runs() -> None:
    with stop_on_interrupt():
        workers = run_workers()
        with pytest.raises(ValueError, match="a stage failed"), stop_on_interrupt():
            raise ValueError("a stage failed")
        assert not workers.stopping.is_set()


def test_an_interrupt_stops_the_threads_of_its_run_and_no_others() -> None:
    def interrupted() -> None:
        with stop_on_interrupt(), ThreadPoolExecutor() as pool:
            # Prefect starts a task in the same way.
            interrupted_workers.append(pool.submit(copy_context().run, run_workers).result())
            raise KeyboardInterrupt

    interrupted_workers: list[Workers] = []
    with stop_on_interrupt():
        other = run_workers()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert interrupted_workers[0].stopping.is_set()
        assert not other.stopping.is_set()
