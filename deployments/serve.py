"""A first look on one machine: `python -m deployments.serve` runs a server, deploys to it, and works for it.

Ends with Ctrl-C. The server is at http://127.0.0.1:4200, or where PREFECT_API_URL says, if that is this machine.
"""

import os
import signal
import subprocess
import sys
import time

import httpx

DEFAULTS = {
    "PREFECT_API_URL": "http://127.0.0.1:4200/api",
    # Leases of concurrency slots outlive a restart of the server.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
SECONDS_TO_START = 120


def main() -> int:
    """Returns the exit code of what ended first."""
    environment = {**DEFAULTS, **os.environ}
    url = environment["PREFECT_API_URL"]
    address = httpx.URL(url)
    prefect = [sys.executable, "-m", "prefect"]
    # A termination signal, too, ends what is started here.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell that starts this in the background has interrupts ignored, here and in what is started here; but the
    # worker passes its end on as one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server = subprocess.Popen(
        [
            *prefect,
            "server",
            "start",
            "--host",
            str(address.host),
            "--port",
            str(address.port),
            "--log-level",
            "WARNING",
        ],
        env=environment,
    )
    worker = None
    try:
        wait_for(url)
        subprocess.run([sys.executable, "-m", "deployments.deploy"], check=True, env=environment)
        worker = subprocess.Popen([*prefect, "worker", "start", "--pool", "quantize-gemma"], env=environment)
        print(f"\nThe dashboard: {url.removesuffix('/api')}\nTry: prefect deployment run quantize-gemma/tiny --watch\n")
        return worker.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        for process in (worker, server):
            if process is not None:
                process.terminate()
                process.wait()


def wait_for(api: str) -> None:
    """Returns when the API answers. Raises TimeoutError if it does not."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{api}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the Prefect server at {api} did not answer within {SECONDS_TO_START} s")


if __name__ == "__main__":
    sys.exit(main())
