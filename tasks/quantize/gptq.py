"""GPTQ in the format of our programs: symmetric signed integers, and a positive bfloat16 scale for each group.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds a matrix column by column and spreads the error of each column over
the following columns, using the inverse of the Hessian of the layer's squared output error. In addition to the paper:

- The scale of a group is the candidate with the smallest error after GPTQ within the group: each of CANDIDATES scales
  is rounded to bfloat16, and the group's columns are rounded with it one by one.
- Columns are rounded in the order of the size of their inputs: groups are sorted first, then the columns within each
  group, so that groups remain those of the format.

Rows are independent: they are processed in tiles, transposed, with one row per vector lane. The kernels here never
split a sum by the number of threads; the matrix products around them may.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
import numpy.typing as npt

from quantize_gemma.tasks.models.rounding import ROUNDER, round_scales
from quantize_gemma.tasks.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int8]

# The number of scales tried for a group, evenly spaced between these multiples of the scale for its largest weight.
CANDIDATES = 40
SMALLEST, LARGEST = 0.45, 1.1
# Rows that a kernel processes side by side, and the number of weights that are updated at once.
WIDTH = 64
CHUNK = 2**23
# Columns of a Hessian that are processed at once.
PANEL = 512
LOW, HIGH = -8, 7


@dataclass(frozen=True)
class Curvature:
    """The Hessian of a layer's squared output error, ready for all matrices with the same input.

    Attributes:
        order: The order in which columns are rounded, [columns].
        hessian: The damped Hessian in that order, float32, [columns, columns].
        factor: The upper Cholesky factor of its inverse, float32, [columns, columns].
        mean: The mean of the Hessian's diagonal, by which it is divided.
        group_size: The number of columns that share a scale.
    """

    order: Tensor
    hessian: Tensor
    factor: Tensor
    mean: float
    group_size: int

    def cpu(self) -> Curvature:
        """Return the curvature on the CPU, where matrices are rounded."""
        order, hessian, factor = self.order.cpu(), self.hessian.cpu(), self.factor.cpu()
        return Curvature(order, hessian, factor, self.mean, self.group_size)

    def solve(self, products: Tensor) -> Tensor:
        """Return `products`, [rows, columns], times the inverse of the damped Hessian, in the original column order."""
        solutions = products[:, self.order] @ self.factor.T @ self.factor
        return solutions[:, self.order.argsort()] / self.mean


def prepare(
    hessian: Tensor, group_size: int, damping: float, scratch: Tensor | None = None, sort_columns: bool = True
) -> Curvature:
    """Return the curvature of a Hessian, using its memory and a scratch matrix of the same size.

    Args:
        hessian: The sum of products of inputs, X^T X, on any scale, [columns, columns]; overwritten.
        group_size: The number of columns that share a scale.
        damping: The value added to the diagonal, as a fraction of its mean. As long as the Cholesky factorization
            fails, ten times the last value is added as well: 0.01, then 0.11 and 1.11 altogether.
        scratch: A scratch matrix of the same size; overwritten, too.
        sort_columns: Columns with the largest inputs come first; otherwise the columns keep their order.

    Raises:
        UserError: The Hessian is not finite, because the activations are not.
    """
    import torch

    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean())
    if not math.isfinite(mean):
        raise UserError(
            "the model's activations on the calibration text are not finite: the checkpoint is damaged; "
            "download it again"
        )
    mean = max(mean, 1e-30)
    sizes = diagonal.reshape(-1, group_size)
    groups = sizes.sum(1).argsort(descending=True, stable=True)
    column_order = sizes.argsort(dim=1, descending=True, stable=True)
    order = (groups[:, None] * group_size + column_order[groups]).flatten()
    if not sort_columns:
        order = torch.arange(len(order), device=order.device)
    scratch = torch.empty_like(hessian) if scratch is None else scratch
    torch.index_select(hessian, 0, order, out=scratch)
    for panel in _panels(len(order)):
        hessian[panel] = scratch[panel][:, order] / mean
    while True:
        hessian.diagonal().add_(damping)
        if _factorize(hessian, scratch):
            return Curvature(order, hessian, scratch.T, mean, group_size)
        damping *= 10


def _factorize(hessian: Tensor, factor: Tensor) -> bool:
    """Fill `factor` with the lower factor F of the inverse Hessian, F F^T; return whether the factorization succeeded.

    The factor of a matrix's inverse is the inverse of the reversed matrix's factor, reversed. Everything is in place.
    """
    import torch

    count = len(hessian)
    for panel in _panels(count):
        factor[count - panel.stop : count - panel.start] = hessian[panel].flip(0, 1)
    # Column-major, as LAPACK expects, so that neither needs a copy.
    lower = factor.T
    info = torch.empty((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if info:
        return False
    panels = _panels(count)
    for number, columns in enumerate(panels):
        # Finished rows of this panel belong to the inverse, all others to the factor.
        size = columns.stop - columns.start
        identity = torch.eye(size, device=lower.device)
        lower[columns, columns] = torch.linalg.solve_triangular(lower[columns, columns], identity, upper=False)
        for rows in panels[number + 1 :]:
            products = lower[rows, columns.start : rows.start] @ lower[columns.start : rows.start, columns]
            lower[rows, columns] = -torch.linalg.solve_triangular(lower[rows, rows], products, upper=False)
    _reverse(factor.view(-1))
    return True


def _panels(count: int) -> list[slice]:
    return [slice(first, min(first + PANEL, count)) for first in range(0, count, PANEL)]


def _reverse(values: Tensor) -> None:
    """Reverse a vector in place."""
    count = len(values)
    for first in range(0, count // 2, CHUNK):
        last = min(first + CHUNK, count // 2)
        front = values[first:last].flip(0)
        values[first:last] = values[count - last : count - first].flip(0)
        values[count - last : count - first] = front


def quantize_matrix(weight: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to int4.

    Args:
        weight: float32, [rows, columns], finite.
        curvature: The curvature of the matrix's inputs.

    Returns:
        The integers, int8, [rows, columns], and the scales, bfloat16, [rows, groups].
    """
    import torch

    rows, columns = weight.shape
    integers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // curvature.group_size, dtype=torch.bfloat16)
    step = rows_at_once(columns)
    groups = curvature.order[:: curvature.group_size] // curvature.group_size
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for first in range(0, rows, step):
            transposed = weight[first : first + step, curvature.order].T.contiguous()
            chunk_integers, chunk_scales = _gptq(transposed, curvature, pool)
            integers[first : first + step, curvature.order] = chunk_integers.T
            scales[first : first + step, groups] = chunk_scales.T.to(torch.bfloat16)
    return integers, scales


def rows_at_once(columns: int) -> int:
    """Return the number of rows to process at once: whole tiles, so that a row's sums do not depend on its position."""
    return max(CHUNK // columns // WIDTH, 1) * WIDTH


def _gptq(weights: Tensor, curvature: Curvature, pool: ThreadPoolExecutor) -> tuple[Tensor, Tensor]:
    """Return integers, [columns, rows], and scales, [groups, rows], of weights, [columns, rows], overwritten."""
    import torch

    columns, rows = weights.shape
    size = curvature.group_size
    integers = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(columns // size, rows, dtype=torch.float32)
    errors = torch.empty(size, rows, dtype=torch.float32)
    factors = np.linspace(SMALLEST, LARGEST, CANDIDATES, dtype=np.float32)
    for first in range(0, columns, size):
        last = first + size
        block = curvature.factor[first:last, first:last].contiguous().numpy()
        group, group_integers = weights[first:last].numpy(), integers[first:last].numpy()
        scale = scales[first // size].numpy()
        arrays = group, block, factors, group_integers, scale, errors.numpy()
        _tiles(pool, rows, functools.partial(_round_group, *arrays))
        weights[last:].addmm_(curvature.factor[first:last, last:].T, errors, alpha=-1)
    return integers, scales


def _tiles(pool: ThreadPoolExecutor, rows: int, work: Callable[[int, int], None]) -> None:
    """Call a kernel on ranges of whole tiles of rows, on all threads."""
    import torch

    step = -(-rows // (WIDTH * torch.get_num_threads())) * WIDTH
    list(pool.map(lambda start: work(start, min(start + step, rows)), range(0, rows, step)))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _round_group(
    weights: Floats,
    factor: Floats,
    factors: Floats,
    integers: Integers,
    scales: Floats,
    errors: Floats,
    start: int,
    end: int,
) -> None:
    """Choose the scale of one group of columns and round them, for rows `start` to `end`.

    This function is long and has many parameters because a numba kernel is a single function on arrays and numbers.

    Args:
        weights: The weights with the errors of earlier groups, [columns, rows].
        factor: The group's block of the inverse Hessian's upper factor, [columns, columns].
        factors: The scales to try, as multiples of the scale that the largest weight needs.
        integers, scales: Outputs, [columns, rows] and [rows].
        errors: Output: each column's error over its factor, [columns, rows].
        start: The first row.
        end: The row after the last.
    """
    size = weights.shape[0]
    weight = np.zeros((size, WIDTH), np.float32)
    work = np.empty((size, WIDTH), np.float32)
    largest = np.empty(WIDTH, np.float32)
    scale = np.empty(WIDTH, np.float32)
    inverse = np.empty(WIDTH, np.float32)
    best_scale = np.empty(WIDTH, np.float32)
    best_loss = np.empty(WIDTH, np.float32)
    loss = np.empty(WIDTH, np.float32)
    error = np.empty(WIDTH, np.float32)
    low, high = np.float32(LOW), np.float32(HIGH)
    for tile in range(start, end, WIDTH):
        count = min(WIDTH, end - tile)
        largest[:] = np.float32(0)
        for k in range(size):
            for lane in range(count):
                weight[k, lane] = weights[k, tile + lane]
            for lane in range(WIDTH):
                largest[lane] = max(largest[lane], abs(weight[k, lane]))
        best_loss[:] = np.float32(np.inf)
        # The last round repeats the best scale and keeps its result.
        for candidate in range(len(factors) + 1):
            final = candidate == len(factors)
            if final:
                scale[:] = best_scale
            else:
                for lane in range(WIDTH):
                    scale[lane] = largest[lane] * factors[candidate] / np.float32(7.5)
                round_scales(scale)
            for lane in range(WIDTH):
                inverse[lane] = np.float32(1) / scale[lane]
            loss[:] = np.float32(0)
            work[:] = weight
            for k in range(size):
                reciprocal = np.float32(1) / factor[k, k]
                for lane in range(WIDTH):
                    value = work[k, lane] * inverse[lane]
                    value = value if value < high else high
                    value = value if value > low else low
                    value = (value + ROUNDER) - ROUNDER
                    error[lane] = (work[k, lane] - value * scale[lane]) * reciprocal
                    loss[lane] += error[lane] * error[lane]
                    work[k, lane] = value
                for j in range(k + 1, size):
                    share = factor[k, j]
                    for lane in range(WIDTH):
                        work[j, lane] -= share * error[lane]
                if final:
                    for lane in range(count):
                        integers[k, tile + lane] = np.int8(work[k, lane])
                        errors[k, tile + lane] = error[lane]
            for lane in range(WIDTH):
                is_better = loss[lane] < best_loss[lane]
                best_loss[lane] = loss[lane] if is_better else best_loss[lane]
                best_scale[lane] = scale[lane] if is_better else best_scale[lane]
        for lane in range(count):
            scales[tile + lane] = best_scale[lane]
