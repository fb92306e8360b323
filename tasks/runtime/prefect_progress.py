"""The progress of a stage: a bar in the terminal, and an artifact in Prefect's UI."""

import sys
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

SECONDS_BETWEEN_UPDATES = 2.0


class StageProgress:
    """Show the progress of one stage; called with the amount done, the total, and the unit."""

    def __init__(self, stage: str) -> None:
        """Show nothing yet."""
        self.stage = stage
        self._bar: Any = None
        self._artifact: UUID | None = None
        self._updated = 0.0

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._artifact is not None and failed is None:
            self._publish(100.0, "done")

    def __call__(self, count: int, total: int, unit: str) -> None:
        if sys.stderr.isatty():
            self._draw(count, total, unit)
        now = time.monotonic()
        if now - self._updated < SECONDS_BETWEEN_UPDATES:
            return
        self._updated = now
        self._publish(100.0 * count / max(total, 1), unit)

    def _draw(self, count: int, total: int, unit: str) -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.total != total:
            units = {"unit": "B", "unit_scale": True} if unit == "bytes" else {}
            self._bar = tqdm(total=total, desc=f"{self.stage}: {unit}", leave=False, **units)
        self._bar.update(count - self._bar.n)

    def _publish(self, percent: float, description: str) -> None:
        """Update the artifact; a stage does not fail if the API is temporarily unavailable."""
        try:
            if self._artifact is None:
                # Prefect does not allow underscores in keys.
                key = f"progress-{self.stage.replace('_', '-')}"
                self._artifact = create_progress_artifact(percent, key=key, description=description)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._artifact, progress=percent)
        except Exception as error:
            get_run_logger().warning("progress could not be shown: %s", error)
