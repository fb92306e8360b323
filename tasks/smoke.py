"""Smoke: generate text from the quantized checkpoint, with the card's prompt, the chat template, and `generate`.

(Section "Inference" of PyTorch's card. The program's generation is part of `verify`.)
"""

import json
from pathlib import Path

from quantize_gemma.tasks.models.chat import TEXT_PROMPT, has_chat_template
from quantize_gemma.tasks.models.checkpoint import drop_vision_encoder, load_model
from quantize_gemma.tasks.runtime.errors import StageFailed
from quantize_gemma.tasks.runtime.stage import Output, stage


@stage(memory=3.2)
def smoke(target: Path, checkpoint: Path, max_new_tokens: int) -> Output:
    """Write smoke.json: the checkpoint's greedy response to the card's prompt.

    Raises:
        StageFailed: The response is empty.
    """
    import torch
    from transformers import AutoTokenizer

    from quantize_gemma.tasks.models.dequantize import replace_quantized_modules

    model = load_model(checkpoint, torch.bfloat16)
    drop_vision_encoder(model)
    # This gives the same tokens, but does not dequantize every weight for each of them.
    replace_quantized_modules(model, "all")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": TEXT_PROMPT}]
    uses_template = has_chat_template(tokenizer)
    if uses_template:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(TEXT_PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    response = tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
    if not response:
        raise StageFailed(f"the quantized checkpoint generates nothing from {TEXT_PROMPT!r}")
    result = {
        "prompt": TEXT_PROMPT,
        "response": response,
        "chat_template": uses_template,
        "new_tokens": len(new_tokens),
        "max_new_tokens": max_new_tokens,
    }
    (target / "smoke.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {"metadata": result}
