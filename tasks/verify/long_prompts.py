"""Prompts of an exact length: as long as the sliding window, longer, and as long as the program accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.errors import StageFailed

if TYPE_CHECKING:
    from pytorch_tokenizers import CppHFTokenizer

# Tokens generated after each prompt; an end of turn comes first.
ANSWER_TOKENS = 8
# Text for prompts, long enough to push the first tokens out of the window.
TEXT = (
    "A river begins where rain and melting snow gather on high ground. It runs downhill, joins other streams, and "
    "carries sand and stones with it. Where the land is flat it slows down and lays down what it carried. Towns "
    "grew beside rivers because boats could reach them and because fields near the water gave good harvests. The "
    "water that reaches the sea rises again as vapor, forms clouds, and falls as rain on the hills. "
)
# Pad a prompt to its exact length where the next word would be too long.
FILLERS = (" a", ".", " the", " B")


def prompt_lengths(window: int, max_seq_len: int) -> list[int]:
    """Return the lengths around the sliding window that leave room for an answer, and the longest such length."""
    longest = max_seq_len - ANSWER_TOKENS
    return [*(length for length in (window - 1, window, window + 1, 2 * window) if length < longest), longest]


def make_prompt(tokenizer: CppHFTokenizer, length: int) -> str:
    """Return a text of exactly `length` tokens, the BOS token included, as ExecuTorch's tokenizer counts them.

    Raises:
        StageFailed: No such text exists for this tokenizer.
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
    raise StageFailed(f"cannot build a test prompt of exactly {length:,} tokens with the model's tokenizer")
