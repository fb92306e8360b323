"""Prompts as long as the sliding window and longer, each in one piece, through the C++ runner that phone apps use.

What the runner answers must be what the program answers in ExecuTorch's Python runtime, token for token. verify.py
compares the logits behind that with the checkpoint's.
"""

import gc
import tempfile
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed

# So many tokens are answered after each prompt, or up to the end of a turn.
ANSWER_TOKENS = 8
# Text for prompts: any will do that is long enough to leave the first tokens behind.
TEXT = (
    "A river begins where rain and melting snow gather on high ground. It runs downhill, joins other streams, and "
    "carries sand and stones with it. Where the land is flat it slows down and lays down what it carried. Towns "
    "grew beside rivers because boats could reach them and because fields near the water gave good harvests. The "
    "water that reaches the sea rises again as vapour, forms clouds, and falls as rain on the hills. "
)
# What a prompt is filled up with whose last word would be too long.
FILLERS = (" a", ".", " the", " B")


def prompt_lengths(window: int, max_seq_len: int) -> list[int]:
    """Returns the lengths around the sliding window that leave room for an answer, and the longest that does."""
    longest = max_seq_len - ANSWER_TOKENS
    return [*(length for length in (window - 1, window, window + 1, 2 * window) if length < longest), longest]


def answer_prompts(program: Path, checkpoint: Path, lengths: list[int]) -> list[dict[str, Any]]:
    """Returns {"ids", "answer", "logits"} of prompts of so many tokens each, BOS included.

    `answer` are the tokens of the program's greedy answer, `logits` those that they were chosen by, [tokens,
    vocabulary]. It runs in a process of its own, whose memory comes back.

    Raises StageFailed if the C++ runner fails at one, or answers differently from the program itself.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "program": str(program / "model.pte"),
            "checkpoint": str(checkpoint),
            "lengths": lengths,
            "logits": f"{folder}/logits.safetensors",
        }
        prompts = worker.run("quantize_gemma.tasks.verify.prompts:run_prompts", arguments, lambda *_: None, None)[
            "prompts"
        ]
        logits = load_file(f"{folder}/logits.safetensors")
    return [{**prompt, "logits": logits[str(number)]} for number, prompt in enumerate(prompts)]


def run_prompts(program: str, checkpoint: str, lengths: list[int], logits: str) -> dict[str, Any]:
    """Returns {"prompts": [{"ids", "answer"}]} for answer_prompts(), and writes their logits, by number, to a file."""
    from pytorch_tokenizers import CppHFTokenizer
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from quantize_gemma.tasks.models.pte import Methods

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = hasattr(config, "vision_config")
    tokenizer = CppHFTokenizer()
    tokenizer.load(f"{checkpoint}/tokenizer.json")
    texts = [make_prompt(tokenizer, length) for length in lengths]
    answers = _ask_runner(program, checkpoint, texts, lengths, multimodal)
    gc.collect()  # The program is loaded once more, and takes as much again.
    methods = Methods(Path(program))
    prompts, tensors = [], {}
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        ids = tokenizer.encode(text, 1, 0)
        tokens, tensors[str(number)] = methods.answer(ids, ANSWER_TOKENS)
        expected = [_as_bytes(tokenizer, token) for token in tokens]
        if answer != expected[: len(answer)]:
            raise StageFailed(
                f"{_runner_name(multimodal)} answers a prompt of {len(ids):,} tokens with {b''.join(answer)!r}, but "
                f"the program's own logits say {b''.join(expected)!r}"
            )
        prompts.append({"ids": ids, "answer": tokens})
    save_file(tensors, logits)
    return {"prompts": prompts}


def make_prompt(tokenizer: Any, length: int) -> str:
    """Returns a text of exactly so many tokens, BOS included, as ExecuTorch's tokenizer counts them."""
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
    raise StageFailed(f"the model's tokenizer makes no prompt of exactly {length:,} tokens to try the program with")


def _ask_runner(
    program: str, checkpoint: str, texts: list[str], lengths: list[int], multimodal: bool
) -> list[list[bytes]]:
    """Returns the greedy answers of the C++ runner, in tokens as text.

    The runner's binding for Python gives up at a token that is part of a character only: there an answer ends.
    """
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import GenerationConfig, MultimodalRunner, TextLLMRunner, make_text_input

    config = GenerationConfig(max_new_tokens=ANSWER_TOKENS, temperature=0.0, echo=False, num_bos=1)
    runner = (MultimodalRunner if multimodal else TextLLMRunner)(program, f"{checkpoint}/tokenizer.json")
    answers = []
    for text, length in zip(texts, lengths, strict=True):
        answer: list[bytes] = []
        stats: list[Any] = []

        def hear(token: str, answer: list[bytes] = answer) -> None:
            answer.append(token.encode())

        runner.reset()
        try:
            runner.generate([make_text_input(text)] if multimodal else text, config, hear, stats.append)
        except RuntimeError as error:
            raise StageFailed(
                f"the program fails in {_runner_name(multimodal)} at a prompt of {length:,} tokens: {error}"
            ) from None
        except UnicodeDecodeError as error:
            answer.append(error.object)
        for found in stats:
            if found.num_prompt_tokens != length:
                raise StageFailed(
                    f"{_runner_name(multimodal)} reads {found.num_prompt_tokens:,} tokens of a prompt of {length:,}"
                )
        answers.append(answer)
    return answers


def _as_bytes(tokenizer: Any, token: int) -> bytes:
    try:
        return str(tokenizer.decode(token)).encode()
    except UnicodeDecodeError as error:
        return error.object


def _runner_name(multimodal: bool) -> str:
    return "MultimodalRunner" if multimodal else "TextLLMRunner"
