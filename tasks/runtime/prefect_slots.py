"""Concurrency limits for runs that share a machine: heavy stages take slots of the Prefect server's limits.

`make deploy` creates the limits: one accelerator, and memory in GiB.
"""

import contextlib
import os
from collections.abc import Iterator

from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.lifetime import run_workers

ACCELERATOR = "quantize-gemma-accelerator"
MEMORY = "quantize-gemma-memory"
SECONDS_BETWEEN_REQUESTS = 10.0
# A stage should survive a server that is down for a few minutes: the lease is longer than that.
SECONDS_OF_LEASE = 1800.0


def check_limits() -> None:
    """Raise UserError if the server has no limits: the first stage that takes slots may start hours later."""
    if "QUANTIZE_GEMMA_LOCAL_SERVER" not in os.environ:
        for limit in (ACCELERATOR, MEMORY):
            _count_slots(limit)


@contextlib.contextmanager
def take_slots(limit: str, count: int) -> Iterator[None]:
    """Wait for slots of a concurrency limit, and hold them during the block.

    On a server that the command line started for one run, there is nothing to wait for, and a run that is killed would
    not release its slots.

    Args:
        limit: The limit's name.
        count: The number of slots; all of them if the limit has fewer.

    Raises:
        UserError: The server has no such limit.
        StageFailed: The run was interrupted while it waited.
    """
    from prefect.concurrency.sync import concurrency

    if not count or "QUANTIZE_GEMMA_LOCAL_SERVER" in os.environ:
        yield
        return
    slots = _count_slots(limit)
    with contextlib.ExitStack() as stack:
        while True:
            request = concurrency(
                limit,
                occupy=max(1, min(count, slots)),
                timeout_seconds=SECONDS_BETWEEN_REQUESTS,
                strict=True,
                lease_duration=SECONDS_OF_LEASE,
                raise_on_lease_renewal_failure=False,
            )
            try:
                stack.enter_context(request)
                break
            except TimeoutError:
                if run_workers().stopping.is_set():
                    raise StageFailed(f"the run was stopped while it waited for {limit}") from None
        yield


def _count_slots(limit: str) -> int:
    """Return how many slots a limit has. Raises UserError if the server has no such limit."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(limit).limit
        except ObjectNotFound:
            raise UserError(f"the Prefect server has no limit {limit}: set it up with `make deploy`") from None
