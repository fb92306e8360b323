"""Servers and workers, started as a user would start them."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


def wait_for(url: str, seconds: float = 120) -> None:
    """Wait until the URL responds with 200."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, url
        time.sleep(0.2)


class AnotherProgram(ThreadingHTTPServer):
    """A server that answers every request with 200, and records the requests."""

    def __init__(self, page: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = page.encode()
        self.requests: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: AnotherProgram

    def do_GET(self) -> None:
        self.server.requests.append(self.requestline)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.page)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def another_program(page: str = "true") -> Iterator[AnotherProgram]:
    """Run another program's server on this machine, which answers every request with `page`."""
    with AnotherProgram(page) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()
