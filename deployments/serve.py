"""Start a Prefect server, its deployments, and a worker on this machine.

    python -P -m quantize_gemma.deployments.serve

Ctrl-C stops everything. The server is at http://127.0.0.1:4200, or at PREFECT_API_URL if that is this machine. While it
runs, the Prefect profile `quantize-gemma` has its URL and password.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from quantize_gemma.flows.local_server import LocalServer
from quantize_gemma.flows.settings import ignore_working_directory
from quantize_gemma.tasks.runtime.errors import UserError

API = "http://127.0.0.1:4200/api"
DEFAULTS = {
    # Leases of concurrency slots survive a restart of the server.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
PROFILE = "quantize-gemma"
# Prefect's default profile.
EMPTY_PROFILE = "ephemeral"


def main() -> int:
    """Serve until the server or the worker ends, and return its exit code."""
    # SIGTERM and closing the terminal also end everything that is started here.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    # A shell that starts this in the background ignores interrupts, in child processes as well; but the worker
    # stops its flow runs with one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ignore_working_directory()
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        server = LocalServer(listen(os.environ.get("PREFECT_API_URL") or API))
        try:
            server.wait()
            return work(server)
        finally:
            server.stop()
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def listen(url: str) -> socket.socket:
    """Return a socket that listens at the API's URL.

    It listens before anything is started, so that no client is ever connected to another program on that port.

    Raises:
        UserError: The URL is not valid, is not this machine's, or its port is in use.
    """
    from urllib.parse import urlsplit

    address = urlsplit(url)
    if address.scheme != "http" or not address.hostname or not url.endswith("/api"):
        raise UserError(f"PREFECT_API_URL {url} is not the URL of a server that can be started here, such as {API}")
    try:
        return socket.create_server((address.hostname, address.port or 80))
    except OSError as error:
        raise UserError(
            f"no server can be started at {url} ({error.strerror}): stop the program that uses this port, or set "
            "PREFECT_API_URL to another URL, such as http://127.0.0.1:4201/api"
        ) from None


def work(server: LocalServer) -> int:
    """Deploy to the server and run a worker; return the exit code of the one that ends first."""
    # Use no modules or settings from the working directory, here and in the flow runs that the worker starts.
    environment = {**os.environ, **server.client_settings(), "PYTHONSAFEPATH": "1"}
    folder = Path(__file__).parent
    deployment = subprocess.run(
        [sys.executable, "-m", "quantize_gemma.deployments.deploy"], cwd=folder, env=environment
    )
    if deployment.returncode:
        return deployment.returncode
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "quantize-gemma"]
    worker = subprocess.Popen(command, cwd=folder, env=environment)
    try:
        with profile(server) as prefect:
            print(f"\nDashboard: {server.sign_in(sys.stdout)}")
            print(f"Try: {prefect} deployment run quantize-gemma/tiny --watch\n", flush=True)
            while worker.poll() is None and server.process.poll() is None:
                time.sleep(0.5)
    finally:
        worker.terminate()
        worker.wait()
    if server.process.poll() is not None:
        # Print this after the worker's output, so that the reason is the last line.
        print(f"serve: {server.describe_end()}", file=sys.stderr)
        return 1
    return worker.returncode


@contextlib.contextmanager
def profile(server: LocalServer) -> Iterator[str]:
    """Save the server's URL and password as a Prefect profile; yield the `prefect` command that uses it.

    The profile is active while the server runs, unless the user's active profile has another server.
    """
    from prefect.settings import PREFECT_PROFILES_PATH, Profile, load_profiles, save_profiles

    profiles = load_profiles()
    user_profile = profiles.active_name if profiles.active_name in profiles.names - {PROFILE} else EMPTY_PROFILE
    user_settings = {setting.name: value for setting, value in profiles[user_profile].settings.items()}
    activate = user_settings.get("PREFECT_API_URL") in (None, server.url)
    settings = {**(user_settings if activate else {}), **server.client_settings()}
    profiles.profiles_by_name[PROFILE] = Profile.model_validate({"name": PROFILE, "settings": settings})
    if activate:
        profiles.set_active(PROFILE)
    path: Path = PREFECT_PROFILES_PATH.value()
    path.touch(mode=0o600)
    path.chmod(0o600)
    save_profiles(profiles)
    try:
        yield "prefect" if activate else f"prefect --profile {PROFILE}"
    finally:
        profiles = load_profiles()
        if profiles.active_name == PROFILE:
            profiles.set_active(user_profile)
            save_profiles(profiles)


if __name__ == "__main__":
    sys.exit(main())
