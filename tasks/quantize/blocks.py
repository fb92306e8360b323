"""Calibration, one decoder block at a time: what goes into each linear, and its weights by GPTQ.

The inputs of a block are what the quantized blocks before it make of the calibration tokens. Within a block the linears
are quantized in the order of the data: q, k and v, which share one input and one Hessian; o_proj on the attention of
the quantized q, k and v; gate_proj and up_proj; down_proj. Each part of the model is run once for it.

Memory is that of one block in float32, of the tokens' hidden states, and of one Hessian with its factor; that of
down_proj's inputs, which are kept in bfloat16, is a few times the hidden states'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantize_gemma.tasks.models.recipe import Calibration, Rule
from quantize_gemma.tasks.quantize import gptq

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

# Sequences that run through a block at once, and rows of the head that are quantized at once.
SEQUENCES = 8
HEAD_ROWS = 32_768
# Columns of a Hessian that are computed at once: only the blocks on and over its diagonal are.
PANEL = 512


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized linear.

    Attributes:
        integers: int8, [rows, columns].
        scales: bfloat16, [rows, groups].
        error: The squared error of its outputs over their squares, on the calibration tokens; 0 if nobody asks.
    """

    integers: Tensor
    scales: Tensor
    error: float = 0.0

    def dequantize(self) -> Tensor:
        """Return the weights, float32, [rows, columns]."""
        size = self.integers.shape[1] // self.scales.shape[1]
        return self.integers * self.scales.float().repeat_interleave(size, 1)


class Hessian:
    """The sum of x x^T over inputs x, [tokens, columns], each weighted."""

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns)

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs, [tokens, columns], with a weight per token, [tokens]."""
        inputs = inputs.float()
        left = inputs if weights is None else inputs * weights[:, None]
        for first in range(0, len(self.sum), PANEL):
            self.sum[first : first + PANEL, first:].addmm_(left[:, first : first + PANEL].T, inputs[:, first:])

    def matrix(self) -> Tensor:
        """Return the whole matrix; nothing can be added any more."""
        for first in range(0, len(self.sum), PANEL):
            last = first + PANEL
            self.sum[last:, first:last] = self.sum[first:last, last:].T
        return self.sum


class Block:
    """A decoder block of transformers, in the parts between its linears' inputs."""

    def __init__(self, config: Gemma3TextConfig, number: int, weights: dict[str, Tensor]) -> None:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RotaryEmbedding

        with torch.device("meta"):
            layer: Gemma3DecoderLayer = Gemma3DecoderLayer(config, number)
        layer.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        self.layer = layer.eval().requires_grad_(False)
        self.linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        self.o_proj, self.down_proj = layer.self_attn.o_proj, layer.mlp.down_proj
        layer.self_attn.o_proj = layer.mlp.down_proj = torch.nn.Identity()
        self.kind = config.layer_types[number]
        self.window = config.sliding_window if self.kind == "sliding_attention" else None
        self.rotary = Gemma3RotaryEmbedding(config)

    def attention(self, hidden: Tensor) -> Tensor:
        """Return o_proj's input, [sequences, length, width], from the block's."""
        places = torch.arange(hidden.shape[1], device=hidden.device)
        distance = places[:, None] - places[None]
        mask = (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)
        attended: Tensor = self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(hidden),
            position_embeddings=self.rotary(hidden, places[None], self.kind),
            attention_mask=mask[None, None],
        )[0]
        return attended

    def add_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the hidden states after attention, from the block's input and o_proj's."""
        added: Tensor = hidden + self.layer.post_attention_layernorm(self.o_proj(attended))
        return added

    def mlp(self, hidden: Tensor) -> Tensor:
        """Return down_proj's input from the hidden states after attention."""
        activated: Tensor = self.layer.mlp(self.layer.pre_feedforward_layernorm(hidden))
        return activated

    def add_mlp(self, hidden: Tensor, activated: Tensor) -> Tensor:
        """Return the block's output from the hidden states after attention and down_proj's input."""
        added: Tensor = hidden + self.layer.post_feedforward_layernorm(self.down_proj(activated))
        return added


# Called with linears that share an input, and the pieces of that input, [sequences, length, width].
Visit = Callable[[tuple[str, ...], "Iterable[Tensor]"], None]


@torch.no_grad()
def run_block(block: Block, hidden: Tensor, visit: Visit = lambda names, inputs: None) -> None:
    """Replace a block's input, [sequences, length, width], by its output, with `visit` on the way.

    What `visit` changes in the linears that it is called with counts for what follows.
    """
    pieces = [slice(first, first + SEQUENCES) for first in range(0, len(hidden), SEQUENCES)]
    visit(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        (block.layer.input_layernorm(hidden[piece]) for piece in pieces),
    )
    attended = torch.cat([block.attention(hidden[piece]) for piece in pieces])
    visit(("self_attn.o_proj",), (attended[piece] for piece in pieces))
    for piece in pieces:
        hidden[piece] = block.add_attention(hidden[piece], attended[piece])
    del attended
    visit(("mlp.gate_proj", "mlp.up_proj"), (block.layer.pre_feedforward_layernorm(hidden[piece]) for piece in pieces))
    activated = torch.cat([block.mlp(hidden[piece]).bfloat16() for piece in pieces])
    visit(("mlp.down_proj",), (activated[piece].float() for piece in pieces))
    for piece in pieces:
        hidden[piece] = block.add_mlp(hidden[piece], activated[piece].float())


def quantize_block(
    block: Block, hidden: Tensor, rules: dict[str, Rule], settings: Calibration
) -> dict[str, QuantizedMatrix]:
    """Quantize a block's linears, and replace its input, [sequences, length, width], by its output.

    Args:
        block: The block, whose linears become the quantized ones.
        hidden: What the quantized blocks before it make of the calibration tokens.
        rules: The rule of each linear with GPTQ, by its name in the block; the others are left alone.
        settings: The recipe's.
    """
    matrices: dict[str, QuantizedMatrix] = {}

    def visit(names: tuple[str, ...], inputs: Iterable[Tensor]) -> None:
        chosen = [name for name in names if name in rules]
        if chosen:
            hessian = sum_hessian(inputs)
            sizes = {rules[name].group_size or hessian.shape[1] for name in chosen}
            assert len(sizes) == 1, f"{chosen} share one order of columns, not group sizes {sizes}"
            curvature = gptq.prepare(hessian, sizes.pop(), settings.damping)
            for name in chosen:
                linear = block.linears[name]
                matrices[name] = quantize_matrix(linear.weight, curvature, settings.passes)
                linear.weight.data = matrices[name].dequantize()

    run_block(block, hidden, visit)
    return matrices


def sum_hessian(inputs: Iterable[Tensor]) -> Tensor:
    """Return the Hessian of a linear's squared output error from its inputs, [..., columns]."""
    hessian: Hessian | None = None
    for piece in inputs:
        hessian = hessian or Hessian(piece.shape[-1])
        hessian.add(piece.flatten(0, -2))
    assert hessian is not None, "there are no calibration tokens"
    return hessian.matrix()


def quantize_matrix(weight: Tensor, curvature: gptq.Curvature, passes: int) -> QuantizedMatrix:
    """Quantize a linear's weight, float32, [rows, columns], and measure what that does to its outputs."""
    matrix = QuantizedMatrix(*gptq.quantize_matrix(weight, curvature, passes))
    hessian, order = curvature.hessian, curvature.order
    difference = (matrix.dequantize() - weight)[:, order]
    ordered = weight[:, order]
    error = float((difference @ hessian).mul_(difference).sum())
    square = float((ordered @ hessian).mul_(ordered).sum())
    return QuantizedMatrix(matrix.integers, matrix.scales, error / square if square else 0.0)
