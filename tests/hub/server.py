"""A local Hub for tests: `with serve(root, tokens) as hub`, with hub.url as the clients' `HF_ENDPOINT` or `endpoint`.

It supports models and datasets, private and gated, with branches, tags, and pull requests; resolve with ranges; and LFS
with the basic transfer. It does not support Spaces or Xet, which clients must disable (`HF_HUB_DISABLE_XET=1`).
"""

import asyncio
import re
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.hub import api, faults, files
from tests.hub.access import Tokens
from tests.hub.faults import Faults, Gate
from tests.hub.storage import Entry, HubError, Storage, resolve


@dataclass
class Hub:
    """A running server, with direct access to its repositories, its faults, and its log."""

    url: str
    storage: Storage
    faults: Faults
    log: list[dict[str, Any]]

    def add(self, kind: str, repo_id: str, folder: Path, message: str = "Add files") -> str:
        """Commit a folder's files to main, and create the repository if needed; return the sha."""
        author = repo_id.split("/")[0]
        self.storage.create(kind, repo_id, author)
        paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        entries = {name: self.storage.add_file(path, name) for name, path in paths.items()}
        sha, _ = self.storage.commit(kind, repo_id, "main", entries, title=message, author=author)
        return sha

    def restrict(self, kind: str, repo_id: str, *, private: bool = False, gated: bool = False) -> None:
        """Make a repository private or gated, or neither."""
        with self.storage.lock:
            repo = self.storage.load(kind, repo_id)
            self.storage.save(kind, repo_id, repo | {"private": private, "gated": gated})

    def close_pull_request(self, kind: str, repo_id: str, number: int) -> None:
        """Close a pull request without merging it."""
        with self.storage.lock:
            repo = self.storage.load(kind, repo_id)
            self.storage.save(kind, repo_id, repo | {"closed": [*repo.get("closed", []), number]})

    def head(self, kind: str, repo_id: str, revision: str = "main") -> str:
        """Return the sha of a revision."""
        return resolve(self.storage.load(kind, repo_id), revision)

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, Entry]:
        """Return the files of a revision: path to {"size", "sha256", "blob_id", "lfs"}."""
        repo = self.storage.load(kind, repo_id)
        return dict(repo["commits"][resolve(repo, revision)]["files"])

    def read(self, kind: str, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return the content of a file."""
        return self.storage.object(self.files(kind, repo_id, revision)[path]["sha256"]).read_bytes()

    def requests(self, method: str, path: str) -> list[dict[str, Any]]:
        """Return the logged requests with this method whose path matches the pattern anywhere.

        Each is {"method", "path", "status", "sent", "received", "range"}. `sent` and `received` are the bytes of the
        bodies, `range` is the Range header or None, and `status` is None if the request was dropped without a response.
        """
        return [entry for entry in self.log if entry["method"] == method and re.search(path, entry["path"])]


def create_app(root: Path, tokens: Tokens) -> FastAPI:
    """Return the Hub as an ASGI app. Faults that cut a connection work only in `serve`."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.storage = Storage(root)
    app.state.tokens = tokens
    app.state.secret = secrets.token_bytes()
    app.state.faults = Faults()
    app.state.log = []
    app.add_middleware(Gate, faults=app.state.faults, log=app.state.log)
    app.add_exception_handler(HubError, faults.error_response)
    for module in (faults, files, api):
        app.include_router(module.router)
    return app


@contextmanager
def serve(root: Path, tokens: Tokens, port: int = 0) -> Iterator[Hub]:
    """Serve the repositories under `root` on 127.0.0.1 until the block ends, by default on a free port."""
    app = create_app(root, tokens)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        # Longer than a client keeps an idle connection, because it might write to one that was just closed.
        timeout_keep_alive=60,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="hub", daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield Hub(url, app.state.storage, app.state.faults, app.state.log)
        finally:
            server.should_exit = True
            thread.join()


class Connection(H11Protocol):
    """Uvicorn's connection, which the app can close in the middle of a response: `scope["drop"]()`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app: Callable[..., Awaitable[None]] = self.app

        async def with_drop(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "drop": transport.close}, receive, send)

        self.app = with_drop
