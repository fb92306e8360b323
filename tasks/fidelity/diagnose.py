"""Diagnose: the KL divergence that quantizing one module alone causes, for weights and activations separately.

The base model computes in float32. For each linear, its weight is first replaced with the checkpoint's, and then its
input is quantized instead; everything else stays the same. The blocks before the module's block do not change, so the
model runs from that block on. The divergences of all modules do not add up to that of the whole checkpoint, because
errors compound and partly cancel out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.fidelity.sequences import WINDOW, Sequence, digest_sequences, make_windows
from quantize_gemma.tasks.fidelity.shards import ShardStore
from quantize_gemma.tasks.models.checkpoint import quantizable_modules, read_headers
from quantize_gemma.tasks.models.datasets import TEXT_FILE
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.plot_style import GRAY, MARGIN, add_axes, label_logarithmic, new_figure
from quantize_gemma.tasks.models.recipe import Recipe, match_rules
from quantize_gemma.tasks.models.text_fidelity import KINDS, Damage
from quantize_gemma.tasks.runtime import machine, store
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from quantize_gemma.tasks.fidelity.tokens import Head

# Only the first half of a window is read, and only every fourth token is scored, because the model runs hundreds of
# times, and lm_head costs as much as the layers.
LENGTH = WINDOW // 2
POSITIONS = slice(3, LENGTH, 4)
# Positions whose logits are in memory at once, in addition to those of the base model.
CHUNK = 64
HEAT_MAP = "heat-map.png"
BLOCK = re.compile(r"\.layers\.(\d+)\.(.+)$")
# The roles of a block, in the order of computation.
ROLES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
PROBE = ("quantize_gemma.tasks.fidelity.diagnose:Probe",)


@dataclass(frozen=True)
class Module:
    """A linear, the embedding, or lm_head.

    Attributes:
        name: Its name in the loaded model.
        block: The number of its decoder block; None for the embedding and lm_head.
        role: Its name in the block, or "embed_tokens" or "lm_head".
        activations: Whether the recipe quantizes its input.
        parameters: The number of its weights.
    """

    name: str
    block: int | None
    role: str
    activations: bool
    parameters: int


@stage(resumes=True, memory=2.5, accelerated=True)
def diagnose(
    target: Path,
    base: Path,
    checkpoint: Path,
    text: Path,
    recipe: JsonObject,
    windows: int,
    device: str,
    refresh: bool = False,
) -> Output:
    """Write results.json, {"tokens": number of compared tokens, "rows": [text_fidelity.Damage, …]}, and heat-map.png.

    This function has more than seven parameters because each one is part of the stage's cache key.

    Args:
        target: The directory to write to.
        base: The base model's checkpoint.
        checkpoint: The quantized checkpoint.
        text: The directory with the text, text.txt.
        recipe: The recipe of the checkpoint, as JSON.
        windows: The number of windows of the text to read; fewer if it is shorter.
        device: "cpu" or "cuda".
        refresh: Measure blocks again even if they are in the store.

    Raises:
        UserError: The text is shorter than a window, or there is no CUDA device.
    """
    import numpy as np
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.fidelity.summary import mean_and_stderr

    content = (text / TEXT_FILE).read_text(encoding="utf-8")
    rows = make_windows(content, AutoTokenizer.from_pretrained(base), windows)
    groups = group_by_block(text_modules(base, Recipe.from_json(recipe)))
    probe = Probe(base, checkpoint, rows, machine.device_of_part(device, 0))
    measurements = []
    with store.open_store({"base": base, "checkpoint": checkpoint}) as (root, digests):
        shards = ShardStore(root, refresh)
        for index, group in enumerate(groups):
            names = {module.name: module.activations for module in group}
            key = {**digests, "sequences": digest_sequences(rows), "modules": names, "device": device}
            columns = load_file(shards.file(PROBE, key, functools.partial(probe.measure, group)))
            numbers = np.repeat(np.arange(len(rows)), len(range(LENGTH)[POSITIONS]))
            for module in group:
                weights, activations = (
                    mean_and_stderr(columns[name].astype(np.float64), numbers) if name in columns else (None, None)
                    for name in (f"{module.role}.weights", f"{module.role}.activations")
                )
                measurements.append(Damage(module.block, module.role, module.parameters, *weights, *activations))
            report_progress(index + 1, len(groups), "blocks")
    results = {"tokens": len(numbers), "rows": [vars(damage) for damage in measurements]}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw_heat_map(measurements, target / HEAT_MAP)
    return {"metadata": {"modules": len(measurements)}}


def text_modules(base: Path, recipe: Recipe) -> list[Module]:
    """Return the modules of the language model that the recipe quantizes, in the order of computation."""
    modules = quantizable_modules(read_headers(base))
    results = []
    for name, rule in match_rules(recipe, modules).items():
        if GEMMA3.is_vision(name):
            continue
        match = BLOCK.search(name)
        block, role = (int(match[1]), match[2]) if match else (None, name.rpartition(".")[2])
        rows, columns = modules[name]
        results.append(Module(name, block, role, rule.activation is not None, rows * columns))
    last = max(module.block for module in results if module.block is not None)
    outer_order = {GEMMA3.embedding_module: (-1, 0), GEMMA3.head_module: (last + 1, 0)}

    def order(module: Module) -> tuple[int, int]:
        return outer_order[module.role] if module.block is None else (module.block, ROLES.index(module.role))

    return sorted(results, key=order)


def group_by_block(modules: list[Module]) -> list[list[Module]]:
    """Return the modules by their blocks; the embedding and lm_head are blocks of their own."""
    groups: dict[int | str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.role if module.block is None else module.block, []).append(module)
    return list(groups.values())


class Probe:
    """The base model with one changed module at a time; the models are loaded when they are first needed."""

    def __init__(self, base: Path, checkpoint: Path, rows: list[Sequence], device: str) -> None:
        self.base, self.checkpoint, self.rows, self.device = base, checkpoint, rows, device

    def measure(self, modules: list[Module]) -> dict[str, Tensor]:
        """Return the KL divergences of the scored tokens, by "<role>.weights" and "<role>.activations"."""
        import torch

        from quantize_gemma.tasks.models.float32 import fast_products

        columns = {}
        with torch.no_grad(), fast_products():
            for module in modules:
                columns[f"{module.role}.weights"] = self.divergence(module, weights=True)
                if module.activations:
                    columns[f"{module.role}.activations"] = self.divergence(module, weights=False)
        return columns

    def divergence(self, module: Module, weights: bool) -> Tensor:
        """Return the KL divergence of each scored token, with this module's weight, or its input, quantized alone."""
        if module.role == GEMMA3.head_module:
            hidden = self.states[-1]
            head = self.heads[1] if weights else self.heads[0]
            return self.compare(hidden if weights else _fake_quantize(hidden), head)
        if module.block is None:
            ids = self.token_ids
            return self.compare(self.run(0, self.layers[1].get_submodule(module.name)(ids)), self.heads[0])
        with self.swapped(module.name) if weights else self.hooked(module.name):
            return self.compare(self.run(module.block, self.states[module.block]), self.heads[0])

    def compare(self, hidden: Tensor, head: Head) -> Tensor:
        """Return the KL divergences, on the CPU, of hidden states, [windows, positions, width]."""
        import torch

        scored_states = hidden[:, POSITIONS].flatten(0, 1)
        parts = []
        for start in range(0, len(scored_states), CHUNK):
            base = self.log_probabilities[start : start + CHUNK]
            checkpoint_logs = torch.log_softmax(head(scored_states[start : start + CHUNK]), dim=-1)
            parts.append((base.exp() * (base - checkpoint_logs)).sum(-1).cpu())
        return torch.cat(parts)

    def run(self, block: int, hidden: Tensor) -> Tensor:
        """Run the layers from a block on, and the last norm; return the result."""
        text = _language_model(self.layers[0])
        all_layers = text.layers
        text.layers = all_layers[block:]
        try:
            output: Tensor = text(inputs_embeds=hidden, use_cache=False).last_hidden_state
            return output
        finally:
            text.layers = all_layers

    @contextlib.contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Replace the base model's module with the checkpoint's within the context."""
        parent, _, child = name.rpartition(".")
        owner, original = self.layers[0].get_submodule(parent), self.layers[0].get_submodule(name)
        setattr(owner, child, self.layers[1].get_submodule(name))
        try:
            yield
        finally:
            setattr(owner, child, original)

    @contextlib.contextmanager
    def hooked(self, name: str) -> Iterator[None]:
        """Quantize the input of the base model's module within the context."""
        hook = (
            self.layers[0]
            .get_submodule(name)
            .register_forward_pre_hook(lambda _module, inputs: (_fake_quantize(inputs[0]),))
        )
        try:
            yield
        finally:
            hook.remove()

    @functools.cached_property
    def layers(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The layers of the base model and of the checkpoint, in float32 without quantized activations."""
        from quantize_gemma.tasks.fidelity.states import load_layers

        base, checkpoint = (load_layers(path, "weights_only", self.device) for path in (self.base, self.checkpoint))
        return base, checkpoint

    @functools.cached_property
    def heads(self) -> tuple[Head, Head]:
        """The heads of both models."""
        from quantize_gemma.tasks.fidelity.tokens import load_head

        base, checkpoint = (load_head(path, "weights_only", self.device) for path in (self.base, self.checkpoint))
        return base, checkpoint

    @functools.cached_property
    def token_ids(self) -> Tensor:
        """The windows' tokens, [windows, positions]."""
        import torch

        return torch.tensor([row.ids[:LENGTH] for row in self.rows], device=self.device)

    @functools.cached_property
    def states(self) -> list[Tensor]:
        """The input of each block of the base model, and what its last norm returns."""
        states: list[Tensor] = []
        text = _language_model(self.layers[0])
        hooks = [
            layer.register_forward_pre_hook(lambda _layer, inputs: states.append(inputs[0])) for layer in text.layers
        ]
        embeddings = text.embed_tokens(self.token_ids)
        last = self.run(0, embeddings)
        for hook in hooks:
            hook.remove()
        return [*states, last]

    @functools.cached_property
    def log_probabilities(self) -> Tensor:
        """The base model's log-probabilities, [scored tokens, vocabulary]."""
        import torch

        scored_states = self.states[-1][:, POSITIONS].flatten(0, 1)
        return torch.cat(
            [
                torch.log_softmax(self.heads[0](scored_states[start : start + CHUNK]), dim=-1)
                for start in range(0, len(scored_states), CHUNK)
            ]
        )


def draw_heat_map(measurements: list[Damage], path: Path) -> None:
    """Draw the divergence for each block and role, weights and activations side by side, on one logarithmic scale."""
    import numpy as np
    from matplotlib.colors import LogNorm

    block_measurements = [damage for damage in measurements if damage.block is not None]
    blocks = sorted({damage.block for damage in block_measurements if damage.block is not None})
    values = {kind: np.full((len(blocks), len(ROLES)), np.nan) for kind in KINDS}
    for damage in block_measurements:
        for kind in KINDS:
            values[kind][blocks.index(damage.block or 0), ROLES.index(damage.role)] = getattr(damage, kind) or np.nan
    divergences = np.concatenate([matrix[np.isfinite(matrix) & (matrix > 0)] for matrix in values.values()])
    # viridis gets lighter throughout, so that it is readable without color vision.
    image_options: dict[str, Any] = {
        "norm": LogNorm(max(divergences.min(), divergences.max() / 1e4), divergences.max()),
        "cmap": "viridis",
        "aspect": "auto",
    }
    lines = [_describe(damage) for damage in measurements if damage.block is None]
    subtitle = "KL divergence from the base model, nats, with\none module quantized and the rest in float32"
    # From top to bottom: the text, the plots' titles, a row for each block, the roles, the scale.
    top, rows, bottom = 1.35, 0.15 * len(blocks), 0.95
    with new_figure(path, "Damage by module", top + rows + bottom, subtitle="\n".join([subtitle, *lines])) as figure:
        names = [role.rpartition(".")[2].removesuffix("_proj") for role in ROLES]
        for number, kind in enumerate(KINDS):
            axes = add_axes(figure, (0.52, 2.26)[number], (1.9, MARGIN)[number], top, bottom)
            image = axes.imshow(values[kind], **image_options)
            axes.set_title(f"{kind} quantized")
            axes.set_xticks(range(len(ROLES)), names, rotation=90)
            axes.set_yticks(range(len(blocks)), map(str, blocks) if number == 0 else [])
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        figure.axes[0].set_title("block ", loc="right", x=0, color=GRAY)
        scale = add_axes(figure, 0.52, MARGIN, top + rows + 0.5, 0.3)
        figure.colorbar(image, cax=scale, orientation="horizontal")
        label_logarithmic(scale.xaxis)


def _fake_quantize(activations: Tensor) -> Tensor:
    from quantize_gemma.tasks.models.dequantize import quantize_dequantize

    return quantize_dequantize(activations)


def _language_model(model: PreTrainedModel) -> Any:
    """Return the part of a model that contains the decoder blocks."""
    return next(module for module in model.modules() if hasattr(module, "layers") and hasattr(module, "embed_tokens"))


def _describe(damage: Damage) -> str:
    """Describe a module's divergences."""
    activations = f", activations {damage.activations:.2g}" if damage.activations is not None else ""
    return f"{damage.role}: weights {damage.weights:.2g}{activations} nats"
