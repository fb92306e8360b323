"""The timeline of a run in Prefect's UI: when each stage ran, and its peak memory.

It is an artifact of the run and not a file of the release, because times differ between runs that produce the same
release.
"""

import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.flows.summary import StageSummary
from quantize_gemma.tasks.models.plot_style import (
    BLUE,
    FONT_SIZE,
    GRAY,
    INK,
    MARGIN,
    SKY,
    VERMILION,
    WIDE,
    add_axes,
    new_figure,
)
from quantize_gemma.tasks.runtime import worker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# {stage name: (start, end) of each of its parts and retries}, in seconds since the epoch.
Times = dict[str, list[tuple[float, float]]]
# The height of a row, and the widths of a letter and of the memory column, in inches.
ROW, LETTER, MEMORY = 0.17, 0.07, 1.3
# Steps in the flow's own process that take less than this, such as a check, are left out unless they fail.
SHORT_SECONDS = 1.0
# Units of time: name, seconds per unit, and the number of units from which the next larger one is used.
UNITS = (("s", 1, 100), ("min", 60, 100), ("h", 3600, float("inf")))
# The style of the text next to bars, and of numbers.
LABEL: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline"}
NUMBER: dict[str, Any] = {**LABEL, "fontsize": FONT_SIZE - 1}


@dataclass(frozen=True)
class Bar:
    """A stage on the timeline.

    Attributes:
        name: The stage's name, with spaces.
        start, end: When its first part started and its last part ended, in seconds since the start of the first stage.
        peak_rss_bytes: Its peak memory; None if it ran in the flow's own process, or failed.
        failed: Whether it failed.
    """

    name: str
    start: float
    end: float
    peak_rss_bytes: int | None
    failed: bool


def show_timeline(label: str, stages: Collection[StageSummary], times: Times) -> None:
    """Draw the timeline of a run, and show it in Prefect's UI.

    It is drawn in a worker process because matplotlib would read settings from this process's working directory.

    Args:
        label: The model and the recipe.
        stages: The run's stages.
        times: When they ran.
    """
    from prefect.logging import get_run_logger

    # Imported here because the worker imports this module, too, but does not need the reports' libraries.
    from quantize_gemma.flows.report import show_image

    cached = sum(stage.cached for stage in stages)
    bars = make_bars(stages, times)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "timeline.png"
            arguments = {
                "bars": [asdict(bar) for bar in bars],
                "subtitle": f"{label}; stages cached: {cached}" if cached else label,
                "path": str(path),
            }
            worker.run("quantize_gemma.flows.timeline:draw", arguments, lambda *_: None, None)
            show_image(path, "When each stage ran, and its peak memory")
    except Exception as error:
        # A run does not fail because of its timeline.
        get_run_logger().warning("the timeline could not be shown: %s", error)


def make_bars(stages: Collection[StageSummary], times: Times) -> list[Bar]:
    """Return a bar for each stage that ran, ordered by start time; a stage in parts has one bar."""
    first = min((start for calls in times.values() for start, _ in calls), default=0.0)
    bars = []
    for stage in stages:
        calls = times.get(stage.name)
        if not calls:
            continue
        start, end = min(start for start, _ in calls), max(end for _, end in calls)
        failed = stage.state in ("FAILED", "CRASHED")
        # A step of the flow itself, such as a check, has no artifact.
        if stage.key or failed or end - start >= SHORT_SECONDS:
            name = stage.name.replace("_", " ")
            bars.append(Bar(name, start - first, end - first, stage.peak_rss_bytes, failed))
    return sorted(bars, key=lambda bar: (bar.start, bar.name))


def draw(bars: list[dict[str, Any]], subtitle: str, path: str) -> dict[str, Any]:
    """Draw the timeline, in a worker.

    Args:
        bars: The fields of each Bar.
        subtitle: The text below the title.
        path: The file.
    """
    rows = [Bar(**bar) for bar in bars]
    total = max(bar.end for bar in rows)
    left_margin = MARGIN + LETTER * max(len(bar.name) for bar in rows) + 0.1
    top, bottom = 0.87, 0.3
    height = ROW * len(rows)
    with new_figure(Path(path), "Timeline of the run", top + height + bottom, WIDE, subtitle) as figure:
        time = add_axes(figure, left_margin, MARGIN + MEMORY + 0.2, top, bottom)
        memory = add_axes(figure, WIDE - MARGIN - MEMORY, MARGIN, top, bottom)
        _draw_times(time, rows, total)
        sizes = [(bar.peak_rss_bytes or 0) / 1e9 for bar in rows]
        memory.barh(range(len(rows)), sizes, height=0.7, color=SKY)
        for position, size in enumerate(sizes):
            if size:
                memory.annotate(f"{size:.2f}", (0, position), (3, 0), color=INK, **NUMBER)
        memory.set(title="peak memory, GB", xticks=[])
        memory.spines["bottom"].set_visible(False)
        for axes in (time, memory):
            axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=[])
    return {}


def _draw_times(axes: "Axes", rows: list[Bar], total: float) -> None:
    """Draw when each stage ran, and write its duration where there is room: after, before, or in its bar."""
    unit, seconds, _ = next(row for row in UNITS if total < row[1] * row[2])
    for position, bar in enumerate(rows):
        axes.annotate(bar.name, (0, position), (-4, 0), ha="right", **LABEL)
        # Even the shortest bar is visible.
        start, width = bar.start / seconds, max(bar.end - bar.start, 0.004 * total) / seconds
        axes.barh(position, width, left=start, height=0.7, color=VERMILION if bar.failed else BLUE)
        label = _describe(bar.end - bar.start) + (", failed" if bar.failed else "")
        color = VERMILION if bar.failed else GRAY
        if bar.end < 0.75 * total:
            axes.annotate(label, (start + width, position), (3, 0), color=color, **NUMBER)
        elif bar.start > 0.25 * total:
            axes.annotate(label, (start, position), (-3, 0), ha="right", color=color, **NUMBER)
        else:
            axes.annotate(label, (start, position), (3, 0), color="white", **NUMBER)
    axes.set(xlim=(0, 1.004 * total / seconds), title=f"time, {unit}")
    axes.grid(axis="x")


def _describe(seconds: float) -> str:
    """Return a duration as text, in the unit that fits it."""
    unit, length, _ = next(row for row in UNITS if seconds < row[1] * row[2])
    return f"{seconds / length:.1f} {unit}"
