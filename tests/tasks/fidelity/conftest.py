"""Here, stages are called as functions; in a run, a worker process keeps the artifacts that they pin."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.runtime import store


@pytest.fixture(autouse=True, scope="package")
def pinned() -> Iterator[None]:
    with store.keep_pinned():
        yield


def in_a_store(stage: str, folder: Path, root: Path) -> Path:
    """Copy a folder into a store; return the path of the copy."""

    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return {}

    return store.produce(stage, "0" * 64, copy, root).path


def halve(file: Path, target: Path) -> Path:
    """Write a file's hidden states, divided by two."""
    from safetensors.torch import load_file, save_file

    save_file({"hidden": load_file(file)["hidden"] / 2}, target)
    return target


def halve_states(folder: Path, target: Path) -> Path:
    """Copy an output of fidelity_base(), with halved hidden states."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        halve(folder / file.name, file)
    return target
