"""A quantized decoder whose scales and norms are trained; its integers do not change.

It computes in float32, with activations quantized as in the program. Gradients pass straight through that rounding, and
through the rounding of scales and norms to bfloat16 (straight-through estimator).

It takes memory for the integers, the trained parameters, one block's activations at a time (the blocks run again in the
backward pass), and a part of one matrix in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from quantize_gemma.tasks.models.dequantize import FakeQuantize
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.rounding import TINIEST
from quantize_gemma.tasks.quantize import gptq
from quantize_gemma.tasks.quantize.blocks import Block, load_norm

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm


class TrainedLinear(torch.nn.Module):
    """A quantized linear with a trained factor for each scale.

    Attributes:
        integers: int8, [rows, columns].
        initial: The scales before training, float32, [rows, groups].
        change: The logarithm of each scale's factor, [rows, groups].
        fake_quantize: Quantizes activations; None if they are not quantized.
    """

    def __init__(self, integers: Tensor, scales: Tensor, fake_quantize: FakeQuantize | None) -> None:
        super().__init__()
        self.integers, self.initial, self.fake_quantize = integers, scales.float(), fake_quantize
        self.change = torch.nn.Parameter(torch.zeros_like(self.initial))

    def value(self) -> Tensor:
        """Return the scales, positive bfloat16 numbers in float32, [rows, groups]."""
        return _round_to_bfloat16((self.initial * self.change.exp()).clamp_min(float(TINIEST)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, [..., rows]."""
        quantized_inputs = inputs if self.fake_quantize is None else self.fake_quantize(inputs)
        outputs: Tensor = _Product.apply(inputs, quantized_inputs, self.value(), self.integers)
        return outputs


class TrainedNorm(torch.nn.Module):
    """An RMS norm of Gemma 3 with a trained factor for each of its multipliers.

    Attributes:
        initial: The weight before training, float32, [width]; the norm multiplies with 1 + weight.
        change: The logarithm of each factor, [width].
    """

    def __init__(self, norm: Gemma3RMSNorm) -> None:
        super().__init__()
        # Stored in a tuple, so that its weight does not become a parameter of this module.
        self.norm = (norm,)
        self.initial = norm.weight.detach().clone()
        self.change = torch.nn.Parameter(torch.zeros_like(self.initial))

    def value(self) -> Tensor:
        """Return the weight, bfloat16 numbers in float32, [width]."""
        return _round_to_bfloat16(self.initial + (1 + self.initial) * self.change.expm1())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalized inputs, [..., width]."""
        outputs: Tensor = torch.func.functional_call(self.norm[0], {"weight": self.value()}, (inputs,))
        return outputs


class Student:
    """The decoder and the head of a quantized checkpoint.

    Attributes:
        blocks: The decoder's blocks.
        norm: The norm after the last block.
        head: The output head.
        trained_modules: The modules that are trained, by their names in the loaded model.
    """

    def __init__(
        self,
        config: Gemma3TextConfig,
        prefix: str,
        weights: Mapping[str, Tensor],
        linears: Mapping[str, TrainedLinear],
    ) -> None:
        """Build the modules.

        Args:
            config: The decoder's configuration.
            prefix: The prefix of the decoder's module names.
            weights: The weights that are not quantized, by name in the loaded model.
            linears: The decoder's linears and the head, by name.
        """
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

        self.trained_modules: dict[str, TrainedLinear | TrainedNorm] = dict(linears)
        self.head = linears[GEMMA3.head_module]
        self.blocks = []
        for number in range(config.num_hidden_layers):
            start = f"{prefix}layers.{number}."
            block_linears = {name.removeprefix(start): linears[name] for name in linears if name.startswith(start)}
            block_weights = {name.removeprefix(start): weights[name] for name in weights if name.startswith(start)}
            block = Block(config, number, block_weights, block_linears)
            for name, module in list(block.layer.named_modules()):
                if isinstance(module, Gemma3RMSNorm):
                    self.trained_modules[start + name] = TrainedNorm(module)
                    block.layer.set_submodule(name, self.trained_modules[start + name])
            self.blocks.append(block)
        self.norm = TrainedNorm(load_norm(config, weights[f"{prefix}norm.weight"]))
        self.trained_modules[f"{prefix}norm"] = self.norm

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return the head's inputs, [sequences, length, width], from embeddings of the same shape."""
        hidden = embeddings
        for block in self.blocks:
            hidden = checkpoint(_run, block, hidden, use_reentrant=False)
        outputs: Tensor = self.norm(hidden)
        return outputs

    def changes(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by the names of their modules."""
        return {name: module.change for name, module in self.trained_modules.items()}


def kl_divergence(head: torch.nn.Module, inputs: Tensor, base_head: torch.nn.Module, targets: Tensor) -> Tensor:
    """Return the mean KL divergence, in nats, of the student's next tokens from the base model's.

    Args:
        head: The student's head.
        inputs: The inputs of the student's head, [tokens, width].
        base_head: The base model's head.
        targets: The inputs of the base model's head, [tokens, width].
    """
    with torch.no_grad():
        base_log_probs = torch.log_softmax(base_head(targets), dim=-1)
    log_probs = torch.log_softmax(head(inputs), dim=-1)
    return torch.nn.functional.kl_div(log_probs, base_log_probs, log_target=True, reduction="batchmean")


def _run(block: Block, hidden: Tensor) -> Tensor:
    attended = block.add_attention(hidden, block.attention(hidden))
    return block.add_mlp(attended, block.mlp(attended))


def _round_to_bfloat16(values: Tensor) -> Tensor:
    return values + (values.detach().to(torch.bfloat16).float() - values).detach()


class _Product(torch.autograd.Function):
    """rounded @ (integers * scales).T, dequantizing some rows of the weight at a time, forward and backward.

    `rounded` are the quantized inputs; their gradient is passed to the inputs (straight-through).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, quantized_inputs: Tensor, scales: Tensor, integers: Tensor) -> Tensor:
        ctx.save_for_backward(quantized_inputs, scales, integers)
        pieces = [quantized_inputs @ weight.T for _, weight in _dequantize(integers, scales)]
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        quantized_inputs, scales, integers = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        flat = quantized_inputs.flatten(0, -2)
        input_gradient: Tensor | None = None
        scale_gradient = torch.empty_like(scales)
        for rows, weight in _dequantize(integers, scales):
            row_gradient = gradient[:, rows]
            if input_gradient is None:
                input_gradient = row_gradient @ weight
            else:
                input_gradient.addmm_(row_gradient, weight)
            weight_gradient = (row_gradient.T @ flat).mul_(integers[rows])
            scale_gradient[rows] = weight_gradient.view(len(weight_gradient), scales.shape[1], -1).sum(-1)
        assert input_gradient is not None, "a linear has no rows"
        return input_gradient.view_as(quantized_inputs), None, scale_gradient, None


def _dequantize(integers: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = gptq.rows_at_once(integers.shape[1])
    for first in range(0, len(integers), step):
        rows = slice(first, first + step)
        values = integers[rows].float()
        # A view, so that the weights are dequantized in place.
        values.view(len(values), scales.shape[1], -1).mul_(scales[rows].unsqueeze(-1))
        yield rows, values
