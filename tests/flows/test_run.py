"""The whole flow on the built-in model: every stage is real, is cached, and can be killed."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from quantize_gemma.flows.options import ExportOptions, RunOptions, stage_names
from quantize_gemma.flows.plan import writing_stages
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS, BUILTIN_TEXTS
from quantize_gemma.tasks.calibrate import digest_text
from quantize_gemma.tasks.check import resolve_device
from quantize_gemma.tasks.download import resolve_model, resolve_text
from quantize_gemma.tasks.models.benchmarks import FIXTURE_TASKS, find_benchmark
from quantize_gemma.tasks.models.recipe import RECIPES, load_recipe
from quantize_gemma.tasks.models.resolved import ResolvedDataset
from quantize_gemma.tasks.models.runner_checks import RUNNER_CHECKS
from quantize_gemma.tasks.runtime.prefect_slots import ACCELERATOR, MEMORY
from quantize_gemma.tasks.runtime.prefect_stage import missing_stages
from tests.campaigns.starting_place import hostile_directory
from tests.compatibility.loading import read_section
from tests.conftest import CommandLine, FinishedRun, Outcome
from tests.evaluation import record, run_stage
from tests.grid import write_grid_checkpoint
from tests.operate import another_program
from tests.processes import stage_processes
from tests.tasks.test_device_report import REPORT
from tests.text_only import write_text_only

FIXTURES = ("--text", "tiny-text", "--dataset", "mmlu=mmlu-mini", "chartqa=chartqa-mini")
# The card's recipe is neither calibrated nor distilled, and there is no reference model.
OPTIONAL = ("download_calibration", "calibrate", "distill", "download_reference", "fidelity_reference")
# Only log-likelihoods are compared without quantized activations.
NOT_MEASURED = ("chartqa_no_act_quant", "gsm8k_no_act_quant")
ALL = {
    name for name in stage_names([*FIXTURE_TASKS]) if not name.endswith(NOT_MEASURED) and not name.startswith(OPTIONAL)
}


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    """Each test has its own store, so that damage does not affect other tests."""
    with contextlib.closing(CommandLine(tmp_path / "run" / "store", tmp_path / "run" / "prefect")) as line:
        yield line


@pytest.fixture
def released(finished_run: FinishedRun, command_line: CommandLine) -> Outcome:
    """The release of the built-in model, in that store."""
    return finished_run.copy_to(command_line)


def artifact(command_line: CommandLine, outcome: Outcome, name: str) -> Path:
    key = next(stage["key"] for stage in outcome.summary["stages"] if stage["name"] == name)
    # Stages that run once for each benchmark are named after the benchmark.
    place = next((stage for stage in ("record", "answer", "evaluate") if name.startswith(f"{stage}_")), name)
    if name.startswith("download_") and name != "download_text":
        place = "download_dataset"
    return command_line.home / place / key


def metrics_of(outcome: Outcome) -> dict[str, Any]:
    return json.loads((Path(outcome.summary["release"]) / "metrics.json").read_text())


def digests(command_line: CommandLine, outcome: Outcome, *names: str) -> list[str]:
    manifests = [artifact(command_line, outcome, name) / "manifest.json" for name in names]
    return [json.loads(manifest.read_text())["digest"] for manifest in manifests]


def start_run_into(
    stage: str, command_line: CommandLine, *arguments: str, until: Callable[[int, Path], bool]
) -> "subprocess.Popen[str]":
    """Start a run, and return it when `until(its process id, the stage's unfinished directory)` is true."""
    # Ignore the directories of runs that were killed before.
    before = set(command_line.home.glob(f"{stage}/.partial-*"))
    process = command_line.start("run", *arguments, "--json")
    while not any(until(process.pid, path) for path in set(command_line.home.glob(f"{stage}/.partial-*")) - before):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def has_started(_run: int, _partial: Path) -> bool:
    return True


def has_a_process(run: int, _partial: Path) -> bool:
    return stage_processes(run) != []


def writes_weights(_run: int, partial: Path) -> bool:
    return any(partial.glob("data/*.safetensors"))


def uses(library: str) -> Callable[[int, Path], bool]:
    """Tell whether a process of the run has loaded a shared library, which only the stage does at that point."""

    def loaded(run: int, _partial: Path) -> bool:
        for child in psutil.Process(run).children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                if library in Path(f"/proc/{child.pid}/maps").read_text():
                    return True
        return False

    return loaded


def kill_run_in(stage: str, command_line: CommandLine, *arguments: str, until: Callable[[int, Path], bool]) -> None:
    """Start a run and kill it in the stage; check that the processes that it started end by themselves."""
    process = start_run_into(stage, command_line, *arguments, until=until)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2, "the local Prefect server and the stage"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []


def test_one_command_leaves_a_release_that_passed_the_gate(released: Outcome) -> None:
    summary = released.summary
    assert set(released.cached) == ALL
    # A column with the same responses as another one reuses its scores.
    assert {name for name, cached in released.cached.items() if cached} <= {
        "evaluate_chartqa_quantized",
        *(f"evaluate_gsm8k_{column}" for column in ("base", "quantized", "program")),
    }
    assert summary["gate"]["passed"]
    kl = {f"program_kl{part}" for part in ("", "_prompts", "_image", "_late_image")}
    answered = {f"{name}_{check}" for name in FIXTURE_TASKS for check in ("drop", "recovery")}
    answered |= {"mmlu_disagreement", "chartqa_program_drop", "gsm8k_program_drop"}
    assert {check["name"] for check in summary["gate"]["checks"]} == {
        "max_kl",
        "min_same_top",
        *answered,
        "vision_encoder",
        *kl,
        *(f"runner_{name}" for name in RUNNER_CHECKS),
    }
    assert summary["published"] is None
    assert [check["name"] for check in summary["gate"]["checks"][:2]] == ["max_kl", "min_same_top"]
    base, quantized, program = (summary["metrics"][name] for name in ("base", "quantized", "program"))
    assert 0.05 < quantized["fidelity"]["kl_mean"] < 0.2
    assert quantized["fidelity"]["tokens"] == 14 * 511
    assert quantized["fidelity"]["weights_only"]["same_top"] > 0.8
    assert program["fidelity"]["kl_mean"] == pytest.approx(program["fidelity"]["checkpoint"]["kl_mean"], rel=0.3)
    assert base["mmlu"]["value"] >= 0.8
    assert quantized["mmlu"]["value"] >= 0.8
    assert base["mmlu"]["samples"] == 228
    assert 0.6 < base["chartqa"]["value"] < 1
    assert 0.6 < quantized["chartqa"]["value"] < 1
    assert program["mmlu"]["value"] >= 0.8
    assert (program["chartqa"]["samples"], program["chartqa"]["agreement"] > 0.9) == (50, True)
    assert [column["gsm8k"]["value"] for column in (base, quantized, program)] == pytest.approx([1, 1, 1], abs=0.2)
    assert program["gsm8k"]["samples"] == 16
    assert program["speed"]["image"]["peak_rss_bytes"] > 0
    assert program["image"]["response"] == "blue"
    assert program["text"]["response"] == quantized["smoke"]["response"]
    assert quantized["smoke"]["response"].startswith("I can talk to you")
    names = {path.name for path in Path(summary["release"]).iterdir()}
    assert {"README.md", "metrics.json", "model.safetensors", "model.pte", "tokenizer.json", "config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_a_second_run_is_all_cache_hits(released: Outcome, command_line: CommandLine) -> None:
    again = command_line("run", "--json")
    assert again.code == 0, again.stderr
    assert all(again.cached.values()), again.cached
    assert again.summary["release"] == released.summary["release"]


def test_the_samples_of_every_score_become_part_of_the_release_on_request(
    released: Outcome, command_line: CommandLine
) -> None:
    assert not (Path(released.summary["release"]) / "samples").exists()
    outcome = command_line("run", "--publish-samples", "--json")
    assert outcome.code == 0, outcome.stderr
    assert {name for name, cached in outcome.cached.items() if not cached} == {"gate", "card"}
    release = Path(outcome.summary["release"])
    evaluations = {name for name in ALL if name.startswith("evaluate_")}
    assert {path.name for path in (release / "samples").iterdir()} == {
        f"{name.removeprefix('evaluate_')}.jsonl" for name in evaluations
    }
    listed = json.loads((release / "release.json").read_text())["files"]
    for name in evaluations:
        samples = artifact(command_line, outcome, name) / "data" / "samples.jsonl"
        published = release / "samples" / f"{name.removeprefix('evaluate_')}.jsonl"
        assert published.read_bytes() == samples.read_bytes()
        assert published.relative_to(release).as_posix() in listed
    card = (release / "README.md").read_text()
    assert "are in `samples`" in card
    assert "--publish-samples" in card


def test_a_device_report_reruns_only_the_card_and_one_for_another_program_starts_no_stage(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    program = Path(released.summary["release"]) / "model.pte"
    sha256 = hashlib.sha256(program.read_bytes()).hexdigest()
    report = {**REPORT, "program": {"sha256": sha256, "bytes": program.stat().st_size}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    outcome = command_line("run", "--json", "--device-report", str(path))
    assert outcome.code == 0, outcome.stderr
    # The gate only writes the run's new command.
    assert {name for name, cached in outcome.cached.items() if not cached} == {"gate", "card"}
    assert metrics_of(outcome)["device_report"] == report
    card = (Path(outcome.summary["release"]) / "README.md").read_text(encoding="utf-8")
    assert "Device: Acme One (Acme A1" in card
    assert "--device-report DEVICE_REPORT.json" in metrics_of(outcome)["commands"]["run"]
    assert str(tmp_path) not in card
    # Its content counts, not its path.
    moved = path.rename(tmp_path / "moved.json")
    assert all(command_line("run", "--json", "--device-report", str(moved)).cached.values())
    moved.write_text(json.dumps(REPORT))
    rejected = command_line("run", "--json", "--device-report", str(moved))
    assert rejected.code == 2
    assert rejected.cached == {}
    assert f"SHA-256 {REPORT['program']['sha256']}, but this release's has {sha256}" in rejected.summary["error"]


def test_a_run_trusts_nothing_in_its_working_directory(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    """`cd cloned-model && quantize-gemma run --model .`, where the model has its own modules and settings."""
    with another_program() as program:
        directory = hostile_directory(tmp_path / "model", f"http://127.0.0.1:{program.server_port}/api")
        shutil.copytree(BUILTIN["tiny-gemma3"], directory, dirs_exist_ok=True)
        command = [Path(sys.executable).parent / "quantize-gemma", "run", "--json", "--model", ".", *FIXTURES]
        environment = command_line.environment()
        # `quantize` imports the most libraries, including numba, which reads a settings file.
        command += ["--refresh", "quantize"]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert program.requests == []
    assert not (tmp_path / "model.marker").exists()
    assert json.loads(done.stdout.splitlines()[-1])["release"]


@contextlib.contextmanager
def server(command_line: CommandLine, home: Path) -> Iterator[str]:
    """Run a separate Prefect server with the limits that a run needs; yield the URL of its API."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize_gemma.flows.local_server", str(listener.fileno()), str(os.getpid())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={
                **command_line.environment(),
                "PREFECT_HOME": str(home),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            },
        )
        api = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    try:
        for limit in (ACCELERATOR, MEMORY):
            fields = {"name": limit, "limit": 1}
            httpx.post(f"{api}/v2/concurrency_limits/", json=fields, timeout=60).raise_for_status()
        yield api
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def test_the_device_is_resolved_before_keys_are_computed_and_cpu_keys_ignore_the_batch_size(
    released: Outcome, command_line: CommandLine
) -> None:
    again = command_line("run", "--json", "--device", "cpu", "--batch-size", "8")
    assert again.code == 0, again.stderr[-3000:]
    ran = {name for name, cached in again.cached.items() if not cached}
    # The card contains the command. On a machine with a GPU, the first run was evaluated on the GPU.
    assert ran == {"gate", "card"} if resolve_device("auto") == "cpu" else ran > {"gate", "card"}, again.stderr


def test_a_configured_api_is_used_and_shows_the_runs_tasks_tables_chart_card_and_files(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    with server(command_line, tmp_path) as api:
        outcome = command_line("run", "--json", PREFECT_API_URL=api)
        assert outcome.code == 0, outcome.stderr
        assert "watch the run" not in outcome.stderr
        (run,) = httpx.post(f"{api}/flow_runs/filter", json={}, timeout=30).json()
        tasks = httpx.post(f"{api}/task_runs/filter", json={}, timeout=30).json()
        shown = httpx.post(f"{api}/artifacts/filter", json={}, timeout=30).json()
    revision = metrics_of(outcome)["base_revision"]
    assert run["name"] == f"tiny-gemma3 HQQ-INT8-INT4 {revision[:12]} unchanged"
    assert run["state_name"] == "Completed"
    assert {task["name"].split(" · ")[0]: task["state_name"] for task in tasks}.items() >= {
        name.replace("_", " "): "Cached" for name in ALL
    }.items()
    data = {artifact["key"]: artifact["data"] for artifact in shown}
    release = Path(outcome.summary["release"])
    assert json.loads(data["quality"])[1]["base"].startswith("100.00")
    # Prefect's first UI omits a column without a name, and its second UI shows an error for the table.
    assert all(all(row) for table in ("fidelity", "quality", "gate") for row in json.loads(data[table]))
    assert data["card"].startswith("\n# HQQ-INT8-INT4 tiny-gemma3 model")
    assert data["card"].endswith((release / "README.md").read_text()[-2000:])
    assert [row["result"] for row in json.loads(data["gate"])] == ["pass"] * 24
    assert json.loads(data["fidelity"])[0]["measurement"] == "as shipped"
    assert data["kl-histogram"].startswith("data:image/png;base64,")
    assert data["mmlu-by-subject"].startswith("data:image/png;base64,")
    assert release.as_uri() in data["release"]


def test_the_card_says_what_was_measured_and_its_code_gives_the_releases_weights(
    released: Outcome, tmp_path: Path
) -> None:
    import re

    import torch
    import yaml

    from quantize_gemma.tasks.models.checkpoint import load_model

    release = Path(released.summary["release"])
    card = (release / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    measured = released.summary["metrics"]["quantized"]["mmlu"]["value"]
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(100 * measured, abs=0.005)
    assert "test fixture" in card
    assert released.summary["metrics"]["quantized"]["smoke"]["response"] in card
    for section in ("Running in a mobile app", "Untie weights", "Quantization", "Manual testing", "Model quality"):
        assert f"# {section}" in card
    for section in ("Exporting to ExecuTorch", "Paper", "Resources", "Disclaimer"):
        assert f"# {section}" in card

    code = "\n".join(re.findall(r"```Py\n(.*?)```", card.split("\n# Quantization recipe\n")[1], re.DOTALL))
    code = code.replace('model_id = "tiny-gemma3"', f"model_id = {str(BUILTIN['tiny-gemma3'])!r}")
    names: dict[str, object] = {}
    exec(compile(code, "card", "exec"), names)
    ids = torch.arange(2, 90)[None]
    with torch.no_grad():
        by_card = names["model"](ids).logits  # type: ignore[operator]
        shipped = load_model(release, torch.bfloat16)(ids).logits
    assert torch.equal(by_card, shipped)


def run_loading_code(release: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the card's loading code, unchanged, in the release's directory; return the names that it defines."""
    names: dict[str, Any] = {}
    monkeypatch.chdir(release)
    exec(compile(read_section(release)[1], "README.md", "exec"), names)
    return names


def test_the_cards_loading_code_gives_the_releases_model_and_its_answer(
    released: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from quantize_gemma.tasks.models.checkpoint import load_model

    release = Path(released.summary["release"])
    names = run_loading_code(release, monkeypatch)
    assert names["response"] == metrics_of(released)["quantized"]["smoke"]["response"]
    ids = torch.arange(2, 90)[None]
    with torch.no_grad():
        assert torch.equal(names["model"](ids).logits, load_model(release, torch.bfloat16)(ids).logits)


def test_the_cards_python_code_generates_what_the_card_says(released: Outcome) -> None:
    release = Path(released.summary["release"])
    section = (release / "README.md").read_text().split("\n# Running `model.pte` in Python\n")[1]
    code = section.split("```Py\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=release, capture_output=True, text=True, check=True)
    assert metrics_of(released)["program"]["text"]["response"] in done.stdout


def swap_rows(tensors: dict[str, Any], name: str) -> None:
    tensors[f"{name}._weight_qdata"] = tensors[f"{name}._weight_qdata"].roll(1, 0)


def multiply_every_second_scale(tensors: dict[str, Any], name: str) -> None:
    tensors[f"{name}._weight_scale"][:, 1::2] *= 10


def keep(_tensors: dict[str, Any], _name: str) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "module"),
    [
        (swap_rows, "language_model.model.layers.0.mlp.down_proj"),
        (swap_rows, "language_model.model.layers.2.self_attn.v_proj"),
        (multiply_every_second_scale, "language_model.model.layers.0.self_attn.o_proj"),
        (keep, "embed_scale"),
    ],
)
def test_a_corrupted_weight_a_wrong_scale_and_a_lost_buffer_fail_the_gate(
    released: Outcome,
    command_line: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[dict[str, Any], str], None],
    module: str,
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from quantize_gemma.tasks.gate.checks import judge
    from quantize_gemma.tasks.gate.metrics import pair_outcomes, read_outcomes
    from quantize_gemma.tasks.models.metrics import parse_metrics

    broken = tmp_path / "checkpoint"
    shutil.copytree(released.summary["release"], broken)
    with safe_open(str(broken / "model.safetensors"), framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        metadata = weights.metadata()
    damage(tensors, module)
    save_file(tensors, broken / "model.safetensors", metadata=metadata)
    target = tmp_path / "results"
    target.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    mmlu = BUILTIN_BENCHMARKS["mmlu-mini"]
    requests = record(tmp_path / "requests", broken, mmlu, "mmlu", 1)
    paths = {"requests": requests, "checkpoint": broken, "dataset": mmlu}
    values = {"device": "cpu", "lost_buffer": module if damage is keep else None}
    run_stage("tests.flows.test_run:answer_damaged", tmp_path / "answers", paths, **values)
    paths = {"requests": requests, "answers": [tmp_path / "answers"], "dataset": mmlu}
    inputs = {"benchmark": find_benchmark("mmlu").score_inputs(), "limit": 1, "device": "cpu"}
    run_stage("quantize_gemma.tasks.evaluate:evaluate", target, paths, **inputs)
    metrics = json.loads((Path(released.summary["release"]) / "metrics.json").read_text())
    after = read_outcomes(target)
    before = read_outcomes(artifact(command_line, released, "evaluate_mmlu_base") / "data")
    assert before is not None
    assert after is not None
    metrics["pairs"]["mmlu"] = pair_outcomes({question: before[question] for question in after}, after)
    parsed = parse_metrics(metrics)
    verdict = judge(parsed.benchmarks, parsed, parsed.pairs, parsed.gate.limits)
    failed = {check.name for check in verdict.checks if check.status == "fail"}
    assert {"mmlu_drop"} <= failed <= {"mmlu_drop", "mmlu_recovery"}


def swap_rows_of_release(source: Path, target: Path, *modules: str) -> Path:
    """Copy a release and swap rows of some quantized weights."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    with safe_open(str(target / "model.safetensors"), framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        metadata = weights.metadata()
    for module in modules:
        swap_rows(tensors, module)
    save_file(tensors, target / "model.safetensors", metadata=metadata)
    return target


def test_the_program_is_close_to_its_own_checkpoint_and_far_from_another_one(released: Outcome, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from quantize_gemma.tasks.gate.checks import judge
    from quantize_gemma.tasks.models.metrics import parse_metrics
    from quantize_gemma.tasks.verify.compare import compare

    release = Path(released.summary["release"])
    metrics = metrics_of(released)
    delegation = json.loads((release / "delegation.json").read_text())
    assert delegation == metrics["program"]["delegation"]
    # 3 layers with 7 linears each, and the head; 2 layers with 6 linears each.
    assert delegation["text_decoder"]["xnnpack"]["aten_linear_default"] == 3 * 7 + 1
    assert delegation["vision_encoder"]["xnnpack"]["aten_linear_default"] == 2 * 6
    # One per layer, and one more for an image in the layer with full attention.
    assert delegation["text_decoder"]["custom"]["llama_custom_sdpa_default"] == 3 + 1
    agreement = metrics["program"]["agreement"]
    assert agreement["token_embedding"] == {"max": 0.0, "mean": 0.0}
    # The tiny model has not learned this text, so two tokens are sometimes equally likely.
    assert agreement["same_argmax"] > 0.95
    # Around the sliding window, twice as long, and the longest prompt that leaves room for an answer.
    assert agreement["prompts"]["lengths"] == [63, 64, 65, 128, 1016]
    assert agreement["prompts"]["same_argmax"] > 0.9
    for part in (agreement, *(agreement[name] for name in ("prompts", "image", "late_image"))):
        assert 0 < part["kl_program"] < part["kl_act_quant"]
    assert agreement["vision_encoder"]["error"] < 0.5 * agreement["vision_encoder"]["error_act_quant"]
    modules = ("vision_tower.vision_model.encoder.layers.1.mlp.fc2", "language_model.model.layers.1.mlp.up_proj")
    other = swap_rows_of_release(release, tmp_path / "other", *modules)
    metrics["program"]["agreement"] = asdict(compare(release, other, AutoConfig.from_pretrained(other), 1024, True)[0])
    parsed = parse_metrics(metrics)
    verdict = judge(parsed.benchmarks, parsed, parsed.pairs, {**parsed.gate.limits, "max_kl_ratio": 1.0})
    failed = {check.name for check in verdict.checks if check.status == "fail"}
    parts = ("", "_prompts", "_image", "_late_image")
    assert failed == {"vision_encoder", *(f"program_kl{part}" for part in parts)}


def test_the_program_answers_the_benchmarks_questions_like_the_checkpoint(
    released: Outcome, command_line: CommandLine
) -> None:
    import pyarrow.parquet
    import torch
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.pte import PteProgram

    release = Path(released.summary["release"])
    samples = artifact(command_line, released, "evaluate_mmlu_quantized") / "data" / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(release)
    program = PteProgram(release / "model.pte")
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    agreed = 0
    for row in rows:
        (questions,) = BUILTIN_BENCHMARKS["mmlu-mini"].glob(f"{row['task']}/test-*.parquet")
        question = pyarrow.parquet.read_table(questions).to_pylist()[row["doc_id"]]
        # The same prompt as in lm-eval's mmlu.
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", question["choices"], strict=True))
        about = f"The following are multiple choice questions (with answers) about {row['task'].replace('_', ' ')}."
        ids = torch.tensor([tokenizer(f"{about}\n\n{question['question'].strip()}\n{choices}\nAnswer:")["input_ids"]])
        logits = program.decode(program.embed_tokens(ids), {ids.shape[1] - 1})[0]
        agreed += int(logits[letters].argmax()) == row["prediction"]
    assert agreed == len(rows) == 228


def answer_damaged(target: Path, lost_buffer: str | None, **settings: Any) -> dict[str, Any]:
    """Answer as the stage does; `lost_buffer` imitates a loader that does not restore non-persistent buffers."""
    from transformers.models.gemma3 import modeling_gemma3

    from quantize_gemma.tasks.evaluate.answer import answer

    if lost_buffer:
        original = modeling_gemma3.Gemma3TextScaledWordEmbedding.__init__

        def without_scale(self: Any, *arguments: Any, embed_scale: float = 1.0, **keywords: Any) -> None:
            original(self, *arguments, embed_scale=1.0, **keywords)

        modeling_gemma3.Gemma3TextScaledWordEmbedding.__init__ = without_scale
    return answer(target, **settings)


def test_a_refreshed_stage_runs_again_and_its_unchanged_output_keeps_the_later_ones_cached(
    released: Outcome, command_line: CommandLine
) -> None:
    again = command_line("run", "--refresh", "untie", "--json")
    assert again.code == 0, again.stderr
    assert again.cached == {name: name != "untie" for name in ALL}
    seconds = {s["name"]: s["seconds"] for s in again.summary["stages"]}
    assert seconds["untie"] != {s["name"]: s["seconds"] for s in released.summary["stages"]}["untie"]


def test_a_release_that_fails_the_gate_stays_on_disk_and_the_run_says_which_checks_pass(
    released: Outcome, command_line: CommandLine, tmp_path: Path
) -> None:
    with server(command_line, tmp_path) as api:
        outcome = command_line("run", "--max-kl-ratio", "0.01", "--json", PREFECT_API_URL=api)
        (run,) = httpx.post(f"{api}/flow_runs/filter", json={}, timeout=30).json()
    assert outcome.code == 1
    verdict = outcome.summary["gate"]
    assert not verdict["passed"]
    failed = {check["name"] for check in verdict["checks"] if check["status"] == "fail"}
    assert failed - {"vision_encoder"} == {
        "program_kl",
        "program_kl_prompts",
        "program_kl_image",
        "program_kl_late_image",
    }
    assert outcome.summary["published"] is None
    assert (Path(outcome.summary["release"]) / "model.pte").is_file()
    # The limits are part of the gate's key; nothing before it runs again.
    assert outcome.cached == {name: name not in ("gate", "card") for name in ALL}
    assert run["state_type"] == "FAILED"
    for text in (run["state"]["message"], outcome.stderr):
        assert "the release fails the gate: the program's KL divergence" in text
        lines = [line.split("  ") for line in text.splitlines()]
        verdicts = {line[0]: line[-1].strip() for line in lines if line[-1].strip() in ("pass", "fail")}
        expected = {check["name"].replace("_", " "): check["status"] for check in verdict["checks"]}
        assert verdicts == expected


@pytest.mark.parametrize(
    ("stage", "damage"), [("quantize", "truncated"), ("quantize", "deleted"), ("download", "truncated")]
)
def test_a_damaged_artifact_runs_its_stage_again_and_no_other(
    released: Outcome, command_line: CommandLine, stage: str, damage: str
) -> None:
    folder = artifact(command_line, released, stage)
    if damage == "deleted":
        shutil.rmtree(folder)
    else:
        # Other artifacts have hard links to the same file.
        os.truncate(folder / "data" / "model.safetensors", 1000)
    again = command_line("run", "--json")
    assert again.code == 0, again.stderr
    assert again.cached == {name: name != stage for name in ALL}
    if damage == "truncated":
        assert "model.safetensors has 1,000 bytes instead of" in again.stderr
    assert (Path(again.summary["release"]) / "model.safetensors").stat().st_size > 100_000
    assert os.path.getsize(BUILTIN["tiny-gemma3"] / "model.safetensors") > 100_000


@pytest.mark.long
def test_a_stage_that_dies_is_named_while_others_finish_and_the_next_run_resumes_there(
    released: Outcome, command_line: CommandLine
) -> None:
    shutil.rmtree(artifact(command_line, released, "smoke"))
    shutil.rmtree(artifact(command_line, released, "export"))
    process = start_run_into("smoke", command_line, until=has_a_process)
    while {stage.name() for stage in stage_processes(process.pid)} != {"smoke", "export"}:
        assert process.poll() is None, process.communicate()
    next(stage for stage in stage_processes(process.pid) if stage.name() == "smoke").kill()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "quantize-gemma: smoke: its process ended with SIGKILL" in stderr
    summary = Outcome(1, stdout, stderr).summary
    states = {stage["name"]: stage["state"] for stage in summary["stages"]}
    assert states["smoke"] == "FAILED"
    assert states["export"] == "COMPLETED"
    assert not Outcome(1, stdout, stderr).cached["export"]
    assert states["card"] == "PENDING"
    assert summary["release"] is None
    again = command_line("run", "--json")
    assert again.cached == {name: name != "smoke" for name in ALL}


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGTERM)],
)
def test_an_interrupted_run_ends_immediately_and_leaves_no_process(
    released: Outcome, command_line: CommandLine, sent: signal.Signals, code: int
) -> None:
    shutil.rmtree(artifact(command_line, released, "export"))
    process = start_run_into("export", command_line, until=uses("executorch"))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sent)
    stdout, _ = process.communicate(timeout=20)
    assert process.returncode == code
    if sent == signal.SIGINT:
        assert json.loads(stdout.splitlines()[-1])["error"] == "interrupted"
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert not list(command_line.home.glob("*/.partial-*"))


@pytest.mark.long
@pytest.mark.longest
def test_two_concurrent_runs_resume_a_run_killed_in_export(released: Outcome, command_line: CommandLine) -> None:
    arguments = ("--recipe", "AFFINE-INT8-INT4", "--max-seq-len", "128")
    exported = set(command_line.home.glob("export/*/manifest.json"))
    kill_run_in("export", command_line, *arguments, until=uses("executorch"))
    assert set(command_line.home.glob("export/*/manifest.json")) == exported
    # The untied checkpoint is the same for every recipe; without it, both runs have to rebuild it.
    shutil.rmtree(artifact(command_line, released, "untie"))
    both = [command_line.start("run", *arguments, "--json") for _ in range(2)]
    outcomes = []
    for process in both:
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
        outcomes.append(Outcome(process.returncode, stdout, stderr))
    one, other = (digests(command_line, outcome, *sorted(ALL)) for outcome in outcomes)
    assert one == other
    kept = [{name for name, cached in outcome.cached.items() if cached} for outcome in outcomes]
    assert kept[0] & kept[1] >= {"download", "download_mmlu", "quantize", "answer_mmlu_base", "evaluate_mmlu_base"}
    assert not kept[0] & kept[1] & {"untie", "export", "verify", "card"}
    for outcome in outcomes:
        assert outcome.summary["release"] != released.summary["release"]
        assert outcome.summary["metrics"]["program"]["text"]["response"]


@pytest.mark.long
def test_a_run_killed_in_quantize_is_finished_by_the_next(released: Outcome, command_line: CommandLine) -> None:
    folder = artifact(command_line, released, "quantize")
    before = json.loads((folder / "manifest.json").read_text())["digest"]
    shutil.rmtree(folder)
    kill_run_in("quantize", command_line, until=writes_weights)
    assert not folder.exists()
    again = command_line("run", "--json")
    assert again.code == 0, again.stderr
    assert json.loads((folder / "manifest.json").read_text())["digest"] == before


@pytest.mark.long
def test_a_run_killed_in_an_evaluation_is_resumed_by_the_next_after_the_subjects_that_were_answered(
    released: Outcome, command_line: CommandLine
) -> None:
    def shards() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in command_line.home.glob("responses/[0-9a-f]*/manifest.json")}

    before = digests(command_line, released, "answer_mmlu_base")
    shutil.rmtree(artifact(command_line, released, "answer_mmlu_base"))
    shutil.rmtree(command_line.home / "responses")
    process = start_run_into("answer", command_line, "--workers", "2", until=has_started)
    while not shards():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(stage_processes(process.pid)) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    kept = shards()
    again = command_line("run", "--json")
    assert again.cached == {name: name != "answer_mmlu_base" for name in ALL}
    assert digests(command_line, again, "answer_mmlu_base") == before
    assert len(shards()) == 57
    assert {path: finished for path, finished in shards().items() if path in kept} == kept


def check_calibration(outcome: Outcome, digest: str) -> None:
    """Check what a release says about its calibration, and its chart of the remaining error."""
    calibration = metrics_of(outcome)["calibration"]
    assert calibration["dataset"] == {"name": "text.txt", "revision": digest, "fixture": False}
    assert calibration["tokens"] == 96 * (calibration["sequences"] + calibration["answers"])
    card = (Path(outcome.summary["release"]) / "README.md").read_text(encoding="utf-8")
    assert f"4 sequences of 96 tokens from text.txt at revision `{digest}`" in card
    assert "(output-error.png)" in card
    assert (Path(outcome.summary["release"]) / "output-error.png").read_bytes().startswith(b"\x89PNG")
    errors = metrics_of(outcome)["quantized"]["output_error"]
    assert len(errors) == 3 * 7 + 1
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.longest
@pytest.mark.long
@pytest.mark.parametrize(
    "recipe",
    ["SEARCH-INT8-INT4", "GPTQ-INT8-INT4", "GPTQ-INT8-INT4-HEAD8", "DISTILL-INT8-INT4", "DISTILL-INT8-INT4-HEAD8"],
)
def test_every_built_in_recipe_goes_from_the_checkpoint_to_a_program_that_passes_the_gate(
    command_line: CommandLine, recipe: str, tmp_path: Path
) -> None:
    """The program runs in the C++ runners, too; most other tests use the published card's recipe."""
    lines = (BUILTIN_TEXTS["tiny-text"] / "text.txt").read_text("utf-8").splitlines(keepends=True)
    for place, name in enumerate(("calibration", "text")):
        (tmp_path / f"{name}.txt").write_text("".join(lines[len(lines) // 2 * place :][: len(lines) // 2]), "utf-8")
    texts = ["--text", str(tmp_path / "text.txt")]
    texts += ["--calibration", str(tmp_path / "calibration.txt")] if recipe.startswith(("GPTQ", "DISTILL")) else []
    outcome = command_line("run", "--recipe", recipe, *texts, "--limit", "2", "--json")
    assert outcome.code == 0, outcome.stderr
    metrics = metrics_of(outcome)
    assert metrics["recipe"] == recipe
    assert metrics["gate"]["passed"]
    runner = [check["name"] for check in metrics["gate"]["checks"] if check["name"].startswith("program_kl")]
    assert "program_kl_prompts" in runner


@pytest.mark.longest
@pytest.mark.long
def test_a_checkpoint_on_the_grid_becomes_a_program_that_differs_by_its_activations_alone(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """As in Google's QAT checkpoints, which are not available to the tests."""
    model = write_grid_checkpoint(BUILTIN["tiny-gemma3"], tmp_path / "grid")
    arguments = ("--recipe", "EXACT", "--limit", "2", "--json", *FIXTURES)
    arguments += ("--reference-model", "tiny-gemma3")
    outcome = command_line("run", "--model", str(model), *arguments)
    assert outcome.code == 0, outcome.stderr
    metrics = metrics_of(outcome)
    errors = metrics["quantized"]["weight_error"]
    assert [errors[role] for role in ("embedding", "linear", "lm_head")] == [0, 0, 0]
    fidelity = metrics["quantized"]["fidelity"]
    # The checkpoint's bfloat16 is rounded once more than the program's float32.
    assert fidelity["weights_only"]["kl_mean"] < 0.1 * fidelity["kl_mean"]
    agreement = metrics["program"]["agreement"]
    assert agreement["kl_program"] < agreement["kl_act_quant"]
    card = (Path(outcome.summary["release"]) / "README.md").read_text(encoding="utf-8")
    assert "**Lossless:** every quantized weight of the language model" in card
    # The original model, before its weights were put on the grid, is further away, and is named on the card.
    reference = metrics["quantized"]["reference"]
    assert reference["name"] == "tiny-gemma3"
    assert reference["fidelity"]["weights_only"]["kl_mean"] > 10 * fidelity["weights_only"]["kl_mean"]
    assert "| from tiny-gemma3, weights only | " in card
    assert "--reference-model tiny-gemma3" in card


@pytest.mark.long
def test_a_text_only_checkpoint_and_a_calibrated_recipe_go_through_the_same_flow(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_text_only(BUILTIN["tiny-gemma3"], tmp_path / "tiny-text")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text("utf-8") for path in sorted(Path("docs").rglob("*.md"))), encoding="utf-8")
    recipe = json.loads((RECIPES / "DISTILL-INT8-INT4.json").read_text(encoding="utf-8"))
    recipe["calibration"] = {"sequences": 4, "length": 96, "answers": 1}
    recipe["distillation"] = {"sequences": 16, "steps": 6}
    (tmp_path / "mine.json").write_text(json.dumps(recipe), encoding="utf-8")
    arguments = ("--recipe", str(tmp_path / "mine.json"), "--calibration", str(text), "--max-seq-len", "256")
    outcome = command_line("run", "--model", str(target), *arguments, "--limit", "2", "--json", *FIXTURES)
    assert outcome.code == 0, outcome.stderr
    check_calibration(outcome, hashlib.sha256(text.read_bytes()).hexdigest())
    distillation = metrics_of(outcome)["distillation"]
    assert [distillation[name] for name in ("sequences", "held_out", "steps")] == [16, 1, 6]
    card = (Path(outcome.summary["release"]) / "README.md").read_text(encoding="utf-8")
    assert "were trained for 6 steps on 16 such sequences" in card
    assert (
        "trains all scales and norms of the language model except the embedding's scales; the code below does" in card
    )
    # The plan of another run finds these results in the store.
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(command_line.home))
    options = RunOptions(model=str(target), calibration=str(text), export=ExportOptions(max_seq_len=256))
    resolved = resolve_model(str(target), None, True), load_recipe(str(tmp_path / "mine.json"))
    calibrated_on = ResolvedDataset("text.txt", digest_text(str(text)), str(text), fixture=False, on_hub=False)
    stages = writing_stages(options, *resolved, resolve_text("tiny-text", None, True), calibrated_on)
    assert [one.stage.name for one in stages][-4:] == ["calibrate", "quantize", "distill", "export"]
    assert missing_stages(stages, []) == []
    assert missing_stages(stages, ["distill"]) == ["distill"]
    program = outcome.summary["metrics"]["program"]
    assert program["task"] == "text-generation"
    assert program["text"]["response"].startswith("I can talk to you")
    assert program["agreement"]["prompts"]["lengths"] == [63, 64, 65, 128, 248]
    assert program["image"] is None
    # For a text-only model, benchmarks with images are not even resolved.
    assert "chartqa" not in outcome.summary["metrics"]["quantized"]
    assert not any("chartqa" in stage["name"] for stage in outcome.summary["stages"])
    assert outcome.summary["metrics"]["quantized"]["mmlu"]["value"] >= 0.8
    names = run_loading_code(Path(outcome.summary["release"]), monkeypatch)
    assert type(names["model"]).__name__ == "Gemma3ForCausalLM"
    assert names["response"] == outcome.summary["metrics"]["quantized"]["smoke"]["response"]
