"""Generate with a program in ExecuTorch's C++ runner, which phone apps use, and measure its speed and memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.models.chat import TEXT_PROMPT, format_user_turn
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.verify.cpp_runner import load_runner, runner_inputs
from quantize_gemma.tasks.verify.image_inputs import IMAGE_PROMPT, image_segments, solid_image

if TYPE_CHECKING:
    from executorch.extension.llm.runner import Stats
    from torch import Tensor

# The runner's clock has a resolution of 1 ms: a prompt is answered repeatedly until at least this many tokens were
# decoded and decoding took at least this many seconds, or until MOST_SECONDS have passed.
DECODED_TOKENS = 32
DECODE_SECONDS = 0.5
MOST_SECONDS = 10


@dataclass(frozen=True)
class Generation:
    """A greedy response, and the runner's speed and peak memory; see Speed in metrics.py."""

    prompt: str
    response: str
    speed: dict[str, float]
    threads: int


def generate_from_text(program: Path, checkpoint: Path, multimodal: bool, max_new_tokens: int) -> Generation:
    """Generate from the card's prompt, in the chat template if the checkpoint has one."""
    from transformers import AutoTokenizer

    turn = format_user_turn(AutoTokenizer.from_pretrained(checkpoint), TEXT_PROMPT)
    return _generate(program, checkpoint, TEXT_PROMPT, [turn], multimodal, max_new_tokens)


def generate_from_image(program: Path, checkpoint: Path, max_new_tokens: int) -> Generation:
    """Generate from a solid-color image and a question about its color."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    segments = image_segments(processor, [solid_image(processor)])
    return _generate(program, checkpoint, IMAGE_PROMPT, segments, True, max_new_tokens)


def _generate(
    program: Path, checkpoint: Path, prompt: str, segments: list[str | Tensor], multimodal: bool, max_new_tokens: int
) -> Generation:
    """Run run_program() in its own process, so that its memory is the program's alone.

    `segments` are the parts of the prompt: text, and images as pixels.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        serialized = []
        for number, segment in enumerate(segments):
            if isinstance(segment, str):
                serialized.append({"text": segment})
            else:
                path = f"{folder}/{number}.safetensors"
                save_file({"pixels": segment.contiguous()}, path)
                serialized.append({"pixels": path})
        arguments = {
            "program": str(program / "model.pte"),
            "checkpoint": str(checkpoint),
            "segments": serialized,
            "multimodal": multimodal,
            "max_new_tokens": max_new_tokens,
        }
        result = worker.run("quantize_gemma.tasks.verify.runner:run_program", arguments, lambda *_: None, None)
    if not result["response"]:
        raise StageFailed(f"the program generates nothing from {prompt!r}")
    speed = {**result["speed"], "peak_rss_bytes": result["measured"]["peak_rss_bytes"]}
    return Generation(prompt, result["response"], speed, result["threads"])


def run_program(
    program: str, checkpoint: str, segments: list[dict[str, str]], multimodal: bool, max_new_tokens: int
) -> dict[str, Any]:
    """Generate with the C++ runner, in this process.

    Args:
        program: Path of the .pte file.
        checkpoint: The checkpoint's directory, for its tokenizer.
        segments: The parts of the prompt, each {"text": …} or {"pixels": path of a safetensors file}.
        multimodal: Whether the program takes images.
        max_new_tokens: The maximum number of tokens to generate.

    Returns:
        {"response": text without stop tokens, "speed": see _speed(), "threads": the size of ExecuTorch's thread pool}.
        The Python binding fails on a token that is only part of a character: there, the response ends with "�".
    """
    from safetensors.torch import load_file

    from quantize_gemma.tasks.runtime.patches.private_api import thread_count

    runner = load_runner(program, checkpoint, multimodal)
    parts = [one["text"] if "text" in one else load_file(one["pixels"])["pixels"] for one in segments]
    inputs = runner_inputs(parts, multimodal, max_new_tokens)
    tokens: list[str] = []
    rounds: list[Stats] = []
    started = time.monotonic()
    try:
        runner.generate(*inputs, tokens.append, rounds.append)
    except UnicodeDecodeError as error:
        tokens.append(error.object.decode(errors="replace"))
    while _decoded(rounds) < DECODED_TOKENS or _decode_seconds(rounds) < DECODE_SECONDS:
        if time.monotonic() - started > MOST_SECONDS:
            break
        runner.reset()
        # Without a callback for the tokens, the binding does not fail.
        runner.generate(*inputs, None, rounds.append)
    response = "".join(tokens)
    for token in GEMMA3.stop_tokens:
        response = response.replace(token, "")
    return {
        "response": response.strip(),
        "speed": _speed(rounds),
        "threads": thread_count(),
    }


def _speed(rounds: list[Stats]) -> dict[str, float]:
    """Return the mean speed over several generations from the same prompt."""
    prompt_tokens = rounds[0].num_prompt_tokens
    first_token = sum(stats.first_token_ms - stats.inference_start_ms for stats in rounds) / 1000
    prefill = sum(stats.prompt_eval_end_ms - stats.inference_start_ms for stats in rounds) / 1000
    return {
        "rounds": len(rounds),
        "prompt_tokens": prompt_tokens,
        # The runner does not count the first token.
        "generated_tokens": rounds[0].num_generated_tokens + 1,
        "load_seconds": (rounds[0].model_load_end_ms - rounds[0].model_load_start_ms) / 1000,
        "first_token_seconds": round(first_token / len(rounds), 4),
        "prefill_tokens_per_second": round(prompt_tokens * len(rounds) / max(prefill, 1e-3), 1),
        "decode_tokens_per_second": round(_decoded(rounds) / max(_decode_seconds(rounds), 1e-3), 1),
    }


def _decoded(rounds: list[Stats]) -> int:
    return int(sum(stats.num_generated_tokens for stats in rounds))


def _decode_seconds(rounds: list[Stats]) -> float:
    return float(sum(stats.inference_end_ms - stats.prompt_eval_end_ms for stats in rounds)) / 1000
