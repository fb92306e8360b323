"""The program answers lm-eval like the checkpoint that it was exported from; another checkpoint's program does not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN_BENCHMARKS
from quantize_gemma.tasks.gate.metrics import read_samples
from quantize_gemma.tasks.gate.program_sample import compare_answers
from quantize_gemma.tasks.models.requests import Request
from tests.conftest import CommandLine, Outcome
from tests.evaluation import evaluate, run_stage
from tests.flows.test_run import artifact, metrics_of, swap_rows_of_release

# lm-eval passes transformers the configuration that it has just read from the same checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def release(released: Outcome) -> Path:
    return Path(released.summary["release"])


@pytest.fixture(scope="module")
def model(release: Path) -> Any:
    from quantize_gemma.tasks.evaluate.program_lm import ProgramLM

    return ProgramLM(release, release)


def requests(lengths: list[int], continuations: list[int]) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 2048, (count,), generator=generator).tolist()

    contexts = [tokens(length) for length in lengths]
    return [(None, context, tokens(n)) for context in contexts for n in continuations]


def alone(release: Path, batch: list[Any]) -> list[Any]:
    """Answer each request with a newly loaded program."""
    import torch

    from quantize_gemma.tasks.models.pte import PteProgram

    answers = []
    for _, context, continuation in batch:
        program = PteProgram(release / "model.pte")
        ids = torch.tensor([context + continuation])
        positions = set(range(len(context) - 1, ids.shape[1] - 1))
        logs = torch.log_softmax(program.decode(program.embed_tokens(ids[:, :-1]), positions), -1)
        scores = [float(logs[place, token]) for place, token in enumerate(continuation)]
        answers.append((sum(scores), bool((logs.argmax(-1) == torch.tensor(continuation)).all())))
    return answers


def test_a_request_does_not_affect_the_next_ones(model: Any, release: Path) -> None:
    """Long and short requests alternate, on both sides of the sliding window (64)."""
    batch = requests([300, 5, 130, 63, 64, 1, 200, 127, 31], [1, 3])
    answers = model._loglikelihood_tokens(batch)
    for (score, greedy), (expected, as_greedy) in zip(answers, alone(release, batch), strict=True):
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == as_greedy
    assert model._loglikelihood_tokens(batch) == answers
    assert model._loglikelihood_tokens(batch[::-1]) == answers[::-1]


def test_choices_of_the_same_question_share_one_prefill(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = requests([40, 50], [1, 1, 1, 1])
    lengths: list[int] = []
    decode = model.program.decode

    def counted(inputs: Any, positions: set[int]) -> Any:
        lengths.append(inputs.shape[1])
        return decode(inputs, positions)

    monkeypatch.setattr(model.program, "decode", counted)
    answers = model._loglikelihood_tokens(batch)
    assert lengths == [40, 50]
    assert answers == [model._loglikelihood_tokens([one])[0] for one in batch]


def test_a_request_that_is_too_long_is_truncated_on_the_left_as_in_lm_eval(model: Any) -> None:
    (long,) = requests([1100], [2])
    assert model.program.max_seq_len == 1024
    cut = (None, long[1][-1023:], long[2])
    assert model._loglikelihood_tokens([long]) == model._loglikelihood_tokens([cut])


def test_text_becomes_the_same_tokens_as_for_the_checkpoint(model: Any, release: Path) -> None:
    from quantize_gemma.tasks.evaluate.packed_lm import PackedLM

    packed = PackedLM(release, "cpu", "auto")
    pairs = [("The answer is", " A"), ("A space goes to the answer: ", "A"), ("<bos>There already", " yes")]
    for pair in pairs:
        assert model._encode_pair(*pair) == packed._encode_pair(*pair)
        assert model._encode_pair(*pair)[0][0] == model.tokenizer.bos_token_id
    assert model.prefix_token_id == packed.prefix_token_id
    assert model.eot_token_id == packed.eot_token_id


def test_the_reference_is_the_checkpoint_in_float32_with_activations_that_are_not_quantized(release: Path) -> None:
    import torch

    from quantize_gemma.tasks.evaluate.packed_lm import PackedLM
    from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, load_model

    batch = requests([40, 90], [1, 2])
    eager = load_model(release, torch.float32)
    disable_activation_quantization(eager)
    answers = PackedLM(release, "cpu", "auto", no_act_quant=True)._loglikelihood_tokens(batch)
    for (_, context, continuation), (score, _) in zip(batch, answers, strict=True):
        with torch.no_grad():
            logs = torch.log_softmax(eager(torch.tensor([context + continuation])).logits[0], -1)
        scores = [float(logs[len(context) - 1 + place, token]) for place, token in enumerate(continuation)]
        assert score == pytest.approx(sum(scores), abs=1e-4)


def test_a_scorer_returns_what_the_model_returns(release: Path, model: Any) -> None:
    from quantize_gemma.tasks.evaluate.program_lm import load_program_scorer

    answer = load_program_scorer(str(release), str(release))
    pairs = [["The answer is", " A"], ["The answer is", " B"], ["", "A river"], ["a " * 2000, " B"]]
    values = answer([Request("task", 0, place, "loglikelihood", pair) for place, pair in enumerate(pairs)])
    tokens = [(None, *model._encode_pair("The answer is", f" {letter}")) for letter in "AB"]
    assert json.loads(json.dumps(values)) == values
    assert values[:2] == [list(one) for one in model._loglikelihood_tokens(tokens)]
    assert values[2][0] < 0
    # This request is longer than the program's sequences.
    assert values[3] is None


def test_the_released_program_agrees_with_its_checkpoint_on_every_question_of_the_sample(
    released: Outcome, command_line: CommandLine
) -> None:
    measured = metrics_of(released)["program"]["mmlu"]
    assert measured["samples"] == 100
    assert measured["left_out"] == 0
    assert measured["agreement"] == measured["agreement_act_quant"] == 1.0
    assert measured["value"] == measured["checkpoint"]["value"] == measured["no_act_quant"]["value"] == 1.0
    assert measured["disagreements"] == []
    rows = {
        column: {
            (row["task"], row["doc_id"]): row["responses"]
            for row in read_samples(artifact(command_line, released, f"evaluate_mmlu_{column}") / "data")
        }
        for column in ("quantized", "program", "no_act_quant")
    }
    assert rows["program"].keys() == rows["no_act_quant"].keys()
    assert len(rows["program"]) == 100
    for document, responses in rows["program"].items():
        checkpoint = rows["quantized"][document]
        # Float32 instead of bfloat16, and different kernels: close, but not equal.
        assert responses == pytest.approx(checkpoint, abs=2.0)
        assert responses != checkpoint
        assert rows["no_act_quant"][document] != checkpoint


@pytest.mark.long
def test_a_program_of_a_damaged_checkpoint_disagrees_and_the_gate_lists_the_questions(
    released: Outcome, command_line: CommandLine, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize_gemma.tasks.gate.checks import GateFailed, judge, require_pass
    from quantize_gemma.tasks.models.metrics import parse_metrics

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    damaged = swap_rows_of_release(release, tmp_path / "damaged", "language_model.model.layers.1.mlp.up_proj")
    shape = {"max_seq_len": 128, "last_logits_only": True}
    run_stage("quantize_gemma.tasks.export:export", tmp_path / "program", {"checkpoint": damaged}, **shape)
    shutil.copytree(artifact(command_line, released, "record_mmlu") / "data", tmp_path / "requests")
    evaluate(
        tmp_path, release, BUILTIN_BENCHMARKS["mmlu-mini"], "mmlu", None, program=tmp_path / "program", sample_size=40
    )
    rows = {
        column: read_samples(artifact(command_line, released, f"evaluate_mmlu_{column}") / "data")
        for column in ("quantized", "no_act_quant")
    }
    program = read_samples(tmp_path / "results")
    assert len(program) == 40
    baseline = [{**row, "prediction": int(row["target"]), "score": 1.0} for row in rows["quantized"]]
    compared = compare_answers(program, rows["quantized"], baseline)
    assert compared["checkpoint"]["value"] == compared["agreement_act_quant"] == 1.0
    assert compared["agreement"] <= 0.7
    assert len(compared["disagreements"]) == round(40 * (1 - compared["agreement"]))
    shown = compared["disagreements"][0]
    assert shown["program"]["answer"] != shown["checkpoint"]["answer"] == shown["target"]
    assert shown["program"]["margin"] > 0
    metrics = metrics_of(released)
    metrics["program"]["mmlu"] |= compared
    parsed = parse_metrics(metrics)
    verdict = judge(parsed.benchmarks, parsed, parsed.pairs, parsed.gate.limits)
    with pytest.raises(GateFailed, match="the program") as raised:
        require_pass(replace(parsed, gate=verdict), [])
    failed = [check.name for check in raised.value.verdict.checks if check.status == "fail"]
    assert failed == ["mmlu_disagreement"]
    assert " ".join(shown["prompt"].split())[-200:] in str(raised.value)
