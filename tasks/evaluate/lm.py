"""An lm-eval model whose answers go through the store, whoever gives them."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM

Answers = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]


class ShardedLM(LM):
    """Answers log-likelihoods and nothing else; a task of lm-eval is a shard."""

    def __init__(self, answers: Answers) -> None:
        """`answers` takes each shard's requests, [context, continuation], and returns [log-likelihood, is greedy]."""
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Returns lm-eval's answers, in the order of the requests."""
        asked: dict[str, list[Any]] = {}
        for request in requests:
            asked.setdefault(request.task_name, []).append(list(request.args))
        answered = {name: iter(answers) for name, answers in self.answers(asked).items()}
        return [(score, greedy) for score, greedy in (next(answered[request.task_name]) for request in requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Is not needed for questions."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Is not needed for questions."""
        raise NotImplementedError
