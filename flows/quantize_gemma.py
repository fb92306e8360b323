"""The flow: a Gemma 3 checkpoint becomes a measured, on-device release of it."""

import base64
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from quantize_gemma.flows.options import Parameters, command_line, taking_parameters
from quantize_gemma.flows.summary import Interrupted, empty_summary
from quantize_gemma.tasks.card import card
from quantize_gemma.tasks.check import check_checkpoint, check_disk, check_memory, check_run, disk_needed
from quantize_gemma.tasks.download import (
    download,
    download_chartqa,
    download_mmlu,
    remember,
    resolve_benchmark,
    resolve_model,
)
from quantize_gemma.tasks.evaluate import evaluate_mmlu
from quantize_gemma.tasks.evaluate.charts import evaluate_chartqa
from quantize_gemma.tasks.evaluate.program import evaluate_program
from quantize_gemma.tasks.export import export
from quantize_gemma.tasks.gate import gate
from quantize_gemma.tasks.gate.checks import LIMITS, GateRefused, compare_with_published, require_pass, required_checks
from quantize_gemma.tasks.gate.metrics import LIBRARIES
from quantize_gemma.tasks.models.checkpoint import read_config
from quantize_gemma.tasks.models.metrics import Metrics, parse_metrics, to_json
from quantize_gemma.tasks.models.recipe import load_recipe, recipe_hash
from quantize_gemma.tasks.models.tables import quality_rows, verdict_rows
from quantize_gemma.tasks.publish import Target, check_target, publish, published_metrics
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime import machine, store, worker
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError
from quantize_gemma.tasks.runtime.fingerprint import versions
from quantize_gemma.tasks.runtime.patches.private_api import retry_refused_connections
from quantize_gemma.tasks.runtime.prefect_stage import as_task, failure_of, missing, open_record, retried
from quantize_gemma.tasks.runtime.redact import redact, redact_logs
from quantize_gemma.tasks.runtime.stage import Stage
from quantize_gemma.tasks.smoke import smoke, smoke_program
from quantize_gemma.tasks.untie import untie


@flow(
    name="quantize-gemma",
    flow_run_name="{model} {recipe}",
    persist_result=False,
    result_serializer="json",
)
@taking_parameters
def quantize_gemma(**given: Any) -> dict[str, Any]:
    """Quantize, measure, export and publish one checkpoint; returns what `quantize-gemma run --json` prints."""
    redact_logs()
    p = Parameters(**given)
    retry_refused_connections()
    run = Run(p.refresh, f"{p.model} · {p.recipe}")
    with run.explained(), worker.ended_on_interrupt():
        recipe = load_recipe(p.recipe)
        checked = (p.max_seq_len, p.device, p.cluster, p.custom_kv_cache, p.workers)
        plan = run.light("check", check_run, p.model, p.recipe, *checked)
        if p.target:
            run.light("check target", check_target, Target(p.target, p.branch, p.create_pr, p.adopt))
        model = run.light("resolve", resolve_model, p.model, p.revision, p.offline)
        benchmark = run.light("resolve benchmark", resolve_benchmark, p.benchmark, p.benchmark_revision, p.offline)
        charts = None
        if p.chart_benchmark():
            charts = run.light("resolve charts", resolve_benchmark, p.chart_benchmark(), p.charts_revision, p.offline)
        name = f"{p.model} {p.recipe} {model['revision'][:12]}"
        rename_run(name)
        workers = p.workers if p.cluster is None else 1
        check_memory(model["weights"], workers)
        check_disk(model["weight_bytes"], missing(chain(p, model, recipe), p.refresh), model["revision"])
        run.one_at_a_time = disk_needed(model["weight_bytes"]) * workers > machine.available_memory() / 4

        base = run.stage("download", download, **origin(model, p.offline))
        files = open_record(base.result()).path
        check_checkpoint(files, recipe, p.max_seq_len, p.custom_kv_cache, workers)
        asked = run.stage("download_mmlu", download_mmlu, **origin(benchmark, p.offline))
        untied = run.stage("untie", untie, checkpoint=base)
        quantized = run.stage("quantize", quantize, checkpoint=untied, **quantizing(p, recipe))
        run.stage("smoke", smoke, checkpoint=quantized, max_new_tokens=p.max_new_tokens)
        settings: dict[str, Any] = {"questions": asked, "limit": p.limit, "device": plan["device"]}
        settings |= {"batch_size": p.batch_size, "workers": p.workers, "cluster": p.cluster}
        asked_base = run.stage("evaluate_mmlu_base", evaluate_mmlu, checkpoint=base, **settings)
        after = run.stage("evaluate_mmlu_quantized", evaluate_mmlu, asked_base, checkpoint=quantized, **settings)
        if charts and "vision_config" not in read_config(files):
            get_run_logger().info("charts: skipped, the model reads no pictures")
            charts = None
        if charts:
            settings["questions"] = run.stage("download_chartqa", download_chartqa, **origin(charts, p.offline))
            del settings["batch_size"]
            after_base = run.stage("evaluate_chartqa_base", evaluate_chartqa, after, checkpoint=base, **settings)
            after = run.stage(
                "evaluate_chartqa_quantized", evaluate_chartqa, after_base, checkpoint=quantized, **settings
            )
        program = run.stage("export", export, checkpoint=quantized, **exporting(p))
        run.stage(
            "smoke_program",
            smoke_program,
            after,
            checkpoint=quantized,
            program=program,
            max_seq_len=p.max_seq_len,
            max_new_tokens=p.max_new_tokens,
        )
        run.stage(
            "evaluate_program",
            evaluate_program,
            checkpoint=quantized,
            program=program,
            questions=asked,
            answered=run.futures["evaluate_mmlu_quantized"],
            sample_size=p.program_questions,
        )
        required = required_checks("vision_config" in read_config(files), charts is not None, False)
        gated = run.stage(
            "gate",
            gate,
            resolved={
                "model": {name: model[name] for name in ("name", "revision", "fixture", "license")},
                "benchmark": named(benchmark),
                "chartqa": named(charts) if charts else None,
            },
            recipe=recipe,
            limits={name: getattr(p, name) for name in LIMITS},
            required=required,
            command=command_line(p, model, benchmark, charts, recipe_hash(recipe)),
            versions=versions(LIBRARIES),
            run_id=str(runtime.flow_run.id),
            **run.futures,
        )
        release = run.stage("card", card, recipe=recipe, checkpoint=quantized, program=program, gate=gated).result()
        remember(model, p.revision)
        remember(benchmark, p.benchmark_revision)
        if charts:
            remember(charts, p.charts_revision)
        artifact = open_record(release)
        metrics = parse_metrics(json.loads(store.read_file(artifact, "metrics.json")))
        # The path that stays when the card is made again, unlike the generation's.
        folder = store.path_of("card", release["key"])
        show(folder, metrics)
        run.summary["release"] = str(folder)
        run.summary["metrics"] = {name: to_json(metrics)[name] for name in ("base", "quantized", "program")}
        regression = None
        if p.target:
            required = [*required, "regression"]
            before = run.light("published", published_metrics, p.target, p.branch)
            regression = compare_with_published(metrics, before, p.max_regression)
        run.summary["gate"] = to_json(run.light("check gate", require_pass, metrics, required, regression))
        if p.target is None:
            get_run_logger().info("upload: skipped, no target was given")
        else:
            target = Target(p.target, p.branch, p.create_pr, p.adopt)
            run.summary["publication"] = asdict(run.light("upload", publish, artifact, target, p.private, p.tag))
            run.summary["published"] = run.summary["publication"]["url"]
        if run.changed_nothing():
            rename_run(f"{name} unchanged")
    return run.summary


def rename_run(name: str) -> None:
    """Gives this flow run a name that says what it works on, once that is known."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(runtime.flow_run.id, name=name)


def named(resolved: dict[str, Any]) -> dict[str, Any]:
    """Returns what the card says of a benchmark."""
    return {name: resolved[name] for name in ("name", "revision", "fixture")}


def quantizing(p: Parameters, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns how the checkpoint is quantized."""
    # The same bytes everywhere, unless a GPU is asked for: it adds up in another order.
    return {"recipe": recipe, "device": "cuda" if p.device == "cuda" and p.cluster is None else "cpu"}


def exporting(p: Parameters) -> dict[str, Any]:
    """Returns how the program is made."""
    lowered = ("max_seq_len", "backend", "dtype", "custom_sdpa", "custom_kv_cache", "last_logits_only")
    return {name: getattr(p, name) for name in lowered}


def chain(p: Parameters, model: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[Stage[...], dict[str, Any]]]:
    """Returns the stages that write much, with what each takes beside the checkpoint of the one before."""
    stages = (download, untie, quantize, export)
    return list(zip(stages, (origin(model, p.offline), {}, quantizing(p, recipe), exporting(p)), strict=True))


def origin(resolved: dict[str, Any], offline: bool) -> dict[str, Any]:
    """Returns where a download comes from."""
    return {"source": resolved["source"], "revision": resolved["revision"], "offline": offline}


class Run:
    """One run's stages and what came of them. `summary` is what `quantize-gemma run --json` prints."""

    def __init__(self, refresh: list[Any], label: str) -> None:
        self.refresh = refresh
        self.label = label
        self.futures: dict[str, PrefectFuture[Any]] = {}
        self.one_at_a_time = False
        self.summary = empty_summary()

    def stage(self, name: str, stage: Stage[...], *after: PrefectFuture[Any], **inputs: Any) -> PrefectFuture[Any]:
        """Submits a stage. Where memory allows only one at a time, it waits for all before it."""
        options = as_task(stage).with_options(
            task_run_name=f"{name.replace('_', ' ')} · {self.label}",
            refresh_cache=name in self.refresh,
            result_storage=store.home(),
        )
        before = [*after, *(list(self.futures.values()) if self.one_at_a_time else [])]
        self.futures[name] = options.submit(**inputs, wait_for=before)
        return self.futures[name]

    def light(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Runs, as a task of this process, what takes seconds and leaves no artifact; returns its value."""
        started = time.monotonic()
        state = "FAILED"
        try:
            value = task(name=name, task_run_name=f"{name} · {self.label}", persist_result=False, **retried(3))(work)(
                *arguments
            )
            state = "COMPLETED"
        finally:
            line = {"state": state, "cached": False, "seconds": round(time.monotonic() - started, 2)}
            self.summary["stages"].append({"name": name, **line, "peak_rss_bytes": None, "size_bytes": 0, "key": None})
        return value

    def changed_nothing(self) -> bool:
        """Tells whether every stage came from the cache and nothing was published that was not there before."""
        publication = self.summary["publication"]
        cached = all(future.state.name == "Cached" for future in self.futures.values())
        return cached and (publication is None or publication["state"] == "already published")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Fills the summary however the run ends, and raises what made the first stage fail instead of what followed.

        A stage whose input failed never starts, and says only that. A user's mistake is one only as long as nothing
        was made: what the Hub refuses after hours is what failed.
        """
        try:
            yield
        except Exception as error:
            cause = self._failure(error)
            if isinstance(cause, GateRefused):
                self.summary["gate"] = to_json(cause.verdict)
            self.summary["error"] = redact(str(cause))
            cause.summary = self.summary
            raise cause from error
        except KeyboardInterrupt:
            self.summary["error"] = "interrupted"
            raise Interrupted(self.summary) from None
        finally:
            lines = [stage_summary(name, future) for name, future in self.futures.items()]
            self.summary["stages"] = sorted(
                [*self.summary["stages"], *lines],
                key=lambda line: line["name"] in ("published", "check gate", "upload"),
            )

    def _failure(self, error: Exception) -> RunError:
        """Returns what the run ends with: the failure of the first stage that failed, else the error."""
        # Whatever does not need the failed stage comes to its end first: the next run finds it done.
        for future in self.futures.values():
            future.wait()
        cause: BaseException = error
        name = next((line["name"] for line in self.summary["stages"] if line["state"] == "FAILED"), None)
        for stage, future in self.futures.items():
            if future.state.is_failed() or future.state.is_crashed():
                name, cause = stage.replace("_", " "), failure_of(future.state) or error
                break
        made = any(future.state.is_completed() and future.state.name != "Cached" for future in self.futures.values())
        if isinstance(cause, GateRefused) or (isinstance(cause, UserError) and not made and name != "upload"):
            return cause
        cause = store.disk_failure(cause, *worker.disks()) or cause
        said = str(cause) if isinstance(cause, RunError) else redact(f"{type(cause).__name__}: {cause}")
        return StageFailed(f"{name}: {said}" if name else said)


def stage_summary(name: str, future: PrefectFuture[Any]) -> dict[str, Any]:
    """Returns one line of the run: a stage's state, whether it came from the cache, its time and memory."""
    line: dict[str, Any] = {"name": name, "state": "UNKNOWN", "cached": False}
    nothing = {"seconds": None, "peak_rss_bytes": None, "size_bytes": 0, "key": None}
    try:
        state = future.state
        line |= {"state": state.type.value, "cached": state.name == "Cached"}
        artifact = open_record(future.result()) if state.is_completed() else None
    except Exception:
        # The API or the artifact is gone: what the run ends with is said all the same.
        artifact = None
    if artifact is None:
        return line | nothing
    return {
        **line,
        "seconds": artifact.measured["seconds"],
        "peak_rss_bytes": artifact.measured["peak_rss_bytes"],
        "size_bytes": artifact.size,
        "key": artifact.key,
    }


def show(folder: Path, metrics: Metrics) -> None:
    """Put the quality table, the gate's checks, the chart, the card and the files into Prefect's UI."""
    create_table_artifact(key="quality", table=quality_rows(metrics), description="Base, checkpoint and program")
    create_table_artifact(key="gate", table=verdict_rows(metrics.gate.checks), description="The gate's checks")
    # Without its YAML header, which is for machines, and with the chart in it.
    text = (folder / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]
    if (folder / "mmlu-by-subject.png").exists():
        chart = "data:image/png;base64," + base64.b64encode((folder / "mmlu-by-subject.png").read_bytes()).decode()
        create_image_artifact(chart, key="mmlu-by-subject", description="Accuracy per subject")
        text = text.replace("(mmlu-by-subject.png)", f"({chart})")
    create_markdown_artifact(text, key="card")
    create_link_artifact(folder.as_uri(), link_text="the release's files", key="release")
    get_run_logger().info("release: %s", folder)
