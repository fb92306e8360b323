"""Sets a Prefect server up for this project, again and again with the same result:
`python -m quantize_gemma.deployments.deploy`.

Makes the work pool, the global concurrency limits, the deployments of prefect.yaml, and, from what the environment
says, the secrets and the alerts:

    HF_TOKEN, HF_TOKEN_WRITE   become the Secret blocks hf-token and hf-token-write
    QUANTIZE_GEMMA_TARGET      the Hub repository that the nightly proposes its release to; without it, to none
    QUANTIZE_GEMMA_TIMEZONE    the schedules' time zone, by its IANA name (UTC)
    QUANTIZE_GEMMA_ALERTS      a web hook that hears of runs that failed, crashed, hang, or did not start; see alerts.py
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

from quantize_gemma.deployments.alerts import save_alerts
from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.prefect_stage import ACCELERATOR, MEMORY

POOL = "quantize-gemma"
SECRETS = {"HF_TOKEN": "hf-token", "HF_TOKEN_WRITE": "hf-token-write"}
DEFAULTS = {"QUANTIZE_GEMMA_TARGET": "", "QUANTIZE_GEMMA_TIMEZONE": "UTC"}


def deploy() -> None:
    """Makes what is missing and updates what is there."""
    if not PREFECT_API_URL.value():
        sys.exit("deploy: set PREFECT_API_URL to the Prefect server, or start one and a worker with `make serve`")
    for variable, block in SECRETS.items():
        if os.environ.get(variable):
            Secret(value=os.environ[variable]).save(block, overwrite=True)
            print(f"secret {block}: saved")
    with get_client(sync_client=True) as client:
        make_pool(client)
        make_limit(client, ACCELERATOR, 1)
        make_limit(client, MEMORY, memory_gib())
        save_alerts(client, os.environ.get("QUANTIZE_GEMMA_ALERTS"))
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml"],
        cwd=Path(__file__).parent,
        env={**DEFAULTS, **os.environ},
        check=True,
    )


def make_pool(client: SyncPrefectClient) -> None:
    """Makes the work pool, of processes, unless there is one: it may have been made for Docker or Kubernetes."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        print(f"work pool {POOL}: made")


def make_limit(client: SyncPrefectClient, name: str, slots: int) -> None:
    """Makes a global concurrency limit unless there is one, whose number is then the operator's."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        print(f"limit {name}: {slots}")


def memory_gib() -> int:
    """Returns this machine's memory in GiB, or this container's, which the workers' is taken to be."""
    return max(1, machine.total_memory() // 2**30)


if __name__ == "__main__":
    deploy()
