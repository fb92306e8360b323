"""Values that cannot work are refused while they are parsed."""

import shlex
from typing import Any

import pytest
from pydantic import ValidationError

from quantize_gemma.flows import cli
from quantize_gemma.flows.options import Parameters, command_line
from quantize_gemma.tasks.models.resolved import ResolvedModel


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
        ("keep", ["*.png"]),
    ],
)
def test_a_value_that_cannot_work_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        Parameters(**{name: value})
    assert refusal.value.errors()[0]["loc"][0] == name


def test_names_with_spaces_and_accents_and_fields_left_empty_are_taken() -> None:
    parameters = Parameters(model="./my models/Zürich 東京", revision="")
    assert parameters.model == "./my models/Zürich 東京"
    assert parameters.revision is None


@pytest.mark.parametrize("target", ["me/gemma", "Me/Gemma", "me/gemma/"])
def test_a_target_that_is_the_model_is_refused(target: str) -> None:
    with pytest.raises(ValidationError, match="target is the model itself"):
        Parameters(model="me/gemma", target=target)


def resolved(name: str, on_hub: bool = True, fixture: bool = False) -> ResolvedModel:
    return ResolvedModel(name, "a" * 40, name, fixture, on_hub, license={}, weight_bytes=0, weights=0)


HUB = resolved("google/gemma-3-4b-it"), resolved("cais/mmlu"), resolved("HuggingFaceM4/ChartQA")
FIXTURES = tuple(resolved(name, False, True) for name in ("tiny-gemma3", "mmlu-mini", "chartqa-mini"))
LOCAL = resolved("my-finetune", on_hub=False), *FIXTURES[1:]
REVISIONS = {f"{name}revision": "a" * 40 for name in ("", "benchmark_", "charts_")}


@pytest.mark.parametrize(
    ("given", "sources", "expected"),
    [
        ({}, FIXTURES, {}),
        ({"model": HUB[0].name, "benchmark": "cais/mmlu"}, HUB, REVISIONS),
        ({"model": HUB[0].name, "benchmark": "cais/mmlu", "revision": "main"}, HUB, REVISIONS),
        ({"charts": "none", "limit": 20, "device": "cuda", "max_seq_len": 512}, (*FIXTURES[:2], None), {}),
        ({"custom_sdpa": False, "custom_kv_cache": False, "last_logits_only": False}, FIXTURES, {}),
        ({"max_mmlu_drop": 2.5, "max_chartqa_drop": 0.0, "min_recovery": 99.5}, FIXTURES, {}),
        ({"max_disagreement": 1e-7, "max_kl_ratio": 3.0, "max_new_tokens": 8, "program_questions": 7}, FIXTURES, {}),
        ({"recipe": "AFFINE-INT8-INT4"}, FIXTURES, {}),
        ({"recipe": "/home/me/it's mine; rm -rf $HOME.json"}, FIXTURES, {"recipe": "RECIPE.json"}),
        ({"model": "./my finetune", "revision": None}, LOCAL, {"model": "MODEL"}),
    ],
)
def test_the_command_on_the_card_gives_the_runs_parameters(
    given: dict[str, Any], sources: Any, expected: dict[str, Any]
) -> None:
    elsewhere = {"workers": 3, "batch_size": 7, "target": "me/release", "tag": True, "refresh": ["card"]}
    command = command_line(Parameters(**given, **elsewhere), *sources, recipe_hash="b" * 64)
    words = shlex.split(command, comments=True)
    assert words[0] == "quantize-gemma"
    printed = cli._parameters(cli._parser().parse_args(words[1:]))
    charts = sources[2].name if sources[2] else "none"
    assert printed == Parameters(**{**given, "charts": charts, **expected})


def test_the_command_says_what_identifies_the_files_that_only_one_machine_has() -> None:
    command = command_line(Parameters(model="./secret/path", recipe="./mine.json"), *LOCAL, recipe_hash="b" * 64)
    assert "secret" not in command
    assert "my-finetune" not in command
    assert "mine.json" not in command
    _, model, recipe = command.split("  # ")
    assert model == f"MODEL: the directory whose files have the digest {'a' * 40}"
    assert recipe == f"RECIPE.json: the recipe with the hash {'b' * 64}"
