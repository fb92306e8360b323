"""The lm-eval model of the ChartQA task, which reads images."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM

from quantize_gemma.tasks.evaluate.chartqa import make_prompt
from quantize_gemma.tasks.models.dequantize import replace_quantized_modules
from quantize_gemma.tasks.runtime.patches import patched_loading

if TYPE_CHECKING:
    from PIL.Image import Image


class ChartQALM(HFMultimodalLM):  # type: ignore[misc]
    """lm-eval's `hf-multimodal`, for checkpoints of Gemma 3, plain or quantized.

    One request at a time, as in the card's evaluation: padding changes the last bits, and sometimes a word with them.
    """

    def __init__(self, checkpoint: Path, device: str) -> None:
        with patched_loading():
            super().__init__(pretrained=str(checkpoint), device=device, dtype="bfloat16", batch_size=1)
        # Its own apply_chat_template would set this.
        self.chat_applied = True
        replace_quantized_modules(self.model, "all")
        self.encode_image = self.model.model.get_image_features
        self.last_image: tuple[torch.Tensor, torch.Tensor] | None = None
        self.model.model.get_image_features = self._encode_image_once
        # lm-eval runs the garbage collector for each request; freeze the objects that stay, so that they are not
        # scanned each time.
        gc.collect()
        gc.freeze()

    def generate_from_image(
        self, image: Image, messages: list[dict[str, object]], generation: dict[str, object]
    ) -> str:
        """Return the response to a chat with one image; `generation` are lm-eval's generation_kwargs."""
        arguments = (make_prompt(self.processor, messages), generation, {"visual": [image]})
        request = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
        return str(self.generate_until([request], disable_tqdm=True)[0])

    def _encode_image_once(self, pixel_values: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Return the features of an image; reuse those of the previous call if the image is the same."""
        if self.last_image is None or not torch.equal(self.last_image[0], pixel_values):
            self.last_image = pixel_values, self.encode_image(pixel_values, *args, **kwargs)
        return self.last_image[1]
