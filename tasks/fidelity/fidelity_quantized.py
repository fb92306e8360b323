"""Compare the predictions of base model and quantized checkpoint: apply each model's head to its own hidden states."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.fidelity.sequences import (
    MEASURED,
    Sequence,
    Variant,
    digest_sequences,
    find_group,
    group_file,
    read_sequences,
    split_groups,
)
from quantize_gemma.tasks.fidelity.shards import ShardStore
from quantize_gemma.tasks.runtime import machine, store
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage

if TYPE_CHECKING:
    from torch import Tensor

    from quantize_gemma.tasks.fidelity.tokens import Head

COMPARE = (
    "quantize_gemma.tasks.fidelity.fidelity_quantized:compare_group",
    "quantize_gemma.tasks.fidelity.tokens:load_head",
)


@stage(resumes=True, memory=2.5, accelerated=True)
def fidelity_quantized(
    target: Path,
    base: Path,
    states: list[Path],
    checkpoint: Path,
    device: str,
    part: int = 0,
    parts: int = 1,
    refresh: bool = False,
) -> Output:
    """Write compare_logits()'s columns of the tokens of each of the part's groups, as safetensors.

    This function has more than seven parameters because each one is part of the stage's cache key.

    Args:
        target: The directory to write to.
        base: The base model's checkpoint.
        states: The outputs of the parts of fidelity_base() for it.
        checkpoint: The quantized checkpoint.
        device: "cpu" or "cuda".
        part: The number of the part, from 0.
        parts: The number of parts.
        refresh: Compute groups again even if they are in the store.

    Raises:
        UserError: There is no CUDA device.
    """
    from quantize_gemma.tasks.fidelity.states import Reader, group_states

    tokens = 0
    with store.open_store({"base": base, "checkpoint": checkpoint}) as (root, digests):
        shards = ShardStore(root, refresh)
        reader = Reader(checkpoint, digests.get("checkpoint"), device, machine.device_of_part(device, part))
        for name, (variant, kind) in MEASURED.items():
            groups = split_groups(read_sequences(states, kind), part, parts)
            # Compute all of them first, so that the layers are not in memory together with the heads.
            files = group_states(reader, variant, groups, shards)
            gc.collect()
            heads = Heads(base, checkpoint, variant, reader.loaded_on)
            key = {**reader.key(variant), "base": digests.get("base")}
            for index, (number, group) in enumerate(groups.items()):
                pair = find_group(states, name, number), files[number]
                compare = functools.partial(compare_group, heads, group, *pair)
                states_digests = [store.digest_file(file) for file in pair]
                identity = {**key, "states": states_digests, "sequences": digest_sequences(group)}
                shard = shards.file(COMPARE, identity, compare)
                store.link(shard, target / group_file(name, number))
                tokens += sum(len(row.targets) for row in group)
                report_progress(index + 1, len(groups), "groups")
            heads.clear()
    return {"metadata": {"tokens": tokens}}


class Heads:
    """The heads of both models, loaded when they are first needed."""

    def __init__(self, base: Path, checkpoint: Path, variant: Variant, device: str) -> None:
        self.arguments = base, checkpoint, variant, device
        self.heads: tuple[Head, Head] | None = None

    def get(self) -> tuple[Head, Head]:
        """Return the base model's head, and the checkpoint's."""
        from quantize_gemma.tasks.fidelity.tokens import load_head

        if self.heads is None:
            base, checkpoint, variant, device = self.arguments
            self.heads = load_head(base, variant, device), load_head(checkpoint, variant, device)
        return self.heads

    def clear(self) -> None:
        """Free the memory of the heads."""
        self.heads = None
        gc.collect()


def compare_group(heads: Heads, group: list[Sequence], base: Path, checkpoint: Path) -> dict[str, Tensor]:
    """Return compare_logits()'s columns for files of both models' hidden states, and the `sequence` of each token."""
    import torch
    from safetensors.torch import load_file

    from quantize_gemma.tasks.fidelity.tokens import compare_states

    targets = torch.tensor([token for row in group for token in row.targets])
    base_head, other_head = heads.get()
    states, other_states = (load_file(file)["hidden"] for file in (base, checkpoint))
    columns = compare_states((base_head, states), (other_head, other_states), targets)
    lengths = torch.tensor([len(row.targets) for row in group])
    return {**columns, "sequence": torch.repeat_interleave(torch.arange(len(group)), lengths)}
