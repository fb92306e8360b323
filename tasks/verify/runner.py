"""Generate with a program in ExecuTorch's C++ runner, which phone apps use, and measure its speed and memory."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.models.chat import TEXT_PROMPT, has_chat_template
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.verify.image_inputs import IMAGE_PROMPT, image_segments, solid_image

if TYPE_CHECKING:
    from executorch.extension.llm.runner import Stats
    from torch import Tensor

# The runner's clock has a resolution of 1 ms: a prompt is answered repeatedly until at least this many tokens were
# decoded and decoding took at least this many seconds, or until MOST_SECONDS have passed.
DECODED_TOKENS = 32
DECODE_SECONDS = 0.5
MOST_SECONDS = 10
# RGB; IMAGE_PROMPT asks for it.
IMAGE_COLOR = (30, 50, 220)


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

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = TEXT_PROMPT
    if has_chat_template(tokenizer):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": TEXT_PROMPT}], add_generation_prompt=True, tokenize=False
        )
    return _generate(program, checkpoint, TEXT_PROMPT, [text], multimodal, max_new_tokens)


def generate_from_image(program: Path, checkpoint: Path, max_new_tokens: int) -> Generation:
    """Generate from a solid-color image and a question about its color."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    segments = image_segments(processor, [solid_image(processor, IMAGE_COLOR)])
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
            "tokenizer": str(checkpoint / "tokenizer.json"),
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
    program: str, tokenizer: str, segments: list[dict[str, str]], multimodal: bool, max_new_tokens: int
) -> dict[str, Any]:
    """Generate with the C++ runner, in this process.

    Args:
        program: Path of the .pte file.
        tokenizer: Path of tokenizer.json.
        segments: The parts of the prompt, each {"text": …} or {"pixels": path of a safetensors file}. No BOS token is
            added to a text that starts with one.
        multimodal: Whether the program takes images.
        max_new_tokens: The maximum number of tokens to generate.

    Returns:
        {"response": text without stop tokens, "speed": see _speed(), "threads": the size of ExecuTorch's thread pool}.
    """
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import (
        GenerationConfig,
        MultimodalRunner,
        TextLLMRunner,
        make_image_input,
        make_text_input,
    )
    from safetensors.torch import load_file

    from quantize_gemma.tasks.runtime.patches.private_api import thread_count

    num_bos = 0 if segments[0]["text"].startswith(GEMMA3.bos_token) else 1
    runner = (MultimodalRunner if multimodal else TextLLMRunner)(program, tokenizer)
    prompt: Any = segments[0]["text"]
    if multimodal:
        prompt = [
            make_text_input(segment["text"])
            if "text" in segment
            else make_image_input(load_file(segment["pixels"])["pixels"])
            for segment in segments
        ]

    def generate(most: int) -> tuple[list[str], list[Stats]]:
        tokens: list[str] = []
        stats: list[Stats] = []
        runner.reset()
        settings = GenerationConfig(max_new_tokens=most, temperature=0.0, echo=False, num_bos=num_bos)
        # The Python binding fails on a token that is only part of a character; the response ends before that token.
        with contextlib.suppress(UnicodeDecodeError):
            runner.generate(prompt, settings, tokens.append, stats.append)
        return tokens, stats

    tokens, rounds = generate(max_new_tokens)
    if not tokens:
        raise StageFailed(
            "the first token that the program generates is only part of a character, so its speed cannot be measured"
        )
    most = max_new_tokens if rounds else len(tokens)
    started = time.monotonic()
    while _decoded(rounds) < DECODED_TOKENS or _decode_seconds(rounds) < DECODE_SECONDS:
        rounds += generate(most)[1]
        if time.monotonic() - started > MOST_SECONDS:
            break
    response = "".join(tokens)
    for token in GEMMA3.stop_tokens:
        response = response.replace(token, "")
    return {
        "response": response.strip(),
        "speed": {**_speed(rounds), "generated_tokens": len(tokens)},
        "threads": thread_count(),
    }


def _speed(rounds: list[Stats]) -> dict[str, float]:
    """Return the mean speed over several generations from the same prompt."""
    prompt_tokens = rounds[0].num_prompt_tokens
    prefill = sum(stats.prompt_eval_end_ms - stats.inference_start_ms for stats in rounds) / 1000
    return {
        "rounds": len(rounds),
        "prompt_tokens": prompt_tokens,
        "load_seconds": (rounds[0].model_load_end_ms - rounds[0].model_load_start_ms) / 1000,
        "first_token_seconds": round(prefill / len(rounds), 4),
        "prefill_tokens_per_second": round(prompt_tokens * len(rounds) / max(prefill, 1e-3), 1),
        "decode_tokens_per_second": round(_decoded(rounds) / max(_decode_seconds(rounds), 1e-3), 1),
    }


def _decoded(rounds: list[Stats]) -> int:
    return int(sum(stats.num_generated_tokens for stats in rounds))


def _decode_seconds(rounds: list[Stats]) -> float:
    return float(sum(stats.inference_end_ms - stats.prompt_eval_end_ms for stats in rounds)) / 1000
