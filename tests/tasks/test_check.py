"""A run needs disk space only for what it will write, and memory for its workers' models."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shapes import SHAPES
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.check import (
    MEMORY_FACTOR,
    MEMORY_OF_LIBRARIES,
    check_calibration,
    check_disk,
    check_memory,
    check_run,
    disk_needed,
    estimate_calibration,
    estimate_distillation,
    mask_bytes,
    plan_calibration,
    supported_benchmarks,
    warn_about_time,
)
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.config import TextConfig, parse_config
from quantize_gemma.tasks.models.recipe import Calibration, load_recipe
from quantize_gemma.tasks.runtime import machine, pruning, store
from quantize_gemma.tasks.runtime.artifact_ref import ref_of
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.prefect_stage import PlannedStage, key_of, missing_stages
from quantize_gemma.tasks.runtime.stage import Output, stage

# The fields of a configuration on which the costs of a calibration depend.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


@stage()
def download(target: Path) -> Output:
    raise AssertionError("only its name and its key count")


@stage()
def untie(target: Path) -> Output:
    raise AssertionError("only its name and its key count")


@stage()
def quantize(target: Path) -> Output:
    raise AssertionError("only its name and its key count")


CHAIN = [
    PlannedStage(download, {"source": "a", "revision": "b", "offline": False}),
    PlannedStage(untie, {}, {"checkpoint": "download"}),
    PlannedStage(quantize, {"recipe": {"name": "mine"}}, {"checkpoint": "untie"}),
]


def write(text: str) -> Any:
    def work(target: Path) -> dict[str, Any]:
        (target / "file").write_text(text)
        return {}

    return work


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    return tmp_path


def test_only_results_that_the_run_can_reuse_need_no_disk_space(home: Path) -> None:
    assert missing_stages(CHAIN, []) == ["download", "untie", "quantize"]
    base = store.produce("download", key_of(CHAIN[0].stage, CHAIN[0].inputs), write("base"))
    store.produce("untie", "c" * 64, write("from another model"))
    assert missing_stages(CHAIN, []) == ["untie", "quantize"]
    untied = store.produce("untie", key_of(CHAIN[1].stage, {"checkpoint": ref_of(base)}), write("untied"))
    assert missing_stages(CHAIN, []) == ["quantize"]
    assert missing_stages(CHAIN, ["download"]) == ["download", "quantize"]
    (untied.path / "file").unlink()
    assert missing_stages(CHAIN, []) == ["untie", "quantize"]


def test_a_run_that_writes_nothing_is_not_rejected_however_large_its_model_is(home: Path) -> None:
    weight_bytes = shutil.disk_usage(home).free
    check_disk(weight_bytes, [])
    check_disk(weight_bytes // 2, ["export"])
    with pytest.raises(UserError, match=r"the run needs about .* GB in .*, but only .* GB is free"):
        check_disk(weight_bytes)


def test_only_the_interrupted_download_of_this_revision_counts_as_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = home / "download" / ".incoming-0123456789abcdef"
    incoming.mkdir(parents=True)
    (incoming / "model.safetensors").write_bytes(bytes(1 << 20))
    # No test can have a disk of exactly this size.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    check_disk(2 << 20, ["download"], "0123456789abcdef0123")
    with pytest.raises(UserError, match="GB is free"):
        check_disk(2 << 20, ["download"], "f" * 40)


def test_bytes_of_an_interrupted_download_of_this_revision_count_as_written(home: Path) -> None:
    incoming = home / "download" / ".incoming-0123456789abcdef"
    incoming.mkdir(parents=True)
    (incoming / "model.safetensors").write_bytes(bytes(1 << 20))
    assert pruning.incoming_size("download", "0123456789abcdef0123") >= 1 << 20
    assert pruning.incoming_size("download", "f" * 40) == 0
    assert disk_needed(1 << 20, ["download"]) == 1 << 20


def test_each_worker_needs_memory_for_its_own_model() -> None:
    weights = int((machine.total_memory() // 3 - MEMORY_OF_LIBRARIES) / 2 / MEMORY_FACTOR)
    assert check_memory(weights, workers=2) == 2 * check_memory(weights)
    with pytest.raises(UserError, match=r"5 workers take about .* its own copy of the model, .* at most --workers 3"):
        check_memory(weights, workers=5)


def test_the_memory_of_a_program_grows_with_the_square_of_its_longest_sequence() -> None:
    config = parse_config(SHAPES["4b"], Path("config.json"))
    # In sequences as long as the sliding window, attention needs no mask.
    assert mask_bytes(config, 1024, False) == 0
    assert mask_bytes(config, 131_072, False) > 3.9 * mask_bytes(config, 65_536, False)
    assert mask_bytes(config, 32_768, True) == mask_bytes(config, 32_768, False) + 8 * 32_768**2
    assert check_memory(1000, masks=10**9) > check_memory(1000) + 0.9e9
    with pytest.raises(UserError, match="or a smaller --max-seq-len"):
        check_memory(1000, masks=machine.total_memory())


def test_a_text_only_model_needs_a_benchmark_without_images() -> None:
    mmlu, chartqa = find_benchmark("mmlu"), find_benchmark("chartqa")
    assert supported_benchmarks([chartqa, mmlu], multimodal=False) == [mmlu]
    assert supported_benchmarks([], multimodal=False) == []
    with pytest.raises(UserError, match="the model is text-only, but ChartQA has images: choose other --tasks"):
        supported_benchmarks([chartqa], multimodal=False)


def test_only_chartqa_needs_a_chat_template_that_accepts_a_system_message() -> None:
    mmlu, chartqa = find_benchmark("mmlu"), find_benchmark("chartqa")
    assert supported_benchmarks([mmlu], multimodal=True, system_message=False) == [mmlu]
    assert supported_benchmarks([mmlu, chartqa], multimodal=False, system_message=False) == [mmlu]
    with pytest.raises(UserError, match="does not accept the system message of ChartQA's prompts: leave chartqa out"):
        supported_benchmarks([mmlu, chartqa], multimodal=True, system_message=False)


def test_a_distillation_that_exceeds_a_stages_time_limit_gets_a_warning() -> None:
    assert warn_about_time({"calibration_seconds": 3600, "distillation_seconds": 7200}) is None
    warning = warn_about_time({"calibration_seconds": 3600, "distillation_seconds": 33 * 3600})
    assert warning is not None
    assert "distillation takes about 33 hours" in warning
    assert "stopped after 24 hours: start the run again to continue it" in warning


def test_a_calibrated_recipe_and_its_text_are_checked_before_the_start(tmp_path: Path) -> None:
    calibrated, plain = load_recipe("GPTQ-INT8-INT4"), load_recipe("HQQ-INT8-INT4")
    (tmp_path / "text").write_text("words")
    check_calibration(calibrated, str(tmp_path / "text"))
    check_calibration(plain, None)
    for recipe, text, message in (
        (calibrated, None, "set --calibration"),
        (plain, str(tmp_path / "text"), "leave out --calibration"),
        (calibrated, str(tmp_path / "none"), "no calibration text at"),
    ):
        with pytest.raises(UserError, match=message):
            check_calibration(recipe, text)


def test_the_estimate_of_a_calibration_grows_with_its_tokens_and_with_a_slower_machine() -> None:
    shape = TextConfig(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4)
    recipe = load_recipe("GPTQ-INT8-INT4")
    without = replace(recipe, calibration=Calibration(answers=0))
    seconds, memory = estimate_calibration(shape, without, 1e11)
    assert 60 < seconds < 600
    slower, same = estimate_calibration(shape, without, 5e10)
    assert (slower, same) == (pytest.approx(2 * seconds), memory)
    more, larger = estimate_calibration(shape, replace(recipe, calibration=Calibration(answers=64)), 1e11)
    assert more > 1.5 * seconds
    assert larger > memory
    int8_head = replace(load_recipe("GPTQ-INT8-INT4-HEAD8"), calibration=Calibration(answers=0))
    assert estimate_calibration(shape, int8_head, 1e11)[0] < seconds


def test_a_calibration_takes_4_gigabytes_for_4b_and_9_for_27b_by_its_estimate() -> None:
    recipe = replace(load_recipe("GPTQ-INT8-INT4"), calibration=Calibration(answers=0))
    for name, most in (("4b", 4e9), ("27b", 9e9)):
        text = TextConfig(**{key: SHAPES[name]["text_config"][key] for key in SIZES})
        assert 0.7 * most < estimate_calibration(text, recipe, 1e11)[1] < most


def test_the_plan_of_a_calibrated_recipe_says_what_calibration_costs_and_needs_a_text(tmp_path: Path) -> None:
    text = TextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    assert plan_calibration(text, load_recipe("HQQ-INT8-INT4")) == {}
    plan = plan_calibration(text, load_recipe("GPTQ-INT8-INT4"))
    assert plan["calibration_seconds"] >= 0
    assert plan["calibration_memory_bytes"] > 1e9
    with pytest.raises(UserError, match="set --calibration"):
        check_run("google/gemma-3-4b-it", "GPTQ-INT8-INT4", 1024, "cpu", None)
    calibrated, distilled = load_recipe("GPTQ-INT8-INT4"), load_recipe("DISTILL-INT8-INT4")
    # The blocks, and the hidden states of 80 sequences with 512 tokens each.
    assert disk_needed(10**10, recipe=calibrated) == pytest.approx(disk_needed(10**10) + 5.3e9 + 0.92e9, rel=1e-3)
    assert disk_needed(10**10, recipe=distilled) == disk_needed(10**10, recipe=calibrated) + 19e9
    assert disk_needed(10**10, ["download_text", "distill"], distilled) == 19e9
    costs = plan_calibration(text, distilled)
    assert costs["distillation_seconds_on_gpu"] >= 50
    assert costs["distillation_memory_bytes"] > costs["calibration_memory_bytes"] / 2


def test_a_diagnosis_needs_no_disk_for_a_distillation_or_a_program(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    whole, diagnosis = (
        check_run("tiny-gemma3", "DISTILL-INT8-INT4", 1024, "cpu", None, calibration=str(text), diagnosis=diagnosis)
        for diagnosis in (False, True)
    )
    weight_bytes = (BUILTIN["tiny-gemma3"] / "model.safetensors").stat().st_size
    written, recipe = ["download", "untie", "quantize"], load_recipe("GPTQ-INT8-INT4")
    assert diagnosis["disk_bytes_needed"] == disk_needed(weight_bytes, written, recipe) < whole["disk_bytes_needed"]


def test_the_estimate_of_a_distillation_at_4b_is_hours_here_and_minutes_on_a_gpu() -> None:
    text = TextConfig(**{key: SHAPES["4b"]["text_config"][key] for key in SIZES})
    operations, memory = estimate_distillation(text, load_recipe("DISTILL-INT8-INT4"))
    assert 5e15 < operations < 5e16
    assert 8e9 < memory < 16e9
