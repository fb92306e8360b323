"""Exact: weights that are on a grid already, as quantization-aware training leaves them, are written without loss.

A group's scale is looked for among those that make its largest weight a multiple: that weight is the scale times one of
the few integers there are. Then every weight of the group has to be what the scale times an integer gives in the
checkpoint's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# bfloat16's smallest normal number: XNNPACK refuses scales below it.
TINIEST = 2.0**-126


@dataclass(frozen=True)
class OffGrid:
    """What of a matrix is on no grid.

    Attributes:
        groups: How many groups it has.
        off: How many of them have a weight that is no multiple of a scale.
        negative: How many of those are on a grid with a negative scale, which XNNPACK does not take.
        worst: The largest error of a weight, as a share of its group's largest weight.
    """

    groups: int = 0
    off: int = 0
    negative: int = 0
    worst: float = 0.0

    def __add__(self, other: OffGrid) -> OffGrid:
        return OffGrid(
            self.groups + other.groups,
            self.off + other.off,
            self.negative + other.negative,
            max(self.worst, other.worst),
        )


def find_scales(rows: Tensor, group_size: int, dtype: str) -> tuple[Tensor, Tensor, OffGrid]:
    """Find the scale of each group of a matrix's rows, [rows, columns].

    Args:
        rows: The weights, finite, in the checkpoint's dtype.
        group_size: How many columns share a scale.
        dtype: int4 or int8.

    Returns:
        The integers, int8, [rows, columns]; the scales, bfloat16, [rows, groups]; and what is off the grid, whose
        integers and scales are those with the smallest error.
    """
    import torch

    groups = rows.reshape(-1, group_size)
    integers, scales, errors = _fit(groups, dtype)
    off = errors > 0
    negative = _fit(-groups[off], dtype)[2] == 0
    largest = groups[off].abs().amax(1).float()
    worst = float((errors[off] / largest).max()) if off.any() else 0.0
    summary = OffGrid(len(groups), int(off.sum()), int(negative.sum()), worst)
    return integers.view(rows.shape), scales.view(len(rows), -1).to(torch.bfloat16), summary


def _fit(groups: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best integers, scales, and largest errors, 0 for a group on the grid, of groups, [groups, size]."""
    import torch

    # Here, because a run's own process imports this module: numba takes settings from where that is started.
    from quantize_gemma.tasks.quantize.hqq import BOUNDS

    low, high = BOUNDS[dtype]
    largest = groups.abs().amax(1).float()
    integers = torch.zeros(groups.shape, dtype=torch.int8)
    scales = torch.full((len(groups),), TINIEST, dtype=torch.float32)
    errors = largest.clone()  # Of all integers zero.
    # The largest integers first: most grids use them, and what is found is not looked for again.
    for integer in range(-low, 0, -1):
        left = errors.nonzero()[:, 0]
        if not len(left):
            break
        weights, nearest = groups[left], (largest[left] / integer).to(torch.bfloat16)
        # The largest weight may have been rounded: its scale is one of the neighbors then.
        for step in (0, -1, 1):
            scale = (nearest.view(torch.int16) + step).view(torch.bfloat16).float().clamp_min(TINIEST)
            quotients = (weights.float() / scale[:, None]).round_().clamp_(low, high)
            # As the checkpoint would have it: in its own dtype.
            error = ((quotients * scale[:, None]).to(groups.dtype) - weights).abs().amax(1).float()
            better = error < errors[left]
            chosen = left[better]
            integers[chosen], scales[chosen] = quotients[better].to(torch.int8), scale[better]
            errors[chosen] = error[better]
    return integers, scales, errors
