"""The summary of a run, which `quantize-gemma run --json` prints however the run ends.

It is in its own module, so that the command line can print it without importing Prefect, which takes seconds.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from quantize_gemma.tasks.runtime.strict_json import JsonObject


@dataclass(frozen=True)
class StageSummary:
    """The cost of one stage. A stage without an artifact has no key; times are in seconds, sizes in bytes."""

    name: str
    state: str
    cached: bool = False
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    size_bytes: int = 0
    key: str | None = None


@dataclass
class Summary:
    """What a run has done. A field keeps its initial value until the run reaches the step that sets it."""

    release: str | None = None
    gate: JsonObject | None = None
    metrics: JsonObject = field(default_factory=dict)
    stages: list[StageSummary] = field(default_factory=list)
    published: str | None = None
    publication: JsonObject | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `quantize-gemma run --json` prints."""
        return asdict(self)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run.

    Attributes:
        summary: What the run had done so far, as JSON.
    """

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.summary = summary
