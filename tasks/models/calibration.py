"""The calibration tokens between the stage that prepares them and the one that reads them."""

import json
from pathlib import Path

FILE = "calibration.json"


def write_calibration(target: Path, sequences: list[list[int]]) -> None:
    """Write token ids, [sequences, length]."""
    (target / FILE).write_text(json.dumps(sequences) + "\n", encoding="utf-8")


def read_calibration(folder: Path) -> list[list[int]]:
    """Return token ids, [sequences, length]."""
    sequences: list[list[int]] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return sequences
