"""The quantization part of a run: the calibration data, and the stages up to the quantized checkpoint."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.calibrate import calibrate, digest_text
from quantize_gemma.tasks.download import download_dataset, resolve_dataset
from quantize_gemma.tasks.models.benchmarks import Benchmark
from quantize_gemma.tasks.models.calibration import parse_source
from quantize_gemma.tasks.models.recipe import Recipe
from quantize_gemma.tasks.models.resolved import ResolvedDataset
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.quantize.distill import distill
from quantize_gemma.tasks.runtime.prefect_stage import PlannedStage

if TYPE_CHECKING:
    from quantize_gemma.flows.options import RunOptions
    from quantize_gemma.flows.plan import Plan
    from quantize_gemma.flows.run import Future, Run


def resolve_calibration(run: "Run", options: "RunOptions") -> ResolvedDataset | None:
    """Return the calibration text file, or the dataset at its commit; None if the options name neither."""
    if options.calibration is None:
        return None
    source = parse_source(options.calibration)
    if source.on_hub:
        row = _describe_dataset(options)
        return run.call("resolve_calibration", resolve_dataset, row, source.name, source.revision, options.offline)
    path = Path(source.name)
    return ResolvedDataset(path.name, digest_text(source.name), str(path.resolve()), fixture=False, on_hub=False)


def quantize_inputs(options: "RunOptions", recipe: Recipe) -> dict[str, Any]:
    """Return the inputs of `quantize`, except for its artifacts."""
    return {"recipe": stage_recipe(recipe), "device": options.quantization_device()}


def stage_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as the input of a stage: without its description, which affects no byte of what it writes."""
    return dataclasses.replace(recipe, description=None).to_json()


def submit_quantization(run: "Run", plan: "Plan", base: "Future", untied: "Future", text: "Future") -> "Future":
    """Submit the stages that quantize the checkpoint with the plan's recipe; return its future."""
    tokens = _submit_calibration(run, plan, base, text)
    inputs = quantize_inputs(plan.options, without_distillation(plan.recipe))
    quantized = run.submit(quantize, checkpoint=untied, **inputs, **tokens)
    if plan.recipe.distillation is None:
        return quantized
    return run.submit(
        distill, checkpoint=quantized, base=untied, **quantize_inputs(plan.options, plan.recipe), **tokens
    )


def without_distillation(recipe: Recipe) -> Recipe:
    """Return the recipe without its distillation settings, so that changing the training does not rerun `quantize`.

    Another number of sequences does: calibrate() writes the tokens of both stages.
    """
    return dataclasses.replace(recipe, distillation=None)


def plan_tokens(options: "RunOptions", recipe: Recipe, source: ResolvedDataset) -> list[PlannedStage]:
    """Return the stages that prepare the calibration tokens."""
    artifacts = {"checkpoint": "download", "fidelity_text": "download_text"}
    stages, inputs = [], _calibrate_inputs(recipe)
    if source.on_hub:
        stages.append(PlannedStage(download_dataset, _dataset_inputs(options, source)))
        artifacts["dataset"] = "download_dataset"
    else:
        inputs |= {"text": source.source, "digest": source.revision}
    return [*stages, PlannedStage(calibrate, inputs, artifacts)]


def _submit_calibration(run: "Run", plan: "Plan", base: "Future", text: "Future") -> dict[str, Any]:
    """Submit the preparation of the calibration tokens, which must not overlap with the fidelity text.

    Returns:
        Their future as `calibration`; empty if the recipe is not calibrated.
    """
    settings, source = plan.recipe.calibration, plan.calibration
    if settings is None:
        return {}
    assert source is not None, f"{plan.recipe.name} has no calibration text"
    inputs: dict[str, Any] = {"text": source.source, "digest": source.revision}
    if source.on_hub:
        dataset = run.submit(download_dataset, name="download_calibration", **_dataset_inputs(plan.options, source))
        inputs = {"dataset": dataset}
    tokens = run.submit(calibrate, checkpoint=base, fidelity_text=text, **_calibrate_inputs(plan.recipe), **inputs)
    return {"calibration": tokens}


def _calibrate_inputs(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.calibration
    assert settings is not None, f"{recipe.name} has no calibration"
    counts = {"sequences": settings.sequences, "length": settings.length, "answers": settings.answers}
    return {**counts, "distilled": recipe.distillation.sequences if recipe.distillation else 0}


def _dataset_inputs(options: "RunOptions", source: ResolvedDataset) -> dict[str, Any]:
    inputs = {"source": source.source, "revision": source.revision, "offline": options.offline}
    return {**inputs, **_describe_dataset(options).file_inputs()}


def _describe_dataset(options: "RunOptions") -> Benchmark:
    """Return the calibration dataset as a benchmark, whose fields define which files are downloaded."""
    source = parse_source(options.calibration or "")
    return Benchmark(
        name="calibration", title="calibration", task="", dataset=source.name, metric="", files=source.patterns()
    )
