"""The flow that keeps the store in bounds, as a scheduled deployment."""

from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.units import human_size


@flow(name="prune-store", persist_result=False)
def prune_store(
    max_gigabytes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 500.0,
    max_age_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0,
) -> dict[str, Any]:
    """Remove what died half-way, what no run has used for long, and then the longest unused until the rest fits.

    Args:
        max_gigabytes: What the store may hold at most.
        max_age_days: For how long an artifact may stay unused.
    """
    died = store.prune()
    evicted = store.evict(max_gigabytes * 1e9, max_age_days * 86_400)
    left, freed = store.size_of(), died.bytes + evicted.bytes
    get_run_logger().info(
        "removed %d unfinished directories and %d artifacts, which freed %s; %s are left",
        len(died.paths),
        len(evicted.paths),
        human_size(freed),
        human_size(left),
    )
    return {
        "unfinished": len(died.paths),
        "evicted": len(evicted.paths),
        "bytes_freed": freed,
        "bytes_left": left,
    }
