"""Calibrate: the token sequences that a calibrated recipe sends through the model.

They come from a text and, if the model has a chat template, from the base model's own greedy answers to fixed prompts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.models.calibration import DISTILLATION, PROMPTS, check_size, write_calibration
from quantize_gemma.tasks.models.chat import has_chat_template
from quantize_gemma.tasks.models.recipe import ANSWER_BATCH
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# This many equal tokens in a row are not a coincidence: the model would be evaluated on its own calibration text.
OVERLAP = 32
# The maximum length of an answer in tokens.
ANSWER = 384


@stage(ignored=("text",), memory=2.5)
def calibrate(
    target: Path,
    checkpoint: Path,
    sequences: int,
    length: int,
    answers: int = 0,
    text: str | None = None,
    digest: str | None = None,
    dataset: Path | None = None,
    fidelity_text: Path | None = None,
    distilled: int = 0,
) -> Output:
    """Fill `target` with calibration.json: sequences of token ids, each <bos> and consecutive tokens.

    For a distilled recipe, distillation.json has more sequences, and the same answers. This function has more than
    seven parameters because each one is part of the stage's cache key.

    Args:
        target: An empty directory.
        checkpoint: The base model's checkpoint.
        sequences: The number of sequences of the text, evenly spaced; fewer if the text is shorter.
        length: The number of tokens in a sequence, including <bos>.
        answers: The number of additional sequences of answers, if the model has a chat template; fewer if the answers
            are shorter.
        text: The path of a text file; None for a dataset.
        digest: The SHA-256 that the file had when the run started.
        dataset: The directory of a dataset's files: text files, or parquet files with a `text` column.
        fidelity_text: The text that fidelity is measured on: a text file, or a directory with one; None to skip the
            check for overlap.
        distilled: The number of sequences of the text to distill on; 0 for a recipe without distillation.

    Raises:
        UserError: The text is too short or too long, is not UTF-8, has changed, or shares OVERLAP tokens in a row with
            the fidelity text.
    """
    from transformers import AutoTokenizer

    assert (text is None) != (dataset is None), "a text file or a dataset, not both"
    if text is not None and digest_text(text) != digest:
        raise UserError(f"the calibration text {text} changed during the run: start the run again")
    content = _read_text(Path(text)) if text is not None else read_dataset(dataset or Path())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokens: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
    windows = spread_windows(tokens, tokenizer.bos_token_id, sequences, length)
    if not windows:
        raise UserError(
            f"the calibration text has {len(tokens):,} tokens, fewer than the {length - 1:,} of one sequence: "
            "use a longer text"
        )
    if fidelity_text is not None:
        fidelity_tokens: list[int] = tokenizer(_read_text(fidelity_text), add_special_tokens=False)["input_ids"]
        refuse_overlap(tokens, fidelity_tokens, tokenizer)
    answer_windows = []
    if answers and has_chat_template(tokenizer):
        conversations = answer_prompts(checkpoint, tokenizer, answers * (length - 1))
        answer_windows = spread_windows(conversations, tokenizer.bos_token_id, answers, length)
    write_calibration(target, windows + answer_windows)
    if distilled:
        distillation_windows = spread_windows(tokens, tokenizer.bos_token_id, distilled, length) + answer_windows
        if len(distillation_windows) < 2:
            raise UserError(
                "the calibration text is only one sequence long, and distillation needs another to measure on: "
                "use a longer text"
            )
        write_calibration(target, distillation_windows, DISTILLATION)
    counts = {"sequences": len(windows), "answers": len(answer_windows), "length": length}
    return {"metadata": {**counts, "tokens": (len(windows) + len(answer_windows)) * length}}


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text file. Raises UserError if it cannot be read as UTF-8."""
    return hashlib.sha256(_read_text(Path(text)).encode()).hexdigest()


def read_dataset(folder: Path) -> str:
    """Return the contents of a dataset's files as one text, in the order of the file names.

    Raises:
        UserError: There are no files, they or their text are too large, or a parquet file has no `text` column of
            strings.
    """
    import pyarrow
    import pyarrow.parquet

    texts = []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    check_size(sum(path.stat().st_size for path in files))
    for path in files:
        if path.suffix != ".parquet":
            texts.append(_read_text(path))
            continue
        try:
            column = pyarrow.parquet.read_table(path, columns=["text"])["text"]
            rows = column.to_pylist()
            if not all(isinstance(row, str | None) for row in rows):
                raise TypeError(f"its type is {column.type}")
        except (pyarrow.ArrowException, OSError, KeyError, TypeError) as error:
            raise UserError(
                f"{path.relative_to(folder)} of the calibration dataset has no readable column 'text' ({error}): "
                "use a dataset of texts, or name its files, as in ORG/NAME:FILES"
            ) from None
        texts += [row.rstrip("\n") for row in rows if row]
    if not texts:
        raise UserError("the calibration dataset has no text or parquet file: name its files, as in ORG/NAME:FILES")
    text = "\n".join(texts)
    # Parquet files are compressed.
    check_size(len(text.encode()))
    return text


def spread_windows(tokens: list[int], bos: int, count: int, length: int) -> list[list[int]]:
    """Return at most `count` evenly spaced windows without overlap, each `bos` and `length` - 1 tokens."""
    size = length - 1
    available = len(tokens) // size
    count = min(count, available)
    starts = [number * available // count * size for number in range(count)]
    return [[bos, *tokens[start : start + size]] for start in starts]


def refuse_overlap(tokens: list[int], fidelity_tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the calibration text shares OVERLAP tokens in a row with the fidelity text."""
    start = find_overlap(tokens, fidelity_tokens)
    if start is not None:
        raise UserError(
            f"the calibration text shares {OVERLAP} tokens in a row with the fidelity text "
            f"({tokenizer.decode(tokens[start : start + OVERLAP])!r}): use a different text for one of the two"
        )


def find_overlap(tokens: list[int], other_tokens: list[int]) -> int | None:
    """Return the start of the first run of OVERLAP tokens that is in both lists; None if there is none."""
    runs = {tuple(other_tokens[start : start + OVERLAP]) for start in range(len(other_tokens) - OVERLAP + 1)}
    for start in range(len(tokens) - OVERLAP + 1):
        if tuple(tokens[start : start + OVERLAP]) in runs:
            return start
    return None


def answer_prompts(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Return the tokens of concatenated conversations without <bos>, at least `count` if there are enough prompts.

    A conversation is a prompt in the chat template and the model's greedy answer. Answers can differ between machines:
    in bfloat16, another machine may choose the other of two equally likely tokens.
    """
    import torch

    from quantize_gemma.tasks.models.checkpoint import drop_vision_encoder, end_token_ids, load_model

    model = load_model(checkpoint, torch.bfloat16)
    drop_vision_encoder(model)
    stop_tokens = end_token_ids(checkpoint)
    tokens: list[int] = []
    for first in range(0, len(PROMPTS), ANSWER_BATCH):
        if len(tokens) >= count:
            break
        messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[first : first + ANSWER_BATCH]]
        inputs = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        # Padding is on the left of a prompt. After an answer, it can be a stop token.
        width = inputs["input_ids"].shape[1]
        for mask, row in zip(inputs["attention_mask"].bool(), output, strict=True):
            answer = row[width:].tolist()
            end = next((count for count, token in enumerate(answer, 1) if token in stop_tokens), None)
            conversation = row[:width][mask].tolist() + answer[:end]
            tokens += [token for token in conversation if token != tokenizer.bos_token_id]
        report_progress(min(first + ANSWER_BATCH, len(PROMPTS)), len(PROMPTS), "prompts")
    return tokens


def _read_text(text: Path) -> str:
    path = next(iter(sorted(text.iterdir()))) if text.is_dir() else text
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the text {path} cannot be read ({error}): use a text file in UTF-8") from None
