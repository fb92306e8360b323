"""Invalid values are rejected when they are parsed."""

import inspect
import shlex
from typing import Any

import pytest
from pydantic import ValidationError

from quantize_gemma.flows import cli
from quantize_gemma.flows.options import DiagnoseOptions, Options, RunOptions, command_line, stage_names
from quantize_gemma.tasks.models.resolved import ResolvedModel
from tests.parameters import PAGE, page

GROUPS = {name: type(value) for name, value in RunOptions() if isinstance(value, Options)}


def options(**values: Any) -> RunOptions:
    """Return the options with these values, each in its group."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        group = next((group for group, model in GROUPS.items() if name in model.model_fields), None)
        (nested if group is None else nested.setdefault(group, {}))[name] = value
    return RunOptions(**nested)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("max_kl", "min_recovery", "max_kl_ratio") for value in ("inf", "nan")),
        *(("limit_drop", value) for value in ("mmlu=inf", "mmlu=-1", "mmlu=", "mmlu=much", "5")),
        *(("dataset", [value]) for value in ("mmlu", "mmlu=", "boolq=org/mirror")),
        ("tasks", " , "),
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
def test_an_invalid_value_is_rejected_with_the_name_of_its_option(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        options(**{name: value})
    error = raised.value.errors()[0]
    assert name in error["loc"] or f"--{name.replace('_', '-')}" in error["msg"]


def test_names_with_spaces_and_accents_are_valid() -> None:
    assert options(model="./my models/Zürich 東京").model == "./my models/Zürich 東京"


@pytest.mark.parametrize("name", ["revision", "cluster", "branch"])
def test_a_field_that_is_left_empty_has_its_default(name: str) -> None:
    """A field may be empty in Prefect's form, or in a deployment whose environment variable is not set."""
    assert options(**{name: ""}) == RunOptions()
    assert RunOptions(target="") == RunOptions()


@pytest.mark.parametrize("target", ["me/gemma", "Me/Gemma", "me/gemma/"])
def test_a_target_that_is_the_model_is_rejected(target: str) -> None:
    with pytest.raises(ValidationError, match="target is the model itself"):
        RunOptions(model="me/gemma", target=target)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"custom_sdpa": False}, "custom_kv_cache requires custom_sdpa: pass --no-custom-kv-cache, too"),
        ({"target": "me/release", "offline": True}, "a release cannot be published offline"),
        (
            {"create_pr": True, "tag": True},
            "a pull request targets the default branch and has no tag: leave out --branch and --tag",
        ),
        ({"limit_drop": "boolq=2"}, "--limit-drop names 'boolq', which is not one of the tasks mmlu, chartqa, gsm8k"),
        (
            {"model": "me/gemma", "limit_drop": "gsm8k=2"},
            "--limit-drop names 'gsm8k', which is not one of the tasks mmlu, chartqa",
        ),
        ({"refresh": ["quantise"]}, "--refresh: there is no stage 'quantise', only 'download', "),
        ({"refresh": ["evaluate_mmlu_base"], "tasks": "gsm8k"}, "--refresh: there is no stage 'evaluate_mmlu_base', "),
        ({"create_pr": True, "branch": "dev"}, "a pull request targets the default branch and has no tag"),
    ],
)
def test_options_that_exclude_each_other_are_rejected_in_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as raised:
        options(**values)
    assert cli.describe_invalid(raised.value).startswith(message)


def test_the_flows_signature_has_the_options_with_their_defaults() -> None:
    from quantize_gemma.flows.quantize_gemma import quantize_gemma

    parameters = inspect.signature(quantize_gemma.fn).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == dict(RunOptions())


def test_no_command_line_flag_stands_for_two_options() -> None:
    flags = [name for model in (RunOptions, *GROUPS.values()) for name in model.model_fields if name not in GROUPS]
    assert len(flags) == len(set(flags))
    assert set(flags) == cli.FLAGS


def test_tasks_datasets_and_drops_are_read_as_they_are_written() -> None:
    parsed = options(
        tasks="mmlu, gsm8k,mmlu,boolq",
        dataset=["mmlu=./a=b@c", "gsm8k=org/mirror@v2", "boolq=org/boolq"],
        limit_drop="mmlu=2, gsm8k=0.5",
    )
    assert parsed.evaluation.benchmark_names(fixture_model=False) == ["mmlu", "gsm8k", "boolq"]
    assert parsed.evaluation.dataset_sources() == {
        "mmlu": ("./a=b@c", None),
        "gsm8k": ("org/mirror", "v2"),
        "boolq": ("org/boolq", None),
    }
    assert parsed.gate.drops() == {"mmlu": 2.0, "gsm8k": 0.5}
    assert RunOptions().gate.drops() == {}


def test_every_stage_of_a_run_can_be_refreshed() -> None:
    names = stage_names(["mmlu"])
    assert options(tasks="mmlu", refresh=names).refresh == tuple(names)
    assert {"download_mmlu", "record_mmlu", "answer_mmlu_program", "evaluate_mmlu_no_act_quant"} <= set(names)


@pytest.mark.parametrize(
    ("evaluation", "device"),
    [
        ({}, "cpu"),
        ({"device": "cuda"}, "cuda"),
        # The GPUs are in the cluster, which does not quantize.
        ({"device": "cuda", "cluster": "tcp://host:8786"}, "cpu"),
    ],
)
def test_a_checkpoint_is_quantized_on_a_gpu_of_this_machine_if_one_is_requested(
    evaluation: dict[str, str], device: str
) -> None:
    assert options(**evaluation).quantization_device() == device


def test_a_diagnosis_refreshes_the_stages_of_a_run() -> None:
    assert DiagnoseOptions(refresh=["quantize", "diagnose"]).run_options().refresh == ("quantize",)


def resolved(name: str, on_hub: bool = True, fixture: bool = False) -> ResolvedModel:
    return ResolvedModel(name, "a" * 40, name, fixture, on_hub, license={}, weight_bytes=0, weights=0, multimodal=True)


DATASETS = {"mmlu": resolved("cais/mmlu"), "chartqa": resolved("HuggingFaceM4/ChartQA")}
PINNED = (f"mmlu=cais/mmlu@{'a' * 40}", f"chartqa=HuggingFaceM4/ChartQA@{'a' * 40}")
MINI = {"mmlu": resolved("mmlu-mini", False, True), "chartqa": resolved("chartqa-mini", False, True)}
MINI_SOURCES = ("mmlu=mmlu-mini", "chartqa=chartqa-mini")
TEXT, TINY_TEXT = resolved("Salesforce/wikitext"), resolved("tiny-text", False, True)
HUB = resolved("google/gemma-3-4b-it"), DATASETS, TEXT
FIXTURES = resolved("tiny-gemma3", False, True), MINI, TINY_TEXT
LOCAL = resolved("my-finetune", on_hub=False), MINI, resolved("notes.txt", on_hub=False)
REVISION = {"revision": "a" * 40, "dataset": PINNED, "text": f"Salesforce/wikitext@{'a' * 40}"}


@pytest.mark.parametrize(
    ("values", "sources", "expected"),
    [
        ({}, FIXTURES, {}),
        ({"model": HUB[0].name}, HUB, REVISION),
        ({"model": HUB[0].name, "revision": "main"}, HUB, REVISION),
        (
            {"limit": 20, "device": "cuda", "max_seq_len": 512},
            (FIXTURES[0], {"mmlu": MINI["mmlu"]}, TINY_TEXT),
            {"tasks": "mmlu", "dataset": MINI_SOURCES[:1]},
        ),
        (
            {"custom_sdpa": False, "custom_kv_cache": False, "bidirectional_images": False, "last_logits_only": False},
            FIXTURES,
            {},
        ),
        ({"limit_drop": "mmlu=2.5,chartqa=0", "min_recovery": 99.5}, FIXTURES, {}),
        ({"max_disagreement": 1e-7, "max_kl_ratio": 3.0, "max_new_tokens": 8, "batch_size": 1}, FIXTURES, {}),
        ({"recipe": "AFFINE-INT8-INT4"}, FIXTURES, {}),
        ({"recipe": "/home/me/it's mine; rm -rf $HOME.json"}, FIXTURES, {"recipe": "RECIPE.json"}),
        ({"model": "./my finetune", "revision": None}, LOCAL, {"model": "MODEL", "text": "./TEXT"}),
        ({"max_kl": None, "min_same_top": 75.5, "text_windows": 3}, FIXTURES, {}),
        ({"device_report": "/home/me/phone.json"}, FIXTURES, {"device_report": "DEVICE_REPORT.json"}),
    ],
)
def test_the_command_on_the_card_has_the_runs_parameters(
    values: dict[str, Any], sources: Any, expected: dict[str, Any]
) -> None:
    omitted = {"workers": 3, "target": "me/release", "tag": True, "refresh": ["card"]}
    command = command_line(options(**values, **omitted), *sources, recipe_hash="b" * 64)
    words = shlex.split(command, comments=True)
    assert words[0] == "quantize-gemma"
    _, parsed = cli.parse(words[1:])
    fixtures = {"tasks": "mmlu,chartqa", "dataset": MINI_SOURCES, "text": "tiny-text"}
    assert parsed.kwargs["options"] == options(**{**values, **fixtures, **expected})


def test_the_command_identifies_local_files_by_their_digests() -> None:
    datasets = {"mmlu": resolved("my-mirror", on_hub=False)}
    local = options(model="./secret/path", recipe="./mine.json", tasks="mmlu", dataset=["mmlu=./my-mirror"])
    command = command_line(local, LOCAL[0], datasets, LOCAL[2], recipe_hash="b" * 64)
    assert "secret" not in command
    assert "my-finetune" not in command
    assert "mine.json" not in command
    assert "my-mirror" not in command
    assert "--dataset mmlu=DATASET_MMLU" in command
    assert "notes.txt" not in command
    _, model, recipe, text, dataset = command.split("  # ")
    assert text.startswith("./TEXT: the text file with the digest aaaa")
    assert dataset == f"DATASET_MMLU: the directory whose files have the digest {'a' * 40}"
    assert model == f"MODEL: the directory whose files have the digest {'a' * 40}"
    assert recipe == f"RECIPE.json: the recipe with the hash {'b' * 64}"


def test_the_documentation_lists_every_parameter_with_its_default() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.parameters`"
