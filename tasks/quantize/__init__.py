"""Quantize: write the checkpoint that torchao and transformers would write with a recipe.

Weights are streamed from the base checkpoint's files to the quantized file a few rows at a time (writer.py), with one
function per algorithm (algorithms.py), so that memory does not depend on the size of the model or of its largest
matrix; before that, `gptq` calibrates one decoder block at a time (calibrated.py). With torchao's algorithms, `affine`
and `hqq_scale_only`, the tensors are byte-identical to those of `quantize_`, `flatten_tensor_state_dict`, and
safetensors' `save_file`. Their keys follow the Hub's layout of the base checkpoint, and the metadata contains the
module names of both the installed and newer versions of transformers, so that both load the file.
(Section "Quantization" of PyTorch's card.)
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.calibration import read_calibration
from quantize_gemma.tasks.models.checkpoint import is_multimodal, linear_shapes, read_config
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.load_check import check_shapes
from quantize_gemma.tasks.models.recipe import (
    Recipe,
    Rule,
    is_lossless,
    match_rules,
    packed_bytes,
    recipe_hash,
    torchao_config,
)
from quantize_gemma.tasks.quantize.source import QUANTIZED, SourceTensor, open_files, open_tensors
from quantize_gemma.tasks.quantize.writer import CheckpointWriter
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import link

if TYPE_CHECKING:
    from quantize_gemma.tasks.quantize.calibrated import Blocks


@stage(accelerated=True, resumes=True)
def quantize(
    target: Path,
    checkpoint: Path,
    recipe: dict[str, object],
    device: str,
    calibration: Path | None = None,
    refresh: bool = False,
) -> Output:
    """Fill `target` with the quantized checkpoint: model.safetensors, config with `quantization_config`, tokenizer.

    Args:
        target: An empty directory.
        checkpoint: The untied checkpoint.
        recipe: The recipe as JSON values; see Recipe.to_json.
        device: cpu, or cuda, which sums in a different order: a scale may differ in its last bit.
        calibration: The output of calibrate(); None for a recipe without calibration.
        refresh: Quantize decoder blocks again even if they are in the store.

    Returns:
        The recipe's name and hash, whether it is lossless, and the weight error per role: mean squared error over mean
        square. For a calibrated recipe, also the output error per module on the calibration tokens.

    Raises:
        UserError: The checkpoint does not fit its configuration, the recipe does not fit the model or has no
            calibration text, or a weight is not finite.
    """
    parsed_recipe = Recipe.from_json(recipe)
    multimodal = is_multimodal(read_config(checkpoint))
    if (parsed_recipe.calibration is None) != (calibration is None):
        raise UserError(
            f"the recipe {parsed_recipe.name} needs {'a' if parsed_recipe.calibration else 'no'} calibration text"
        )
    with open_tensors(checkpoint) as sources, store.keep_pinned(), contextlib.ExitStack() as stack:
        shapes = {name: source.shape for name, source in sources.items()}
        rules = match_rules(parsed_recipe, linear_shapes(shapes))
        # {weight: {part: location of its rows}} of calibrated blocks.
        quantized: dict[str, dict[str, SourceTensor]] = {}
        calibration_metadata = {}
        if calibration is not None:
            blocks = _quantize_decoder(checkpoint, sources, rules, parsed_recipe, calibration, device, refresh, stack)
            for name, source in stack.enter_context(open_files(blocks.files, QUANTIZED)).items():
                module, _, part = name.rpartition(".")
                quantized.setdefault(f"{module}.weight", {})[part] = source
            calibration_metadata = {"output_error": blocks.errors}
        weights = target / "model.safetensors"
        with _one_thread(), CheckpointWriter(weights, sources, rules, multimodal, device, quantized) as writer:
            # Importing transformers takes seconds, during which the threads already work.
            _write_config(target, checkpoint, sources, rules)
            errors = writer.finish()
    for path in checkpoint.iterdir():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")) and path.name != "config.json":
            link(path, target / path.name)
    return {
        "metadata": {
            "recipe": parsed_recipe.name,
            "recipe_hash": recipe_hash(parsed_recipe),
            "quantized_modules": len(rules),
            "lossless": is_lossless(rules),
            "packed_bytes": packed_bytes(shapes, rules),
            "weight_error": {
                role: round(sums.error / sums.square, 8) if sums.square else 0.0
                for role, sums in sorted(errors.items())
            },
            **calibration_metadata,
        }
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Make torch use one thread: the writer has its own threads, and others would compete with them for the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _quantize_decoder(
    checkpoint: Path,
    sources: Mapping[str, SourceTensor],
    rules: Mapping[str, Rule],
    recipe: Recipe,
    calibration: Path,
    device: str,
    refresh: bool,
    stack: contextlib.ExitStack,
) -> "Blocks":
    """Return the calibrated blocks, in the checkpoint's store or in a temporary one that `stack` removes.

    Its parameters are those of quantize(), and the files that it has opened.
    """
    import torch
    from transformers import AutoConfig

    from quantize_gemma.tasks.quantize.calibrated import Blocks, digest_tokens, quantize_decoder

    shapes = {name: source.shape for name, source in sources.items()}
    check_shapes(checkpoint, AutoConfig.from_pretrained(checkpoint), shapes)
    tokens = torch.tensor(read_calibration(calibration))
    # A block depends neither on the head's rule nor on the vision tower's: recipes that differ only there share it.
    block_rules = [
        asdict(rule) for rule in recipe.rules if rule.match != "lm_head" and not GEMMA3.is_vision_role(rule.match)
    ]
    root, digests = stack.enter_context(store.open_store({"checkpoint": checkpoint}))
    identity: dict[str, object] = {
        **digests,
        "rules": block_rules,
        "calibration": asdict(recipe.calibration) if recipe.calibration else None,
        "tokens": digest_tokens(tokens),
        "device": device,
        # The last bits of a matrix product can depend on the number of threads.
        "threads": torch.get_num_threads(),
    }
    blocks = Blocks(root, identity, refresh)
    quantize_decoder(checkpoint, sources, rules, recipe, tokens, blocks, device)
    return blocks


def _write_config(
    target: Path, checkpoint: Path, sources: Mapping[str, SourceTensor], rules: Mapping[str, Rule]
) -> None:
    """Write config.json. Raises UserError if the checkpoint's weights do not match the model that it describes."""
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
