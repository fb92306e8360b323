"""Compare two models' predictions for each token: apply their heads to hidden states, a few positions at a time.

The logits of 512 tokens over Gemma's vocabulary of 262,144 take 0.5 GB per model, so only those of CHUNK positions are
in memory at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize_gemma.tasks.fidelity.sequences import Variant
from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, load_model
from quantize_gemma.tasks.models.dequantize import replace_quantized_modules
from quantize_gemma.tasks.models.float32 import fast_products
from quantize_gemma.tasks.runtime.machine import trim_memory

if TYPE_CHECKING:
    from torch import Tensor

# Positions whose logits are in memory at once.
CHUNK = 64

# Hidden states, [positions, width] -> logits, [positions, vocabulary].
Head = Callable[["Tensor"], "Tensor"]


def load_head(checkpoint: Path, variant: Variant, device: str) -> Head:
    """Load a checkpoint's lm_head."""
    model = load_model(checkpoint, torch.bfloat16)
    model.model = _Passthrough()
    gc.collect()
    model.to(device)
    if variant == "weights_only":
        disable_activation_quantization(model)
        model.to(torch.float32)
    replace_quantized_modules(model, "all")
    gc.collect()
    trim_memory()

    def head(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(inputs_embeds=hidden.to(device)[None]).logits[0]
        return logits

    return head


def compare_states(
    base: tuple[Head, Tensor], other: tuple[Head, Tensor], targets: Tensor, chunk: int = CHUNK
) -> dict[str, Tensor]:
    """Return compare_logits() for two models' heads and hidden states.

    Args:
        base: The base model's head, and its hidden states, [positions, width].
        other: The other model's.
        targets: The tokens that follow, [positions].
        chunk: The number of positions whose logits are computed at once.
    """
    rows = []
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        with fast_products():
            logits, other_logits = (head(states[part]) for head, states in (base, other))
        rows.append(compare_logits(logits, other_logits, targets[part].to(logits.device)))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def compare_logits(base: Tensor, other: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compare the predictions of two models, with log-softmax in float32.

    Args:
        base: The base model's logits, [positions, vocabulary].
        other: The other model's.
        targets: The tokens that follow, [positions].

    Returns:
        By name, [positions] each, on the CPU: `kl`, the KL divergence from the base model in nats; `same_top`, 1 where
        the most likely token is the same; `nll_base` and `nll`, the token's negative log-likelihood in nats.
    """
    logs, other_logs = (torch.log_softmax(logits.float(), dim=-1) for logits in (base, other))
    # bfloat16 logits can be equal; then the first of them is the top token in both models.
    same_top = logs.argmax(-1) == other_logs.argmax(-1)
    nll_base, nll = (-row_logs.gather(1, targets[:, None])[:, 0] for row_logs in (logs, other_logs))
    differences = logs - other_logs
    kl = logs.exp_().mul_(differences).sum(-1)
    columns = {"kl": kl, "same_top": same_top.float(), "nll_base": nll_base, "nll": nll}
    return {name: column.cpu() for name, column in columns.items()}


class _Passthrough(torch.nn.Module):
    """Replacement for a model's layers: return `inputs_embeds` as the hidden states."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3ModelOutputWithPast

        return Gemma3ModelOutputWithPast(last_hidden_state=inputs_embeds)
