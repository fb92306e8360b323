"""Verify: the program against the checkpoint that it was made from, method by method, by running both.

They do not agree to the bit, and need not: int8 activations round differently, and one that falls on the other side of
a rounding boundary moves all that follows. So every difference stands next to the one that this rounding alone makes:
the checkpoint with and without quantized activations. A wrong scale, cache or mask is further away than that.
"""

import gc
import json
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.checkpoint import disable_activation_quantization, load_model
from quantize_gemma.tasks.models.pte import Methods
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.verify.prompts import TEXT, answer_prompts, prompt_lengths

# The distributions of so many first tokens are compared, and of so many at the end of the longest sequence.
COMPARED_TOKENS = 128
LAST_TOKENS = 8
# So many are decoded one at a time, after as many at once.
STEPS = 16
IMAGE_PROMPT = "What colour is this?"


def compare(program: Path, checkpoint: Path, config: Any, max_seq_len: int) -> dict[str, Any]:
    """Returns how far model.pte is from the checkpoint.

    KL divergences are in nats per token, means over positions, from the checkpoint's distribution to the other one;
    `kl_activation_noise` is that of the checkpoint without quantized activations. `max` and `mean` are absolute
    differences of logits or embeddings, `error` and `noise` mean squared differences over the mean square. `prompts` is
    about the answers to prompts around the sliding window and to the longest, each of one piece.

    Raises StageFailed if the C++ runner fails at one of these prompts, or if logits are not finite.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    multimodal = hasattr(config, "vision_config")
    prompts = answer_prompts(program, checkpoint, prompt_lengths(config.get_text_config().sliding_window, max_seq_len))
    *shorter, longest = prompts
    words = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    # The longest prompt and its answer are part of the text, whose logits then do for both.
    ids = torch.tensor([[*longest["ids"], *longest["answer"], *words][:max_seq_len]])
    first = min(COMPARED_TOKENS, max_seq_len)
    answered = _answered(longest)
    kept = torch.tensor(sorted({*range(first), *range(max_seq_len - LAST_TOKENS, max_seq_len), *answered}))
    answered_rows = torch.isin(kept, torch.tensor(answered))

    model = load_model(checkpoint, torch.float32)
    eager, plain = {}, {}
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        eager["text"] = model(input_ids=ids, logits_to_keep=kept).logits[0].float()
        eager["prompts"] = torch.cat([*_after_prompts(model, shorter), eager["text"][answered_rows]])
        if multimodal:
            asked, picture = _image_inputs(checkpoint)
            image = asked[0] == config.image_token_id
            text = (~image).nonzero()[:, 0]
            pixels = _images(picture)
            seen = [model.get_image_features(one) for one in pixels]
            # The encoder takes most of the time: what it saw of the picture goes to the decoder as the program's does.
            empty = model.get_input_embeddings()(asked.masked_fill(image, 0))
            given = {"inputs_embeds": _put(seen[0], empty, image), "logits_to_keep": text}
            eager["image"] = model(**given).logits[0].float()
            both_ways = model(**given, token_type_ids=image[None].long()).logits[0].float()
        disable_activation_quantization(model)
        plain["text"] = model(input_ids=ids, logits_to_keep=kept).logits[0].float()
        plain["prompts"] = torch.cat([*_after_prompts(model, shorter), plain["text"][answered_rows]])
        if multimodal:
            seen_plain = [model.get_image_features(one) for one in pixels]
            given["inputs_embeds"] = _put(seen_plain[0], empty, image)
            plain["image"] = model(**given).logits[0].float()
    del model
    gc.collect()  # Its modules refer to themselves, and the program takes as much again.

    methods = Methods(program / "model.pte")
    ran = methods.decode(methods.embed(ids), {int(position) for position in kept})
    result: dict[str, Any] = {
        "tokens": first,
        "kl_program": _kl(eager["text"][:first], ran[:first]),
        "kl_activation_noise": _kl(eager["text"][:first], plain["text"][:first]),
        "same_argmax": round(float((eager["text"].argmax(-1) == ran.argmax(-1)).float().mean()), 4),
        "nll_checkpoint": _nll(eager["text"][:first], ids[0, :first]),
        "nll_program": _nll(ran[:first], ids[0, :first]),
        "text_decoder": _distance(eager["text"], ran),
        "last": {
            "tokens": max_seq_len,
            "kl_program": _kl(eager["text"][-LAST_TOKENS:], ran[-LAST_TOKENS:]),
            "kl_activation_noise": _kl(eager["text"][-LAST_TOKENS:], plain["text"][-LAST_TOKENS:]),
        },
    }
    steps = methods.decode(methods.embed(ids[:, : 2 * STEPS]), set(range(STEPS, 2 * STEPS)))
    result["step_by_step"] = {
        "tokens": STEPS,
        "kl_program": _kl(eager["text"][STEPS : 2 * STEPS], steps),
        "kl_activation_noise": _kl(eager["text"][STEPS : 2 * STEPS], plain["text"][STEPS : 2 * STEPS]),
    }
    ran = torch.cat([prompt["logits"] for prompt in prompts])
    result["prompts"] = {
        "lengths": [len(prompt["ids"]) for prompt in prompts],
        "tokens": len(ran),
        "kl_program": _kl(eager["prompts"], ran),
        "kl_activation_noise": _kl(eager["prompts"], plain["prompts"]),
        # They are few: what chance explains is seen in how much they differ.
        "positions": {
            "kl_program": _kl_by_position(eager["prompts"], ran),
            "kl_activation_noise": _kl_by_position(eager["prompts"], plain["prompts"]),
        },
        "same_argmax": round(float((eager["prompts"].argmax(-1) == ran.argmax(-1)).float().mean()), 4),
    }
    if multimodal:
        result["token_embedding"] = _distance(embedded, methods.embed(ids))
        seen_by_program = [methods.see(one) for one in pixels]
        result["vision_encoder"] = _vision(seen, seen_plain, seen_by_program)
        ran = methods.decode(_put(seen_by_program[0], methods.embed(asked), image), set(text.tolist()))
        result["image"] = {
            "tokens": len(image),
            "kl_program": _kl(eager["image"], ran),
            "kl_activation_noise": _kl(eager["image"], plain["image"]),
            # The decoder's mask is causal; the model lets an image's tokens see each other in both directions.
            "kl_causal_image": _kl(both_ways, eager["image"]),
        }
    if "NaN" in json.dumps(result) or "Infinity" in json.dumps(result):
        raise StageFailed(f"the logits of the checkpoint or of the program are not finite: {result}")
    return result


def _answered(prompt: dict[str, Any]) -> list[int]:
    """Returns the positions of a prompt and its answer whose logits choose the answer's tokens."""
    start = len(prompt["ids"]) - 1
    return list(range(start, start + len(prompt["answer"])))


def _after_prompts(model: Any, prompts: list[dict[str, Any]]) -> list[Any]:
    """Returns the checkpoint's logits for each answer's tokens, [tokens, vocabulary]."""
    import torch

    return [
        model(
            input_ids=torch.tensor([prompt["ids"] + prompt["answer"][:-1]]),
            logits_to_keep=torch.tensor(_answered(prompt)),
        )
        .logits[0]
        .float()
        for prompt in prompts
    ]


def _images(picture: Any) -> list[Any]:
    """Returns pixels of a picture, of one colour, and of noise."""
    import torch

    noise = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [picture, torch.full_like(picture, 0.25), noise]


def _image_inputs(checkpoint: Path) -> tuple[Any, Any]:
    """Returns a question about a picture as token ids, [1, tokens], and the picture's pixels."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    prompt = image_prompt(processor)
    image = Image.effect_mandelbrot((256, 192), (-2, -1.2, 1, 1.2), 40).convert("RGB")
    # The template has written the BOS token already.
    starts = prompt.startswith(processor.tokenizer.bos_token)
    found = processor(text=prompt, images=image, add_special_tokens=not starts, return_tensors="pt")
    return found["input_ids"], found["pixel_values"]


def _put(features: Any, embeddings: Any, image: Any) -> Any:
    """Returns the embeddings of a text, [1, tokens, width], with those of an image where `image` says."""
    found = embeddings.clone()
    found[0, image] = features.reshape(-1, embeddings.shape[-1])
    return found


def image_prompt(processor: Any) -> str:
    """Returns the prompt about a picture, in the chat template if there is one."""
    if not (processor.chat_template or processor.tokenizer.chat_template):
        return f"{processor.boi_token}{IMAGE_PROMPT}"
    content = [{"type": "image"}, {"type": "text", "text": IMAGE_PROMPT}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _vision(eager: list[Any], plain: list[Any], ran: list[Any]) -> dict[str, Any]:
    import torch

    one, other, third = (torch.cat([image.float().flatten() for image in images]) for images in (eager, plain, ran))
    square = float(one.square().mean())
    return {
        "images": len(eager),
        **_distance(one, third),
        "error": round(float((third - one).square().mean()) / square, 8),
        "noise": round(float((other - one).square().mean()) / square, 8),
    }


def _distance(reference: Any, other: Any) -> dict[str, float]:
    difference = (reference.float() - other.float()).abs()
    return {"max": round(float(difference.max()), 6), "mean": round(float(difference.mean()), 8)}


def _kl(reference: Any, other: Any) -> float:
    return round(float(_divergences(reference, other).mean()), 6)


def _kl_by_position(reference: Any, other: Any) -> list[float]:
    return [round(float(kl), 6) for kl in _divergences(reference, other)]


def _divergences(reference: Any, other: Any) -> Any:
    import torch

    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return (p.exp() * (p - q)).sum(-1)


def _nll(logits: Any, ids: Any) -> float:
    import torch

    return round(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])), 4)
