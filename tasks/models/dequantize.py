"""Faster quantized modules, with bit-identical outputs.

torchao's linear quantizes the activations to int8, per token, and multiplies them by the weight, which it dequantizes
in every forward pass. Here, weights are dequantized once. The embedding stays quantized: only the rows that are looked
up are dequantized.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torchao.quantization import (
    IntxUnpackedToInt8Tensor,
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from quantize_gemma.tasks.models.activation_quantization import fake_quantize_per_token
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.patches.private_api import reorder_weight

if TYPE_CHECKING:
    from torch import Tensor

# Elements of a weight that are dequantized at once. In float32, they take up to 32 MiB, below which glibc reuses
# memory: larger allocations are new pages each time, which take longer to map than to fill.
CHUNK = 2**23


def replace_quantized_modules(
    model: torch.nn.Module, dequantized: Literal["none", "backbone", "all"] = "backbone"
) -> None:
    """Replace every quantized linear and embedding of the model.

    `dequantized` says which linears have dequantized weights. "backbone": all but lm_head, which halves its memory; few
    tokens reach lm_head, unless the model generates text. "none": each linear dequantizes some rows at a time in every
    forward pass, in the memory of the stored weights, while torchao's own linear takes several times the memory of the
    largest dequantized weight.
    """
    fake_quantize = FakeQuantize()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if not isinstance(getattr(module, "weight", None), IntxUnpackedToInt8Tensor):
                continue
            if isinstance(module, torch.nn.Embedding):
                setattr(parent, name, _Embedding(module))
            elif isinstance(module, torch.nn.Linear):
                is_dequantized = dequantized == "all" or (dequantized == "backbone" and name != GEMMA3.head_module)
                setattr(parent, name, (_Linear if is_dequantized else _ChunkedLinear)(module, fake_quantize))
            else:
                continue
            # torchao's modules have reference cycles and would keep their weights until they are garbage-collected.
            del module.weight


def reorder_weights(model: torch.nn.Module, head: bool) -> None:
    """Pack the weights of bfloat16 linears into the CPU's preferred layout; also lm_head's with `head`.

    The outputs are bit-identical. Products with the last tokens of a few texts take half the time. Each weight is in
    memory once, except for an lm_head that is tied to the embedding, which is in memory twice.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            weight = getattr(module, "weight", None)
            if not isinstance(module, (torch.nn.Linear, _Linear)) or (name == GEMMA3.head_module and not head):
                continue
            if weight is None or type(weight.data) is not torch.Tensor or weight.dtype != torch.bfloat16:
                continue
            if module.bias is None and (product := reorder_weight(weight.detach())):
                setattr(parent, name, _Product(product, getattr(module, "fake_quantize", None)))
                del module.weight


class _Product(torch.nn.Module):
    def __init__(self, product: Callable[[Tensor], Tensor], fake_quantize: FakeQuantize | None) -> None:
        super().__init__()
        self.product, self.fake_quantize = product, fake_quantize

    def forward(self, activations: Tensor) -> Tensor:
        return self.product(activations if self.fake_quantize is None else self.fake_quantize(activations))


class FakeQuantize:
    """Quantize and dequantize activations, per token. Modules with the same input (q, k, and v) share the work."""

    def __init__(self) -> None:
        # A weak reference to the last input, and its result.
        self.last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def __call__(self, activations: Tensor) -> Tensor:
        """Return the activations as torchao's linear quantizes them, without a gradient.

        The activations must not be changed in place between two calls.
        """
        if self.last is None or self.last[0]() is not activations:
            self.last = None
            if activations.device.type == "cpu" and activations.dtype in (torch.bfloat16, torch.float32):
                result = fake_quantize_per_token(activations)
            else:
                result = quantize_dequantize(activations.detach())
            self.last = weakref.ref(activations), result
        return self.last[1]


def quantize_dequantize(activations: Tensor) -> Tensor:
    """Return the activations, [..., width], as torchao's linear quantizes them: per token, to int8, asymmetrically."""
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
    quantized = quantize_affine(activations, block, scale, zero_point, torch.int8, -128, 127)
    dequantized: Tensor = dequantize_affine(
        quantized, block, scale, zero_point, torch.int8, -128, 127, output_dtype=activations.dtype
    )
    return dequantized


class _Linear(torch.nn.Module):
    weight: Tensor

    def __init__(self, linear: torch.nn.Linear, fake_quantize: FakeQuantize) -> None:
        super().__init__()
        weight: IntxUnpackedToInt8Tensor = linear.weight
        self.fake_quantize = fake_quantize if weight.activation_quantization is not None else None
        dequantized = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for start, rows in _dequantized_rows(weight):
            dequantized[start : start + len(rows)] = rows
        self.register_buffer("weight", dequantized)
        self.bias = linear.bias

    def forward(self, activations: Tensor) -> Tensor:
        inputs = activations if self.fake_quantize is None else self.fake_quantize(activations)
        return torch.nn.functional.linear(inputs, self.weight, self.bias)


class _ChunkedLinear(torch.nn.Module):
    weight: IntxUnpackedToInt8Tensor

    def __init__(self, linear: torch.nn.Linear, fake_quantize: FakeQuantize) -> None:
        super().__init__()
        self.weight = linear.weight
        self.fake_quantize = fake_quantize
        self.bias = linear.bias

    def forward(self, activations: Tensor) -> Tensor:
        # disable_activation_quantization() may come later.
        is_quantized = self.weight.activation_quantization is not None
        inputs = self.fake_quantize(activations) if is_quantized else activations
        chunks = []
        for first, rows in _dequantized_rows(self.weight):
            bias = None if self.bias is None else self.bias[first : first + len(rows)]
            chunks.append(torch.nn.functional.linear(inputs, rows, bias))
        return torch.cat(chunks, dim=-1)


class _Embedding(torch.nn.Module):
    weight: IntxUnpackedToInt8Tensor

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        # Gemma's own embedding of tokens is scaled.
        self.scale: Tensor | None = getattr(embedding, GEMMA3.embedding_scale, None)
        assert self.weight.block_size[0] == 1, f"blocks of {self.weight.block_size} are not within a row"

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.weight
        row_tensors = (tensor[tokens.flatten()] for tensor in (weight.qdata, weight.scale, weight.zero_point))
        rows = IntxUnpackedToInt8Tensor(*row_tensors, weight.target_dtype, weight.block_size, weight.dtype, None)
        embeddings: Tensor = rows.dequantize().unflatten(0, tokens.shape)
        return embeddings if self.scale is None else embeddings * self.scale.to(embeddings.dtype)


def _dequantized_rows(weight: IntxUnpackedToInt8Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, dequantized rows) of a quantized matrix, in equal parts of up to CHUNK elements.

    The rows are bit-identical to those of weight.dequantize(), which makes two more copies of them.
    """
    count, width = weight.shape
    rows_in_block, group = weight.block_size
    assert rows_in_block == 1, f"blocks of {weight.block_size} are not within a row"
    step = math.ceil(count / math.ceil(count * width / CHUNK))
    for start in range(0, count, step):
        part = slice(start, start + step)
        assert not weight.zero_point[part].any(), "the weight is not quantized symmetrically"
        rows = weight.qdata[part].to(weight.dtype)
        rows.unflatten(1, (-1, group)).mul_(weight.scale[part, :, None])
        yield start, rows
