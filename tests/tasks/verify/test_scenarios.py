"""If the C++ runner differs from the program, a check of the gate with its own name fails."""

import contextlib
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.gate.checks import judge
from quantize_gemma.tasks.models.chat import TEXT_PROMPT, format_user_turn
from quantize_gemma.tasks.models.metrics import RunnerCheck, parse_metrics
from quantize_gemma.tasks.models.runner_checks import RUNNER_CHECKS
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.verify import scenarios as stage
from quantize_gemma.tasks.verify.long_prompts import prompt_lengths
from quantize_gemma.tasks.verify.scenarios import (
    Answer,
    Expected,
    Scenario,
    compare_answers,
    load_runner_tokenizer,
    run_scenarios,
)
from quantize_gemma.tasks.verify.tokenizer import TEXTS, check_tokenizer
from tests.conftest import Outcome
from tests.flows.test_run import metrics_of
from tests.metrics import example_json
from tests.tasks.test_gate import LIMITS
from tests.tasks.verify.conftest import MAX_SEQ_LEN, WINDOW, export


def failed_checks(checks: list[RunnerCheck]) -> dict[str, str]:
    """Judge a release with these runner checks; return the messages of the failed checks."""
    metrics = example_json()
    metrics["program"]["runner"] = [asdict(check) for check in checks]
    parsed = parse_metrics(metrics)
    verdict = judge(parsed.benchmarks, parsed, parsed.pairs, LIMITS)
    return {check.name: check.message for check in verdict.checks if check.status == "fail"}


def run_checks(program: Path, checkpoint: Path) -> dict[str, RunnerCheck]:
    *_, checks = run_scenarios(program, checkpoint, prompt_lengths(WINDOW, MAX_SEQ_LEN))
    return {check.name: check for check in checks}


def with_end_tokens(checkpoint: Path, target: Path, ids: list[int]) -> Path:
    shutil.copytree(checkpoint, target)
    path = target / "generation_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "eos_token_id": ids}))
    return target


def test_the_released_program_passes_every_check_of_the_runner(released: Outcome) -> None:
    checks = {check["name"]: check for check in metrics_of(released)["program"]["runner"]}
    assert checks.keys() == RUNNER_CHECKS.keys()
    assert all(check["cases"] > 0 and not check["failed"] for check in checks.values())
    # The texts, and the prompts of MMLU, ChartQA, and GSM8K.
    assert checks["tokenizer"]["cases"] > len(json.loads(TEXTS.read_text())) + 200
    gate = {check["name"]: check["status"] for check in metrics_of(released)["gate"]["checks"]}
    assert all(gate[f"runner_{name}"] == "pass" for name in RUNNER_CHECKS)


def test_a_text_only_program_is_not_tested_with_images(small: Path, program: Path, tmp_path: Path) -> None:
    """Not even if it was extracted from a multimodal model, and has more fields in config.json."""
    shutil.copytree(small, tmp_path / "extracted")
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "extracted" / "config.json").write_text(json.dumps({**config, "mm_tokens_per_image": 4}))
    checks = run_checks(program, tmp_path / "extracted")
    assert list(checks) == ["prompts", "past_window", "full_length", "stop", "conversations"]
    # Random weights never end a turn.
    assert checks["stop"].cases == 0
    assert all(checks[name].cases for name in ("prompts", "past_window", "full_length", "conversations"))
    assert failed_checks(list(checks.values())) == {}


def chat_prompt() -> str:
    """Return the card's prompt in the chat template."""
    from transformers import AutoTokenizer

    return format_user_turn(AutoTokenizer.from_pretrained(BUILTIN["tiny-gemma3"]), TEXT_PROMPT)


def first_tokens(program: Path, count: int) -> list[int]:
    """Return a program's greedy answer to the card's prompt."""
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.pte import PteProgram

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN["tiny-gemma3"])
    prompt = torch.tensor([tokenizer(chat_prompt(), add_special_tokens=False)["input_ids"]])
    return PteProgram(program / "model.pte").generate(prompt, count)[0]


@pytest.mark.slow
def test_the_runner_stops_at_every_end_token_and_one_that_the_program_does_not_know_fails(
    small: Path, program: Path, tmp_path: Path
) -> None:
    """One end token is the second distinct token that random weights generate; they never generate the other one."""
    answer = first_tokens(program, 24)
    second, last = next(one for one in answer[1:] if one != answer[0]), 2047
    assert last not in answer
    for ids in ([second, last], [last, second]):
        checkpoint = with_end_tokens(small, tmp_path / str(ids[0]), ids)
        (tmp_path / f"{ids[0]}-program").mkdir()
        stops = export("quantize_gemma.tasks.export:export", checkpoint, tmp_path / f"{ids[0]}-program")
        check = run_checks(stops, checkpoint)["stop"]
        assert check.cases
        assert not check.failed
    # A program with the same weights that does not know the token continues.
    check = run_checks(program, checkpoint)["stop"]
    assert check.failed == 1
    assert "TextLLMRunner answers the question 'Hey, are you conscious?" in check.examples[0]
    failed = failed_checks([check])
    assert list(failed) == ["runner_stop"]
    assert failed["runner_stop"].startswith("the C++ runner, stopping at the end of a turn: 1 of ")


def generate_with_the_runner(program: str, prompt: str) -> dict[str, Any]:
    """Return how many tokens the stock runner generates, at most 8, in this process."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    tokens: list[str] = []
    runner = TextLLMRunner(program, str(BUILTIN["tiny-gemma3"] / "tokenizer.json"))
    runner.generate(prompt, GenerationConfig(max_new_tokens=8, temperature=0.0, echo=False), tokens.append)
    return {"tokens": len(tokens)}


@pytest.mark.slow
def test_a_turn_that_ends_with_its_first_token_passes_although_the_stock_runner_continues(
    small: Path, program: Path, tmp_path: Path
) -> None:
    checkpoint = with_end_tokens(small, tmp_path / "checkpoint", [2047, first_tokens(program, 1)[0]])
    (tmp_path / "program").mkdir()
    stops = export("quantize_gemma.tasks.export:export", checkpoint, tmp_path / "program")
    check = run_checks(stops, checkpoint)["stop"]
    assert check.cases
    assert not check.failed
    function = f"{generate_with_the_runner.__module__}:{generate_with_the_runner.__name__}"
    arguments = {"program": str(stops / "model.pte"), "prompt": chat_prompt()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        # If the stock runner stops here, remove the exception in scenarios.py and the section in docs/upstream.md.
        assert worker.run(function, arguments, lambda *_: None, None)["tokens"] > 1


def test_both_tokenizers_read_every_text_the_same_way() -> None:
    check = check_tokenizer(BUILTIN["tiny-gemma3"], [])
    assert (check.cases, check.failed) == (len(json.loads(TEXTS.read_text())), 0)


def with_tokenizer(target: Path, **changes: Any) -> Path:
    """Copy the built-in model with different values in tokenizer.json; return the copy."""
    shutil.copytree(BUILTIN["tiny-gemma3"], target)
    path = target / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_texts_that_the_runner_reads_differently_are_shown_with_both_readings(tmp_path: Path) -> None:
    """The runner's tokenizer ignores that a special token includes the space before it (`lstrip`)."""
    tokens = json.loads((BUILTIN["tiny-gemma3"] / "tokenizer.json").read_text())["added_tokens"]
    model = with_tokenizer(tmp_path / "model", added_tokens=[{**one, "lstrip": True} for one in tokens])
    check = check_tokenizer(model, [])
    assert 0 < check.failed < check.cases
    shown = next(failure for failure in check.examples if "text <start_of_turn> in the middle" in failure)
    assert all(len(failure) < 300 for failure in check.examples)
    assert "the runner tokenizes 'text <start_of_turn> in the middle" in shown
    assert "but transformers tokenizes it as [" in shown
    assert list(failed_checks([check])) == ["runner_tokenizer"]


def test_a_tokenizer_that_the_runner_cannot_read_ends_the_stage_with_the_reason(tmp_path: Path) -> None:
    model = with_tokenizer(tmp_path / "model", normalizer={"type": "Lowercase"})
    with pytest.raises(StageFailed, match=r"the C\+\+ tokenizer of phone apps cannot read .*tokenizer.json"):
        check_tokenizer(model, [])


def test_checks_that_were_not_tested_do_not_fail() -> None:
    assert failed_checks([RunnerCheck(name="two_images", cases=0, failed=0, examples=[])]) == {}


SHORT = Scenario(("prompts",), "a prompt of 40 tokens", ["text"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"tokens": [b" A", b" C"]}, "answers a prompt of 40 tokens with b' A C', but greedy decoding in"),
        ({"tokens": [b" A"]}, "answers a prompt"),
        ({"tokens": [b" A", b" B", b" C"]}, "answers a prompt"),
        ({"tokens": []}, "answers a prompt"),
        ({"prompt_tokens": 39}, "reads 39 tokens instead of 40 from a prompt of 40 tokens"),
        ({"prompt_tokens": None}, "reads None tokens"),
        # The binding stops at a partial character, and does not report the number of prompt tokens.
        ({"tokens": [b" A"], "is_cut_off": True, "prompt_tokens": None}, None),
        ({"tokens": [b" C"], "is_cut_off": True, "prompt_tokens": None}, "answers a prompt"),
    ],
)
def test_every_difference_from_the_program_is_a_failure(changed: dict[str, Any], message: str | None) -> None:
    tokenizer = load_runner_tokenizer(BUILTIN["tiny-gemma3"])
    letters = [tokenizer.encode(f" {letter}", 0, 0)[-1] for letter in "AB"]
    expected = Expected(40, None, letters, torch.zeros(0), ends=False)
    answer = replace(Answer([b" A", b" B"], False, 40), **changed)
    failure = compare_answers(tokenizer, SHORT, expected, answer, "TextLLMRunner")
    assert failure == message or (message is not None and failure is not None and message in failure)


def test_an_end_of_turn_that_is_not_an_eos_token_fails_with_advice(released: Outcome, tmp_path: Path) -> None:
    """As in a fine-tune whose generation_config.json has only <eos>."""
    release = Path(released.summary["release"])
    checkpoint = with_end_tokens(release, tmp_path / "release", [1])
    *_, checks = run_scenarios(release, checkpoint, [1016])
    (check,) = [one for one in checks if one.name == "stop"]
    assert check.failed > 0
    assert "ends its turn with <end_of_turn>, which is not an eos_token_id of generation" in check.examples[0]


def test_a_runner_that_remembers_the_previous_conversation_fails(
    released: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = f"{run_without_reset.__module__}:{run_without_reset.__name__}"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    release = released.summary["release"]
    failed = worker.run(function, {"release": release}, lambda *_: None, None)["failed"]
    assert {"conversations", "two_images", "late_image"} <= set(failed)


def run_without_reset(release: str) -> dict[str, Any]:
    """Run the scenarios in a runner that is never reset, in this process; return the names of the failed checks."""
    from executorch.extension.llm.runner import MultimodalRunner

    class Remembering:
        def __init__(self, program: str, checkpoint: str, _multimodal: bool) -> None:
            import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
            import executorch.kernels.quantized  # noqa: F401 (registers operators)

            self.runner = MultimodalRunner(program, f"{checkpoint}/tokenizer.json")

        def reset(self) -> None:
            """Forget nothing."""

        def generate(self, *arguments: Any) -> None:
            # The runner fails when the cache is full.
            with contextlib.suppress(RuntimeError):
                self.runner.generate(*arguments)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(stage, "load_runner", Remembering)
        result = stage.run_in_process(f"{release}/model.pte", release, [64], f"{folder}/outputs.safetensors")
    return {"failed": [check["name"] for check in result["checks"] if check["failed"]]}
