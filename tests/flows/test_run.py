"""The whole flow on the built-in model: every stage real, cached, and safe to kill."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tasks.builtin import BUILTIN
from tests.conftest import CommandLine, Outcome

ALL = {
    "download",
    "untie",
    "quantize",
    "smoke",
    "export",
    "evaluate_base",
    "evaluate_quantized",
    "smoke_program",
    "card",
}


def artifact(command_line: CommandLine, outcome: Outcome, name: str) -> Path:
    key = next(stage["key"] for stage in outcome.summary["stages"] if stage["name"] == name)
    stage = {"evaluate_base": "evaluate", "evaluate_quantized": "evaluate", "smoke_program": "smoke-program"}
    return command_line.home / stage.get(name, name) / key


def digests(command_line: CommandLine, outcome: Outcome, *names: str) -> list[str]:
    manifests = [artifact(command_line, outcome, name) / "manifest.json" for name in names]
    return [json.loads(manifest.read_text())["digest"] for manifest in manifests]


def kill(process: "subprocess.Popen[str]") -> None:
    """Kills the command, and what a SIGKILL gives it no time to stop: the local Prefect server."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_one_command_leaves_a_release_that_passed_the_gate(released: Outcome) -> None:
    summary = released.summary
    assert set(released.cached) == ALL
    assert not any(released.cached.values())
    assert summary["gate"]["passed"]
    assert {check["name"] for check in summary["gate"]["checks"]} == {"mmlu_drop", "program_kl"}
    assert summary["published"] is None
    base, quantized, program = (summary["metrics"][name] for name in ("base", "quantized", "program"))
    assert base["mmlu"]["accuracy"] >= 0.8
    assert quantized["mmlu"]["accuracy"] >= 0.8
    assert base["mmlu"]["questions"] == 228
    assert program["image"]["response"] == "blue"
    assert program["text"]["response"] == quantized["smoke"]["response"]
    assert quantized["smoke"]["response"].startswith("I can talk to you")
    names = {path.name for path in Path(summary["release"]).iterdir()}
    assert {"README.md", "metrics.json", "model.safetensors", "model.pte", "tokenizer.json", "config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_a_second_run_is_all_cache_hits_within_20_seconds(released: Outcome, command_line: CommandLine) -> None:
    started = time.monotonic()
    again = command_line("run", "--json")
    assert time.monotonic() - started < 20
    assert again.code == 0, again.stderr
    assert all(again.cached.values()), again.cached
    assert again.summary["release"] == released.summary["release"]


def test_the_card_says_what_was_measured_and_its_code_gives_the_releases_weights(
    released: Outcome, tmp_path: Path
) -> None:
    import re

    import torch
    import yaml

    from tasks.checkpoint import load_model

    release = Path(released.summary["release"])
    card = (release / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    measured = released.summary["metrics"]["quantized"]["mmlu"]["accuracy"]
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(100 * measured, abs=0.005)
    assert "test fixture" in card
    assert released.summary["metrics"]["quantized"]["smoke"]["response"] in card
    for section in ("Running in a mobile app", "Untie weights", "Quantization", "Manual testing", "Model Quality"):
        assert f"# {section}" in card
    for section in ("Exporting to ExecuTorch", "Paper", "Resources", "Disclaimer"):
        assert f"# {section}" in card

    code = "\n".join(re.findall(r"```Py\n(.*?)```", card, re.DOTALL))
    code = code.replace('model_id = "tiny-gemma3"', f"model_id = {str(BUILTIN['tiny-gemma3'])!r}")
    names: dict[str, object] = {}
    exec(compile(code, "card", "exec"), names)
    ids = torch.arange(2, 90)[None]
    with torch.no_grad():
        by_card = names["model"](ids).logits  # type: ignore[operator]
        shipped = load_model(release, torch.bfloat16)(ids).logits
    assert torch.equal(by_card, shipped)


def test_a_corrupted_scale_shows_as_a_falling_score(released: Outcome, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    from tasks import process

    broken = tmp_path / "checkpoint"
    shutil.copytree(released.summary["release"], broken)
    with safe_open(str(broken / "model.safetensors"), framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        metadata = weights.metadata()
    tensors["language_model.model.layers.1.mlp.down_proj._weight_scale"] *= -3
    save_file(tensors, broken / "model.safetensors", metadata=metadata)
    target = tmp_path / "results"
    target.mkdir()
    arguments = {"checkpoint": str(broken), "benchmark": "mmlu-mini", "limit": 2, "batch_size": "16", "device": "cpu"}
    call = {"function": "tests.flows.test_run:evaluate_path", "target": str(target), "arguments": arguments}
    process.run("tasks.policies:call", call, lambda *_: None, None)
    score = json.loads((target / "results.json").read_text())["accuracy"]
    # The gate's default bar is 5 points.
    assert score < released.summary["metrics"]["quantized"]["mmlu"]["accuracy"] - 0.05


def evaluate_path(target: Path, checkpoint: str, **settings: object) -> dict[str, object]:
    from tasks.evaluate import evaluate_checkpoint

    return evaluate_checkpoint(target, Path(checkpoint), **settings)  # type: ignore[arg-type]


def test_the_gate_refuses_a_program_further_away_than_allowed(released: Outcome, command_line: CommandLine) -> None:
    refused = command_line("run", "--max-kl-ratio", "0.01", "--json")
    assert refused.code == 1
    assert "the gate refuses the release" in refused.stderr
    assert not refused.summary["gate"]["passed"]
    assert refused.summary["published"] is None
    assert all(refused.cached.values())


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_damaged_artifact_runs_its_stage_again_and_no_other(
    released: Outcome, command_line: CommandLine, damage: str
) -> None:
    import shutil

    folder = artifact(command_line, released, "quantize")
    if damage == "deleted":
        shutil.rmtree(folder)
    else:
        os.truncate(folder / "data" / "model.safetensors", 1000)
    again = command_line("run", "--json")
    assert again.code == 0, again.stderr
    assert again.cached == {name: name != "quantize" for name in ALL}
    if damage == "truncated":
        assert "model.safetensors" in again.stderr


def test_a_run_killed_in_the_export_leaves_nothing_that_counts_and_two_later_runs_finish(
    released: Outcome, command_line: CommandLine
) -> None:
    import shutil

    before = digests(command_line, released, "quantize", "export", "smoke_program", "card")
    shutil.rmtree(artifact(command_line, released, "export"))
    process = command_line.start("run", "--json")
    deadline = time.monotonic() + 120
    while not list(command_line.home.glob("export/.partial-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(15)
    kill(process)
    assert not artifact(command_line, released, "export").exists()

    both = [command_line.start("run", "--json") for _ in range(2)]
    outcomes = []
    for process in both:
        stdout, stderr = process.communicate(timeout=600)
        outcomes.append(Outcome(process.returncode, stdout, stderr))
    for outcome in outcomes:
        assert outcome.code == 0, outcome.stderr
        assert {name for name, cached in outcome.cached.items() if not cached} <= {"export"}
        assert digests(command_line, outcome, "quantize", "export", "smoke_program", "card") == before


def test_a_run_killed_in_quantize_is_finished_by_the_next(released: Outcome, command_line: CommandLine) -> None:
    import shutil

    folder = artifact(command_line, released, "quantize")
    before = json.loads((folder / "manifest.json").read_text())["digest"]
    shutil.rmtree(folder)
    process = command_line.start("run")
    deadline = time.monotonic() + 120
    while not list(command_line.home.glob("quantize/.partial-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(3)
    kill(process)
    assert not folder.exists()
    again = command_line("run", "--json")
    assert again.code == 0, again.stderr
    assert json.loads((folder / "manifest.json").read_text())["digest"] == before


def test_another_recipe_runs_quantize_and_what_follows_again(released: Outcome, command_line: CommandLine) -> None:
    other = command_line("run", "--recipe", "AFFINE-INT8-INT4", "--max-seq-len", "128", "--json")
    assert other.code == 0, other.stderr
    kept = {name for name, cached in other.cached.items() if cached}
    assert kept == {"download", "untie", "evaluate_base"}
    assert other.summary["release"] != released.summary["release"]
    assert other.summary["metrics"]["program"]["text"]["response"]


def test_a_text_only_checkpoint_goes_through_the_same_flow(command_line: CommandLine, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    source, target = BUILTIN["tiny-gemma3"], tmp_path / "tiny-text"
    target.mkdir()
    with safe_open(str(source / "model.safetensors"), framework="pt") as weights:
        tensors = {
            name.removeprefix("language_model."): weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118
            if name.startswith("language_model.")
        }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())["text_config"]
    config |= {"architectures": ["Gemma3ForCausalLM"], "eos_token_id": [1, 6], "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, target / name)

    outcome = command_line("run", "--model", str(target), "--max-seq-len", "256", "--limit", "2", "--json")
    assert outcome.code == 0, outcome.stderr
    program = outcome.summary["metrics"]["program"]
    assert program["task"] == "text-generation"
    assert program["text"]["response"].startswith("I can talk to you")
    assert "image" not in program
    assert outcome.summary["metrics"]["quantized"]["mmlu"]["accuracy"] >= 0.8
