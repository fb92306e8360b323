"""The flow that turns a Gemma 3 checkpoint into a measured on-device release."""

import json
from dataclasses import asdict
from typing import Any

from prefect import flow, runtime
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from quantize_gemma.flows.options import (
    EvaluationOptions,
    ExportOptions,
    Flag,
    GateOptions,
    ModelName,
    OptionalText,
    PublishingOptions,
    RunOptions,
    Text,
    Texts,
)
from quantize_gemma.flows.plan import (
    Plan,
    PlannedBenchmark,
    check_device_report,
    check_download,
    check_reference,
    download_inputs,
    export_inputs,
    make_plan,
    publishing_target,
)
from quantize_gemma.flows.quantization import submit_quantization
from quantize_gemma.flows.report import create_artifacts
from quantize_gemma.flows.run import Future, Run, start_run
from quantize_gemma.tasks.card import card
from quantize_gemma.tasks.download import download, download_dataset, download_text
from quantize_gemma.tasks.evaluate import evaluate
from quantize_gemma.tasks.evaluate.answer import answer
from quantize_gemma.tasks.evaluate.record import record
from quantize_gemma.tasks.export import export as export_program
from quantize_gemma.tasks.fidelity import fidelity
from quantize_gemma.tasks.fidelity.fidelity_base import fidelity_base
from quantize_gemma.tasks.fidelity.fidelity_program import PROGRAM_WINDOWS, fidelity_program
from quantize_gemma.tasks.fidelity.fidelity_quantized import fidelity_quantized
from quantize_gemma.tasks.gate import gate as judge_release
from quantize_gemma.tasks.gate.checks import compare_with_published, require_pass
from quantize_gemma.tasks.models.metrics import Metrics, parse_metrics, to_json
from quantize_gemma.tasks.models.tables import COLUMNS
from quantize_gemma.tasks.publish import publish, published_metrics
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef, open_artifact
from quantize_gemma.tasks.smoke import smoke
from quantize_gemma.tasks.untie import untie
from quantize_gemma.tasks.verify import verify
from quantize_gemma.tasks.verify.tokenizer import verify_tokenizer


@flow(name="quantize-gemma", flow_run_name="{model} {recipe}", persist_result=False, result_serializer="json")
def quantize_gemma(
    model: ModelName = "tiny-gemma3",
    recipe: Text = "HQQ-INT8-INT4",
    calibration: OptionalText = None,
    target: OptionalText = None,
    revision: OptionalText = None,
    refresh: Texts = (),
    offline: Flag = False,
    evaluation: EvaluationOptions = EvaluationOptions(),
    export: ExportOptions = ExportOptions(),
    gate: GateOptions = GateOptions(),
    publishing: PublishingOptions = PublishingOptions(),
) -> dict[str, Any]:
    """Quantize, measure, export, and publish one checkpoint.

    Its parameters are the fields of the form in Prefect's UI, and the parameters of the deployments.

    Args:
        model: Hub repository such as google/gemma-3-4b-it, local directory, or the built-in tiny-gemma3.
        recipe: Name of a built-in recipe, or path to a JSON recipe file.
        calibration: Text file, or Hub dataset such as org/name@revision:files, for a calibrated recipe. [default: none]
        target: Hub repository to publish the release to. [default: none, not published]
        revision: Branch, tag, or commit of the model repository. [default: the default branch]
        refresh: Stages to run again even if their results are cached. [default: none]
        offline: Use only what is already in the store, without contacting the Hub.
        evaluation: What the model is evaluated on, and where.
        export: How the quantized checkpoint is exported to an ExecuTorch program.
        gate: The limits that a release must meet before it is published.
        publishing: How the release is published, if a target is set.

    Returns:
        What `quantize-gemma run --json` prints.
    """
    options = RunOptions(
        model=model,
        recipe=recipe,
        calibration=calibration,
        target=target,
        revision=revision,
        refresh=refresh,
        offline=offline,
        evaluation=evaluation,
        export=export,
        gate=gate,
        publishing=publishing,
    )
    with start_run(f"{model} · {recipe}", refresh) as run:
        plan = make_plan(run, options)
        base = run.submit(download, **download_inputs(plan.model, offline))
        reference = submit_reference(run, plan)
        plan = check_download(run, plan, base)
        if reference is not None:
            check_reference(plan, base, reference)
        untied = run.submit(untie, checkpoint=base)
        text = run.submit(download_text, **download_inputs(plan.text, offline))
        quantized = submit_quantization(run, plan, base, untied, text)
        run.submit(smoke, checkpoint=quantized, max_new_tokens=evaluation.max_new_tokens)
        program = run.submit(export_program, checkpoint=quantized, **export_inputs(options))
        measure_fidelity(run, plan, text, base, quantized, program, reference)
        requests = [evaluate_columns(run, plan, benchmark, base, quantized, program) for benchmark in plan.benchmarks]
        run.submit(verify_tokenizer, checkpoint=quantized, requests=requests)
        run.submit(verify, exclusive=True, checkpoint=quantized, program=program, **plan.verify_inputs())
        check_device_report(plan, program)
        verdict = run.submit(judge_release, run_id=str(runtime.flow_run.id), **(plan.gate_inputs() | run.futures))
        inputs = plan.card_inputs(run.futures)
        release = run.submit(card, checkpoint=quantized, program=program, gate=verdict, **inputs)
        metrics = report_release(run, plan, release)
        check_release(run, plan, metrics)
        publish_release(run, plan, release)
    return run.summary.to_json()


def submit_reference(run: Run, plan: Plan) -> Future | None:
    """Submit the download of the reference model, if there is one."""
    if plan.reference is None:
        return None
    return run.submit(download, name="download_reference", **download_inputs(plan.reference, plan.options.offline))


def measure_fidelity(
    run: Run, plan: Plan, text: Future, base: Future, quantized: Future, program: Future, reference: Future | None
) -> None:
    """Submit the token-by-token comparison of checkpoint and program with the base model on text."""
    evaluation = plan.options.evaluation
    partition: dict[str, Any] = {"parts": evaluation.workers, "cluster": evaluation.cluster}
    states_inputs: dict[str, Any] = {"text": text, "windows": evaluation.windows(), "device": plan.device}
    base_inputs: dict[str, Any] = {"base": base}
    base_inputs["states"] = run.map(fidelity_base, "fidelity_base", **partition, checkpoint=base, **states_inputs)
    checkpoint_inputs: dict[str, Any] = {"checkpoint": quantized, "device": plan.device}
    tokens = run.map(fidelity_quantized, "fidelity_quantized", **partition, **checkpoint_inputs, **base_inputs)
    program_tokens = run.map(
        fidelity_program, "fidelity_program", **partition, program=program, windows=PROGRAM_WINDOWS, **base_inputs
    )
    distances: dict[str, Any] = {"quantized": tokens, "program": program_tokens}
    if reference is not None:
        base_inputs = {"base": reference}
        base_inputs["states"] = run.map(
            fidelity_base, "fidelity_reference_base", **partition, checkpoint=reference, **states_inputs
        )
        distances["reference"] = run.map(
            fidelity_quantized, "fidelity_reference", **partition, **checkpoint_inputs, **base_inputs
        )
    run.submit(fidelity, **distances)


def evaluate_columns(
    run: Run, plan: Plan, benchmark: PlannedBenchmark, base: Future, quantized: Future, program: Future
) -> Future:
    """Submit the evaluation of one benchmark: its requests are answered and scored for each column.

    Returns:
        The future of the requests.
    """
    row, evaluation = benchmark.row, plan.options.evaluation
    dataset = run.submit(
        download_dataset,
        name=f"download_{row.name}",
        **download_inputs(benchmark.dataset, plan.options.offline),
        **row.file_inputs(),
    )
    data: dict[str, Any] = {"dataset": dataset, "limit": evaluation.limit}
    requests = run.submit(record, name=f"record_{row.name}", checkpoint=base, benchmark=row.request_inputs(), **data)
    models: dict[str, dict[str, Future]] = {
        "base": {"checkpoint": base},
        "quantized": {"checkpoint": quantized},
        "program": {"checkpoint": quantized, "program": program},
        "no_act_quant": {"checkpoint": quantized},
    }
    for column in row.columns():
        inputs = plan.column_inputs(row, column)
        answers = run.map(
            answer,
            f"answer_{row.name}_{column}",
            evaluation.workers,
            evaluation.cluster,
            requests=requests,
            dataset=dataset,
            **models[column],
            **inputs,
        )
        run.submit(
            evaluate,
            name=f"evaluate_{row.name}_{column}",
            exclusive=True,
            requests=requests,
            answers=answers,
            benchmark=row.score_inputs(),
            device=inputs["device"],
            **data,
        )
    return requests


def report_release(run: Run, plan: Plan, release: PrefectFuture[ArtifactRef]) -> Metrics:
    """Wait for the release, show it in Prefect, and return its metrics."""
    ref = release.result()
    content: dict[str, object] = json.loads(store.read_file(open_artifact(ref), "metrics.json"))
    metrics = parse_metrics(content)
    plan.remember_revisions()
    # This path stays the same if the card is created again.
    path = store.path_of("card", ref.key)
    create_artifacts(path, metrics)
    get_run_logger().info("release: %s", path)
    run.summary.release = str(path)
    run.summary.metrics = {column: content[column] for column in COLUMNS}
    return metrics


def check_release(run: Run, plan: Plan, metrics: Metrics) -> None:
    """Put the gate's verdict into the summary. Raises GateFailed if the release does not pass."""
    required, regressions = plan.required_checks(), []
    if (target := publishing_target(plan.options)) is not None:
        published_content = run.call("read_published", published_metrics, target.repository, target.branch)
        regressions = compare_with_published(metrics, published_content, plan.options.gate.max_regression)
        required = [*required, *(check.name for check in regressions)]
    run.summary.gate = to_json(run.call("check_gate", require_pass, metrics, required, regressions))


def publish_release(run: Run, plan: Plan, release: PrefectFuture[ArtifactRef]) -> None:
    """Publish the release to the target, if there is one."""
    target, publishing = publishing_target(plan.options), plan.options.publishing
    if target is None:
        get_run_logger().info("publish: skipped, no target was set")
    else:
        publication = run.call(
            "publish", publish, open_artifact(release.result()), target, publishing.private, publishing.tag
        )
        run.summary.publication = asdict(publication)
        run.summary.published = publication.url
    if run.changed_nothing():
        run.rename(f"{plan.run_name()} unchanged")
