"""Gate: collects the run's measurements into metrics.json and judges them against the limits.

The stage gives a verdict and does not fail on a bad one, so that a release that fails can be looked at. The flow calls
`require_pass` before it publishes.
"""

from pathlib import Path

from quantize_gemma.tasks.gate.metrics import add_up, collect_metrics
from quantize_gemma.tasks.models.metrics import write_metrics
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.stage import Output, stage


@stage(ignored=("run_id",))
def gate(
    target: Path,
    /,
    resolved: dict[str, object],
    benchmarks: dict[str, object],
    recipe: dict[str, object],
    limits: dict[str, float | None],
    required: list[str],
    command: str,
    versions: dict[str, str],
    run_id: str,
    **measurements: Path | list[Path],
) -> Output:
    """Write metrics.json: every number of the release, and the verdict on them.

    It takes many parameters because each is a JSON value in the stage's key with its own origin in the flow.

    Args:
        target: The artifact's directory.
        resolved: {"model": {"name", "revision", "fixture", "license"}, "datasets": {benchmark: {"name", "revision",
            "fixture"}}, "text": the same of the text}.
        benchmarks: {benchmark: what metrics.json says of it}; see Benchmark.card_inputs().
        recipe: The recipe, as JSON.
        limits: The flow's parameters of these names: see `checks.LIMITS`.
        required: The checks without which no release passes: see `checks.required_checks`.
        command: The command that reproduces the release.
        versions: The versions of the libraries that the card names.
        run_id: The flow run.
        **measurements: The artifacts of the stages before it, by the stage's name in the run; a list for a stage in
            parts.
    """
    parts = {
        name: [store.read_artifact(path) for path in (paths if isinstance(paths, list) else [paths])]
        for name, paths in measurements.items()
    }
    artifacts = {name: part_artifacts[0] for name, part_artifacts in parts.items()}
    costs = {name: add_up(part_artifacts) for name, part_artifacts in parts.items()}
    metrics = collect_metrics(
        artifacts, costs, resolved, benchmarks, recipe, limits, required, command, versions, run_id
    )
    write_metrics(metrics, target / "metrics.json")
    failed = [check.name for check in metrics.gate.checks if check.status == "fail"]
    return {"metadata": {"passed": metrics.gate.passed, "failed": failed}}
