"""Calibrate: the token sequences of a text that a calibrated recipe sends through the model."""

import hashlib
from pathlib import Path

from quantize_gemma.tasks.models.calibration import write_calibration
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.stage import Output, stage

# So many equal tokens in a row are no chance: the text is measured with what it was calibrated on.
OVERLAP = 32


@stage(ignored=("text",))
def calibrate(
    target: Path,
    checkpoint: Path,
    text: str,
    digest: str,
    sequences: int,
    length: int,
    fidelity_text: Path | None = None,
) -> Output:
    """Fill `target` with calibration.json: sequences of token ids, each <bos> and consecutive tokens of the text.

    Args:
        target: An empty directory.
        checkpoint: A checkpoint with its tokenizer.
        text: The path of a text file.
        digest: The SHA-256 that the file had when the run started.
        sequences: How many sequences to take, evenly spread over the text; fewer if it is shorter.
        length: Tokens of a sequence, <bos> included.
        fidelity_text: What the result is measured on, if anything: a text file, or a directory with one.

    Raises:
        UserError: The text is too short, is not UTF-8, has changed, or shares OVERLAP tokens in a row with the
            fidelity text.
    """
    from transformers import AutoTokenizer

    if digest_text(text) != digest:
        raise UserError(f"the calibration text {text} changed while the run was going on: start it again")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens: list[int] = tokenizer(_read(Path(text)), add_special_tokens=False)["input_ids"]
    if fidelity_text is not None:
        measured: list[int] = tokenizer(_read(fidelity_text), add_special_tokens=False)["input_ids"]
        shared = find_overlap(tokens, measured)
        if shared is not None:
            raise UserError(
                f"the calibration text shares {OVERLAP} tokens in a row with the fidelity text "
                f"({tokenizer.decode(tokens[shared : shared + OVERLAP])!r}): use another text for one of them"
            )
    chosen = spread_windows(tokens, tokenizer.bos_token_id, sequences, length)
    if not chosen:
        raise UserError(
            f"the calibration text has {len(tokens):,} tokens, fewer than the {length - 1:,} of one sequence: "
            "use a longer one"
        )
    write_calibration(target, chosen)
    counts = {"sequences": len(chosen), "length": length, "tokens": len(chosen) * length}
    return {"metadata": {"text": digest, **counts}}


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text file. Raises UserError if it cannot be read as UTF-8."""
    return hashlib.sha256(_read(Path(text)).encode()).hexdigest()


def spread_windows(tokens: list[int], bos: int, count: int, length: int) -> list[list[int]]:
    """Return at most `count` windows without overlap, each `bos` and `length` - 1 tokens, evenly spread."""
    size = length - 1
    available = len(tokens) // size
    count = min(count, available)
    starts = [number * available // count * size for number in range(count)]
    return [[bos, *tokens[start : start + size]] for start in starts]


def find_overlap(tokens: list[int], others: list[int]) -> int | None:
    """Return where the first run of OVERLAP tokens starts that is in both; None if there is none."""
    runs = {tuple(others[start : start + OVERLAP]) for start in range(len(others) - OVERLAP + 1)}
    for start in range(len(tokens) - OVERLAP + 1):
        if tuple(tokens[start : start + OVERLAP]) in runs:
            return start
    return None


def _read(text: Path) -> str:
    path = next(iter(sorted(text.iterdir()))) if text.is_dir() else text
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the text {path} cannot be read ({error}): use a text file in UTF-8") from None
