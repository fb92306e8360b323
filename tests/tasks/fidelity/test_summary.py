"""The statistics of fidelity, on values computed by hand and on random samples."""

import math

import numpy as np
import pytest

from quantize_gemma.tasks.fidelity.summary import EDGES, histogram, mean_and_stderr, quantile_and_stderr, summarize


def test_the_metrics_of_four_tokens_match_those_computed_by_hand() -> None:
    tokens = {
        "kl": np.array([0.0, 0.1, 0.2, 0.5], np.float32),
        "same_top": np.array([1, 1, 0, 1], np.float32),
        "nll_base": -np.log(np.array([0.5, 0.5, 0.25, 1.0], np.float32)),
        "nll": -np.log(np.array([0.5, 0.25, 0.5, 0.5], np.float32)),
    }
    metrics = summarize(tokens, np.array([0, 0, 1, 1]))
    expected = {
        "tokens": 4,
        "windows": 2,
        "kl_max": 0.5,
        "kl_mean": 0.2,
        # The window means are 0.05 and 0.35; the standard error is half their difference.
        "kl_mean_stderr": 0.15,
        "kl_median": 0.15,
        "same_top": 0.75,
        "same_top_stderr": 0.25,
        "dp_mean": (0 - 0.25 + 0.25 - 0.5) / 4,
        "dp_rms": math.sqrt((0.0625 + 0.0625 + 0.25) / 4),
        "ppl_base": (0.5 * 0.5 * 0.25) ** -0.25,
        "ppl": (0.5 * 0.25 * 0.5 * 0.5) ** -0.25,
        "ppl_log_ratio": math.log(2) / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["ppl_stderr"] == pytest.approx(metrics["ppl"] * abs(np.log(4) + np.log(2) - 2 * np.log(2)) / 4)


def test_a_single_window_has_no_standard_error() -> None:
    ones = np.ones(5, np.float32)
    tokens = {"kl": ones, "same_top": ones, "nll_base": ones, "nll": ones}
    metrics = summarize(tokens, np.zeros(5, np.int64))
    assert [value for name, value in metrics.items() if name.endswith("stderr")] == [None] * 10


def test_standard_errors_match_scipy_on_windows_of_equal_length() -> None:
    from scipy import stats

    values = np.random.default_rng(0).gamma(1, 1, (20, 50)) * np.arange(1, 21)[:, None]
    mean, stderr = mean_and_stderr(values.ravel(), np.repeat(np.arange(20), 50))
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(stats.sem(values.mean(1)))


def test_standard_errors_match_the_spread_of_many_samples() -> None:
    """Windows differ in length and level; the spread of 400 estimates matches the standard error from one sample."""
    generator = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        lengths = generator.integers(50, 150, 40)
        levels = generator.gamma(4, 0.25, 40)
        windows = np.repeat(np.arange(40), lengths)
        return generator.exponential(levels[windows]), windows

    for estimate in (mean_and_stderr, lambda *sample: quantile_and_stderr(*sample, 0.9)):
        estimates = [estimate(*draw()) for _ in range(400)]
        spread = np.std([value for value, _ in estimates])
        assert np.mean([stderr for _, stderr in estimates]) == pytest.approx(spread, rel=0.15)
        # Treating tokens as independent would give half of that.


def test_every_token_is_in_the_histogram() -> None:
    kl = np.array([-1e-7, 0, 2e-5, 0.1, 0.11, 500], np.float32)
    result = histogram(kl)
    assert result["edges"] == EDGES
    assert len(result["counts"]) == len(EDGES) - 1
    assert sum(result["counts"]) == 6
    assert result["counts"][0] == 2
    assert result["counts"][-1] == 1
