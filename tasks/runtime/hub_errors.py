"""Turn errors of the Hugging Face Hub into one sentence that says what to do."""

import contextlib
import json
import logging
import textwrap
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime import reporting
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError
from quantize_gemma.tasks.runtime.hub_client import configure_client, token_setting
from quantize_gemma.tasks.runtime.redact import redact
from quantize_gemma.tasks.runtime.retries import MAX_SECONDS_TO_WAIT, is_retryable, requested_wait

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

SECONDS_OF_A_YEAR = 365 * 86_400.0


@contextlib.contextmanager
def translate_hub_errors(kind: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client in the block into one sentence that says what to do.

    Args:
        kind: "model" or "dataset".
        repository: The repository's name.
        revision: The branch, tag, or commit.

    Raises:
        UserError: The Hub rejects the request.
        StageFailed: The Hub fails or cannot be reached; the exception says whether a retry may help.
    """
    configure_client()
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise _translate(error, kind, repository, revision) from None


def _translate(error: Exception, kind: str, repository: str, revision: str | None) -> RunError:
    """Return the failure to raise for an error of the Hub's client."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
            return UserError(
                f"{repository} is gated: accept its terms at {page}, and set {token_setting()} to your token"
            )
        case RevisionNotFoundError():
            return UserError(f"{repository} has no revision {revision!r}: use one of its branches, tags, or commits")
        case EntryNotFoundError():
            return UserError(f"a file is missing from {repository} ({_shorten(error)})")
        case RepositoryNotFoundError():
            return UserError(
                f"the Hub has no {kind} {repository!r}, or your token has no access to it: check the name, and "
                f"{token_setting().rstrip(',')}"
            )
        case HFValidationError():
            return UserError(f"{repository!r} is not a valid name of a Hub repository ({_shorten(error)})")
        case HfHubHTTPError():
            return _translate_status(error, repository)
        case OfflineModeIsEnabled():
            return UserError("HF_HUB_OFFLINE is set: unset it, or pass --offline to use what is in the store")
        case httpx.ConnectError():
            return StageFailed(f"the Hub cannot be reached at {constants.ENDPOINT} ({_shorten(error)})", True)
        case httpx.HTTPError():
            # Its text may contain a header or a signed URL.
            return StageFailed(f"{type(error).__name__}: {_shorten(error)}", *is_retryable(error))
        case json.JSONDecodeError() | UnicodeDecodeError():
            # The response is neither JSON nor text, so it was damaged on the way.
            return StageFailed(f"the Hub's response for {repository} cannot be read ({_shorten(error)})", True)
    return _report_unexpected(error)


def _translate_status(error: "HfHubHTTPError", repository: str) -> RunError:
    """Return the failure to raise for an HTTP status."""
    status = error.response.status_code
    message = _shorten(error.server_message or error)
    if status == 401:
        return UserError(f"the Hub rejects the token for {repository}: set {token_setting()} to a valid token")
    if status == 403:
        return UserError(
            f"the Hub denied access to {repository} ({message}): set {token_setting('HF_TOKEN and HF_TOKEN_WRITE')} "
            "to a token that has this permission"
        )
    if status in (402, 413, 507):
        return UserError(f"the quota for {repository} is used up ({message}): free some space there, or ask for more")
    if status in (400, 404, 422):
        return UserError(f"the Hub rejects the request for {repository}: {message}")
    advice = _when_to_retry(error.response.headers)
    return StageFailed(f"the Hub returned HTTP {status} for {repository}: {message}{advice}", *is_retryable(error))


def _when_to_retry(headers: Mapping[str, str]) -> str:
    """Return, as the end of a sentence, when the server allows the next request, if that is too far in the future."""
    seconds = requested_wait(headers)
    if seconds <= MAX_SECONDS_TO_WAIT:
        return ""
    if seconds > SECONDS_OF_A_YEAR:
        return "; it does not allow another request for more than a year"
    return f"; start the run again after {time.strftime('%Y-%m-%d %H:%M', time.gmtime(time.time() + seconds))} UTC"


def _shorten(message: object) -> str:
    """Return a message of the Hub or its client as part of one sentence."""
    return textwrap.shorten(redact(str(message)), 300, placeholder=" …")


def _report_unexpected(error: Exception) -> StageFailed:
    """Return the failure to raise for an error that is not the Hub's, and log its traceback."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    trace = redact("".join(traceback.format_exception(error)))
    try:
        get_run_logger().error(trace)
    except MissingContextError:
        # This may be a worker process, or outside of a run.
        logger.error(trace)
        reporting.log(trace)
    return StageFailed(f"{type(error).__name__}: {_shorten(error)}", *is_retryable(error))
