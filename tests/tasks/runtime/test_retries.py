"""Which errors are retried, and when."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.retries import is_retryable


def too_many_requests(**headers: str) -> Exception:
    response = httpx.Response(
        429, headers={name.replace("_", "-"): value.encode("latin-1") for name, value in headers.items()}
    )
    return httpx.HTTPStatusError("too many", request=httpx.Request("GET", "http://hub"), response=response)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (True, 0.0)),
        ({"Retry_After": "3"}, (True, 3.0)),
        ({"Retry_After": "900"}, (True, 900.0)),
        ({"Retry_After": "901"}, (False, 0.0)),
        ({"Retry_After": "99999999999"}, (False, 0.0)),
        ({"Retry_After": "9" * 5000}, (False, 0.0)),
        ({"Retry_After": "Fri, 31 Dec 2099 23:59:59 GMT"}, (False, 0.0)),
        ({"Retry_After": "Thu, 01 Jan 1970 00:00:00 GMT"}, (True, 0.0)),
        ({"Retry_After": "Mon, 01 Jan 0001 00:00:00 -0000"}, (True, 0.0)),
        ({"Retry_After": "-5"}, (True, 0.0)),
        ({"Retry_After": "soon"}, (True, 0.0)),
        ({"Retry_After": "²"}, (True, 0.0)),
        ({"RateLimit": '"api";r=0;t=41'}, (True, 42.0)),
        ({"RateLimit": '"api";r=7;t=41'}, (True, 0.0)),
        ({"RateLimit": '"api";r=0;t=99999999999'}, (False, 0.0)),
        ({"RateLimit": '"api";r=0;t=' + "9" * 5000}, (False, 0.0)),
    ],
)
def test_a_retry_waits_as_long_as_the_server_asks_but_not_for_hours(
    headers: dict[str, str], expected: tuple[bool, float]
) -> None:
    assert is_retryable(too_many_requests(**headers)) == expected


def test_a_retry_waits_until_the_date_that_the_server_names() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    started = time.time()
    retryable, seconds = is_retryable(too_many_requests(Retry_After=date))
    assert retryable
    assert seconds <= 300 <= seconds + 1 + time.time() - started


def raised(error: Exception, cause: Exception, *, hidden: bool) -> Exception:
    """Return the error after it was raised while the cause was being handled, with `from None` if `hidden`."""
    try:
        try:
            raise cause
        except Exception:
            if hidden:
                raise error from None
            raise error  # noqa: B904 (the context is what is tested)
    except Exception as caught:
        return caught


def test_an_error_raised_from_none_is_not_retried_because_of_the_error_being_handled() -> None:
    assert is_retryable(raised(ValueError("a"), ConnectionError(), hidden=False)) == (True, 0.0)
    assert is_retryable(raised(ValueError("a"), ConnectionError(), hidden=True)) == (False, 0.0)


def test_a_users_mistake_is_not_retried_whatever_caused_it() -> None:
    assert is_retryable(raised(UserError("a"), ConnectionError(), hidden=False)) == (False, 0.0)
    assert is_retryable(raised(ValueError("a"), UserError("b"), hidden=False)) == (False, 0.0)
