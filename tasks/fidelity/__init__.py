"""Fidelity: how far a release is from its base model on text, token by token. (First table of the card.)

Benchmark accuracy says nothing if the model scores at chance level; fidelity still does. The base model's hidden states
are stored as an artifact, and each column's hidden states are compared with them through the models' own heads, so that
two models are never in memory at once, and only the logits of a few tokens are. The metrics are named as in llama.cpp's
--kl-divergence.

The protocol is fixed; sequences.py defines what is read, tokens.py how it is compared, and summary.py what is reported:

- The quantized checkpoint is measured as shipped, with quantized activations; like the base model, it computes in
  bfloat16. In addition, `weights_only` has the metrics of both models in float32 without quantized activations, which
  are used to compare recipes; `second_half` scores only the second half of each window, as llama.cpp does, to compare
  with a GGUF file; and `chat` scores the base model's own answers to fixed prompts, if the model has a chat template.
- The program, model.pte in the ExecuTorch runtime, is measured on every eighth token of a few windows, and so is the
  checkpoint.

fidelity_base, fidelity_quantized, and fidelity_program compare tokens, in parts; this stage aggregates them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.fidelity.sequences import GROUP, MEASURED, WINDOW
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.strict_json import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Columns = dict[str, NDArray[np.float32]]

# The number of tokens in a window that predict a next token.
SCORED_TOKENS = WINDOW - 1


@stage()
def fidelity(target: Path, quantized: list[Path], program: list[Path], reference: list[Path] | None = None) -> Output:
    """Write results.json: {"quantized": text_fidelity.Fidelity, "program": text_fidelity.ProgramFidelity}.

    With a reference model, its fields `reference` are a text_fidelity.Fidelity, too.

    Args:
        target: The directory to write to.
        quantized: The outputs of the parts of fidelity_quantized().
        program: The outputs of the parts of fidelity_program().
        reference: The outputs of the parts of fidelity_quantized() for the reference model, if there is one.
    """
    results = {"quantized": summarize_quantized(quantized), "program": summarize_program(quantized, program)}
    if reference is not None:
        results["reference"] = summarize_quantized(reference)
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    names = ("kl_mean", "same_top", "ppl", "ppl_base", "tokens")
    return {"metadata": {name: results["quantized"][name] for name in names}}


def summarize_quantized(folders: list[Path]) -> JsonObject:
    """Return the metrics of the quantized checkpoint."""
    import numpy as np

    results: dict[str, JsonObject] = {}
    for name in MEASURED:
        columns, windows = _read_columns(folders, name)
        if not columns:
            continue
        results[name] = _metrics(columns, windows)
        if name == "text":
            # The tokens that llama.cpp scores in windows of this length.
            in_second_half = np.arange(len(windows)) % SCORED_TOKENS >= WINDOW // 2
            half = {column: values[in_second_half] for column, values in columns.items()}
            results["second_half"] = _metrics(half, windows[in_second_half])
    return {**results.pop("text"), **results}


def summarize_program(quantized: list[Path], program: list[Path]) -> JsonObject:
    """Return the metrics of the program, and as `checkpoint` those of the checkpoint on the same tokens."""
    import numpy as np

    columns, windows = _read_columns(program, "program")
    checkpoint_columns, _ = _read_columns(quantized, "text")
    token_numbers = windows * SCORED_TOKENS + columns["position"].astype(np.int64)
    return {
        **_metrics(columns, windows),
        "checkpoint": _metrics({name: values[token_numbers] for name, values in checkpoint_columns.items()}, windows),
    }


def _read_columns(folders: list[Path], name: str) -> tuple[Columns, NDArray[np.int64]]:
    """Return the columns of all tokens in order, and the number of each token's window; none if there are no files."""
    import numpy as np
    from safetensors.numpy import load_file

    files = sorted((file for folder in folders for file in folder.glob(f"{name}-*")), key=lambda file: file.name)
    groups = {int(file.stem.rpartition("-")[2]): load_file(file) for file in files}
    windows = [
        number * GROUP + group["sequence"] if "sequence" in group else np.full(len(group["kl"]), number)
        for number, group in groups.items()
    ]
    columns = {
        column: np.concatenate([group[column] for group in groups.values()])
        for column in next(iter(groups.values()), {})
    }
    return columns, np.concatenate([*windows, np.empty(0, np.int64)])


def _metrics(columns: Columns, windows: NDArray[np.int64]) -> JsonObject:
    import numpy as np

    from quantize_gemma.tasks.fidelity.summary import histogram, summarize

    _, numbers = np.unique(windows, return_inverse=True)
    return {**summarize(columns, numbers), "kl_histogram": histogram(columns["kl"])}
