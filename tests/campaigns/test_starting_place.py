"""A few cases of the campaign, on the session's release."""

import random

from tests.campaigns.starting_place import starts
from tests.conftest import CommandLine, Outcome


def test_a_command_trusts_nothing_in_its_working_directory(released: Outcome, command_line: CommandLine) -> None:
    assert [failure for failure in starts(command_line, 4, random.Random(1)) if failure] == []
