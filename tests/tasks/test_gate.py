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
    verdict = judge(metrics(quantized, kl_program), max_mmlu_drop=5.0, max_kl_ratio=2.0)
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == refused
    assert verdict["passed"] == (not refused)


def test_what_was_not_measured_is_not_judged() -> None:
    only_base = {"base": {"mmlu": {"accuracy": 0.9}}, "quantized": {}}
    assert judge(only_base, 5.0, 2.0) == {"passed": True, "checks": []}
