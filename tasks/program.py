"""A program's methods, as ExecuTorch's runtime runs them."""

from pathlib import Path
from typing import Any

# No program takes fewer tokens at once than one less than this.
SHORTEST_PIECE = 64


class Methods:
    """What a program's users call: embed tokens, encode images, decode with a cache."""

    def __init__(self, program: Path, config: Any) -> None:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401 (both register operators)
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(program)
        self.multimodal = "text_decoder" in self.program.method_names
        self.piece = min(config.get_text_config().sliding_window, SHORTEST_PIECE) - 1
        self.embedding = self.program.load_method("token_embedding") if self.multimodal else None
        self.encoder = self.program.load_method("vision_encoder") if self.multimodal else None
        self.decoder = self.program.load_method("text_decoder" if self.multimodal else "forward")
        self.max_seq_len = int(self.program.load_method("get_max_seq_len").execute([])[0])

    def embed(self, ids: Any) -> Any:
        """Returns the tokens' embeddings, [1, tokens, hidden size]; of a text-only program the token ids."""
        import torch

        if self.embedding is None:
            return ids
        parts = [self.embedding.execute([part])[0].clone() for part in ids.split(self.piece, dim=1)]
        return torch.cat(parts, dim=1)

    def see(self, pixels: Any) -> Any:
        """Returns the image's embeddings, [1, tokens per image, hidden size]."""
        assert self.encoder is not None
        return self.encoder.execute([pixels])[0].clone()

    def decode(self, given: Any, kept: set[int]) -> Any:
        """Returns the logits at the positions `kept`, [positions, vocabulary], of a sequence of its own.

        It is given in pieces that end at these positions, for a program may return the last one's alone. Position 0
        empties the cache. All methods share their memory, so that nothing else may run between two pieces.
        """
        import torch

        ends = sorted({position + 1 for position in kept} | {given.shape[1]})
        logits = []
        start = 0
        while start < given.shape[1]:
            end = min(start + self.piece, next(end for end in ends if end > start))
            found = self.decoder.execute([given[:, start:end], torch.arange(start, end)])[0]
            if end - 1 in kept:
                logits.append(found[0, -1].clone())
            start = end
        return torch.stack(logits).float()
