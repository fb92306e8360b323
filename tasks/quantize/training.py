"""Train a student: batches, learning rate schedule, early stopping, and the state between steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from quantize_gemma.tasks.models.recipe import HELD_OUT, LOGITS, MEASUREMENTS, STEP_POSITIONS, STEP_SEQUENCES
from quantize_gemma.tasks.quantize.student import Student, kl_divergence
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.reporting import log, report_progress

if TYPE_CHECKING:
    from torch import Tensor

    from quantize_gemma.tasks.models.recipe import Distillation

# Warmup steps of the learning rate.
WARMUP = 10
# Training stops after this many measurements in a row without improvement.
PATIENCE = 6
BETAS = 0.9, 0.95
SEED = 0


@dataclass
class State:
    """The training state.

    Attributes:
        step: The number of completed steps.
        best: The lowest KL divergence on the held-out sequences so far.
        history: The measured KL divergences, each with its step.
        tensors: The trained parameters ("change"), their best values ("best"), and Adam's moments ("first", "second"),
            by "<kind>/<module>".
    """

    step: int = 0
    best: float = math.inf
    history: list[tuple[int, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def stops(self, steps: int) -> bool:
        """Tell whether training is finished: all steps are done, or PATIENCE measurements brought no improvement."""
        kls = [kl for _, kl in self.history]
        return self.step >= steps or (bool(kls) and len(kls) - 1 - kls.index(min(kls)) >= PATIENCE)


@dataclass(frozen=True)
class TrainingData:
    """The training data of a student.

    Attributes:
        embed: Embeds sequences of token ids: float32, [sequences, length, width].
        tokens: Token ids, [sequences, length].
        targets: The base model's last hidden states for them, normalized, [sequences, length, width].
        base_head: The base model's head.
    """

    embed: Callable[[Tensor], Tensor]
    tokens: Tensor
    targets: Tensor
    base_head: torch.nn.Module


def train(
    student: Student, data: TrainingData, settings: Distillation, state: State, save: Callable[[State], None]
) -> None:
    """Train a student, and set it to the parameters that were best on the held-out sequences.

    Args:
        student: The student.
        data: Its training data.
        settings: The recipe's distillation settings.
        state: The state to start from; updated in place.
        save: Called with the state after each measurement.

    Raises:
        UserError: The training diverges.
    """
    changes = student.changes()
    _load_parameters(changes, state)
    optimizer = torch.optim.Adam(changes.values(), lr=settings.learning_rate, betas=BETAS)
    _load_moments(optimizer, changes, state)
    held_out, training_sequences = split(len(data.tokens))
    interval = -(-settings.steps // MEASUREMENTS)
    if not state.history:
        _add_measurement(state, measure(student, data, held_out), changes)
    while not state.stops(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(state.step, settings.steps)
        sequences, positions = choose_batch(training_sequences, state.step, data.tokens.shape[1])
        optimizer.zero_grad()
        _add_gradients(student, data, sequences, positions)
        optimizer.step()
        state.step += 1
        report_progress(state.step, settings.steps, "steps")
        if state.step % interval and state.step != settings.steps:
            continue
        _add_measurement(state, measure(student, data, held_out), changes)
        _store_state(optimizer, changes, state)
        save(state)
    with torch.no_grad():
        for name, change in changes.items():
            change.copy_(state.tensors[f"best/{name}"])


def _add_measurement(state: State, kl: float, changes: dict[str, torch.nn.Parameter]) -> None:
    """Add a measurement to the state, and the parameters if it is the best. Raises UserError if it is not finite."""
    if not math.isfinite(kl):
        raise UserError(
            f"the distillation diverged (the KL divergence is {kl} after {state.step} steps): use a smaller "
            "learning_rate in the recipe"
        )
    log(f"KL divergence on the held-out sequences after {state.step} steps: {kl:.4f} nats")
    state.history.append((state.step, kl))
    if kl < state.best:
        state.best = kl
        state.tensors |= {f"best/{name}": change.detach().clone() for name, change in changes.items()}


def measure(student: Student, data: TrainingData, held_out: list[int]) -> float:
    """Return the mean KL divergence, in nats, on the held-out sequences."""
    length = data.tokens.shape[1]
    positions = torch.arange(0, length, max(length // STEP_POSITIONS, 1))[None]
    losses = []
    with torch.no_grad():
        for sequence in held_out:
            inputs, targets = _states(student, data, torch.tensor([sequence]), positions)
            losses.append(float(kl_divergence(student.head, inputs, data.base_head, targets)))
    return sum(losses) / len(losses)


def choose_batch(training_sequences: list[int], step: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the sequences of a step, and the positions in the loss, [STEP_SEQUENCES, STEP_POSITIONS].

    They depend only on the step. An epoch uses every sequence once.
    """
    numbers = [step * STEP_SEQUENCES + index for index in range(STEP_SEQUENCES)]
    generator = torch.Generator()
    sequences = []
    for number in numbers:
        epoch, offset = divmod(number, len(training_sequences))
        order = torch.randperm(len(training_sequences), generator=generator.manual_seed(SEED + epoch))
        sequences.append(training_sequences[int(order[offset])])
    generator.manual_seed(SEED + 2**32 + step)
    positions = [torch.randperm(length, generator=generator)[:STEP_POSITIONS].sort().values for _ in numbers]
    return torch.tensor(sequences), torch.stack(positions)


def _add_gradients(student: Student, data: TrainingData, sequences: Tensor, positions: Tensor) -> None:
    """Add the gradients of the mean KL divergence at some positions; the head works on LOGITS of them at a time."""
    outputs, targets = _states(student, data, sequences, positions)
    inputs = outputs.detach().requires_grad_()
    for piece, target in zip(torch.split(inputs, LOGITS), torch.split(targets, LOGITS), strict=True):
        loss = kl_divergence(student.head, piece, data.base_head, target) * (len(piece) / len(inputs))
        loss.backward()  # type: ignore[no-untyped-call]
    outputs.backward(inputs.grad)  # type: ignore[no-untyped-call]


def _states(student: Student, data: TrainingData, sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of the student's head and of the base model's head at some positions, [tokens, width]."""
    outputs = student(data.embed(data.tokens[sequences]))
    device = outputs.device
    rows = torch.arange(len(sequences), device=device)[:, None]
    targets = data.targets[sequences[:, None].to(device), positions.to(device)]
    return outputs[rows, positions.to(device)].flatten(0, 1), targets.flatten(0, 1)


def split(count: int) -> tuple[list[int], list[int]]:
    """Return the held-out sequences, and the ones to train on."""
    held_out = [number for number in range(count) if number % HELD_OUT == HELD_OUT // 2]
    # If there are only a few sequences, hold out the last one.
    held_out = held_out or [count - 1]
    return held_out, [number for number in range(count) if number not in held_out]


def _schedule(step: int, steps: int) -> float:
    """Return the factor for the learning rate: linear warmup, then cosine decay."""
    return min((step + 1) / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _load_parameters(changes: dict[str, torch.nn.Parameter], state: State) -> None:
    with torch.no_grad():
        for name, change in changes.items():
            if f"change/{name}" in state.tensors:
                change.copy_(state.tensors[f"change/{name}"])


def _load_moments(optimizer: torch.optim.Adam, changes: dict[str, torch.nn.Parameter], state: State) -> None:
    for name, change in changes.items():
        if f"first/{name}" in state.tensors:
            optimizer.state[change] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"first/{name}"].to(change.device),
                "exp_avg_sq": state.tensors[f"second/{name}"].to(change.device),
            }


def _store_state(optimizer: torch.optim.Adam, changes: dict[str, torch.nn.Parameter], state: State) -> None:
    for name, change in changes.items():
        moments = optimizer.state[change]
        state.tensors[f"change/{name}"] = change.detach()
        state.tensors[f"first/{name}"], state.tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
