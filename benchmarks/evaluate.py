"""Evaluate a benchmark with the `lm_eval` command line and with ours: `python -m benchmarks.evaluate --task gsm8k …`.

Both read the same directories, one after the other, in fresh processes. If lm_eval runs with several batch sizes, the
fastest one counts. The results are equal if no prediction and no score differs. Text that is generated in batches may
differ in a few words because of padding; such results are equal if every score is within its standard error.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import format_line, machine, make_result, print_result, run, version
from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.models.benchmarks import BENCHMARKS, Benchmark, find_benchmark

# {(task, document): the choices' log-likelihoods, or the text}
Responses = dict[tuple[str, int], list[Any]]


def command_line(
    target: str, checkpoint: str, dataset: str, task: str, limit: int | None, batch_size: str, device: str
) -> dict[str, Any]:
    """Run lm-eval's command line, and leave its files in `target`."""
    import os
    import sys

    row = find_benchmark(task)
    link = Path(target) / "here" / row.dataset
    link.parent.mkdir(parents=True)
    link.symlink_to(Path(dataset).resolve())
    os.environ["HF_DATASETS_CACHE"] = f"{target}/cache"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["NLTK_DATA"] = str(Path(dataset).resolve() / ".nltk_data")
    # `datasets` reads a directory of that name instead of the repository.
    os.chdir(f"{target}/here")
    sys.argv = ["lm_eval", "run", "--model", "hf", "--tasks", row.task, "--log_samples"]
    sys.argv += ["--model_args", f"pretrained={checkpoint},dtype=bfloat16", "--output_path", f"{target}/out"]
    sys.argv += ["--device", device, "--batch_size", batch_size, *(["--limit", str(limit)] if limit else [])]
    sys.argv += [] if row.num_fewshot is None else ["--num_fewshot", str(row.num_fewshot)]
    sys.argv += ["--apply_chat_template"] if row.chat_template else []
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    return {"evaluation_seconds": _timed(HFLM, row.kind, cli_evaluate)}


def our_evaluation(
    target: str, checkpoint: str, dataset: str, task: str, limit: int | None, rows: int | None, device: str
) -> dict[str, Any]:
    """Evaluate as the flow does, in one process; `rows` is the maximum number of sequences in a batch."""
    from quantize_gemma.tasks.evaluate import evaluate
    from quantize_gemma.tasks.evaluate.answer import answer
    from quantize_gemma.tasks.evaluate.packed_lm import PackedLM
    from quantize_gemma.tasks.evaluate.record import record

    row, model, data, results = find_benchmark(task), Path(checkpoint), Path(dataset), Path(target)
    requests, answers = results / "requests", results / "answers"
    for folder in (requests, answers):
        folder.mkdir()

    def run_stages() -> None:
        record(requests, model, data, row.request_inputs(), limit)
        answer(answers, requests, model, data, device, batch_size=rows or "auto", exact=rows == 1, refresh=True)
        evaluate(results, requests, [answers], data, row.score_inputs(), limit, device)

    return {"evaluation_seconds": _timed(PackedLM, row.kind, run_stages)}


def _timed(model: Any, kind: str, evaluate: Any) -> float:
    """Return the seconds that the model spent on requests, without loading the model and starting lm-eval."""
    name = "generate_until" if kind == "generate_until" else "_loglikelihood_tokens"
    method, seconds = getattr(model, name), []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.monotonic()
        answers = method(*arguments, **keywords)
        seconds.append(time.monotonic() - start)
        return answers

    setattr(model, name, timed)
    evaluate()
    return sum(seconds)


def read_command_line(target: Path, row: Benchmark) -> tuple[dict[str, Any], Responses]:
    """Return the output of lm-eval's command line: results by task, and the responses."""
    responses = {}
    for path in target.glob("out/**/samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0].removeprefix(f"{row.name}_")
        for text in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(text)
            values = [response[0] for response in sample["resps"]]
            answer = [float(value[0]) for value in values] if row.kind == "loglikelihood" else values
            responses[task, sample["doc_id"]] = answer
    (results,) = target.glob("out/**/results_*.json")
    return json.loads(results.read_text(encoding="utf-8"))["results"], responses


def read_ours(target: Path, row: Benchmark) -> tuple[dict[str, Any], Responses]:
    """Return our results, by lm-eval's task names, and the responses."""
    results = json.loads((target / "results.json").read_text(encoding="utf-8"))
    lines = (target / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = {(sample["task"], sample["doc_id"]): sample["responses"] for sample in map(json.loads, lines)}
    scores = {row.task: results}
    scores |= {f"{row.name}_{name}": score for name, score in {**results["groups"], **results["tasks"]}.items()}
    return scores, samples


def compare(reference: Path, ours: Path, task: str = "mmlu") -> dict[str, Any]:
    """Return how many documents' responses and predictions differ, and the scores that do.

    A score differs if its value or standard error does; `scores_out_of_error` differ by more than a standard error.
    """
    row = find_benchmark(task)
    their_scores, expected_responses = read_command_line(reference, row)
    our_scores, responses = read_ours(ours, row)
    assert expected_responses.keys() == responses.keys(), (
        f"lm_eval: {len(expected_responses)} documents, ours: {len(responses)}"
    )
    different = [name for name in expected_responses if expected_responses[name] != responses[name]]
    metric, _, filter_name = (row.metric if "," in row.metric else f"{row.metric},none").partition(",")
    different_scores, out_of_error = [], []
    for name, score in their_scores.items():
        stderr = score.get(f"{metric}_stderr,{filter_name}")
        expected = score[f"{metric},{filter_name}"], stderr if isinstance(stderr, float) else None
        value = our_scores[name]["value"]
        if expected != (value, our_scores[name]["stderr"]):
            different_scores.append(name)
        if abs(expected[0] - value) > (expected[1] or 0):
            out_of_error.append(name)
    return {
        "questions": len(expected_responses),
        "different_predictions": sum(
            _prediction(expected_responses[name]) != _prediction(responses[name]) for name in expected_responses
        ),
        "different_responses": len(different),
        "different_scores": sorted(different_scores),
        "scores_out_of_error": sorted(out_of_error),
    }


def _prediction(responses: list[Any]) -> Any:
    """Return the number of the best choice, or the text."""
    numbers = all(isinstance(value, float) for value in responses)
    return max(range(len(responses)), key=responses.__getitem__) if numbers else responses


def measure(
    checkpoint: Path,
    dataset: Path,
    task: str,
    limit: int | None,
    batch_sizes: list[str],
    rows: int | None,
    device: str,
    folder: Path,
) -> dict[str, Any]:
    """Run both. Return the results, and the lines to print."""
    row = find_benchmark(task)
    common = {"dataset": str(dataset), "task": task, "limit": limit, "device": device}
    references = {}
    for batch_size in batch_sizes:
        target = folder / f"reference-{batch_size}"
        target.mkdir()
        references[batch_size] = run(
            "benchmarks.evaluate:command_line", checkpoint=checkpoint, target=target, batch_size=batch_size, **common
        )
    best = min(references, key=lambda batch_size: references[batch_size]["evaluation_seconds"])
    target = folder / "ours"
    target.mkdir()
    steps = {
        "lm_eval": references[best],
        "ours": run("benchmarks.evaluate:our_evaluation", checkpoint=checkpoint, target=target, rows=rows, **common),
    }
    comparison = compare(folder / f"reference-{best}", target, task)
    speeds = {name: comparison["questions"] / step["evaluation_seconds"] for name, step in steps.items()}
    ratios = {
        "total time": steps["lm_eval"]["seconds"] / steps["ours"]["seconds"],
        "questions per second": speeds["ours"] / speeds["lm_eval"],
        "memory": steps["lm_eval"]["peak_rss_bytes"] / steps["ours"]["peak_rss_bytes"],
    }
    generated_together = row.kind == "generate_until" and (best, rows) != ("1", 1)
    different = comparison["scores_out_of_error"] if generated_together else comparison["different_scores"]
    equal = not different and (generated_together or not comparison["different_predictions"])
    lines = [
        f"{task}, {checkpoint.name}, {comparison['questions']} questions, {device}, {version()}, {machine()}",
        *(f"{format_line(name, step)} {speeds[name]:10.2f} questions/s" for name, step in steps.items()),
        f"lm_eval's batch size: {best}, the fastest of {', '.join(batch_sizes)}",
        *(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()),
        f"same predictions: {1 - comparison['different_predictions'] / comparison['questions']:.1%}",
        f"different: {comparison['different_predictions']} predictions, responses to "
        f"{comparison['different_responses']} questions, {len(comparison['different_scores'])} scores, "
        f"{len(comparison['scores_out_of_error'])} of them by more than the standard error",
    ]
    case = {"model": checkpoint.name, "task": task, "limit": limit, "batch_size": best, "rows": rows, "device": device}
    return {
        **make_result("evaluate", case, steps["lm_eval"], steps["ours"], equal),
        "evaluation_seconds": {name: step["evaluation_seconds"] for name, step in steps.items()},
        "questions_per_second": {**speeds, "ratio": ratios["questions per second"]},
        **comparison,
        "lines": lines,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILTIN["tiny-gemma3"], help="directory of a checkpoint")
    parser.add_argument("--task", default="mmlu", help=f"{', '.join(BENCHMARKS)}, or another lm-eval task")
    parser.add_argument("--dataset", type=Path, default=BUILTIN_BENCHMARKS["mmlu-mini"], help="the task's dataset")
    parser.add_argument("--limit", type=int, help="maximum number of questions per task; each MMLU subject is a task")
    parser.add_argument("--batch-size", default="1", help="lm_eval's batch size, or several, separated by commas")
    parser.add_argument("--rows", type=int, help="our maximum number of sequences in a batch [default: as in a run]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = options.batch_size.split(",")
    with tempfile.TemporaryDirectory() as folder:
        paths = options.model.resolve(), options.dataset.resolve()
        result = measure(*paths, options.task, options.limit, sizes, options.rows, options.device, Path(folder))
        print_result(result, options.json)


if __name__ == "__main__":
    main()
