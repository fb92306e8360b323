"""Set up a Prefect server for this project: `python -m quantize_gemma.deployments.deploy`.

It is safe to run again. It creates or updates the work pool, the global concurrency limits, the deployments of
prefect.yaml, and, from environment variables, the secrets and the alerts:

    HF_TOKEN, HF_TOKEN_WRITE   saved as the Secret blocks hf-token and hf-token-write
    QUANTIZE_GEMMA_TARGET      Hub repository against which the nightly run opens pull requests [default: none]
    QUANTIZE_GEMMA_TIMEZONE    IANA name of the schedules' time zone [default: UTC]
    QUANTIZE_GEMMA_ALERTS      URL of a webhook for runs that fail, crash, hang, or do not start; see alerts.py
"""

import os
import subprocess
import sys
from pathlib import Path

from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import SecretStr

from quantize_gemma.deployments.alerts import save_alerts
from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.prefect_slots import ACCELERATOR, MEMORY

POOL = "quantize-gemma"
SECRETS = {"HF_TOKEN": "hf-token", "HF_TOKEN_WRITE": "hf-token-write"}
DEFAULTS = {"QUANTIZE_GEMMA_TARGET": "", "QUANTIZE_GEMMA_TIMEZONE": "UTC"}


def deploy() -> None:
    """Create what is missing on the server, and update what exists."""
    if not PREFECT_API_URL.value():
        sys.exit("deploy: set PREFECT_API_URL to the Prefect server, or start one and a worker with `make serve`")
    for variable, block in SECRETS.items():
        if os.environ.get(variable):
            Secret(value=SecretStr(os.environ[variable])).save(block, overwrite=True)
            print(f"secret {block}: saved")
    with get_client(sync_client=True) as client:
        create_pool(client)
        create_limit(client, ACCELERATOR, 1)
        create_limit(client, MEMORY, memory_gib())
        save_alerts(client, os.environ.get("QUANTIZE_GEMMA_ALERTS"))
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml"],
        cwd=Path(__file__).parent,
        env={**DEFAULTS, **os.environ},
        check=True,
    )


def create_pool(client: SyncPrefectClient) -> None:
    """Create the work pool, of type process, unless it exists: it may have been created for Docker or Kubernetes."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        print(f"work pool {POOL}: created")


def create_limit(client: SyncPrefectClient, name: str, slots: int) -> None:
    """Create a global concurrency limit unless it exists: the operator may have changed its slots."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        print(f"limit {name}: {slots}")


def memory_gib() -> int:
    """Return the memory of this machine or container in GiB; the workers are assumed to have the same."""
    return max(1, machine.total_memory() // 2**30)


if __name__ == "__main__":
    deploy()
