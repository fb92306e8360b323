"""A few cases of the campaign, on the session's release."""

import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.campaigns.kill_points import Accidents, Case, hub_of
from tests.conftest import CommandLine, Outcome


@pytest.mark.long
def test_a_killed_run_is_finished_by_the_next_as_if_nothing_had_happened(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    cases = (
        Case("untie", "group", False, 0.5, ("untie", "card"), 0.0),
        Case("publish", "run", False, 0.3, (), 0.0),
    )
    rng = random.Random(1)
    with hub_of(tmp_path / "hub") as hub, closing(Accidents(hub, command_line, released, {}, tmp_path)) as accidents:
        assert [fault for number, case in enumerate(cases) if (fault := accidents.happen(case, number, rng))] == []
