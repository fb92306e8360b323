"""Calibration, one decoder block at a time: what goes into each linear, and its weights by GPTQ.

The inputs of a block are what the quantized blocks before it make of the calibration tokens. Within a block the linears
are quantized in the order of the data: q, k and v, which share one input and one Hessian; o_proj on the attention of
the quantized q, k and v; gate_proj and up_proj; down_proj. Each part of the model is run once for it.

Memory is that of one block in float32, of the tokens' hidden states, and of one Hessian with its factor; that of
down_proj's inputs, which are kept in bfloat16, is a few times the hidden states'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantize_gemma.tasks.quantize import gptq

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

# Tokens that run through a block at once.
TOKENS = 4096
# Columns of a Hessian that are computed at once: only the blocks on and over its diagonal are.
PANEL = 512


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized linear.

    Attributes:
        integers: int8, [rows, columns].
        scales: bfloat16, [rows, groups].
        error: The squared error of its outputs over their squares, on the calibration tokens.
    """

    integers: Tensor
    scales: Tensor
    error: float

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
        self.layer = layer.eval()
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
