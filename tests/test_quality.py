"""The recipe benchmark runs from a checkpoint to its table and its plot."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quality import COLUMNS, draw, main
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_TEXTS

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_recipes_are_compared_by_quality_and_size(tmp_path: Path) -> None:
    # Both texts are halves of one text, because calibration helps only on similar text.
    lines = (BUILTIN_TEXTS["tiny-text"] / "text.txt").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "calibration.txt").write_text("".join(lines[: len(lines) // 2]), "utf-8")
    (tmp_path / "text.txt").write_text("".join(lines[len(lines) // 2 :]), "utf-8")
    command = [sys.executable, "-m", "benchmarks.quality", "--model", BUILTIN["tiny-gemma3"], "--json", "--no-export"]
    command += ["--text", tmp_path / "text.txt", "--calibration", tmp_path / "calibration.txt"]
    command += ["--windows", "4", "--recipes", "HQQ-INT8-INT4", "GPTQ-INT8-INT4"]
    command += ["--plot", tmp_path / "plot.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    base, hqq, gptq = json.loads(done.stdout.splitlines()[-1])["recipes"]
    assert [row["name"] for row in (base, hqq, gptq)] == ["base", "HQQ-INT8-INT4", "GPTQ-INT8-INT4"]
    assert all(tuple(row) == COLUMNS for row in (base, hqq, gptq))
    # In a calibrated recipe, the built-in model's vision tower is int8, which takes 22,080 bytes more.
    assert gptq["packed_bytes"] - hqq["packed_bytes"] == 22_080
    assert base["packed_bytes"] > gptq["packed_bytes"]
    assert (base["kl_mean"], base["same_top"]) == (0, 1)
    assert 0.05 < gptq["kl_mean"] < hqq["kl_mean"] < 0.2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    table = done.stdout.splitlines()[:-1]
    assert table[3].startswith(
        f"| HQQ-INT8-INT4 |  | {hqq['packed_bytes']:,} | {hqq['ppl']:.2f} | {hqq['kl_mean']:.4f} |"
    )


def test_the_plot_is_over_the_programs_size_if_every_program_was_exported(tmp_path: Path) -> None:
    rows = [
        {"name": "base", "packed_bytes": 9e8, "kl_mean": 0.0},
        {"name": "A", "packed_bytes": 4e8, "program_bytes": 5e8, "kl_mean": 0.44},
        {"name": "B", "packed_bytes": 4e8, "program_bytes": 6e8, "kl_mean": 0.08},
    ]

    def texts() -> set[str]:
        draw(rows, tmp_path / "plot.svg")
        return set(re.findall("<!-- (.*) -->", (tmp_path / "plot.svg").read_text("utf-8")))

    assert {"KL divergence versus program size", "A  0.440", "B  0.080", "500", "600"} <= texts()
    rows[1]["program_bytes"] = None
    assert {"KL divergence versus packed size", "A  0.440", "B  0.080", "400"} <= texts()


def test_there_is_no_plot_without_a_recipe_that_loses_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw([{"name": name, "packed_bytes": 9e8, "kl_mean": 0.0} for name in ("base", "A")], tmp_path / "plot.svg")
    assert "nothing to plot" in capsys.readouterr().err
    assert not (tmp_path / "plot.svg").exists()


def test_a_missing_calibration_text_is_reported_before_the_first_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quality", "--model", "model", "--text", "text.txt", "--recipes", "SEARCH-INT8-INT4", "GPTQ-INT8-INT4"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr()
    assert "error: GPTQ-INT8-INT4 cannot be quantized without a text: add --calibration FILE" in output.err
    assert not output.out
