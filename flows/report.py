"""What people see of a run: Prefect artifacts in the UI, tables and log lines in the terminal."""

import base64
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.card import chartqa_scores, score
from quantize_gemma.tasks.gate import gate_table
from quantize_gemma.tasks.runtime.units import human_size

COLUMNS = ("base", "quantized", "program")
Row = dict[str, str]


def create_artifacts(release: Path, metrics: dict[str, Any]) -> None:
    """Show the quality table, the gate's checks, the chart, the card, and the files in Prefect's UI.

    Args:
        release: The directory of the release.
        metrics: Its metrics.json.
    """
    from prefect.artifacts import (
        create_image_artifact,
        create_link_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )

    create_table_artifact(key="quality", table=quality_table(metrics), description="Base, quantized, and program")
    create_table_artifact(key="gate", table=gate_table(metrics["gate"]["checks"]), description="The gate's checks")
    chart = "data:image/png;base64," + base64.b64encode((release / "mmlu-by-subject.png").read_bytes()).decode()
    create_image_artifact(chart, key="mmlu-by-subject", description="MMLU accuracy per subject")
    # Without its YAML front matter, and with the chart embedded.
    text = (release / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]
    create_markdown_artifact(text.replace("(mmlu-by-subject.png)", f"({chart})"), key="card")
    create_link_artifact(release.as_uri(), link_text="the release's files", key="release")


def quality_table(metrics: dict[str, Any]) -> list[Row]:
    """Return the rows of base vs. quantized vs. program; a cell that was not measured is empty."""
    agreement, sample = metrics["program"]["agreement"], metrics["program"]["mmlu"]
    rows: list[Row] = [
        {"metric": "size", **{name: human_size(metrics[name]["bytes"]) for name in COLUMNS}},
        {"metric": "MMLU, %", **{name: score(metrics[name]["mmlu"]) for name in ("base", "quantized")}},
        {
            "": f"MMLU, {sample['questions']} samples, %",
            "quantized": score(sample["checkpoint"]),
            "program": score(sample),
        },
        {"metric": "same answers as the checkpoint, %", "program": f"{100 * sample['agreement']:.1f}"},
        {
            "metric": "same answers without activation quantization, %",
            "quantized": f"{100 * sample['agreement_act_quant']:.1f}",
        },
        *({"metric": f"{name}, %", **columns} for name, columns in chartqa_scores(metrics).items()),
        {"metric": "KL to the checkpoint, nats", "program": f"{agreement['kl_program']:.2g}"},
        {"metric": "KL of activation quantization, nats", "quantized": f"{agreement['kl_act_quant']:.2g}"},
        {"metric": "same top token, %", "program": f"{100 * agreement['same_argmax']:.1f}"},
    ]
    return [{"metric": "", **dict.fromkeys(COLUMNS, ""), **row} for row in rows]


def print_summary(summary: dict[str, Any]) -> None:
    """Print the tables of a run that has a release: stages, quality, and gate, then where the release is."""
    from rich.console import Console
    from rich.table import Table

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
    console.print(stages)
    console.print(_table("Quality", quality_table(summary["metrics"])))
    gate = summary["gate"]
    # A failed gate has printed its checks in the error message.
    if gate and gate["passed"]:
        console.print(_table("Gate", gate_table(gate["checks"])))
    console.print(f"gate: {'not reached' if gate is None else 'passed' if gate['passed'] else 'failed'}")
    console.print(f"publish: {_publish_line(summary)}", soft_wrap=True)
    console.print(f"release: {summary['release']}", soft_wrap=True)


def _table(title: str, rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    return table


def _publish_line(summary: dict[str, Any]) -> str:
    if summary["published"]:
        return str(summary["published"])
    if any(stage["name"] == "publish" for stage in summary["stages"]):
        return "failed"
    return "not reached" if summary["error"] else "skipped, no target was set"


class Terminal(logging.Handler):
    """Writes log lines above the progress bars, and every reason of a failure only once."""

    def __init__(self) -> None:
        super().__init__()
        self._reasons: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to stderr."""
        from tqdm import tqdm

        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            if self.has_shown(message):
                return
            self._reasons.add(message.partition(": ")[2])
        # A terminal that was closed is no reason to fail.
        with contextlib.suppress(OSError):
            tqdm.write(f"quantize-gemma: {message}", file=sys.stderr)

    def has_shown(self, message: str) -> bool:
        """Tell whether the reason in "stage: reason" was written before, for whatever stage."""
        return message in self._reasons or message.partition(": ")[2] in self._reasons

    def attach(self) -> logging.Logger:
        """Show the stages' log from now on, and return its logger."""
        logger = logging.getLogger("quantize_gemma")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return logger
