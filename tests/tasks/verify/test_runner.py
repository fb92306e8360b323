"""The response and the speed of the C++ runner, as the card shows them."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.device_report import parse_output
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.pte import PteProgram
from quantize_gemma.tasks.verify import runner


def prompt_before_a_byte(program: Path) -> tuple[str, int]:
    """Return a text after which random weights generate a single byte of a character, and its number of tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN["tiny-gemma3"])
    pte = PteProgram(program / "model.pte")
    for number in range(500):
        text = f"{number} {chr(0x1F600 + number)}"
        ids = tokenizer(text)["input_ids"]
        (token,), _ = pte.generate(torch.tensor([ids]), 1)
        if tokenizer.convert_ids_to_tokens(token) in {f"<0x{byte:02X}>" for byte in range(0x80, 0x100)}:
            return text, len(ids)
    raise AssertionError("there is no such text")


def test_a_response_that_begins_with_a_partial_character_is_shown_and_its_speed_is_measured(
    small: Path, program: Path
) -> None:
    text, length = prompt_before_a_byte(program)
    generation = runner._generate(program, small, text, [text], False, 8)
    assert generation.response == "\ufffd"
    assert (generation.speed["prompt_tokens"], generation.speed["generated_tokens"]) == (length, 8)
    assert generation.speed["rounds"] > 0
    assert generation.speed["load_seconds"] > 0
    assert generation.speed["first_token_seconds"] >= 0
    assert generation.speed["decode_tokens_per_second"] > 0


def test_the_speed_on_this_machine_is_defined_like_the_speed_on_a_phone() -> None:
    times = {"model_load_start_ms": 1000, "model_load_end_ms": 2500, "inference_start_ms": 3000}
    times |= {"prompt_eval_end_ms": 3400, "first_token_ms": 3410, "inference_end_ms": 5400}
    statistics = json.dumps({**times, "prompt_tokens": 100, "generated_tokens": 50})
    phone = asdict(parse_output(f"VmHWM: 1 kB\nPyTorchObserver {statistics}\n"))
    stats = SimpleNamespace(**times, num_prompt_tokens=100, num_generated_tokens=50)
    here = runner._speed([stats])
    names = ("prompt_tokens", "generated_tokens", "load_seconds", "first_token_seconds", "prefill_tokens_per_second")
    for name in (*names, "decode_tokens_per_second"):
        assert here[name] == pytest.approx(phone[name]), name
