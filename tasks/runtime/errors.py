"""How a run fails: by the user's mistake, or in a stage."""

from quantize_gemma.tasks.runtime.redact import redact


class RunError(Exception):
    """Why a run ended.

    Attributes:
        summary: What the run had done by then, as `quantize-gemma run --json` prints it.
    """

    def __init__(self, message: str) -> None:
        # The message goes into states, logs and JSON.
        super().__init__(redact(message))
        self.summary: dict[str, object] = {}


class UserError(RunError):
    """A mistake that the person who started the run can fix: one sentence that says what is wrong, and what to do."""


class StageFailed(RunError):
    """A stage that could not finish for a reason that is not the user's input.

    Attributes:
        transient: The same work may succeed later.
        retry_after: After how many seconds, at the earliest.
    """

    def __init__(self, message: str, transient: bool = False, retry_after: float = 0) -> None:
        super().__init__(message)
        self.transient = transient
        self.retry_after = retry_after
