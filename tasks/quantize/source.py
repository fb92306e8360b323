"""Tensors in open safetensors files, read a few rows at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.checkpoint import read_header, weight_files
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError

if TYPE_CHECKING:
    import torch

# {dtype in safetensors: dtype in torch} of a base checkpoint and of a quantized one.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
QUANTIZED = {"I8": "int8", "BF16": "bfloat16"}


@dataclass(frozen=True)
class SourceTensor:
    """The location of a tensor's bytes: file descriptor, offset from the start of the file, dtype, shape."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_rows(source: SourceTensor, first: int = 0, count: int | None = None) -> torch.Tensor:
    """Return `count` rows of a tensor, starting at `first` (default: all), as [rows, columns] in the tensor's dtype."""
    import torch

    rows = source.shape[0] if source.shape else 1
    count = rows - first if count is None else count
    width = prod(source.shape[1:])
    buffer = bytearray(count * width * source.dtype.itemsize)
    _fill_buffer(source.file, buffer, source.offset + first * width * source.dtype.itemsize)
    return torch.frombuffer(buffer, dtype=source.dtype).view(count, width)


@contextlib.contextmanager
def open_tensors(checkpoint: Path, dtypes: Mapping[str, str] = FLOATS) -> Iterator[dict[str, SourceTensor]]:
    """Yield the checkpoint's tensors by name in the loaded model, sorted; their files are open within the context."""
    with open_files(weight_files(checkpoint), dtypes) as sources:
        yield dict(sorted((GEMMA3.runtime_name(name), source) for name, source in sources.items()))


@contextlib.contextmanager
def open_files(paths: Iterable[Path], dtypes: Mapping[str, str]) -> Iterator[dict[str, SourceTensor]]:
    """Yield the tensors of safetensors files by name; the files are open within the context."""
    import torch

    sources = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            stack.callback(os.close, file)
            for name, tensor in read_header(path).items():
                if tensor.dtype not in dtypes:
                    raise UserError(f"the weight {name} in {path} is {tensor.dtype}: use the unquantized checkpoint")
                dtype: torch.dtype = getattr(torch, dtypes[tensor.dtype])
                sources[name] = SourceTensor(file, tensor.start, dtype, tensor.shape)
        yield sources


def decoder_prefix(names: Iterable[str]) -> str:
    """Return the prefix of the decoder's tensors and modules, among a model's tensors."""
    return next(name for name in names if f".{GEMMA3.embedding_module}." in name).partition(GEMMA3.embedding_module)[0]


def read_block(sources: Mapping[str, SourceTensor], start: str, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names start with `start`, by the remainder of their names."""
    names = [name for name in sources if name.startswith(start)]
    return {name.removeprefix(start): read_rows(sources[name]).view(sources[name].shape).to(device) for name in names}


def look_up(source: SourceTensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of the distinct tokens, [distinct, columns], and the number of each token's row in them."""
    import torch

    ids, row_numbers = torch.unique(tokens, return_inverse=True)
    return torch.cat([read_rows(source, int(token), 1) for token in ids]), row_numbers


def embed(rows: torch.Tensor, row_numbers: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of tokens, scaled as in the program, float32, from what look_up() returns for them.

    A model in bfloat16 rounds the factor.
    """
    return (rows.float() * float(rows.shape[1] ** 0.5))[row_numbers]


def _fill_buffer(file: int, buffer: bytearray, offset: int) -> None:
    view = memoryview(buffer)
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise StageFailed("a weight file was truncated while it was being read: start the run again")
        view, offset = view[count:], offset + count
