"""Distill: train the scales and the norms of a quantized checkpoint to minimize the KL divergence from its base model.

The integers, the embedding, and the vision tower do not change, and neither do format and size: trained scales are
positive bfloat16 numbers, and norms are in bfloat16. In training, activations are quantized as in the program.

The base model runs once over all tokens, one block at a time; its last hidden states are stored as an artifact. So is
the training state at the last measurement, from which a run that was killed resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.calibration import DISTILLATION, read_calibration
from quantize_gemma.tasks.models.checkpoint import linear_shapes, read_header
from quantize_gemma.tasks.models.float32 import fast_products
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import Recipe, Rule, match_rules
from quantize_gemma.tasks.quantize.algorithms import dequantize
from quantize_gemma.tasks.quantize.calibrated import digest_tokens
from quantize_gemma.tasks.quantize.source import (
    QUANTIZED,
    SourceTensor,
    decoder_prefix,
    embed,
    look_up,
    open_tensors,
    read_block,
    read_rows,
)
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Gemma3TextConfig

    from quantize_gemma.tasks.quantize.student import Student
    from quantize_gemma.tasks.quantize.training import State, TrainingData

TARGETS, STATE = "distill-targets", "distill-state"
WEIGHTS = "model.safetensors"
Sources = Mapping[str, SourceTensor]


@stage(accelerated=True, resumes=True, memory=1.5)
def distill(
    target: Path,
    checkpoint: Path,
    base: Path,
    recipe: dict[str, object],
    device: str,
    calibration: Path,
    refresh: bool = False,
) -> Output:
    """Fill `target` with the quantized checkpoint, with trained scales and norms.

    Args:
        target: An empty directory.
        checkpoint: The quantized checkpoint.
        base: The untied checkpoint that it was quantized from.
        recipe: The recipe as JSON values; see Recipe.to_json.
        device: cpu, or cuda, which sums in a different order.
        calibration: The output of calibrate(): the tokens to train on.
        refresh: Start again, even if the store has a state to resume from.

    Returns:
        The number of sequences and of steps, and the history of the KL divergence on held-out sequences, in nats.

    Raises:
        UserError: The training diverges.
    """
    import torch

    from quantize_gemma.tasks.quantize.blocks import load_text_config, round_sum
    from quantize_gemma.tasks.quantize.training import TrainingData, split

    parsed_recipe = Recipe.from_json(recipe)
    assert parsed_recipe.distillation is not None, f"{parsed_recipe.name} has no distillation"
    tokens = torch.tensor(read_calibration(calibration, DISTILLATION))
    config = load_text_config(base)
    with contextlib.ExitStack() as stack:
        sources = stack.enter_context(open_tensors(base))
        quantized = stack.enter_context(open_tensors(checkpoint, QUANTIZED))
        root, digests = stack.enter_context(store.open_store({"checkpoint": checkpoint, "base": base}))
        stack.enter_context(fast_products())
        rules = match_rules(parsed_recipe, linear_shapes({name: source.shape for name, source in sources.items()}))
        run_identity = {"tokens": digest_tokens(tokens), "device": device, "threads": torch.get_num_threads()}
        base_identity = {"base": digests["base"], **run_identity} if digests else run_identity
        targets = _base_states(base, sources, tokens, device, root, base_identity)
        student = _load_student(config, quantized, rules, device)
        head = _base_head(sources, device)
        data = TrainingData(_Embedding(quantized, device), tokens, targets.to(device), head)
        identity = {**digests, "settings": asdict(parsed_recipe.distillation), **run_identity}
        state = _train_in_store(student, data, parsed_recipe, root, identity, refresh)
    tensors = _trained_tensors(student)
    _write_checkpoint(target, checkpoint, tensors)
    return {
        "metadata": {
            "sequences": len(tokens) - len(split(len(tokens))[0]),
            "held_out": len(split(len(tokens))[0]),
            "steps": state.step,
            "held_out_kl": [{"step": step, "kl": round_sum(kl)} for step, kl in state.history],
        }
    }


class _Embedding:
    """Embed token ids with a quantized checkpoint's rows, as its decoder does."""

    def __init__(self, quantized: Sources, device: str) -> None:
        module = f"{decoder_prefix(quantized)}{GEMMA3.embedding_module}"
        self.integers, self.scales = quantized[f"{module}._weight_qdata"], quantized[f"{module}._weight_scale"]
        self.device = device

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the embeddings, float32, [..., width]."""
        integers, row_numbers = look_up(self.integers, tokens)
        rows = dequantize(integers, look_up(self.scales, tokens)[0])
        return embed(rows, row_numbers).to(self.device)


def _base_states(base: Path, sources: Sources, tokens: Tensor, device: str, root: Path, identity: JsonObject) -> Tensor:
    """Return the base model's last hidden states, normalized, float32, [sequences, length, width], from the store."""
    from safetensors.torch import load_file, save_file

    def write(target: Path) -> JsonObject:
        save_file({"states": _run_base(base, sources, tokens, device).cpu()}, target / "states.safetensors")
        return {"metadata": {}}

    key = store.key(TARGETS, [], identity, fingerprint(f"{__name__}:_run_base"))
    with store.keep_pinned():
        artifact = store.produce(TARGETS, key, write, root, pinned=True)
        states: Tensor = load_file(artifact.path / "states.safetensors")["states"]
        return states


@fast_products()
def _run_base(base: Path, sources: Sources, tokens: Tensor, device: str) -> Tensor:
    import torch

    from quantize_gemma.tasks.quantize.blocks import Block, load_norm, load_text_config, run_full_block, run_to_end

    config = load_text_config(base)
    prefix = decoder_prefix(sources)
    hidden = embed(*look_up(sources[f"{prefix}{GEMMA3.embedding_module}.weight"], tokens)).to(device)
    norm = load_norm(config, read_rows(sources[f"{prefix}norm.weight"]).to(device))
    with torch.no_grad():
        for number in range(config.num_hidden_layers):
            block = Block(config, number, read_block(sources, f"{prefix}layers.{number}.", device))
            run_to_end(run_full_block(block, hidden))
            report_progress(number + 1, config.num_hidden_layers, "blocks of the base model")
        for sequence in hidden:
            sequence.copy_(norm(sequence))
    return hidden


def _load_student(config: Gemma3TextConfig, quantized: Sources, rules: Mapping[str, Rule], device: str) -> Student:
    from quantize_gemma.tasks.models.dequantize import FakeQuantize
    from quantize_gemma.tasks.quantize.student import Student, TrainedLinear

    prefix = decoder_prefix(quantized)
    linears, weights = {}, {}
    fake_quantize = FakeQuantize()
    for name, source in quantized.items():
        module, _, part = name.rpartition(".")
        if not name.startswith((f"{prefix}layers.", f"{prefix}norm.", f"{GEMMA3.head_module}.")):
            continue
        if part == "weight":
            weights[name] = read_rows(source).view(source.shape).to(device)
        elif part == "_weight_qdata":
            scales = read_rows(quantized[f"{module}._weight_scale"]).to(device)
            activation = None if rules[module].activation is None else fake_quantize
            linears[module] = TrainedLinear(read_rows(source).to(device), scales, activation)
    return Student(config, prefix, weights, linears)


def _base_head(sources: Sources, device: str) -> torch.nn.Module:
    from quantize_gemma.tasks.quantize.blocks import StoredLinear

    return StoredLinear(read_rows(sources[f"{GEMMA3.head_module}.weight"]).to(device))


def _train_in_store(
    student: Student, data: TrainingData, recipe: Recipe, root: Path, identity: JsonObject, refresh: bool
) -> State:
    """Train the student, resuming from a state in the store and saving it there; return the final state."""
    from safetensors.torch import load_file, save_file

    from quantize_gemma.tasks.quantize.training import State, train

    assert recipe.distillation is not None
    key = store.key(STATE, [], identity, fingerprint(f"{__name__}:distill"))
    state = State()
    with store.keep_pinned():
        artifact = None if refresh else store.pin(STATE, key, root)
        if artifact is not None:
            state = State(**artifact.metadata["state"], tensors=load_file(artifact.path / "state.safetensors"))

    def save(current: State) -> None:
        def write(target: Path) -> JsonObject:
            tensors = {name: tensor.contiguous().cpu() for name, tensor in current.tensors.items()}
            save_file(tensors, target / "state.safetensors")
            return {"metadata": {"state": {"step": current.step, "best": current.best, "history": current.history}}}

        store.produce(STATE, key, write, root, refresh=True)

    train(student, data, recipe.distillation, state, save)
    return state


def _trained_tensors(student: Student) -> dict[str, Tensor]:
    """Return the trained tensors in their stored dtype, by name in the loaded model."""
    import torch

    from quantize_gemma.tasks.quantize.student import TrainedLinear

    with torch.no_grad():
        return {
            f"{name}.{'_weight_scale' if isinstance(module, TrainedLinear) else 'weight'}": module.value()
            .to(torch.bfloat16)
            .cpu()
            for name, module in student.trained_modules.items()
        }


def _write_checkpoint(target: Path, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the checkpoint with new values in some of its tensors; link its other files."""
    import torch

    for path in checkpoint.iterdir():
        (store.copy if path.name == WEIGHTS else store.link)(path, target / path.name)
    count = 0
    with (target / WEIGHTS).open("r+b") as file:
        for name, tensor in read_header(checkpoint / WEIGHTS).items():
            values = tensors.get(GEMMA3.runtime_name(name))
            if values is None:
                continue
            assert (tuple(values.shape), tensor.end - tensor.start) == (tensor.shape, 2 * prod(tensor.shape)), name
            file.seek(tensor.start)
            file.write(values.contiguous().view(torch.uint8).numpy().data)
            count += 1
    assert count == len(tensors), f"{len(tensors) - count} trained tensors have no place in {checkpoint}"
