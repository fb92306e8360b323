"""Fast products of float32 matrices."""

import contextlib
from collections.abc import Iterator

# The number of columns of the test matrices, and a relative error that is far above float32's and far below bfloat16's.
SIZE, EXACT = 256, 1e-5


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Have oneDNN multiply float32 matrices on the CPU, unless it would round them to bfloat16.

    By default, torch uses MKL, which reaches half of the speed of AMD's processors. torch uses oneDNN only if oneDNN
    may compute in bfloat16. On a processor where oneDNN actually does, torch keeps using MKL.
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
