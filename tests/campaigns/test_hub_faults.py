"""A few cases of the campaign, in a separate process, because the client reads the Hub's URL on import."""

import subprocess
import sys

import pytest


@pytest.mark.long
def test_no_fault_of_the_hub_lets_a_wrong_file_or_a_partial_release_through() -> None:
    command = [sys.executable, "-m", "tests.campaigns.hub_faults", "--cases", "16", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "hub_faults: 16 cases, 0 failures, seed 3\n", done.stderr[-3000:]
