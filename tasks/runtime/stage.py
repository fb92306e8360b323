"""The definition of a stage. prefect_stage.py turns it into a Prefect task; worker processes do not import Prefect.

@stage(memory=1.5)
def export(target: Path, checkpoint: Path, max_seq_len: int) -> Output:
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec

from quantize_gemma.tasks.runtime.strict_json import JsonObject

# A stage that takes longer hangs, or is the distillation of a large model on a CPU, which the next run continues. The
# longest other stage that we know of is gemma-3-27b's evaluation on a CPU.
SECONDS_ALLOWED = 24 * 3600.0

P = ParamSpec("P")
# {"metadata": the artifact's metadata, for its manifest, "extra": further measurements}.
Output = JsonObject


@dataclass(frozen=True)
class Stage(Generic[P]):
    """A function `work(target, **inputs)` that fills the directory `target`, and its policy.

    It runs in a worker process, with its artifacts as paths. A stage with the inputs `part` and `parts` does one of
    several parts of its work, which run at the same time. Its code and its libraries are part of its artifact's key;
    see fingerprint.py.

    Attributes:
        work: The function, whose name is the stage's name in the store, in Prefect, and in every report.
        retries: The number of retries after a transient failure.
        ignored: Inputs that do not affect the output, and are not part of the key.
        ignored_on_cpu: Inputs that do not affect the output if `device` is "cpu": sums on a GPU depend on the batch
            size.
        resumes: Whether it stores finished shards, which the input `refresh` recomputes.
        environment: Returns environment variables that no other process gets: tokens.
        memory: Its peak memory, in multiples of the artifacts that it reads; a program's masks, which depend on its
            sequence length, are not included. Such stages, and those that are `accelerated` and use the GPU, wait for
            each other across runs.
        accelerated: Whether it may use a GPU.
    """

    work: Callable[Concatenate[Path, P], Output]
    retries: int = 0
    ignored: tuple[str, ...] = ()
    ignored_on_cpu: tuple[str, ...] = ()
    resumes: bool = False
    environment: Callable[[], dict[str, str]] = dict
    memory: float = 0
    accelerated: bool = False

    @property
    def name(self) -> str:
        """The function's name."""
        return self.work.__name__

    @property
    def function(self) -> str:
        """The function as "module:name", as import_function() takes it."""
        return f"{self.work.__module__}:{self.work.__name__}"

    def __call__(self, target: Path, *args: P.args, **kwargs: P.kwargs) -> Output:
        """Do the work in this process."""
        return self.work(target, *args, **kwargs)


def stage(**policy: Any) -> Callable[[Callable[Concatenate[Path, P], Output]], Stage[P]]:
    """Declare a function as a stage, with Stage's attributes as its policy."""

    def declare(work: Callable[Concatenate[Path, P], Output]) -> Stage[P]:
        return Stage(work, **policy)

    return declare


def import_function(name: str) -> Callable[..., Any]:
    """Import the function with the name "module:function"."""
    module, function = name.split(":")
    result: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return result
