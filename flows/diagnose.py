"""The flow that measures where a recipe does damage: it quantizes one module at a time, its weights or its input."""

import json
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger

from quantize_gemma.flows.options import Count, DiagnoseOptions, Flag, ModelName, OptionalText, Text, Texts
from quantize_gemma.flows.plan import Plan, check_download, download_inputs, make_plan
from quantize_gemma.flows.quantization import stage_recipe, submit_quantization
from quantize_gemma.flows.report import show_image
from quantize_gemma.flows.run import start_run
from quantize_gemma.tasks.download import download, download_text
from quantize_gemma.tasks.fidelity.diagnose import HEAT_MAP
from quantize_gemma.tasks.fidelity.diagnose import diagnose as diagnose_modules
from quantize_gemma.tasks.models.text_fidelity import KINDS, damage_rows, parse_damage
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import open_artifact
from quantize_gemma.tasks.runtime.strict_json import JsonObject
from quantize_gemma.tasks.untie import untie


@flow(name="diagnose", flow_run_name="{model} {recipe}", persist_result=False, result_serializer="json")
def diagnose(
    model: ModelName = "tiny-gemma3",
    recipe: Text = "HQQ-INT8-INT4",
    revision: OptionalText = None,
    calibration: OptionalText = None,
    text: OptionalText = None,
    text_windows: Count = 2,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    refresh: Texts = (),
    offline: Flag = False,
) -> dict[str, Any]:
    """Measure the KL divergence from the base model that quantizing each module alone causes.

    Its parameters are the fields of the form in Prefect's UI, and the parameters of the deployment.

    Args:
        model: Hub repository such as google/gemma-3-4b-it, local directory, or the built-in tiny-gemma3.
        recipe: Name of a built-in recipe, or path to a JSON recipe file.
        revision: Branch, tag, or commit of the model repository. [default: the default branch]
        calibration: Text to calibrate on, for a calibrated recipe, as in a run. [default: none]
        text: Text to measure on: a file, or a mirror of WikiText-2. [default: as in a run]
        text_windows: Number of windows of that text; the first 256 tokens of each are used.
        device: Device; auto: a GPU if there is one.
        refresh: Stages to run again even if their results are cached. [default: none]
        offline: Use only what is already in the store, without contacting the Hub.

    Returns:
        What `quantize-gemma diagnose --json` prints.
    """
    options = DiagnoseOptions(
        model=model,
        recipe=recipe,
        revision=revision,
        calibration=calibration,
        text=text,
        text_windows=text_windows,
        device=device,
        refresh=refresh,
        offline=offline,
    ).run_options()
    with start_run(f"{model} · {recipe}", refresh) as run:
        plan = make_plan(run, options, diagnosis=True)
        base = run.submit(download, **download_inputs(plan.model, offline))
        plan = check_download(run, plan, base)
        untied = run.submit(untie, checkpoint=base)
        passages = run.submit(download_text, **download_inputs(plan.text, offline))
        quantized = submit_quantization(run, plan, base, untied, passages)
        damage = run.submit(
            diagnose_modules,
            base=base,
            checkpoint=quantized,
            text=passages,
            recipe=stage_recipe(plan.recipe),
            windows=text_windows,
            device=plan.device,
        )
        artifact = open_artifact(damage.result())
        plan.remember_revisions()
        results = json.loads(store.read_file(artifact, "results.json"))
        show_damage(artifact.path, results)
    return {**summarize(plan, artifact), **results, "stages": run.summary.to_json()["stages"], "error": None}


def summarize(plan: Plan, artifact: store.Artifact) -> dict[str, Any]:
    """Return the results of the diagnosis, and the path of the heat map."""
    return {
        "model": plan.model.name,
        "revision": plan.model.revision,
        "recipe": plan.recipe.name,
        "text": plan.text.name,
        # This path stays the same if the diagnosis is repeated.
        "heat_map": str(store.path_of("diagnose", artifact.key) / HEAT_MAP),
    }


def show_damage(folder: Path, results: JsonObject) -> None:
    """Show the tables and the heat map in Prefect's UI."""
    measurements = parse_damage(results["rows"])
    for kind in KINDS:
        description = f"KL divergence from quantizing the {kind} of one module alone, nats"
        create_table_artifact(key=f"damage-{kind}", table=damage_rows(measurements, kind), description=description)
    show_image(folder / HEAT_MAP, "KL divergence from quantizing one module alone, nats")
    worst = max(measurements, key=lambda damage: damage.weights)
    location = worst.role if worst.block is None else f"block {worst.block}, {worst.role}"
    get_run_logger().info("quantizing the weights of %s does the most damage: %.4f nats", location, worst.weights)
