"""Quantize activations to int8 and back, per token, bit-identical to torchao's dynamic quantization.

torchao makes about ten passes over the tensor; here, a token stays in the CPU's cache. For a bfloat16 tensor, every
step computes in float32 and rounds to bfloat16, as in torch.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import numpy as np

from quantize_gemma.tasks.models.rounding import ROUNDER, TINIEST, round_to_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LOW, HIGH, STEPS = np.float32(-128), np.float32(127), np.float32(255)
ZERO, ONE = np.float32(0), np.float32(1)


def fake_quantize_per_token(activations: Tensor) -> Tensor:
    """Return a CPU tensor, [..., width], bfloat16 or float32, with each token rounded to its own 256 levels."""
    import torch

    inputs = activations.detach().contiguous()
    outputs = torch.empty_like(inputs)
    bits, kernel = (torch.uint16, _round) if inputs.dtype == torch.bfloat16 else (torch.float32, _round_float32)
    source, target = (t.view(bits).numpy().reshape(-1, inputs.shape[-1]) for t in (inputs, outputs))
    threads = torch.get_num_threads()
    step = -(-len(source) // threads)
    starts = range(0, len(source), max(step, 1))
    list(_pool(threads).map(lambda first: kernel(source[first : first + step], target[first : first + step]), starts))
    return outputs


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _round(source: NDArray[np.uint16], target: NDArray[np.uint16]) -> None:
    """Quantize and dequantize tokens, [tokens, width], passed as the bits of bfloat16 numbers."""
    count, width = source.shape
    value = np.empty(width, np.float32)
    bits = value.view(np.uint32)
    scalar = np.empty(1, np.float32)
    scalar_bits = scalar.view(np.uint32)
    for token in range(count):
        is_nan = False
        for k in range(width):
            bits[k] = np.uint32(source[token, k]) << np.uint32(16)
            is_nan |= (source[token, k] & 0x7FFF) > 0x7F80
        if is_nan:
            target[token] = 0x7FC0
            continue
        low = high = ZERO
        for k in range(width):
            low = value[k] if value[k] < low else low
            high = value[k] if value[k] > high else high
        scalar[0] = high - low
        round_to_bfloat16(scalar_bits)
        scalar[0] = scalar[0] / STEPS
        round_to_bfloat16(scalar_bits)
        scale = scalar[0] if scalar[0] > TINIEST else TINIEST
        scalar[0] = low / scale
        round_to_bfloat16(scalar_bits)
        zero = LOW - ((scalar[0] + ROUNDER) - ROUNDER)
        zero = min(max(zero, LOW), HIGH)
        scalar[0] = ONE / scale
        round_to_bfloat16(scalar_bits)
        inverse = scalar[0]
        for k in range(width):
            value[k] = value[k] * inverse
        round_to_bfloat16(bits)
        for k in range(width):
            value[k] = ((value[k] + ROUNDER) - ROUNDER) + zero
        round_to_bfloat16(bits)
        for k in range(width):
            level = value[k] if value[k] < HIGH else HIGH
            level = level if level > LOW else LOW
            value[k] = (level - zero) * scale
        round_to_bfloat16(bits)
        for k in range(width):
            target[token, k] = np.uint16(bits[k] >> np.uint32(16))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _round_float32(source: NDArray[np.float32], target: NDArray[np.float32]) -> None:
    """Quantize and dequantize tokens, [tokens, width]."""
    count, width = source.shape
    for token in range(count):
        low = high = ZERO
        is_nan = False
        for k in range(width):
            value = source[token, k]
            is_nan |= value != value
            low = value if value < low else low
            high = value if value > high else high
        if is_nan:
            target[token] = np.float32(np.nan)
            continue
        scale = (high - low) / STEPS
        scale = scale if scale > TINIEST else TINIEST
        zero = LOW - ((low / scale + ROUNDER) - ROUNDER)
        zero = min(max(zero, LOW), HIGH)
        inverse = ONE / scale
        for k in range(width):
            level = ((source[token, k] * inverse + ROUNDER) - ROUNDER) + zero
            level = level if level < HIGH else HIGH
            level = level if level > LOW else LOW
            target[token, k] = (level - zero) * scale
