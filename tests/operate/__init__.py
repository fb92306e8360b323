"""Servers and workers as a person starts them."""

import time

import httpx


def wait_for(url: str, seconds: float = 120) -> None:
    """Returns when the address answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, url
        time.sleep(0.2)
