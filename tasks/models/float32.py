"""Products of float32 matrices at the speed of the processor."""

import contextlib
from collections.abc import Iterator

# The relative error of a float32 product with sums of this length is below it; bfloat16's is a thousand times as large.
SIZE, EXACT = 256, 1e-5


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Have oneDNN multiply float32 matrices on the CPU, where that is as exact as what torch does otherwise.

    torch takes MKL, which uses half of what AMD's processors can do. It takes oneDNN if oneDNN may compute in bfloat16,
    which oneDNN does only on processors with instructions for tiles of it (AMX). Those are Intel's, where MKL is fast.
    """
    import torch

    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    if not _is_exact():
        settings.fp32_precision = before
    try:
        yield
    finally:
        settings.fp32_precision = before


def _is_exact() -> bool:
    import torch

    left, right = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    return bool((left @ right - exact).norm() < EXACT * exact.norm())
