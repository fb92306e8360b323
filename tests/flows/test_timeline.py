"""The timeline of a run shows what ran, when, and with how much memory, even if the run failed."""

import base64
import contextlib
import io
import json
import re
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest

from quantize_gemma.flows.summary import StageSummary
from quantize_gemma.flows.timeline import ROW, Bar, draw, make_bars
from quantize_gemma.tasks.models.plot_style import DPI
from tests.conftest import CommandLine, FinishedRun, Outcome


def rows_shown(command_line: CommandLine) -> list[int]:
    """Return how many rows each timeline has in the database of the command line's Prefect server."""
    from PIL import Image

    with contextlib.closing(sqlite3.connect(command_line.prefect / "prefect.db")) as database:
        rows = database.execute("select data from artifact where key = 'timeline' order by created").fetchall()
    urls = [json.loads(data) for (data,) in rows]
    images = [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]
    return [round((image.height / DPI - 0.87 - 0.3) / ROW) for image in images]


def rows_expected(outcome: Outcome) -> range:
    """Return how many rows a run's timeline may have: its stages, and its other steps that took at least a second."""
    ran = [stage for stage in outcome.summary["stages"] if not stage["cached"]]
    return range(sum(bool(stage["key"]) or stage["state"] == "FAILED" for stage in ran), len(ran) + 1)


def test_the_parts_of_a_stage_are_one_bar_and_short_steps_have_none_unless_they_failed() -> None:
    stages = [
        StageSummary("check", "COMPLETED", seconds=0.25),
        StageSummary("download", "COMPLETED", peak_rss_bytes=10, key="a"),
        StageSummary("fidelity", "COMPLETED", peak_rss_bytes=20, key="b"),
        StageSummary("untie", "COMPLETED", cached=True, peak_rss_bytes=30, key="c"),
        StageSummary("answer_mmlu_base", "COMPLETED", peak_rss_bytes=40, key="d"),
        StageSummary("evaluate_mmlu_base", "PENDING"),
        StageSummary("export", "FAILED"),
        StageSummary("check_gate", "FAILED", seconds=0.25),
        StageSummary("publish", "COMPLETED", seconds=2),
    ]
    times = {
        "check": [(100.5, 100.75)],
        "download": [(101.0, 104.0)],
        # Two parts, and a second attempt of the second part.
        "answer_mmlu_base": [(104.0, 112.5), (105.0, 106.0), (107.0, 120.0)],
        "fidelity": [(103.0, 103.25)],
        "export": [(103.5, 130.0)],
        "check_gate": [(131.0, 131.25)],
        "publish": [(132.0, 134.0)],
    }
    assert make_bars(stages, times) == [
        Bar("download", 0.5, 3.5, 10, False),
        Bar("fidelity", 2.5, 2.75, 20, False),
        Bar("export", 3, 29.5, None, True),
        Bar("answer mmlu base", 3.5, 19.5, 40, False),
        Bar("check gate", 30.5, 30.75, None, True),
        Bar("publish", 31.5, 33.5, None, False),
    ]


@pytest.mark.parametrize(
    ("scale", "texts"),
    [
        (1, ["time, s", "30.0 s", "29.0 s, failed", "5.0 s"]),
        (60, ["time, min", "30.0 min", "29.0 min, failed", "5.0 min"]),
        (3600, ["time, h", "30.0 h", "29.0 h, failed", "5.0 h"]),
    ],
)
def test_the_timeline_says_how_long_each_stage_took_and_how_much_memory(
    scale: int, texts: list[str], tmp_path: Path
) -> None:
    bars = [
        Bar("download", 0, 30 * scale, 1_230_000_000, False),
        Bar("export", 1 * scale, 30 * scale, None, True),
        Bar("card $x^$_{", 25 * scale, 30 * scale, 340_000_000, False),
    ]
    path = tmp_path / "timeline.svg"
    draw([asdict(bar) for bar in bars], "a model", str(path))
    shown = re.findall("<!-- (.*) -->", path.read_text("utf-8"))
    assert {"Timeline of the run", "a model", "download", "export", "card $x^$_{", *texts} <= set(shown)
    assert [text for text in shown if re.fullmatch(r"\d\.\d\d", text)] == ["1.23", "0.34"]


def test_a_run_shows_what_it_ran_and_nothing_if_all_was_cached(finished_run: FinishedRun, tmp_path: Path) -> None:
    with contextlib.closing(CommandLine(tmp_path / "run" / "store", tmp_path / "run" / "prefect")) as command_line:
        released = finished_run.copy_to(command_line)
        (rows,) = rows_shown(command_line)
        assert rows in rows_expected(released)
        again = command_line("run", "--json")
        assert all(again.cached.values())
        assert len(rows_shown(command_line)) == 1
        outcome = command_line("run", "--json", "--max-kl", "0.0001")
        assert outcome.code == 1
        failed = {stage["name"] for stage in outcome.summary["stages"] if stage["state"] == "FAILED"}
        assert failed == {"check_gate"}
        _, rows = rows_shown(command_line)
        assert rows in rows_expected(outcome)
