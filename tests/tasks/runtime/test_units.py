"""Sizes have decimal units."""

import pytest

from quantize_gemma.tasks.runtime.units import human_size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (2_345_000_000, "2.35 GB"),
        (4e12, "4000.00 GB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_it_reaches(count: float, text: str) -> None:
    assert human_size(count) == text
