"""The disk space and the memory that a run needs are known before it starts."""

import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.flows import cli
from quantize_gemma.flows.options import DiagnoseOptions, ExportOptions, RunOptions
from quantize_gemma.flows.plan import (
    Plan,
    PlannedBenchmark,
    check_download,
    check_space,
    download_inputs,
    writing_stages,
)
from quantize_gemma.flows.quantization import quantize_inputs
from quantize_gemma.flows.run import Run
from quantize_gemma.tasks.check import disk_needed
from quantize_gemma.tasks.download import download, resolve_model
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.models.resolved import ResolvedDataset, ResolvedModel
from quantize_gemma.tasks.runtime import machine, store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, ref_of
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.prefect_stage import PlannedStage, key_of
from quantize_gemma.tasks.untie import untie

MODEL = ResolvedModel("a/b", "0" * 40, "a/b", False, True, license={}, weight_bytes=8, weights=4, multimodal=True)
TEXT = ResolvedDataset("a/text", "1" * 40, "a/text", False, True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("diagnosis", [False, True])
def test_a_diagnosis_ends_with_the_quantized_checkpoint(diagnosis: bool) -> None:
    stages = writing_stages(RunOptions(), MODEL, load_recipe("DISTILL-INT8-INT4"), TEXT, TEXT, diagnosis)
    names = [planned.stage.name for planned in stages if not planned.stage.name.startswith("download")]
    assert names == ["untie", "calibrate", "quantize"] + ([] if diagnosis else ["distill", "export"])


def test_a_reference_model_that_is_not_in_the_store_needs_disk(home: Path) -> None:
    reference = replace(
        MODEL, name="a/c", revision="2" * 40, source="a/c", weight_bytes=2 * shutil.disk_usage(home).free
    )
    plan = Plan(RunOptions(), MODEL, TEXT, (), load_recipe("HQQ-INT8-INT4"), "cpu", reference=reference)
    with pytest.raises(UserError, match="GB is free"):
        check_space(plan, [])
    store.produce("download", key_of(download, download_inputs(reference, offline=False)), lambda _: {})
    check_space(plan, [])
    with pytest.raises(UserError, match="GB is free"):
        check_space(replace(plan, options=RunOptions(refresh=["download_reference"])), [])


def test_a_stage_that_a_diagnosis_refreshes_needs_disk(home: Path) -> None:
    model = replace(MODEL, weight_bytes=2 * shutil.disk_usage(home).free)
    stages = [PlannedStage(download, download_inputs(model, offline=False))]
    store.produce("download", key_of(download, stages[0].inputs), lambda _: {})
    plan = Plan(DiagnoseOptions().run_options(), model, TEXT, (), load_recipe("HQQ-INT8-INT4"), "cpu")
    check_space(plan, stages)
    refreshed = DiagnoseOptions(refresh=["download", "diagnose"]).run_options()
    with pytest.raises(UserError, match="GB is free"):
        check_space(replace(plan, options=refreshed), stages)


@pytest.mark.parametrize("recipe", ["HQQ-INT8-INT4", "DISTILL-INT8-INT4"])
def test_the_check_of_a_downloaded_model_counts_what_quantizing_it_writes(recipe: str, home: Path) -> None:
    def write(_: Path) -> dict[str, Any]:
        return {"metadata": {"weight_bytes": MODEL.weight_bytes}}

    base = store.produce("download", key_of(download, download_inputs(MODEL, offline=False)), write)
    store.produce("untie", key_of(untie, {"checkpoint": ref_of(base)}), lambda _: {})
    missing = cli._missing_stages(RunOptions(recipe=recipe), MODEL)
    needed = disk_needed(10**10, ["quantize", "distill", "export"], load_recipe(recipe))
    assert disk_needed(10**10, missing, load_recipe(recipe)) == needed


def test_a_recipes_description_reruns_nothing_but_the_card() -> None:
    recipe = load_recipe("GPTQ-INT8-INT4")
    renewed = replace(recipe, description="another sentence")
    assert quantize_inputs(RunOptions(), renewed) == quantize_inputs(RunOptions(), recipe)
    plans = [Plan(RunOptions(), MODEL, TEXT, (), one, "cpu", calibration=TEXT) for one in (recipe, renewed)]
    assert plans[0].gate_inputs() == plans[1].gate_inputs()
    assert plans[0].card_inputs({}) != plans[1].card_inputs({})


def test_an_evaluation_counts_with_its_workers_and_every_other_stage_once() -> None:
    run = Run("test", ())
    for workers, one_at_a_time in ((4, False), (8, True)):
        run.fit_into_memory(machine.available_memory() // 8, workers)
        assert run._one_at_a_time == one_at_a_time


def downloaded(model: Path) -> Any:
    """Download a model directory into the store; return its reference in a future, as in a run."""
    inputs = download_inputs(resolve_model(str(model), None, offline=False), offline=False)
    artifact = store.produce("download", key_of(download, inputs), lambda target: download(target, **inputs))
    future: Future[ArtifactRef] = Future()
    future.set_result(ref_of(artifact))
    return future


def test_a_program_whose_masks_fill_the_memory_runs_alone(home: Path, tiny_copy: Callable[[], Path]) -> None:
    model = tiny_copy()
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1_000_000
    (model / "config.json").write_text(json.dumps(config))
    plan = Plan(RunOptions(), MODEL, TEXT, (), load_recipe("HQQ-INT8-INT4"), "cpu")
    # Three programs have masks of 13 bytes for each pair of tokens.
    longest = math.isqrt(machine.available_memory() // (3 * 13))
    run = Run("test", ())
    with store.keep_pinned():
        base = downloaded(model)
        for length in (1024, longest):
            check_download(run, replace(plan, options=RunOptions(export=ExportOptions(max_seq_len=length))), base)
            assert run._one_at_a_time == (length == longest)


def test_chartqa_needs_a_chat_template_that_accepts_a_system_message(home: Path, tiny_copy: Callable[[], Path]) -> None:
    model = tiny_copy()
    (model / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}<bos>"
    )
    mmlu, chartqa = (PlannedBenchmark(find_benchmark(name), TEXT, None) for name in ("mmlu", "chartqa"))
    plan = Plan(RunOptions(), MODEL, TEXT, (mmlu,), load_recipe("HQQ-INT8-INT4"), "cpu")
    with store.keep_pinned():
        base = downloaded(model)
        assert check_download(Run("test", ()), plan, base) == plan
        with pytest.raises(UserError, match="leave chartqa out of --tasks"):
            check_download(Run("test", ()), replace(plan, benchmarks=(mmlu, chartqa)), base)
