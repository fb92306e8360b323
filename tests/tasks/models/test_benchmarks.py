"""Any lm-eval task can be named; one that cannot be evaluated is rejected in one sentence."""

import pytest

from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.runtime.errors import UserError


def test_a_group_is_described_by_its_tasks() -> None:
    row = find_benchmark("xnli")
    assert (row.dataset, row.metric, row.kind, row.higher_is_better) == ("facebook/xnli", "acc", "loglikelihood", True)


def test_the_score_of_lambada_is_a_mean_over_documents() -> None:
    row = find_benchmark("lambada_openai")
    assert (row.metric, row.kind, row.higher_is_better) == ("acc", "loglikelihood", True)


def test_a_tasks_own_metric_has_the_name_of_its_function() -> None:
    assert find_benchmark("xlsum_amharic_prompt_1").metric == "rougeL"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mmmu_val_accounting", "has images"),
        ("humaneval", "runs code that the model writes"),
        ("gsm8k_cot_self_consistency", "samples its responses"),
        ("leaderboard", "does not have exactly one dataset"),
        ("scrolls_quality", "does not have exactly one dataset"),
        ("glue", "do not have the same first metric"),
        ("truthfulqa", "requests of an unsupported kind"),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_rejected_before_anything_starts(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        find_benchmark(name)
