"""The command line: `quantize-gemma run | check | prune`."""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import traceback
from typing import Any, Literal, NoReturn, get_args, get_origin

from quantize_gemma.flows.summary import Interrupted, empty_summary
from quantize_gemma.tasks.runtime.errors import RunError, StageFailed, UserError

DESCRIPTION = """\
Turn a Gemma 3 checkpoint into a quantized, measured, on-device release of it.

  quantize-gemma run                                   try it on the built-in tiny model
  quantize-gemma run --model google/gemma-3-4b-it --benchmark cais/mmlu
  quantize-gemma check --model DIR --recipe NAME       say what is wrong before anything starts
  quantize-gemma prune                                 remove what died half-way from the store

Results live in $QUANTIZE_GEMMA_HOME (default ~/.cache/quantize-gemma) and are found again by the next run. Without
PREFECT_API_URL a local Prefect server is started for the run and stopped after it.
Exit codes: 0 done; 1 a stage or the upload failed, or the gate refused; 2 a mistake in what was asked for, found before
anything was made; 130 interrupted.
"""


def main() -> None:
    """Runs the command line and exits with its code."""
    from quantize_gemma.flows.settings import ignore_working_directory, require_working_directory

    verbs = {"run": _run, "check": _check, "prune": _prune}
    try:
        arguments = _parser().parse_args()
        ignore_working_directory()
        if arguments.verb != "prune":
            require_working_directory()
        code = verbs[arguments.verb](arguments)
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        code = _refuse(error)
        # What was meant could not be read to its end, this could.
        if sys.argv[1:2] == ["run"] and "--json" in sys.argv:
            print(json.dumps({**empty_summary(), "error": str(error)}))
    sys.stdout.flush()
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without all that could have been given instead."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    from quantize_gemma.flows.options import Parameters

    parser = _Parser(
        prog="quantize-gemma", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="run | check | prune")
    run = verbs.add_parser("run", help="run the whole flow")
    check = verbs.add_parser("check", help="check model, recipe and machine; start nothing")
    prune = verbs.add_parser("prune", help="remove what died half-way, and what was not used for long")
    for name, text in (
        ("--max-gigabytes", "what the store may take of the disk at most"),
        ("--max-age-days", "for how long an artifact may stay unused"),
    ):
        prune.add_argument(name, type=_limit, default=math.inf, metavar="NUMBER", help=f"{text}, from 0 on")
    for verb, names in (
        (run, list(Parameters.model_fields)),
        (
            check,
            [
                "model",
                "revision",
                "recipe",
                "max_seq_len",
                "custom_sdpa",
                "custom_kv_cache",
                "device",
                "cluster",
                "workers",
            ],
        ),
    ):
        for name in names:
            field = Parameters.model_fields[name]
            how: dict[str, Any] = {"metavar": "X"}
            shown = "" if field.default is None else f" [{field.default}]"
            if field.annotation is bool:
                how = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
                shown = ""
            elif get_origin(field.annotation) is list:
                how, shown = {"metavar": "X", "nargs": "*"}, ""
            elif get_origin(field.annotation) is Literal:
                how = {"metavar": "|".join(get_args(field.annotation))}
            text = f"{field.description}{shown}"
            verb.add_argument(f"--{name.replace('_', '-')}", help=text, default=argparse.SUPPRESS, **how)
    run.add_argument("--keep", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    run.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from quantize_gemma.flows.local_server import check_api
    from quantize_gemma.tasks.check import check_disk, check_memory, check_run, disk_needed
    from quantize_gemma.tasks.download import resolve_model
    from quantize_gemma.tasks.models.checkpoint import local_checkpoint
    from quantize_gemma.tasks.runtime import worker

    try:
        p = _parameters(arguments)
        how = (p.max_seq_len, p.device, p.cluster, p.custom_kv_cache, p.workers)
        plan = check_run(p.model, p.recipe, *how)
        local = local_checkpoint(p.model)
        if local is not None:
            directory = {"checkpoint": str(local.absolute())}
            worker.run(
                "quantize_gemma.tasks.models.load_check:check_directory",
                directory,
                lambda *_: None,
                _log_to(_Terminal()),
            )
        else:
            # The token may be there.
            check_api()
            model = resolve_model(p.model, p.revision, p.offline)
            plan["disk_bytes_needed"] = disk_needed(model["weight_bytes"])
            plan["memory_bytes_needed"] = check_memory(model["weights"], p.workers if p.cluster is None else 1)
            check_disk(model["weight_bytes"], _stages_to_run(p, model), model["revision"])
    except UserError as error:
        return _refuse(error)
    except StageFailed as error:
        _refuse(error)
        return 1
    print(", ".join(f"{name}: {value}" for name, value in plan.items()))
    return 0


def _stages_to_run(p: Any, model: dict[str, Any]) -> list[str]:
    from quantize_gemma.tasks.check import WRITTEN, may_be_stored
    from quantize_gemma.tasks.models.recipe import load_recipe

    if not may_be_stored(model["weight_bytes"]):
        return list(WRITTEN)
    # Late, for Prefect takes seconds to be imported.
    from quantize_gemma.flows.quantize_gemma import chain
    from quantize_gemma.tasks.runtime.prefect_stage import missing

    return missing(chain(p, model, load_recipe(p.recipe)), [])


def _prune(arguments: argparse.Namespace) -> int:
    from quantize_gemma.tasks.runtime.errors import UserError
    from quantize_gemma.tasks.runtime.store import evict, prune, size_of
    from quantize_gemma.tasks.runtime.units import human_size

    try:
        removed = prune()
        evicted = evict(arguments.max_gigabytes * 1e9, arguments.max_age_days * 86_400)
    except UserError as error:
        return _refuse(error)
    print(
        f"removed {len(removed.paths)} unfinished directories and {len(evicted.paths)} artifacts, which freed "
        f"{human_size(removed.bytes + evicted.bytes)}; {human_size(size_of())} are left"
    )
    return 0


def _limit(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return number


def _run(arguments: argparse.Namespace) -> int:
    summary, code = empty_summary(), 0
    terminal = _Terminal()
    try:
        summary = _run_flow(arguments, terminal)
    except UserError as error:
        summary, code = {**summary, **error.summary, "error": str(error)}, 2
    except RunError as error:
        summary, code = {**summary, **error.summary, "error": str(error)}, 1
    except Interrupted as error:
        summary, code = error.summary, 130
    except KeyboardInterrupt:
        summary, code = {**summary, "error": "interrupted"}, 130
    except Exception as error:
        from quantize_gemma.tasks.runtime.redact import redact
        from quantize_gemma.tasks.runtime.store import disk_failure
        from quantize_gemma.tasks.runtime.worker import disks

        full = disk_failure(error, *disks())
        if full is None:
            # A mistake of ours, or an API that went away: where it happened helps whoever mends it.
            print(redact(traceback.format_exc()), file=sys.stderr)
        summary, code = {**summary, "error": str(full or redact(f"{type(error).__name__}: {error}"))}, 1
    # What a stage died of was said when it did.
    if summary["error"] and not (code == 1 and terminal.has_said(summary["error"])):
        print(f"quantize-gemma: {summary['error']}", file=sys.stderr)
    if summary["release"]:
        _print_summary(summary)
    if arguments.json:
        print(json.dumps(summary))
    return code


def _run_flow(arguments: argparse.Namespace, terminal: "_Terminal") -> dict[str, Any]:
    from quantize_gemma.tasks.check import check_run

    p = _parameters(arguments)
    check_run(p.model, p.recipe, p.max_seq_len, p.device, p.cluster, p.custom_kv_cache, p.workers)
    # Before Prefect is imported: it reads them once.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    # The terminal gets our own lines; Prefect's log goes to its API and can be read in the UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # Nor does it tell here that its API could not take a line: when that matters, the run ends, and says why.
    logging.raiseExceptions = False
    _log_to(terminal)
    from quantize_gemma.flows.local_server import start_local_server

    server = start_local_server()
    if server:
        print(f"quantize-gemma: watch the run at {server.sign_in(sys.stderr)}", file=sys.stderr)
    # Meanwhile the server starts.
    from quantize_gemma.flows.quantize_gemma import quantize_gemma

    if server:
        server.wait()
    summary: dict[str, Any] = quantize_gemma(**p.model_dump())
    return summary


def _log_to(terminal: "_Terminal") -> logging.Logger:
    """Returns the log of the stages, which the terminal shows from now on."""
    logger = logging.getLogger("quantize_gemma")
    logger.setLevel(logging.INFO)
    logger.addHandler(terminal)
    return logger


class _Terminal(logging.Handler):
    """Writes a line above the progress bars instead of through them, and why something failed only once."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            if self.has_said(message):
                return
            self.reasons.add(message.partition(": ")[2])
        # A terminal that was closed is no reason to fail.
        with contextlib.suppress(OSError):
            tqdm.write(f"quantize-gemma: {message}", file=sys.stderr)

    def has_said(self, message: str) -> bool:
        """Tells whether the reason in "stage: reason" was written before, for whatever stage."""
        return message in self.reasons or message.partition(": ")[2] in self.reasons


def _parameters(arguments: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from quantize_gemma.flows.options import Parameters

    if "keep" in arguments:
        raise UserError("--keep is gone, leave it out: only files that an earlier release wrote are removed now")
    given = {name: value for name, value in vars(arguments).items() if name in Parameters.model_fields}
    try:
        return Parameters(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UserError(first["msg"].removeprefix("Value error, ")) from None
        name = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{name} {first['input']!r}: {first['msg']}") from None


def _refuse(error: Exception) -> int:
    print(f"quantize-gemma: {error}", file=sys.stderr)
    return 2


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from quantize_gemma.tasks.models.metrics import parse_columns, parse_verdict
    from quantize_gemma.tasks.models.tables import quality_rows, verdict_rows
    from quantize_gemma.tasks.runtime.units import human_size

    console = Console(file=sys.stderr if not sys.stdout.isatty() else sys.stdout, width=100)
    stages = Table("stage", "", title="Stages")
    for column in ("seconds", "peak memory", "written"):
        stages.add_column(column, justify="right")
    for stage in summary["stages"]:
        if stage["key"]:
            stages.add_row(
                stage["name"].replace("_", " "),
                "cached" if stage["cached"] else "ran",
                f"{stage['seconds']:.1f}",
                human_size(stage["peak_rss_bytes"]),
                human_size(stage["size_bytes"]),
            )
    rows = quality_rows(parse_columns(summary["metrics"]))
    quality = Table(*rows[0], title="Quality")
    for row in rows:
        quality.add_row(*row.values())
    console.print(stages)
    console.print(quality)
    gate = summary["gate"]
    # A refusal has said it already.
    if gate and gate["passed"]:
        checks = verdict_rows(parse_verdict(gate).checks)
        table = Table(*checks[0], title="Gate")
        for row in checks:
            table.add_row(*row.values())
        console.print(table)
    console.print(f"gate: {'not reached' if gate is None else 'pass' if gate['passed'] else 'fail'}")
    console.print(f"upload: {_upload_line(summary)}", soft_wrap=True)
    console.print(f"release: {summary['release']}", soft_wrap=True)


def _upload_line(summary: dict[str, Any]) -> str:
    if summary["published"]:
        return str(summary["published"])
    if any(stage["name"] == "upload" for stage in summary["stages"]):
        return "failed"
    return "none, for the run ended before it" if summary["error"] else "skipped, no target was given"


if __name__ == "__main__":
    main()
