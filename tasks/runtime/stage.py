"""What a stage is. policies.py makes Prefect's task of it, which a stage's own process does not have to know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A function `work(target, **inputs)` that fills the directory `target`, and how it is run.

    work: runs in a process of its own, gets its artifacts as paths, and returns {"metadata": what is worth keeping}.
        Its code and its libraries are in the key of what it writes; see fingerprint.py.
    retries: how often it is tried again after what may pass by itself.
    ignored: inputs that shape no output and do not count in its key.
    ignored_on_cpu: the same where its `device` is a CPU: a GPU adds up in another order when a batch has another size.
    resumes: it keeps finished parts in the store; its `refresh` says that they are to be made again.
    environment: gives the process what is secret.
    memory: how much it takes at most, in times of the artifacts that it reads; such stages, and those that are
        `accelerated` and use the GPU, wait for each other across runs.
    """

    work: Work
    name: str
    retries: int = 0
    ignored: tuple[str, ...] = ()
    ignored_on_cpu: tuple[str, ...] = ()
    resumes: bool = False
    environment: Callable[[], dict[str, str]] = dict
    memory: float = 0
    accelerated: bool = False
