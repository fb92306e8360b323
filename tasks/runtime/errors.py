"""The exceptions of a run: a mistake of the user, or the failure of a stage."""

from quantize_gemma.tasks.runtime.redact import redact


class RunError(Exception):
    """Why a run ended.

    Attributes:
        summary: What the run had done so far, as `quantize-gemma run --json` prints it.
    """

    def __init__(self, message: str) -> None:
        # The message goes into states, logs and JSON.
        super().__init__(redact(message))
        self.summary: dict[str, object] = {}


class UserError(RunError):
    """A mistake that the user can fix. The message is one sentence that says what is wrong, and what to do."""


class StageFailed(RunError):
    """The failure of a stage that is not caused by the user's input.

    Attributes:
        transient: Whether the same work may succeed later.
        retry_after: The minimum number of seconds to wait before a retry.
    """

    def __init__(self, message: str, transient: bool = False, retry_after: float = 0) -> None:
        super().__init__(message)
        self.transient = transient
        self.retry_after = retry_after
