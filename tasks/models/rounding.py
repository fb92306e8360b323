"""Rounding in numba's kernels: float32 numbers to integers and to bfloat16.

numba's cache of a kernel depends only on the kernel's own file: after a change here, delete `__pycache__`.
"""

import numba
import numpy as np
import numpy.typing as npt

# Adding and subtracting 1.5 * 2**23 rounds a float32 of at most 2**22 to the nearest integer, ties to even.
ROUNDER = np.float32(12582912.0)
# The smallest normal number of bfloat16 and float32: XNNPACK rejects smaller scales.
TINIEST = np.float32(2.0**-126)


@numba.njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def round_to_bfloat16(bits: npt.NDArray[np.uint32]) -> None:
    """Round float32 numbers, passed as their bits, to the nearest bfloat16 in place, ties to even."""
    for k in range(bits.size):
        value = bits[k]
        bits[k] = (value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@numba.njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def round_scales(scales: npt.NDArray[np.float32]) -> None:
    """Round scales to the nearest bfloat16 in place, ties to even; at least TINIEST."""
    round_to_bfloat16(scales.view(np.uint32))
    for k in range(scales.size):
        scales[k] = max(scales[k], TINIEST)
