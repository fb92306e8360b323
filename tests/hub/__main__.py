"""Serve a local Hub by hand: `python -m tests.hub --root DIR --port N` keeps its repositories in DIR."""

import argparse
import threading
from contextlib import suppress
from pathlib import Path

from tests.hub.access import Tokens
from tests.hub.server import serve

USER = "local"


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the directory that holds the repositories")
    parser.add_argument("--port", type=int, default=8765, help="on 127.0.0.1 (default: %(default)s)")
    parser.add_argument("--token", default="hf_local", help=f"may write to {USER}/... (default: %(default)s)")
    options = parser.parse_args()
    tokens: Tokens = {options.token: {"user": USER, "role": "write"}}
    with serve(options.root, tokens, options.port) as hub, suppress(KeyboardInterrupt):
        print(f"A local Hub at {hub.url}, with repositories in {options.root}. Set these variables for its clients:\n")
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={options.token} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
