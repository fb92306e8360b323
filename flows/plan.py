"""The plan of a run: its names resolved and checked against the machine before any long stage starts."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.logging import get_run_logger

from quantize_gemma.flows.options import RunOptions, command_line
from quantize_gemma.flows.quantization import (
    plan_tokens,
    quantize_inputs,
    resolve_calibration,
    stage_recipe,
    without_distillation,
)
from quantize_gemma.tasks.check import (
    bytes_to_download,
    check_checkpoint,
    check_disk,
    check_memory,
    check_run,
    plan_calibration,
    supported_benchmarks,
    warn_about_time,
)
from quantize_gemma.tasks.download import (
    download,
    download_text,
    remember,
    resolve_dataset,
    resolve_model,
    resolve_text,
)
from quantize_gemma.tasks.export import export
from quantize_gemma.tasks.gate.checks import LIMITS, required_checks
from quantize_gemma.tasks.gate.metrics import LIBRARIES
from quantize_gemma.tasks.models.benchmarks import Benchmark, find_benchmark
from quantize_gemma.tasks.models.calibration import parse_source
from quantize_gemma.tasks.models.checkpoint import read_model_config
from quantize_gemma.tasks.models.device_report import DeviceReport, read_device_report, require_program
from quantize_gemma.tasks.models.recipe import Recipe, load_recipe, recipe_hash
from quantize_gemma.tasks.models.resolved import ResolvedDataset, ResolvedModel
from quantize_gemma.tasks.publish import Target, check_target
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.quantize.distill import distill
from quantize_gemma.tasks.runtime.artifact_ref import load_artifact, open_artifact
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.fingerprint import versions
from quantize_gemma.tasks.runtime.prefect_slots import check_limits
from quantize_gemma.tasks.runtime.prefect_stage import PlannedStage, missing_stages, stored_artifacts
from quantize_gemma.tasks.untie import untie

if TYPE_CHECKING:
    from prefect.futures import PrefectFuture

    from quantize_gemma.flows.run import Futures, Run
    from quantize_gemma.tasks.runtime.artifact_ref import ArtifactRef

Inputs = dict[str, Any]


@dataclass(frozen=True)
class PlannedBenchmark:
    """A benchmark of the run, with its resolved dataset.

    Attributes:
        row: The benchmark.
        dataset: The resolved dataset.
        requested_revision: The branch, tag, or commit that the options name.
    """

    row: Benchmark
    dataset: ResolvedDataset
    requested_revision: str | None


@dataclass(frozen=True)
class Plan:
    """The resolved inputs of a run.

    Attributes:
        options: The run's options.
        model: The resolved model.
        text: The text on which the release is compared with its base model.
        benchmarks: The benchmarks to evaluate.
        recipe: The recipe.
        device: Where the evaluation runs, "cpu" or "cuda".
        calibration: The resolved text or dataset for a calibrated recipe; None for any other recipe.
        reference: The resolved reference model; None if there is none.
        multimodal: Whether the model reads images; final once the checkpoint is downloaded.
        device_report: The program's speed on a phone; None if it was not measured.
    """

    options: RunOptions
    model: ResolvedModel
    text: ResolvedDataset
    benchmarks: tuple[PlannedBenchmark, ...]
    recipe: Recipe
    device: str
    calibration: ResolvedDataset | None = None
    reference: ResolvedModel | None = None
    multimodal: bool = True
    device_report: DeviceReport | None = None

    def column_inputs(self, row: Benchmark, column: str) -> Inputs:
        """Return the inputs of `answer` for one column of a benchmark, except for its artifacts."""
        evaluation = self.options.evaluation
        if column in ("base", "quantized"):
            exact = row.kind == "generate_until" and evaluation.batch_size == 1
            return {"device": self.device, "batch_size": evaluation.batch_size, "exact": exact}
        size = min(evaluation.program_samples, row.program_samples or evaluation.program_samples)
        return {"device": "cpu", "sample_size": size, "no_act_quant": column == "no_act_quant"}

    def verify_inputs(self) -> Inputs:
        """Return the inputs of `verify`, except for its artifacts."""
        options = self.options
        return {"max_seq_len": options.export.max_seq_len, "max_new_tokens": options.evaluation.max_new_tokens}

    def gate_inputs(self) -> Inputs:
        """Return the inputs of `gate`, except for its artifacts: the metadata of metrics.json, and the limits."""
        options = self.options
        return {
            "resolved": {
                "model": {**_dataset(self.model), "license": dict(self.model.license)},
                "datasets": {benchmark.row.name: _dataset(benchmark.dataset) for benchmark in self.benchmarks},
                "text": _dataset(self.text),
                "calibration": _dataset(self.calibration) if self.calibration else None,
                **({"reference": _name_and_revision(self.reference)} if self.reference else {}),
            },
            "benchmarks": {benchmark.row.name: benchmark.row.card_inputs() for benchmark in self.benchmarks},
            "recipe": stage_recipe(self.recipe),
            "required": self.required_checks(),
            "command": command_line(
                options,
                self.model,
                {benchmark.row.name: benchmark.dataset for benchmark in self.benchmarks},
                self.text,
                recipe_hash(self.recipe),
                self.calibration,
                self.reference,
            )
            + ("  # on a machine with a GPU" if options.evaluation.device == "auto" and self.device == "cuda" else ""),
            "limits": {**self.drop_limits(), **{name: getattr(options.gate, name) for name in LIMITS}},
            "versions": versions(LIBRARIES),
        }

    def card_inputs(self, futures: "Futures") -> Inputs:
        """Return the recipe, the device report, and the evaluations whose samples are published: all, or none."""
        publish_samples = self.options.publishing.publish_samples
        samples = {name: future for name, future in futures.items() if publish_samples and name.startswith("evaluate_")}
        report = dataclasses.asdict(self.device_report) if self.device_report else None
        return {"recipe": self.recipe.to_json(), "device_report": report, **samples}

    def drop_limits(self) -> dict[str, float]:
        """Return the limits on the drop of each benchmark that has one, by the limit's name."""
        limits = {
            benchmark.row.name: benchmark.row.max_drop for benchmark in self.benchmarks
        } | self.options.gate.drops()
        names = [benchmark.row.name for benchmark in self.benchmarks]
        return {f"max_{name}_drop": limit for name in names if (limit := limits[name]) is not None}

    def required_checks(self) -> list[str]:
        """Return the names of the gate's checks that every release of this run must have."""
        limited_benchmarks = [
            benchmark.row for benchmark in self.benchmarks if f"max_{benchmark.row.name}_drop" in self.drop_limits()
        ]
        return required_checks(self.multimodal, limited_benchmarks)

    def remember_revisions(self) -> None:
        """Record which commits the names resolved to, so that `--offline` finds them."""
        remember(self.model, self.options.revision)
        remember(self.text, self.options.evaluation.text_source(self.model.fixture)[1])
        for benchmark in self.benchmarks:
            remember(benchmark.dataset, benchmark.requested_revision)
        if self.calibration is not None:
            remember(self.calibration, parse_source(self.options.calibration or "").revision)
        if (source := self.options.evaluation.reference_source()) is not None and self.reference is not None:
            remember(self.reference, source[1])

    def run_name(self) -> str:
        """Return the name of the flow run."""
        return f"{self.options.model} {self.options.recipe} {self.model.revision[:12]}"


def make_plan(run: "Run", options: RunOptions, diagnosis: bool = False) -> Plan:
    """Resolve every name to a pinned revision, and check what can be checked before the download.

    Args:
        run: The run.
        options: Its options.
        diagnosis: Whether the run ends with the diagnosis of the quantized checkpoint: no benchmark is measured, and
            the recipe is not distilled.

    Raises:
        UserError: The run cannot succeed; the message says why, and what to do.
    """
    recipe = load_recipe(options.recipe)
    if diagnosis:
        # Modules are quantized one at a time, but distillation trains scales and norms together.
        recipe = without_distillation(recipe)
    path = options.evaluation.device_report
    report = read_device_report(Path(path)) if path is not None else None
    device: str = run.call("check", check_run, **options.check_inputs(), diagnosis=diagnosis)["device"]
    check_limits()
    if (target := publishing_target(options)) is not None:
        run.call("check_target", check_target, target)
    model = run.call("resolve_model", resolve_model, options.model, options.revision, options.offline)
    source, revision = options.evaluation.text_source(model.fixture)
    text = run.call("resolve_text", resolve_text, source, revision, options.offline)
    calibration = resolve_calibration(run, options)
    reference = resolve_reference(run, options)
    planned_benchmarks = () if diagnosis else plan_benchmarks(run, options, model)
    plan = Plan(options, model, text, planned_benchmarks, recipe, device, calibration, reference, device_report=report)
    run.rename(plan.run_name())
    check_memory(max(checkpoint.weights for checkpoint in (model, reference) if checkpoint), options.local_workers())
    stages = writing_stages(options, model, recipe, text, calibration, diagnosis)
    check_space(plan, stages)
    if report is not None and (program := stored_artifacts(stages).get("export")) is not None:
        require_program(report, load_artifact(program).files["model.pte"].sha256)
    return plan


def check_space(plan: Plan, stages: list[PlannedStage]) -> None:
    """Raise UserError if the store's disk does not have enough space for these stages and the reference model."""
    model, reference, refresh = plan.model, plan.reference, plan.options.refresh
    reference_bytes = 0
    if reference is not None:
        planned = PlannedStage(download, download_inputs(reference, plan.options.offline))
        if "download_reference" in refresh or not stored_artifacts([planned]):
            reference_bytes = bytes_to_download(reference.weight_bytes, reference.revision)
    check_disk(model.weight_bytes, missing_stages(stages, refresh), model.revision, plan.recipe, reference_bytes)


def resolve_reference(run: "Run", options: RunOptions) -> ResolvedModel | None:
    """Return the resolved reference model; None if there is none."""
    source = options.evaluation.reference_source()
    if source is None:
        return None
    resolved: ResolvedModel = run.call("resolve_reference_model", resolve_model, *source, options.offline)
    return resolved


def check_reference(plan: Plan, base: "PrefectFuture[ArtifactRef]", reference: "PrefectFuture[ArtifactRef]") -> None:
    """Raise UserError if the two models tokenize differently, because they could not be compared token by token."""
    paths = [open_artifact(future.result()).path for future in (base, reference)]
    sizes = [read_model_config(path).text.vocab_size for path in paths]
    # The rest of the file, such as the chat template's tokens, does not affect how text is tokenized.
    vocabularies = [json.loads((path / "tokenizer.json").read_bytes())["model"] for path in paths]
    if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"the reference model's vocabulary differs from that of {plan.model.name}: use a model with the same "
            "vocabulary, or leave out --reference-model"
        )


def plan_benchmarks(run: "Run", options: RunOptions, model: ResolvedModel) -> tuple[PlannedBenchmark, ...]:
    """Resolve the benchmarks' datasets; skip benchmarks with images if the model is text-only.

    The built-in model is evaluated on the built-in fixtures where there are any.
    """
    names = options.evaluation.benchmark_names(model.fixture)
    rows = supported_benchmarks([find_benchmark(name) for name in names], model.multimodal)
    sources = options.evaluation.dataset_sources()
    benchmarks = []
    for row in rows:
        default_source = row.fixture if model.fixture and row.fixture else row.dataset
        source, revision = sources.get(row.name, (default_source, None))
        dataset = run.call(f"resolve_{row.name}", resolve_dataset, row, source, revision, options.offline)
        benchmarks.append(PlannedBenchmark(row, dataset, revision))
    return tuple(benchmarks)


def publishing_target(options: RunOptions) -> Target | None:
    """Return where the release is published; None if it is not."""
    publishing = options.publishing
    return Target(options.target, publishing.branch, publishing.create_pr, publishing.adopt) if options.target else None


def check_download(run: "Run", plan: Plan, base: "PrefectFuture[ArtifactRef]") -> Plan:
    """Check the downloaded checkpoint, and return the plan without images if the model is text-only.

    Stages run one at a time from here on if the models and the program need too much memory together.

    Raises:
        UserError: The checkpoint is damaged, or does not fit the recipe, the options, or this machine.
    """
    artifact = open_artifact(base.result())
    config = read_model_config(artifact.path)
    export_options = plan.options.export
    workers = plan.options.local_workers()
    memory = check_checkpoint(
        artifact.path,
        plan.recipe,
        export_options.max_seq_len,
        export_options.custom_kv_cache,
        workers,
        export_options.bidirectional_images,
    )
    if plan.reference is not None:
        memory = max(memory, check_memory(plan.reference.weights, workers))
    run.fit_into_memory(memory // workers, workers)
    _log_costs(plan, plan_calibration(config.text, plan.recipe))
    rows = [benchmark.row for benchmark in plan.benchmarks]
    rows = supported_benchmarks(rows, config.multimodal, artifact.metadata["system_message"])
    benchmarks = tuple(benchmark for benchmark in plan.benchmarks if benchmark.row in rows)
    return dataclasses.replace(plan, multimodal=config.multimodal, benchmarks=benchmarks)


def check_device_report(plan: Plan, program: "PrefectFuture[ArtifactRef]") -> None:
    """If there is a device report, wait for the program. Raises UserError if the report is for another program."""
    if plan.device_report is not None:
        require_program(plan.device_report, open_artifact(program.result()).files["model.pte"].sha256)


def _log_costs(plan: Plan, costs: dict[str, int]) -> None:
    """Log the estimated time and memory of calibration and distillation on the CPU."""
    uses_gpu = plan.options.quantization_device() == "cuda"
    for step in ("calibration", "distillation"):
        if f"{step}_seconds" not in costs or uses_gpu:
            continue
        minutes, memory = costs[f"{step}_seconds"] / 60, costs[f"{step}_memory_bytes"] / 1e9
        get_run_logger().info("%s takes about %.0f minutes and %.1f GB of memory", step, max(minutes, 1), memory)
    if not uses_gpu and (warning := warn_about_time(costs)) is not None:
        get_run_logger().warning(warning)
    if "distillation_seconds" in costs:
        minutes = max(costs["distillation_seconds_on_gpu"] / 60, 1)
        get_run_logger().info("with --device cuda, distillation takes about %.0f minutes on an NVIDIA H200", minutes)


def download_inputs(source: ResolvedDataset, offline: bool) -> Inputs:
    """Return the inputs of a download stage."""
    return {"source": source.source, "revision": source.revision, "offline": offline}


def export_inputs(options: RunOptions) -> Inputs:
    """Return the inputs of `export`, except for the checkpoint."""
    return options.export.model_dump()


def writing_stages(
    options: RunOptions,
    model: ResolvedModel,
    recipe: Recipe,
    text: ResolvedDataset | None = None,
    calibration: ResolvedDataset | None = None,
    diagnosis: bool = False,
) -> list[PlannedStage]:
    """Return the stages that write the most, and the stages that they depend on.

    Without the calibration text of a calibrated recipe, return only the stages before calibration; for a diagnosis,
    only those up to the quantized checkpoint.
    """
    stages = [
        PlannedStage(download, download_inputs(model, options.offline)),
        PlannedStage(untie, {}, {"checkpoint": "download"}),
    ]
    artifacts = {"checkpoint": "untie"}
    if recipe.calibration is not None:
        if text is None or calibration is None:
            return stages
        stages.append(PlannedStage(download_text, download_inputs(text, options.offline)))
        stages += plan_tokens(options, recipe, calibration)
        artifacts["calibration"] = "calibrate"
    stages.append(PlannedStage(quantize, quantize_inputs(options, without_distillation(recipe)), artifacts))
    if diagnosis:
        return stages
    if recipe.distillation is not None:
        artifacts = {"checkpoint": "quantize", "base": "untie", "calibration": "calibrate"}
        stages.append(PlannedStage(distill, quantize_inputs(options, recipe), artifacts))
    last = stages[-1].stage.name
    return [*stages, PlannedStage(export, export_inputs(options), {"checkpoint": last})]


def _dataset(source: ResolvedDataset) -> Inputs:
    """Return the fields of a dataset that go into metrics.json."""
    return {"name": source.name, "revision": source.revision, "fixture": source.fixture}


def _name_and_revision(model: ResolvedModel) -> Inputs:
    return {"name": model.name, "revision": model.revision}
