"""The token sequences that models are compared on: windows of a text, and chats with the base model's own answers.

A window is `<bos>` and the next 511 tokens of the text; windows do not overlap, and what is left at the end is not
used. Every position is scored: position t predicts token t + 1. In a chat, the tokens of the answer are scored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
# The test split of Salesforce/wikitext, wikitext-2-raw-v1.
PARQUET = "wikitext-2-raw-v1/test-*.parquet"
TEXT_FILE = "text.txt"


@dataclass(frozen=True)
class Sequence:
    """Tokens that a model reads at once.

    Attributes:
        ids: Token ids, `<bos>` first.
        first: The first scored position; all after it are scored, except for the last, which predicts no token.
    """

    ids: tuple[int, ...]
    first: int = 0

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens that the scored positions predict."""
        return self.ids[self.first + 1 :]


def read_text(folder: Path) -> str:
    """Return the text in an artifact: WikiText's parquet files, or one file of text.

    WikiText's rows are joined by two line breaks, as in Hugging Face's guide to perplexity and in the published figures
    of quantization methods.

    Raises:
        UserError: There is no text.
    """
    files = sorted(folder.glob(PARQUET))
    if files:
        import pyarrow.parquet

        rows = [row for file in files for row in pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist()]
        return "\n\n".join(rows)
    try:
        return (folder / TEXT_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{folder} has neither {PARQUET} nor {TEXT_FILE}: use a text file or WikiText") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not UTF-8 ({error}): convert it") from None


def make_windows(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Sequence]:
    """Return the first windows of a text: `count`, or as many as it has.

    Raises:
        UserError: The text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = WINDOW - 1
    if len(ids) < step:
        raise UserError(f"the text has {len(ids)} tokens, but one window takes {step}: use a longer text")
    starts = range(0, min(count, len(ids) // step) * step, step)
    return [Sequence((tokenizer.bos_token_id, *ids[start : start + step])) for start in starts]


def chat_prompts() -> list[str]:
    """Return the fixed prompts whose answers are compared."""
    prompts: list[str] = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    return prompts


def format_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt in the tokenizer's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template writes <bos> itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def write_sequences(sequences: dict[str, list[Sequence]], path: Path) -> None:
    """Write the sequences of each kind."""
    path.write_text(json.dumps({kind: [asdict(one) for one in rows] for kind, rows in sequences.items()}), "utf-8")


def read_sequences(path: Path) -> dict[str, list[Sequence]]:
    """Return the sequences of each kind, "text" and "chat"."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {kind: [Sequence(tuple(one["ids"]), one["first"]) for one in rows] for kind, rows in content.items()}
