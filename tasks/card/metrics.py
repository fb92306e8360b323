"""What metrics.json says: every number of the card, with what it takes to measure it again."""

import json
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.recipe import Recipe, recipe_hash
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.paired_stats import Pairs, count_pairs

HERE = Path(__file__).parent
# Whose versions the card names.
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
# What the export says of itself.
EXPORTED = ("task", "delegation", "backend", "dtype", "custom_sdpa", "custom_kv_cache", "last_logits_only")
# Benchmark -> its stages, one per column.
EVALUATIONS = {"mmlu": "evaluate_mmlu", "chartqa": "evaluate_chartqa"}


def collect_metrics(
    artifacts: dict[str, store.Artifact],
    model: dict[str, Any],
    benchmark: dict[str, Any],
    charts: dict[str, Any] | None,
    recipe: Recipe,
    max_seq_len: int,
    command: str,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Returns what metrics.json says: results, sizes, versions, commands, and time and memory of each stage."""
    scores = collect_scores(artifacts)
    mmlu = {name: scores[name]["mmlu"] for name in scores}
    program = artifacts["verify"]
    limit = mmlu["base"]["limit"]
    return {
        "base_model": model["name"],
        "base_revision": model["revision"],
        "license": model["license"] or GEMMA_TERMS,
        "fixture_model": model["fixture"],
        "benchmark": benchmark["name"],
        "benchmark_revision": benchmark["revision"],
        "fixture_benchmark": benchmark["fixture"],
        "charts": charts,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "max_seq_len": max_seq_len,
        "commands": {
            "run": command,
            "mmlu": "lm_eval --model hf --model_args pretrained=PATH_OR_NAME,dtype=bfloat16 --tasks mmlu "
            + (f"--limit {limit} " if limit else "")
            + f"--device {mmlu['base']['device']}",
        },
        "versions": versions,
        "loads_in": read_loading_record()["environments"],
        "pairs": collect_pairs(artifacts),
        "base": {"bytes": artifacts["download"].metadata["weight_bytes"], **scores["base"]},
        "quantized": {
            "bytes": artifacts["quantize"].files["model.safetensors"].size,
            "weight_error": artifacts["quantize"].metadata["weight_error"],
            "smoke": artifacts["smoke"].metadata,
            **scores["quantized"],
        },
        "program": {
            "bytes": artifacts["export"].files["model.pte"].size,
            **{name: artifacts["export"].metadata[name] for name in EXPORTED},
            **program.metadata,
            **scores["program"],
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


def read_loading_record() -> dict[str, Any]:
    """Returns where the card's loading code was run: {"snippet_sha256", "environments": [{library: version}]}.

    `python -m tests.compatibility.loading` writes it when the code gave the same tokens everywhere.
    """
    record: dict[str, Any] = json.loads((HERE / "loads_in.json").read_text(encoding="utf-8"))
    return record


def collect_scores(artifacts: dict[str, store.Artifact]) -> dict[str, dict[str, Any]]:
    """Returns {"base" | "quantized" | "program": {"mmlu" | "chartqa": its results}}, of what was measured.

    Raises StageFailed if base and quantized were measured on different devices, which are not comparable to the bit.
    """
    scores: dict[str, dict[str, Any]] = {"base": {}, "quantized": {}, "program": {}}
    for benchmark, stage in EVALUATIONS.items():
        for column in scores:
            node = "evaluate_program" if (benchmark, column) == ("mmlu", "program") else f"{stage}_{column}"
            if node in artifacts:
                results = artifacts[node].path / "results.json"
                scores[column][benchmark] = json.loads(results.read_text(encoding="utf-8"))
        # A flow run resolves the device once, for both.
        where = [scores[column][benchmark]["device"] for column in ("base", "quantized") if benchmark in scores[column]]
        if len(set(where)) > 1:
            raise StageFailed(f"{benchmark} was measured on {where[0]} before and on {where[1]} after: use one device")
    return scores


def collect_pairs(artifacts: dict[str, store.Artifact]) -> dict[str, Pairs]:
    """Returns for each benchmark how many questions both, only the base, only the checkpoint, or neither got right."""
    pairs = {}
    for benchmark, stage in EVALUATIONS.items():
        if f"{stage}_base" in artifacts:
            before, after = (read_outcomes(artifacts[f"{stage}_{column}"].path) for column in ("base", "quantized"))
            pairs[benchmark] = pair_outcomes(before, after)
    return pairs


def read_outcomes(evaluated: Path) -> dict[str, bool]:
    """Returns {question: whether it was answered rightly} of an evaluation's samples.jsonl."""
    outcomes = {}
    for line in (evaluated / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "relaxed" in row:
            outcomes[str(row["question"])] = bool(row["relaxed"])
        else:
            outcomes[f"{row['subject']} {row['doc_id']}"] = row["prediction"] == row["target"]
    return outcomes


def pair_outcomes(before: dict[str, bool], after: dict[str, bool]) -> Pairs:
    """Returns the counts of questions that were answered rightly before and after."""
    assert before.keys() == after.keys(), "base and checkpoint were asked other questions"
    return count_pairs((before[question], after[question]) for question in before)
