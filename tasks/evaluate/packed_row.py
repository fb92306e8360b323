"""Sequences packed into one row without padding; sequences with the same prefix share its tokens.

Per-token operations run on the whole row; attention runs on each sequence separately, so that its results are the same
as if it ran alone. For a shared prefix, this must be checked: in a longer sequence, attention may sum in a different
order, and then the last bits of the prefix's states differ between sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_masks_for_generate

from quantize_gemma.tasks.evaluate.packed_generation import KeyValues

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

Tokens = tuple[int, ...]
# The number of queries that attend at once when results do not have to be bit-identical.
BLOCK = 256


@dataclass(frozen=True)
class PrefixGroup:
    """Sequences with the same prefix.

    Attributes:
        prefix: The tokens of the prefix.
        endings: The tokens that follow it in each sequence; an ending can be empty.
    """

    prefix: Tokens
    endings: tuple[Tokens, ...] = ((),)

    @property
    def sequences(self) -> list[Tokens]:
        """The sequences' tokens."""
        return [self.prefix + ending for ending in self.endings]

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences, without sharing: attention's memory grows with it."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Limits:
    """The maximum size of a group or a batch, unless a single sequence exceeds it.

    Attributes:
        tokens: The number of tokens of its sequences, without sharing.
        positions: The number of positions whose logits are computed.
        sequences: The number of sequences; None for no limit.
    """

    tokens: int
    positions: int
    sequences: int | None

    def allow(self, sequences: Iterable[Tokens], counts: Mapping[Tokens, int]) -> bool:
        """Tell whether these sequences fit; `counts` has the number of scored positions of each."""
        several = list(sequences)
        return len(several) == 1 or (
            sum(map(len, several)) <= self.tokens
            and sum(counts[sequence] for sequence in several) <= self.positions
            and (self.sequences is None or len(several) <= self.sequences)
        )


def group_by_prefix(counts: Mapping[Tokens, int], limits: Limits) -> list[PrefixGroup]:
    """Return groups of sequences with the same prefix, the largest first.

    Args:
        counts: {sequence: number of its last positions that are scored}. Everything up to and including the first of
            them is the prefix.
        limits: The limits of a group.
    """
    groups: list[PrefixGroup] = []
    endings: dict[Tokens, tuple[Tokens, ...]] = {}
    for sequence, count in sorted(counts.items()):
        prefix, ending = sequence[: len(sequence) - count + 1], sequence[len(sequence) - count + 1 :]
        larger = PrefixGroup(prefix, (*endings.get(prefix, ()), ending))
        if not limits.allow(larger.sequences, counts):
            groups.append(PrefixGroup(prefix, endings[prefix]))
            larger = PrefixGroup(prefix, (ending,))
        endings[prefix] = larger.endings
    groups += [PrefixGroup(prefix, prefix_endings) for prefix, prefix_endings in endings.items()]
    return sorted(groups, key=lambda group: (-group.tokens, group.prefix, group.endings))


class PackedRow:
    """A row of packed sequences.

    Attributes:
        tokens: The tokens of the row.
        positions: The position of each token in its sequence.
        sequences: For each sequence, where its tokens are in the row.
        unequal_sequences: The indices of sequences in which the last bits of the prefix differ from those in the first
            sequence of the group. Their results must not be used.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        groups: Sequence[PrefixGroup],
        device: torch.device,
        caches: Sequence[KeyValues] = (),
        exact: bool = True,
    ) -> None:
        """Pack groups.

        Args:
            config: The model's.
            groups: The groups.
            device: Where the model is.
            caches: The caches of the groups, if any, to which keys and values are written.
            exact: Whether attention is bit-identical to the library's model, or faster.
        """
        self.caches, self.exact = caches, exact
        self.unequal_sequences: set[int] = set()
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sequences: list[list[int]] = []
        # The group of each sequence, and whether it is the group's first.
        self._groups: list[tuple[int, bool]] = []
        # On a GPU, the order of sums is not guaranteed.
        self._checks = device.type == "cpu"
        for number, group in enumerate(groups):
            start = len(self.tokens)
            prefix = range(start, start + len(group.prefix))
            self.tokens += group.prefix
            self.positions += range(len(group.prefix))
            for index, ending in enumerate(group.endings):
                indices = range(len(self.tokens), len(self.tokens) + len(ending))
                self.tokens += ending
                self.positions += range(len(group.prefix), len(group.prefix) + len(ending))
                self.sequences.append([*prefix, *indices])
                self._groups.append((number, index == 0))
        self._prefixes = [len(group.prefix) for group in groups]
        # Sequences of the same length share one call.
        self._by_length: dict[int, list[int]] = {}
        for number, sequence in enumerate(self.sequences):
            self._by_length.setdefault(len(sequence), []).append(number)
        self._indices = {
            length: torch.tensor([self.sequences[number] for number in numbers], device=device)
            for length, numbers in self._by_length.items()
        }
        self._masks = {
            length: create_masks_for_generate(
                config=config,
                input_embeds=torch.empty(1, length, 1, dtype=torch.bfloat16, device=device),
                attention_mask=None,
                cache_position=torch.arange(length, device=device),
                past_key_values=None,
            )
            for length in self._by_length
        }

    def attend(self, module: Gemma3Attention, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Attend within each sequence; tensors are [1, heads, tokens, width], the result [1, tokens, heads, width]."""
        self._fill_caches(module.layer_idx, key, value)
        outputs_by_sequence: dict[int, Tensor] = {}
        for length, indices in self._indices.items():
            # [sequences, heads, length, width]
            parts = [tensor[0][:, indices].transpose(0, 1) for tensor in (query, key, value)]
            outputs = self._attend(module, parts, self._masks[length][module.layer_type], **kwargs)
            outputs_by_sequence.update(zip(self._by_length[length], outputs, strict=True))
        pieces: list[Tensor] = []
        for number, (group, first) in enumerate(self._groups):
            prefix = self._prefixes[group]
            if first:
                pieces.append(outputs_by_sequence[number])
                prefix_outputs = outputs_by_sequence[number][:prefix]
            else:
                if self._checks and not torch.equal(prefix_outputs, outputs_by_sequence[number][:prefix]):
                    self.unequal_sequences.add(number)
                pieces.append(outputs_by_sequence[number][prefix:])
        return torch.cat(pieces)[None]

    def _attend(self, module: Gemma3Attention, parts: list[Tensor], mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Return the attention of queries, keys, and values of sequences, [sequences, length, heads, width]."""
        length = parts[0].shape[2]
        step = length if self.exact or mask is None else BLOCK
        outputs = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            # With a sliding window, the block's queries do not attend to earlier positions.
            first = max(start + 1 - module.sliding_window, 0) if step < length and module.sliding_window else 0
            query, key, value = parts[0][:, :, start:stop], *(part[:, :, first:stop] for part in parts[1:])
            block_mask = None if mask is None else mask[:, :, start:stop, first:stop]
            outputs.append(sdpa_attention_forward(module, query, key, value, block_mask, **kwargs)[0])
        return torch.cat(outputs, dim=1)

    def _fill_caches(self, layer: int, key: Tensor, value: Tensor) -> None:
        for cache, sequence in zip(self.caches, self.sequences, strict=bool(self.caches)):
            indices = slice(sequence[0], sequence[-1] + 1)
            cache.extend(layer, key[:, :, indices], value[:, :, indices])
