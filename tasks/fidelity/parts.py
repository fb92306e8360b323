"""Finished parts of a stage's work as artifacts of their own, so that a stage that is killed continues where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.fingerprint import fingerprint
from quantize_gemma.tasks.runtime.strict_json import JsonObject, JsonValue

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "fidelity-parts"
FILE = "part.safetensors"


@dataclass(frozen=True)
class Parts:
    """The parts of one stage.

    Attributes:
        root: The store that they are in.
        refresh: Compute parts again that are in the store.
    """

    root: Path
    refresh: bool

    def file(self, function: str, identity: JsonObject, compute: Callable[[], dict[str, Tensor]]) -> Path:
        """Return the safetensors file of a part; compute it if the store does not have it.

        Args:
            function: "module:function", the code that computes the part, which is in its key.
            identity: What else the part depends on, JSON values.
            compute: Returns the part's tensors by name.
        """
        from safetensors.torch import save_file

        def write(target: Path) -> JsonObject:
            save_file({name: tensor.contiguous() for name, tensor in compute().items()}, target / FILE)
            return {}

        key = store.key(STAGE, [], {"function": function, **identity}, fingerprint(function))
        return store.produce(STAGE, key, write, self.root, self.refresh, pinned=True).path / FILE


def locate_in_store(artifact: Path, temporary: Path) -> tuple[str, Path]:
    """Return the artifact's digest and the store that it is in; a temporary store if it is in none."""
    try:
        return store.read_artifact(artifact).digest, store.root_of(artifact)
    except StageFailed:
        return f"not in a store: {artifact}", temporary / "store"


def digest(value: JsonValue) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(store.canonical_json(value)).hexdigest()
