"""Card: assemble the release from the checkpoint, the program, and metrics.json, and render its README.md."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from quantize_gemma.tasks.card import markdown
from quantize_gemma.tasks.card.chart import (
    ERROR_CHART,
    KL_CHART,
    charts,
    draw_kl_histogram,
    draw_output_error,
    draw_subjects,
)
from quantize_gemma.tasks.card.eval_results import eval_results
from quantize_gemma.tasks.card.front_matter import as_yaml, front_matter
from quantize_gemma.tasks.models.device_report import parse_device_report, require_program
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.license import GEMMA_TERMS, clean_license
from quantize_gemma.tasks.models.metrics import Metrics, parse_metrics, write_metrics
from quantize_gemma.tasks.models.recipe import Recipe, Rule
from quantize_gemma.tasks.models.tables import (
    NOT_MEASURED,
    benchmark_rows,
    distance_rows,
    summary_rows,
    verdict_rows,
)
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.units import human_size

FOLDER = Path(__file__).parent
# The directory in a release for the samples behind its scores.
SAMPLES = "samples"


@dataclass(frozen=True)
class RuleCode:
    """A recipe's rule as Python code: a regular expression on module names, and torchao's config."""

    pattern: str
    config: markdown.Markdown


@stage()
def card(
    target: Path,
    /,
    recipe: dict[str, object],
    checkpoint: Path,
    program: Path,
    gate: Path,
    device_report: dict[str, object] | None = None,
    **evaluations: Path,
) -> Output:
    """Fill `target` with a release that is ready to be pushed to the Hub.

    Args:
        target: The artifact's directory.
        recipe: The recipe, as JSON.
        checkpoint: The artifact of the quantized checkpoint.
        program: The artifact of `export`.
        gate: The artifact of `gate`, with metrics.json.
        device_report: The program's speed on a phone, as JSON; None if it was not measured.
        **evaluations: The artifacts of `evaluate` whose samples the release includes, by the stage's name in the run.
    """
    parsed_recipe = Recipe.from_json(recipe)
    content = json.loads(store.read_file(store.read_artifact(gate), "metrics.json"))
    report = parse_device_report(device_report) if device_report is not None else None
    if report is not None:
        require_program(report, store.read_artifact(program).files["model.pte"].sha256)
    metrics = replace(parse_metrics(content), loads_in=read_loading_environments(), device_report=report)
    hashes: dict[str, str] = {}
    for artifact in (store.read_artifact(checkpoint), store.read_artifact(program)):
        hashes |= {name: add_file(target, name, artifact, name) for name in artifact.files}
    for stage_name, path in evaluations.items():
        name = f"{SAMPLES}/{stage_name.removeprefix('evaluate_')}.jsonl"
        hashes[name] = add_file(target, name, store.read_artifact(path), "samples.jsonl")
    draw_kl_histogram(metrics, target / KL_CHART)
    if metrics.quantized.output_error:
        draw_output_error(metrics, target / ERROR_CHART)
    for benchmark, name in charts(metrics).items():
        draw_subjects(metrics, benchmark, target / name)
    for name, results in eval_results(metrics).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(as_yaml(results), encoding="utf-8")
    write_metrics(metrics, target / "metrics.json")
    sizes = {name: path.stat().st_size for name, path in files_of(target).items()}
    (target / "README.md").write_text(render(metrics, parsed_recipe, sizes), encoding="utf-8")
    check_front_matter(target / "README.md", metrics)
    write_file_list(target, hashes)
    return {"metadata": {"recipe_hash": metrics.recipe_hash}}


def read_loading_environments() -> list[dict[str, str]]:
    """Return the environments, {library: version}, in which the card's loading code was run.

    `python -m tests.compatibility.loading` writes loads_in.json if the code generates the same tokens in all of them.
    """
    environments: list[dict[str, str]] = json.loads((FOLDER / "loads_in.json").read_text(encoding="utf-8"))[
        "environments"
    ]
    return environments


def add_file(release: Path, name: str, artifact: store.Artifact, source: str) -> str:
    """Link an artifact's file into a release; return its SHA-256.

    Raises:
        StageFailed: The file has changed since it was measured.
    """
    store.check_file(artifact, source)
    store.link(artifact.path / source, release / name)
    return artifact.files[source].sha256


def files_of(release: Path) -> dict[str, Path]:
    """Return {path in the release: file}, sorted by path."""
    return {path.relative_to(release).as_posix(): path for path in sorted(release.rglob("*")) if path.is_file()}


def write_file_list(release: Path, hashes: dict[str, str]) -> None:
    """Write release.json, {"files": {name: {"size", "sha256"}}}; `hashes` are the SHA-256s that are already known."""
    files = {
        name: {"size": path.stat().st_size, "sha256": hashes.get(name) or store.digest_file(path)}
        for name, path in files_of(release).items()
    }
    (release / "release.json").write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def render(metrics: Metrics, recipe: Recipe, sizes: dict[str, int]) -> str:
    """Return the text of the model card; `sizes` are the sizes of the files, in bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text is escaped for Markdown instead of HTML: see markdown.py.
        autoescape=False,
        finalize=markdown.inline,
    )
    for name in ("line", "code", "fenced", "link_target", "python", "python_pattern"):
        environment.filters[name] = getattr(markdown, name)
    environment.filters["size"] = human_size
    environment.filters["rounded"] = lambda value, digits: NOT_MEASURED if value is None else f"{value:.{digits}f}"
    environment.filters["percent"] = "{:.2%}".format
    environment.filters["small"] = "{:.2g}".format
    multimodal = metrics.program.multimodal
    rules = [rule for rule in recipe.rules if multimodal or not GEMMA3.is_vision_role(rule.match)]
    vision_weights = {rule.weight for rule in rules if GEMMA3.is_vision_role(rule.match)}
    language_weights = {rule.weight for rule in rules if not GEMMA3.is_vision_role(rule.match)}
    loading, running = (
        environment.get_template(template).render(multimodal=multimodal, smoke=metrics.quantized.smoke)
        for template in ("loading.py.j2", "running.py.j2")
    )
    return environment.get_template("README.md.j2").render(
        m=metrics,
        multimodal=multimodal,
        loading=loading,
        running=running,
        front_matter=markdown.Markdown(as_yaml(front_matter(metrics))),
        license=clean_license(metrics.license) or GEMMA_TERMS,
        benchmarks={name: benchmark_rows(metrics, name) for name in metrics.benchmarks},
        charts={metrics.benchmarks[name].title: chart for name, chart in charts(metrics).items()},
        summary=summary_rows(metrics),
        distances=distance_rows(metrics, metrics.gate.checks),
        kl_chart=KL_CHART,
        error_chart=ERROR_CHART,
        checks=verdict_rows(metrics.gate.checks),
        failed=[check.message for check in metrics.gate.checks if check.status == "fail"],
        recipe=recipe,
        int8_vision=vision_weights == {"int8"} != language_weights,
        sizes=sizes,
        has_samples=any(name.startswith(f"{SAMPLES}/") for name in sizes),
        rules=[_rule_code(rule) for rule in rules],
        own_algorithms=sorted({rule.algorithm for rule in rules if rule.algorithm != rule.torchao_algorithm}),
    )


def check_front_matter(readme: Path, metrics: Metrics) -> None:
    """Raise StageFailed if the Hub's own client reads different metadata from the card than was written to it."""
    from huggingface_hub import metadata_load

    if metadata_load(readme) != front_matter(metrics):
        raise StageFailed(f"the metadata of {readme} differs from what was written: the release is not published")


def _rule_code(rule: Rule) -> RuleCode:
    granularity = f"PerGroup({rule.group_size})" if rule.group_size else "PerAxis(0)"
    dynamic = rule.activation == "int8"
    return RuleCode(
        pattern=rule.pattern,
        config=markdown.Markdown(
            f"{'Int8DynamicActivationIntxWeightConfig' if dynamic else 'IntxWeightOnlyConfig'}("
            f"weight_dtype=torch.{rule.weight}, {'weight_granularity' if dynamic else 'granularity'}={granularity}, "
            f'intx_choose_qparams_algorithm="{rule.torchao_algorithm}")'
        ),
    )
