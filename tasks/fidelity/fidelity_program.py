"""Compare the predictions of the base model and the program on a sample of tokens, in the ExecuTorch runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.fidelity.sequences import (
    GROUP,
    WINDOW,
    Sequence,
    digest_sequences,
    find_group,
    group_file,
    read_sequences,
    sample,
)
from quantize_gemma.tasks.fidelity.shards import ShardStore
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage

if TYPE_CHECKING:
    from torch import Tensor

    from quantize_gemma.tasks.fidelity.tokens import Head
    from quantize_gemma.tasks.models.pte import PteProgram

# The program returns only the logits of the last token, so each scored token costs a call.
PROGRAM_STEP = 8
# The number of windows of the text that the program reads.
PROGRAM_WINDOWS = 4
COMPARE = (
    "quantize_gemma.tasks.fidelity.fidelity_program:compare_window",
    "quantize_gemma.tasks.fidelity.tokens:load_head",
    "quantize_gemma.tasks.models.pte:PteProgram",
)


@stage(resumes=True, memory=1.6)
def fidelity_program(
    target: Path,
    base: Path,
    states: list[Path],
    program: Path,
    windows: int,
    part: int = 0,
    parts: int = 1,
    refresh: bool = False,
) -> Output:
    """Write compare_logits()'s columns of the scored tokens of each of the part's windows, as safetensors.

    This function has more than seven parameters because each one is part of the stage's cache key.

    Args:
        target: The directory to write to.
        base: The base model's checkpoint.
        states: The outputs of the parts of fidelity_base() for it.
        program: The directory of model.pte.
        windows: The number of windows to read, evenly spaced; all if there are fewer.
        part: The number of the part, from 0.
        parts: The number of parts.
        refresh: Compute windows again even if they are in the store.
    """
    rows = read_sequences(states, "text")
    numbers = sample(len(rows), windows)[part::parts]
    models = _Models(base, program)
    with store.open_store({"base": base, "program": program}) as (root, digests):
        shards = ShardStore(root, refresh)
        for index, number in enumerate(numbers):
            file = find_group(states, "text", number // GROUP)

            def compare(
                row: Sequence = rows[number], file: Path = file, row_index: int = number % GROUP
            ) -> dict[str, Tensor]:
                return compare_window(*models.get(), row, file, row_index)

            identity = {
                **digests,
                "states": store.digest_file(file),
                "sequences": digest_sequences([rows[number]]),
                "step": PROGRAM_STEP,
            }
            store.link(shards.file(COMPARE, identity, compare), target / group_file("program", number))
            report_progress(index + 1, len(numbers), "windows")
    return {"metadata": {"windows": len(numbers)}}


@dataclass
class _Models:
    """The base model's head and the program, loaded when they are first needed."""

    base: Path
    program: Path
    models: tuple[Head, PteProgram] | None = None

    def get(self) -> tuple[Head, PteProgram]:
        from quantize_gemma.tasks.fidelity.tokens import load_head
        from quantize_gemma.tasks.models.pte import PteProgram

        if self.models is None:
            head = load_head(self.base, "as_shipped", "cpu")
            self.models = head, PteProgram(self.program / "model.pte")
        return self.models


def compare_window(head: Head, program: PteProgram, row: Sequence, states: Path, index: int) -> dict[str, Tensor]:
    """Return compare_logits()'s columns for every eighth token of a window, and the `position` of each.

    Args:
        head: The base model's head.
        program: The program.
        row: The window.
        states: The file of the base model's hidden states of the window's group.
        index: The window's index in its group.
    """
    import torch
    from safetensors.torch import load_file

    from quantize_gemma.tasks.fidelity.tokens import compare_logits

    positions = list(range(PROGRAM_STEP - 1, min(WINDOW - 1, program.max_seq_len), PROGRAM_STEP))
    ids = torch.tensor([row.ids])
    logits = program.decode(program.embed_tokens(ids[:, : positions[-1] + 1]), set(positions))
    hidden = load_file(states)["hidden"].unflatten(0, (-1, WINDOW - 1))[index]
    indices = torch.tensor(positions)
    return {**compare_logits(head(hidden[indices]), logits, ids[0, indices + 1]), "position": indices}
