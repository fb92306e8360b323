"""Values that cannot work are refused while they are parsed."""

from typing import Any

import pytest
from pydantic import ValidationError

from flows.parameters import Parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("max_mmlu_drop", "min_recovery", "max_kl_ratio") for value in ("inf", "nan")),
        ("max_chartqa_drop", float("inf")),
        ("max_disagreement", "-inf"),
        ("max_regression", float("nan")),
        *((name, "1" + "0" * 30) for name in ("limit", "batch_size", "workers", "max_seq_len", "max_new_tokens")),
        ("program_questions", 10**9),
        ("model", ""),
        *((name, "a\nb") for name in ("model", "recipe", "revision", "target", "branch", "cluster")),
        ("model", "a\0b"),
        ("model", "caf\udce9"),
        ("model", "\x1b[31mred"),
        ("recipe", "x" * 2000),
        ("keep", ["*.png", "a\nb"]),
    ],
)
def test_a_value_that_cannot_work_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        Parameters(**{name: value})
    assert refusal.value.errors()[0]["loc"][0] == name


def test_names_with_spaces_and_accents_and_fields_left_empty_are_taken() -> None:
    parameters = Parameters(model="./my models/Zürich 東京", revision="", keep=["*.png"])
    assert parameters.model == "./my models/Zürich 東京"
    assert parameters.revision is None
