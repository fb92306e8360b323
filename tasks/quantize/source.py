"""Tensors in open safetensors files, read a few rows at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.errors import StageFailed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor's bytes are: file descriptor, offset from the start of the file, dtype, shape."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_rows(source: SourceTensor, first: int = 0, count: int | None = None) -> torch.Tensor:
    """Return `count` rows of a tensor from `first` on, all by default, as [rows, columns] in the tensor's dtype."""
    import torch

    rows = source.shape[0] if source.shape else 1
    count = rows - first if count is None else count
    width = prod(source.shape[1:])
    buffer = bytearray(count * width * source.dtype.itemsize)
    _read(source.file, buffer, source.offset + first * width * source.dtype.itemsize)
    return torch.frombuffer(buffer, dtype=source.dtype).view(count, width)


def _read(file: int, buffer: bytearray, offset: int) -> None:
    view = memoryview(buffer)
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise StageFailed("a file became shorter while it was read")
        view, offset = view[count:], offset + count
