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


@pytest.mark.parametrize("part", ["last", "step_by_step", "image"])
def test_a_program_that_is_far_from_the_checkpoint_somewhere_is_refused(part: str) -> None:
    measured = metrics(0.9, 0.01)
    agreement = measured["program"]["agreement"]
    for name in ("last", "step_by_step", "image"):
        agreement[name] = {"kl_program": 0.0301 if name == part else 0.0299, "kl_activation_noise": 0.03}
    verdict = judge(measured, 5.0, 1.0, None, 1.0)
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == [f"program_kl_{part}"]


@pytest.mark.parametrize(("error", "refused"), [(0.9e-5, []), (1.1e-5, ["vision_encoder"])])
def test_a_vision_encoder_that_is_far_from_the_checkpoints_is_refused(error: float, refused: list[str]) -> None:
    measured = metrics(0.9, 0.0)
    measured["program"]["agreement"]["vision_encoder"] = {"error": error, "noise": 1e-5}
    verdict = judge(measured, 5.0, 1.0, None, 1.0)
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == refused
