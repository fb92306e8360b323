"""A Prefect API for one run: the one that is configured, or a local server that ends with the run, however that ends.

    python -m flows.server FD

serves Prefect's API and UI on the listening socket FD until its standard input ends.
"""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import threading
from typing import IO

SECONDS_TO_STOP = 10.0
# This server lives for one run: deployments that are in the same database are another server's to start.
NO_SCHEDULES = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
}


def start_local_server() -> str | None:
    """Starts a Prefect server on a free port of this machine and makes it this process's API; returns its URL.

    Returns None, and starts nothing, if an API is configured in the environment or in Prefect's profile. The server
    stops at this process's exit, and by itself when this process is killed: the pipe to it then ends.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        os.environ["PREFECT_API_URL"] = url
        os.environ["QUANTIZE_GEMMA_LOCAL_SERVER"] = "1"
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process lives)
        # A session of its own: Ctrl-C ends the run, which still has to tell the server so.
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PREFECT_UI_API_URL": url, **NO_SCHEDULES},
            start_new_session=True,
        )
    # The socket listens already: whoever connects waits until the server is up, or is refused if it died.
    atexit.register(_stop, server, log)
    refresh_global_settings_context()
    return url


def outlive_server_restarts() -> None:
    """Makes every Prefect client of this process try a refused connection again, PREFECT_CLIENT_MAX_RETRIES times.

    Prefect's client does so only once it has reached the server, so that a wrong address fails at once. A running flow
    has reached its server; but limits, blocks and artifacts each make a client anew, and would end the run if they
    did so in the seconds of a restart.
    """
    from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient

    for client in (PrefectHttpxAsyncClient, PrefectHttpxSyncClient):
        client._has_connected = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]


def _stop(server: "subprocess.Popen[bytes]", log: IO[str]) -> None:
    died = server.poll()
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if died is not None:
        log.seek(0)
        print(f"quantize-gemma: the local Prefect server ended with {died}:\n{log.read()[-2000:]}", file=sys.stderr)
    log.close()


def _serve(descriptor: int) -> None:
    import uvicorn
    from prefect.server.api.server import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(final=True), log_level="error", timeout_graceful_shutdown=3))

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=descriptor)])
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
