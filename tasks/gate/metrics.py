"""Collect the content of metrics.json from the artifacts of a run."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from quantize_gemma.tasks.gate.checks import add_missing, judge
from quantize_gemma.tasks.gate.program_sample import compare_answers, mean_score
from quantize_gemma.tasks.models.license import GEMMA_TERMS
from quantize_gemma.tasks.models.metrics import (
    Base,
    BenchmarkInfo,
    BenchmarkScore,
    CalibrationData,
    Columns,
    Dataset,
    DistillationData,
    Metrics,
    Program,
    Quantized,
    SampleScore,
    StageCost,
)
from quantize_gemma.tasks.models.recipe import Recipe, recipe_hash
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.paired_stats import Pairs, count_pairs
from quantize_gemma.tasks.runtime.store import Artifact
from quantize_gemma.tasks.runtime.strict_json import JsonObject

# The libraries whose versions the card lists.
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
EXPORT_FIELDS = (
    "task",
    "delegation",
    "backend",
    "dtype",
    "custom_sdpa",
    "custom_kv_cache",
    "kv_cache_dtype",
    "last_logits_only",
    "bidirectional_images",
)
# The artifact of a stage, or those of its parts, by the stage's name in the run.
Artifacts = dict[str, Artifact]


def collect_metrics(
    artifacts: Artifacts,
    costs: dict[str, StageCost],
    resolved: dict[str, Any],
    benchmarks: dict[str, Any],
    recipe: dict[str, Any],
    limits: dict[str, float | None],
    required: list[str],
    command: str,
    versions: dict[str, str],
    run_id: str,
) -> Metrics:
    """Return the run's metrics: scores, sizes, versions, commands, time and memory of each stage, and the verdict.

    Its parameters are the stage's.
    """
    model, datasets = resolved["model"], resolved["datasets"]
    infos = {
        name: TypeAdapter(BenchmarkInfo).validate_python(
            {**info, "dataset": datasets[name], "chance": find_chance(info["chance"], artifacts, name)}
        )
        for name, info in benchmarks.items()
    }
    fidelity = json.loads((artifacts["fidelity"].path / "results.json").read_text(encoding="utf-8"))
    columns = Columns(
        base=collect_base(artifacts, infos),
        quantized=collect_quantized(artifacts, infos, fidelity, resolved),
        program=collect_program(artifacts, infos, fidelity["program"]),
    )
    check_devices(columns.base, columns.quantized)
    pairs = collect_pairs(artifacts, infos)
    commands = {
        name: lm_eval_command(score)
        for name, score in columns.base.scores.items()
        if score is not None and not infos[name].is_own_task
    }
    return Metrics(
        base_model=model["name"],
        base_revision=model["revision"],
        license=model["license"] or GEMMA_TERMS,
        fixture_model=model["fixture"],
        text=TypeAdapter(Dataset).validate_python(resolved["text"]),
        benchmarks=infos,
        recipe=recipe["name"],
        recipe_hash=recipe_hash(Recipe.from_json(recipe)),
        max_seq_len=artifacts["export"].metadata["max_seq_len"],
        run_id=run_id,
        commands={"run": command, **commands},
        versions=versions,
        loads_in=[],
        pairs=pairs,
        base=columns.base,
        quantized=columns.quantized,
        program=columns.program,
        stages=costs,
        gate=add_missing(judge(infos, columns, pairs, limits), required),
        calibration=collect_calibration(artifacts, resolved),
        distillation=collect_distillation(artifacts),
    )


def collect_calibration(artifacts: Artifacts, resolved: dict[str, Any]) -> CalibrationData | None:
    """Return the recipe's calibration data; None if it needs no calibration."""
    if "calibrate" not in artifacts:
        return None
    return TypeAdapter(CalibrationData).validate_python(
        {"dataset": resolved["calibration"], **artifacts["calibrate"].metadata}
    )


def collect_distillation(artifacts: Artifacts) -> DistillationData | None:
    """Return how the recipe was distilled; None if it was not."""
    if "distill" not in artifacts:
        return None
    return TypeAdapter(DistillationData).validate_python(artifacts["distill"].metadata)


def add_up(parts: list[Artifact]) -> StageCost:
    """Return the cost of a stage whose parts ran at the same time: longest time, highest memory, total size."""
    return StageCost(
        seconds=max(part.measured["seconds"] for part in parts),
        peak_rss_bytes=max(part.measured["peak_rss_bytes"] for part in parts),
        bytes=sum(part.size for part in parts),
    )


def lm_eval_command(score: BenchmarkScore) -> str:
    """Return the command of lm-evaluation-harness that reproduces a score."""
    limit = f"--limit {score.limit} " if score.limit else ""
    num_fewshot = f"--num_fewshot {score.num_fewshot} " if score.num_fewshot else ""
    chat = "--apply_chat_template " if score.chat_template else ""
    model = "--model hf --model_args pretrained=PATH_OR_NAME,dtype=bfloat16"
    return f"lm_eval {model} --tasks {score.task} {num_fewshot}{chat}{limit}--device {score.device}"


def collect_base(artifacts: Artifacts, benchmarks: Iterable[str]) -> Base:
    """Return the base model's column."""
    return Base(
        bytes=artifacts["download"].metadata["weight_bytes"], scores=collect_scores(artifacts, benchmarks, "base")
    )


def collect_quantized(
    artifacts: Artifacts, benchmarks: Iterable[str], fidelity: JsonObject, resolved: dict[str, Any]
) -> Quantized:
    """Return the quantized checkpoint's column; `fidelity` is the output of the stage of that name."""
    reference = None
    if "reference" in fidelity:
        reference = {**resolved["reference"], "fidelity": fidelity["reference"]}
    quantized = artifacts["quantize"]
    return TypeAdapter(Quantized).validate_python(
        {
            "bytes": quantized.files["model.safetensors"].size,
            "fidelity": fidelity["quantized"],
            "reference": reference,
            **{name: quantized.metadata[name] for name in ("weight_error", "lossless", "packed_bytes")},
            "output_error": quantized.metadata.get("output_error"),
            "smoke": artifacts["smoke"].metadata,
            "scores": collect_scores(artifacts, benchmarks, "quantized"),
        }
    )


def collect_program(artifacts: Artifacts, benchmarks: Iterable[str], fidelity: JsonObject) -> Program:
    """Return the program's column; `fidelity` is the output of the stage of that name."""
    program, verified, tokenizer = (artifacts[name] for name in ("export", "verify", "verify_tokenizer"))
    return TypeAdapter(Program).validate_python(
        {
            "bytes": program.files["model.pte"].size,
            "fidelity": fidelity,
            **{name: program.metadata[name] for name in EXPORT_FIELDS},
            "image": None,
            **verified.metadata,
            "runner": [*tokenizer.metadata["runner"], *verified.metadata["runner"]],
            **verified.measured["speed"],
            "scores": {name: collect_sample(artifacts, name) for name in benchmarks},
        }
    )


def find_chance(chance: float | None, artifacts: Artifacts, benchmark: str) -> float | None:
    """Return the accuracy of random guessing: the benchmark's, or that of choosing among each document's choices.

    It is None if it is not known, and if guesses never score.
    """
    evaluation = artifacts.get(f"evaluate_{benchmark}_base")
    if chance is not None or evaluation is None:
        return chance
    rows = read_samples(evaluation.path)
    counts = [len(row.get("choices", ())) for row in rows]
    if min(counts) < 2 or any(row["score"] not in (0, 1) for row in rows):
        return None
    return sum(1 / count for count in counts) / len(counts)


def collect_scores(artifacts: Artifacts, benchmarks: Iterable[str], column: str) -> dict[str, BenchmarkScore | None]:
    """Return the scores of a column by benchmark; None for those that were not measured."""
    return {name: _score(artifacts.get(f"evaluate_{name}_{column}")) for name in benchmarks}


def collect_sample(artifacts: Artifacts, benchmark: str) -> SampleScore | None:
    """Return the program's and the checkpoint's scores on a benchmark's sample; None if they were not measured."""
    names = {column: f"evaluate_{benchmark}_{column}" for column in ("program", "quantized", "no_act_quant")}
    score = _score(artifacts.get(names["program"]))
    if score is None:
        return None
    rows = {column: read_samples(artifacts[name].path) for column, name in names.items() if name in artifacts}
    return TypeAdapter(SampleScore).validate_python(
        {
            **asdict(score),
            **(mean_score(rows["program"]) or {}),
            **compare_answers(rows["program"], rows["quantized"], rows.get("no_act_quant")),
        }
    )


def check_devices(base: Base, quantized: Base) -> None:
    """Raise StageFailed if base and quantized were measured on different devices, which round differently."""
    for name, before in base.scores.items():
        after = quantized.scores[name]
        # A flow run resolves the device once for both.
        if before is not None and after is not None and before.device != after.device:
            raise StageFailed(
                f"{name} was measured on {before.device} for the base model and on {after.device} for the checkpoint: "
                "use one device"
            )


def collect_pairs(artifacts: Artifacts, benchmarks: Iterable[str]) -> dict[str, Pairs]:
    """Return, by benchmark, how many documents both, only the base model, only the checkpoint, or neither got right.

    Benchmarks whose answers are not simply correct or incorrect are missing.
    """
    pairs = {}
    for benchmark in benchmarks:
        stages = [f"evaluate_{benchmark}_{column}" for column in ("base", "quantized")]
        if all(stage in artifacts for stage in stages):
            before, after = (read_outcomes(artifacts[stage].path) for stage in stages)
            if before is not None and after is not None:
                pairs[benchmark] = pair_outcomes(before, after)
    return pairs


def read_samples(evaluation: Path) -> list[dict[str, Any]]:
    """Return the rows of an evaluation's samples.jsonl."""
    return [json.loads(line) for line in (evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def read_outcomes(evaluation: Path) -> dict[str, bool] | None:
    """Return {document: whether the answer is correct} of an evaluation; None if its scores are not 0 or 1."""
    scores = {f"{row['task']} {row['doc_id']}": row["score"] for row in read_samples(evaluation)}
    if any(score not in (0, 1) for score in scores.values()):
        return None
    return {document: score == 1 for document, score in scores.items()}


def pair_outcomes(before: dict[str, bool], after: dict[str, bool]) -> Pairs:
    """Return the counts of documents that base (first) and checkpoint (second) answer correctly."""
    assert before.keys() == after.keys(), "base and checkpoint have different questions"
    return count_pairs((before[question], after[question]) for question in before)


def _score(artifact: Artifact | None) -> BenchmarkScore | None:
    """Return the score in an evaluation's results.json; None if it was not measured."""
    if artifact is None:
        return None
    return TypeAdapter(BenchmarkScore).validate_json((artifact.path / "results.json").read_bytes())
