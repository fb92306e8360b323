"""The prompt of the card's manual test, and the chat template of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# The card's manual test.
TEXT_PROMPT = "Hey, are you conscious? Can you talk to me?"


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the checkpoint has a chat template: only instruction-tuned models do."""
    return bool(getattr(tokenizer, "chat_template", None))


def format_chat(processor: ProcessorMixin, messages: Sequence[Mapping[str, object]]) -> str | None:
    """Return a chat in the template of a processor, which may be its tokenizer's; None if there is no template."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        return None
    return str(processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True))


def format_user_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text as the user's turn in the chat template; the text itself if there is no template."""
    if not has_chat_template(tokenizer):
        return text
    chat = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
