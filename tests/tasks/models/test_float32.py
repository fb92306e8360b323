"""Float32 products are fast unless that would cost precision."""

import math

import pytest
import torch

from quantize_gemma.tasks.models import float32
from quantize_gemma.tasks.models.float32 import fast_products


def test_products_are_as_exact_as_float32_and_the_setting_is_restored() -> None:
    left, right = torch.randn(2, 500, 500, generator=torch.Generator().manual_seed(1))
    exact = left.double() @ right.double()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_products():
        product = left @ right
    assert (product - exact).norm() < 1e-5 * exact.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(("largest_error", "changes"), [(math.inf, True), (0.0, False)])
def test_onednn_multiplies_unless_the_processor_would_compute_in_bfloat16(
    largest_error: float, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert before != "bf16"
    monkeypatch.setattr(float32, "EXACT", largest_error)
    with fast_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if changes else before)
