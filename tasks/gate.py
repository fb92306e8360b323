"""Gate: a release that lost too much is not published."""

from typing import Any

from tasks.store import RunError

# Below this, in nats per token, or in mean squares of one, rounding in float32 alone makes the difference.
FLOOR = 1e-6
# What of the program was compared with the checkpoint, and how it is called.
COMPARED = {
    "last": "at the end of the longest sequence",
    "step_by_step": "token by token",
    "image": "after an image",
}


class GateRefused(RunError):
    """The release does not reach the bar; `verdict` says which checks it failed."""

    def __init__(self, verdict: dict[str, Any]) -> None:
        failed = "; ".join(check["message"] for check in verdict["checks"] if not check["passed"])
        super().__init__(f"the gate refuses the release: {failed}")
        self.verdict = verdict


def judge(
    metrics: dict[str, Any], max_mmlu_drop: float, max_kl_ratio: float, published: float | None, max_regression: float
) -> dict[str, Any]:
    """Returns {"passed", "checks": [{"name", "passed", "value", "limit", "message"}]}.

    `max_mmlu_drop` is in points of accuracy (percent). `max_kl_ratio` bounds the KL divergence between checkpoint and
    program, and the vision encoder's squared error, by what rounding the activations makes of them. `published` is the
    accuracy, in percent, of the release that would be replaced, if there is one; `max_regression` how many points it
    may be lost by.
    """
    drop = round(100 * (metrics["base"]["mmlu"]["accuracy"] - metrics["quantized"]["mmlu"]["accuracy"]), 4)
    checks = [_check("mmlu_drop", drop, max_mmlu_drop, f"MMLU falls by {drop:.2f} points")]
    agreement = metrics["program"]["agreement"]
    parts = {"": agreement, **{name: agreement[name] for name in COMPARED if name in agreement}}
    for name, part in parts.items():
        value, limit = part["kl_program"], max(max_kl_ratio * part["kl_activation_noise"], FLOOR)
        what = f"the program is {value:.6f} nats from the checkpoint {COMPARED.get(name, '')}".strip()
        checks.append(_check(f"program_kl_{name}".rstrip("_"), value, limit, what))
    if "vision_encoder" in agreement:
        found = agreement["vision_encoder"]
        limit = max(max_kl_ratio * found["noise"], FLOOR)
        what = f"the vision encoder's squared error is {found['error']:.2g}"
        checks.append(_check("vision_encoder", found["error"], limit, what))
    if published is not None:
        loss = round(published - 100 * metrics["quantized"]["mmlu"]["accuracy"], 4)
        checks.append(_check("regression", loss, max_regression, f"MMLU is {loss:.2f} points below what is published"))
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def _check(name: str, value: float, limit: float, what: str) -> dict[str, Any]:
    passed = value <= limit
    return {"name": name, "passed": passed, "value": value, "limit": limit, "message": f"{what}, at most {limit:.4g}"}


def gate(
    metrics: dict[str, Any], max_mmlu_drop: float, max_kl_ratio: float, published: float | None, max_regression: float
) -> dict[str, Any]:
    """Judge the release by the quality it lost. Raises GateRefused."""
    verdict = judge(metrics, max_mmlu_drop, max_kl_ratio, published, max_regression)
    if not verdict["passed"]:
        raise GateRefused(verdict)
    return verdict
