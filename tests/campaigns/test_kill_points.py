"""A few cases of the campaign, on the session's release."""

import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.campaigns.kill_points import Case, Trials, hub_of
from tests.conftest import CommandLine, Outcome


@pytest.mark.long
def test_after_a_killed_run_the_next_run_ends_like_an_uninterrupted_one(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    cases = (
        Case("untie", "group", False, 0.5, ("untie", "card"), 0.0),
        Case("publish", "run", False, 0.3, (), 0.0),
    )
    rng = random.Random(1)
    with hub_of(tmp_path / "hub") as hub, closing(Trials(hub, command_line, released, {}, tmp_path)) as trials:
        assert [fault for number, case in enumerate(cases) if (fault := trials.try_case(case, number, rng))] == []
