"""Exact: store weights that are already on a grid, as after quantization-aware training, without loss.

The candidates for a group's scale are its largest weight divided by each positive integer of the format. A scale fits
if every weight of the group is an integer times the scale, rounded to the checkpoint's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OffGrid:
    """How much of a matrix is off the grid.

    Attributes:
        groups: The number of groups.
        misfits: The number of groups for which no scale fits all weights.
        negative: The number of those groups that fit a negative scale, which XNNPACK does not support.
        worst_error: The largest error of a weight, as a fraction of its group's largest weight.
    """

    groups: int = 0
    misfits: int = 0
    negative: int = 0
    worst_error: float = 0.0

    def __add__(self, other: OffGrid) -> OffGrid:
        return OffGrid(
            self.groups + other.groups,
            self.misfits + other.misfits,
            self.negative + other.negative,
            max(self.worst_error, other.worst_error),
        )


def find_scales(rows: Tensor, group_size: int, dtype: str) -> tuple[Tensor, Tensor, OffGrid]:
    """Find the scale of each group of a matrix's rows, [rows, columns].

    Args:
        rows: The weights, finite, in the checkpoint's dtype.
        group_size: The number of columns that share a scale.
        dtype: int4 or int8.

    Returns:
        The integers, int8, [rows, columns]; the scales, bfloat16, [rows, groups]; and how much is off the grid. A group
        that is off the grid gets the integers and the scale with the smallest error.
    """
    import torch

    groups = rows.reshape(-1, group_size)
    integers, scales, errors = _fit(groups, dtype)
    is_misfit = errors > 0
    negative = _fit(-groups[is_misfit], dtype)[2] == 0
    largest = groups[is_misfit].abs().amax(1).float()
    worst_error = float((errors[is_misfit] / largest).max()) if is_misfit.any() else 0.0
    summary = OffGrid(len(groups), int(is_misfit.sum()), int(negative.sum()), worst_error)
    return integers.view(rows.shape), scales.view(len(rows), -1).to(torch.bfloat16), summary


def _fit(groups: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best integers, scales, and largest errors (0 on the grid) for groups, [groups, size]."""
    import torch

    # Imported here because the run's own process imports this module, and numba reads settings from the working
    # directory.
    from quantize_gemma.tasks.models.rounding import TINIEST
    from quantize_gemma.tasks.quantize.hqq import BOUNDS

    low, high = BOUNDS[dtype]
    largest = groups.abs().amax(1).float()
    integers = torch.zeros(groups.shape, dtype=torch.int8)
    scales = torch.full((len(groups),), float(TINIEST), dtype=torch.float32)
    errors = largest.clone()  # The errors if all integers are zero.
    # Try the largest integers first: most grids use them, and groups that fit are not tried again.
    for integer in range(-low, 0, -1):
        unfit = errors.nonzero()[:, 0]
        if not len(unfit):
            break
        weights, candidates = groups[unfit], (largest[unfit] / integer).to(torch.bfloat16)
        # The largest weight may have been rounded: the scale can be a neighboring bfloat16 number.
        for step in (0, -1, 1):
            scale = (candidates.view(torch.int16) + step).view(torch.bfloat16).float().clamp_min(float(TINIEST))
            quotients = (weights.float() / scale[:, None]).round_().clamp_(low, high)
            # Compare in the checkpoint's own dtype.
            error = ((quotients * scale[:, None]).to(groups.dtype) - weights).abs().amax(1).float()
            is_better = error < errors[unfit]
            improved = unfit[is_better]
            integers[improved], scales[improved] = quotients[is_better].to(torch.int8), scale[is_better]
            errors[improved] = error[is_better]
    return integers, scales, errors
