"""Untie and quantize, the card's own way and ours, in turn: `python -m benchmarks.quantize --shape 4b`.

The card's way: load the model, clone lm_head, save; load it again, torchao's `quantize_`, save.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, make_checkpoint
from benchmarks.side_by_side import compared, line, machine, run, show, version
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import decide, load_recipe, torchao_config
from quantize_gemma.tasks.runtime.units import human_size


def reference_untie(target: str, checkpoint: str) -> dict[str, Any]:
    """Unties through transformers."""
    import torch

    model = _load(checkpoint)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model._tied_weights_keys = {}
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(target)
    return {}


def reference_quantize(target: str, checkpoint: str, recipe: str) -> dict[str, Any]:
    """Quantizes with torchao's `quantize_` on the loaded model, and saves what it flattens to."""
    import json

    import torch
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import FqnToConfig, quantize_

    model = _load(checkpoint)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = {n: list(module.weight.shape) for n, module in model.named_modules() if isinstance(module, kinds)}
    rules = decide(load_recipe(recipe), modules)
    quantize_(model, FqnToConfig({name: torchao_config(rule) for name, rule in rules.items()}), filter_fn=None)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, Path(target) / "model.safetensors", metadata={**strings, "format": "pt"})
    return {}


def our_untie(target: str, checkpoint: str) -> dict[str, Any]:
    """Unties as the flow does."""
    from quantize_gemma.tasks.untie import untie

    return untie(Path(target), Path(checkpoint))


def our_quantize(target: str, checkpoint: str, recipe: str, device: str) -> dict[str, Any]:
    """Quantizes as the flow does."""
    from quantize_gemma.tasks.quantize import quantize

    return quantize(Path(target), Path(checkpoint), load_recipe(recipe).to_json(), device)


def copy_files(target: str, checkpoint: str) -> dict[str, Any]:
    """Copies every file: the floor for what reads and writes as much."""
    import subprocess

    subprocess.run(["cp", "-r", "--reflink=never", f"{checkpoint}/.", target], check=True)
    return {}


def differences(one: Path, other: Path) -> list[str]:
    """Returns the tensors in which two quantized checkpoints differ, whatever names they are filed under."""
    import torch
    from safetensors import safe_open

    with safe_open(str(one), framework="pt") as left, safe_open(str(other), framework="pt") as right:
        names = {GEMMA3.runtime_name(name): name for name in left.keys()}  # noqa: SIM118
        others = {GEMMA3.runtime_name(name): name for name in right.keys()}  # noqa: SIM118
        wrong = sorted(set(names) ^ set(others))
        for name in sorted(set(names) & set(others)):
            a, b = left.get_tensor(names[name]), right.get_tensor(others[name])
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                wrong.append(name)
        return wrong


def measure(shape: str, folder: Path, recipe: str, device: str, reference: bool) -> dict[str, Any]:
    """Runs every step in turn. Returns the figures, and the lines to print."""
    base = make_checkpoint(shape, folder)
    made: dict[str, Path] = {}

    def fresh(name: str) -> Path:
        made[name] = folder / f"out-{shape}-{name}"
        shutil.rmtree(made[name], ignore_errors=True)
        made[name].mkdir()
        return made[name]

    steps: dict[str, dict[str, Any]] = {}
    if reference:
        steps["untie, transformers"] = run(
            "benchmarks.quantize:reference_untie", target=fresh("reference-untied"), checkpoint=base
        )
    steps["untie, ours"] = run("benchmarks.quantize:our_untie", target=fresh("untied"), checkpoint=base)
    if reference:
        shutil.rmtree(made["reference-untied"])
        steps["quantize, torchao"] = run(
            "benchmarks.quantize:reference_quantize",
            target=fresh("reference-quantized"),
            checkpoint=made["untied"],
            recipe=recipe,
        )
    steps["quantize, ours"] = run(
        "benchmarks.quantize:our_quantize",
        target=fresh("quantized"),
        checkpoint=made["untied"],
        recipe=recipe,
        device=device,
    )
    steps["cp of what it reads"] = run(
        "benchmarks.quantize:copy_files", target=fresh("copy"), checkpoint=made["untied"]
    )
    shutil.rmtree(made["copy"])
    steps["cp of what it writes"] = run(
        "benchmarks.quantize:copy_files", target=fresh("copy"), checkpoint=made["quantized"]
    )
    read, written = (_bytes(made[name]) for name in ("untied", "quantized"))
    lines = [
        f"{shape}, {recipe}, {version()}, {machine()}",
        *(line(name, step) for name, step in steps.items()),
        f"read {human_size(read)}, written {human_size(written)}",
    ]
    result: dict[str, Any] = {"bytes": {"read": read, "written": written}}
    equal = None
    result["steps"] = {name: {k: step[k] for k in ("seconds", "peak_rss_bytes")} for name, step in steps.items()}
    floor = steps["quantize, ours"]["seconds"] / steps["cp of what it reads"]["seconds"]
    result["ratios"] = {"quantize to cp of what it reads": floor}
    if reference:
        for name, theirs in (("untie", "untie, transformers"), ("quantize", "quantize, torchao")):
            ours = steps[f"{name}, ours"]
            result["ratios"][f"{name}, time"] = steps[theirs]["seconds"] / ours["seconds"]
            result["ratios"][f"{name}, memory"] = steps[theirs]["peak_rss_bytes"] / ours["peak_rss_bytes"]
        files = [made[name] / "model.safetensors" for name in ("reference-quantized", "quantized")]
        result["different"] = differences(*files)
        equal = not result["different"]
        lines.append("equal, tensor for tensor" if not result["different"] else f"DIFFERENT: {result['different']}")
    lines += [f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items()]
    for path in made.values():
        shutil.rmtree(path, ignore_errors=True)
    case = {"shape": shape, "recipe": recipe, "device": device}
    both = steps.get("quantize, torchao"), steps["quantize, ours"]
    return {**compared("quantize", case, *both, equal), **result, "lines": lines}


def _load(checkpoint: str) -> Any:
    import torch
    from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    multimodal = hasattr(AutoConfig.from_pretrained(checkpoint), "vision_config")
    kind = Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM
    return kind.from_pretrained(checkpoint, dtype=torch.bfloat16)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--shape", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--recipe", default="HQQ-INT8-INT4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where ours computes")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made, and kept for the next time")
    parser.add_argument("--no-reference", action="store_true", help="only ours and cp: 4b needs 23 GB for the other")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        show(measure(given.shape, folder, given.recipe, given.device, not given.no_reference), given.json)


if __name__ == "__main__":
    main()
