"""Card: puts the release together: checkpoint, program, metrics.json and a README.md of what this run measured."""

import json
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.card import markdown
from quantize_gemma.tasks.card.chart import draw_subjects
from quantize_gemma.tasks.card.front_matter import as_yaml, front_matter
from quantize_gemma.tasks.card.metrics import GEMMA_TERMS, collect_metrics
from quantize_gemma.tasks.gate import gate_table, judge
from quantize_gemma.tasks.models.license import clean_license
from quantize_gemma.tasks.models.recipe import Recipe, Rule
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.units import human_size

HERE = Path(__file__).parent


@stage(ignored=("run_id",))
def card(
    target: Path,
    /,
    model: dict[str, Any],
    benchmark: dict[str, Any],
    charts: dict[str, Any] | None,
    recipe: dict[str, Any],
    max_seq_len: int,
    command: str,
    limits: dict[str, float],
    versions: dict[str, str],
    run_id: str,
    **stages: Path,
) -> Output:
    """Fills `target` with a release that can be pushed to the Hub as it is: checkpoint, program, metrics.json, card.

    `model`, `benchmark` and `charts` say what was resolved: {"name", "revision", "fixture", …}; `command` makes
    the same release again; `limits` are the gate's; `versions` the libraries'; `stages` are the artifacts' directories
    by stage.
    """
    artifacts = {name: store.at(path) for name, path in stages.items()}
    parsed = Recipe.from_json(recipe)
    metrics = collect_metrics(artifacts, model, benchmark, charts, parsed, max_seq_len, command, versions)
    metrics["run_id"] = run_id
    metrics["gate"] = {"limits": limits, **judge(metrics, limits)}
    hashes = {}
    for made in (artifacts["quantize"], artifacts["export"]):
        for name, file in made.files.items():
            # Nothing that has changed since it was measured becomes part of a release.
            store.check_file(made, name)
            store.link(made.path / name, target / name)
            hashes[name] = file.sha256
    draw_subjects(metrics, target / "mmlu-by-subject.png")
    (target / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    (target / "README.md").write_text(render(metrics, parsed, sizes), encoding="utf-8")
    check_front_matter(target / "README.md", metrics)
    write_file_list(target, hashes)
    return {"metadata": {"recipe_hash": metrics["recipe_hash"]}}


def write_file_list(release: Path, hashes: dict[str, str]) -> None:
    """Writes release.json, which says what the other files are: {"files": {name: {"size", "sha256"}}}.

    `hashes` are the SHA-256 that are known already.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashes.get(path.name) or store.digest_file(path)}
        for path in sorted(release.iterdir())
    }
    (release / "release.json").write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def chartqa_scores(metrics: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Returns ChartQA's rows, {name: {"base" | "quantized": score}}; none if it was not measured."""
    if "chartqa" not in metrics["base"]:
        return {}
    found: dict[str, dict[str, str]] = {}
    for column in ("base", "quantized"):
        results = metrics[column]["chartqa"]
        for name, result in results["relaxed_accuracy"].items():
            found.setdefault(f"ChartQA, {name}", {})[column] = score(result)
        found.setdefault("ChartQA, normalized", {})[column] = score(results["normalized"]["overall"])
    return found


def score(result: dict[str, Any]) -> str:
    """Returns an accuracy in percent as text, with its standard error where there is one."""
    text = f"{100 * result['accuracy']:.2f}"
    return text if result["stderr"] is None else f"{text} ± {100 * result['stderr']:.2f}"


def render(metrics: dict[str, Any], recipe: Recipe, sizes: dict[str, int]) -> str:
    """Returns the model card's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # For Markdown, instead of for HTML: see markdown.py.
        autoescape=False,
        finalize=markdown.inline,
    )
    for name in ("line", "code", "fenced", "link_target", "python", "python_pattern"):
        environment.filters[name] = getattr(markdown, name)
    environment.filters["size"] = human_size
    environment.filters["percent"] = lambda value: f"{100 * value:.2f}"
    environment.filters["small"] = lambda value: f"{value:.2g}"
    environment.filters["score"] = score
    loading = environment.get_template("loading.py.j2").render(
        multimodal=metrics["program"]["task"] == "multimodal-text-to-text", smoke=metrics["quantized"]["smoke"]
    )
    return environment.get_template("README.md.j2").render(
        m=metrics,
        loading=loading,
        front_matter=markdown.Markdown(as_yaml(front_matter(metrics))),
        license=clean_license(metrics["license"]) or GEMMA_TERMS,
        agreement=metrics["program"]["agreement"],
        sample=metrics["program"]["mmlu"],
        charts=chartqa_scores(metrics),
        checks=gate_table(metrics["gate"]["checks"]),
        recipe=recipe,
        sizes=sizes,
        rules=[_rule_as_code(rule) for rule in recipe.rules],
    )


def check_front_matter(card: Path, metrics: dict[str, Any]) -> None:
    """Raises StageFailed if the Hub's own client reads other metadata from the card than were written."""
    from huggingface_hub import metadata_load

    if metadata_load(card) != front_matter(metrics):
        raise StageFailed(f"the metadata of {card} are not read as they were written: {card} is not published")


def _rule_as_code(rule: Rule) -> dict[str, str]:
    granularity = f"PerGroup({rule.group_size})" if rule.group_size else "PerAxis(0)"
    dynamic = rule.activation == "int8"
    return {
        "pattern": rule.pattern,
        "config": markdown.Markdown(
            f"{'Int8DynamicActivationIntxWeightConfig' if dynamic else 'IntxWeightOnlyConfig'}("
            f"weight_dtype=torch.{rule.weight}, {'weight_granularity' if dynamic else 'granularity'}={granularity}, "
            f'intx_choose_qparams_algorithm="{rule.algorithm}")'
        ),
    }
