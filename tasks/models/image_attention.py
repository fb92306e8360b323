"""The program's attention over the tokens of an image: in both directions, as in the model.

The model lets the tokens of an image attend to each other, in layers with sliding-window and with full attention. The
decoder that optimum-executorch exports takes only embeddings and positions, so it cannot tell an image from text, and
is causal.

MultimodalRunner calls `text_decoder` once for each part of a prompt, with the output of `token_embedding` for text or
of `vision_encoder` for an image, whatever its width (extension/llm/runner/multimodal_prefiller.cpp). Therefore, both
return an additional channel, 0 for text and 1 for an image. A call is for an image if its first token has a 1 there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from optimum.exporters.executorch import integrations
from transformers.integrations.executorch import TorchExportableModuleWithHybridCache

from quantize_gemma.tasks.runtime.patches import replaced
from quantize_gemma.tasks.runtime.patches.private_api import require

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE_INPUTS = "_prepare_decoder_only_export_inputs"
# Creates the mask of each layer type from the tokens' positions, and a scalar: whether they are an image's.
MakeMasks = Callable[["Tensor", "Tensor"], dict[str, "Tensor"]]


class TextEmbedding(torch.nn.Module):
    """A token embedding with the channel that says "text"."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings, [1, tokens, width + 1]."""
        return _append_channel(self.embedding(ids), 0.0)


def attend_in_image(
    causal: Tensor, is_image: Tensor, query: Tensor, key: Tensor, value: Tensor, last: Tensor, scale: float
) -> Tensor:
    """Return the attention of a full layer: bidirectional over an image if `is_image`, a bool scalar, else `causal`.

    Args:
        causal: The causal attention, [1, tokens, heads, head_dim].
        is_image: Whether the tokens are an image's.
        query: The tokens' queries, of the same shape.
        key: The cache's keys, [1, positions, heads, head_dim].
        value: The cache's values, of the same shape.
        last: The position of the last token, [1].
        scale: The factor for attention scores.
    """

    def image(causal: Tensor, query: Tensor, key: Tensor, value: Tensor, last: Tensor) -> Tensor:
        # After the image, the cache has no tokens of this sequence, but may have those of an earlier one.
        visible = torch.arange(key.shape[1])[None] <= last[:, None]
        mask = torch.where(visible, 0.0, float("-inf")).expand(query.shape[1], key.shape[1]).contiguous()
        attended: Tensor = torch.ops.llama.custom_sdpa(query, key, value, 0, mask, 0.0, False, scale)
        return attended

    def text(causal: Tensor, query: Tensor, key: Tensor, value: Tensor, last: Tensor) -> Tensor:
        return causal.clone()

    attended: Tensor = torch.cond(is_image, image, text, (causal, query, key, value, last))
    return attended


@contextlib.contextmanager
def bidirectional_attention(module: Any, make_masks: MakeMasks) -> Iterator[None]:
    """Export optimum-executorch's module of a multimodal model with the additional channel, within the context.

    Raises:
        UserError: The installed libraries would export a causal program.
    """
    require("optimum-executorch", "1.1.0", type(module), EXAMPLE_INPUTS)
    embedding, example_inputs = module.model.get_input_embeddings(), getattr(module, EXAMPLE_INPUTS)
    encode = integrations.VisionExportableModule.forward

    def decoder_inputs(max_seq_len: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        embeddings, positions, dynamic_shapes = example_inputs(max_seq_len)
        return _append_channel(embeddings, 0.0), positions, dynamic_shapes

    def decode(
        self: TorchExportableModuleWithHybridCache,
        input_ids: None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
    ) -> Tensor:
        assert inputs_embeds is not None
        assert cache_position is not None
        masks = make_masks(cache_position, inputs_embeds[0, 0, -1] > 0)
        logits: Tensor = self.model(
            inputs_embeds=inputs_embeds[..., :-1],
            cache_position=cache_position,
            attention_mask=masks,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits

    def encode_image(self: torch.nn.Module, input_features: Tensor) -> Tensor:
        return _append_channel(encode(self, input_features), 1.0)

    # With gradients, passes that run a graph again fail at torch.cond, whose schema is traced without symbols.
    module.model.requires_grad_(requires_grad=False)
    with (
        replaced(module, EXAMPLE_INPUTS, decoder_inputs),
        replaced(module.model, "get_input_embeddings", lambda: TextEmbedding(embedding)),
        replaced(integrations.VisionExportableModule, "forward", encode_image),
        replaced(TorchExportableModuleWithHybridCache, "forward", decode),
    ):
        yield


def _append_channel(embeddings: Tensor, value: float) -> Tensor:
    channel = torch.full((*embeddings.shape[:-1], 1), value)
    return torch.cat([embeddings, channel], dim=-1)
