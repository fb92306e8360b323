"""Compare our GPTQ with llm-compressor's and AutoRound: `python -m benchmarks.references --model DIR --text FILE …`.

All three get the same checkpoint and the same calibration tokens, in separate processes, and quantize the decoder's
linears to int4 with a positive scale for each 32 weights. The libraries' integers and scales then replace ours in a
checkpoint with int8 embeddings and an int8 head, whose weights-only fidelity is measured. The two libraries need other
versions of torch and transformers: they are installed into virtual environments in `--folder`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.quality import our_calibrate, our_fidelity, our_fidelity_base, our_quantize, our_untie
from benchmarks.side_by_side import empty_folder, machine, run
from quantize_gemma.tasks.models.checkpoint import is_multimodal, read_config, read_header
from quantize_gemma.tasks.models.recipe import load_recipe

RECIPE = "GPTQ-INT8-INT4-HEAD8"
FOLDER = Path(__file__).parent
LLM_COMPRESSOR, AUTO_ROUND = "llmcompressor==0.14.0.1", "auto-round==0.16.1"
# {name of the row: (requirement, script, last argument of the script)}
REFERENCES = {
    "llm-compressor, GPTQ": (LLM_COMPRESSOR, "with_llm_compressor.py", "memoryless_minmax"),
    "llm-compressor, GPTQ, scales by squared error": (LLM_COMPRESSOR, "with_llm_compressor.py", "memoryless_mse"),
    "auto-round, 50 iterations": (AUTO_ROUND, "with_auto_round.py", "50"),
    "auto-round, 200 iterations": (AUTO_ROUND, "with_auto_round.py", "200"),
}
COLUMNS = ("name", "ppl", "kl_mean", "same_top", "seconds", "peak_rss_bytes")


def install(folder: Path, requirement: str) -> Path:
    """Install a requirement into a virtual environment, and return its interpreter."""
    environment = folder / requirement
    if not (environment / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run([str(environment / "bin/pip"), "install", "--quiet", requirement], check=True)
        (environment / "installed").touch()
    return environment / "bin" / "python"


def run_reference(
    python: Path, script: str, checkpoint: Path, tokens: Path, target: Path, option: str
) -> dict[str, Any]:
    """Run a script in its environment; return "seconds" and "peak_rss_bytes"."""
    start = time.monotonic()
    # -I makes Python ignore PYTHONPATH, so that the script imports only from its environment.
    command = [str(python), "-I", str(FOLDER / script), str(checkpoint), str(tokens), str(target), option]
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{script} ended with {code}")
    return {"seconds": time.monotonic() - start, "peak_rss_bytes": usage.ru_maxrss * 1024}


def read_integers(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return {"<module>.qdata", "<module>.scale"} of {"<module>.weight", "<module>.scale"}.

    Raises:
        AssertionError: A weight is missing, or is not an integer times its scale, within the precision of bfloat16.
    """
    import torch

    parts = {}
    for name, scale in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "scale":
            assert f"{module}.weight" in tensors, f"{module} has a scale, but no weight"
            weight = tensors[f"{module}.weight"].float()
            quotients = weight.unflatten(1, (scale.shape[1], -1)) / scale.float()[:, :, None]
            integers = quotients.round()
            distance = float((quotients - integers).abs().max())
            assert distance < 0.1, f"{module} is not on the grid of its scales: a weight is {distance:.2f} steps off"
            parts |= {f"{module}.qdata": integers.flatten(1).to(torch.int8), name: scale}
    return parts


def replace_linears(checkpoint: Path, weights: Path) -> int:
    """Overwrite the decoder's linears in one of our checkpoints; return their number.

    Raises:
        AssertionError: The file has other linears than the decoder, or one does not fit our format: integers are
            outside [-8, 7], or scales are not positive. Nothing is overwritten then.
    """
    import torch
    from safetensors.torch import load_file

    tensors = read_integers(load_file(weights))
    targets = {}
    for name, tensor in read_header(checkpoint / "model.safetensors").items():
        module, _, part = name.rpartition("._weight_")
        if part in ("qdata", "scale") and ".layers." in module:
            targets[f"{module}.{part}"] = tensor
    different = sorted(targets.keys() ^ tensors.keys())
    assert not different, f"{len(different)} tensors are only in one of the two checkpoints, such as {different[0]}"
    for name, tensor in targets.items():
        values = tensors[name]
        assert tuple(values.shape) == tuple(tensor.shape), f"{name}: {values.shape}, not {tensor.shape}"
        is_valid = (values >= -8) & (values <= 7) if name.endswith("qdata") else values > 0
        assert is_valid.all(), f"{name}: {int((~is_valid).sum())} values do not fit our format"
    with (checkpoint / "model.safetensors").open("r+b") as file:
        for name, tensor in targets.items():
            file.seek(tensor.start)
            file.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return len(targets) // 2


def measure(folder: Path, model: Path, text: Path, calibration: Path, references: list[str]) -> list[dict[str, Any]]:
    """Return the table's rows, ours first."""

    def measure_fidelity(checkpoint: Path) -> dict[str, Any]:
        results = empty_folder(folder / "results")
        run(function_name(our_fidelity), target=results, base=untied, states=states, checkpoint=checkpoint)
        metrics = json.loads((results / "results.json").read_text(encoding="utf-8"))["weights_only"]
        return {key: metrics[key] for key in ("ppl", "kl_mean", "same_top")}

    if is_multimodal(read_config(model)):
        raise SystemExit("use a text-only checkpoint: the libraries name the modules of a multimodal one differently")
    pythons = {name: install(folder, REFERENCES[name][0]) for name in references}
    corpus, untied, states, tokens, ours = (
        empty_folder(folder / name) for name in ("text", "untied", "states", "calibration", "ours")
    )
    shutil.copyfile(text, corpus / "text.txt")
    run(function_name(our_untie), target=untied, checkpoint=model)
    run(function_name(our_fidelity_base), target=states, checkpoint=untied, text=corpus, windows=10)
    run(
        function_name(our_calibrate),
        target=tokens,
        checkpoint=untied,
        text=str(calibration),
        recipe=RECIPE,
        fidelity_text=str(text),
    )
    step = run(function_name(our_quantize), target=ours, checkpoint=untied, recipe=RECIPE, calibration=tokens)
    rows = [{"name": load_recipe(RECIPE).name, **step, **measure_fidelity(ours)}]
    print_row(rows[0])
    for name in references:
        _, script, option = REFERENCES[name]
        target = empty_folder(folder / "reference") / "weights.safetensors"
        step = run_reference(pythons[name], script, untied, tokens / "calibration.json", target, option)
        their_checkpoint = empty_folder(folder / "theirs")
        shutil.copytree(ours, their_checkpoint, dirs_exist_ok=True)
        replace_linears(their_checkpoint, target)
        rows.append({"name": name, **step, **measure_fidelity(their_checkpoint)})
        print_row(rows[-1])
    return [{column: row[column] for column in COLUMNS} for row in rows]


def function_name(function: Any) -> str:
    """Return "module:name", which a worker process uses to import a function."""
    return f"{function.__module__}:{function.__name__}"


def print_row(row: dict[str, Any]) -> None:
    """Print one row of the table as Markdown."""
    quality = f"{row['ppl']:.2f} | {row['kl_mean']:.4f} | {100 * row['same_top']:.1f}"
    print(f"| {row['name']} | {quality} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 1e9:.2f} |", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.references", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the directory of the base checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="the text to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="the text to calibrate on")
    parser.add_argument("--references", nargs="+", choices=REFERENCES, default=list(REFERENCES))
    parser.add_argument("--folder", type=Path, required=True, help="directory for the environments, about 10 GB each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print("| quantized by | PPL | KL | same top token, % | seconds | peak memory, GB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    paths = (path.resolve() for path in (options.folder, options.model, options.text, options.calibration))
    rows = measure(*paths, options.references)
    if options.json:
        print(json.dumps({"model": str(options.model), "machine": machine(), "text": options.text.name, "rows": rows}))


if __name__ == "__main__":
    main()
