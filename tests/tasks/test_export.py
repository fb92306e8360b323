"""What the exported program must be, and what is said when it is not."""

import pytest

from tasks.export import check_delegation
from tasks.store import StageFailed


def counted(**portable: int) -> dict[str, dict[str, dict[str, int]]]:
    custom = {"llama_custom_sdpa_default": 2}
    return {"text_decoder": {"xnnpack": {"aten_linear_default": 3}, "custom": custom, "portable": portable}}


def test_operators_that_cost_little_may_stay_with_the_portable_kernels() -> None:
    check_delegation(counted(aten_mean_dim=4, aten_native_layer_norm_default=2, aten_index_put_default=1))


@pytest.mark.parametrize(
    "name",
    ["aten_linear_default", "aten_mm_default", "aten_bmm_default", "aten_convolution_default", "aten__softmax_default"],
)
def test_a_linear_or_an_attention_that_is_not_delegated_is_an_error(name: str) -> None:
    with pytest.raises(StageFailed, match=f"text_decoder of the program runs {name}"):
        check_delegation(counted(aten_mean_dim=4, **{name: 1}))
