"""HQQ with scales only, bit-identical to torchao's `_choose_qparams_and_quantize_scale_only_hqq`.

torchao works on whole matrices, with about twenty float32 temporaries of the same size. Here, a group's twenty
iterations run on data that stays in the CPU's cache. Three things make the results identical, not just close:

- every element goes through the same float32 operations;
- sums are added up in the order of torch's own kernel, which depends on the CPU's vector width (`sum_lanes`);
- torchao stops all groups of a matrix at the first iteration in which none of them changed by more than 1e-5. A chunk
  cannot know that, so it returns how much it changed in every iteration. If `iterations_needed` finds that torchao
  would have stopped earlier, the caller quantizes all chunks of the matrix again. This is rarely necessary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from quantize_gemma.tasks.models.rounding import ROUNDER, round_to_bfloat16

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")
Array = TypeVar("Array")
Floats = npt.NDArray[np.float32]

ITERATIONS = 20
TOLERANCE = np.float32(1e-5)
EPSILON = np.finfo(np.float32).eps
BOUNDS = {"int4": (-8, 7), "int8": (-128, 127)}
# Groups up to this length are processed WIDTH at a time, side by side; longer ones one by one.
SIDE_BY_SIDE = 256
WIDTH = 64
ZERO = np.float32(0)


@dataclass(frozen=True)
class QuantizedChunk(Generic[Array]):
    """Some rows of a matrix, quantized, as numpy arrays or torch tensors.

    Attributes:
        integers: int8, [rows, columns].
        scales: float32, [rows, groups].
        changes: float32, [ITERATIONS]: the largest relative change of a scale in every iteration, 0 after the last one
            that changed anything.
        error: The sum of the squared weight errors with the scales in bfloat16, in float64.
        square: The sum of the squared weights, in float64; NaN or infinite if a weight is.
    """

    integers: Array
    scales: Array
    changes: Array
    error: float
    square: float


def quantize_chunk(
    weight: npt.NDArray[np.uint16], group_size: int, dtype: str, lanes: int, iterations: int
) -> "QuantizedChunk[npt.NDArray[Any]]":
    """Quantize some rows of a matrix on the CPU.

    Args:
        weight: The bits of bfloat16 numbers, [rows, columns], contiguous.
        group_size: The number of columns that share a scale.
        dtype: int4 or int8.
        lanes: `sum_lanes()`; no group may be shorter.
        iterations: The number of iterations.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows * columns // group_size, group_size)
    integers = np.empty(groups.shape, np.int8)
    scales = np.empty(groups.shape[0], np.float32)
    changes = np.zeros(ITERATIONS, np.float32)
    sums = np.zeros(2, np.float64)
    low, high = (np.float32(bound) for bound in BOUNDS[dtype])
    kernel = _quantize_side_by_side if group_size <= SIDE_BY_SIDE else _quantize_one_by_one
    kernel(groups, low, high, iterations, lanes, integers, scales, changes, sums)
    shape = rows, columns // group_size
    return QuantizedChunk(
        integers.reshape(rows, columns), scales.reshape(shape), changes, float(sums[0]), float(sums[1])
    )


def quantize_chunk_with_torch(
    weight: "torch.Tensor", group_size: int, dtype: str, iterations: int
) -> "QuantizedChunk[torch.Tensor]":
    """Do what quantize_chunk does, with torch's operations in the same order, on the device of `weight`, bfloat16."""
    import torch

    low, high = BOUNDS[dtype]
    epsilon = float(EPSILON)
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    scales = (groups.abs().amax(dim=2) / max(-low, high)).clamp_min(epsilon)
    changes = torch.zeros(ITERATIONS, device=weight.device)
    for iteration in range(iterations):
        integers = (groups / scales.unsqueeze(-1)).round().clamp(low, high)
        numerator, denominator = (groups * integers).sum(dim=2), (integers * integers).sum(dim=2)
        before, scales = scales, torch.where(denominator > 0, numerator / denominator, scales)
        scales = scales.clamp_min(epsilon).abs()
        changes[iteration] = ((scales - before).abs() / before.clamp_min(epsilon)).max()
    integers = (groups / scales.unsqueeze(-1)).round().clamp(low, high)
    error = (integers * scales.to(weight.dtype).float().unsqueeze(-1) - groups).double().square().sum()
    square = groups.double().square().sum()
    return QuantizedChunk(integers.flatten(1).to(torch.int8), scales, changes, float(error), float(square))


def iterations_needed(changes: Sequence[Floats]) -> int:
    """Return the number of iterations after which torchao stops, from the changes of all chunks, [chunks, ITERATIONS].

    It is also ITERATIONS if later iterations change nothing.
    """
    largest = np.max(changes, axis=0)
    settled_iterations = np.flatnonzero(largest < TOLERANCE)
    if not settled_iterations.size or not largest[settled_iterations[0] + 1 :].any():
        return ITERATIONS
    return int(settled_iterations[0]) + 1


@functools.cache
def sum_lanes() -> int:
    """Return the vector width, in floats, of torch's summation on this processor; 0 if its order is not known.

    It is determined by a test: the last bits of a sum of random numbers depend on the order of summation.
    """
    import torch

    values = np.random.default_rng(0).standard_normal((64, 2575), np.float32)
    expected_sums = torch.from_numpy(values).sum(dim=1).numpy()
    expected_short_sums = torch.from_numpy(values[:, :32].copy()).sum(dim=1).numpy()
    for lanes in (16, 8, 4):
        sums = np.array([_sum_of_products(row, np.ones_like(row), lanes, _accumulators(lanes)) for row in values])
        short_sums = np.array(
            [_sum_of_products(r[:32], np.ones_like(r[:32]), lanes, _accumulators(lanes)) for r in values]
        )
        if np.array_equal(sums, expected_sums) and np.array_equal(short_sums, expected_short_sums):
            return lanes
    return 0


def _compiled(**options: bool | str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return numba's decorator, which has no type annotations."""

    def compile_function(function: Callable[P, R]) -> Callable[P, R]:
        dispatcher: Callable[P, R] = numba.njit(nogil=True, **options)(function)
        return dispatcher

    return compile_function


@_compiled(error_model="numpy", inline="always")
def _round_to_nearest(weight: np.float32, scale: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Return the quantized weight, an integer in float32, in a form that compiles to vector code."""
    value = weight / scale
    value = value if value < high else high
    value = value if value > low else low
    return (value + ROUNDER) - ROUNDER


@_compiled(cache=True, error_model="numpy")
def _quantize_side_by_side(
    groups: npt.NDArray[np.uint16],
    low: np.float32,
    high: np.float32,
    iterations: int,
    lanes: int,
    integers: npt.NDArray[np.int8],
    scales: Floats,
    changes: Floats,
    sums: npt.NDArray[np.float64],
) -> None:
    """Quantize WIDTH groups at a time, one per vector lane.

    This function is long and has many parameters because a numba kernel is a single function on arrays and numbers.
    """
    count, length = groups.shape
    weight = np.empty((length, WIDTH), np.float32)
    bits = weight.view(np.uint32)
    quantized = np.empty((length, WIDTH), np.float32)
    scale = np.empty(WIDTH, np.float32)
    stored_scale = np.empty(WIDTH, np.float32)
    errors = np.zeros(WIDTH, np.float64)
    squares = np.zeros(WIDTH, np.float64)
    numerator = np.empty(WIDTH, np.float32)
    denominator = np.empty(WIDTH, np.float32)
    in_lane = np.empty((2, WIDTH), np.float32)
    in_part = np.empty((2, WIDTH), np.float32)
    largest = max(-low, high)
    vectors = length // lanes
    quads = vectors // 4
    for first in range(0, count, WIDTH):
        # The last group fills up the last block.
        for g in range(WIDTH):
            group = min(first + g, count - 1)
            for k in range(length):
                bits[k, g] = np.uint32(groups[group, k]) << np.uint32(16)
        scale[:] = ZERO
        for k in range(length):
            for g in range(WIDTH):
                size = abs(weight[k, g])
                scale[g] = size if size > scale[g] else scale[g]
        for g in range(WIDTH):
            start = scale[g] / largest
            scale[g] = start if start > EPSILON else EPSILON
        is_settled = False
        for iteration in range(iterations):
            for k in range(length):
                for g in range(WIDTH):
                    quantized[k, g] = _round_to_nearest(weight[k, g], scale[g], low, high)
            numerator[:] = ZERO
            denominator[:] = ZERO
            for k in range(vectors * lanes, length):
                for g in range(WIDTH):
                    numerator[g] += weight[k, g] * quantized[k, g]
                    denominator[g] += quantized[k, g] * quantized[k, g]
            for lane in range(lanes):
                in_lane[:] = ZERO
                if vectors <= 4:
                    for vector in range(vectors):
                        k = vector * lanes + lane
                        for g in range(WIDTH):
                            in_lane[0, g] += weight[k, g] * quantized[k, g]
                            in_lane[1, g] += quantized[k, g] * quantized[k, g]
                else:
                    for part in range(4):
                        in_part[:] = ZERO
                        # The remainder after four vectors at a time is added to the first part.
                        for step in range(quads + (vectors - 4 * quads if part == 0 else 0)):
                            k = (part + 4 * step if step < quads else 3 * quads + step) * lanes + lane
                            for g in range(WIDTH):
                                in_part[0, g] += weight[k, g] * quantized[k, g]
                                in_part[1, g] += quantized[k, g] * quantized[k, g]
                        for g in range(WIDTH):
                            in_lane[0, g] += in_part[0, g]
                            in_lane[1, g] += in_part[1, g]
                for g in range(WIDTH):
                    numerator[g] += in_lane[0, g]
                    denominator[g] += in_lane[1, g]
            change = ZERO
            for g in range(WIDTH):
                before = scale[g]
                after = numerator[g] / denominator[g]
                after = after if after > EPSILON else EPSILON
                after = after if denominator[g] > ZERO else before
                relative_change = abs(after - before) / before
                change = relative_change if relative_change > change else change
                scale[g] = after
            changes[iteration] = max(changes[iteration], change)
            if change == ZERO:
                is_settled = True
                break
        for k in range(length):
            for g in range(WIDTH):
                if not is_settled:
                    quantized[k, g] = _round_to_nearest(weight[k, g], scale[g], low, high)
        group_count = min(WIDTH, count - first)
        stored_scale[:] = scale
        round_to_bfloat16(stored_scale.view(np.uint32))
        for g in range(group_count, WIDTH):
            stored_scale[g] = ZERO
            for k in range(length):
                weight[k, g] = ZERO
        for k in range(length):
            for g in range(WIDTH):
                difference = np.float64(quantized[k, g] * stored_scale[g] - weight[k, g])
                errors[g] += difference * difference
                squares[g] += np.float64(weight[k, g]) * np.float64(weight[k, g])
        for g in range(group_count):
            scales[first + g] = scale[g]
            for k in range(length):
                integers[first + g, k] = np.int8(quantized[k, g])
    for g in range(WIDTH):
        sums[0] += errors[g]
        sums[1] += squares[g]


@_compiled(cache=True, error_model="numpy")
def _quantize_one_by_one(
    groups: npt.NDArray[np.uint16],
    low: np.float32,
    high: np.float32,
    iterations: int,
    lanes: int,
    integers: npt.NDArray[np.int8],
    scales: Floats,
    changes: Floats,
    sums: npt.NDArray[np.float64],
) -> None:
    """Quantize groups one after the other.

    This function is long and has many parameters because a numba kernel is a single function on arrays and numbers.
    """
    count, length = groups.shape
    weight = np.empty(length, np.float32)
    bits = weight.view(np.uint32)
    quantized = np.empty(length, np.float32)
    stored_scale = np.empty(1, np.float32)
    errors = np.zeros(WIDTH, np.float64)
    squares = np.zeros(WIDTH, np.float64)
    accumulators = np.empty((4, 4 * lanes), np.float32)
    largest = max(-low, high)
    for group in range(count):
        for k in range(length):
            bits[k] = np.uint32(groups[group, k]) << np.uint32(16)
        scale = ZERO
        for k in range(length):
            scale = max(scale, abs(weight[k]))
        scale = max(scale / largest, EPSILON)
        is_settled = False
        for iteration in range(iterations):
            for k in range(length):
                quantized[k] = _round_to_nearest(weight[k], scale, low, high)
            numerator = _sum_of_products(weight, quantized, lanes, accumulators)
            denominator = _sum_of_products(quantized, quantized, lanes, accumulators)
            before = scale
            if denominator > 0:
                scale = max(numerator / denominator, EPSILON)
            change = abs(scale - before) / before
            changes[iteration] = max(changes[iteration], change)
            if change == 0:
                is_settled = True
                break
        scales[group] = scale
        stored_scale[0] = scale
        round_to_bfloat16(stored_scale.view(np.uint32))
        for k in range(length):
            if not is_settled:
                quantized[k] = _round_to_nearest(weight[k], scale, low, high)
            integers[group, k] = np.int8(quantized[k])
        for first in range(0, length, WIDTH):
            for k in range(min(WIDTH, length - first)):
                difference = np.float64(quantized[first + k] * stored_scale[0] - weight[first + k])
                errors[k] += difference * difference
                squares[k] += np.float64(weight[first + k]) * np.float64(weight[first + k])
    for k in range(WIDTH):
        sums[0] += errors[k]
        sums[1] += squares[k]


@_compiled(cache=True)
def _sum_of_products(left: Floats, right: Floats, lanes: int, accumulators: Floats) -> np.float32:
    """Return the float32 sum of left * right, added up as torch's CPU kernel does.

    The kernel accumulates four vectors side by side, regularly adds them to the next of four levels, and finally adds
    the levels, the four vectors, the remainder, and the vector's lanes, in this order.
    """
    accumulators[:] = np.float32(0)
    length = left.shape[0]
    vectors = length // lanes
    steps = vectors // 4
    width = 4 * lanes
    bits = 0
    while (1 << bits) < steps:
        bits += 1
    power = max(4, bits // 4)
    step = 0
    while step + (1 << power) <= steps:
        for _ in range(1 << power):
            base = step * width
            for k in range(width):
                accumulators[0, k] += left[base + k] * right[base + k]
            step += 1
        for level in range(1, 4):
            for k in range(width):
                accumulators[level, k] += accumulators[level - 1, k]
                accumulators[level - 1, k] = np.float32(0)
            if step & (((1 << power) - 1) << (level * power)):
                break
    while step < steps:
        base = step * width
        for k in range(width):
            accumulators[0, k] += left[base + k] * right[base + k]
        step += 1
    for level in range(1, 4):
        for k in range(width):
            accumulators[0, k] += accumulators[level, k]
    for vector in range(4 * steps, vectors):
        for k in range(lanes):
            accumulators[0, k] += left[vector * lanes + k] * right[vector * lanes + k]
    for part in range(1, 4):
        for k in range(lanes):
            accumulators[0, k] += accumulators[0, part * lanes + k]
    total = np.float32(0)
    for k in range(vectors * lanes, length):
        total += left[k] * right[k]
    for k in range(lanes):
        total += accumulators[0, k]
    return total


def _accumulators(lanes: int) -> Floats:
    return np.empty((4, 4 * lanes), np.float32)
