"""The flow that keeps the store below a maximum size; deployed on a schedule."""

from typing import Annotated

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from quantize_gemma.tasks.runtime import pruning
from quantize_gemma.tasks.runtime.units import human_size


@flow(name="prune-store", persist_result=False)
def prune_store(
    max_gigabytes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 500.0,
    max_age_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0,
) -> dict[str, object]:
    """Remove unfinished results, then results beyond the age limit, then the least recently used ones.

    Args:
        max_gigabytes: Maximum size of the store in GB. [default: 500]
        max_age_days: Maximum number of days since a result was last used. [default: 60]

    Returns:
        How many directories were removed, and the bytes freed and left.
    """
    unfinished = pruning.remove_unfinished()
    evicted = pruning.evict(max_gigabytes * 1e9, max_age_days * 86_400)
    bytes_left, bytes_freed = pruning.store_size(), unfinished.bytes + evicted.bytes
    get_run_logger().info(
        "removed %d unfinished directories and %d artifacts: freed %s; the store now takes %s",
        len(unfinished.paths),
        len(evicted.paths),
        human_size(bytes_freed),
        human_size(bytes_left),
    )
    return {
        "unfinished": len(unfinished.paths),
        "evicted": len(evicted.paths),
        "bytes_freed": bytes_freed,
        "bytes_left": bytes_left,
    }
