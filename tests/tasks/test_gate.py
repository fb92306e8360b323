"""The gate's bar is where it says."""

from typing import Any

import pytest

from tasks.gate import judge


def metrics(quantized: float, kl_program: float) -> dict[str, Any]:
    return {
        "base": {"mmlu": {"accuracy": 0.9}},
        "quantized": {"mmlu": {"accuracy": quantized}},
        "program": {"agreement": {"kl_program": kl_program, "kl_activation_noise": 0.03}},
    }


@pytest.mark.parametrize(
    ("quantized", "kl_program", "refused"),
    [
        (0.85, 0.06, []),
        (0.95, 0.0, []),
        (0.849, 0.06, ["mmlu_drop"]),
        (0.85, 0.061, ["program_kl"]),
        (0.5, 2.0, ["mmlu_drop", "program_kl"]),
        (0.85, float("nan"), ["program_kl"]),
    ],
)
def test_a_release_is_refused_beyond_the_drop_or_the_distance(
    quantized: float, kl_program: float, refused: list[str]
) -> None:
    verdict = judge(metrics(quantized, kl_program), 5.0, 2.0, None, 1.0)
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == refused
    assert verdict["passed"] == (not refused)


@pytest.mark.parametrize(("published", "refused"), [(None, []), (90.0, []), (91.0, []), (91.01, ["regression"])])
def test_a_release_is_refused_when_it_is_worse_than_the_published_one(
    published: float | None, refused: list[str]
) -> None:
    verdict = judge(metrics(0.9, 0.0), 5.0, 2.0, published, max_regression=1.0)
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == refused
