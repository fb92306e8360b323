"""GPTQ of llm-compressor: `python with_llm_compressor.py CHECKPOINT TOKENS TARGET OBSERVER`.

It runs in a separate virtual environment without this package, and writes each linear's scales, and its weight as
integers times scales.
"""

import json
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize the decoder's linears to int4 with a scale for each 32 weights, and write them."""
    checkpoint, tokens, target, observer = sys.argv[1:]
    with open(tokens, encoding="utf-8") as file:
        rows = [torch.tensor([row]) for row in json.load(file)]
    # Load in bfloat16, so that scales have the dtype in which they are stored.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, observer=observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(checkpoint),
        dataset=torch.utils.data.DataLoader(
            [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=None
        ),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    )
    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            tensors[f"{name}.weight"] = module.weight.data.to(torch.bfloat16)
            tensors[f"{name}.scale"] = module.weight_scale.data.reshape(len(module.weight), -1).to(torch.bfloat16)
    save_file(tensors, target)


if __name__ == "__main__":
    main()
