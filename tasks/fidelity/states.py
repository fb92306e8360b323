"""Hidden states: what a checkpoint's layers hand to its lm_head, at the scored positions of token sequences.

They take some 10 kB a token in the shape of gemma-3-4b-it, where logits take 1 MB: so the hidden states of two models
are kept instead of the two models, and lm_head makes the same logits of them later.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from quantize_gemma.tasks.fidelity import sequences
from quantize_gemma.tasks.fidelity.parts import Parts, digest
from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, drop_vision_tower, load_model
from quantize_gemma.tasks.models.dequantize import dequantize_once
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.machine import trim_memory
from quantize_gemma.tasks.runtime.parent_process import report_progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# How a checkpoint computes: in bfloat16 with quantized activations, or in float32 without.
Variant = Literal["as_shipped", "weights_only"]
# Sequences that are read at once, and lost at most if the stage is killed.
GROUP = 4
# Tokens of the longest answer to a prompt.
ANSWER_TOKENS = 32


def load_layers(checkpoint: Path, variant: Variant, device: str) -> PreTrainedModel:
    """Load a plain or quantized checkpoint to compute hidden states, in the memory of its stored weights at most."""
    model = load_model(checkpoint, torch.bfloat16)
    drop_vision_tower(model)
    model.to(device)
    if variant == "weights_only":
        _compute_in_float32(model)
    else:
        dequantize_once(model)
    gc.collect()  # torchao's modules refer to themselves.
    trim_memory()
    return model


def group_states(
    checkpoint: Path, identity: str, variant: Variant, rows: Sequence[sequences.Sequence], parts: Parts, device: str
) -> Iterator[Path]:
    """Yield a safetensors file with the `hidden` states, [positions, width], of each group of sequences.

    The checkpoint is loaded once, and only if the store does not have all groups.

    Args:
        checkpoint: A plain or quantized checkpoint.
        identity: What identifies its content.
        variant: How it computes.
        rows: The sequences.
        parts: Where finished groups are.
        device: "cpu" or "cuda".
    """
    models: list[PreTrainedModel] = []

    def compute(group: Sequence[sequences.Sequence]) -> dict[str, Tensor]:
        if not models:
            models.append(load_layers(checkpoint, variant, device))
        return {"hidden": hidden_states(models[0], group)}

    for start in range(0, len(rows), GROUP):
        group = rows[start : start + GROUP]
        key = {
            "checkpoint": identity,
            "variant": variant,
            "device": device,
            "sequences": digest([[list(row.ids), row.first] for row in group]),
        }
        yield parts.file("quantize_gemma.tasks.fidelity.states:load_layers", key, functools.partial(compute, group))
        report_progress(start + len(group), len(rows), "windows")


def hidden_states(model: PreTrainedModel, rows: Sequence[sequences.Sequence]) -> Tensor:
    """Return the hidden states at the scored positions, [positions, width], on the CPU.

    Sequences of the same length are read at once, without padding: what it adds would change the last bits.
    """
    states = []
    for _, same in itertools.groupby(rows, key=lambda row: len(row.ids)):
        batch = list(same)
        ids = torch.tensor([row.ids for row in batch], device=model.device)
        with torch.no_grad():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        states += [each[row.first : -1].cpu() for each, row in zip(hidden, batch, strict=True)]
    return torch.cat(states)


def answer_prompts(checkpoint: Path, identity: str, parts: Parts, device: str) -> list[sequences.Sequence]:
    """Return chats with the base model's own greedy answers; none if its tokenizer has no chat template."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.chat import has_chat_template

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if not has_chat_template(tokenizer):
        return []
    prompts = [sequences.format_prompt(prompt, tokenizer) for prompt in sequences.chat_prompts()]
    models: list[PreTrainedModel] = []

    def compute(group: list[list[int]]) -> dict[str, Tensor]:
        if not models:
            models.append(load_layers(checkpoint, "as_shipped", device))
        return {str(number): generate(models[0], ids) for number, ids in enumerate(group)}

    chats = []
    for start in range(0, len(prompts), GROUP):
        group = prompts[start : start + GROUP]
        key = {"checkpoint": identity, "device": device, "prompts": group, "max_new_tokens": ANSWER_TOKENS}
        function = "quantize_gemma.tasks.fidelity.states:generate"
        answers = load_file(parts.file(function, key, functools.partial(compute, group)))
        for number, ids in enumerate(group):
            chats.append(sequences.Sequence((*ids, *answers[str(number)].tolist()), first=len(ids) - 1))
        report_progress(start + len(group), len(prompts), "prompts")
    return chats


def generate(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the greedy answer to a prompt, token ids, with the token that ends it."""
    prompt = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            top_k=None,
            top_p=None,
        )
    answer: Tensor = output[0, len(ids) :].cpu()
    return answer


def _compute_in_float32(model: PreTrainedModel) -> None:
    """Make the model compute in float32 without quantized activations; matrices stay in memory as they are stored."""
    disable_activation_quantization(model)
    # The model that is loaded in bfloat16 has rounded the square root of its width.
    setattr(
        model.get_input_embeddings(),
        GEMMA3.embedding_scale,
        torch.tensor(model.config.get_text_config().hidden_size ** 0.5, device=model.device),
    )
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(getattr(module, "weight", None)) is not torch.nn.Parameter:
                continue
            if isinstance(module, torch.nn.Embedding):
                setattr(parent, name, _StoredEmbedding(module))
            elif isinstance(module, torch.nn.Linear):
                setattr(parent, name, _StoredLinear(module))
    # Scales of quantized weights, and everything small.
    model.to(torch.float32)
    # torchao's embedding would dequantize its whole weight.
    dequantize_once(model, linears=False)


class _StoredLinear(torch.nn.Module):
    stored: tuple[Tensor]

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "Gemma 3's linears have no bias"
        # In a tuple: no parameter that would be converted with the model.
        self.stored = (linear.weight,)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs, self.stored[0].float())


class _StoredEmbedding(torch.nn.Module):
    stored: tuple[Tensor]
    scale: Tensor

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.stored = (embedding.weight,)
        self.register_buffer("scale", getattr(embedding, GEMMA3.embedding_scale))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.stored[0]).float() * self.scale
