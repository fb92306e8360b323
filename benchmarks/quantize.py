"""Untie and quantize as the published card does, and as the flow does: `python -m benchmarks.quantize --shape 4b`.

The card loads the model, clones lm_head, and saves; then it loads the model again, calls torchao's `quantize_`, and
saves.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_checkpoint
from benchmarks.side_by_side import empty_folder, format_line, machine, make_result, print_result, run, version
from quantize_gemma.tasks.models.checkpoint import is_multimodal
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import load_recipe, match_rules, torchao_config
from quantize_gemma.tasks.runtime.units import human_size


def reference_untie(target: str, checkpoint: str) -> dict[str, Any]:
    """Untie with transformers."""
    import torch

    model = _load(checkpoint)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model._tied_weights_keys = {}
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(target)
    return {}


def reference_quantize(target: str, checkpoint: str, recipe: str) -> dict[str, Any]:
    """Quantize the loaded model with torchao's `quantize_`, and save the flattened tensors."""
    import json

    import torch
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import FqnToConfig, quantize_

    model = _load(checkpoint)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = {n: list(module.weight.shape) for n, module in model.named_modules() if isinstance(module, kinds)}
    rules = match_rules(load_recipe(recipe), modules)
    quantize_(model, FqnToConfig({name: torchao_config(rule) for name, rule in rules.items()}), filter_fn=None)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, Path(target) / "model.safetensors", metadata={**strings, "format": "pt"})
    return {}


def our_untie(target: str, checkpoint: str) -> dict[str, Any]:
    """Untie as the flow does."""
    from quantize_gemma.tasks.untie import untie

    return untie(Path(target), Path(checkpoint))


def our_quantize(target: str, checkpoint: str, recipe: str, device: str) -> dict[str, Any]:
    """Quantize as the flow does."""
    from quantize_gemma.tasks.quantize import quantize

    return quantize(Path(target), Path(checkpoint), load_recipe(recipe).to_json(), device)


def copy_files(target: str, checkpoint: str) -> dict[str, Any]:
    """Copy every file: a lower bound for a stage that reads and writes as much."""
    import subprocess

    subprocess.run(["cp", "-r", "--reflink=never", f"{checkpoint}/.", target], check=True)
    return {}


def different_tensors(first: Path, second: Path) -> list[str]:
    """Return the tensors that differ between two quantized checkpoints, regardless of their naming schemes."""
    import torch
    from safetensors import safe_open

    with safe_open(str(first), framework="pt") as first_file, safe_open(str(second), framework="pt") as second_file:
        names = {GEMMA3.runtime_name(name): name for name in first_file.keys()}  # noqa: SIM118
        second_names = {GEMMA3.runtime_name(name): name for name in second_file.keys()}  # noqa: SIM118
        different = sorted(set(names) ^ set(second_names))
        for name in sorted(set(names) & set(second_names)):
            a, b = first_file.get_tensor(names[name]), second_file.get_tensor(second_names[name])
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                different.append(name)
        return different


def measure(shape: str, folder: Path, recipe: str, device: str, reference: bool) -> dict[str, Any]:
    """Run every step in turn. Return the results, and the lines to print."""
    base = make_checkpoint(shape, folder)
    folders: dict[str, Path] = {}

    def new_folder(name: str) -> Path:
        folders[name] = empty_folder(folder / f"out-{shape}-{name}")
        return folders[name]

    steps: dict[str, dict[str, Any]] = {}
    if reference:
        steps["untie, transformers"] = run(
            "benchmarks.quantize:reference_untie", target=new_folder("reference-untied"), checkpoint=base
        )
    steps["untie, ours"] = run("benchmarks.quantize:our_untie", target=new_folder("untied"), checkpoint=base)
    if reference:
        shutil.rmtree(folders["reference-untied"])
        steps["quantize, torchao"] = run(
            "benchmarks.quantize:reference_quantize",
            target=new_folder("reference-quantized"),
            checkpoint=folders["untied"],
            recipe=recipe,
        )
    steps["quantize, ours"] = run(
        "benchmarks.quantize:our_quantize",
        target=new_folder("quantized"),
        checkpoint=folders["untied"],
        recipe=recipe,
        device=device,
    )
    steps["cp of the input"] = run(
        "benchmarks.quantize:copy_files", target=new_folder("copy"), checkpoint=folders["untied"]
    )
    shutil.rmtree(folders["copy"])
    steps["cp of the output"] = run(
        "benchmarks.quantize:copy_files", target=new_folder("copy"), checkpoint=folders["quantized"]
    )
    bytes_read, bytes_written = (_bytes(folders[name]) for name in ("untied", "quantized"))
    lines = [
        f"{shape}, {recipe}, {version()}, {machine()}",
        *(format_line(name, step) for name, step in steps.items()),
        f"read {human_size(bytes_read)}, written {human_size(bytes_written)}",
    ]
    result: dict[str, Any] = {"bytes": {"read": bytes_read, "written": bytes_written}}
    equal = None
    result["steps"] = {name: {k: step[k] for k in ("seconds", "peak_rss_bytes")} for name, step in steps.items()}
    floor = steps["quantize, ours"]["seconds"] / steps["cp of the input"]["seconds"]
    result["ratios"] = {"quantize vs. cp of the input": floor}
    if reference:
        for name, reference_step in (("untie", "untie, transformers"), ("quantize", "quantize, torchao")):
            ours = steps[f"{name}, ours"]
            result["ratios"][f"{name}, time"] = steps[reference_step]["seconds"] / ours["seconds"]
            result["ratios"][f"{name}, memory"] = steps[reference_step]["peak_rss_bytes"] / ours["peak_rss_bytes"]
        files = [folders[name] / "model.safetensors" for name in ("reference-quantized", "quantized")]
        result["different"] = different_tensors(*files)
        equal = not result["different"]
        lines.append("equal, tensor for tensor" if not result["different"] else f"DIFFERENT: {result['different']}")
    lines += [f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items()]
    for path in folders.values():
        shutil.rmtree(path, ignore_errors=True)
    case = {"shape": shape, "recipe": recipe, "device": device}
    compared_steps = steps.get("quantize, torchao"), steps["quantize, ours"]
    return {**make_result("quantize", case, *compared_steps, equal), **result, "lines": lines}


def _load(checkpoint: str) -> Any:
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    multimodal = is_multimodal(AutoConfig.from_pretrained(checkpoint).to_dict())
    kind = Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM
    return kind.from_pretrained(checkpoint, dtype=torch.bfloat16)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--recipe", default="HQQ-INT8-INT4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device for our quantization")
    parser.add_argument("--folder", type=Path, help="directory to keep checkpoints in [default: temporary]")
    parser.add_argument("--no-reference", action="store_true", help="skip the reference, which takes 20 GB for 4b")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(options.shape, folder, options.recipe, options.device, not options.no_reference)
        print_result(result, options.json)


if __name__ == "__main__":
    main()
