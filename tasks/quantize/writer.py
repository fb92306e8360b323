"""Write the quantized checkpoint's file chunk by chunk, with threads that read, quantize, and write in parallel."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

from quantize_gemma.tasks.models.checkpoint import write_header
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import Rule, is_lossless
from quantize_gemma.tasks.quantize.algorithms import (
    iterations_to_repeat,
    measure_rows,
    quantize_rows,
    quantize_with_torchao,
)
from quantize_gemma.tasks.quantize.exact import OffGrid
from quantize_gemma.tasks.quantize.source import SourceTensor, decoder_prefix, read_rows
from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.reporting import report_progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

# The number of weights in a chunk of whole rows; a GPU is faster with larger chunks.
CHUNK = 2**20
CHUNK_ON_ACCELERATOR = 2**24
# The maximum number of modules that a message about weights off the grid names.
MAX_SHOWN = 5


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor, and the offset of each part of the tensor in the new file.

    The parts are "qdata", "scale", and "zero_point", or "" for a tensor that is not quantized. `quantized` has the
    parts of a calibrated matrix, which is already quantized.
    """

    source: SourceTensor
    first_row: int
    rows: int
    offsets: Mapping[str, int]
    quantized: Mapping[str, SourceTensor]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the new file: its key, its dtype as safetensors names it, and its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ChunkSums:
    """The statistics of a chunk after it is written: its number of weights, and QuantizedRows without the tensors.

    `rounded` is the number of values that bfloat16 changes, if the tensor is not quantized.
    """

    weights: int
    error: float
    square: float
    changes: "npt.NDArray[np.float32] | None" = None
    off_grid: OffGrid | None = None
    rounded: int = 0


@dataclass(frozen=True)
class ErrorSums:
    """The sum of the squared weight errors, and of the squared weights."""

    error: float = 0.0
    square: float = 0.0


class CheckpointWriter:
    """The new file. Threads start to write it when the context is entered; leaving the context early stops them."""

    def __init__(
        self,
        path: Path,
        sources: Mapping[str, SourceTensor],
        rules: Mapping[str, Rule],
        multimodal: bool,
        device: str,
        quantized: Mapping[str, Mapping[str, SourceTensor]],
    ) -> None:
        self.sources = sources
        self.quantized = quantized
        self.rules = {name: rules.get(name.removesuffix(".weight")) for name in sources}
        self.is_lossless = is_lossless(rules)
        self.device = device
        # One more thread than cores, because some wait for the disk; a GPU has memory for only a few chunks.
        self.pool = ThreadPoolExecutor(min(machine.logical_cores(), 16) + 1 if device == "cpu" else 3)
        metadata: dict[str, str] = {}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.keys: dict[str, dict[str, str]] = {}
        for name, source in sources.items():
            parts, metadata[name] = _describe_stored_tensors(name, source.shape, self.rules[name])
            self.keys[name] = {
                part: GEMMA3.hub_name(tensor.key) if multimodal else tensor.key for part, tensor in parts.items()
            }
            layout |= {self.keys[name][part]: (tensor.dtype, tensor.shape) for part, tensor in parts.items()}
        metadata["tensor_names"] = json.dumps(list(sources))
        if multimodal:
            metadata = _add_newer_names(metadata)
        # Make the file readable by everyone, because a release may be served to others.
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.offsets = write_header(self.file, layout, {**metadata, "format": "pt"})

    def __enter__(self) -> Self:
        self.futures = {name: self._submit(name, None) for name in self.sources}
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        os.close(self.file)

    def _submit(self, name: str, iterations: int | None) -> "list[Future[ChunkSums]]":
        offsets = {part: self.offsets[key] for part, key in self.keys[name].items()}
        weights = CHUNK if self.device == "cpu" else CHUNK_ON_ACCELERATOR
        return [
            self.pool.submit(_convert, name, chunk, self.file, self.rules[name], self.device, iterations)
            for chunk in _split_chunks(self.sources[name], offsets, self.quantized.get(name, {}), weights)
        ]

    def finish(self) -> dict[str, ErrorSums]:
        """Wait for all threads, and return the sums for every role. Raises what a thread raised.

        Raises:
            UserError: The recipe is lossless, but weights are off its grid, or bfloat16 changes norms; the message says
                where, and by how much.
        """
        # In bfloat16, a weight takes two bytes.
        total = 2 * sum(prod(source.shape) for source in self.sources.values())
        bytes_done = 0
        sums: dict[str, ErrorSums] = {}
        off_grid: dict[str, OffGrid] = {}
        rounded: dict[str, int] = {}
        for name, futures in self.futures.items():
            chunks = []
            for future in futures:
                chunks.append(future.result())
                bytes_done += 2 * chunks[-1].weights
                report_progress(bytes_done, total, "bytes")
            rule = self.rules[name]
            if rule is None:
                rounded[name] = sum(chunk.rounded for chunk in chunks)
            if rule is None or not chunks:
                continue
            iterations = iterations_to_repeat([chunk.changes for chunk in chunks])
            if iterations is not None:
                chunks = [future.result() for future in self._submit(name, iterations)]
            module_off_grid = sum((chunk.off_grid for chunk in chunks if chunk.off_grid is not None), OffGrid())
            if module_off_grid.misfits:
                off_grid[name.removesuffix(".weight")] = module_off_grid
            for chunk in chunks:
                before = sums.get(rule.match, ErrorSums())
                sums[rule.match] = ErrorSums(before.error + chunk.error, before.square + chunk.square)
        if off_grid:
            raise UserError(_off_grid_message(off_grid))
        if self.is_lossless:
            prefix = decoder_prefix(self.sources)
            counts = {name: count for name, count in rounded.items() if count and name.startswith(prefix)}
            if counts:
                raise UserError(_rounded_message(counts))
        return sums


def _off_grid_message(modules: Mapping[str, OffGrid]) -> str:
    """Return the message about modules off the grid, the worst first, with advice."""
    worst_names = sorted(modules, key=lambda name: -modules[name].misfits / modules[name].groups)[:MAX_SHOWN]
    lines = [
        f"{name}: {grid.misfits:,} of {grid.groups:,} groups are off the grid ({grid.negative:,} with a negative "
        f"scale), by up to {grid.worst_error:.2g} times the group's largest weight"
        for name, grid in ((name, modules[name]) for name in worst_names)
    ]
    suffix = f"; and {len(modules) - len(worst_names)} more modules" if len(modules) > len(worst_names) else ""
    return (
        "the weights are not on the recipe's grid, so they cannot be written without loss: "
        f"{'; '.join(lines)}{suffix}: use GPTQ-INT8-INT4, which is calibrated, or SEARCH-INT8-INT4, which needs no data"
    )


def _rounded_message(counts: Mapping[str, int]) -> str:
    """Return the message about norms that bfloat16 changes, with advice, from the number of changed values of each."""
    worst = max(counts, key=lambda name: counts[name])
    return (
        f"norms are stored in bfloat16, which would change {sum(counts.values()):,} of their values "
        f"({counts[worst]:,} in {worst}), so the norms cannot be written without loss: round the norms in the "
        "checkpoint to bfloat16, or use GPTQ-INT8-INT4, which is calibrated, or SEARCH-INT8-INT4, which needs no data"
    )


def _split_chunks(
    source: SourceTensor, offsets: Mapping[str, int], quantized: Mapping[str, SourceTensor], weights: int
) -> Iterator[Chunk]:
    if not prod(source.shape):
        return
    rows = source.shape[0] if source.shape else 1
    step = max(1, weights // max(1, prod(source.shape[1:])))
    for first in range(0, rows, step):
        yield Chunk(source, first, min(step, rows - first), offsets, quantized)


def _convert(name: str, chunk: Chunk, file: int, rule: Rule | None, device: str, iterations: int | None) -> ChunkSums:
    """Read some rows, quantize them if there is a rule, and write them.

    Raises:
        UserError: A weight is not finite; the message names the tensor.
    """
    import torch

    weight = read_rows(chunk.source, chunk.first_row, chunk.rows)
    if rule is None:
        stored = weight.to(torch.bfloat16)
        square, rounded = float(stored.double().square().sum()), int((stored != weight).sum())
        tensors, sums = {"": stored}, ChunkSums(weight.numel(), 0.0, square, rounded=rounded)
    else:
        if chunk.quantized:
            rows = measure_rows(
                {part: read_rows(source, chunk.first_row, chunk.rows) for part, source in chunk.quantized.items()},
                weight.to(torch.bfloat16),
            )
        else:
            rows = quantize_rows(weight, rule, device, iterations)
        tensors = rows.tensors
        sums = ChunkSums(weight.numel(), rows.error, rows.square, rows.changes, rows.off_grid)
    if not math.isfinite(sums.square):
        raise UserError(f"{name} contains a NaN or an infinity: the checkpoint is damaged; download it again")
    for part, tensor in tensors.items():
        bytes_per_row = tensor.numel() // chunk.rows * tensor.itemsize
        _write_tensor(file, tensor, chunk.offsets[part] + chunk.first_row * bytes_per_row)
    return sums


def _describe_stored_tensors(
    name: str, shape: tuple[int, ...], rule: Rule | None
) -> tuple[dict[str, StoredTensor], str]:
    """Return {part: stored dtype and shape} of a tensor and torchao's metadata for it, by quantizing one row."""
    import torch

    if rule is None:
        return {"": StoredTensor(name, "BF16", shape)}, json.dumps({"_type": "Tensor"})
    tensors, metadata = quantize_with_torchao(torch.zeros(1, shape[1], dtype=torch.bfloat16), rule)
    module = name.removesuffix(".weight")
    dtypes = {torch.int8: "I8", torch.bfloat16: "BF16"}
    return {
        part: StoredTensor(f"{module}._weight_{part}", dtypes[tensor.dtype], (shape[0], tensor.shape[1]))
        for part, tensor in tensors.items()
    }, metadata


def _write_tensor(file: int, tensor: "torch.Tensor", offset: int) -> None:
    import torch

    view = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _add_newer_names(metadata: Mapping[str, str]) -> dict[str, str]:
    """Add the names of transformers 5.1+, whose vision tower has one level fewer; loaders skip unused names."""
    names = json.loads(metadata["tensor_names"])
    old_prefix, new_prefix = GEMMA3.vision_prefixes
    new_names = {name: name.replace(old_prefix, new_prefix) for name in names if name.startswith(old_prefix)}
    return {
        **metadata,
        **{after: metadata[before] for before, after in new_names.items()},
        "tensor_names": json.dumps([*names, *new_names.values()]),
    }
