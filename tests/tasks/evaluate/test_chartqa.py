"""Our ChartQA evaluation gives the texts of lm-eval's own multimodal model, and the scores of the card's protocol."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_BENCHMARKS
from quantize_gemma.tasks.evaluate.chartqa import is_normalized_correct, is_relaxed_correct
from quantize_gemma.tasks.gate.metrics import read_samples
from quantize_gemma.tasks.models.benchmarks import find_benchmark
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.models.requests import Request
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie
from tests.conftest import Outcome
from tests.evaluation import PACKAGE, evaluate, record, run_stage
from tests.flows.test_run import metrics_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CHARTS = BUILTIN_BENCHMARKS["chartqa-mini"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    untied, quantized = tmp_path_factory.mktemp("untied"), tmp_path_factory.mktemp("quantized")
    untie(untied, BUILTIN["tiny-gemma3"])
    quantize(quantized, untied, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")
    return {"base": BUILTIN["tiny-gemma3"], "quantized": quantized}


def in_its_process(function: str, monkeypatch: pytest.MonkeyPatch, /, **arguments: Any) -> dict[str, Any]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return worker.run(function, arguments, lambda *_: None, None)


def evaluated(checkpoint: Path, target: Path, limit: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate as the flow does, on the built-in ChartQA; return results and samples."""
    evaluate(target, checkpoint, CHARTS, "chartqa", limit)
    results = json.loads((target / "results" / "results.json").read_text())
    return results, read_samples(target / "results")


def evaluate_with_lm_eval(checkpoint: str, dataset: str, limit: int) -> dict[str, Any]:
    """Run lm-eval's own multimodal model, with its own prompts, batches, and `generate`, on our task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.hf_vlms import HFMultimodalLM

    from quantize_gemma.tasks.evaluate.chartqa import SYSTEM_PROMPT, make_chartqa_task

    class Library(HFMultimodalLM):
        def apply_chat_template(self, *arguments: Any, **keywords: Any) -> str:
            # The tokenizer would add a second BOS token; lmms-eval's model gets one.
            return super().apply_chat_template(*arguments, **keywords).removeprefix("<bos>")

    model = Library(checkpoint, device="cpu", dtype="bfloat16", batch_size=1)
    output = simple_evaluate(
        model,
        tasks=[make_chartqa_task(Path(dataset), limit)],
        apply_chat_template=True,
        system_instruction=SYSTEM_PROMPT,
        log_samples=True,
    )
    assert output is not None
    samples = {sample["doc"]["number"]: sample for sample in output["samples"]["chartqa"]}
    return {
        "prompt": samples[0]["arguments"][0][0],
        "answers": [samples[number]["filtered_resps"][0] for number in sorted(samples)],
        "results": {name: value for name, value in output["results"]["chartqa"].items() if "," in name},
    }


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param("base", marks=pytest.mark.longest), "quantized"])
def test_answers_and_scores_match_those_of_lm_evals_own_model(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"{evaluate_with_lm_eval.__module__}:{evaluate_with_lm_eval.__name__}"
    paths = {"checkpoint": str(checkpoints[name]), "dataset": str(CHARTS)}
    theirs = in_its_process(reference, monkeypatch, **paths, limit=12)
    results, samples = evaluated(checkpoints[name], tmp_path / "ours", 12)
    assert [sample["prediction"] for sample in samples] == theirs["answers"]
    for metric, score in {"relaxed_overall": results, **results["metrics"]}.items():
        assert score["value"] == theirs["results"][f"{metric},none"]
        assert score["stderr"] == theirs["results"][f"{metric}_stderr,none"]
    assert theirs["prompt"] == (
        "<start_of_turn>user\nYou are a helpful assistant.\n\n<start_of_image>What is the colour of the highest bar?\n"
        "Answer the question with a single word.<end_of_turn>\n<start_of_turn>model\n"
    )
    # The score is neither 0 nor 100, so it can rise and fall.
    assert 0.5 < results["value"] < 1


def test_results_are_computed_from_the_samples_with_standard_errors(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    results, samples = evaluated(checkpoints["base"], tmp_path, 6)
    assert [results[name] for name in ("task", "metric", "samples", "device", "limit")] == [
        "chartqa",
        "relaxed_overall",
        12,
        "cpu",
        6,
    ]
    assert {name: score["samples"] for name, score in results["metrics"].items()} == {
        "relaxed_human": 6,
        "relaxed_augmented": 6,
        "normalized_overall": 12,
    }
    scores = [sample["score"] for sample in samples]
    assert scores == [float(is_relaxed_correct(sample["prediction"], sample["target"])) for sample in samples]
    share = sum(scores) / 12
    assert results["value"] == pytest.approx(share)
    assert results["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))


def test_questions_of_one_kind_have_no_score_of_the_other_and_one_alone_no_standard_error(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = pyarrow.parquet.read_table(CHARTS / "data" / "test-00000-of-00001.parquet")
    dataset = tmp_path / "dataset"
    (dataset / "data").mkdir(parents=True)
    for number, part in enumerate((rows.slice(0, 3), rows.slice(3, 2))):
        pyarrow.parquet.write_table(part, dataset / "data" / f"test-0000{number}-of-00002.parquet")
    labels = [label[0] for label in rows["label"].to_pylist()]
    # "red." and "blue." are wrong, "No" and "Wed" are correct, and "4." is the number 4.
    answers = [labels[number] if number % 2 else f"{labels[number]}." for number in range(5)]

    results, samples = score(checkpoints["base"], dataset, None, answers, tmp_path / "all")
    correct = {"value": 0.6, "stderr": pytest.approx(math.sqrt(0.6 * 0.4 / 4)), "samples": 5}
    assert {name: results[name] for name in correct} == correct
    assert results["metrics"] == {
        "relaxed_human": correct,
        "normalized_overall": {"value": 1.0, "stderr": 0.0, "samples": 5},
    }
    assert [sample["prediction"] for sample in samples] == answers
    results, _ = score(checkpoints["base"], dataset, 1, answers[:1], tmp_path / "one")
    assert (results["value"], results["stderr"], results["samples"]) == (0.0, None, 1)


def score(
    checkpoint: Path, dataset: Path, limit: int | None, texts: list[str], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the results and samples for these answers."""
    requests = record(folder / "requests", checkpoint, dataset, "chartqa", limit)
    (folder / "answers").mkdir()
    (folder / "answers" / "chartqa.json").write_text(json.dumps({"answers": texts, "left_out": []}))
    paths = {"requests": requests, "answers": [folder / "answers"], "dataset": dataset}
    inputs = {"benchmark": find_benchmark("chartqa").score_inputs(), "limit": limit, "device": "cpu"}
    run_stage(f"{PACKAGE}:evaluate", folder / "results", paths, **inputs)
    return json.loads((folder / "results" / "results.json").read_text()), read_samples(folder / "results")


def test_the_results_of_a_base_model_have_no_chat_template(
    tiny_copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    checkpoint = tiny_copy()
    (checkpoint / "chat_template.jinja").unlink()
    results, _ = score(checkpoint, CHARTS, 1, ["4", "4"], tmp_path)
    assert results["chat_template"] is False


def generate_alone_and_in_a_row(checkpoint: str, dataset: str, numbers: list[int]) -> dict[str, Any]:
    """Answer the questions in reverse, one by one, then all in order, and count how often an image is encoded."""
    from transformers import SiglipVisionModel

    from quantize_gemma.tasks.evaluate.chartqa import load_chartqa_scorer

    answer = load_chartqa_scorer(checkpoint, dataset, "cpu")
    requests = [Request("chartqa", number, 0, "generate_until", ["", {}, {"row": number}]) for number in numbers]
    alone = [answer([request])[0] for request in reversed(requests)][::-1]
    encodings = []
    forward = SiglipVisionModel.forward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        encodings.append(1)
        return forward(*arguments, **keywords)

    SiglipVisionModel.forward = counted
    return {"alone": alone, "in a row": answer(requests), "encodings": len(encodings)}


def test_a_response_depends_on_no_other_request_and_an_image_is_encoded_once(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Alone, 5 is the last question; 0, 1, and 44 are about one image, and 3 is about another.
    paths = {"checkpoint": str(checkpoints["quantized"]), "dataset": str(CHARTS), "numbers": [5, 0, 1, 44, 3]}
    output = in_its_process(f"{__name__}:generate_alone_and_in_a_row", monkeypatch, **paths)
    assert output["alone"] == output["in a row"]
    assert len(set(output["alone"])) > 1
    assert output["encodings"] == 2


def test_a_base_model_without_chat_template_gets_image_and_question(
    tiny_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_copy()
    (checkpoint / "chat_template.jinja").unlink()
    prompt = in_its_process(f"{__name__}:prompt_of", monkeypatch, checkpoint=str(checkpoint))["prompt"]
    assert prompt == "<start_of_image>How many?\nAnswer the question with a single word."


def prompt_of(checkpoint: str) -> dict[str, Any]:
    from quantize_gemma.tasks.evaluate.chartqa import make_messages, make_prompt
    from quantize_gemma.tasks.evaluate.chartqa_model import ChartQALM

    return {"prompt": make_prompt(ChartQALM(Path(checkpoint), "cpu").processor, make_messages("How many?"))}


def test_a_text_only_checkpoint_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((BUILTIN["tiny-gemma3"] / "config.json").read_text())["text_config"]
    config["architectures"] = ["Gemma3ForCausalLM"]
    checkpoint = tmp_path / "text-only"
    shutil.copytree(BUILTIN["tiny-gemma3"], checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(UserError, match="is text-only and cannot be evaluated on ChartQA"):
        evaluated(checkpoint, tmp_path / "target", 1)


@pytest.mark.parametrize(
    ("answer", "label", "official", "normalized"),
    [
        ("red", "red", True, True),
        ("Red", "red", True, True),
        ("green", "red", False, False),
        ("", "red", False, False),
        # Within 5% of the label, inclusive, in both directions.
        ("42", "40", True, True),
        ("38", "40", True, True),
        ("42.1", "40", False, False),
        ("37.9", "40", False, False),
        ("-40", "40", False, False),
        ("-41", "-40", True, True),
        (" 40 ", "40", True, True),
        ("4e1", "40", True, True),
        # A number that ends in % is a fraction.
        ("25%", "25%", True, True),
        ("0.25", "25%", True, True),
        ("25%", "0.25", True, True),
        ("25", "25%", False, True),
        ("25%", "25", False, True),
        ("25 %", "25%", True, True),
        ("0.25%", "25%", False, False),
        ("%", "25%", False, False),
        # A label that is 0 is text.
        ("0", "0", True, True),
        ("0.0", "0", False, True),
        ("0.01", "0", False, False),
        ("0%", "0", False, True),
        ("nan", "nan", False, True),
        # Only the form differs.
        ("Yes.", "Yes", False, True),
        ("**Yes**", "yes", False, True),
        ('"Tea"', "Tea", False, True),
        ("Yes, it is", "Yes", False, False),
        ("red\n", "red", False, True),
        ("40.", "40", True, True),
        ("two", "2", False, True),
        ("Twelve.", "12", False, True),
        ("2", "two", False, True),
        ("two", "3", False, False),
        ("1,000", "1000", False, True),
        ("1,234,567.5", "1234567.5", False, True),
        ("1,00", "100", False, False),
        ("$4.5", "4.5", False, True),
        ("-$4.5", "-4.5", False, True),
        ("€ 1,000.", "1000", False, True),
        (".5", "0.5", True, True),
        ("(62%)", "62%", False, True),
        ("−3", "-3", False, True),
        ("Q1 - Q2", "Q1 - Q2", True, True),
        ("9", "$9", False, True),
        ("", "?", False, False),
    ],
)
def test_a_score_matches_the_expected_one(answer: str, label: str, official: bool, normalized: bool) -> None:
    assert is_relaxed_correct(answer, label) is official
    assert is_normalized_correct(answer, label) is normalized


def answer_all(checkpoint: str, program: str) -> dict[str, Any]:
    """Return the program's answers to all questions, in this process."""
    from quantize_gemma.tasks.evaluate.chartqa import load_chartqa_program_scorer
    from quantize_gemma.tasks.models.datasets import read_chartqa

    count = len(read_chartqa(CHARTS))
    requests = [Request("chartqa", row, 0, "generate_until", ["", {}, {"row": row}]) for row in range(count)]
    return {"answers": load_chartqa_program_scorer(checkpoint, program, str(CHARTS))(requests)}


@pytest.mark.long
def test_a_program_answers_like_its_checkpoint_but_not_with_causal_attention_over_images(
    released: Outcome, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = metrics_of(released)["program"]["chartqa"]
    assert measured["agreement"] > 0.95
    assert measured["value"] > 0.7
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    _, samples = evaluated(checkpoints["quantized"], tmp_path / "checkpoint", None)
    program = tmp_path / "causal"
    program.mkdir()
    inputs = {"checkpoint": checkpoints["quantized"]}
    run_stage("quantize_gemma.tasks.export:export", program, inputs, max_seq_len=256, bidirectional_images=False)
    function = f"{answer_all.__module__}:{answer_all.__name__}"
    paths = {"checkpoint": str(checkpoints["quantized"]), "program": str(program)}
    pairs = list(zip(in_its_process(function, monkeypatch, **paths)["answers"], samples, strict=True))
    assert sum(is_relaxed_correct(one, row["target"]) for one, row in pairs) < 0.5 * len(pairs)
    assert sum(one == row["prediction"] for one, row in pairs) < 0.6 * len(pairs)


@pytest.mark.long
@pytest.mark.longest
def test_an_answer_that_the_programs_sequences_cut_off_does_not_count(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    function = f"{answer_all.__module__}:{answer_all.__name__}"
    answers = {}
    # The prompts have 53 to 65 tokens.
    for length in (64, 256):
        program = tmp_path / str(length)
        inputs = {"checkpoint": checkpoints["quantized"]}
        run_stage("quantize_gemma.tasks.export:export", program, inputs, max_seq_len=length)
        paths = {"checkpoint": str(checkpoints["quantized"]), "program": str(program)}
        answers[length] = in_its_process(function, monkeypatch, **paths)["answers"]
    assert None not in answers[256]
    complete = [(one, whole) for one, whole in zip(answers[64], answers[256], strict=True) if one is not None]
    assert 0 < len(complete) < len(answers[256])
    assert all(one == whole for one, whole in complete)
