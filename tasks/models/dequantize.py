"""A quantized checkpoint's modules with their weights dequantized once, and the same outputs to the bit.

torchao's linear rounds the activations to int8, per token, and multiplies with the dequantized weight, which it makes
anew in every forward. lm_head and the embedding stay quantized, which halves their memory: few tokens reach lm_head,
unless the model generates, and of the embedding only the rows that are looked up are dequantized.
"""

from typing import Any

import torch
from torchao.quantization import (
    IntxUnpackedToInt8Tensor,
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from quantize_gemma.tasks.models import activation_rounding
from quantize_gemma.tasks.models.gemma3 import GEMMA3

# Elements of a weight that are dequantized at once.
CHUNK = 2**24


def dequantize_once(model: Any, head: bool = False) -> None:
    """Replaces every quantized linear and embedding of the model; plain ones stay.

    With `head`, lm_head is dequantized once too: generating needs it for every token.
    """
    rounded = _Rounded()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if not isinstance(getattr(module, "weight", None), IntxUnpackedToInt8Tensor):
                continue
            if isinstance(module, torch.nn.Embedding):
                setattr(parent, name, _Embedding(module))
            elif isinstance(module, torch.nn.Linear):
                setattr(parent, name, (_Head if name == "lm_head" and not head else _Linear)(module, rounded))
            # torchao's modules refer to themselves and would keep their weights until they are collected.
            del module.weight


class _Rounded:
    """Activations as torchao rounds them. Modules that get the same tensor, as q, k and v do, share the work."""

    def __init__(self) -> None:
        self.last: tuple[Any, Any] | None = None

    def __call__(self, activations: Any) -> Any:
        if self.last is None or self.last[0] is not activations:
            self.last = None
            if activations.device.type == "cpu" and activations.dtype == torch.bfloat16:
                self.last = activations, activation_rounding.round_per_token(activations)
            else:
                self.last = activations, quantize_dequantize(activations)
        return self.last[1]


def quantize_dequantize(activations: Any) -> Any:
    """Returns the activations, [..., width], as torchao's linear rounds them: per token, to int8, asymmetrically."""
    block = [1] * (activations.ndim - 1) + [activations.shape[-1]]
    scale, zero_point = choose_qparams_affine(
        activations,
        MappingType.ASYMMETRIC,
        block,
        target_dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        zero_point_dtype=torch.int8,
    )
    integers = quantize_affine(activations, block, scale, zero_point, torch.int8, -128, 127)
    return dequantize_affine(integers, block, scale, zero_point, torch.int8, -128, 127, output_dtype=activations.dtype)


class _Linear(torch.nn.Module):
    weight: torch.Tensor

    def __init__(self, linear: Any, rounded: _Rounded) -> None:
        super().__init__()
        self.rounded = rounded if linear.weight.activation_quantization is not None else None
        weight = linear.weight
        plain = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for start, part in _chunks(weight):
            plain[start : start + len(part)] = part
        self.register_buffer("weight", plain)
        self.bias = linear.bias

    def forward(self, activations: Any) -> Any:
        given = activations if self.rounded is None else self.rounded(activations)
        return torch.nn.functional.linear(given, self.weight, self.bias)


class _Head(torch.nn.Module):
    def __init__(self, linear: Any, rounded: _Rounded) -> None:
        super().__init__()
        self.rounded = rounded if linear.weight.activation_quantization is not None else None
        self.weight = linear.weight
        assert linear.bias is None, "an lm_head of Gemma 3 has no bias"

    def forward(self, activations: Any) -> Any:
        given = activations if self.rounded is None else self.rounded(activations)
        return torch.cat([torch.nn.functional.linear(given, part) for _, part in _chunks(self.weight)], dim=-1)


class _Embedding(torch.nn.Module):
    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.weight = embedding.weight
        # Gemma's own embedding of tokens is scaled.
        self.scale = getattr(embedding, GEMMA3.embedding_scale, None)
        assert self.weight.block_size[0] == 1, f"blocks of {self.weight.block_size} are not within a row"

    def forward(self, tokens: Any) -> Any:
        weight = self.weight
        looked_up = (tensor[tokens.flatten()] for tensor in (weight.qdata, weight.scale, weight.zero_point))
        rows = IntxUnpackedToInt8Tensor(*looked_up, weight.target_dtype, weight.block_size, weight.dtype, None)
        plain = rows.dequantize().unflatten(0, tokens.shape)
        return plain if self.scale is None else plain * self.scale.to(plain.dtype)


def _chunks(weight: Any) -> Any:
    """Yields (first row, dequantized rows) of a quantized matrix."""
    step = max(1, CHUNK // weight.shape[1])
    step = max(step // weight.block_size[0], 1) * weight.block_size[0]
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : min(start + step, weight.shape[0])].dequantize()
