"""Reports of a run: artifacts in Prefect's UI, and tables and log lines in the terminal."""

import base64
import contextlib
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.card.chart import ERROR_CHART, KL_CHART, charts
from quantize_gemma.tasks.models.metrics import Metrics, parse_columns, parse_verdict
from quantize_gemma.tasks.models.tables import distance_rows, quality_rows, verdict_rows
from quantize_gemma.tasks.models.text_fidelity import KINDS, damage_rows, parse_damage
from quantize_gemma.tasks.runtime.redact import redact
from quantize_gemma.tasks.runtime.strict_json import JsonObject
from quantize_gemma.tasks.runtime.units import human_size

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, str]


def create_artifacts(release: Path, metrics: Metrics) -> None:
    """Show the tables of fidelity, quality, and the gate, the charts, the card, and the files in Prefect's UI.

    Args:
        release: The directory of the release.
        metrics: Its metrics.json.
    """
    from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

    distances = distance_rows(metrics, metrics.gate.checks)
    create_table_artifact(key="fidelity", table=distances, description="Distance from the base model on text")
    create_table_artifact(
        key="quality",
        table=quality_rows(metrics),
        description="Scores of the base model, the checkpoint, and the program",
    )
    create_table_artifact(key="gate", table=verdict_rows(metrics.gate.checks), description="Checks of the gate")
    # Without its YAML front matter, and with the charts embedded.
    text = (release / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]
    descriptions = {KL_CHART: "KL divergence from the base model"}
    if metrics.quantized.output_error:
        descriptions[ERROR_CHART] = "Output error of rounding after calibration, by decoder block"
    descriptions |= {
        name: f"{metrics.benchmarks[benchmark].title} by subject" for benchmark, name in charts(metrics).items()
    }
    for name, description in descriptions.items():
        text = text.replace(f"({name})", f"({show_image(release / name, description)})")
    create_markdown_artifact(text, key="card")
    create_link_artifact(release.as_uri(), link_text="Files of the release", key="release")


def show_image(path: Path, description: str) -> str:
    """Show a PNG in Prefect's UI, under its file's name; return its content as a data URL."""
    from prefect.artifacts import create_image_artifact

    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    create_image_artifact(url, key=artifact_key(path.stem), description=description)
    return url


def artifact_key(name: str) -> str:
    """Return a name as an artifact's key, in which Prefect allows fewer characters than lm-eval in names of tasks."""
    return re.sub("[^a-z0-9]", "-", name.lower())


def print_summary(summary: dict[str, Any]) -> None:
    """Print the tables of a run with a release (stages, fidelity, quality, gate), and where the release is."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stderr if not sys.stdout.isatty() else sys.stdout, width=100)
    stages = Table("stage", "", title="Stages")
    for column in ("seconds", "peak memory", "output size"):
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
    columns = parse_columns(summary["metrics"])
    gate = None if summary["gate"] is None else parse_verdict(summary["gate"])
    checks = [] if gate is None else gate.checks
    console.print(_table("Distance from the base model", distance_rows(columns, checks)))
    console.print(_table("Quality", quality_rows(columns)))
    # A failed gate has printed its checks in the error message.
    if gate and gate.passed:
        console.print(_table("Gate", verdict_rows(gate.checks)))
    console.print(f"gate: {'not reached' if gate is None else 'passed' if gate.passed else 'failed'}")
    console.print(f"publish: {_publish_line(summary)}", soft_wrap=True)
    console.print(f"release: {summary['release']}", soft_wrap=True)


def print_damage(results: JsonObject) -> None:
    """Print the tables of a diagnosis, and where its heat map is."""
    from rich.console import Console

    console = Console(file=sys.stderr if not sys.stdout.isatty() else sys.stdout, width=100)
    measurements = parse_damage(results["rows"])
    for kind in KINDS:
        console.print(
            _table(
                f"KL divergence from quantizing the {kind} of one module alone, nats", damage_rows(measurements, kind)
            )
        )
    console.print(f"heat map: {results['heat_map']}", soft_wrap=True)


def _table(title: str, rows: list[Row]) -> "Table":
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
    """Write log lines above the progress bars, and the reason for a failure only once."""

    def __init__(self) -> None:
        super().__init__()
        self._reasons: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to stderr."""
        from tqdm import tqdm

        message = redact(record.getMessage())
        if record.levelno >= logging.ERROR:
            if self.has_shown(message):
                return
            self._reasons.add(message.partition(": ")[2])
        # A closed terminal must not make the run fail.
        with contextlib.suppress(OSError):
            tqdm.write(f"quantize-gemma: {message}", file=sys.stderr)

    def has_shown(self, message: str) -> bool:
        """Tell whether the reason in "stage: reason" was written before, for any stage."""
        return message in self._reasons or message.partition(": ")[2] in self._reasons

    def attach(self) -> logging.Logger:
        """Show the log of the stages from now on, and return its logger."""
        logger = logging.getLogger("quantize_gemma")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return logger
