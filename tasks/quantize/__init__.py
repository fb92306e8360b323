"""Quantize: writes the checkpoint that torchao and transformers would have written, after a recipe.

From the base checkpoint's files to the quantized one's, some rows at a time: threads read, compute and write side by
side, and memory depends neither on the model's size nor on that of its largest matrix. The bytes are those of
`quantize_`, `flatten_tensor_state_dict` and safetensors' `save_file`. The tensors' keys follow the Hub's layout of the
base checkpoint, and the metadata names every module as the installed and as newer transformers call it, so that both
load the file. (Card section: Quantization.)
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.checkpoint import (
    RUNTIME_PREFIXES,
    read_config,
    read_header,
    runtime_name,
    task_of,
    weight_files,
    write_header,
)
from quantize_gemma.tasks.models.load_check import check_shapes
from quantize_gemma.tasks.models.recipe import decide, recipe_hash, torchao_config
from quantize_gemma.tasks.runtime import machine
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import link
from quantize_gemma.tasks.runtime.worker import report_progress

# So many weights are worked on at a time, in whole rows; on an accelerator more, which is quicker there.
CHUNK = 2**20
CHUNK_ON_ACCELERATOR = 2**24


@dataclass(frozen=True)
class Source:
    """Where a tensor's bytes are: file descriptor, offset from the file's start, torch dtype, shape."""

    file: int
    offset: int
    dtype: Any
    shape: list[int]


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor, and where in the new file they go: {"qdata" | "scale" | "zero_point" | "": offset}."""

    source: Source
    first: int
    rows: int
    to: dict[str, int]


@dataclass(frozen=True)
class Sums:
    """What a chunk adds up to: weights, squared error, squared weights; and how its scales changed, see hqq.py."""

    elements: int
    error: float
    square: float
    changes: Any


@stage(accelerated=True)
def quantize(target: Path, checkpoint: Path, recipe: dict[str, Any], device: str) -> Output:
    """Fills `target` with the quantized checkpoint: model.safetensors, config with `quantization_config`, tokenizer.

    `device` is cpu, or cuda, where sums are added up in another order: a scale may differ in its last bit. Returns the
    weight error per role (mean squared error over mean square). Raises UserError when the checkpoint does not fit its
    configuration, the recipe does not fit the model, or a weight is not finite.
    """
    import torch

    multimodal = task_of(read_config(checkpoint)) == "multimodal-text-to-text"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The work is spread here; torch's own threads would only get in each other's way.
    try:
        with _opened(checkpoint) as sources:
            modules = {
                name.removesuffix(".weight"): source.shape
                for name, source in sources.items()
                if name.endswith(".weight") and len(source.shape) == 2
            }
            decided = decide(recipe, modules)
            with _Writer(target / "model.safetensors", sources, decided, multimodal, device) as writer:
                # transformers takes seconds to import, in which the threads work.
                _write_config(target, checkpoint, sources, decided)
                errors = writer.finish()
    finally:
        torch.set_num_threads(threads)
    for path in checkpoint.iterdir():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")) and path.name != "config.json":
            link(path, target / path.name)
    return {
        "metadata": {
            "recipe": recipe["name"],
            "recipe_hash": recipe_hash(recipe),
            "quantized_modules": len(decided),
            "weight_error": {role: round(a / b, 8) if b else 0.0 for role, (a, b) in sorted(errors.items())},
        }
    }


@contextlib.contextmanager
def _opened(checkpoint: Path) -> Iterator[dict[str, Source]]:
    """Gives the checkpoint's tensors by their names in the loaded model, sorted, of files that stay open meanwhile."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    sources = {}
    with contextlib.ExitStack() as stack:
        for path in weight_files(checkpoint):
            file = os.open(path, os.O_RDONLY)
            stack.callback(os.close, file)
            for name, tensor in read_header(path).items():
                if tensor["dtype"] not in dtypes:
                    raise UserError(
                        f"the weight {name} in {path} is {tensor['dtype']}: give the unquantized checkpoint"
                    )
                dtype, offset = dtypes[tensor["dtype"]], tensor["data_offsets"][0]
                sources[runtime_name(name)] = Source(file, offset, dtype, tensor["shape"])
        yield dict(sorted(sources.items()))


def _write_config(
    target: Path, checkpoint: Path, sources: dict[str, Source], decided: dict[str, dict[str, Any]]
) -> None:
    """Writes config.json. Raises UserError if the checkpoint's weights are not those of the model that it describes."""
    import torch
    from torchao.quantization import FqnToConfig
    from transformers import AutoConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    check_shapes(checkpoint, config, {name: source.shape for name, source in sources.items()})
    config.quantization_config = TorchAoConfig(
        quant_type=FqnToConfig({name: torchao_config(rule) for name, rule in decided.items()}),
        include_input_output_embeddings=True,
        modules_to_not_convert=[],
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(target)


class _Writer:
    """The new file, written by threads from the moment it is entered; left early, it stops them."""

    def __init__(
        self,
        path: Path,
        sources: dict[str, Source],
        decided: dict[str, dict[str, Any]],
        multimodal: bool,
        device: str,
    ) -> None:
        self.sources = sources
        self.rules = {name: decided.get(name.removesuffix(".weight")) for name in sources}
        self.device = device
        # One more than cores, for some wait for the disk; an accelerator has memory for few chunks.
        self.pool = ThreadPoolExecutor(min(machine.logical_cores(), 16) + 1 if device == "cpu" else 3)
        metadata: dict[str, str] = {}
        layout: dict[str, tuple[str, list[int]]] = {}
        self.parts: dict[str, dict[str, str]] = {}
        for name, source in sources.items():
            keys, metadata[name] = _keys(name, source.shape, self.rules[name])
            self.parts[name] = {part: _hub_name(key) if multimodal else key for part, (key, _, _) in keys.items()}
            layout |= {self.parts[name][part]: (dtype, shape) for part, (_, dtype, shape) in keys.items()}
        metadata["tensor_names"] = json.dumps(list(sources))
        if multimodal:
            metadata = _with_newer_names(metadata)
        # Readable by all: a release's files are served to others.
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.offsets = write_header(self.file, layout, {**metadata, "format": "pt"})

    def __enter__(self) -> "_Writer":
        self.work = {name: self._submit(name, None) for name in self.sources}
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        os.close(self.file)

    def _submit(self, name: str, iterations: int | None) -> "list[Future[Sums]]":
        source = self.sources[name]
        to = {part: self.offsets[key] for part, key in self.parts[name].items()}
        elements = CHUNK if self.device == "cpu" else CHUNK_ON_ACCELERATOR
        return [
            self.pool.submit(_convert, name, chunk, self.file, self.rules[name], self.device, iterations)
            for chunk in _chunks(source, to, elements)
        ]

    def finish(self) -> dict[str, list[float]]:
        """Waits for everything; returns every role's squared error and squared weights. Raises what a thread raised."""
        # bfloat16 has two bytes.
        total = 2 * sum(_size(source.shape) for source in self.sources.values())
        done = 0
        errors: dict[str, list[float]] = {}
        for name, futures in self.work.items():
            for future in futures:
                done += 2 * future.result().elements
                report_progress(done, total, "bytes")
            rule = self.rules[name]
            if rule is None or not futures:
                continue
            iterations = _iterations([future.result().changes for future in futures])
            if iterations is not None:
                futures = self._submit(name, iterations)
            sums = errors.setdefault(rule["match"], [0.0, 0.0])
            for future in futures:
                sums[0] += future.result().error
                sums[1] += future.result().square
        return errors


def _chunks(source: Source, to: dict[str, int], elements: int) -> Iterator[Chunk]:
    if not _size(source.shape):
        return
    rows = source.shape[0] if source.shape else 1
    step = max(1, elements // max(1, _size(source.shape[1:])))
    for first in range(0, rows, step):
        yield Chunk(source, first, min(step, rows - first), to)


def _convert(
    name: str, chunk: Chunk, file: int, rule: dict[str, Any] | None, device: str, iterations: int | None
) -> Sums:
    """Reads some rows, quantizes them if there is a rule, and writes them.

    Raises UserError that names the weight if one is not finite.
    """
    import torch

    source = chunk.source
    width = _size(source.shape[1:])
    buffer = bytearray(chunk.rows * width * source.dtype.itemsize)
    _read(source.file, buffer, source.offset + chunk.first * width * source.dtype.itemsize)
    weight = torch.frombuffer(buffer, dtype=source.dtype).view(chunk.rows, width).to(torch.bfloat16)
    if rule is None:
        tensors, sums = {"": weight}, Sums(weight.numel(), 0.0, float(weight.double().square().sum()), None)
    else:
        tensors, sums = _quantize(weight, rule, device, iterations)
    if not math.isfinite(sums.square):
        raise UserError(f"{name} holds a NaN or an infinity: the checkpoint is damaged, download it again")
    for part, tensor in tensors.items():
        bytes_per_row = tensor.numel() // chunk.rows * tensor.itemsize
        _write(file, tensor, chunk.to[part] + chunk.first * bytes_per_row)
    return sums


def _quantize(weight: Any, rule: dict[str, Any], device: str, iterations: int | None) -> tuple[dict[str, Any], Sums]:
    """Returns the rows' "qdata", "scale" and "zero_point". What is missing is zero, as the new file is already."""
    import torch

    from quantize_gemma.tasks.quantize import hqq

    group_size = rule["group_size"] or weight.shape[1]
    if rule["algorithm"] == "hqq_scale_only":
        count = hqq.ITERATIONS if iterations is None else iterations
        lanes = hqq.sum_lanes()
        if device == "cpu" and lanes and group_size >= lanes:
            found = hqq.quantize_chunk(weight.view(torch.uint16).numpy(), group_size, rule["weight"], lanes, count)
            found.integers, found.scales = torch.from_numpy(found.integers), torch.from_numpy(found.scales)
        else:
            found = hqq.quantize_chunk_with_torch(weight.to(device), group_size, rule["weight"], count)
            found.changes = found.changes.cpu().numpy()
        tensors = {"qdata": found.integers.cpu(), "scale": found.scales.to(weight.dtype).cpu()}
        return tensors, Sums(weight.numel(), found.error, found.square, found.changes)
    parts, _ = _with_torchao(weight.to(device), rule)
    tensors = {part: tensor.cpu() for part, tensor in parts.items()}
    integers = tensors["qdata"].float() - tensors["zero_point"].float().repeat_interleave(group_size, 1)
    scales = tensors["scale"].float().repeat_interleave(group_size, 1)
    error = float((integers * scales - weight.float()).double().square().sum())
    return tensors, Sums(weight.numel(), error, float(weight.double().square().sum()), None)


def _iterations(changes: list[Any]) -> int | None:
    """Returns after how many iterations of HQQ torchao stops on a matrix, None if its chunks are right as they are."""
    from quantize_gemma.tasks.quantize import hqq

    if changes[0] is None:
        return None
    needed = hqq.iterations_needed(changes)
    return None if needed == hqq.ITERATIONS else needed


def _with_torchao(weight: Any, rule: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Quantizes rows with torchao's `quantize_`; returns the parts, and torchao's metadata, the same for any rows."""
    import torch
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import FqnToConfig, quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.ModuleDict({"rows": linear})
    quantize_(model, FqnToConfig({"rows": torchao_config(rule)}), filter_fn=None)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    return {key.removeprefix("rows._weight_"): tensor for key, tensor in tensors.items()}, metadata["rows.weight"]


def _keys(
    name: str, shape: list[int], rule: dict[str, Any] | None
) -> tuple[dict[str, tuple[str, str, list[int]]], str]:
    """Returns {part: (key, dtype, shape)} of what is stored for a tensor, and torchao's metadata for it.

    Found by quantizing one row.
    """
    import torch

    if rule is None:
        return {"": (name, "BF16", shape)}, json.dumps({"_type": "Tensor"})
    tensors, metadata = _with_torchao(torch.zeros(1, shape[1], dtype=torch.bfloat16), rule)
    module = name.removesuffix(".weight")
    dtypes = {torch.int8: "I8", torch.bfloat16: "BF16"}
    return {
        part: (f"{module}._weight_{part}", dtypes[tensor.dtype], [shape[0], tensor.shape[1]])
        for part, tensor in tensors.items()
    }, metadata


def _read(file: int, buffer: bytearray, offset: int) -> None:
    view = memoryview(buffer)
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise StageFailed("a file of the checkpoint became shorter while it was read")
        view, offset = view[count:], offset + count


def _write(file: int, tensor: Any, offset: int) -> None:
    import torch

    view = memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _size(shape: list[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _hub_name(name: str) -> str:
    hub = next((hub for hub, runtime in RUNTIME_PREFIXES.items() if name.startswith(runtime)), "")
    return hub + name.removeprefix(RUNTIME_PREFIXES[hub]) if hub else name


def _with_newer_names(metadata: dict[str, str]) -> dict[str, str]:
    """Adds the names of transformers 5.1 and later, whose vision tower lost one level; names without data are idle."""
    names = json.loads(metadata["tensor_names"])
    old, new = "model.vision_tower.vision_model.", "model.vision_tower."
    renamed = {name: name.replace(old, new) for name in names if name.startswith(old)}
    return {
        **metadata,
        **{after: metadata[before] for before, after in renamed.items()},
        "tensor_names": json.dumps([*names, *renamed.values()]),
    }
