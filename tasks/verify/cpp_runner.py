"""ExecuTorch's C++ runner, which phone apps use: loading it, and its inputs for a greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.gemma3 import GEMMA3

if TYPE_CHECKING:
    from executorch.extension.llm.runner import GenerationConfig, MultimodalInput, MultimodalRunner, TextLLMRunner
    from torch import Tensor


def load_runner(program: str, checkpoint: str, multimodal: bool) -> MultimodalRunner | TextLLMRunner:
    """Return a runner of the file `program`, with the checkpoint's tokenizer."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import MultimodalRunner, TextLLMRunner

    return (MultimodalRunner if multimodal else TextLLMRunner)(program, f"{checkpoint}/tokenizer.json")


def runner_inputs(
    segments: Sequence[str | Tensor], multimodal: bool, max_new_tokens: int
) -> tuple[str | Tensor | list[MultimodalInput], GenerationConfig]:
    """Return a runner's prompt, and its configuration for a greedy answer.

    Args:
        segments: The parts of the prompt: texts, and the pixels of images, [1, channels, height, width].
        multimodal: Whether the program takes images; if not, there is one segment.
        max_new_tokens: The maximum number of tokens to generate.
    """
    from executorch.extension.llm.runner import GenerationConfig, make_image_input, make_text_input

    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0.0, echo=False, num_bos=num_bos(segments[0]))
    if not multimodal:
        return segments[0], config
    return [make_text_input(one) if isinstance(one, str) else make_image_input(one) for one in segments], config


def num_bos(first: object) -> int:
    """Return the runner's `num_bos` for a prompt: 0 if it starts with a BOS token, as with the chat template."""
    assert isinstance(first, str), "a prompt begins with a text"
    return 0 if first.startswith(GEMMA3.bos_token) else 1
