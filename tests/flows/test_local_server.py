"""A run's Prefect clients, and a server that is unavailable for a moment."""

import socket
import subprocess
import sys

# A client that is created while the server is down, and a server that starts a few seconds later.
SCRIPT = """
import http.server, sys, threading, time
from prefect.client.orchestration import get_client
from quantize_gemma.tasks.runtime.patches.private_api import retry_refused_connections

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *_):
        pass

def listen():
    time.sleep(4)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()

if sys.argv[2] == "patient":
    retry_refused_connections()
threading.Thread(target=listen, daemon=True).start()
with get_client(sync_client=True) as client:
    client._client.get("/health")
"""


def run(patience: str) -> "subprocess.CompletedProcess[str]":
    from os import environ

    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = str(reserved.getsockname()[1])
    environment = {**environ, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = [sys.executable, "-c", SCRIPT, port, patience]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_client_that_is_created_while_the_server_is_down_waits_for_it() -> None:
    done = run("patient")
    assert done.returncode == 0, done.stderr


def test_prefects_own_client_does_not_wait() -> None:
    """If this test fails, Prefect's client waits by itself, and retry_refused_connections can be removed."""
    done = run("stock")
    assert done.returncode == 1
    assert "ConnectError" in done.stderr
