"""Calibration, one decoder block at a time: collect the inputs of each linear, and quantize its weight with GPTQ.

Two models run side by side: the full-precision one, and the one whose blocks are quantized one after the other. Within
a block, the linears are quantized in the order in which data flows through them: q, k, and v, which share one input and
one Hessian; o_proj on the attention output of the quantized q, k, and v; gate_proj and up_proj; down_proj.

Peak memory is a block's weights as they are stored, and two matrices of the size of down_proj's Hessian: the Hessian
and the cross products, later its factor. To achieve this, hidden states are on disk, down_proj's inputs are computed
twice instead of stored, and weights are converted to float32 a few rows at a time.

The blocks run, and Hessians are summed and inverted, on the device of the weights and the hidden states. Compensation,
rounding, and measuring the error run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantize_gemma.tasks.models.recipe import CHUNK_ELEMENTS, Calibration, Rule
from quantize_gemma.tasks.quantize import gptq
from quantize_gemma.tasks.quantize.algorithms import dequantize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RMSNorm

    from quantize_gemma.tasks.quantize.hidden_states import HiddenStates

# Sequences that run through a block at once; fewer if gate_proj's output would have more than CHUNK_ELEMENTS.
SEQUENCES = 8
# Columns of a Hessian that are computed at once; only the blocks on and above the diagonal are computed.
PANEL = 512


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized linear.

    Attributes:
        integers: int8, [rows, columns].
        scales: bfloat16, [rows, groups].
        error: The relative squared error that rounding adds to its outputs on the calibration tokens, with damping; 0
            if it was not measured.
    """

    integers: Tensor
    scales: Tensor
    error: float = 0.0

    def dequantize(self, first: int = 0, count: int | None = None) -> Tensor:
        """Return `count` rows of the weights, starting at `first` (default: all), in float32, [rows, columns]."""
        rows = slice(first, None if count is None else first + count)
        return dequantize(self.integers[rows], self.scales[rows])


@dataclass(frozen=True)
class Moments:
    """Sums over the calibration tokens.

    Attributes:
        hessian: The sum of x x^T, where x is a linear's input in the quantized model, [columns, columns].
        cross: The sum of (t - x) x^T, where t is the same input in the full-precision model, [columns, columns].
    """

    hessian: Tensor
    cross: Tensor

    @classmethod
    def from_pieces(cls, inputs: Iterable[Tensor], targets: Iterable[Tensor]) -> Moments:
        """Return the moments of pieces of inputs and targets, [..., columns]."""
        moments: Moments | None = None
        for piece, target in zip(inputs, targets, strict=True):
            x, difference = piece.flatten(0, -2), (target - piece).flatten(0, -2)
            columns = x.shape[1]
            moments = moments or cls(x.new_zeros(columns, columns), x.new_zeros(columns, columns))
            # Only on and above the diagonal, because the Hessian is symmetric.
            for first in range(0, columns, PANEL):
                moments.hessian[first : first + PANEL, first:].addmm_(x[:, first : first + PANEL].T, x[:, first:])
            moments.cross.addmm_(difference.T, x)
        assert moments is not None, "there are no calibration tokens"
        for first in range(0, columns, PANEL):
            last = first + PANEL
            moments.hessian[last:, first:last] = moments.hessian[first:last, last:].T
        return moments


class StoredLinear(torch.nn.Module):
    """A linear without bias that computes in float32, with the weight in its stored dtype.

    Attributes:
        weight: The full-precision weight, [rows, columns].
        matrix: The quantized weight, which replaces it once it is set.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.matrix: QuantizedMatrix | None = None

    def rows(self, first: int, count: int) -> Tensor:
        """Return some rows of the weight in use, float32."""
        if self.matrix is not None:
            return self.matrix.dequantize(first, count)
        return self.weight[first : first + count].float()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, [..., rows]."""
        rows, columns = self.weight.shape
        step = gptq.rows_at_once(columns)
        if rows <= step:
            return inputs @ self.rows(0, rows).T
        outputs = inputs.new_empty(*inputs.shape[:-1], rows)
        for first in range(0, rows, step):
            outputs[..., first : first + step] = inputs @ self.rows(first, step).T
        return outputs


def load_text_config(checkpoint: Path) -> Gemma3TextConfig:
    """Return the configuration of a checkpoint's decoder, with the attention that a Block computes with."""
    from transformers import AutoConfig

    config: Gemma3TextConfig = AutoConfig.from_pretrained(checkpoint, attn_implementation="sdpa").get_text_config()
    return config


def load_norm(config: Gemma3TextConfig, weight: Tensor) -> Gemma3RMSNorm:
    """Return the norm after the last block, in float32 on the device of its stored weight."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.weight.data = weight.flatten().float()
    return norm


class Block:
    """A decoder block of transformers, split at the inputs of its linears."""

    def __init__(
        self,
        config: Gemma3TextConfig,
        number: int,
        weights: Mapping[str, Tensor],
        linears: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        """Build the block.

        Args:
            config: The decoder's configuration.
            number: The number of the block.
            weights: The block's weights by their names in it.
            linears: Its linears by their names in it. [default: StoredLinears of the weights]
        """
        from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RotaryEmbedding

        with torch.device("meta"):
            layer: Gemma3DecoderLayer = Gemma3DecoderLayer(config, number)
        names = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        norms = [name for name in layer.state_dict() if name.removesuffix(".weight") not in names]
        layer.load_state_dict({name: weights[name].float() for name in norms}, strict=False, assign=True)
        self.layer = layer.eval().requires_grad_(False)
        self.linears: dict[str, StoredLinear] = {}
        if linears is None:
            linears = self.linears = {name: StoredLinear(weights[f"{name}.weight"]) for name in names}
        for name in names:
            layer.set_submodule(name, linears[name])
        self.o_proj, self.down_proj = linears["self_attn.o_proj"], linears["mlp.down_proj"]
        layer.self_attn.o_proj = layer.mlp.down_proj = torch.nn.Identity()
        self.kind = config.layer_types[number]
        self.window = config.sliding_window if self.kind == "sliding_attention" else None
        self.rotary = Gemma3RotaryEmbedding(config).to(weights[norms[0]].device)
        self.width = config.intermediate_size

    def attention(self, hidden: Tensor) -> Tensor:
        """Return o_proj's input, [sequences, length, width], from the block's input."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        distance = positions[:, None] - positions[None]
        mask = (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)
        attention: Tensor = self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(hidden),
            position_embeddings=self.rotary(hidden, positions[None], self.kind),
            attention_mask=mask[None, None],
        )[0]
        return attention

    def add_attention(self, hidden: Tensor, attention: Tensor) -> Tensor:
        """Return the hidden states after attention, from the block's input and o_proj's."""
        output: Tensor = hidden + self.layer.post_attention_layernorm(self.o_proj(attention))
        return output

    def mlp(self, hidden: Tensor) -> Tensor:
        """Return down_proj's input from the hidden states after attention."""
        product: Tensor = self.layer.mlp(self.layer.pre_feedforward_layernorm(hidden))
        return product

    def add_mlp(self, hidden: Tensor, product: Tensor) -> Tensor:
        """Return the block's output from the hidden states after attention and down_proj's input."""
        output: Tensor = hidden + self.layer.post_feedforward_layernorm(self.down_proj(product))
        return output


# Linears that share an input, and the pieces of that input, [sequences, length, width].
Step = tuple[tuple[str, ...], "Iterable[Tensor]"]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def run_block(block: Block, hidden: Tensor | HiddenStates) -> Iterator[Step]:
    """Yield the inputs of a block's linears, and replace its input, [sequences, length, width], with its output.

    If the caller quantizes a step's linears before it requests the next step, the following steps use them.
    """
    pieces = _pieces(block, hidden)
    yield QKV, (block.layer.input_layernorm(hidden[piece]) for piece in pieces)
    attention = torch.cat([block.attention(hidden[piece]) for piece in pieces])
    yield ("self_attn.o_proj",), (attention[piece] for piece in pieces)
    for piece in pieces:
        hidden[piece] = block.add_attention(hidden[piece], attention[piece])
    del attention
    yield GATE_UP, (block.layer.pre_feedforward_layernorm(hidden[piece]) for piece in pieces)
    yield ("mlp.down_proj",), (block.mlp(hidden[piece]) for piece in pieces)
    for piece in pieces:
        hidden[piece] = block.add_mlp(hidden[piece], block.mlp(hidden[piece]))


def run_full_block(block: Block, hidden: Tensor | HiddenStates) -> Iterator[Step]:
    """Do what run_block does for a block that does not change, with only one piece of an input in memory.

    The caller must consume all pieces of a step before it requests the next step.
    """
    pieces = _pieces(block, hidden)

    def attention_inputs() -> Iterator[Tensor]:
        for piece in pieces:
            inputs = block.attention(hidden[piece])
            hidden[piece] = block.add_attention(hidden[piece], inputs)
            yield inputs

    def mlp_inputs() -> Iterator[Tensor]:
        for piece in pieces:
            inputs = block.mlp(hidden[piece])
            hidden[piece] = block.add_mlp(hidden[piece], inputs)
            yield inputs

    yield QKV, (block.layer.input_layernorm(hidden[piece]) for piece in pieces)
    yield ("self_attn.o_proj",), attention_inputs()
    yield GATE_UP, (block.layer.pre_feedforward_layernorm(hidden[piece]) for piece in pieces)
    yield ("mlp.down_proj",), mlp_inputs()


def quantize_block(
    blocks: tuple[Block, Block],
    hidden: tuple[HiddenStates, HiddenStates],
    rule: Rule,
    settings: Calibration,
) -> dict[str, QuantizedMatrix]:
    """Quantize a block's linears, and replace its inputs, [sequences, length, width], with its outputs.

    Args:
        blocks: The block twice: the linears of the first one are quantized, those of the second one are not.
        hidden: The hidden states of the calibration tokens after the preceding quantized blocks, and after the
            preceding full-precision blocks.
        rule: The rule of the block's linears.
        settings: The recipe's calibration settings.

    Returns:
        The quantized linears, by their names in the block.
    """
    assert rule.group_size is not None, f"{rule} has no group size"
    matrices: dict[str, QuantizedMatrix] = {}
    block, full_block = blocks
    steps = zip(run_block(block, hidden[0]), run_full_block(full_block, hidden[1]), strict=True)
    for (names, inputs), (_, targets) in steps:
        moments = Moments.from_pieces(inputs, targets)
        linears = {name: block.linears[name] for name in names}
        for name, quantize in prepare_linears(linears, moments, rule.group_size, settings).items():
            matrices[name] = quantize()
            device = linears[name].weight.device
            tensors = matrices[name].integers.to(device), matrices[name].scales.to(device)
            linears[name].matrix = QuantizedMatrix(*tensors)
    return matrices


def replay_block(blocks: tuple[Block, Block], hidden: tuple[HiddenStates, HiddenStates]) -> None:
    """Replace a block's inputs with its outputs, as quantize_block does, when its linears are already quantized."""
    for run, block, states in zip((run_block, run_full_block), blocks, hidden, strict=True):
        run_to_end(run(block, states))


def run_to_end(steps: Iterator[Step]) -> None:
    """Consume all inputs of a block's steps, so that its input is replaced with its output."""
    for _, inputs in steps:
        for _piece in inputs:
            pass


def prepare_linears(
    linears: dict[str, StoredLinear], moments: Moments, group_size: int, settings: Calibration
) -> dict[str, Callable[[], QuantizedMatrix]]:
    """Return a quantizing function for each linear, by name; they share one input, whose moments are overwritten."""
    hessian, cross = moments.hessian, moments.cross
    shifts: dict[str, Tensor] = {}
    scratch = None
    if all(linear.weight.shape[0] < len(hessian) for linear in linears.values()):
        # Weights times cross products are smaller than the cross products, whose memory can be reused afterwards.
        for name, linear in linears.items():
            rows, step = linear.weight.shape[0], gptq.rows_at_once(len(cross))
            shifts[name] = torch.cat([linear.rows(first, step) @ cross for first in range(0, rows, step)]).cpu()
        scratch = cross
    curvature = gptq.prepare(hessian, group_size, settings.damping, scratch, settings.order == "activations").cpu()
    cross_on_cpu = cross.cpu() if scratch is None else None

    def quantize(name: str) -> QuantizedMatrix:
        linear = linears[name]

        def read_rows(first: int, count: int) -> tuple[Tensor, Tensor]:
            weight = linear.rows(first, count).cpu()
            if cross_on_cpu is None:
                return weight, shifts[name][first : first + count]
            return weight, weight @ cross_on_cpu

        return compensate_and_quantize(read_rows, linear.weight.shape[0], curvature, settings)

    return {name: lambda name=name: quantize(name) for name in linears}  # type: ignore[misc]


def compensate_and_quantize(
    read_rows: Callable[[int, int], tuple[Tensor, Tensor]], rows: int, curvature: gptq.Curvature, settings: Calibration
) -> QuantizedMatrix:
    """Quantize a linear's weight, and measure the error that rounding adds to its outputs.

    Before GPTQ rounds them, the weights are moved toward the least-squares solution that reproduces the full-precision
    model's outputs from the quantized model's inputs, so that a block corrects some of the error of earlier blocks.
    Moving them all the way would overfit the calibration text.

    Args:
        read_rows: Takes a first row and a count, and returns these rows of the weight, float32, [rows, columns], and
            the same rows times the moments' cross products.
        rows: The number of rows of the weight.
        curvature: The curvature of the linear's inputs.
        settings: The recipe's calibration settings.
    """
    columns = len(curvature.order)
    integers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // curvature.group_size, dtype=torch.bfloat16)
    error = square = 0.0
    step = gptq.rows_at_once(columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight, shift = read_rows(first, last - first)
        corrected = weight + settings.compensation * curvature.solve(shift)
        matrix = QuantizedMatrix(*gptq.quantize_matrix(corrected, curvature))
        integers[first:last], scales[first:last] = matrix.integers, matrix.scales
        error += _square(matrix.dequantize() - corrected, curvature)
        square += _square(corrected, curvature)
    return QuantizedMatrix(integers, scales, round_sum(error / square if square else 0.0))


def round_sum(value: float) -> float:
    """Round a value that was computed from sums to five significant digits.

    More digits would depend on the number of threads, which determines the order of the sums.
    """
    return float(f"{value:.5g}")


def _square(weights: Tensor, curvature: gptq.Curvature) -> float:
    """Return the sum of squares of the outputs of `weights`, [rows, columns], over the calibration tokens."""
    reordered = weights[:, curvature.order]
    return float((reordered @ curvature.hessian).mul_(reordered).double().sum())


def _pieces(block: Block, hidden: Tensor | HiddenStates) -> list[slice]:
    count = max(min(CHUNK_ELEMENTS // (hidden.shape[1] * block.width), SEQUENCES), 1)
    return [slice(first, first + count) for first in range(0, len(hidden), count)]
