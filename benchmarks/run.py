"""Time and memory of each stage of a run on random weights: `python -m benchmarks.run --shape 4b`.

With `--reference`, also untie, quantize, and export the same checkpoint with the published card's own commands.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_checkpoint
from benchmarks.side_by_side import ROOT, describe, machine, print_result, run, version
from quantize_gemma.tasks.runtime.patches import DISABLE
from quantize_gemma.tasks.runtime.units import human_size

RECIPE = "HQQ-INT8-INT4"
# The smallest evaluation that runs every stage. Random weights fail the gate, which does not matter here.
OPTIONS = (
    "--text=tiny-text",
    "--text-windows=2",
    "--tasks=mmlu,chartqa",
    "--limit=1",
    "--program-samples=4",
    "--dataset=mmlu=mmlu-mini",
    "--dataset=chartqa=chartqa-mini",
    "--max-kl=none",
    "--min-same-top=none",
)


def measure(shape: str, folder: Path, max_seq_len: int, reference: bool) -> dict[str, Any]:
    """Run the flow, and the references if requested. Return the results, and the lines to print."""
    checkpoint = make_checkpoint(shape, folder)
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    environment = {**os.environ, "QUANTIZE_GEMMA_HOME": str(home / "store"), "PREFECT_HOME": str(home / "prefect")}
    command = [sys.executable, "-m", "quantize_gemma.flows.cli", "run", "--model", str(checkpoint)]
    command += ["--max-seq-len", str(max_seq_len), *OPTIONS, "--json"]
    process = subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    summary = json.loads(process.stdout.splitlines()[-1])
    incomplete = [stage["name"] for stage in summary["stages"] if stage["state"] != "COMPLETED"]
    if set(incomplete) - {"check_gate"} or not summary["stages"]:
        raise SystemExit(f"{', '.join(incomplete) or 'the run'} did not complete: {summary['error']}")
    shutil.rmtree(home)
    # The others write no artifact, and have no peak memory.
    stages = [stage for stage in summary["stages"] if stage["key"]]
    steps = {stage["name"]: {name: stage[name] for name in ("seconds", "peak_rss_bytes")} for stage in stages}
    stock = run_references(checkpoint, folder, max_seq_len) if reference else {}
    lines = [
        f"{shape}, max_seq_len {max_seq_len}, {version()}, {machine()}",
        "",
        "| stage | time | peak memory | time, published card | peak memory, published card |",
        "|---|---:|---:|---:|---:|",
        *(f"| {name.replace('_', ' ')} | {_cells(step)} | {_cells(stock.get(name))} |" for name, step in steps.items()),
        f"| all | {sum(step['seconds'] for step in steps.values()):.1f} s | | | |",
    ]
    case = {"shape": shape, "max_seq_len": max_seq_len}
    return {**describe("run", case), "ours": steps, "reference": stock, "equal": None, "lines": lines}


def run_references(checkpoint: Path, folder: Path, max_seq_len: int) -> dict[str, Any]:
    """Run the published card's commands; return their time and memory by the names of our stages."""
    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as outputs:
        untied, quantized, program = (Path(outputs) / name for name in ("untied", "quantized", "program"))
        for target in (untied, quantized, program):
            target.mkdir()
        steps["untie"] = run("benchmarks.quantize:reference_untie", {}, target=untied, checkpoint=checkpoint)
        inputs: dict[str, Any] = {"target": quantized, "checkpoint": untied, "recipe": RECIPE}
        steps["quantize"] = run("benchmarks.quantize:reference_quantize", {}, **inputs)
        # torchao's output lacks the other files of a checkpoint, so export ours, whose tensors are equal.
        shutil.rmtree(quantized)
        quantized.mkdir()
        run("benchmarks.quantize:our_quantize", {}, **inputs, device="cpu")
        arguments = {"target": program, "checkpoint": quantized, "max_seq_len": max_seq_len}
        steps["export"] = run("benchmarks.export:export", {DISABLE: "all"}, **arguments)
    return {name: {cost: step[cost] for cost in ("seconds", "peak_rss_bytes")} for name, step in steps.items()}


def _cells(step: dict[str, Any] | None) -> str:
    if step is None:
        return " | "
    memory = "" if step["peak_rss_bytes"] is None else human_size(step["peak_rss_bytes"])
    return f"{step['seconds']:.1f} s | {memory}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="directory to keep the checkpoint in [default: temporary]")
    parser.add_argument("--reference", action="store_true", help="also measure the published card's commands (slow)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print_result(measure(options.shape, folder, options.max_seq_len, options.reference), options.json)


if __name__ == "__main__":
    main()
