"""What a run says of itself at its end: the object that `quantize-gemma run --json` prints, whatever happened."""

from typing import Any


def empty_summary() -> dict[str, Any]:
    """Returns the summary of a run that has not done anything."""
    return {
        "release": None,
        "gate": None,
        "metrics": {},
        "stages": [],
        "published": None,
        "publication": None,
        "error": None,
    }


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `summary` is what the run had done by then."""

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.summary = summary
