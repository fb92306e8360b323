"""lm-eval models without weights: one records requests, one answers them from a table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import AutoTokenizer

from quantize_gemma.tasks.models.requests import Request, to_request
from quantize_gemma.tasks.runtime.errors import StageFailed

# The dummy answer to a recorded request; its scores are not used.
PLACEHOLDERS: dict[str, Any] = {"loglikelihood": (0.0, False), "loglikelihood_rolling": 0.0, "generate_until": ""}


class RecordingLM(LM):  # type: ignore[misc]
    """Record the requests in `requests`, in order, with a checkpoint's chat template if the task uses it."""

    # Accept tasks with images, too.
    MULTIMODAL = True

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.requests: list[Request] = []

    def uses_chat_template(self, requested: bool) -> bool:
        """Tell whether prompts use the chat template: a base model has none."""
        return requested and self.tokenizer.chat_template is not None

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, which is needed only for a chat template."""
        return AutoTokenizer.from_pretrained(self.checkpoint)

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm-eval's cache, which is not used."""
        return "checkpoint"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the checkpoint's chat template."""
        return str(self.tokenizer.chat_template or "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text, without BOS, which the tokenizer adds to every text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text).removeprefix(self.tokenizer.bos_token)

    def _record(self, instances: list[Instance]) -> list[Any]:
        self.requests += map(_request_of, instances)
        return [PLACEHOLDERS[instance.request_type] for instance in instances]

    loglikelihood = loglikelihood_rolling = generate_until = _record


class ReplayLM(LM):  # type: ignore[misc]
    """Return the stored answers to recorded requests."""

    MULTIMODAL = True

    def __init__(
        self, answers: Mapping[tuple[str, int, int], Any], doc_ids: Mapping[str, list[int]] | None = None
    ) -> None:
        """Store the answers by (task, doc_id, index), and the documents of a sample, by task."""
        super().__init__()
        self.answers = answers
        self.doc_ids = doc_ids

    def uses_chat_template(self, _requested: bool) -> bool:
        """Skip creating prompts: the scores do not depend on them."""
        return False

    def _replay(self, instances: list[Instance]) -> list[Any]:
        return [self._answer(_request_of(instance)) for instance in instances]

    def _answer(self, request: Request) -> Any:
        # lm-eval numbers the documents of a sample within the sample.
        doc_id = request.doc_id if self.doc_ids is None else self.doc_ids[request.task][request.doc_id]
        key = request.task, doc_id, request.index
        if key not in self.answers:
            raise StageFailed(f"lm-eval made a request that was not recorded: document {doc_id} of {request.task}")
        answer = self.answers[key]
        return tuple(answer) if isinstance(answer, list) else answer

    loglikelihood = loglikelihood_rolling = generate_until = _replay


def _request_of(instance: Instance) -> Request:
    task, row = instance.task_name, instance.doc.get("number")
    return to_request(task, instance.doc_id, instance.idx, instance.request_type, instance.args, row)
