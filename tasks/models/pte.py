"""A program's methods, as ExecuTorch's runtime runs them."""

from pathlib import Path
from typing import Any


class Methods:
    """What a program's users call: embed tokens, encode images, decode with a cache."""

    def __init__(self, program: Path) -> None:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
        import executorch.kernels.quantized  # noqa: F401 (registers operators)
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(program)
        self.multimodal = "text_decoder" in self.program.method_names
        self.embedding = self.program.load_method("token_embedding") if self.multimodal else None
        self.encoder = self.program.load_method("vision_encoder") if self.multimodal else None
        self.decoder = self.program.load_method("text_decoder" if self.multimodal else "forward")
        self.max_seq_len = int(self.program.load_method("get_max_seq_len").execute([])[0])
        self.eos_ids = set(self.program.load_method("get_eos_ids").execute([]))
        # A prompt of a whole sequence would leave no room for an answer.
        self.piece = self.max_seq_len - 1

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

        return torch.stack(self._decode(given, kept, 0)).float()

    def answer(self, ids: list[int], longest: int) -> tuple[list[int], Any]:
        """Returns the greedy answer to a prompt, up to the end of a turn or `longest` tokens, and its logits.

        The prompt is given in one piece, as the C++ runners do; the logits are [tokens, vocabulary].
        """
        import torch

        logits = self._decode(self.embed(torch.tensor([ids])), {len(ids) - 1}, 0)
        tokens = [int(logits[0].argmax())]
        while len(tokens) < longest and tokens[-1] not in self.eos_ids:
            position = len(ids) + len(tokens) - 1
            logits += self._decode(self.embed(torch.tensor([tokens[-1:]])), {position}, position)
            tokens.append(int(logits[-1].argmax()))
        return tokens, torch.stack(logits).float()

    def _decode(self, given: Any, kept: set[int], start: int) -> list[Any]:
        import torch

        first, stop = start, start + given.shape[1]
        ends = sorted({position + 1 for position in kept} | {stop})
        logits = []
        while start < stop:
            end = min(start + self.piece, next(end for end in ends if end > start))
            found = self.decoder.execute([given[:, start - first : end - first], torch.arange(start, end)])[0]
            if end - 1 in kept:
                logits.append(found[0, -1].clone())
            start = end
        return logits
