"""Calibration data: the source, and the token file that `calibrate` writes and other stages read."""

import json
from dataclasses import dataclass
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError

FILE = "calibration.json"
# The file of the sequences that a distilled recipe trains on.
DISTILLATION = "distillation.json"
# The text is tokenized at once, which takes up to a hundred times its size in memory; a distillation uses 0.6 MB of it.
MAX_BYTES = 16_000_000
# The default patterns of a dataset's files.
DATASET_FILES = ("*.parquet", "*.txt")
# Prompts for a base model with a chat template. None of them is also a fidelity prompt.
PROMPTS = (
    "How does a bicycle stay upright while it is moving?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain the difference between machine learning and statistics to a manager.",
    "Write a Python class for a queue with a maximum length, and show how it is used.",
    "A shop sells pens at 3 for 2 dollars. How much do 15 pens cost? Think step by step.",
    "What caused the First World War? Answer in two paragraphs.",
    "Plan a three-day trip to Lisbon for a family with two small children.",
    "Write an SQL query that returns the five customers with the largest total of orders.",
    "Describe how bread is made, from the grain to the loaf.",
    "Give arguments for and against a four-day working week.",
    "Explica en español cómo se forma un arco iris.",
    "Write a cover letter for a nurse who applies to a children's hospital.",
    "What is the difference between TCP and UDP? When would you use each?",
    "Turn this into a bulleted list: we need apples, two liters of milk, some bread, and eggs if they are cheap.",
    "Solve for x: 3x + 7 = 2x - 5. Explain each step.",
    "Write a dialogue between a customer and a waiter about an order that went wrong.",
    "How do vaccines work, and why do some need a booster?",
    "Write a JavaScript function that removes duplicates from an array and keeps the order.",
    "Expliquez en français comment fonctionne un moteur électrique.",
    "Suggest ten names for a small bakery by the sea, with a reason for each.",
    "What should I check before I buy a used car?",
    "Write a poem of three stanzas about a city at night.",
    "Explain what inflation is, what causes it, and who gains from it.",
    "Review this code and improve it: for i in range(len(a)): print(a[i])",
    "How far away is the Moon, and how was that first measured?",
    "Write the minutes of a meeting in which three people agree on a new logo.",
    "Beschreibe auf Deutsch, wie man ein gutes Vorstellungsgespräch führt.",
    "What are the health effects of too little sleep?",
    "Give a JSON object that describes a book with its title, authors, year, and three reviews.",
    "Explain recursion with an example that is not the factorial.",
    "Tell me about the water cycle as if you were a raindrop.",
    "What does a central bank do?",
)


@dataclass(frozen=True)
class CalibrationSource:
    """The value of `--calibration`: a text file, or a dataset on the Hub, with a pattern of file names in `files`."""

    name: str
    on_hub: bool
    revision: str | None = None
    files: str | None = None

    def patterns(self) -> tuple[str, ...]:
        """Return the patterns of the dataset's files."""
        return (self.files,) if self.files else DATASET_FILES


def parse_source(text: str) -> CalibrationSource:
    """Parse `text`: the path of a file, or ORG/NAME[@REVISION][:FILES] on the Hub."""
    is_file = text.startswith((".", "/", "~")) or text.partition(":")[0].endswith(".txt") or "/" not in text
    if is_file or Path(text).is_file():
        return CalibrationSource(str(Path(text).expanduser()), on_hub=False)
    source, _, files = text.partition(":")
    name, _, revision = source.partition("@")
    return CalibrationSource(name, True, revision or None, files or None)


def check_size(size: int) -> None:
    """Raise UserError if a calibration text of this size in bytes is too large."""
    if size > MAX_BYTES:
        raise UserError(
            f"the calibration text is {size / 1e6:,.0f} MB, but at most {MAX_BYTES / 1e6:.0f} MB can be tokenized: "
            "use a shorter one, or fewer files of the dataset, as in ORG/NAME:FILES"
        )


def write_calibration(target: Path, sequences: list[list[int]], file: str = FILE) -> None:
    """Write token ids, [sequences, length]."""
    (target / file).write_text(json.dumps(sequences) + "\n", encoding="utf-8")


def read_calibration(folder: Path, file: str = FILE) -> list[list[int]]:
    """Return token ids, [sequences, length]."""
    sequences: list[list[int]] = json.loads((folder / file).read_text(encoding="utf-8"))
    return sequences
