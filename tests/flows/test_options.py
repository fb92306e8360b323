"""Values that cannot work are refused while they are parsed."""

import inspect
import shlex
from typing import Any

import pytest
from pydantic import ValidationError

from quantize_gemma.flows import cli
from quantize_gemma.flows.options import Options, RunOptions, command_line
from quantize_gemma.tasks.models.resolved import ResolvedModel

GROUPS = {name: type(value) for name, value in RunOptions() if isinstance(value, Options)}


def options(**values: Any) -> RunOptions:
    """Returns the options with these values, each in its group."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        group = next((group for group, model in GROUPS.items() if name in model.model_fields), None)
        (nested if group is None else nested.setdefault(group, {}))[name] = value
    return RunOptions(**nested)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("max_mmlu_drop", "min_recovery", "max_kl_ratio") for value in ("inf", "nan")),
        ("max_chartqa_drop", float("inf")),
        ("max_disagreement", "-inf"),
        ("max_regression", float("nan")),
        *((name, "1" + "0" * 30) for name in ("limit", "batch_size", "workers", "max_seq_len", "max_new_tokens")),
        ("program_samples", 10**9),
        ("model", ""),
        *((name, "a\nb") for name in ("model", "recipe", "revision", "target", "branch", "cluster")),
        ("model", "a\0b"),
        ("model", "caf\udce9"),
        ("model", "\x1b[31mred"),
        ("recipe", "x" * 2000),
        ("keep", ["*.png"]),
        ("backend", "xnnpack"),
        ("benchmark", "cais/mmlu"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_name_of_its_option(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        options(**{name: value})
    assert name in refusal.value.errors()[0]["loc"]


def test_names_with_spaces_and_accents_are_valid() -> None:
    assert options(model="./my models/Zürich 東京").model == "./my models/Zürich 東京"


@pytest.mark.parametrize("name", ["revision", "mmlu_revision", "chartqa", "chartqa_revision", "cluster", "branch"])
def test_a_field_that_is_left_empty_has_its_default(name: str) -> None:
    """In Prefect's form, and in a deployment whose environment variable is not set."""
    assert options(**{name: ""}) == RunOptions()
    assert RunOptions(target="") == RunOptions()


@pytest.mark.parametrize("target", ["me/gemma", "Me/Gemma", "me/gemma/"])
def test_a_target_that_is_the_model_is_refused(target: str) -> None:
    with pytest.raises(ValidationError, match="target is the model itself"):
        RunOptions(model="me/gemma", target=target)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"custom_sdpa": False}, "custom_kv_cache requires custom_sdpa"),
        ({"target": "me/release", "offline": True}, "a release cannot be published offline"),
        ({"create_pr": True, "tag": True}, "a pull request targets the default branch and has no tag"),
        ({"create_pr": True, "branch": "dev"}, "a pull request targets the default branch and has no tag"),
    ],
)
def test_options_that_exclude_each_other_are_refused_in_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refusal:
        options(**values)
    assert cli.describe(refusal.value).startswith(message)


def test_the_flows_signature_has_the_options_with_their_defaults() -> None:
    from quantize_gemma.flows.quantize_gemma import quantize_gemma

    parameters = inspect.signature(quantize_gemma.fn).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == dict(RunOptions())


def test_no_flag_of_the_command_line_stands_for_two_options() -> None:
    flags = [name for model in (RunOptions, *GROUPS.values()) for name in model.model_fields if name not in GROUPS]
    assert len(flags) == len(set(flags))
    assert set(flags) == cli.FLAGS


@pytest.mark.parametrize(
    ("mmlu", "chartqa", "source"),
    [
        ("mmlu-mini", "auto", "chartqa-mini"),
        ("cais/mmlu", "auto", "HuggingFaceM4/ChartQA"),
        ("cais/mmlu", "chartqa-mini", "chartqa-mini"),
        ("cais/mmlu", "none", None),
    ],
)
def test_chartqa_follows_mmlu_unless_it_is_set(mmlu: str, chartqa: str, source: str | None) -> None:
    assert options(mmlu=mmlu, chartqa=chartqa).evaluation.chartqa_source() == source


def resolved(name: str, on_hub: bool = True, fixture: bool = False) -> ResolvedModel:
    return ResolvedModel(name, "a" * 40, name, fixture, on_hub, license={}, weight_bytes=0, weights=0)


HUB = resolved("google/gemma-3-4b-it"), resolved("cais/mmlu"), resolved("HuggingFaceM4/ChartQA")
FIXTURES = tuple(resolved(name, False, True) for name in ("tiny-gemma3", "mmlu-mini", "chartqa-mini"))
LOCAL = resolved("my-finetune", on_hub=False), *FIXTURES[1:]
REVISIONS = {f"{name}revision": "a" * 40 for name in ("", "mmlu_", "chartqa_")}


@pytest.mark.parametrize(
    ("given", "sources", "expected"),
    [
        ({}, FIXTURES, {}),
        ({"model": HUB[0].name, "mmlu": "cais/mmlu"}, HUB, REVISIONS),
        ({"model": HUB[0].name, "mmlu": "cais/mmlu", "revision": "main"}, HUB, REVISIONS),
        ({"chartqa": "none", "limit": 20, "device": "cuda", "max_seq_len": 512}, (*FIXTURES[:2], None), {}),
        ({"custom_sdpa": False, "custom_kv_cache": False, "last_logits_only": False}, FIXTURES, {}),
        ({"max_mmlu_drop": 2.5, "max_chartqa_drop": 0.0, "min_recovery": 99.5}, FIXTURES, {}),
        ({"max_disagreement": 1e-7, "max_kl_ratio": 3.0, "max_new_tokens": 8, "program_samples": 7}, FIXTURES, {}),
        ({"recipe": "AFFINE-INT8-INT4"}, FIXTURES, {}),
        ({"recipe": "/home/me/it's mine; rm -rf $HOME.json"}, FIXTURES, {"recipe": "RECIPE.json"}),
        ({"model": "./my finetune", "revision": None}, LOCAL, {"model": "MODEL"}),
    ],
)
def test_the_command_on_the_card_gives_the_runs_parameters(
    given: dict[str, Any], sources: Any, expected: dict[str, Any]
) -> None:
    elsewhere = {"workers": 3, "batch_size": 7, "target": "me/release", "tag": True, "refresh": ["card"]}
    command = command_line(options(**given, **elsewhere), *sources, recipe_hash="b" * 64)
    words = shlex.split(command, comments=True)
    assert words[0] == "quantize-gemma"
    _, parsed = cli.parse(words[1:])
    chartqa = sources[2].name if sources[2] else "none"
    assert parsed.kwargs["options"] == options(**{**given, "chartqa": chartqa, **expected})


def test_the_command_says_what_identifies_the_files_that_only_one_machine_has() -> None:
    command = command_line(options(model="./secret/path", recipe="./mine.json"), *LOCAL, recipe_hash="b" * 64)
    assert "secret" not in command
    assert "my-finetune" not in command
    assert "mine.json" not in command
    _, model, recipe = command.split("  # ")
    assert model == f"MODEL: the directory whose files have the digest {'a' * 40}"
    assert recipe == f"RECIPE.json: the recipe with the hash {'b' * 64}"
