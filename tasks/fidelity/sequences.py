"""The token sequences on which models are compared: windows of a text, and chats with the base model's own answers.

A window is `<bos>` and the next 511 tokens of the text; windows do not overlap, and the remainder is not used. Every
position is scored: position t predicts token t + 1. In a chat, only the tokens of the answer are scored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantize_gemma.tasks.fidelity.shards import digest
from quantize_gemma.tasks.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
# Sequences per group. They run as a batch, and at most one group is lost if a stage is killed.
GROUP = 4
# How models compute: in bfloat16 with quantized activations, or in float32 without.
Variant = Literal["as_shipped", "weights_only"]
# The variants that are measured: how the models compute, and on which kind of sequences.
MEASURED: dict[str, tuple[Variant, str]] = {
    "text": ("as_shipped", "text"),
    "weights_only": ("weights_only", "text"),
    "chat": ("as_shipped", "chat"),
}


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


def split_groups(rows: list[Sequence], part: int, parts: int) -> dict[int, list[Sequence]]:
    """Return a part's groups of sequences by number: every group belongs to exactly one part."""
    groups = {start // GROUP: rows[start : start + GROUP] for start in range(0, len(rows), GROUP)}
    return {number: group for number, group in groups.items() if number % parts == part}


def group_file(name: str, number: int, suffix: str = "safetensors") -> str:
    """Return the name of a group's file, which does not depend on the part that writes it."""
    return f"{name}-{number:04}.{suffix}"


def write_group(group: list[Sequence], kind: str, number: int, folder: Path) -> None:
    """Write the sequences of a group."""
    path = folder / group_file(kind, number, "json")
    path.write_text(json.dumps([asdict(sequence) for sequence in group]), encoding="utf-8")


def read_sequences(folders: list[Path], kind: str) -> list[Sequence]:
    """Read all sequences of a kind, "text" or "chat", from the directories of the parts that wrote them."""
    files = sorted((file for folder in folders for file in folder.glob(f"{kind}-*.json")), key=lambda file: file.name)
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return [Sequence(tuple(row["ids"]), row["first"]) for row in rows]


def find_group(folders: list[Path], name: str, number: int) -> Path:
    """Return a group's safetensors file in one of these directories."""
    return next(path for folder in folders if (path := folder / group_file(name, number)).exists())


def digest_sequences(group: list[Sequence]) -> str:
    """Return the SHA-256 that identifies sequences in a key."""
    return digest([[list(row.ids), row.first] for row in group])


def sample(count: int, size: int) -> list[int]:
    """Return `size` of `count` numbers, evenly spaced; all if there are fewer. The choice is deterministic."""
    size = min(size, count)
    return [number * count // size for number in range(size)]
