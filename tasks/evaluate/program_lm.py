"""model.pte as an lm-eval model: log-likelihoods and generated text through the ExecuTorch runtime."""

import itertools
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import AutoTokenizer

from quantize_gemma.tasks.evaluate.packed_lm import (
    STOP_TOKENS,
    TokenRequest,
    make_scorer,
    score_continuation,
    share_rows,
)
from quantize_gemma.tasks.models.pte import PteProgram
from quantize_gemma.tasks.models.requests import Request, Score
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.strict_json import JsonValue


class ProgramLM(TemplateLM):  # type: ignore[misc]
    """A program, with the tokenizer of the checkpoint that it was exported from."""

    # Use the same tokens as for the checkpoint, with BOS first.
    tok_encode = HFLM.tok_encode
    eot_token_id = HFLM.eot_token_id
    prefix_token_id = HFLM.prefix_token_id
    add_bos_token = custom_prefix_token_id = None

    def __init__(self, checkpoint: Path, program: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.program = PteProgram(program / "model.pte")

    def fits(self, request: Request) -> bool:
        """Tell whether a request fits into the program without truncation; a prompt must leave room for an answer."""
        context, continuation = request.arguments
        if request.kind == "generate_until":
            return len(self.tok_encode(context)) < self.program.max_seq_len
        return len(self.tok_encode(f"{context}{continuation}")) - 1 <= self.program.max_seq_len

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (sum of the continuation's log-probabilities, whether each of its tokens is the most likely)."""
        sharing = share_rows(requests, self.program.max_seq_len)
        responses: dict[int, tuple[float, bool]] = {}
        for row_number, (row, numbers) in enumerate(sharing.items(), 1):
            count = max(len(requests[number][2]) for number in numbers)
            embeddings = self.program.embed_tokens(torch.tensor([row]))
            logits = self.program.decode(embeddings, set(range(len(row) - count, len(row))))
            logs = torch.log_softmax(logits, dim=-1)
            for number in numbers:
                responses[number] = score_continuation(logs, requests[number][2])
            report_progress(row_number, len(sharing), "questions")
        return [responses[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not measured, because the windows would be shorter than the checkpoint's."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str | None]:
        """Return the greedy texts; None if the program's maximum sequence length is reached before the text ends."""
        texts = []
        for request in requests:
            texts.append(self._generate(*request.args))
            report_progress(len(texts), len(requests), "questions")
        return texts

    def _generate(self, context: str, generation: dict[str, object]) -> str | None:
        settings = normalize_gen_kwargs(generation)
        eos = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(settings["until"], eos=eos)
        context_ids = self.tok_encode(context)

        def is_finished(tokens: list[int]) -> bool:
            # Look for a stop sequence only in the last few tokens, where it would end.
            tail = self.tokenizer.decode(tokens[-STOP_TOKENS:])
            return len(tokens) >= settings["max_gen_toks"] or any(text in tail for text in stop if text)

        prompt = self.program.embed_tokens(torch.tensor([context_ids]))
        tokens, is_complete = self.program.generate_until(prompt, is_finished)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, stop, None) if is_complete else None


def load_program_scorer(checkpoint: str, program: str) -> Score:
    """Load a program; return a function that answers requests, None for those that exceed its sequence length."""
    model = ProgramLM(Path(checkpoint), Path(program))
    score_all = make_scorer(model)

    def score(requests: list[Request]) -> list[JsonValue]:
        fits = [model.fits(request) for request in requests]
        fitting_requests = list(itertools.compress(requests, fits))
        answers = iter(score_all(fitting_requests) if fitting_requests else [])
        return [next(answers) if does_fit else None for does_fit in fits]

    return score
