"""The lm-eval models of the chart task: one that reads pictures, and one that only hands on what was answered."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.hf_vlms import HFMultimodalLM

from quantize_gemma.tasks.models.dequantize import dequantize_once
from quantize_gemma.tasks.runtime.patches import patched_loading


class ChartLM(HFMultimodalLM):
    """lm-eval's `hf-multimodal`, for checkpoints of Gemma 3, plain or quantized. One question at a time, as the card's
    evaluation: padding changes the last bits, and with them now and then a word.
    """

    def __init__(self, checkpoint: Path, device: str) -> None:
        with patched_loading():
            super().__init__(pretrained=str(checkpoint), device=device, dtype="bfloat16", batch_size=1)
        # Its own apply_chat_template would set this.
        self.chat_applied = True
        dequantize_once(self.model, head=True)
        self.see = self.model.model.get_image_features
        self.seen: tuple[Any, Any] | None = None
        self.model.model.get_image_features = self._see_once
        # What stays is not looked through in every collection, which lm-eval makes for each question.
        gc.collect()
        gc.freeze()

    def ask(self, image: Any, messages: list[dict[str, Any]], generation: dict[str, Any]) -> str:
        """Returns what the model writes to a chat with one picture."""
        arguments = (self.prompt(messages), generation, {"visual": [image]})
        request = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
        return str(self.generate_until([request], disable_tqdm=True)[0])

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """Returns the text of a chat; a base model, which knows no chats, gets the picture and what the user says."""
        template = self.processor.chat_template or self.tokenizer.chat_template
        if template is None:
            _system, user = messages
            return f"{self.processor.boi_token}{user['content'][1]['text']}"
        text = self.processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        # The tokenizer puts one before every text.
        return str(text).removeprefix(self.tokenizer.bos_token)

    def _see_once(self, pixel_values: Any, *arguments: Any, **keywords: Any) -> Any:
        """Returns the features of a picture, made anew if it is not the last one."""
        if self.seen is None or not torch.equal(self.seen[0], pixel_values):
            self.seen = pixel_values, self.see(pixel_values, *arguments, **keywords)
        return self.seen[1]


class AnsweredLM(LM):
    """An lm-eval model of questions that carry their number in the dataset. It answers them and nothing else."""

    MULTIMODAL = True

    def __init__(self, answer: Callable[[list[int]], list[str]]) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Returns the answers' texts, in the order of the requests."""
        return self.answer([request.doc["number"] for request in requests])

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Is not needed for charts."""
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Is not needed for charts."""
        raise NotImplementedError
