"""The program's key-value cache: prompts of any length, sequences longer than the sliding window.

The runners of phone apps hand a prompt to the program as one piece: MultimodalRunner cuts nothing, and TextLLMRunner
cuts by get_max_seq_len only, but lets answers run past the end of the cache if that is less than get_max_context_len
(v1.4.1, extension/llm/runner/). So a piece must be allowed to be as long as the whole sequence. optimum-executorch's
ring of twice the window takes no more than a window at once: of a longer piece the first tokens' keys are overwritten
before they are used.

Here a sliding layer's attention sees what the ring holds and, behind it, the piece itself, before the ring is
updated. So a ring of one window does for pieces of any length, and takes half the memory. Where no sequence is longer
than the window, sliding layers are no different from the others.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from executorch.examples.models.llama.source_transformation.custom_kv_cache import CustomKVCache
from optimum.executorch.attentions import custom_kv_cache
from optimum.executorch.attentions.custom_sdpa import custom_sdpa_with_start_pos_forward
from optimum.exporters.executorch import integrations

from quantize_gemma.tasks.runtime.patches import replaced
from quantize_gemma.tasks.runtime.patches.private_api import require


class RingCache(torch.nn.Module):
    """Keys and values of the last `window` positions; position p is in slot p % window."""

    def __init__(self, window: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.window = window
        # As ExecuTorch's kernels want it.
        self.register_buffer("k_cache", torch.zeros(1, window, heads, head_dim, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(1, window, heads, head_dim, dtype=dtype), persistent=False)

    def update(self, input_pos: Any, k_val: Any, v_val: Any) -> tuple[Any, Any]:
        """Returns keys and values, [1, heads, window + tokens, head_dim]: the ring's as they were, then the new ones.

        New ones are [1, heads, tokens, head_dim], and their positions [tokens].
        """
        slots = (input_pos % self.window)[None]
        return self._append(self.k_cache, k_val, slots), self._append(self.v_cache, v_val, slots)

    def _append(self, cache: Any, new: Any, slots: Any) -> Any:
        seen = torch.cat([cache, new.transpose(1, 2)], dim=1)
        # What is written comes from `seen`, so that no pass can move the writing before the reading. Of tokens with the
        # same slot the kernel writes the last one last. With indices it takes no notice of the start position.
        torch.ops.llama.update_cache_with_indices(seen[:, self.window :], cache, 0, slots)
        return seen.transpose(1, 2)


def sliding_mask(positions: Any, window: int) -> Any:
    """Returns the float mask, [tokens, window + tokens], of tokens at these positions over ring and piece.

    A slot that nothing was written to in this sequence is hidden, whatever an earlier sequence left there.
    """
    before = positions[:1] - 1
    # ExecuTorch's remainder of a negative integer is C's, not Python's.
    held = before - (before - torch.arange(window) + window) % window
    # Later than any position there is.
    held = torch.where(held < 0, torch.iinfo(torch.long).max, held)
    keys, queries = torch.cat([held, positions]), positions[:, None]
    visible = (keys <= queries) & (keys > queries - window)
    return torch.where(visible, 0.0, float("-inf"))


@contextlib.contextmanager
def long_pieces(max_seq_len: int) -> Iterator[None]:
    """Modules that optimum-executorch exports get this cache, and the attention and the mask that go with it.

    Raises UserError if the installed one is so different that they would be exported with its own.
    """

    class Cache(custom_kv_cache.ETCustomHybridCache):
        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)
            for number, layer in enumerate(self.layers):
                if layer.is_sliding:
                    shape = layer.num_heads, layer.head_dim, kwargs["dtype"]
                    short = max_seq_len <= config.sliding_window
                    self.kv_cache[number] = (
                        CustomKVCache(1, max_seq_len, *shape) if short else RingCache(config.sliding_window, *shape)
                    )

        def get_mask_sizes(self, cache_position: Any, layer_idx: int) -> tuple[int, int]:
            # The library's own depend on how many tokens there are, and `mask` does without.
            return max_seq_len, 0

    def replace_cache(module: Any, config: Any, generation_config: Any, cache_dtype: Any) -> Any:
        module.cache = Cache(config, max_batch_size=1, max_cache_len=max_seq_len, dtype=cache_dtype)
        for number, layer in enumerate(module.cache.kv_cache):
            # The export finds the cache's tensors by being the module's own.
            module.register_buffer(f"key_cache_{number}", layer.k_cache, persistent=False)
            module.register_buffer(f"value_cache_{number}", layer.v_cache, persistent=False)
        return module

    def mask(*_: Any, cache_position: Any, local_size: int | None = None, **__: Any) -> Any:
        # Without a mask the attention is causal.
        return None if local_size is None or max_seq_len <= local_size else sliding_mask(cache_position, local_size)

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        masked = attention_mask is not None
        return custom_sdpa_with_start_pos_forward(
            module, query, key, value, attention_mask, is_sliding=masked, **kwargs
        )

    require("optimum-executorch", "1.1.0", custom_kv_cache, "replace_with_et_custom_kv_cache")
    require("optimum-executorch", "1.1.0", integrations, "sdpa_mask_passthrough", "get_custom_sdpa_for_ring_kv_cache")
    with (
        replaced(custom_kv_cache, "replace_with_et_custom_kv_cache", replace_cache),
        replaced(integrations, "sdpa_mask_passthrough", mask),
        replaced(integrations, "get_custom_sdpa_for_ring_kv_cache", lambda _: attention),
    ):
        yield
