"""The flow: a Gemma 3 checkpoint becomes a measured, on-device release of it."""

import json
from typing import Any

from prefect import flow, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.parameters import Parameters
from tasks import store
from tasks.card import card
from tasks.check import check_checkpoint, check_run
from tasks.download import download, resolve_model
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.gate import GateRefused, gate
from tasks.policies import open_record
from tasks.quantize import quantize
from tasks.recipe import load_recipe
from tasks.smoke import smoke, smoke_pte
from tasks.untie import untie
from tasks.upload import upload


@flow(name="quantize-gemma", persist_result=False, result_serializer="json")
def quantize_gemma(parameters: Parameters) -> dict[str, Any]:
    """Quantize, measure, export and publish one checkpoint; returns what `quantize-gemma run --json` prints."""
    p = parameters
    ran: dict[str, PrefectFuture[Any]] = {}

    def run(name: str, stage: Any, *after: PrefectFuture[Any], **inputs: Any) -> PrefectFuture[Any]:
        options = stage.with_options(
            task_run_name=name.replace("_", " "), refresh_cache=name in p.refresh, result_storage=store.home()
        )
        ran[name] = options.submit(**inputs, wait_for=after)
        return ran[name]

    recipe = load_recipe(p.recipe)
    task(name="check", persist_result=False)(check_run)(p.model, p.recipe, p.max_seq_len)
    model = task(name="resolve", persist_result=False, retries=3, retry_condition_fn=_not_the_users)(resolve_model)(
        p.model, p.revision
    )
    questions = {"benchmark": p.benchmark, "limit": p.limit, "batch_size": p.batch_size, "device": p.device}

    base = run("download", download, source=model["source"], revision=model["revision"])
    check_checkpoint(open_record(base.result()).path, recipe, p.max_seq_len)
    untied = run("untie", untie, checkpoint=base)
    quantized = run("quantize", quantize, checkpoint=untied, recipe=recipe)
    run("smoke", smoke, checkpoint=quantized, max_new_tokens=p.max_new_tokens)
    program = run("export", export, checkpoint=quantized, max_seq_len=p.max_seq_len)
    # One evaluation at a time beside the export: both take all the memory and cores that they find.
    before = run("evaluate_base", evaluate, checkpoint=base, **questions)
    run("evaluate_quantized", evaluate, before, checkpoint=quantized, **questions)
    run("smoke_program", smoke_pte, checkpoint=quantized, program=program, max_new_tokens=p.max_new_tokens)

    release = run("card", card, model=model_identity(model), recipe=recipe, max_seq_len=p.max_seq_len, **ran).result()
    folder = open_record(release).path
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    show(folder, metrics)
    summary = {
        "release": str(folder),
        "gate": None,
        "metrics": {name: metrics[name] for name in ("base", "quantized", "program") if name in metrics},
        "stages": [stage_summary(name, future) for name, future in ran.items()],
        "published": None,
    }
    try:
        summary["gate"] = gate(metrics, p.max_mmlu_drop, p.max_kl_ratio)
    except GateRefused as refusal:
        refusal.summary = {**summary, "gate": refusal.verdict}
        raise
    message = f"{recipe['name']} of {model['model']} at {model['revision'][:12]}"
    summary["published"] = upload(release, p.target, message)
    return summary


def model_identity(model: dict[str, Any]) -> dict[str, str]:
    """Returns what the card says of the base model: no path of this machine."""
    return {"model": model["model"], "revision": model["revision"]}


def stage_summary(name: str, future: PrefectFuture[Any]) -> dict[str, Any]:
    """Returns one line of the run: a stage's state, whether it came from the cache, its time and memory."""
    artifact = open_record(future.result())
    return {
        "name": name,
        "state": future.state.type.value,
        "cached": future.state.name == "Cached",
        "seconds": artifact.measured["seconds"],
        "peak_rss_bytes": artifact.measured["peak_rss_bytes"],
        "size_bytes": artifact.size,
        "key": artifact.key,
    }


def show(folder: Any, metrics: dict[str, Any]) -> None:
    """Puts the quality table, the chart, the card and the files into Prefect's UI."""
    import base64

    create_table_artifact(key="quality", table=quality_table(metrics), description="Base, checkpoint and program")
    chart = base64.b64encode((folder / "mmlu-by-subject.png").read_bytes()).decode()
    create_image_artifact(f"data:image/png;base64,{chart}", key="mmlu-by-subject", description="Accuracy per subject")
    create_markdown_artifact((folder / "README.md").read_text(encoding="utf-8"), key="card")
    create_link_artifact(folder.as_uri(), link_text="the release's files", key="release")
    get_run_logger().info("release: %s", folder)


def quality_table(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the rows base vs quantized vs program; what was not measured is empty."""
    from tasks.card import human_size

    columns = ("base", "quantized", "program")
    rows = [{"": "size", **{name: human_size(metrics[name]["bytes"]) for name in columns if name in metrics}}]
    scores = {name: metrics[name]["mmlu"] for name in columns if "mmlu" in metrics.get(name, {})}
    for name in scores:
        label = scores[name]["benchmark"]
        rows.append(
            {"": f"{label}, %"} | {k: f"{100 * v['accuracy']:.2f} ± {100 * v['stderr']:.2f}" for k, v in scores.items()}
        )
        break
    if "program" in metrics:
        agreement = metrics["program"]["agreement"]
        rows.append({"": "KL to the checkpoint, nats", "program": f"{agreement['kl_program']:.4f}"})
        rows.append({"": "KL of activation rounding, nats", "quantized": f"{agreement['kl_activation_noise']:.4f}"})
        rows.append({"": "same most likely token, %", "program": f"{100 * agreement['same_argmax']:.1f}"})
    return [{"": "", **dict.fromkeys(columns, ""), **row} for row in rows]


def _not_the_users(_task: Any, _run: Any, state: Any) -> bool:
    try:
        state.result()
    except store.UserError:
        return False
    except Exception:
        return True
    return False
