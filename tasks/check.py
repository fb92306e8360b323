"""Check: everything that can be known before a long stage starts, so that a mistake costs seconds."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tasks import store
from tasks.builtin import BUILTIN
from tasks.checkpoint import quantizable_modules, read_config, read_headers, text_config, weight_files
from tasks.recipe import decide, load_recipe
from tasks.store import UserError

# What the stages write, in times of the base weights' size (bf16): the untied head, one byte per weight, the program
# in fp32 scales while it is lowered. The 4B shape: 8.6 GB of weights, 1.3 + 5.4 + 3.2 GB written.
DISK_FACTOR = 1.5


def check_run(model: str, recipe: str, max_seq_len: int, program: bool = True) -> dict[str, Any]:
    """Returns what the run will do: {"recipe", "modules", "disk_bytes_needed"}. Raises UserError for what cannot work.

    A model on the Hub is checked as far as its name; its files are checked when they are downloaded.
    """
    loaded = load_recipe(recipe)
    if program and max_seq_len < 2:
        raise UserError(f"max_seq_len is {max_seq_len}: give at least 2 tokens")
    _check_store(store.home())
    plan: dict[str, Any] = {"recipe": loaded["name"], "model": model}
    path = BUILTIN.get(model) or Path(model).expanduser()
    if not path.is_dir():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise UserError(
                f"there is no model at {model!r}: give a directory, a Hub repository such as google/gemma-3-4b-it, "
                f"or a built-in model ({', '.join(BUILTIN)})"
            )
        return plan
    check_checkpoint(path, loaded, max_seq_len if program else None)
    weights = sum(file.stat().st_size for file in weight_files(path))
    needed = int(weights * DISK_FACTOR)
    free = shutil.disk_usage(_existing(store.home())).free
    if free < needed:
        raise UserError(
            f"the run needs about {needed / 1e9:,.1f} GB in {store.home()}, but {free / 1e9:,.1f} GB are free: "
            "make room, or set QUANTIZE_GEMMA_HOME to a larger disk"
        )
    plan["disk_bytes_needed"] = needed
    return plan


def check_checkpoint(path: Path, recipe: dict[str, Any], max_seq_len: int | None) -> None:
    """Raises UserError if the checkpoint is no Gemma 3, is damaged, or does not fit recipe or max_seq_len."""
    config = read_config(path)
    limit = text_config(config).get("max_position_embeddings", 131_072)
    if max_seq_len is not None and max_seq_len > limit:
        raise UserError(f"max_seq_len is {max_seq_len:,}, but the model goes up to {limit:,}: give at most that")
    decide(recipe, quantizable_modules(read_headers(path)))


def _check_store(home: Path) -> None:
    existing = _existing(home)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"the store {home} is not writable ({error.strerror}): set QUANTIZE_GEMMA_HOME to a directory that is"
        ) from None


def _existing(path: Path) -> Path:
    while not os.path.lexists(path):
        path = path.parent
    return path
