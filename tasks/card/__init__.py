"""Card: puts the release together: checkpoint, program, metrics.json and a README.md of what this run measured."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks import store
from tasks.recipe import ROLES, recipe_hash
from tasks.stage import Stage

LIBRARIES = (
    "torch",
    "torchao",
    "transformers",
    "executorch",
    "optimum-executorch",
    "lm-eval",
    "huggingface_hub",
    "prefect",
)
# Weights derived from Gemma's stay under its terms, whatever a local directory does not say.
GEMMA_TERMS = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
HERE = Path(__file__).parent


def make_release(
    target: Path,
    model: dict[str, Any],
    benchmark: dict[str, Any],
    recipe: dict[str, Any],
    max_seq_len: int,
    run_id: str,
    **stages: Path,
) -> dict[str, Any]:
    """Fills `target` with a release that can be pushed to the Hub as it is: checkpoint, program, metrics.json, card.

    `model` and `benchmark` say what was resolved: {"name", "revision", "fixture", …}; `stages` are the artifacts'
    directories by stage.
    """
    artifacts = {name: store.at(path) for name, path in stages.items()}
    metrics = {**collect_metrics(artifacts, model, benchmark, recipe, max_seq_len), "run_id": run_id}
    checkpoint = artifacts["quantize"]
    for name in checkpoint.files:
        store.link(checkpoint.path / name, target / name)
    for name in artifacts["export"].files:
        store.link(artifacts["export"].path / name, target / name)
    draw_subjects(metrics, target / "mmlu-by-subject.png")
    (target / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    (target / "README.md").write_text(render(metrics, recipe, sizes), encoding="utf-8")
    return {"metadata": {"recipe_hash": metrics["recipe_hash"]}}


def collect_metrics(
    artifacts: dict[str, store.Artifact],
    model: dict[str, Any],
    benchmark: dict[str, Any],
    recipe: dict[str, Any],
    max_seq_len: int,
) -> dict[str, Any]:
    """Returns what metrics.json says: results, sizes, versions, commands, and time and memory of each stage."""
    mmlu = {
        name: json.loads((artifacts[stage_name].path / "results.json").read_text(encoding="utf-8"))
        for name, stage_name in (("base", "evaluate_base"), ("quantized", "evaluate_quantized"))
    }
    program = artifacts["smoke_program"]
    limit = mmlu["base"]["limit"]
    run = f"quantize-gemma run --model {model['name']} --recipe {recipe['name']} --max-seq-len {max_seq_len}"
    if not model["fixture"]:
        run += f" --revision {model['revision']}"
    run += f" --benchmark {benchmark['name']}" + (f" --limit {limit}" if limit else "")
    return {
        "base_model": model["name"],
        "base_revision": model["revision"],
        "license": model["license"] or GEMMA_TERMS,
        "fixture_model": model["fixture"],
        "benchmark": benchmark["name"],
        "benchmark_revision": benchmark["revision"],
        "fixture_benchmark": benchmark["fixture"],
        "recipe": recipe["name"],
        "recipe_hash": recipe_hash(recipe),
        "max_seq_len": max_seq_len,
        "commands": {
            "run": run,
            "mmlu": "lm_eval --model hf --model_args pretrained=PATH_OR_NAME,dtype=bfloat16 --tasks mmlu "
            + (f"--limit {limit} " if limit else "")
            + f"--device {mmlu['base']['device']}",
        },
        "versions": {name: version(name).split("+")[0] for name in LIBRARIES},
        "base": {"bytes": artifacts["download"].metadata["weight_bytes"], "mmlu": mmlu["base"]},
        "quantized": {
            "bytes": artifacts["quantize"].files["model.safetensors"].size,
            "weight_error": artifacts["quantize"].metadata["weight_error"],
            "smoke": artifacts["smoke"].metadata,
            "mmlu": mmlu["quantized"],
        },
        "program": {
            "bytes": artifacts["export"].files["model.pte"].size,
            "task": artifacts["export"].metadata["task"],
            "delegation": artifacts["export"].metadata["delegation"],
            **program.metadata,
            "speed": program.measured["speed"],
        },
        "stages": {
            name: {
                "seconds": artifact.measured["seconds"],
                "peak_rss_bytes": artifact.measured["peak_rss_bytes"],
                "bytes": artifact.size,
            }
            for name, artifact in artifacts.items()
        },
    }


def score(result: dict[str, Any]) -> str:
    """Returns an accuracy in percent as text, with its standard error where there is one."""
    text = f"{100 * result['accuracy']:.2f}"
    return text if result["stderr"] is None else f"{text} ± {100 * result['stderr']:.2f}"


def render(metrics: dict[str, Any], recipe: dict[str, Any], sizes: dict[str, int]) -> str:
    """Returns the model card's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["size"] = store.human_size
    environment.filters["percent"] = lambda value: f"{100 * value:.2f}"
    environment.filters["small"] = lambda value: f"{value:.2g}"
    environment.filters["score"] = score
    return environment.get_template("README.md.j2").render(
        m=metrics,
        agreement=metrics["program"]["agreement"],
        recipe=recipe,
        sizes=sizes,
        rules=[_rule_as_code(rule) for rule in recipe["rules"]],
    )


def draw_subjects(metrics: dict[str, Any], path: Path) -> None:
    """Draws accuracy per MMLU subject, base beside quantized, as a PNG."""
    from matplotlib.figure import Figure

    columns = {name: metrics[name]["mmlu"]["subjects"] for name in ("base", "quantized")}
    subjects = sorted(columns["quantized"], reverse=True)
    figure = Figure(figsize=(8, 0.22 * len(subjects) + 1), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(columns)
    for place, (name, scores) in enumerate(columns.items()):
        positions = [index + 0.4 - height * (place + 0.5) for index in range(len(subjects))]
        axes.barh(positions, [100 * scores[s]["accuracy"] for s in subjects], height, label=name)
    axes.set_yticks(range(len(subjects)), [subject.replace("_", " ") for subject in subjects], fontsize=7)
    axes.set_ylim(-0.6, len(subjects) - 0.4)
    axes.set_xlabel(f"accuracy on {metrics['benchmark']}, %")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _rule_as_code(rule: dict[str, Any]) -> dict[str, str]:
    match = rule["match"]
    granularity = f"PerGroup({rule['group_size']})" if rule["group_size"] else "PerAxis(0)"
    dynamic = rule["activation"] == "int8"
    return {
        "pattern": match[3:] if match.startswith("re:") else ROLES[match],
        "config": f"{'Int8DynamicActivationIntxWeightConfig' if dynamic else 'IntxWeightOnlyConfig'}("
        f"weight_dtype=torch.{rule['weight']}, {'weight_granularity' if dynamic else 'granularity'}={granularity}, "
        f'intx_choose_qparams_algorithm="{rule["algorithm"]}")',
    }


# A changed template is a changed card.
_template = hashlib.sha256((HERE / "README.md.j2").read_bytes()).hexdigest()[:12]
card = Stage(make_release, name="card", version=f"2-{_template}", libraries=LIBRARIES, ignored=("run_id",))
