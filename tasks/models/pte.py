"""An exported program (`model.pte`) and its methods, as ExecuTorch's Python runtime runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# The constant method of a program whose embeddings have an additional channel that tells images from text.
IMAGE_CHANNEL = "has_image_channel"


def insert_image_features(features: Tensor, embeddings: Tensor, is_image: Tensor) -> Tensor:
    """Return a copy of `embeddings`, [1, tokens, width], with the image's features where `is_image` is true."""
    result = embeddings.clone()
    result[0, is_image] = features.reshape(-1, embeddings.shape[-1])
    return result


class PteProgram:
    """A loaded program: embed tokens, encode images, and decode with a key-value cache.

    Attributes:
        multimodal: Whether the program takes images; a text-only program has only the method `forward`.
        has_image_channel: Whether embeddings have an additional channel, which marks the tokens of an image.
        max_seq_len: The longest sequence, in tokens.
        max_chunk: The maximum number of tokens that one call of the decoder takes.
        eos_ids: The tokens that end a turn.
    """

    def __init__(self, path: Path) -> None:
        """Load `path`, a .pte file."""
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
        import executorch.kernels.quantized  # noqa: F401 (registers operators)
        from executorch.runtime import Runtime

        self._program = Runtime.get().load_program(path)
        self.multimodal = "text_decoder" in self._program.method_names
        self.has_image_channel = IMAGE_CHANNEL in self._program.method_names
        self._embedding = self._program.load_method("token_embedding") if self.multimodal else None
        self._encoder = self._program.load_method("vision_encoder") if self.multimodal else None
        self._decoder = self._program.load_method("text_decoder" if self.multimodal else "forward")
        self.max_seq_len = int(self._program.load_method("get_max_seq_len").execute([])[0])
        self.eos_ids: set[int] = set(self._program.load_method("get_eos_ids").execute([]))
        # A prompt as long as the sequence would leave no room for an answer.
        self.max_chunk = self.max_seq_len - 1

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return the embeddings of `ids`, [1, tokens, width]; for a text-only program, `ids` themselves.

        The width is the hidden size, plus one if there is an image channel.
        """
        import torch

        if self._embedding is None:
            return ids
        chunks = [self._embedding.execute([chunk])[0].clone() for chunk in torch.split(ids, self.max_chunk, dim=1)]
        return torch.cat(chunks, dim=1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Return the image's embeddings, [1, tokens per image, width], of pixels [1, channels, height, width]."""
        assert self._encoder is not None, "a text-only program encodes no images"
        features: Tensor = self._encoder.execute([pixel_values])[0].clone()
        return features

    def without_channel(self, embeddings: Tensor) -> Tensor:
        """Return embeddings without the image channel."""
        return embeddings[..., :-1] if self.has_image_channel else embeddings

    def decode(self, inputs: Tensor, positions: set[int], start: int = 0) -> Tensor:
        """Return the logits at `positions`, float32, [positions, vocabulary].

        The sequence is read in chunks that end at these positions, because a program may return only the logits of the
        last token, and so that an image is a separate chunk. All methods share their memory: run nothing else between
        two chunks.

        Args:
            inputs: The output of embed_tokens().
            positions: Positions in the sequence, from 0.
            start: The position of the first input; 0 begins a new sequence.
        """
        import torch

        first, stop = start, start + inputs.shape[1]
        edges = self._image_edges(inputs, start)
        ends = sorted({position + 1 for position in positions} | {stop} | edges)
        if self.has_image_channel:
            cuts = {end for end in ends if end < stop and inputs[0, end - first, -1] > 0} - edges
            assert not cuts, f"an image would be cut at {cuts}, and its tokens would not see each other"
        logits = []
        while start < stop:
            end = min(start + self.max_chunk, next(end for end in ends if end > start))
            output = self._decoder.execute([inputs[:, start - first : end - first], torch.arange(start, end)])[0]
            if end - 1 in positions:
                logits.append(output[0, -1].clone())
            start = end
        return torch.stack(logits).float()

    def generate(self, prompt: Tensor, max_new_tokens: int) -> tuple[list[int], Tensor]:
        """Return the greedy answer to a prompt, and the logits that chose it, [tokens, vocabulary].

        The answer ends with the turn, with the longest sequence, or after `max_new_tokens`.

        Args:
            prompt: What embed_tokens() returns, maybe with an image's features.
            max_new_tokens: The maximum number of tokens to generate.
        """
        import torch

        tokens, logits = zip(*itertools.islice(self._steps(prompt), max_new_tokens), strict=True)
        return list(tokens), torch.stack(logits)

    def generate_until(self, prompt: Tensor, is_finished: Callable[[list[int]], bool]) -> tuple[list[int], bool]:
        """Return the greedy answer to a prompt, and whether it ended before the end of the longest sequence.

        Args:
            prompt: What embed_tokens() returns, maybe with an image's features.
            is_finished: Called with the tokens so far; the answer also ends with the turn.
        """
        tokens: list[int] = []
        for token, _ in self._steps(prompt):
            tokens.append(token)
            if is_finished(tokens):
                return tokens, True
        return tokens, tokens[-1] in self.eos_ids

    def _steps(self, prompt: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each token of the greedy answer, and the logits that chose it, until the turn or the sequence ends.

        A text is read in one chunk, as the C++ runners do.
        """
        import torch

        position, inputs = 0, prompt
        while position < self.max_seq_len:
            end = position + inputs.shape[1]
            logits = self.decode(inputs, {end - 1}, position)[0]
            token = int(logits.argmax())
            yield token, logits
            if token in self.eos_ids:
                return
            position, inputs = end, self.embed_tokens(torch.tensor([[token]]))

    def _image_edges(self, inputs: Tensor, start: int) -> set[int]:
        """Return the positions at which an image begins, or the text after it."""
        if not self.has_image_channel:
            return set()
        is_image = inputs[0, :, -1] > 0
        return {start + 1 + int(before) for before in (is_image[1:] != is_image[:-1]).nonzero()}
