"""Greedy generation in the packed model: each sequence has its own keys and values, so there is no padding.

A step runs the last token of every sequence in one row. As soon as a text ends, the next prompt takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention


class KeyValues:
    """The keys and values of one sequence in each layer; those of the first `length` tokens are complete."""

    def __init__(self, capacity: int) -> None:
        """Create an empty cache for up to `capacity` tokens."""
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next tokens' keys and values in a layer, [1, heads, tokens, width]; return all of this layer's."""
        if layer not in self._layers:
            batch, heads, _, width = keys.shape
            shape = batch, heads, self.capacity, width
            self._layers[layer] = keys.new_empty(shape), values.new_empty(shape)
        stop = self.length + keys.shape[2]
        all_keys, all_values = self._layers[layer]
        all_keys[:, :, self.length : stop] = keys
        all_values[:, :, self.length : stop] = values
        return all_keys[:, :, :stop], all_values[:, :, :stop]

    def release(self) -> None:
        """Free the memory when no more tokens follow."""
        self._layers.clear()


@dataclass
class Text:
    """A text that is being generated.

    Attributes:
        prompt: The prompt's tokens.
        max_tokens: The maximum number of tokens of the text.
        ends: Called with the tokens so far; returns whether the text has ended.
        tokens: The text's tokens so far.
        cache: The keys and values of the prompt and the text.
    """

    prompt: list[int]
    max_tokens: int
    ends: Callable[[list[int]], bool]
    tokens: list[int] = field(default_factory=list)
    cache: KeyValues = field(init=False)

    def __post_init__(self) -> None:
        """Start without keys and values."""
        self.cache = KeyValues(len(self.prompt) + self.max_tokens)

    def is_finished(self) -> bool:
        """Tell whether the text is complete."""
        return len(self.tokens) >= self.max_tokens or self.ends(self.tokens)


class LastTokens:
    """The last token of each of several sequences, packed in a row."""

    def __init__(self, caches: Sequence[KeyValues], exact: bool) -> None:
        """Store the sequences' keys and values, and whether each head attends separately, as in the library's model."""
        self.caches, self.exact = caches, exact

    def attend(self, module: Gemma3Attention, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Attend from each token to its own sequence; tensors are [1, heads, tokens, width], the result [1, tokens, …].

        A token attends to all keys in a layer's window, so no mask is needed.
        """
        outputs = []
        for index, cache in enumerate(self.caches):
            token = slice(index, index + 1)
            keys, values = cache.extend(module.layer_idx, key[:, :, token], value[:, :, token])
            if module.sliding_window:
                keys, values = keys[:, :, -module.sliding_window :], values[:, :, -module.sliding_window :]
            if self.exact:
                output, _ = sdpa_attention_forward(module, query[:, :, token], keys, values, None, **kwargs)
            else:
                # Heads with the same keys are rows of one product. On a CPU, this takes a tenth of the time, because
                # the kernel for one row is slow. Occasionally, the last bit of an output differs.
                rows = query[:, :, token].reshape(1, keys.shape[1], -1, keys.shape[3])
                attended = scaled_dot_product_attention(rows, keys, values, scale=kwargs["scaling"])
                output = attended.flatten(1, 2)[:, None]
            outputs.append(output)
        return torch.cat(outputs, dim=1)


def take_next(
    waiting: list[Text], running: list[Text], max_texts: int | None, max_tokens: int, max_prompt_tokens: int
) -> list[Text]:
    """Remove from `waiting` the texts that fit in addition to the running ones, at least one if none is running.

    Args:
        waiting: Texts, in order.
        running: Texts that are being generated.
        max_texts: The maximum number of texts at a time; None for no limit.
        max_tokens: The maximum number of tokens at a time, including those that may still be generated.
        max_prompt_tokens: The maximum number of tokens of the prompts that start together, unless one alone has more.
    """
    count, total, prompt_tokens = 0, sum(text.cache.capacity for text in running), 0
    for text in waiting:
        total += text.cache.capacity
        prompt_tokens += len(text.prompt)
        number = len(running) + count
        if number and (total > max_tokens or number == max_texts):
            break
        if count and prompt_tokens > max_prompt_tokens:
            break
        count += 1
    texts = waiting[:count]
    del waiting[:count]
    return texts
