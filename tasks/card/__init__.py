"""Card: puts the release together: checkpoint, program, metrics.json and a README.md of what this run measured."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks import store
from tasks.builtin import BUILTIN
from tasks.policies import stage
from tasks.recipe import ROLES, recipe_hash

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
HERE = Path(__file__).parent


def make_release(
    target: Path, model: dict[str, Any], recipe: dict[str, Any], max_seq_len: int, **stages: Path
) -> dict[str, Any]:
    """Fills `target` with a release that can be pushed to the Hub as it is: checkpoint, program, metrics.json, card.

    `stages` are the artifacts' directories by stage; one that was left out is absent from card and metrics.
    """
    artifacts = {name: store.at(path) for name, path in stages.items()}
    metrics = collect_metrics(artifacts, model, recipe, max_seq_len)
    checkpoint = artifacts["quantize"]
    for name in checkpoint.files:
        store.link(checkpoint.path / name, target / name)
    if "export" in artifacts:
        store.link(artifacts["export"].path / "model.pte", target / "model.pte")
    if "mmlu" in metrics["quantized"]:
        draw_subjects(metrics, target / "mmlu-by-subject.png")
    (target / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    (target / "README.md").write_text(render(metrics, recipe, sizes), encoding="utf-8")
    return {"metadata": {"recipe_hash": metrics["recipe_hash"]}}


def collect_metrics(
    artifacts: dict[str, store.Artifact], model: dict[str, Any], recipe: dict[str, Any], max_seq_len: int
) -> dict[str, Any]:
    """Returns what metrics.json says: results, sizes, versions, and time and memory of each stage that ran."""
    metrics: dict[str, Any] = {
        "base_model": model["model"],
        "base_revision": model["revision"],
        "fixture_model": model["model"] in BUILTIN,
        "recipe": recipe["name"],
        "recipe_hash": recipe_hash(recipe),
        "max_seq_len": max_seq_len,
        "versions": {name: version(name).split("+")[0] for name in LIBRARIES},
        "base": {"bytes": _bytes(artifacts["download"], ".safetensors")},
        "quantized": {
            "bytes": _bytes(artifacts["quantize"], ".safetensors"),
            "weight_error": artifacts["quantize"].metadata["weight_error"],
            "smoke": artifacts["smoke"].metadata,
        },
    }
    for name, stage_name in (("base", "evaluate_base"), ("quantized", "evaluate_quantized")):
        if stage_name in artifacts:
            results = (artifacts[stage_name].path / "results.json").read_text(encoding="utf-8")
            metrics[name]["mmlu"] = json.loads(results)
    if "export" in artifacts:
        smoke = artifacts["smoke_program"]
        metrics["program"] = {
            "bytes": artifacts["export"].files["model.pte"].size,
            "task": artifacts["export"].metadata["task"],
            **smoke.metadata,
            "speed": smoke.measured["speed"],
        }
    metrics["stages"] = {
        name: {
            "seconds": artifact.measured["seconds"],
            "peak_rss_bytes": artifact.measured["peak_rss_bytes"],
            "bytes": artifact.size,
        }
        for name, artifact in artifacts.items()
    }
    return metrics


def render(metrics: dict[str, Any], recipe: dict[str, Any], sizes: dict[str, int]) -> str:
    """Returns the model card's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["size"] = human_size
    environment.filters["percent"] = lambda value: f"{100 * value:.2f}"
    return environment.get_template("README.md.j2").render(
        m=metrics, recipe=recipe, sizes=sizes, rules=[_rule_as_code(rule) for rule in recipe["rules"]]
    )


def human_size(count: float) -> str:
    """Returns bytes as text, with decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def draw_subjects(metrics: dict[str, Any], path: Path) -> None:
    """Draws accuracy per MMLU subject, base beside quantized, as a PNG."""
    from matplotlib.figure import Figure

    columns = {name: metrics[name]["mmlu"]["subjects"] for name in ("base", "quantized") if "mmlu" in metrics[name]}
    subjects = sorted(columns["quantized"], reverse=True)
    figure = Figure(figsize=(8, 0.22 * len(subjects) + 1), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(columns)
    for place, (name, scores) in enumerate(columns.items()):
        positions = [index + 0.4 - height * (place + 0.5) for index in range(len(subjects))]
        axes.barh(positions, [100 * scores[s]["accuracy"] for s in subjects], height, label=name)
    axes.set_yticks(range(len(subjects)), [subject.replace("_", " ") for subject in subjects], fontsize=7)
    axes.set_ylim(-0.6, len(subjects) - 0.4)
    axes.set_xlabel(f"accuracy on {metrics['quantized']['mmlu']['benchmark']}, %")
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


def _bytes(artifact: store.Artifact, suffix: str) -> int:
    return sum(file.size for name, file in artifact.files.items() if name.endswith(suffix))


card = stage(make_release, name="card", libraries=LIBRARIES)
