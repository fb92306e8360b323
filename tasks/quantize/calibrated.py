"""Quantize the decoder with calibration data, block by block; each finished block is an artifact.

A run that was killed resumes at the next block: finished blocks are loaded from the store, and the calibration tokens
run through them once more. The result is a safetensors file for each block and one for the head, from which writer.py
reads the rows of the matrices that it does not quantize itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.float32 import fast_products
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import Calibration, Recipe, Rule
from quantize_gemma.tasks.quantize.algorithms import dequantize, quantize_rows
from quantize_gemma.tasks.quantize.source import (
    SourceTensor,
    decoder_prefix,
    embed,
    look_up,
    read_block,
    read_rows,
)
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.reporting import log, report_progress
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    from quantize_gemma.tasks.quantize.blocks import QuantizedMatrix
    from quantize_gemma.tasks.quantize.hidden_states import HiddenStates

# The hidden states of the quantized and of the full-precision model.
Pair = tuple["HiddenStates", "HiddenStates"]
STAGE = "quantize-blocks"
FILE = "block.safetensors"


@dataclass(frozen=True)
class Blocks:
    """The finished blocks in the store.

    Attributes:
        root: The store.
        identity: Everything that the blocks depend on, besides their number and the code.
        refresh: Quantize blocks again even if they are in the store.
        files: The files of the finished blocks, in order.
        errors: The relative squared error of each module's outputs on the calibration tokens.
    """

    root: Path
    identity: JsonObject
    refresh: bool
    files: list[Path] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def finish(self, name: str, compute: Callable[[], Mapping[str, QuantizedMatrix]], rule: Rule | None = None) -> bool:
        """Load a block's quantized matrices from the store, or compute them; return whether they were computed.

        Args:
            name: The name of the block.
            compute: Returns the matrices, by the modules' names in the model.
            rule: The head's rule, which is not in the identity.
        """
        from safetensors.torch import save_file

        computed_blocks: list[bool] = []

        def write(target: Path) -> JsonObject:
            matrices = compute()
            tensors = {f"{module}.qdata": matrix.integers for module, matrix in matrices.items()}
            tensors |= {f"{module}.scale": matrix.scales for module, matrix in matrices.items()}
            save_file(tensors, target / FILE)
            computed_blocks.append(True)
            return {"metadata": {"error": {module: matrix.error for module, matrix in matrices.items()}}}

        code = fingerprint("quantize_gemma.tasks.quantize.calibrated:quantize_decoder")
        parameters = {**self.identity, "block": name, **({"rule": asdict(rule)} if rule else {})}
        key = store.key(STAGE, [], parameters, code)
        artifact = store.produce(STAGE, key, write, self.root, self.refresh, pinned=True)
        self.files.append(artifact.path / FILE)
        self.errors.update(artifact.metadata["error"])
        return bool(computed_blocks)


@fast_products()
def quantize_decoder(
    checkpoint: Path,
    sources: Mapping[str, SourceTensor],
    rules: Mapping[str, Rule],
    recipe: Recipe,
    tokens: Tensor,
    blocks: Blocks,
    device: str,
) -> None:
    """Quantize all decoder blocks, and the head if the recipe calibrates it.

    Args:
        checkpoint: The checkpoint, whose configuration is read.
        sources: The checkpoint's tensors, by their names in the loaded model.
        rules: The rule of each quantized module.
        recipe: The recipe, which has a calibration.
        tokens: Token ids, [sequences, length].
        blocks: Where the finished blocks are stored.
        device: The device that the blocks run on.
    """
    from safetensors.torch import load_file

    from quantize_gemma.tasks.quantize.blocks import (
        Block,
        QuantizedMatrix,
        load_norm,
        load_text_config,
        quantize_block,
        replay_block,
    )
    from quantize_gemma.tasks.quantize.hidden_states import HiddenStates

    assert recipe.calibration is not None, f"{recipe.name} has no calibration"
    settings = recipe.calibration
    config = load_text_config(checkpoint)
    prefix = decoder_prefix(sources)
    embedding = f"{prefix}{GEMMA3.embedding_module}"
    embeddings = _embed(sources[f"{embedding}.weight"], rules[embedding], tokens)
    hidden = HiddenStates(embeddings[0], blocks.root, device), HiddenStates(embeddings[1], blocks.root, device)
    del embeddings
    # The rule of all linears if they are calibrated; None if only the head is.
    block_rule = next((rule for rule in recipe.rules if (rule.match, rule.algorithm) == ("linear", "gptq")), None)
    # Blocks from the store through which the tokens must still run before another block can be computed.
    pending: list[int] = []

    def load(number: int) -> tuple[Block, Block]:
        """Return two copies of a block; the first one's linears are quantized if they are not calibrated."""
        start = f"{prefix}layers.{number}."
        weights = read_block(sources, start, device)
        pair = Block(config, number, weights), Block(config, number, weights)
        if block_rule is None:
            for name, linear in pair[0].linears.items():
                linear.matrix = _quantize_without_data(linear.weight, rules[start + name])
        return pair

    def catch_up() -> None:
        while pending:
            number = pending.pop(0)
            log(f"block {number} is in the store: running the calibration tokens through it")
            pair = load(number)
            tensors = load_file(blocks.files[number])
            for name, linear in pair[0].linears.items():
                start = f"{prefix}layers.{number}.{name}"
                if block_rule is not None:
                    parts = (tensors[f"{start}.{part}"].to(device) for part in ("qdata", "scale"))
                    linear.matrix = QuantizedMatrix(*parts)
            replay_block(pair, hidden)

    def compute(number: int) -> dict[str, QuantizedMatrix]:
        catch_up()
        pair = load(number)
        if block_rule is None:
            replay_block(pair, hidden)
            return {}
        matrices = quantize_block(pair, hidden, block_rule, settings)
        return {f"{prefix}layers.{number}.{name}": matrix for name, matrix in matrices.items()}

    def compute_head() -> dict[str, QuantizedMatrix]:
        catch_up()
        norm = load_norm(config, read_rows(sources[f"{prefix}norm.weight"]).to(device))
        return _quantize_head(sources[f"{head}.weight"], rules[head], settings, norm, hidden)

    total = config.num_hidden_layers + 1
    for number in range(config.num_hidden_layers):
        if not blocks.finish(str(number), functools.partial(compute, number)):
            pending.append(number)
        report_progress(number + 1, total, "blocks")
    head = GEMMA3.head_module
    if head in rules and rules[head].algorithm == "gptq":
        blocks.finish(head, compute_head, rules[head])
    report_progress(total, total, "blocks")


def digest_tokens(tokens: Tensor) -> str:
    """Return the SHA-256 of token ids."""
    return hashlib.sha256(store.canonical_json(tokens.tolist())).hexdigest()


def _embed(source: SourceTensor, rule: Rule, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the quantized and the full-precision embeddings of tokens, scaled, [sequences, length, width]."""
    rows, row_numbers = look_up(source, tokens)
    tensors = quantize_rows(rows, rule, "cpu").tensors
    return embed(dequantize(tensors["qdata"], tensors["scale"]), row_numbers), embed(rows, row_numbers)


def _quantize_head(
    source: SourceTensor, rule: Rule, settings: Calibration, norm: Gemma3RMSNorm, hidden: Pair
) -> dict[str, QuantizedMatrix]:
    """Quantize the head, some rows at a time, calibrated on the output of the last norm."""
    import torch

    from quantize_gemma.tasks.quantize import blocks, gptq

    with torch.no_grad():
        pieces = [slice(first, first + blocks.SEQUENCES) for first in range(0, len(hidden[0]), blocks.SEQUENCES)]
        moments = blocks.Moments.from_pieces(*(map(norm, map(states.__getitem__, pieces)) for states in hidden))
    cross = moments.cross.cpu()
    assert rule.group_size is not None, f"{rule} has no group size"
    is_sorted = settings.order == "activations"
    curvature = gptq.prepare(moments.hessian, rule.group_size, settings.damping, None, is_sorted).cpu()

    def read_head_rows(first: int, count: int) -> tuple[Tensor, Tensor]:
        rows = read_rows(source, first, count).float()
        return rows, rows @ cross

    return {GEMMA3.head_module: blocks.compensate_and_quantize(read_head_rows, source.shape[0], curvature, settings)}


def _quantize_without_data(weight: Tensor, rule: Rule) -> QuantizedMatrix:
    """Return a linear's weight, quantized with a rule that needs no calibration."""
    from quantize_gemma.tasks.quantize.blocks import QuantizedMatrix

    tensors = quantize_rows(weight.cpu(), rule, "cpu").tensors
    return QuantizedMatrix(tensors["qdata"].to(weight.device), tensors["scale"].to(weight.device))
