"""Quantize: write the checkpoint that torchao and transformers would write, by a recipe.

It goes from the base checkpoint's files to the quantized one's a few rows at a time (writer.py), with one function per
algorithm (algorithms.py), so that memory depends neither on the model's size nor on that of its largest matrix. The
bytes are those of `quantize_`, `flatten_tensor_state_dict` and safetensors' `save_file`. The tensors' keys follow the
Hub's layout of the base checkpoint, and the metadata names every module as the installed and as newer transformers call
it, so that both load the file. (Card section: Quantization.)
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantize_gemma.tasks.models.checkpoint import (
    is_multimodal,
    linear_shapes,
    read_config,
    read_header,
    weight_files,
)
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.load_check import check_shapes
from quantize_gemma.tasks.models.recipe import Recipe, Rule, decide, recipe_hash, torchao_config
from quantize_gemma.tasks.quantize.writer import CheckpointWriter, SourceTensor
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import link


@stage(accelerated=True)
def quantize(target: Path, checkpoint: Path, recipe: dict[str, object], device: str) -> Output:
    """Fill `target` with the quantized checkpoint: model.safetensors, config with `quantization_config`, tokenizer.

    Args:
        target: An empty directory.
        checkpoint: The untied checkpoint.
        recipe: The recipe as JSON values; see Recipe.to_json.
        device: cpu, or cuda, which adds up in another order: a scale may differ in its last bit.

    Returns:
        The recipe's name and hash, and the weight error per role: mean squared error over mean square.

    Raises:
        UserError: The checkpoint does not fit its configuration, the recipe does not fit the model, or a weight is not
            finite.
    """
    import torch

    parsed = Recipe.from_json(recipe)
    multimodal = is_multimodal(read_config(checkpoint))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The writer has its own threads, with which torch's would compete for the cores.
    try:
        with _open_tensors(checkpoint) as sources:
            rules = decide(parsed, linear_shapes({name: source.shape for name, source in sources.items()}))
            with CheckpointWriter(target / "model.safetensors", sources, rules, multimodal, device) as writer:
                # Importing transformers takes seconds, in which the threads work.
                _write_config(target, checkpoint, sources, rules)
                errors = writer.finish()
    finally:
        torch.set_num_threads(threads)
    for path in checkpoint.iterdir():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")) and path.name != "config.json":
            link(path, target / path.name)
    return {
        "metadata": {
            "recipe": parsed.name,
            "recipe_hash": recipe_hash(parsed),
            "quantized_modules": len(rules),
            "weight_error": {
                role: round(sums.error / sums.square, 8) if sums.square else 0.0
                for role, sums in sorted(errors.items())
            },
        }
    }


@contextlib.contextmanager
def _open_tensors(checkpoint: Path) -> Iterator[dict[str, SourceTensor]]:
    """Yield the checkpoint's tensors by their names in the loaded model, sorted; their files stay open meanwhile."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    sources = {}
    with contextlib.ExitStack() as stack:
        for path in weight_files(checkpoint):
            file = os.open(path, os.O_RDONLY)
            stack.callback(os.close, file)
            for name, tensor in read_header(path).items():
                if tensor.dtype not in dtypes:
                    raise UserError(f"the weight {name} in {path} is {tensor.dtype}: use the unquantized checkpoint")
                source = SourceTensor(file, tensor.start, dtypes[tensor.dtype], tensor.shape)
                sources[GEMMA3.runtime_name(name)] = source
        yield dict(sorted(sources.items()))


def _write_config(
    target: Path, checkpoint: Path, sources: Mapping[str, SourceTensor], rules: Mapping[str, Rule]
) -> None:
    """Write config.json. Raises UserError if the checkpoint's weights are not those of the model that it describes."""
    import torch
    from torchao.quantization import FqnToConfig
    from transformers import AutoConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    check_shapes(checkpoint, config, {name: source.shape for name, source in sources.items()})
    config.quantization_config = TorchAoConfig(
        quant_type=FqnToConfig({name: torchao_config(rule) for name, rule in rules.items()}),
        include_input_output_embeddings=True,
        modules_to_not_convert=[],
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(target)
