"""A Prefect API for one run: the configured one, or a local server that ends with the run.

    python -P -m quantize_gemma.flows.local_server FD PARENT

serves Prefect's API and UI on the listening socket FD until its standard input or the process PARENT ends. A local
server requires this user's password and rejects cross-origin requests, because anyone with access can read tokens and
run flows.
"""

import atexit
import contextlib
import fcntl
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote, urlsplit

from quantize_gemma.tasks.runtime.disk import disk_failure
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.lifetime import die_with_parent

if TYPE_CHECKING:
    from fastapi import FastAPI

SECONDS_TO_START = 120.0
SECONDS_TO_STOP = 10.0
# Timeout for a configured server.
SECONDS_TO_ANSWER = 15.0
# This server exists for one run only: it must not start deployments that are in the same database.
NO_SCHEDULES = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
}
# Prefect's UI keeps the password in this item of the browser's local storage, base64-encoded. The part of a URL after #
# stays in the browser: it is not in any request or log.
SIGN_IN = """<!doctype html>
<title>Signing in</title>
<script>
localStorage.setItem("prefect-password", btoa(decodeURIComponent(location.hash.slice(1))));
location.replace("/");
</script>
"""


class LocalServer:
    """A Prefect server that listens on a socket of this machine and ends with this process."""

    def __init__(self, listener: socket.socket, log: IO[str] | None = None, **settings: str) -> None:
        """Start the server with these environment variables; its output goes to `log`, or to stderr.

        It takes over the socket. This process keeps the socket open, too: if the server dies, no other program can
        bind the port and receive its requests. Raises UserError if Prefect's home is not writable.
        """
        host, port = listener.getsockname()[:2]
        self.listener = listener
        self.log = log
        self.ui = f"http://{host}:{port}"
        self.url = f"{self.ui}/api"
        self.password = password()
        self.ready = False
        self.stopped = False
        self.process = subprocess.Popen(
            # -P, and a trusted directory: neither modules nor settings may come from the directory where the run
            # was started.
            [sys.executable, "-P", "-m", "quantize_gemma.flows.local_server", str(listener.fileno()), str(os.getpid())],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            env={
                **os.environ,
                "PREFECT_SERVER_UI_API_URL": self.url,
                "PREFECT_SERVER_API_AUTH_STRING": self.password,
                "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"{self.ui},http://localhost:{port}",
                **settings,
            },
            # In its own session, so that Ctrl-C does not reach it: the run still has to report its end to the server.
            start_new_session=True,
        )
        threading.Thread(target=self._refuse_connections_after_end, daemon=True).start()

    def client_settings(self) -> dict[str, str]:
        """Return the environment variables that make a process a client of this server."""
        return {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.password}

    def sign_in(self, stream: IO[str]) -> str:
        """Return where to sign in: for a terminal, a link with the password; for a log, only the password's file."""
        if stream.isatty():
            return f"{self.ui}/sign-in#{quote(self.password, safe=':')}"
        return f"{self.ui} (its password is in {password_file()})"

    def wait(self) -> None:
        """Wait until the API answers. Raises UserError if the server ends instead, or does not answer in time."""
        import httpx

        deadline = time.monotonic() + SECONDS_TO_START
        while self.process.poll() is None:
            try:
                # Only the server can answer here: the socket is ours.
                if httpx.get(f"{self.url}/health", timeout=1, trust_env=False).status_code == 200:
                    self.ready = True
                    return
            except httpx.TransportError:
                time.sleep(0.1)
            if time.monotonic() > deadline:
                raise UserError(f"the local Prefect server did not answer within {SECONDS_TO_START:.0f} s")
        failure = disk_failure(OSError(self.read_output()), prefect_home())
        if failure is not None:
            raise UserError(str(failure))
        raise UserError(
            f"{self.describe_end()}: check that Prefect's home {prefect_home()} is writable and was not written by a "
            "newer version of Prefect, or set PREFECT_HOME to another directory"
        )

    def read_output(self) -> str:
        """Return the log of a server that has ended."""
        if self.log is None:
            return ""
        self.log.seek(0)
        return self.log.read().strip()

    def describe_end(self) -> str:
        """Return how a server ended: its exit code or signal and, in parentheses, the last line that it printed."""
        from quantize_gemma.tasks.runtime.fork_server import describe_exit

        output = self.read_output()
        last = f" ({output.splitlines()[-1]})" if output else ""
        return f"the local Prefect server ended with {describe_exit(self.process.returncode)}{last}"

    def stop(self) -> None:
        """Stop the server after it has stored all received events."""
        assert self.process.stdin is not None
        self.stopped = True
        self.process.stdin.close()
        try:
            self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # End the accept() below, which would keep the port in use.
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _refuse_connections_after_end(self) -> None:
        """Close connections to a server that has ended; otherwise, clients would wait for a response."""
        self.process.wait()
        if not self.stopped:
            from prefect.context import refresh_global_settings_context

            # The server is not restarted, so pending requests retry once instead of for minutes.
            os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "1"
            refresh_global_settings_context()
        with contextlib.suppress(OSError):
            # The server, which shares the socket, has made it non-blocking.
            self.listener.setblocking(True)
            while True:
                self.listener.accept()[0].close()


def start_local_server() -> LocalServer | None:
    """Start a Prefect server on a free port of this machine, and make it this process's API.

    Returns None, and starts nothing, if an API is configured in the environment or in Prefect's profile. The server
    stops when this process exits or is killed, because the pipe to the server then closes. Raises UserError if the
    configured API does not answer, or if Prefect's home is not writable.
    """
    _check_address()
    with warnings.catch_warnings():
        # password() raises a UserError about this.
        warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
        from prefect.context import refresh_global_settings_context
        from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        check_api()
        return None
    # Stays open until this process exits.
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    server = LocalServer(socket.create_server(("127.0.0.1", 0)), log, **NO_SCHEDULES)
    os.environ.update(server.client_settings())
    os.environ["QUANTIZE_GEMMA_LOCAL_SERVER"] = "1"
    atexit.register(_stop, server)
    refresh_global_settings_context()
    return server


def check_api() -> None:
    """Raise UserError if a Prefect API is configured, but does not answer or rejects this user."""
    _check_address()
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return
    remedy = (
        "start that server, or unset PREFECT_API_URL (or change the Prefect profile that sets it) to use a local one"
    )
    try:
        with get_client(httpx_settings={"timeout": SECONDS_TO_ANSWER}, sync_client=True) as client:
            if not isinstance(client.api_version(), str):
                raise ValueError("the response is not from a Prefect server")
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            remedy = "set PREFECT_API_AUTH_STRING to its password"
        raise UserError(f"the Prefect server at {url} returned HTTP {error.response.status_code}: {remedy}") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the Prefect server at {url} cannot be reached ({error}): {remedy}") from None


def _check_address() -> None:
    """Raise UserError if PREFECT_API_URL is not a URL; Prefect's own error has many lines."""
    url = os.environ.get("PREFECT_API_URL", "")
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        raise UserError(f"PREFECT_API_URL {url} is not a valid URL ({error}): fix it, or unset it") from None


def prefect_home() -> Path:
    """Return the directory of Prefect's files: $PREFECT_HOME, or ~/.prefect."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser().absolute()


def password_file() -> Path:
    """Return the file with this user's password for local servers, as user:password."""
    return prefect_home() / "quantize-gemma-password"


def password() -> str:
    """Return this user's password for local servers, as user:password; create it on the first call.

    Only the user may read its file; a file that others can read is replaced. Raises UserError if it is not writable.
    """
    path = password_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_mode & 0o077:
            path.unlink()
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8") as stream:
            # If two runs start at the same time, one writes the password and both read it.
            fcntl.flock(stream, fcntl.LOCK_EX)
            value = stream.read().strip()
            if not value:
                value = f"quantize-gemma:{secrets.token_urlsafe(32)}"
                stream.write(value)
            return value
    except OSError as error:
        raise UserError(
            f"Prefect's home {path.parent} is not writable ({error.strerror}): set PREFECT_HOME to another directory"
        ) from None


def _stop(server: LocalServer) -> None:
    has_died = server.ready and server.process.poll() is not None
    server.stop()
    if has_died:
        print(f"quantize-gemma: {server.describe_end()}", file=sys.stderr)


def _make_app(host: str) -> "FastAPI":
    """Return Prefect's API and UI for requests to this machine, with a page that signs a browser in."""
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    app = create_app(final=True)
    headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
    # Insert it before Prefect's own routes, the last of which matches everything.
    app.router.routes.insert(0, Route("/sign-in", lambda _: HTMLResponse(SIGN_IN, headers=headers)))
    # Prevent DNS rebinding: to a browser, a page whose host name resolves to this machine has the same origin.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "127.0.0.1", "localhost"])
    return app


def _serve(descriptor: int) -> None:
    import uvicorn

    listener = socket.socket(fileno=descriptor)
    app = _make_app(listener.getsockname()[0])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=3))

    def end_with_input() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_input, daemon=True).start()
    server.run(sockets=[listener])
    os._exit(0)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    _serve(int(sys.argv[1]))
