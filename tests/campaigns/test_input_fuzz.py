"""A few cases of the campaign."""

import random

from tests.campaigns.input_fuzz import run
from tests.conftest import Outcome
from tests.flows.test_run import metrics_of


def test_malformed_inputs_are_accepted_or_rejected_in_one_sentence(released: Outcome) -> None:
    outcomes = list(run(60, random.Random(0), metrics_of(released)))
    assert len(outcomes) >= 50
    assert [failure for failure in outcomes if failure] == []
