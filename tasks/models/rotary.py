"""The program's rotary embeddings: cosines and sines of the positions, computed once for all layers of a kind.

transformers adds a dimension to both in every layer. ExecuTorch's export moves all of these copies to the start of the
graph, because they depend on nothing else, so planned memory contains two tables for each layer until that layer has
run: 71 MB for gemma-3-4b with 1,024 positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers.models.gemma3 import modeling_gemma3

from quantize_gemma.tasks.runtime.patches import replaced
from quantize_gemma.tasks.runtime.patches.private_api import require

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def shared_rotary_tables() -> Iterator[None]:
    """Export modules whose layers share their tables, within the context; the program's outputs do not change.

    Raises:
        UserError: With the installed transformers, every layer would have its own tables.
    """
    embedding = modeling_gemma3.Gemma3RotaryEmbedding
    forward = embedding.forward

    def make_tables(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = forward(self, *args, **kwargs)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotate_half = modeling_gemma3.rotate_half
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin

    require("transformers", "5.0.0rc1", modeling_gemma3, "apply_rotary_pos_emb", "rotate_half")
    with replaced(embedding, "forward", make_tables), replaced(modeling_gemma3, "apply_rotary_pos_emb", rotate):
        yield
