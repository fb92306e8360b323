"""Search for scales without calibration data: the best of CANDIDATES scales, each rounded to bfloat16 first.

torchao's HQQ with scales only rounds a scale after the integers are chosen with the original one, and follows a single
path of alternating steps. Here, the error of every candidate is computed with the scale as it is stored. Errors are
weighted by `weight ** 2 + mean square of the group`, a stand-in for the unknown inputs, as in llama.cpp's quantization
without an importance matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import numpy.typing as npt

from quantize_gemma.tasks.models.rounding import ROUNDER, round_scales
from quantize_gemma.tasks.quantize.hqq import BOUNDS

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float32]

# The number of scales tried for a group, evenly spaced between these multiples of the scale for its largest weight.
CANDIDATES = 48
SMALLEST, LARGEST = 0.6, 1.15
# The number of groups that the kernel processes side by side.
WIDTH = 64


def search_scales(rows: Tensor, group_size: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Quantize rows of a matrix, [rows, columns], finite, on the CPU.

    Args:
        rows: The weights.
        group_size: The number of columns that share a scale.
        dtype: int4 or int8.

    Returns:
        The integers, int8, [rows, columns], and the scales, bfloat16, [rows, groups].
    """
    import torch

    groups = rows.float().reshape(-1, group_size).T.contiguous()
    integers = torch.empty(groups.shape, dtype=torch.int8)
    scales = torch.empty(groups.shape[1], dtype=torch.float32)
    low, high = BOUNDS[dtype]
    # The largest weight nearly determines an int8 scale, so its candidates are closer together.
    shares = np.linspace(SMALLEST if dtype == "int4" else 0.95, LARGEST if dtype == "int4" else 1.02, CANDIDATES)
    factors = (shares / ((high - low) / 2)).astype(np.float32)
    _search(groups.numpy(), factors, np.float32(low), np.float32(high), integers.numpy(), scales.numpy())
    return integers.T.reshape(rows.shape).contiguous(), scales.view(len(rows), -1).to(torch.bfloat16)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _search(
    groups: Floats, factors: Floats, low: np.float32, high: np.float32, integers: npt.NDArray[np.int8], scales: Floats
) -> None:
    """Fill `integers`, [size, groups], and `scales`, [groups], of weights, [size, groups]."""
    size, total = groups.shape
    weight = np.zeros((size, WIDTH), np.float32)
    importance = np.empty((size, WIDTH), np.float32)
    largest = np.empty(WIDTH, np.float32)
    mean = np.empty(WIDTH, np.float32)
    scale = np.empty(WIDTH, np.float32)
    inverse = np.empty(WIDTH, np.float32)
    loss = np.empty(WIDTH, np.float32)
    best_loss = np.empty(WIDTH, np.float32)
    best_scale = np.empty(WIDTH, np.float32)
    for tile in range(0, total, WIDTH):
        count = min(WIDTH, total - tile)
        largest[:] = np.float32(0)
        mean[:] = np.float32(1e-30)
        for k in range(size):
            for lane in range(count):
                weight[k, lane] = groups[k, tile + lane]
            for lane in range(WIDTH):
                largest[lane] = max(largest[lane], abs(weight[k, lane]))
                mean[lane] += weight[k, lane] * weight[k, lane]
        for lane in range(WIDTH):
            mean[lane] /= np.float32(size)
        for k in range(size):
            for lane in range(WIDTH):
                importance[k, lane] = mean[lane] + weight[k, lane] * weight[k, lane]
        best_loss[:] = np.float32(np.inf)
        for candidate in range(len(factors)):
            for lane in range(WIDTH):
                scale[lane] = largest[lane] * factors[candidate]
            round_scales(scale)
            for lane in range(WIDTH):
                inverse[lane] = np.float32(1) / scale[lane]
            loss[:] = np.float32(0)
            for k in range(size):
                for lane in range(WIDTH):
                    value = weight[k, lane] * inverse[lane]
                    value = value if value < high else high
                    value = value if value > low else low
                    value = (value + ROUNDER) - ROUNDER
                    error = weight[k, lane] - value * scale[lane]
                    loss[lane] += importance[k, lane] * error * error
            for lane in range(WIDTH):
                is_better = loss[lane] < best_loss[lane]
                best_loss[lane] = loss[lane] if is_better else best_loss[lane]
                best_scale[lane] = scale[lane] if is_better else best_scale[lane]
        for lane in range(count):
            scales[tile + lane] = best_scale[lane]
            inverse[lane] = np.float32(1) / best_scale[lane]
        for k in range(size):
            for lane in range(count):
                value = min(max(weight[k, lane] * inverse[lane], low), high)
                integers[k, tile + lane] = np.int8((value + ROUNDER) - ROUNDER)
