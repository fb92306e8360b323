"""The algorithms that a recipe's rule names: one function each, from rows of weights to integers and scales.

They work on any rows of a matrix, without calibration data. To add such an algorithm, add its name to recipe.Algorithm
and its function to `quantize_rows`; mypy reports a name without a function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from quantize_gemma.tasks.models.recipe import Rule, torchao_config

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from quantize_gemma.tasks.quantize.exact import OffGrid


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a matrix, quantized.

    Attributes:
        tensors: The tensors to store: "qdata", int8, [rows, columns], and "scale", bfloat16, [rows, groups].
            "zero_point" may be missing if it is zero, because the file is initialized with zeros.
        error: The sum of the squared weight errors.
        square: The sum of the squared weights; NaN or infinite if a weight is.
        changes: For hqq_scale_only, the largest change of a scale in every iteration; see hqq.py.
        off_grid: For exact, the groups that cannot be represented without loss; see exact.py.
    """

    tensors: "dict[str, torch.Tensor]"
    error: float
    square: float
    changes: "npt.NDArray[np.float32] | None" = None
    off_grid: "OffGrid | None" = None


def quantize_rows(rows: "torch.Tensor", rule: Rule, device: str, iterations: int | None = None) -> QuantizedRows:
    """Quantize some rows of a matrix with the rule's algorithm.

    Args:
        rows: The weights, [rows, columns], on the CPU, in the checkpoint's dtype. All algorithms but exact round them
            to bfloat16 first.
        rule: How the matrix is quantized.
        device: Where to compute: cpu or cuda.
        iterations: The result of `iterations_to_repeat` when the rows are quantized a second time.
    """
    import torch

    if rule.algorithm != "exact":
        rows = rows.to(torch.bfloat16)
    match rule.algorithm:
        case "affine":
            return _affine(rows, rule, device)
        case "hqq_scale_only":
            return _hqq_scale_only(rows, rule, device, iterations)
        case "search":
            return _search(rows, rule)
        case "exact":
            return _exact(rows, rule)
        case "gptq":
            raise AssertionError("rows of a calibrated matrix are read from its block's file")
        case _:
            assert_never(rule.algorithm)


def iterations_to_repeat(changes: "Sequence[npt.NDArray[np.float32] | None]") -> int | None:
    """Return the number of iterations with which to quantize a matrix again; None if its rows are final.

    `changes` are those of all of its chunks, which together show where torchao's HQQ stops; see hqq.py.
    """
    from quantize_gemma.tasks.quantize import hqq

    hqq_changes = [chunk_changes for chunk_changes in changes if chunk_changes is not None]
    if not hqq_changes:
        return None
    iterations = hqq.iterations_needed(hqq_changes)
    return None if iterations == hqq.ITERATIONS else iterations


def quantize_with_torchao(rows: "torch.Tensor", rule: Rule) -> "tuple[dict[str, torch.Tensor], str]":
    """Quantize rows with torchao's `quantize_`.

    Returns:
        The tensors that it stores, and its metadata for them, which is the same for any rows.
    """
    import torch
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import FqnToConfig, quantize_

    linear = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(rows, requires_grad=False)
    model = torch.nn.ModuleDict({"rows": linear})
    quantize_(model, FqnToConfig({"rows": torchao_config(rule)}), filter_fn=None)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    return {key.removeprefix("rows._weight_"): tensor for key, tensor in tensors.items()}, metadata["rows.weight"]


def _affine(rows: "torch.Tensor", rule: Rule, device: str) -> QuantizedRows:
    """Round to the nearest integer, with scales from the largest weight of each group, as torchao does."""
    # The mapping is symmetric: all zero points are 0.
    tensors = {part: tensor.cpu() for part, tensor in quantize_with_torchao(rows.to(device), rule)[0].items()}
    return measure_rows(tensors, rows)


def _search(rows: "torch.Tensor", rule: Rule) -> QuantizedRows:
    """Choose the storable scale with the smallest error; always on the CPU, see search.py."""
    from quantize_gemma.tasks.quantize.search import search_scales

    integers, scales = search_scales(rows, rule.group_size or rows.shape[1], rule.weight)
    return measure_rows({"qdata": integers, "scale": scales}, rows)


def _exact(rows: "torch.Tensor", rule: Rule) -> QuantizedRows:
    """Find the grid of the weights."""
    from quantize_gemma.tasks.quantize.exact import find_scales

    integers, scales, off_grid = find_scales(rows, rule.group_size or rows.shape[1], rule.weight)
    quantized = measure_rows({"qdata": integers, "scale": scales}, rows)
    # A product that rounds to the weight in the checkpoint's dtype has no error.
    error = quantized.error if off_grid.misfits else 0.0
    return QuantizedRows(quantized.tensors, error, quantized.square, off_grid=off_grid)


def measure_rows(tensors: "dict[str, torch.Tensor]", rows: "torch.Tensor") -> QuantizedRows:
    """Return quantized rows with the sums of the squared errors and weights."""
    quantized = dequantize(tensors["qdata"], tensors["scale"])
    error = float((quantized - rows.float()).double().square().sum())
    return QuantizedRows(tensors, error, float(rows.double().square().sum()))


def dequantize(integers: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """Return integers, [rows, columns], times scales, [rows, groups], in float32."""
    return integers * scales.float().repeat_interleave(integers.shape[1] // scales.shape[1], 1)


def _hqq_scale_only(rows: "torch.Tensor", rule: Rule, device: str, iterations: int | None) -> QuantizedRows:
    """Fit the scales to the rounded weights in up to 20 iterations, bit-identical to torchao; see hqq.py."""
    import torch

    from quantize_gemma.tasks.quantize import hqq

    group_size = rule.group_size or rows.shape[1]
    count = hqq.ITERATIONS if iterations is None else iterations
    lanes = hqq.sum_lanes()
    if device == "cpu" and lanes and group_size >= lanes:
        chunk = hqq.quantize_chunk(rows.view(torch.uint16).numpy(), group_size, rule.weight, lanes, count)
        integers, scales, changes = torch.from_numpy(chunk.integers), torch.from_numpy(chunk.scales), chunk.changes
        error, square = chunk.error, chunk.square
    else:
        chunk_on_device = hqq.quantize_chunk_with_torch(rows.to(device), group_size, rule.weight, count)
        integers, scales = chunk_on_device.integers.cpu(), chunk_on_device.scales
        changes = chunk_on_device.changes.cpu().numpy()
        error, square = chunk_on_device.error, chunk_on_device.square
    return QuantizedRows({"qdata": integers, "scale": scales.bfloat16().cpu()}, error, square, changes)
