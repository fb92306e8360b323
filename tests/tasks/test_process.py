"""A stage's own process: what is said of its failure."""

import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks import process
from tasks.store import StageFailed, UserError

ROOT = Path(__file__).parents[2]


def fail(known: bool) -> dict[str, Any]:
    """Prints what libraries print, and fails."""
    print("a library's noise", file=sys.stderr)
    raise StageFailed("the answer is empty") if known else ValueError("not thought of")


def failure(known: bool) -> str:
    with pytest.raises(StageFailed) as caught:
        process.run("tests.tasks.test_process:fail", {"known": known}, lambda *_: None, None, {"PYTHONPATH": str(ROOT)})
    return str(caught.value)


def test_a_failure_that_a_stage_explains_is_all_that_is_said() -> None:
    assert failure(known=True) == "the answer is empty"


def test_an_error_that_nobody_thought_of_comes_with_its_last_lines() -> None:
    said = failure(known=False)
    assert said.startswith("ValueError: not thought of\n")
    assert "a library's noise" in said
    assert f"{Path(__file__).name}" in said


def refusal(**headers: str) -> Exception:
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
def test_a_server_is_waited_for_as_long_as_it_asks_but_not_for_hours(
    headers: dict[str, str], expected: tuple[bool, float]
) -> None:
    assert process.is_transient(refusal(**headers)) == expected


def test_a_date_to_come_back_at_is_as_far_away_as_it_is() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    began = time.time()
    transient, seconds = process.is_transient(refusal(Retry_After=date))
    assert transient
    assert seconds <= 300 <= seconds + 1 + time.time() - began


def raised(error: Exception, cause: Exception, *, hidden: bool) -> Exception:
    """Returns the error as it is after it was raised while the cause was handled, `from None` if it is hidden."""
    try:
        try:
            raise cause
        except Exception:
            if hidden:
                raise error from None
            raise error  # noqa: B904 (the context is what is tested)
    except Exception as caught:
        return caught


def test_what_was_raised_from_none_does_not_pass_by_itself() -> None:
    assert process.is_transient(raised(ValueError("a"), ConnectionError(), hidden=False)) == (True, 0.0)
    assert process.is_transient(raised(ValueError("a"), ConnectionError(), hidden=True)) == (False, 0.0)


def test_a_users_mistake_does_not_pass_by_itself_whatever_it_follows_from() -> None:
    assert process.is_transient(raised(UserError("a"), ConnectionError(), hidden=False)) == (False, 0.0)
    assert process.is_transient(raised(ValueError("a"), UserError("b"), hidden=False)) == (False, 0.0)
