"""Finished shards of a stage's work as separate artifacts, so that a stage that was killed resumes where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.strict_json import JsonObject, JsonValue

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "fidelity-shards"
FILE = "shard.safetensors"


@dataclass(frozen=True)
class ShardStore:
    """The shards of one stage in the store.

    Attributes:
        root: The store.
        refresh: Compute shards again even if they are in the store.
    """

    root: Path
    refresh: bool

    def file(
        self, functions: tuple[str, ...], identity: Mapping[str, object], compute: Callable[[], dict[str, Tensor]]
    ) -> Path:
        """Return the safetensors file of a shard; compute it if the store does not have it.

        Args:
            functions: The functions, "module:function", that compute the shard; their code is part of its key.
            identity: Everything else that the shard depends on, as JSON values.
            compute: Returns the shard's tensors by name.
        """
        from safetensors.torch import save_file

        def write(target: Path) -> JsonObject:
            save_file({name: tensor.contiguous() for name, tensor in compute().items()}, target / FILE)
            return {}

        key = store.key(STAGE, [], {"functions": list(functions), **identity}, fingerprint(*functions))
        return store.produce(STAGE, key, write, self.root, self.refresh, pinned=True).path / FILE


def digest(value: JsonValue) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(store.canonical_json(value)).hexdigest()
