"""The prompt of the card's manual test, and whether a checkpoint has a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The card's manual test.
TEXT_PROMPT = "Hey, are you conscious? Can you talk to me?"


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the checkpoint has a chat template: only instruction-tuned models do."""
    return bool(getattr(tokenizer, "chat_template", None))
