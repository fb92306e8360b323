"""Distances between two models' outputs, as rounded numbers for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.metrics import Distance

if TYPE_CHECKING:
    from torch import Tensor


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence from `reference` to `other`, logits [positions, vocabulary], in nats per token."""
    return round(float(_divergences(reference, other).mean()), 6)


def kl_by_position(reference: Tensor, other: Tensor) -> list[float]:
    """Return the KL divergence at each position, in nats."""
    return [round(float(kl), 6) for kl in _divergences(reference, other)]


def same_argmax(reference: Tensor, other: Tensor) -> float:
    """Return the share of positions with the same most likely token."""
    return round(float((reference.argmax(-1) == other.argmax(-1)).float().mean()), 4)


def mean_nll(logits: Tensor, ids: Tensor) -> float:
    """Return the mean negative log-likelihood of `ids`, [tokens], under `logits`, [tokens, vocabulary], in nats."""
    import torch

    return round(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])), 4)


def absolute_difference(reference: Tensor, other: Tensor) -> Distance:
    """Return the largest and the mean absolute difference."""
    difference = (reference.float() - other.float()).abs()
    return Distance(max=round(float(difference.max()), 6), mean=round(float(difference.mean()), 8))


def squared_error(reference: Tensor, other: Tensor) -> float:
    """Return the mean squared error divided by the reference's mean square."""
    return round(float((other - reference).square().mean()) / float(reference.square().mean()), 8)


def _divergences(reference: Tensor, other: Tensor) -> Tensor:
    import torch

    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return (p.exp() * (p - q)).sum(-1)
