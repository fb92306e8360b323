"""The command line: `quantize-gemma run | check | prune`."""

import argparse
import json
import logging
import math
import os
import sys
from typing import Any, Literal, get_args, get_origin

DESCRIPTION = """\
Turn a Gemma 3 checkpoint into a quantized, measured, on-device release of it.

  quantize-gemma run                                   try it on the built-in tiny model
  quantize-gemma run --model google/gemma-3-4b-it --benchmark cais/mmlu
  quantize-gemma check --model DIR --recipe NAME       say what is wrong before anything starts
  quantize-gemma prune                                 remove what died half-way from the store

Results live in $QUANTIZE_GEMMA_HOME (default ~/.cache/quantize-gemma) and are found again by the next run. Without
PREFECT_API_URL a local Prefect server is started for the run and stopped after it.
Exit codes: 0 done; 1 a stage failed or the gate refused; 2 a mistake in what was asked for, nothing started.
"""


def main() -> None:
    """Runs the command line and exits with its code."""
    arguments = _parser().parse_args()
    try:
        code = {"run": _run, "check": _check, "prune": _prune}[arguments.verb](arguments)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    from flows.parameters import Parameters

    parser = argparse.ArgumentParser(
        prog="quantize-gemma", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="run | check | prune")
    run = verbs.add_parser("run", help="run the whole flow")
    check = verbs.add_parser("check", help="check model, recipe and machine; start nothing")
    prune = verbs.add_parser("prune", help="remove what died half-way, and what was not used for long")
    prune.add_argument("--max-gigabytes", type=float, default=math.inf, help="what the store may hold at most")
    prune.add_argument("--max-age-days", type=float, default=math.inf, help="for how long an artifact may stay unused")
    for verb, names in (
        (run, list(Parameters.model_fields)),
        (check, ["model", "revision", "recipe", "max_seq_len", "custom_sdpa", "custom_kv_cache", "device", "cluster"]),
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
    run.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from tasks.check import check_disk, check_memory, check_run
    from tasks.checkpoint import check_finite, local_checkpoint, weight_files
    from tasks.download import resolve_model
    from tasks.store import StageFailed, UserError

    try:
        p = _parameters(arguments)
        plan = check_run(p.model, p.recipe, p.max_seq_len, p.device, p.cluster, p.custom_kv_cache)
        local = local_checkpoint(p.model)
        for path in weight_files(local) if local else []:
            check_finite(path)
        if local is None:
            model = resolve_model(p.model, p.revision, p.offline)
            plan["disk_bytes_needed"] = check_disk(model["weight_bytes"])
            plan["memory_bytes_needed"] = check_memory(model["weights"])
    except UserError as error:
        return _refuse(error)
    except StageFailed as error:
        _refuse(error)
        return 1
    print(", ".join(f"{name}: {value}" for name, value in plan.items()))
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from tasks.store import evict, human_size, prune, size_of

    removed = prune()
    evicted = evict(arguments.max_gigabytes * 1e9, arguments.max_age_days * 86_400)
    print(
        f"removed {len(removed)} unfinished directories and {len(evicted)} artifacts, {human_size(size_of())} are left"
    )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from tasks.check import check_run
    from tasks.store import UserError

    try:
        p = _parameters(arguments)
        check_run(p.model, p.recipe, p.max_seq_len, p.device, p.cluster, p.custom_kv_cache)
    except UserError as error:
        return _refuse(error)
    # Before Prefect is imported: it reads them once.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    # The terminal gets our own lines; Prefect's log goes to its API and can be read in the UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    logger = logging.getLogger("tasks")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Terminal())
    from flows.server import start_local_server

    url = start_local_server()
    if url:
        print(f"quantize-gemma: watch the run at {url.removesuffix('/api')}", file=sys.stderr)
    from flows.quantize_gemma import quantize_gemma
    from tasks.store import RunError

    code = 0
    try:
        summary = quantize_gemma(**p.model_dump())
    except RunError as error:
        summary = error.summary
        code = _refuse(error) if isinstance(error, UserError) else 1
        if code == 1:
            print(f"quantize-gemma: {error}", file=sys.stderr)
    if summary["release"]:
        _print_summary(summary)
    if arguments.json and code != 2:
        print(json.dumps(summary))
    return code


class _Terminal(logging.Handler):
    """Writes a line above the progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"quantize-gemma: {record.getMessage()}", file=sys.stderr)


def _parameters(arguments: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from flows.parameters import Parameters
    from tasks.store import UserError

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

    from flows.quantize_gemma import quality_table
    from tasks.gate import gate_table
    from tasks.store import human_size

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
    rows = quality_table(summary["metrics"])
    quality = Table(*rows[0], title="Quality")
    for row in rows:
        quality.add_row(*row.values())
    console.print(stages)
    console.print(quality)
    passed = summary["gate"] is not None and summary["gate"]["passed"]
    if passed:
        checks = gate_table(summary["gate"]["checks"])
        table = Table(*checks[0], title="Gate")
        for row in checks:
            table.add_row(*row.values())
        console.print(table)
    console.print(f"gate: {'passed' if passed else 'refused'}")
    if passed:
        console.print(f"upload: {summary['published'] or 'skipped, no target was given'}")
    console.print(f"release: {summary['release']}", soft_wrap=True)


if __name__ == "__main__":
    main()
