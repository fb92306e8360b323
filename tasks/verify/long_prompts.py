"""Prompts as long as the sliding window and longer, each read in one chunk, through the C++ runner of phone apps.

What the runner generates must be what the program generates in ExecuTorch's Python runtime, token for token. compare.py
compares the logits behind that with the checkpoint's.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed

if TYPE_CHECKING:
    from executorch.extension.llm.runner import MultimodalRunner, Stats, TextLLMRunner
    from pytorch_tokenizers import CppHFTokenizer
    from torch import Tensor

# Tokens generated after each prompt; an end of turn comes first.
ANSWER_TOKENS = 8
# Text for prompts: any text will do that is long enough to push the first tokens out of the window.
TEXT = (
    "A river begins where rain and melting snow gather on high ground. It runs downhill, joins other streams, and "
    "carries sand and stones with it. Where the land is flat it slows down and lays down what it carried. Towns "
    "grew beside rivers because boats could reach them and because fields near the water gave good harvests. The "
    "water that reaches the sea rises again as vapour, forms clouds, and falls as rain on the hills. "
)
# Fill a prompt up to its length where the next word would be too long.
FILLERS = (" a", ".", " the", " B")


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and the program's greedy answer.

    Attributes:
        ids: The prompt's token ids, the BOS token included.
        answer: The answer's token ids.
        logits: The logits that chose them, [tokens, vocabulary].
    """

    ids: list[int]
    answer: list[int]
    logits: Tensor

    @property
    def answer_positions(self) -> list[int]:
        """The positions of prompt and answer whose logits choose the answer's tokens."""
        start = len(self.ids) - 1
        return list(range(start, start + len(self.answer)))


def prompt_lengths(window: int, max_seq_len: int) -> list[int]:
    """Return the lengths around the sliding window that leave room for an answer, and the longest that does."""
    longest = max_seq_len - ANSWER_TOKENS
    return [*(length for length in (window - 1, window, window + 1, 2 * window) if length < longest), longest]


def answer_prompts(program: Path, checkpoint: Path, lengths: list[int]) -> list[AnsweredPrompt]:
    """Return a prompt of each length, in tokens, with the program's answer.

    The program runs in its own process, whose memory is released afterwards.

    Raises:
        StageFailed: The C++ runner fails at a prompt, or answers differently from the program itself.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "program": str(program / "model.pte"),
            "checkpoint": str(checkpoint),
            "lengths": lengths,
            "logits": f"{folder}/logits.safetensors",
        }
        result = worker.run("quantize_gemma.tasks.verify.long_prompts:run_prompts", arguments, lambda *_: None, None)
        logits = load_file(f"{folder}/logits.safetensors")
    return [
        AnsweredPrompt(prompt["ids"], prompt["answer"], logits[str(number)])
        for number, prompt in enumerate(result["prompts"])
    ]


def run_prompts(program: str, checkpoint: str, lengths: list[int], logits: str) -> dict[str, Any]:
    """Answer prompts of these lengths, in this process, and write the logits to the safetensors file `logits`.

    Returns:
        {"prompts": [{"ids", "answer"}]}; the logits' names are the prompts' numbers.
    """
    from pytorch_tokenizers import CppHFTokenizer
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from quantize_gemma.tasks.models.pte import PteProgram

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = hasattr(config, "vision_config")
    tokenizer = CppHFTokenizer()
    tokenizer.load(f"{checkpoint}/tokenizer.json")
    texts = [make_prompt(tokenizer, length) for length in lengths]
    answers = _run_runner(program, checkpoint, texts, lengths, multimodal)
    gc.collect()  # The program is loaded once more, and takes as much again.
    pte = PteProgram(Path(program))
    prompts, tensors = [], {}
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        ids = tokenizer.encode(text, 1, 0)
        tokens, tensors[str(number)] = pte.generate(ids, ANSWER_TOKENS)
        expected = [_decode_bytes(tokenizer, token) for token in tokens]
        if answer != expected[: len(answer)]:
            raise StageFailed(
                f"{_runner_name(multimodal)} answers a prompt of {len(ids):,} tokens with {b''.join(answer)!r}, but "
                f"the program's own logits say {b''.join(expected)!r}"
            )
        prompts.append({"ids": ids, "answer": tokens})
    save_file(tensors, logits)
    return {"prompts": prompts}


def make_prompt(tokenizer: CppHFTokenizer, length: int) -> str:
    """Return a text of exactly `length` tokens, the BOS token included, as ExecuTorch's tokenizer counts them.

    Raises:
        StageFailed: The tokenizer makes no such text.
    """
    words = (TEXT * (length // 40 + 2)).split(" ")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, 1, 0))

    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(" ".join(words[:middle])) <= length else (low, middle - 1)
    for fewer in range(min(low, 8)):
        text = " ".join(words[: low - fewer])
        for filler in FILLERS:
            filled = text + filler * (length - count(text))
            if count(filled) == length:
                return filled
    raise StageFailed(f"the model's tokenizer makes no prompt of exactly {length:,} tokens to test the program with")


def _run_runner(
    program: str, checkpoint: str, texts: list[str], lengths: list[int], multimodal: bool
) -> list[list[bytes]]:
    """Return the greedy answers of the C++ runner, as the UTF-8 bytes of each token."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import MultimodalRunner, TextLLMRunner

    runner = (MultimodalRunner if multimodal else TextLLMRunner)(program, f"{checkpoint}/tokenizer.json")
    return [_answer(runner, text, length, multimodal) for text, length in zip(texts, lengths, strict=True)]


def _answer(runner: MultimodalRunner | TextLLMRunner, text: str, length: int, multimodal: bool) -> list[bytes]:
    """Return the answer to one prompt of `length` tokens.

    The runner's Python binding stops at a token that is only part of a character: there the answer ends.
    """
    from executorch.extension.llm.runner import GenerationConfig, make_text_input

    config = GenerationConfig(max_new_tokens=ANSWER_TOKENS, temperature=0.0, echo=False, num_bos=1)
    answer: list[bytes] = []
    stats: list[Stats] = []
    runner.reset()
    try:
        prompt = [make_text_input(text)] if multimodal else text
        runner.generate(prompt, config, lambda token: answer.append(token.encode()), stats.append)
    except RuntimeError as error:
        raise StageFailed(
            f"the program fails in {_runner_name(multimodal)} at a prompt of {length:,} tokens: {error}"
        ) from None
    except UnicodeDecodeError as error:
        answer.append(error.object)
    for each in stats:
        if each.num_prompt_tokens != length:
            raise StageFailed(
                f"{_runner_name(multimodal)} reads {each.num_prompt_tokens:,} tokens of a prompt of {length:,}"
            )
    return answer


def _decode_bytes(tokenizer: CppHFTokenizer, token: int) -> bytes:
    try:
        return str(tokenizer.decode(token)).encode()
    except UnicodeDecodeError as error:
        return error.object


def _runner_name(multimodal: bool) -> str:
    return "MultimodalRunner" if multimodal else "TextLLMRunner"
