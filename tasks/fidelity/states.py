"""Hidden states: the inputs of a checkpoint's lm_head at the scored positions of token sequences.

For gemma-3-4b-it, they take about 10 kB per token, while logits take 1 MB. Therefore, the hidden states of two models
are stored, instead of keeping both models in memory, and lm_head computes the same logits from them later.
"""

from __future__ import annotations

import functools
import gc
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantize_gemma.tasks.fidelity.sequences import (
    Sequence,
    Variant,
    chat_prompts,
    digest_sequences,
    format_prompt,
    split_groups,
)
from quantize_gemma.tasks.fidelity.shards import ShardStore
from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, drop_vision_encoder, load_model
from quantize_gemma.tasks.models.dequantize import replace_quantized_modules
from quantize_gemma.tasks.models.float32 import fast_products
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.machine import trim_memory
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# The maximum number of tokens in an answer to a prompt.
ANSWER_TOKENS = 32
# The functions that compute a shard; their code is part of its key.
MODULE = "quantize_gemma.tasks.fidelity.states"
STATES = (f"{MODULE}:load_layers", f"{MODULE}:hidden_states")
ANSWERS = (f"{MODULE}:load_layers", f"{MODULE}:generate")


def load_layers(checkpoint: Path, variant: Variant, device: str) -> PreTrainedModel:
    """Load a plain or quantized checkpoint to compute hidden states, using only the memory of its stored weights."""
    model = load_model(checkpoint, torch.bfloat16)
    drop_vision_encoder(model)
    model.to(device)
    if variant == "weights_only":
        _compute_in_float32(model)
    else:
        replace_quantized_modules(model)
    gc.collect()  # torchao's modules have reference cycles.
    trim_memory()
    return model


@dataclass(frozen=True)
class Reader:
    """A checkpoint that reads sequences.

    Attributes:
        checkpoint: A plain or quantized checkpoint.
        identity: The digest of its content; None outside a store.
        device: "cpu" or "cuda".
        loaded_on: The device as torch names it, which is not part of any key.
    """

    checkpoint: Path
    identity: str | None
    device: str
    loaded_on: str

    def key(self, variant: Variant) -> JsonObject:
        """Return everything that the hidden states depend on, besides the sequences."""
        return {"checkpoint": self.identity, "variant": variant, "device": self.device}

    def load(self, variant: Variant) -> PreTrainedModel:
        """Load the layers."""
        return load_layers(self.checkpoint, variant, self.loaded_on)


def group_states(
    reader: Reader, variant: Variant, groups: dict[int, list[Sequence]], shards: ShardStore
) -> dict[int, Path]:
    """Return a safetensors file with the `hidden` states, [positions, width], of each group of sequences.

    The checkpoint is loaded once, and only if the store does not have all groups.
    """
    models: list[PreTrainedModel] = []

    def compute(group: list[Sequence]) -> dict[str, Tensor]:
        if not models:
            models.append(reader.load(variant))
        return {"hidden": hidden_states(models[0], group)}

    files = {}
    for index, (number, group) in enumerate(groups.items()):
        key = {**reader.key(variant), "sequences": digest_sequences(group)}
        files[number] = shards.file(STATES, key, functools.partial(compute, group))
        report_progress(index + 1, len(groups), "groups")
    return files


def hidden_states(model: PreTrainedModel, rows: list[Sequence]) -> Tensor:
    """Return the hidden states at the scored positions, [positions, width], on the CPU.

    Sequences of the same length run as a batch, without padding, because padding would change the last bits.
    """
    states = []
    for _, rows_of_length in itertools.groupby(rows, key=lambda row: len(row.ids)):
        batch = list(rows_of_length)
        ids = torch.tensor([row.ids for row in batch], device=model.device)
        with torch.no_grad(), fast_products():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        states += [row_states[row.first : -1].cpu() for row_states, row in zip(hidden, batch, strict=True)]
    return torch.cat(states)


def answer_prompts(reader: Reader, shards: ShardStore, part: int, parts: int) -> dict[int, list[Sequence]]:
    """Return a part's groups of chats with the base model's own greedy answers; none without a chat template."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.chat import has_chat_template

    tokenizer = AutoTokenizer.from_pretrained(reader.checkpoint)
    if not has_chat_template(tokenizer):
        return {}
    # Their answers are not known yet.
    prompts = [Sequence(tuple(format_prompt(prompt, tokenizer))) for prompt in chat_prompts()]
    models: list[PreTrainedModel] = []

    def compute(group: list[Sequence]) -> dict[str, Tensor]:
        if not models:
            models.append(reader.load("as_shipped"))
        return {str(number): generate(models[0], prompt.ids) for number, prompt in enumerate(group)}

    chats = {}
    groups = split_groups(prompts, part, parts)
    for index, (number, group) in enumerate(groups.items()):
        key = {**reader.key("as_shipped"), "prompts": digest_sequences(group), "max_new_tokens": ANSWER_TOKENS}
        answers = load_file(shards.file(ANSWERS, key, functools.partial(compute, group)))
        chats[number] = [
            Sequence((*prompt.ids, *answers[str(row)].tolist()), first=len(prompt.ids) - 1)
            for row, prompt in enumerate(group)
        ]
        report_progress(index + 1, len(groups), "groups of prompts")
    return chats


def generate(model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
    """Return the token ids of the greedy answer to a prompt, including the token that ends it."""
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
    """Make the model compute in float32 without quantized activations; matrices stay in their stored dtype."""
    disable_activation_quantization(model)
    # Loading the model in bfloat16 has rounded the square root of its width.
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
    replace_quantized_modules(model, "none")


class _StoredLinear(torch.nn.Module):
    stored_weight: tuple[Tensor]

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "Gemma 3's linears have no bias"
        # Stored in a tuple, so that it is not a parameter that is converted with the model.
        self.stored_weight = (linear.weight,)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs, self.stored_weight[0].float())


class _StoredEmbedding(torch.nn.Module):
    stored_weight: tuple[Tensor]
    scale: Tensor

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.stored_weight = (embedding.weight,)
        self.register_buffer("scale", getattr(embedding, GEMMA3.embedding_scale))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.stored_weight[0]).float() * self.scale
