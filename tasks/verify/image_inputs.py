"""A prompt about an image, as tokens, pixels, and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantize_gemma.tasks.models.chat import format_chat

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import ProcessorMixin

AnyImage = TypeVar("AnyImage")

IMAGE_PROMPT = "What color is this?"
# RGB; IMAGE_PROMPT asks for it.
COLOR = 30, 50, 220


@dataclass(frozen=True)
class ImageInput:
    """A prompt about an image.

    Attributes:
        ids: Token ids, [1, tokens].
        is_image: Which tokens are image tokens, bool, [tokens].
        pixels: The first example image, [1, channels, height, width].
        late: The same prompt after a long text, if the program's sequences are long enough.
    """

    ids: Tensor
    is_image: Tensor
    pixels: Tensor
    late: ImageInput | None = None

    @property
    def compared(self) -> Tensor:
        """The positions whose logits are compared: those of the text after the image."""
        import torch

        return torch.arange(int(self.is_image.nonzero()[-1]) + 1, len(self.is_image))

    def with_late_prompt(self, text: list[int], max_seq_len: int) -> ImageInput:
        """Return the prompt after a text, which begins with the BOS token."""
        import torch

        # Drop the prompt's own BOS token: the text starts with one.
        ids = torch.cat([torch.tensor([text]), self.ids[:, 1:]], dim=1)
        if ids.shape[1] > max_seq_len:
            return self
        is_image = torch.cat([torch.zeros(len(text), dtype=torch.bool), self.is_image[1:]])
        return replace(self, late=ImageInput(ids, is_image, self.pixels))


def make_image_input(checkpoint: Path, image_token_id: int) -> ImageInput:
    """Return the checkpoint's inputs for IMAGE_PROMPT and the first example image."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    prompt = format_image_prompt(processor)
    # The template may already have written the BOS token.
    has_bos = prompt.startswith(processor.tokenizer.bos_token)
    inputs = processor(text=prompt, images=_fractal(), add_special_tokens=not has_bos, return_tensors="pt")
    ids: Tensor = inputs["input_ids"]
    return ImageInput(ids, ids[0] == image_token_id, example_images(processor)[0])


def example_images(processor: ProcessorMixin) -> list[Tensor]:
    """Return an image of the Mandelbrot set and a solid-color one, [1, channels, height, width] each.

    There are no others because a large model takes half a minute to encode one.
    """
    pixels: Tensor = processor.image_processor(_fractal(), return_tensors="pt")["pixel_values"]
    return [pixels, solid_image(processor)]


def _fractal() -> Image.Image:
    from PIL import Image

    return Image.effect_mandelbrot((256, 192), (-2, -1.2, 1, 1.2), 40).convert("RGB")


def solid_image(processor: ProcessorMixin) -> Tensor:
    """Return an image in COLOR in the model's input format, [1, channels, height, width]."""
    from PIL import Image

    image = Image.new("RGB", (256, 192), COLOR)
    pixels: Tensor = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    return pixels


def image_segments(processor: ProcessorMixin, images: Sequence[AnyImage]) -> list[str | AnyImage]:
    """Return IMAGE_PROMPT after some images in the C++ runner's input format: texts with images between them."""
    first, *texts = format_image_prompt(processor, len(images)).split(processor.boi_token)
    segments: list[str | AnyImage] = [f"{first}\n\n{processor.boi_token}"]
    for number, (image, text) in enumerate(zip(images, texts, strict=True), 1):
        start = f"\n\n{processor.boi_token}" if number < len(images) else ""
        segments += [image, f"{processor.tokenizer.eoi_token}\n\n{text}{start}"]
    return segments


def format_image_prompt(processor: ProcessorMixin, images: int = 1) -> str:
    """Return IMAGE_PROMPT after some images, in the chat template if there is one."""
    content = [*[{"type": "image"}] * images, {"type": "text", "text": IMAGE_PROMPT}]
    chat = format_chat(processor, [{"role": "user", "content": content}])
    return f"{processor.boi_token * images}{IMAGE_PROMPT}" if chat is None else chat
