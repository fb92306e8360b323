"""The program's key-value cache: prompts of any length, and sequences longer than the sliding window.

The runners of phone apps pass a prompt to the program in one chunk: MultimodalRunner never splits it, and TextLLMRunner
splits only by get_max_seq_len, but lets answers run past the end of the cache if get_max_seq_len is less than
get_max_context_len (extension/llm/runner/). So a chunk may be as long as the whole sequence. optimum-executorch's ring
buffer of twice the window accepts at most one window at a time: in a longer chunk, the first tokens' keys are
overwritten before they are used.

Here, a sliding-window layer attends to the content of the ring buffer, followed by the chunk itself, before the buffer
is updated. So a buffer of one window is enough for chunks of any length, and takes half the memory. If no sequence is
longer than the window, these layers are the same as full-attention layers.

An int8 cache is converted to float32 for each call, in memory that all layers share, and attention is computed in
float32. ExecuTorch's int8 attention (`custom_quantized_sdpa`) has no fast kernel for x86: a prefill of 476 tokens over
1,500 positions with gemma-3-4b's heads took eight times as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from optimum.executorch.attentions import custom_kv_cache
from optimum.executorch.attentions.custom_sdpa import custom_sdpa_with_start_pos_forward
from optimum.exporters.executorch import integrations

from quantize_gemma.tasks.models.image_attention import MakeMasks, attend_in_image
from quantize_gemma.tasks.runtime.patches import replaced
from quantize_gemma.tasks.runtime.patches.private_api import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig


INT8_MAX = 127
# XNNPACK's conversion between int8 and float32 without scaling: scale, zero point, minimum, maximum, dtype. Its kernel
# is ten times as fast as the portable one of Tensor.to(). The scales differ by position and are multiplied separately.
UNIT = 1.0, 0, -128, INT8_MAX, torch.int8


class CachedTensor(torch.nn.Module):
    """The keys or the values of one layer: float32, or int8 with a scale for each position and head."""

    data: Tensor
    scales: Tensor | None

    def __init__(self, slots: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        # The layout that ExecuTorch's kernels need.
        shape = 1, slots, heads
        self.register_buffer("data", torch.zeros(*shape, head_dim, dtype=dtype), persistent=False)
        scales = torch.zeros(*shape, 1) if dtype == torch.int8 else None
        self.register_buffer("scales", scales, persistent=False)

    @property
    def parts(self) -> list[Tensor]:
        """The cached tensors: values, and scales if there are any."""
        return [self.data] if self.scales is None else [self.data, self.scales]

    def encode(self, values: Tensor) -> list[Tensor]:
        """Return the parts of float32 values, [1, tokens, heads, head_dim]."""
        if self.scales is None:
            return [values]
        scales = values.abs().amax(-1, keepdim=True).clamp(min=1e-9) / INT8_MAX
        return [torch.ops.quantized_decomposed.quantize_per_tensor(values / scales, *UNIT), scales]

    def decode(self, parts: list[Tensor]) -> Tensor:
        """Return the float32 values of parts."""
        if self.scales is None:
            return parts[0]
        integers: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(parts[0], *UNIT)
        return integers * parts[1]


class FullCache(torch.nn.Module):
    """Keys and values of all positions; position p is in slot p."""

    def __init__(self, max_seq_len: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys = CachedTensor(max_seq_len, heads, head_dim, dtype)
        self.values = CachedTensor(max_seq_len, heads, head_dim, dtype)

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, and return those of all slots, [1, heads, max_seq_len, head_dim].

        Args:
            input_pos: The new tokens' positions, [tokens].
            k_val: Their keys, [1, heads, tokens, head_dim].
            v_val: Their values, likewise.
        """
        start = input_pos[0].item()
        return self._write(self.keys, k_val, start), self._write(self.values, v_val, start)

    def _write(self, cache: CachedTensor, new: Tensor, start: float) -> Tensor:
        for buffer, part in zip(cache.parts, cache.encode(new.transpose(1, 2)), strict=True):
            torch.ops.llama.update_cache(part, buffer, start)
        return cache.decode(cache.parts).transpose(1, 2)


class RingCache(torch.nn.Module):
    """Keys and values of the last `window` positions; position p is in slot p % window."""

    def __init__(self, window: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.window = window
        self.keys = CachedTensor(window, heads, head_dim, dtype)
        self.values = CachedTensor(window, heads, head_dim, dtype)

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, and return all keys and values that the new tokens may attend to.

        Args:
            input_pos: The new tokens' positions, [tokens].
            k_val: Their keys, [1, heads, tokens, head_dim].
            v_val: Their values, likewise.

        Returns:
            Keys and values, [1, heads, window + tokens, head_dim]: the old ones from the ring, then the new ones.
        """
        slots = (input_pos % self.window)[None]
        return self._append(self.keys, k_val, slots), self._append(self.values, v_val, slots)

    def _append(self, cache: CachedTensor, new: Tensor, slots: Tensor) -> Tensor:
        combined = []
        for buffer, part in zip(cache.parts, cache.encode(new.transpose(1, 2)), strict=True):
            combined.append(torch.cat([buffer, part], dim=1))
            # The new values are read from `combined`, so that no pass can move the write before the read. If two tokens
            # have the same slot, the kernel writes the last one last; with indices, it ignores the start position.
            torch.ops.llama.update_cache_with_indices(combined[-1][:, self.window :], buffer, 0, slots)
        if cache.scales is None:
            return combined[0].transpose(1, 2)
        # What is decoded depends on the new tokens: if it did not, the program would decode all layers' caches at its
        # start, and keep them all in memory until they are used. The new tokens themselves are not rounded.
        before = cache.decode([part[:, : self.window] for part in combined])
        return torch.cat([before, new.transpose(1, 2)], dim=1).transpose(1, 2)


def sliding_mask(positions: Tensor, window: int, is_image: Tensor | None = None) -> Tensor:
    """Return the attention mask, float [tokens, window + tokens], of tokens at `positions` over the ring and the chunk.

    Slots that were not written in this sequence are masked, even if they contain an earlier sequence. If `is_image`, a
    bool scalar, is true, the tokens of the chunk attend to the whole chunk.
    """
    before = positions[:1] - 1
    # In ExecuTorch, the remainder of a negative integer is that of C, not of Python.
    cached = before - (before - torch.arange(window) + window) % window
    # Later than any position.
    cached = torch.where(cached < 0, torch.iinfo(torch.long).max, cached)
    keys, queries = torch.cat([cached, positions]), positions[:, None]
    visible = (keys <= queries) & (keys > queries - window)
    if is_image is not None:
        visible = visible | (is_image & (keys >= positions[:1]) & (keys <= positions[-1:]))
    return torch.where(visible, 0.0, float("-inf"))


def make_masks(max_seq_len: int, window: int) -> MakeMasks:
    """Return the function that creates the masks of a decoder whose tokens may be an image's."""

    def make(positions: Tensor, is_image: Tensor) -> dict[str, Tensor]:
        sliding = is_image if max_seq_len <= window else sliding_mask(positions, window, is_image)
        return {"full_attention": is_image, "sliding_attention": sliding}

    return make


@contextlib.contextmanager
def own_kv_cache(max_seq_len: int, cache_dtype: str) -> Iterator[None]:
    """Export modules with this cache, and its attention and masks, within the context.

    Args:
        max_seq_len: The longest sequence, in tokens.
        cache_dtype: The dtype of the cache: "float32", or "int8" with scales in float32.

    Raises:
        UserError: The installed optimum-executorch would export its own cache.
    """

    class Cache(custom_kv_cache.ETCustomHybridCache):  # type: ignore[misc]
        def __init__(self, config: PreTrainedConfig, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)
            for number, layer in enumerate(self.layers):
                shape = layer.num_heads, layer.head_dim, getattr(torch, cache_dtype)
                is_ring = layer.is_sliding and max_seq_len > config.sliding_window
                self.kv_cache[number] = (
                    RingCache(config.sliding_window, *shape) if is_ring else FullCache(max_seq_len, *shape)
                )

        def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
            # The library's own sizes depend on the number of tokens; `mask` does not need them.
            return max_seq_len, 0

    def replace_cache(
        module: torch.nn.Module, config: PreTrainedConfig, generation_config: GenerationConfig, dtype: torch.dtype
    ) -> torch.nn.Module:
        module.cache = Cache(config, max_batch_size=1, max_cache_len=max_seq_len, dtype=dtype)
        # The export finds the cache's tensors as the module's own buffers.
        for number, layer in enumerate(module.cache.kv_cache):
            for kind, cached in (("key", layer.keys), ("value", layer.values)):
                module.register_buffer(f"{kind}_cache_{number}", cached.data, persistent=False)
                module.register_buffer(f"{kind}_scales_{number}", cached.scales, persistent=False)
        return module

    def mask(*_: object, cache_position: Tensor, local_size: int | None = None, **__: object) -> Tensor | None:
        # Without a mask, attention is causal.
        return None if local_size is None or max_seq_len <= local_size else sliding_mask(cache_position, local_size)

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        scaling: float,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        # A scalar: whether the tokens are an image's.
        is_image = attention_mask if attention_mask is not None and attention_mask.dim() == 0 else None
        masked = attention_mask is not None and is_image is None
        attended: Tensor
        attended, _ = custom_sdpa_with_start_pos_forward(
            module, query, key, value, attention_mask, position_ids, scaling, is_sliding=masked, **kwargs
        )
        if is_image is not None:
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            attended = attend_in_image(attended, is_image, query, key, value, position_ids[0, -1:], scaling)
        return attended, None

    require("optimum-executorch", "1.1.0", custom_kv_cache, "replace_with_et_custom_kv_cache")
    require("optimum-executorch", "1.1.0", integrations, "sdpa_mask_passthrough", "get_custom_sdpa_for_ring_kv_cache")
    with (
        replaced(custom_kv_cache, "replace_with_et_custom_kv_cache", replace_cache),
        replaced(integrations, "sdpa_mask_passthrough", mask),
        replaced(integrations, "get_custom_sdpa_for_ring_kv_cache", lambda _: attention),
    ):
        yield
