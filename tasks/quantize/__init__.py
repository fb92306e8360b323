"""Quantize: writes the checkpoint that torchao and transformers would have written, after a recipe.

Weights come from torchao's own `quantize_`. The tensors' keys follow the Hub's layout of the base checkpoint and
the metadata names every module as the installed and as newer transformers call it, so that both load the file.
(Card section: Quantization.)
"""

import json
import struct
from pathlib import Path
from typing import Any

from tasks.checkpoint import RUNTIME_PREFIXES, load_model, task_of
from tasks.policies import stage
from tasks.process import report_progress
from tasks.recipe import decide, recipe_hash, torchao_config
from tasks.store import StageFailed, UserError, link


def quantize_checkpoint(target: Path, checkpoint: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Fills `target` with the quantized checkpoint: model.safetensors, config with `quantization_config`, tokenizer.

    Returns the weight error per role (mean squared error over mean square). Raises UserError when the recipe does
    not fit the model or a weight is not finite.
    """
    import torch
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import FqnToConfig, quantize_
    from transformers import AutoConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    model = load_model(checkpoint, torch.bfloat16)
    named = dict(model.named_modules())
    shapes = {
        name: list(module.weight.shape)
        for name, module in named.items()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    decided = decide(recipe, shapes)
    configs = {name: torchao_config(rule) for name, rule in decided.items()}
    errors: dict[str, list[float]] = {}
    for done, (name, rule) in enumerate(decided.items()):
        report_progress(done, len(decided), "modules")
        weight = named[name].weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name}.weight holds a NaN or an infinity: the checkpoint is damaged, download it again")
        quantize_(model, FqnToConfig({name: configs[name]}), filter_fn=None)
        difference = named[name].weight.dequantize().float() - weight.float()
        sums = errors.setdefault(rule["match"], [0.0, 0.0])
        sums[0] += float(difference.square().sum())
        sums[1] += float(weight.float().square().sum())
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    multimodal = task_of(config.to_dict()) == "multimodal-text-to-text"
    if multimodal:
        tensors = {_hub_name(name): tensor for name, tensor in tensors.items()}
        metadata = _with_newer_names(metadata)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        target / "model.safetensors",
        metadata={**_as_strings(metadata), "format": "pt"},
    )
    _sort_metadata(target / "model.safetensors")
    (target / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner alone.
    config.quantization_config = TorchAoConfig(
        quant_type=FqnToConfig(configs), include_input_output_embeddings=True, modules_to_not_convert=[]
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(target)
    for path in checkpoint.iterdir():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")) and path.name != "config.json":
            link(path, target / path.name)
    return {
        "metadata": {
            "recipe": recipe["name"],
            "recipe_hash": recipe_hash(recipe),
            "quantized_modules": len(decided),
            "weight_error": {role: round(a / b, 8) if b else 0.0 for role, (a, b) in sorted(errors.items())},
        }
    }


def _hub_name(name: str) -> str:
    for hub, runtime in RUNTIME_PREFIXES.items():
        if name.startswith(runtime):
            return hub + name.removeprefix(runtime)
    raise StageFailed(f"the tensor {name} has no name in the Hub's layout")


def _with_newer_names(metadata: dict[str, Any]) -> dict[str, Any]:
    """Adds the names of transformers 5.1 and later, whose vision tower lost one level; names without data are idle."""
    names = metadata["tensor_names"]
    names = json.loads(names) if isinstance(names, str) else list(names)
    old, new = "model.vision_tower.vision_model.", "model.vision_tower."
    renamed = {name: name.replace(old, new) for name in names if name.startswith(old)}
    return {
        **metadata,
        **{after: metadata[before] for before, after in renamed.items()},
        "tensor_names": json.dumps([*names, *renamed.values()]),
    }


def _sort_metadata(path: Path) -> None:
    """Orders the header's metadata in place: safetensors writes it in an order that differs from run to run."""
    with path.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, (len(text), length)
        stream.seek(8)
        stream.write(text.ljust(length))


def _as_strings(metadata: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


quantize = stage(quantize_checkpoint, name="quantize", libraries=("torch", "torchao", "transformers"), memory=2.7)
