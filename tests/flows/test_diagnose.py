"""`quantize-gemma diagnose` runs in the flow, and a second time from the cache."""

import json
from pathlib import Path

import pytest

from tests.conftest import CommandLine, Outcome

pytestmark = pytest.mark.slow


def test_a_diagnosis_reuses_the_results_of_a_run_and_shows_tables_and_a_heat_map(
    released: Outcome, command_line: CommandLine
) -> None:
    first = command_line("diagnose", "--json")
    assert first.code == 0, first.stderr[-3000:]
    assert first.cached == {
        "download": True,
        "untie": True,
        "quantize": True,
        "download_text": True,
        "diagnose": False,
    }
    results = first.summary
    assert (results["model"], results["recipe"], results["text"]) == ("tiny-gemma3", "HQQ-INT8-INT4", "tiny-text")
    assert len(results["rows"]) == 2 + 3 * 7
    assert Path(results["heat_map"]).read_bytes().startswith(b"\x89PNG")
    for title in (
        "KL divergence from quantizing the weights of one module alone",
        "KL divergence from quantizing the activations of one module alone",
        "block 2",
    ):
        assert title in first.stderr
    again = command_line("diagnose", "--json")
    assert all(again.cached.values())
    assert {**again.summary, "stages": None} == {**results, "stages": None}


@pytest.mark.parametrize(
    "arguments", [("--model", "/no/such/model"), ("--text-windows", "none"), ("--refresh", "export")]
)
def test_a_diagnosis_that_fails_says_so_in_json(arguments: tuple[str, ...], command_line: CommandLine) -> None:
    outcome = command_line("diagnose", "--json", *arguments)
    assert outcome.code == 2
    summary = json.loads(outcome.stdout)
    assert summary["rows"] == []
    assert summary["error"] in outcome.stderr
