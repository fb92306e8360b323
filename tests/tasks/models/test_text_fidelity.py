"""What a table says of fidelity, and when a benchmark says something."""

import pytest

from quantize_gemma.tasks.models.text_fidelity import is_informative


@pytest.mark.parametrize(
    ("accuracy", "stderr", "informative"),
    [(0.270, 0.026, False), (0.214, 0.024, False), (0.30, 0.03, True), (0.299, 0.03, False), (1.0, None, False)],
)
def test_a_score_within_chance_says_nothing(accuracy: float, stderr: float | None, informative: bool) -> None:
    """Four choices. The first two are a 270M's release and base on 285 questions; 1.645 standard errors are 5 %."""
    assert is_informative(accuracy, stderr, 0.25) is informative


def test_a_score_at_chance_without_spread_says_nothing() -> None:
    assert not is_informative(0.25, 0.0, 0.25)
    assert is_informative(1.0, 0.0, 0.25)
