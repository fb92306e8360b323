"""The prompt of the card's manual test, and whether a checkpoint has a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The card's manual test.
TEXT_PROMPT = "Hey, are you conscious? Can you talk to me?"


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer is an instruction-tuned checkpoint's: a base model has no chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
