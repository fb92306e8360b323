"""Gate: collect the run's measurements into metrics.json, and check them against the limits.

The stage does not fail if the release does, so that the release can be inspected. The flow calls `require_pass` before
it publishes.
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
    """Write metrics.json: all measurements of the release, and the verdict.

    This function has many parameters because each one is part of the stage's cache key, with its own origin in the
    flow.

    Args:
        target: The artifact's directory.
        resolved: {"model": {"name", "revision", "fixture", "license"}, "datasets": {benchmark: {"name", "revision",
            "fixture"}}, "text": the same for the text, "calibration": the same for the calibration text, or None,
            "reference": {"name", "revision"} of the reference model, if there is one}.
        benchmarks: {benchmark: its entry in metrics.json}; see Benchmark.card_inputs().
        recipe: The recipe, as JSON.
        limits: The flow's parameters with these names; see `checks.LIMITS`.
        required: The checks that a release must have to pass; see `checks.required_checks`.
        command: The command that reproduces the release.
        versions: The versions of the libraries that the card names.
        run_id: The flow run.
        **measurements: The artifacts of earlier stages, by the stage's name in the run; a list for a stage in parts.
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
