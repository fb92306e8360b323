"""When a score is better than chance."""

import pytest

from quantize_gemma.tasks.models.metrics import Score


@pytest.mark.parametrize(
    ("value", "stderr", "samples", "at_chance"),
    [
        # The base model and the release of a 270M model on 285 questions with four choices.
        (0.270, 0.026, 285, True),
        (0.214, 0.024, 285, True),
        # 1.645 standard errors are a probability of 5%.
        (0.30, 0.03, 228, False),
        (0.299, 0.03, 228, True),
        # Without variance.
        (0.25, 0.0, 4, True),
        (1.0, 0.0, 4, False),
        # A single answer may be a guess; the standard error of some metrics is unknown.
        (1.0, None, 1, True),
        (0.5, None, 100, False),
        (0.2, None, 100, True),
    ],
)
def test_a_score_that_guessing_explains_is_at_chance(
    value: float, stderr: float | None, samples: int, at_chance: bool
) -> None:
    assert Score(value=value, stderr=stderr, samples=samples).is_at_chance(0.25) is at_chance
