"""Smoke: does it talk? The card's prompt through chat template and `generate`, and through the program's C++ runner.

The program is also compared with the checkpoint that it was made from, token by token: by how far their next-token
distributions are apart, next to how far rounding the activations alone moves the checkpoint's. An int8 activation
that falls on the other side of a rounding boundary is noise of that size; a wrong scale or cache is not.
"""

import json
from pathlib import Path
from typing import Any

from tasks.checkpoint import load_model, task_of
from tasks.process import report_progress
from tasks.stage import Stage
from tasks.store import StageFailed

# The card's manual test.
PROMPT = "Hey, are you conscious? Can you talk to me?"
IMAGE_PROMPT = "What colour is this?"
IMAGE_COLOUR = (30, 50, 220)
COMPARED_TOKENS = 128
# No program is exported for less than this many tokens at once.
SHORTEST_PIECE = 64
# Text for the comparison: any will do that is long enough to leave the first tokens behind.
TEXT = (
    "A river begins where rain and melting snow gather on high ground. It runs downhill, joins other streams, and "
    "carries sand and stones with it. Where the land is flat it slows down and lays down what it carried. Towns "
    "grew beside rivers because boats could reach them and because fields near the water gave good harvests. The "
    "water that reaches the sea rises again as vapour, forms clouds, and falls as rain on the hills."
)


def smoke_checkpoint(target: Path, checkpoint: Path, max_new_tokens: int) -> dict[str, Any]:
    """Writes smoke.json: the checkpoint's greedy answer to the card's prompt. Raises StageFailed if it is empty."""
    import torch
    from transformers import AutoTokenizer

    model = load_model(checkpoint, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": PROMPT}]
    templated = has_chat_template(tokenizer)
    if templated:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    response = tokenizer.decode(new, skip_special_tokens=True).strip()
    if not response:
        raise StageFailed(f"the quantized checkpoint answers {PROMPT!r} with nothing")
    result = {
        "prompt": PROMPT,
        "response": response,
        "chat_template": templated,
        "new_tokens": len(new),
        "max_new_tokens": max_new_tokens,
    }
    (target / "smoke.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {"metadata": result}


def smoke_program(
    target: Path, checkpoint: Path, program: Path, max_seq_len: int, max_new_tokens: int
) -> dict[str, Any]:
    """Writes smoke.json: the program's answers to a text and to an image, and how far it is from the checkpoint.

    KL divergences are in nats per token, means over the positions of a fixed text, from the checkpoint's
    distribution to the other one.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = task_of(config.to_dict()) == "multimodal-text-to-text"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    report_progress(0, 3, "runner")
    result: dict[str, Any] = {"text": _run_text(program, checkpoint, tokenizer, multimodal, max_new_tokens)}
    if multimodal:
        result["image"] = _run_image(program, checkpoint, max_new_tokens)
    report_progress(1, 3, "comparing with the checkpoint")
    tokens = min(COMPARED_TOKENS, max_seq_len)
    result["agreement"] = _compare(program / "model.pte", checkpoint, tokenizer, config, multimodal, tokens)
    speed = {name: result[name].pop("speed") for name in ("text", "image") if name in result}
    (target / "smoke.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    assert torch.isfinite(torch.tensor(result["agreement"]["kl_program"])), result["agreement"]
    return {"metadata": result, "extra": {"speed": speed}}


def has_chat_template(tokenizer: Any) -> bool:
    """Tells an instruction-tuned checkpoint from a base model."""
    return bool(getattr(tokenizer, "chat_template", None))


def _run_text(program: Path, checkpoint: Path, tokenizer: Any, multimodal: bool, max_new_tokens: int) -> dict[str, Any]:
    prompt = PROMPT
    if has_chat_template(tokenizer):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
        )
    return {"prompt": PROMPT, **_generate(program, checkpoint, [prompt], multimodal, max_new_tokens)}


def _run_image(program: Path, checkpoint: Path, max_new_tokens: int) -> dict[str, Any]:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    image = Image.new("RGB", (256, 192), IMAGE_COLOUR)
    content = [{"type": "image"}, {"type": "text", "text": IMAGE_PROMPT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, after = prompt.split(processor.boi_token)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    pieces = [
        f"{before}\n\n{processor.boi_token}",
        pixels,
        f"{processor.tokenizer.eoi_token}\n\n{after}",
    ]
    return {"prompt": IMAGE_PROMPT, **_generate(program, checkpoint, pieces, True, max_new_tokens)}


def _generate(
    program: Path, checkpoint: Path, pieces: list[Any], multimodal: bool, max_new_tokens: int
) -> dict[str, Any]:
    """Runs the C++ runner that the phone apps use. Texts that start with <bos> need none added."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401 (both register operators)
    from executorch.extension.llm.runner import (
        GenerationConfig,
        MultimodalRunner,
        TextLLMRunner,
        make_image_input,
        make_text_input,
    )

    paths = str(program / "model.pte"), str(checkpoint / "tokenizer.json")
    bos = 0 if pieces[0].startswith("<bos>") else 1
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0.0, echo=False, num_bos=bos)
    answer: list[str] = []
    stats: list[Any] = []
    if multimodal:
        inputs = [make_text_input(piece) if isinstance(piece, str) else make_image_input(piece) for piece in pieces]
        MultimodalRunner(*paths).generate(inputs, config, answer.append, stats.append)
    else:
        TextLLMRunner(*paths).generate(pieces[0], config, answer.append, stats.append)
    response = "".join(answer).replace("<end_of_turn>", "").replace("<eos>", "").strip()
    if not response:
        raise StageFailed("the program answers with nothing")
    return {"response": response, "speed": _speed(stats[-1])}


def _speed(stats: Any) -> dict[str, float]:
    prefill = max(stats.prompt_eval_end_ms - stats.inference_start_ms, 1) / 1000
    decode = max(stats.inference_end_ms - stats.prompt_eval_end_ms, 1) / 1000
    return {
        "prompt_tokens": stats.num_prompt_tokens,
        "generated_tokens": stats.num_generated_tokens,
        "prefill_tokens_per_second": round(stats.num_prompt_tokens / prefill, 1),
        "decode_tokens_per_second": round(stats.num_generated_tokens / decode, 1),
    }


def _compare(
    program: Path, checkpoint: Path, tokenizer: Any, config: Any, multimodal: bool, tokens: int
) -> dict[str, Any]:
    import torch

    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *text]])[:, :tokens]
    model = load_model(checkpoint, torch.float32)
    with torch.no_grad():
        eager = model(ids).logits[0].float()
        _dequantize_linears(model)
        plain = model(ids).logits[0].float()
    ran = _program_logits(program, ids, config, multimodal)
    return {
        "tokens": ids.shape[1],
        "kl_program": _kl(eager, ran),
        "kl_activation_noise": _kl(eager, plain),
        "same_argmax": round(float((eager.argmax(-1) == ran.argmax(-1)).float().mean()), 4),
        "nll_checkpoint": _nll(eager, ids),
        "nll_program": _nll(ran, ids),
    }


def _program_logits(program: Path, ids: Any, config: Any, multimodal: bool) -> Any:
    """Returns the program's logits, [tokens, vocabulary], run in pieces shorter than the sliding window."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401 (both register operators)
    import torch
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(program)
    piece = min(config.get_text_config().sliding_window, SHORTEST_PIECE) - 1
    decoder = loaded.load_method("text_decoder" if multimodal else "forward")
    embed = loaded.load_method("token_embedding") if multimodal else None
    logits = []
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece]
        positions = torch.arange(start, start + part.shape[1])
        given = embed.execute([part])[0] if embed else part
        logits.append(decoder.execute([given, positions])[0][0].clone())
    return torch.cat(logits).float()


def _dequantize_linears(model: Any) -> None:
    """Takes the activation quantization out: every weight becomes the plain tensor that it stands for."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)


def _kl(reference: Any, other: Any) -> float:
    import torch

    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return round(float((p.exp() * (p - q)).sum(-1).mean()), 6)


def _nll(logits: Any, ids: Any) -> float:
    import torch

    return round(float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])), 4)


smoke = Stage(smoke_checkpoint, name="smoke", version=2, libraries=("torch", "torchao", "transformers"), memory=3.2)
smoke_pte = Stage(
    smoke_program,
    name="smoke-program",
    version=2,
    libraries=("torch", "torchao", "transformers", "executorch"),
    memory=3.2,
)
