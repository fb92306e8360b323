"""MMLU by the `lm_eval` command line and by ours, in turn: `python -m benchmarks.evaluate --model DIR --limit 1`.

Both get the same directory, in fresh processes. They are equal if no prediction and no score differs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import compared as result_of
from benchmarks.side_by_side import line, machine, run, show, version
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS


def command_line(
    target: str, checkpoint: str, questions: str, limit: int | None, batch_size: str, device: str
) -> dict[str, Any]:
    """Runs lm-eval's command line; leaves its files in `target`."""
    import os
    import sys

    os.makedirs(f"{target}/here/cais")
    os.symlink(Path(questions).resolve(), f"{target}/here/cais/mmlu")
    os.environ["HF_DATASETS_CACHE"] = f"{target}/cache"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.chdir(f"{target}/here")
    sys.argv = ["lm_eval", "run", "--model", "hf", "--tasks", "mmlu", "--log_samples"]
    sys.argv += ["--model_args", f"pretrained={checkpoint},dtype=bfloat16", "--output_path", f"{target}/out"]
    sys.argv += ["--device", device, "--batch_size", batch_size, *(["--limit", str(limit)] if limit else [])]
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    return {"evaluation_seconds": _timed(HFLM, cli_evaluate)}


def our_evaluation(target: str, checkpoint: str, questions: str, limit: int | None, device: str) -> dict[str, Any]:
    """Evaluates as the flow does, in one process."""
    from quantize_gemma.tasks.evaluate import evaluate
    from quantize_gemma.tasks.evaluate.answer import answer
    from quantize_gemma.tasks.evaluate.packed_lm import PackedLM
    from quantize_gemma.tasks.evaluate.record import record
    from quantize_gemma.tasks.models.benchmarks import describe

    row, model, dataset, results = describe("mmlu"), Path(checkpoint), Path(questions), Path(target)
    requests, answers = results / "requests", results / "answers"
    for folder in (requests, answers):
        folder.mkdir()

    def run_stages() -> None:
        record(requests, model, dataset, row.request_inputs(), limit)
        answer(answers, requests, model, dataset, device, refresh=True)
        evaluate(results, requests, [answers], dataset, row.score_inputs(), limit, device)

    return {"evaluation_seconds": _timed(PackedLM, run_stages)}


def _timed(model: Any, evaluate: Any) -> float:
    """Returns the seconds that the model spent on questions: without loading it, and without lm-eval's start."""
    ask, spent = model._loglikelihood_tokens, []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = time.monotonic()
        answers = ask(*arguments, **keywords)
        spent.append(time.monotonic() - started)
        return answers

    model._loglikelihood_tokens = timed
    evaluate()
    return sum(spent)


def read_command_line(target: Path) -> tuple[dict[str, Any], dict[tuple[str, int], list[float]]]:
    """Returns what lm-eval's command line found: results by task, and log-likelihoods by subject and question."""
    found = {}
    for path in target.glob("out/**/samples_*.jsonl"):
        subject = path.name.removeprefix("samples_mmlu_").rsplit("_", 1)[0]
        for text in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(text)
            found[subject, sample["doc_id"]] = [float(response[0]) for response in sample["filtered_resps"]]
    (results,) = target.glob("out/**/results_*.json")
    return json.loads(results.read_text(encoding="utf-8"))["results"], found


def read_ours(target: Path) -> tuple[dict[str, Any], dict[tuple[str, int], list[float]]]:
    """Returns our results, by lm-eval's names of the tasks, and log-likelihoods by subject and question."""
    results = json.loads((target / "results.json").read_text(encoding="utf-8"))
    lines = (target / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = {(row["task"], row["doc_id"]): row["responses"] for row in map(json.loads, lines)}
    scores = {"mmlu": results}
    scores |= {f"mmlu_{name}": score for name, score in {**results["groups"], **results["tasks"]}.items()}
    return scores, samples


def compare(reference: Path, ours: Path) -> dict[str, Any]:
    """Returns how many questions and predictions differ, and the scores that do."""
    their_scores, theirs = read_command_line(reference)
    our_scores, found = read_ours(ours)
    assert theirs.keys() == found.keys(), f"{len(theirs)} questions here, {len(found)} there"
    best = {name: [max(range(4), key=scores.__getitem__) for scores in (theirs[name], found[name])] for name in theirs}
    wrong = []
    for task, score in their_scores.items():
        stderr = score["acc_stderr,none"]
        expected = score["acc,none"], stderr if isinstance(stderr, float) else None
        if expected != (our_scores[task]["value"], our_scores[task]["stderr"]):
            wrong.append(task)
    return {
        "questions": len(theirs),
        "different_predictions": sum(one != other for one, other in best.values()),
        "different_loglikelihoods": sum(theirs[name] != found[name] for name in theirs),
        "different_scores": sorted(wrong),
    }


def measure(
    checkpoint: Path, questions: Path, limit: int | None, batch_size: str, device: str, folder: Path
) -> dict[str, Any]:
    """Runs both. Returns the figures, and the lines that say them."""
    targets = {name: folder / name for name in ("reference", "ours")}
    for target in targets.values():
        target.mkdir()
    common = {"questions": str(questions), "limit": limit, "device": device}
    steps = {
        "lm_eval": run(
            "benchmarks.evaluate:command_line",
            checkpoint=checkpoint,
            target=targets["reference"],
            batch_size=batch_size,
            **common,
        ),
        "ours": run("benchmarks.evaluate:our_evaluation", checkpoint=checkpoint, target=targets["ours"], **common),
    }
    compared = compare(targets["reference"], targets["ours"])
    speeds = {name: compared["questions"] / step["evaluation_seconds"] for name, step in steps.items()}
    ratios = {
        "whole time": steps["lm_eval"]["seconds"] / steps["ours"]["seconds"],
        "questions per second": speeds["ours"] / speeds["lm_eval"],
        "memory": steps["lm_eval"]["peak_rss_bytes"] / steps["ours"]["peak_rss_bytes"],
    }
    equal = not compared["different_predictions"] and not compared["different_scores"]
    lines = [
        f"{checkpoint.name}, {compared['questions']} questions, {device}, {version()}, {machine()}",
        *(f"{line(name, step)} {speeds[name]:10.2f} questions/s" for name, step in steps.items()),
        *(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()),
        f"different: {compared['different_predictions']} predictions, {compared['different_loglikelihoods']} "
        f"questions' log-likelihoods, {len(compared['different_scores'])} scores",
    ]
    case = {"model": checkpoint.name, "limit": limit, "batch_size": batch_size, "device": device}
    return {
        **result_of("evaluate", case, steps["lm_eval"], steps["ours"], equal),
        "evaluation_seconds": {name: step["evaluation_seconds"] for name, step in steps.items()},
        "questions_per_second": {**speeds, "ratio": ratios["questions per second"]},
        **compared,
        "lines": lines,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILTIN["tiny-gemma3"], help="directory of a checkpoint")
    parser.add_argument("--questions", type=Path, default=BUILTIN_BENCHMARKS["mmlu-mini"], help="as cais/mmlu")
    parser.add_argument("--limit", type=int, help="questions per subject")
    parser.add_argument("--batch-size", default="1", help="the command line's, whose own default is 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show(
            measure(given.model.resolve(), given.questions, given.limit, given.batch_size, given.device, Path(folder)),
            given.json,
        )


if __name__ == "__main__":
    main()
