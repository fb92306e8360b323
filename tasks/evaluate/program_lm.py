"""model.pte as a model of lm-eval: log-likelihoods through the ExecuTorch runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from quantize_gemma.tasks.evaluate.model import Request, answering, score_continuation, share_rows
from quantize_gemma.tasks.models.pte import Methods
from quantize_gemma.tasks.runtime.worker import report_progress


class ProgramLM(TemplateLM):
    """A program, with the tokenizer of the checkpoint that it was exported from. It answers log-likelihoods alone."""

    # The same tokens as for the checkpoint, BOS first.
    tok_encode = HFLM.tok_encode
    eot_token_id = HFLM.eot_token_id
    prefix_token_id = HFLM.prefix_token_id
    add_bos_token = custom_prefix_token_id = None

    def __init__(self, checkpoint: Path, program: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.methods = Methods(program / "model.pte")

    def fits(self, context: str, continuation: str) -> bool:
        """Tells whether the program takes a question as a whole."""
        return len(self.tok_encode(context + continuation)) - 1 <= self.methods.max_seq_len

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (sum of the continuation's log-probabilities, whether each of its tokens is the likeliest).

        A request is (strings or None, context, continuation), the last two as tokens.
        """
        sharing = share_rows(requests, self.methods.max_seq_len)
        answers: list[Any] = [None] * len(requests)
        for done, (row, numbers) in enumerate(sharing.items(), 1):
            wanted = max(len(requests[number][2]) for number in numbers)
            embedded = self.methods.embed(torch.tensor([row]))
            logits = self.methods.decode(embedded, set(range(len(row) - wanted, len(row))))
            logs = torch.log_softmax(logits, dim=-1)
            for number in numbers:
                answers[number] = score_continuation(logs, requests[number][2])
            report_progress(done, len(sharing), "questions")
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Is not needed for questions."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Is not needed for questions."""
        raise NotImplementedError


def load_program_answerer(checkpoint: str, program: str) -> Callable[[list[Any]], list[Any]]:
    """Returns the answerer of a program: of [context, continuation] to [log-likelihood, is greedy]."""
    return answering(ProgramLM(Path(checkpoint), Path(program)))
