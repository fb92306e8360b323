"""Tokens and timeouts for the Hugging Face Hub."""

import contextlib
import functools
import os
import re
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.redact import keep_secret
from quantize_gemma.tasks.runtime.retries import MAX_SECONDS_TO_WAIT, requested_wait

if TYPE_CHECKING:
    import httpx

# Prefect blocks and environment variables that may contain a token, in order of precedence.
READ_TOKENS = (("hf-token", "HF_TOKEN"),)
WRITE_TOKENS = (("hf-token-write", "HF_TOKEN_WRITE"), *READ_TOKENS)
# The environment variable that tells a worker process which blocks its token may come from.
BLOCKS = "QUANTIZE_GEMMA_TOKEN_BLOCKS"
SECONDS_TO_CONNECT = 30.0


def find_token(write: bool = False) -> str | None:
    """Return the Hub token from a Prefect Secret block, the environment, or the login file; None if there is none.

    Args:
        write: Prefer the token for writing, which may differ from the one for reading.

    Raises:
        UserError: The token contains spaces or line breaks.
    """
    from huggingface_hub import get_token

    for block, variable in WRITE_TOKENS if write else READ_TOKENS:
        token = (_load_secret(block) or os.environ.get(variable) or "").strip()
        if token and not re.fullmatch(r"[!-~]+", token):
            raise UserError(
                f"the token in the block {block} or in {variable} contains spaces or line breaks: set it again"
            )
        if token:
            return token
    return get_token()


def read_environment() -> dict[str, str]:
    """Return the environment variables for a worker process that reads from the Hub: the token, if there is one."""
    token = find_token()
    return {**({"HF_TOKEN": token} if token else {}), BLOCKS: ",".join(_token_blocks())}


def token_setting(variable: str = "HF_TOKEN") -> str:
    """Return where to set the token, as part of a sentence: a block takes precedence over an environment variable."""
    blocks = _token_blocks()
    if not blocks:
        return variable
    noun, verb = ("block", "takes") if len(blocks) == 1 else ("blocks", "take")
    return f"Prefect's Secret {noun} {' and '.join(blocks)}, which {verb} precedence over {variable},"


def _token_blocks() -> list[str]:
    """Return the Secret blocks that contain tokens, which may be outdated."""
    if BLOCKS in os.environ:
        return [block for block in os.environ[BLOCKS].split(",") if block]
    # Prefect's API may be down, but the Hub's error must still be reported.
    with contextlib.suppress(Exception):
        return [block for block, _ in WRITE_TOKENS if _load_secret(block)]
    return []


def _load_secret(name: str) -> str | None:
    from prefect.blocks.system import Secret
    from prefect.settings import PREFECT_API_URL

    # Without an API, there are no blocks, and loading one would start a server.
    if not PREFECT_API_URL.value():
        return None
    try:
        block = Secret.load(name)
        assert isinstance(block, Secret)
        secret = str(block.get())
    except ValueError:
        return None
    keep_secret(secret.strip())
    return secret


@functools.cache
def configure_client() -> None:
    """Set a timeout for the Hub's client, once per process: without it, the client waits for data forever."""
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", 60))
    # Keep the library's own hooks: they reject requests in offline mode, and number all others.
    hooks = get_session().event_hooks
    set_client_factory(
        lambda: httpx.Client(
            event_hooks={**hooks, "response": [*hooks["response"], _refuse_to_wait]},
            follow_redirects=True,
            timeout=httpx.Timeout(seconds, connect=min(seconds, SECONDS_TO_CONNECT)),
        )
    )


def _refuse_to_wait(response: "httpx.Response") -> None:
    """Raise the Hub's error immediately, where its client would first sleep for as long as the server requests."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if response.is_error and requested_wait(response.headers) > MAX_SECONDS_TO_WAIT:
        response.read()
        hf_raise_for_status(response)
