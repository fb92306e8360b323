"""Collects what metrics.json says from the artifacts of a run."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from quantize_gemma.tasks.gate.checks import add_missing, judge
from quantize_gemma.tasks.models.license import GEMMA_TERMS
from quantize_gemma.tasks.models.metrics import (
    Base,
    ChartqaScore,
    Dataset,
    Metrics,
    MmluScore,
    Program,
    Quantized,
    SampleScore,
    StageCost,
)
from quantize_gemma.tasks.models.recipe import Recipe, recipe_hash
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.paired_stats import Pairs, count_pairs
from quantize_gemma.tasks.runtime.store import Artifact

S = TypeVar("S")
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
# The fields of the export's metadata that go into metrics.json.
EXPORT_FIELDS = ("task", "delegation", "backend", "dtype", "custom_sdpa", "custom_kv_cache", "last_logits_only")
# Benchmark -> its stage.
EVALUATIONS = {"mmlu": "evaluate_mmlu", "chartqa": "evaluate_chartqa"}


def collect_metrics(
    artifacts: dict[str, Artifact],
    resolved: dict[str, Any],
    recipe: dict[str, Any],
    limits: dict[str, float],
    required: list[str],
    command: str,
    versions: dict[str, str],
    run_id: str,
) -> Metrics:
    """Return the run's metrics: scores, sizes, versions, commands, time and memory of each stage, and the verdict.

    Its parameters are the stage's.
    """
    model, benchmark, chartqa = resolved["model"], resolved["benchmark"], resolved["chartqa"]
    base, quantized = collect_base(artifacts), collect_quantized(artifacts)
    check_devices(base, quantized)
    program, pairs = collect_program(artifacts), collect_pairs(artifacts)
    differing = program.mmlu.differing if program.mmlu else None
    return Metrics(
        base_model=model["name"],
        base_revision=model["revision"],
        license=model["license"] or GEMMA_TERMS,
        fixture_model=model["fixture"],
        benchmark=benchmark["name"],
        benchmark_revision=benchmark["revision"],
        fixture_benchmark=benchmark["fixture"],
        chartqa=None if chartqa is None else Dataset(**chartqa),
        recipe=recipe["name"],
        recipe_hash=recipe_hash(Recipe.from_json(recipe)),
        max_seq_len=artifacts["export"].metadata["max_seq_len"],
        run_id=run_id,
        commands={"run": command, **({} if base.mmlu is None else {"mmlu": mmlu_command(base.mmlu)})},
        versions=versions,
        loads_in=[],
        pairs=pairs,
        base=base,
        quantized=quantized,
        program=program,
        stages={
            name: StageCost(
                seconds=artifact.measured["seconds"],
                peak_rss_bytes=artifact.measured["peak_rss_bytes"],
                bytes=artifact.size,
            )
            for name, artifact in artifacts.items()
        },
        gate=add_missing(judge(pairs, differing, program.agreement, limits), required),
    )


def mmlu_command(score: MmluScore) -> str:
    """Return the command of lm-evaluation-harness that reproduces a score."""
    limit = f"--limit {score.limit} " if score.limit else ""
    model = "--model hf --model_args pretrained=PATH_OR_NAME,dtype=bfloat16"
    return f"lm_eval {model} --tasks mmlu {limit}--device {score.device}"


def collect_base(artifacts: dict[str, Artifact]) -> Base:
    """Return the base model's column."""
    return Base(
        bytes=artifacts["download"].metadata["weight_bytes"],
        mmlu=_score(MmluScore, artifacts.get("evaluate_mmlu_base")),
        chartqa=_score(ChartqaScore, artifacts.get("evaluate_chartqa_base")),
    )


def collect_quantized(artifacts: dict[str, Artifact]) -> Quantized:
    """Return the quantized checkpoint's column."""
    return TypeAdapter(Quantized).validate_python(
        {
            "bytes": artifacts["quantize"].files["model.safetensors"].size,
            "weight_error": artifacts["quantize"].metadata["weight_error"],
            "smoke": artifacts["smoke"].metadata,
            "mmlu": _score(MmluScore, artifacts.get("evaluate_mmlu_quantized")),
            "chartqa": _score(ChartqaScore, artifacts.get("evaluate_chartqa_quantized")),
        }
    )


def collect_program(artifacts: dict[str, Artifact]) -> Program:
    """Return the program's column."""
    program, verified = artifacts["export"], artifacts["verify"]
    return TypeAdapter(Program).validate_python(
        {
            "bytes": program.files["model.pte"].size,
            **{name: program.metadata[name] for name in EXPORT_FIELDS},
            "image": None,
            **verified.metadata,
            "speed": verified.measured["speed"],
            "mmlu": _score(SampleScore, artifacts.get("evaluate_program")),
            "chartqa": None,
        }
    )


def check_devices(base: Base, quantized: Base) -> None:
    """Raise StageFailed if base and quantized were measured on different devices, which round differently."""
    for name, before, after in (("mmlu", base.mmlu, quantized.mmlu), ("chartqa", base.chartqa, quantized.chartqa)):
        # A flow run resolves the device once, for both.
        if before is not None and after is not None and before.device != after.device:
            raise StageFailed(
                f"{name} was measured on {before.device} for the base model and on {after.device} for the checkpoint: "
                "use one device"
            )


def collect_pairs(artifacts: dict[str, Artifact]) -> dict[str, Pairs]:
    """Return by benchmark how many questions both, only the base, only the checkpoint, or neither answers correctly."""
    pairs = {}
    for benchmark, stage in EVALUATIONS.items():
        if f"{stage}_base" in artifacts:
            before, after = (read_outcomes(artifacts[f"{stage}_{column}"].path) for column in ("base", "quantized"))
            pairs[benchmark] = pair_outcomes(before, after)
    return pairs


def read_outcomes(evaluation: Path) -> dict[str, bool]:
    """Return {question: whether the answer is correct} of an evaluation's samples.jsonl."""
    outcomes = {}
    for line in (evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "relaxed" in row:
            outcomes[str(row["question"])] = bool(row["relaxed"])
        else:
            outcomes[f"{row['subject']} {row['doc_id']}"] = row["prediction"] == row["target"]
    return outcomes


def pair_outcomes(before: dict[str, bool], after: dict[str, bool]) -> Pairs:
    """Return the counts of questions that base (first) and checkpoint (second) answer correctly."""
    assert before.keys() == after.keys(), "base and checkpoint have different questions"
    return count_pairs((before[question], after[question]) for question in before)


def _score(kind: type[S], artifact: Artifact | None) -> S | None:
    """Return the score in an evaluation's results.json, None if it was not measured."""
    if artifact is None:
        return None
    return TypeAdapter(kind).validate_json((artifact.path / "results.json").read_bytes())
