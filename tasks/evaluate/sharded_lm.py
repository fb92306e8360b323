"""An lm-eval model whose responses come from shards in the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

# {shard: requests} -> {shard: responses}, JSON values.
Respond = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]


class ShardedLM(LM):  # type: ignore[misc]
    """Returns log-likelihoods and nothing else; each lm-eval task is a shard."""

    def __init__(self, respond: Respond) -> None:
        """`respond` takes requests [context, continuation] and returns responses [log-likelihood, is greedy]."""
        super().__init__()
        self.respond = respond

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) for each request, in their order."""
        shards: dict[str, list[Any]] = {}
        for request in requests:
            shards.setdefault(request.task_name, []).append(list(request.args))
        responses = {name: iter(shard) for name, shard in self.respond(shards).items()}
        return [(score, greedy) for score, greedy in (next(responses[request.task_name]) for request in requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not needed for multiple choice."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Not needed for multiple choice."""
        raise NotImplementedError
