"""The base model's hidden states on the text, stored so that two models are never in memory at once."""

import gc
from pathlib import Path

from quantize_gemma.tasks.fidelity.sequences import MEASURED, group_file, make_windows, split_groups, write_group
from quantize_gemma.tasks.fidelity.shards import ShardStore
from quantize_gemma.tasks.models.datasets import TEXT_FILE
from quantize_gemma.tasks.runtime import machine, store
from quantize_gemma.tasks.runtime.stage import Output, stage


@stage(resumes=True, memory=2.5, accelerated=True)
def fidelity_base(
    target: Path,
    checkpoint: Path,
    text: Path,
    windows: int,
    device: str,
    part: int = 0,
    parts: int = 1,
    refresh: bool = False,
) -> Output:
    """Write the part's groups of sequences, and the base model's hidden states of each.

    This function has more than seven parameters because each one is part of the stage's cache key.

    Args:
        target: The directory to write to.
        checkpoint: The base model's checkpoint.
        text: The directory with the text, text.txt.
        windows: The number of windows of the text to read; fewer if it is shorter.
        device: "cpu" or "cuda".
        part: The number of the part, from 0.
        parts: The number of parts.
        refresh: Compute groups again even if they are in the store.

    Raises:
        UserError: The text is shorter than a window, or there is no CUDA device.
    """
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.fidelity.states import Reader, answer_prompts, group_states

    with store.open_store({"checkpoint": checkpoint}) as (root, digests):
        shards = ShardStore(root, refresh)
        reader = Reader(checkpoint, digests.get("checkpoint"), device, machine.device_of_part(device, part))
        content = (text / TEXT_FILE).read_text(encoding="utf-8")
        rows = make_windows(content, AutoTokenizer.from_pretrained(checkpoint), windows)
        groups = {
            "text": split_groups(rows, part, parts),
            "chat": answer_prompts(reader, shards, part, parts),
        }
        for kind, groups_of_kind in groups.items():
            for number, group in groups_of_kind.items():
                write_group(group, kind, number, target)
        for name, (variant, kind) in MEASURED.items():
            # Free the model of the previous variant.
            gc.collect()
            for number, file in group_states(reader, variant, groups[kind], shards).items():
                store.link(file, target / group_file(name, number))
    return {"metadata": {kind: sum(map(len, groups_of_kind.values())) for kind, groups_of_kind in groups.items()}}
