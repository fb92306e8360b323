"""Smoke: does it talk? The card's prompt through chat template and `generate`, and through the program's C++ runner.

The program is also compared with the checkpoint that it was made from; see verify.py.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.models.checkpoint import drop_vision_tower, is_multimodal, load_model
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.worker import report_progress
from quantize_gemma.tasks.verify import IMAGE_PROMPT, compare, image_prompt

# The card's manual test.
PROMPT = "Hey, are you conscious? Can you talk to me?"
IMAGE_COLOUR = (30, 50, 220)


@stage(memory=3.2)
def smoke(target: Path, checkpoint: Path, max_new_tokens: int) -> Output:
    """Writes smoke.json: the checkpoint's greedy answer to the card's prompt. Raises StageFailed if it is empty."""
    import torch
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.dequantize import dequantize_once

    model = load_model(checkpoint, torch.bfloat16)
    drop_vision_tower(model)
    # The same tokens, without dequantizing every weight for each of them.
    dequantize_once(model, head=True)
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


@stage(memory=1.7)
def smoke_program(target: Path, checkpoint: Path, program: Path, max_seq_len: int, max_new_tokens: int) -> Output:
    """Writes smoke.json: the program's answers to a text and to an image, and how far it is from the checkpoint."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    multimodal = is_multimodal(config.to_dict())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    report_progress(0, 3, "runner")
    result: dict[str, Any] = {"text": _run_text(program, checkpoint, tokenizer, multimodal, max_new_tokens)}
    if multimodal:
        result["image"] = _run_image(program, checkpoint, max_new_tokens)
    report_progress(1, 3, "comparing with the checkpoint")
    result["agreement"] = compare(program, checkpoint, config, max_seq_len)
    speed = {name: result[name].pop("speed") for name in ("text", "image") if name in result}
    (target / "smoke.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {"metadata": result, "extra": {"speed": speed}}


def has_chat_template(tokenizer: Any) -> bool:
    """Tells an instruction-tuned checkpoint from a base model."""
    return bool(getattr(tokenizer, "chat_template", None))


def _run_text(program: Path, checkpoint: Path, tokenizer: Any, multimodal: bool, max_new_tokens: int) -> dict[str, Any]:
    text = PROMPT
    if has_chat_template(tokenizer):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
        )
    return _generate(program, checkpoint, PROMPT, [text], multimodal, max_new_tokens)


def _run_image(program: Path, checkpoint: Path, max_new_tokens: int) -> dict[str, Any]:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    image = Image.new("RGB", (256, 192), IMAGE_COLOUR)
    prompt = image_prompt(processor)
    before, after = prompt.split(processor.boi_token)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    pieces = [
        f"{before}\n\n{processor.boi_token}",
        pixels,
        f"{processor.tokenizer.eoi_token}\n\n{after}",
    ]
    return _generate(program, checkpoint, IMAGE_PROMPT, pieces, True, max_new_tokens)


def _generate(
    program: Path, checkpoint: Path, prompt: str, pieces: list[Any], multimodal: bool, max_new_tokens: int
) -> dict[str, Any]:
    """Returns what the C++ runner, which the phone apps use, answers, how fast, and with how much memory.

    `pieces` are the prompt as the model reads it, pictures as pixels.

    It runs in a process of its own, whose memory is the program's and nothing else's.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        given = []
        for number, piece in enumerate(pieces):
            if not isinstance(piece, str):
                pixels = f"{folder}/{number}.safetensors"
                save_file({"pixels": piece.contiguous()}, pixels)
            given.append({"text": piece} if isinstance(piece, str) else {"pixels": pixels})
        arguments = {
            "program": str(program / "model.pte"),
            "tokenizer": str(checkpoint / "tokenizer.json"),
            "pieces": given,
            "multimodal": multimodal,
            "max_new_tokens": max_new_tokens,
        }
        ran = worker.run("quantize_gemma.tasks.smoke:run_program", arguments, lambda *_: None, None)
    if not ran["response"]:
        raise StageFailed(f"the program answers {prompt!r} with nothing")
    return {
        "prompt": prompt,
        "response": ran["response"],
        "speed": {**ran["speed"], "peak_rss_bytes": ran["measured"]["peak_rss_bytes"]},
    }


def run_program(
    program: str, tokenizer: str, pieces: list[dict[str, str]], multimodal: bool, max_new_tokens: int
) -> dict[str, Any]:
    """Returns {"response", "speed"} of the C++ runner. A piece of the prompt is {"text"} or {"pixels": a file}.

    Texts that start with the BOS token need none added.
    """
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers operators)
    import executorch.kernels.quantized  # noqa: F401 (registers operators)
    from executorch.extension.llm.runner import (
        GenerationConfig,
        MultimodalRunner,
        TextLLMRunner,
        make_image_input,
        make_text_input,
    )
    from safetensors.torch import load_file

    bos = 0 if pieces[0]["text"].startswith(GEMMA3.bos_token) else 1
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0.0, echo=False, num_bos=bos)
    answer: list[str] = []
    stats: list[Any] = []
    if multimodal:
        inputs = [
            make_text_input(piece["text"])
            if "text" in piece
            else make_image_input(load_file(piece["pixels"])["pixels"])
            for piece in pieces
        ]
        MultimodalRunner(program, tokenizer).generate(inputs, config, answer.append, stats.append)
    else:
        TextLLMRunner(program, tokenizer).generate(pieces[0]["text"], config, answer.append, stats.append)
    response = "".join(answer)
    for token in GEMMA3.stop_tokens:
        response = response.replace(token, "")
    response = response.strip()
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
