"""A stage's own process: what is said of its failure."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import process
from tasks.store import StageFailed

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
