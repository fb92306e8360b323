"""The command line: run, diagnose, check, and prune. Its flags are the fields of the models in options.py."""

import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from inspect import BoundArguments
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError
from cyclopts.validators import Number
from pydantic import ValidationError

from quantize_gemma.flows.options import DiagnoseOptions, RunOptions
from quantize_gemma.flows.summary import Interrupted, Summary
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError

if TYPE_CHECKING:
    from quantize_gemma.flows.report import Terminal
    from quantize_gemma.tasks.models.benchmarks import Benchmark
    from quantize_gemma.tasks.models.resolved import ResolvedModel

HELP = """\
Turn a Gemma 3 checkpoint into a quantized, evaluated, on-device release.

For example:
  quantize-gemma run                                 try it on the tiny model
  quantize-gemma run --model google/gemma-3-4b-it --tasks mmlu,gsm8k
  quantize-gemma diagnose --model DIR                find what hurts quality
  quantize-gemma check --model DIR --recipe NAME     find errors before a run
  quantize-gemma prune                               clean up the store

Results are stored in $QUANTIZE_GEMMA_HOME [default: ~/.cache/quantize-gemma],
and the next run reuses them. Unless PREFECT_API_URL is set, each run starts a
local Prefect server and stops it at the end.

Exit codes: 0 success; 1 a stage or publishing failed, or the release failed the
gate; 2 invalid input, detected before any stage produced a result; 130
interrupted.
"""
# Flags that earlier versions had, and what to use instead.
REPLACED_FLAGS = {
    "--benchmark": "use --dataset mmlu=NAME",
    "--benchmark-revision": "use --dataset mmlu=NAME@REVISION",
    "--mmlu": "use --dataset mmlu=NAME",
    "--mmlu-revision": "use --dataset mmlu=NAME@REVISION",
    "--charts": "use --dataset chartqa=NAME, or --tasks without chartqa",
    "--charts-revision": "use --dataset chartqa=NAME@REVISION",
    "--chartqa": "use --dataset chartqa=NAME, or --tasks without chartqa",
    "--chartqa-revision": "use --dataset chartqa=NAME@REVISION",
    "--max-mmlu-drop": "use --limit-drop mmlu=POINTS",
    "--max-chartqa-drop": "use --limit-drop chartqa=POINTS",
    "--program-questions": "use --program-samples",
    "--backend": "programs are always lowered to XNNPACK",
    "--dtype": "programs always compute in float32",
    "--keep": "publishing only removes files that an earlier release wrote",
}

app = App(name="quantize-gemma", help=HELP, version=lambda: version("quantize-gemma"), help_format="plaintext")
AllOptions = Annotated[RunOptions, Parameter(name="*")]
DiagnosisOptions = Annotated[DiagnoseOptions, Parameter(name="*")]
OUTPUT = Group.create_ordered("Output")


def main() -> None:
    """Run the command line and exit with its code."""
    from quantize_gemma.flows.settings import ignore_working_directory, require_working_directory
    from quantize_gemma.tasks.runtime.redact import keep_secrets

    keep_secrets()
    try:
        command, arguments = parse(sys.argv[1:])
        if command in (run, diagnose, check, prune):
            ignore_working_directory()
        if command in (run, diagnose, check):
            require_working_directory()
        code = command(*arguments.args, **arguments.kwargs) or 0
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        code = _print_error(error)
        # The arguments are invalid, but the command and --json are known.
        summaries = {"run": Summary().to_json(), "diagnose": no_diagnosis()}
        if "--json" in sys.argv and sys.argv[1] in summaries:
            print(json.dumps({**summaries[sys.argv[1]], "error": str(error)}))
    sys.stdout.flush()
    sys.exit(code)


def parse(words: list[str]) -> tuple[Callable[..., Any], BoundArguments]:
    """Return the function that a command line calls, and its arguments.

    Raises:
        UserError: A command, a flag, or a value is invalid.
    """
    if not words:
        raise UserError("missing command: use run, diagnose, check, or prune; see `quantize-gemma --help`")
    for word in words:
        flag = word.partition("=")[0]
        if flag in REPLACED_FLAGS:
            raise UserError(f"{flag} was removed: {REPLACED_FLAGS[flag]}")
    try:
        command, arguments, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        cause = error.__cause__
        raise UserError(describe_invalid(cause) if isinstance(cause, ValidationError) else _sentence(error)) from None
    return command, arguments


def _sentence(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument: {' '.join(error.unused_tokens or [])}; see `quantize-gemma --help`"
    text = " ".join(str(error).split())
    return text if text.endswith("?") else f"{text.removesuffix('.')}; see `quantize-gemma --help`"


def describe_invalid(error: ValidationError) -> str:
    """Return the first validation error as one sentence that names the flag."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    name = next((part for part in first["loc"] if part in FLAGS), None)
    if name is None:
        return message
    return f"--{str(name).replace('_', '-')} {first['input']!r}: {message}"


def _flags(model: Any) -> set[str]:
    groups = [field.annotation for field in model.model_fields.values() if hasattr(field.annotation, "model_fields")]
    names = {name for name, field in model.model_fields.items() if field.annotation not in groups}
    return names.union(*map(_flags, groups))


FLAGS = frozenset(_flags(RunOptions))


@app.command
def run(
    *,
    options: AllOptions = RunOptions(),
    json_: Annotated[bool, Parameter(name="--json", negative=(), group=OUTPUT)] = False,
) -> int:
    """Run the whole pipeline: quantize, evaluate, export, and publish if a target is set.

    Args:
        json_: Print a summary of the run as one JSON object on the last line of stdout.
    """
    from quantize_gemma.flows.report import print_summary

    summary, code = _run_flow(options.check_inputs(), _load_run, dict(options), Summary().to_json())
    if summary["release"]:
        print_summary(summary)
    if json_:
        print(json.dumps(summary))
    return code


@app.command
def diagnose(
    *,
    options: DiagnosisOptions = DiagnoseOptions(),
    json_: Annotated[bool, Parameter(name="--json", negative=(), group=OUTPUT)] = False,
) -> int:
    """Show where a recipe does damage: quantize one module at a time, and measure the KL divergence.

    Args:
        json_: Print the results as one JSON object on the last line of stdout.
    """
    from quantize_gemma.flows.report import print_damage

    check_inputs = {**options.run_options().check_inputs(), "diagnosis": True}
    results, code = _run_flow(check_inputs, _load_diagnose, dict(options), no_diagnosis())
    if results["rows"]:
        print_damage(results)
    if json_:
        print(json.dumps(results))
    return code


@app.command
def check(*, options: AllOptions = RunOptions()) -> int:
    """Check the model, recipe, options, and machine without starting a run."""
    from quantize_gemma.flows.local_server import check_api
    from quantize_gemma.flows.report import Terminal
    from quantize_gemma.tasks.check import (
        check_config,
        check_disk,
        check_memory,
        check_run,
        disk_needed,
        mask_bytes,
        plan_calibration,
        supported_benchmarks,
        warn_about_time,
    )
    from quantize_gemma.tasks.download import read_config_on_hub, resolve_model
    from quantize_gemma.tasks.models.checkpoint import local_checkpoint, read_model_config
    from quantize_gemma.tasks.models.recipe import load_recipe
    from quantize_gemma.tasks.runtime import worker

    try:
        plan = check_run(**options.check_inputs())
        rows = _check_data(options)
        recipe = load_recipe(options.recipe)
        local = local_checkpoint(options.model)
        config = None
        if local is not None:
            config = read_model_config(local)
            function = "quantize_gemma.tasks.models.load_check:check_directory"
            arguments = {"checkpoint": str(local.absolute())}
            output = worker.run(function, arguments, lambda *_: None, Terminal().attach())
            supported_benchmarks(rows, config.multimodal, output["system_message"])
        else:
            # The Hub token may be in a Secret block on the Prefect server.
            check_api()
            model = resolve_model(options.model, options.revision, options.offline)
            supported_benchmarks(rows, model.multimodal)
            plan["disk_bytes_needed"] = disk_needed(model.weight_bytes, recipe=recipe)
            plan["memory_bytes_needed"] = check_memory(model.weights, options.local_workers())
            check_disk(model.weight_bytes, _missing_stages(options, model), model.revision, recipe)
            if not options.offline:
                config = read_config_on_hub(model)
                export = options.export
                check_config(config, export.max_seq_len, export.custom_kv_cache, export.bidirectional_images)
                masks = mask_bytes(config, export.max_seq_len, export.bidirectional_images)
                plan["memory_bytes_needed"] = check_memory(model.weights, options.local_workers(), masks)
        if config is not None:
            plan |= plan_calibration(config.text, recipe)
    except UserError as error:
        return _print_error(error)
    except StageFailed as error:
        _print_error(error)
        return 1
    print(", ".join(f"{name}: {value}" for name, value in plan.items()))
    if options.quantization_device() == "cpu" and (warning := warn_about_time(plan)) is not None:
        print(f"quantize-gemma: {warning}", file=sys.stderr)
    return 0


@app.command
def prune(
    *,
    max_gigabytes: Annotated[float, Parameter(validator=Number(gte=0, lt=math.inf))] | None = None,
    max_age_days: Annotated[float, Parameter(validator=Number(gte=0, lt=math.inf))] | None = None,
) -> int:
    """Remove unfinished results from the store, and results beyond a size or age limit.

    Args:
        max_gigabytes: Maximum size of the store in GB; least recently used results go first. [default: no limit]
        max_age_days: Maximum number of days since a result was last used. [default: no limit]
    """
    from quantize_gemma.tasks.runtime.pruning import evict, remove_unfinished, store_size
    from quantize_gemma.tasks.runtime.units import human_size

    try:
        unfinished = remove_unfinished()
        evicted = evict(_limit(max_gigabytes) * 1e9, _limit(max_age_days) * 86_400)
    except UserError as error:
        return _print_error(error)
    print(
        f"removed {len(unfinished.paths)} unfinished directories and {len(evicted.paths)} artifacts: freed "
        f"{human_size(unfinished.bytes + evicted.bytes)}; the store now takes {human_size(store_size())}"
    )
    return 0


def _limit(value: float | None) -> float:
    return math.inf if value is None else value


def _check_data(options: RunOptions) -> list["Benchmark"]:
    """Return the benchmarks. Raises UserError if a task does not exist, or a local dataset or text is missing.

    Names on the Hub are resolved when a run starts.
    """
    from quantize_gemma.tasks.builtin import BUILTIN
    from quantize_gemma.tasks.download import is_path, resolve_dataset, resolve_text
    from quantize_gemma.tasks.models.benchmarks import find_benchmark
    from quantize_gemma.tasks.models.checkpoint import local_checkpoint

    rows = [find_benchmark(name) for name in options.evaluation.benchmark_names(options.model in BUILTIN)]
    sources = options.evaluation.dataset_sources()
    for row in rows:
        source, revision = sources.get(row.name, (row.dataset, None))
        if is_path(source):
            resolve_dataset(row, source, revision, offline=True)
    source, revision = options.evaluation.text_source(fixture_model=False)
    if is_path(source):
        resolve_text(source, revision, offline=True)
    if (reference := options.evaluation.reference_source()) is not None:
        local_checkpoint(*reference)
    return rows


def _missing_stages(options: RunOptions, model: "ResolvedModel") -> list[str]:
    """Return the stages that would have to run because their results are not in the store."""
    from quantize_gemma.tasks.check import WRITING_STAGES, may_be_stored
    from quantize_gemma.tasks.models.recipe import load_recipe

    if not may_be_stored(model.weight_bytes):
        return list(WRITING_STAGES)
    # Imported here because importing Prefect takes seconds.
    from quantize_gemma.flows.plan import writing_stages
    from quantize_gemma.tasks.runtime.prefect_stage import missing_stages

    recipe = load_recipe(options.recipe)
    missing = missing_stages(writing_stages(options, model, recipe), [])
    # Whether the store has the others depends on the calibration text, which is resolved when a run starts.
    return missing if recipe.calibration is None else [*missing, "quantize", "distill", "export"]


def no_diagnosis() -> dict[str, Any]:
    """Return what `quantize-gemma diagnose --json` prints if the diagnosis did not start."""
    return {"rows": [], "heat_map": None, "stages": [], "error": None}


def _run_flow(
    check_inputs: dict[str, Any],
    load_flow: Callable[[], Callable[..., dict[str, Any]]],
    arguments: dict[str, Any],
    empty_summary: dict[str, Any],
) -> tuple[dict[str, Any], int]:
    """Run a flow; return its summary and the exit code, even if it fails or is interrupted.

    Args:
        check_inputs: The arguments of check_run(), which is called before anything starts.
        load_flow: Imports and returns the flow; the import takes seconds.
        arguments: The flow's parameters.
        empty_summary: The summary of a run that did nothing.
    """
    from quantize_gemma.flows.report import Terminal

    summary, code = empty_summary, 0
    terminal = Terminal()
    try:
        summary = _run_on_server(check_inputs, load_flow, arguments, terminal)
    except UserError as error:
        summary, code = {**summary, **error.summary, "error": str(error)}, 2
    except RunError as error:
        summary, code = {**summary, **error.summary, "error": str(error)}, 1
    except Interrupted as error:
        summary, code = {**summary, **error.summary}, 130
    except KeyboardInterrupt:
        summary, code = {**summary, "error": "interrupted"}, 130
    except Exception as error:
        summary, code = {**summary, "error": _explain_unexpected(error)}, 1
    # The terminal has already shown why a stage failed.
    if summary["error"] and not (code == 1 and terminal.has_shown(summary["error"])):
        print(f"quantize-gemma: {summary['error']}", file=sys.stderr)
    return summary, code


def _load_run() -> Callable[..., dict[str, Any]]:
    from quantize_gemma.flows.quantize_gemma import quantize_gemma

    return quantize_gemma


def _load_diagnose() -> Callable[..., dict[str, Any]]:
    from quantize_gemma.flows.diagnose import diagnose as diagnose_flow

    return diagnose_flow


def _run_on_server(
    check_inputs: dict[str, Any],
    load_flow: Callable[[], Callable[..., dict[str, Any]]],
    arguments: dict[str, Any],
    terminal: "Terminal",
) -> dict[str, Any]:
    """Run a flow on the configured Prefect API or on a local server; return its summary."""
    from quantize_gemma.tasks.check import check_run

    check_run(**check_inputs)
    # Prefect reads these once, when it is imported.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    # The terminal shows our own log lines; Prefect's go to its API and are shown in the UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # Do not report log lines that the API rejects: if the API is really down, the run fails and says why.
    logging.raiseExceptions = False
    terminal.attach()
    from quantize_gemma.flows.local_server import start_local_server

    server = start_local_server()
    if server:
        print(f"quantize-gemma: watch the run at {server.sign_in(sys.stderr)}", file=sys.stderr)
    # The server starts up during this import.
    flow = load_flow()
    if server:
        server.wait()
    return flow(**arguments)


def _explain_unexpected(error: Exception) -> str:
    """Return the message for an unexpected error, and print its traceback."""
    from quantize_gemma.tasks.runtime.disk import disk_failure
    from quantize_gemma.tasks.runtime.redact import redact
    from quantize_gemma.tasks.runtime.store import output_folders

    full_disk = disk_failure(error, *output_folders())
    if full_disk is None:
        # Our own bug, or a Prefect API that went down: the traceback helps to find the cause.
        print(redact(traceback.format_exc()), file=sys.stderr)
    return str(full_disk or redact(f"{type(error).__name__}: {error}"))


def _print_error(error: Exception) -> int:
    print(f"quantize-gemma: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
