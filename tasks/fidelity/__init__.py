"""Fidelity: how far a release is from its base model on text, token by token. (First table of the card.)

Accuracy on a benchmark says nothing of a model that answers it by chance; this does. The base model's hidden states are
kept as an artifact, and each column's are compared with them through both models' own heads, so no two models are in
memory at once, and logits only of a few tokens. The names are those of llama.cpp's --kl-divergence.

The protocol is fixed; sequences.py says what is read, tokens.py how it is compared, summary.py what is reported:

- `fidelity_quantized` is as shipped: quantized activations, in bfloat16, as the base model is. Beside it, the metrics
  of `weights_only` are those of both models in float32 without quantized activations, by which recipes are compared;
  `second_half` scores the second half of each window alone, as llama.cpp does, for whoever has a GGUF; and `chat`
  scores the base model's own answers to fixed prompts, if the model has a chat template.
- `fidelity_program` is model.pte in the ExecuTorch runtime, on every eighth token of a few windows, and beside it the
  checkpoint on the same tokens.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.fidelity.parts import Parts, digest, locate_in_store
from quantize_gemma.tasks.fidelity.sequences import (
    WINDOW,
    Sequence,
    make_windows,
    read_sequences,
    read_text,
    write_sequences,
)
from quantize_gemma.tasks.runtime.parent_process import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.store import link
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from quantize_gemma.tasks.fidelity.states import Variant
    from quantize_gemma.tasks.fidelity.tokens import Head

# The program returns the logits of the last token of what it reads: each scored token costs a call.
PROGRAM_STEP = 8
SEQUENCES = "sequences.json"
# What is measured: how the models compute, and on what.
MEASURED: dict[str, tuple[Variant, str]] = {
    "text": ("as_shipped", "text"),
    "weights_only": ("weights_only", "text"),
    "chat": ("as_shipped", "chat"),
}


@stage(resumes=True, memory=2.5, accelerated=True)
def fidelity_base(
    target: Path, checkpoint: Path, text: Path, windows: int, device: str, refresh: bool = False
) -> Output:
    """Write sequences.json, see sequences.py, and the base model's hidden states of each group of sequences.

    Args:
        target: The directory to write to.
        checkpoint: The base model's checkpoint.
        text: A directory with the text, see read_text().
        windows: How many windows of the text to read; fewer if it is shorter.
        device: "cpu" or "cuda".
        refresh: Compute groups again that are in the store.

    Raises:
        UserError: The text is shorter than a window.
    """
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.fidelity.states import answer_prompts, group_states

    with tempfile.TemporaryDirectory() as folder:
        identity, root = locate_in_store(checkpoint, Path(folder))
        parts = Parts(root, refresh)
        rows = {
            "text": make_windows(read_text(text), AutoTokenizer.from_pretrained(checkpoint), windows),
            "chat": answer_prompts(checkpoint, identity, parts, device),
        }
        write_sequences(rows, target / SEQUENCES)
        for name, (variant, kind) in MEASURED.items():
            gc.collect()
            files = group_states(checkpoint, identity, variant, rows[kind], parts, device)
            for number, file in enumerate(files):
                link(file, target / _states_file(name, number))
    return {"metadata": {"windows": len(rows["text"]), "window": WINDOW, "chats": len(rows["chat"])}}


@stage(resumes=True, memory=2.5, accelerated=True)
def fidelity_quantized(
    target: Path, base: Path, states: Path, checkpoint: Path, device: str, refresh: bool = False
) -> Output:
    """Write results.json, see summarize(), and tokens.safetensors: compare_logits()'s columns of each token.

    Args:
        target: The directory to write to.
        base: The base model's checkpoint.
        states: What fidelity_base() wrote for it.
        checkpoint: The quantized checkpoint.
        device: "cpu" or "cuda".
        refresh: Compute groups again that are in the store.
    """
    from safetensors.torch import save_file

    from quantize_gemma.tasks.fidelity.states import group_states

    rows = read_sequences(states / SEQUENCES)
    results: dict[str, JsonObject] = {}
    columns: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        identity, root = locate_in_store(checkpoint, Path(folder))
        base_identity, _ = locate_in_store(base, Path(folder))
        parts = Parts(root, refresh)
        for name, (variant, kind) in MEASURED.items():
            if not rows[kind]:
                continue
            # All of them first: then the layers are not in memory when the heads are.
            other_files = list(group_states(checkpoint, identity, variant, rows[kind], parts, device))
            gc.collect()
            base_files = [states / _states_file(name, number) for number in range(len(other_files))]
            key = {"base": base_identity, "checkpoint": identity, "variant": variant, "device": device}
            heads = _Heads(base, checkpoint, variant, device)
            tokens = _compare_groups(heads, key, rows[kind], list(zip(base_files, other_files, strict=True)), parts)
            del heads
            gc.collect()
            columns |= {f"{name}.{column}": values for column, values in tokens.items()}
            results[name] = _summarize(tokens, rows[kind])
            if name == "text":
                results["second_half"] = _summarize_second_half(tokens, rows[kind])
    results = {**results.pop("text"), **results}
    save_file(columns, target / "tokens.safetensors")
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return {"metadata": {name: results[name] for name in ("kl_mean", "same_top", "ppl", "ppl_base", "tokens")}}


@stage(memory=1.6)
def fidelity_program(target: Path, base: Path, states: Path, quantized: Path, program: Path, windows: int) -> Output:
    """Write results.json: the program's metrics, and as `checkpoint` those of the checkpoint on the same tokens.

    Args:
        target: The directory to write to.
        base: The base model's checkpoint.
        states: What fidelity_base() wrote for it.
        quantized: What fidelity_quantized() wrote for the checkpoint that the program was exported from.
        program: The directory of model.pte.
        windows: How many of the windows to read, evenly spread; all if there are fewer.
    """
    import torch
    from safetensors.torch import load_file

    from quantize_gemma.tasks.fidelity.states import GROUP
    from quantize_gemma.tasks.fidelity.tokens import compare_logits, load_head
    from quantize_gemma.tasks.models.pte import PteProgram

    rows = read_sequences(states / SEQUENCES)["text"]
    pte = PteProgram(program / "model.pte")
    positions = range(PROGRAM_STEP - 1, min(WINDOW - 1, pte.max_seq_len), PROGRAM_STEP)
    chosen = sample(len(rows), windows)
    logits = []
    for done, number in enumerate(chosen):
        ids = torch.tensor([rows[number].ids[: positions[-1] + 1]])
        logits.append(pte.decode(pte.embed_tokens(ids), set(positions)))
        report_progress(done + 1, len(chosen), "windows")
    del pte
    gc.collect()
    head = load_head(base, "as_shipped", "cpu")
    compared = []
    for number, ours in zip(chosen, logits, strict=True):
        file = states / _states_file("text", number // GROUP)
        hidden = load_file(file)["hidden"].unflatten(0, (-1, WINDOW - 1))[number % GROUP]
        targets = torch.tensor(rows[number].ids)[torch.tensor(positions) + 1]
        compared.append(compare_logits(head(hidden[list(positions)]), ours, targets))
    columns = {name: torch.cat([each[name] for each in compared]) for name in compared[0]}
    at = torch.tensor([number * (WINDOW - 1) + position for number in chosen for position in positions])
    shipped = {
        name.removeprefix("text."): values[at]
        for name, values in load_file(quantized / "tokens.safetensors").items()
        if name.startswith("text.")
    }
    numbers = [index for index in range(len(chosen)) for _ in positions]
    results = {**_metrics(columns, numbers), "checkpoint": _metrics(shipped, numbers)}
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return {"metadata": {name: results[name] for name in ("kl_mean", "same_top", "ppl", "ppl_base", "tokens")}}


def sample(count: int, size: int) -> list[int]:
    """Return `size` of `count` numbers, evenly spread; all if there are fewer. Always the same."""
    size = min(size, count)
    return [number * count // size for number in range(size)]


class _Heads:
    """The heads of both models, loaded when they are first needed."""

    def __init__(self, base: Path, checkpoint: Path, variant: Variant, device: str) -> None:
        self.arguments = base, checkpoint, variant, device
        self.loaded: tuple[Head, Head] | None = None

    def get(self) -> tuple[Head, Head]:
        from quantize_gemma.tasks.fidelity.tokens import load_head

        if self.loaded is None:
            base, checkpoint, variant, device = self.arguments
            self.loaded = load_head(base, variant, device), load_head(checkpoint, variant, device)
        return self.loaded


def _compare_groups(
    heads: _Heads, key: JsonObject, rows: list[Sequence], files: list[tuple[Path, Path]], parts: Parts
) -> dict[str, Tensor]:
    """Return compare_logits()'s columns of all sequences, from the hidden states of both models in each group."""
    import torch
    from safetensors.torch import load_file

    from quantize_gemma.tasks.fidelity.states import GROUP
    from quantize_gemma.tasks.fidelity.tokens import compare_states

    compared = []
    for number, (base_file, other_file) in enumerate(files):
        group = rows[number * GROUP : (number + 1) * GROUP]

        def compute(
            group: list[Sequence] = group, base: Path = base_file, other: Path = other_file
        ) -> dict[str, Tensor]:
            targets = torch.tensor([token for row in group for token in row.targets])
            base_head, other_head = heads.get()
            return compare_states(
                (base_head, load_file(base)["hidden"]), (other_head, load_file(other)["hidden"]), targets
            )

        identity = {**key, "sequences": digest([[list(row.ids), row.first] for row in group])}
        compared.append(load_file(parts.file("quantize_gemma.tasks.fidelity.tokens:compare_states", identity, compute)))
        report_progress(number + 1, len(files), "groups")
    return {name: torch.cat([each[name] for each in compared]) for name in compared[0]}


def _summarize(tokens: dict[str, Tensor], rows: list[Sequence]) -> JsonObject:
    return _metrics(tokens, [number for number, row in enumerate(rows) for _ in row.targets])


def _summarize_second_half(tokens: dict[str, Tensor], rows: list[Sequence]) -> JsonObject:
    """Return the metrics of the tokens that llama.cpp scores in windows of this length."""
    import torch

    places = [(number, position) for number, row in enumerate(rows) for position in range(len(row.targets))]
    kept = torch.tensor([position >= WINDOW // 2 for _, position in places])
    windows = [number for number, position in places if position >= WINDOW // 2]
    return _metrics({name: values[kept] for name, values in tokens.items()}, windows)


def _metrics(tokens: dict[str, Tensor], windows: list[int]) -> JsonObject:
    import numpy as np

    from quantize_gemma.tasks.fidelity.summary import histogram, summarize

    columns: dict[str, NDArray[np.float32]] = {name: values.numpy() for name, values in tokens.items()}
    return {**summarize(columns, np.array(windows)), "kl_histogram": histogram(columns["kl"])}


def _states_file(name: str, number: int) -> str:
    return f"{name}-{number:04}.safetensors"
