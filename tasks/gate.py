"""Gate: a release that lost too much is not published."""

from typing import Any

from prefect import task

# Below this, in nats per token, rounding in float32 alone makes the difference.
KL_FLOOR = 1e-3


class GateRefused(Exception):
    """The release does not reach the bar; `verdict` says which checks it failed, `summary` what the run did."""

    def __init__(self, verdict: dict[str, Any]) -> None:
        failed = "; ".join(check["message"] for check in verdict["checks"] if not check["passed"])
        super().__init__(f"the gate refuses the release: {failed}")
        self.verdict = verdict
        self.summary: dict[str, Any] = {}


def judge(metrics: dict[str, Any], max_mmlu_drop: float, max_kl_ratio: float) -> dict[str, Any]:
    """Returns {"passed", "checks": [{"name", "passed", "value", "limit", "message"}]}.

    `max_mmlu_drop` is in points of accuracy (percent). `max_kl_ratio` bounds the KL divergence between checkpoint and
    program by that of the activation rounding alone.
    """
    checks = []
    base, quantized = metrics["base"].get("mmlu"), metrics["quantized"].get("mmlu")
    if base and quantized:
        drop = round(100 * (base["accuracy"] - quantized["accuracy"]), 4)
        checks.append(_check("mmlu_drop", drop, max_mmlu_drop, f"MMLU falls by {drop:.2f} points"))
    if "program" in metrics:
        agreement = metrics["program"]["agreement"]
        limit = max(max_kl_ratio * agreement["kl_activation_noise"], KL_FLOOR)
        value = agreement["kl_program"]
        checks.append(_check("program_kl", value, limit, f"the program is {value:.4f} nats from the checkpoint"))
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def _check(name: str, value: float, limit: float, what: str) -> dict[str, Any]:
    passed = value <= limit
    return {"name": name, "passed": passed, "value": value, "limit": limit, "message": f"{what}, at most {limit:.4g}"}


@task(name="gate", task_run_name="gate", persist_result=False)
def gate(metrics: dict[str, Any], max_mmlu_drop: float, max_kl_ratio: float) -> dict[str, Any]:
    """Judge the release by the quality it lost. Raises GateRefused."""
    verdict = judge(metrics, max_mmlu_drop, max_kl_ratio)
    if not verdict["passed"]:
        raise GateRefused(verdict)
    return verdict
