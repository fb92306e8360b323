"""Which failures are worth a retry, and how long the server asks clients to wait."""

import re
import time
from collections.abc import Mapping
from http import HTTPStatus

from quantize_gemma.tasks.runtime.errors import StageFailed, UserError

# If a server asks clients to wait for longer, the run fails.
MAX_SECONDS_TO_WAIT = 900.0


def is_retryable(error: BaseException | None) -> tuple[bool, float]:
    """Tell whether the same work may succeed later, and the minimum number of seconds to wait.

    Interrupted and refused connections, timeouts, and 408, 429, and 5xx responses are retryable, anywhere in the chain
    of causes, because the Hub's client wraps them. A user's mistake is not, and neither is a response that asks clients
    to wait for longer than MAX_SECONDS_TO_WAIT.
    """
    import httpx

    while error is not None:
        if isinstance(error, UserError):
            return False, 0.0
        if isinstance(error, StageFailed):
            return error.transient, error.retry_after
        response = getattr(error, "response", None)
        if response is not None:
            status, seconds = response.status_code, requested_wait(response.headers)
            # 507 means that a quota is used up.
            is_temporary = status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or (
                status >= 500 and status != HTTPStatus.INSUFFICIENT_STORAGE
            )
            return (True, seconds) if is_temporary and seconds <= MAX_SECONDS_TO_WAIT else (False, 0.0)
        if isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError)):
            return True, 0.0
        # An exception raised `from None` is not caused by the one that was being handled.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False, 0.0


def requested_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds after which a server allows the next request: the Hub's rate limit, or else Retry-After.

    The value is 0 if the headers contain no valid time, and may be infinite.
    """
    from email.utils import parsedate_to_datetime

    limit = re.search(r"\br=0\b.*\bt=([0-9]+)", headers.get("RateLimit", ""))
    if limit:
        return float(limit.group(1)) + 1
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]+", after):
        return float(after)
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
