"""GPTQ of llm-compressor: `python with_llm_compressor.py CHECKPOINT TOKENS TARGET OBSERVER`.

Runs in a virtual environment of its own, which does not have this package. Writes each linear's integers and scales.
"""

import json
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantizes the decoder's linears to int4 with a scale for each 32 weights, and writes them."""
    checkpoint, tokens, target, observer = sys.argv[1:]
    with open(tokens, encoding="utf-8") as file:
        rows = [
            {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in json.load(file)
        ]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, observer=observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]["input_ids"][0]),
    )
    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale.data
            quotients = module.weight.data.float().unflatten(1, (-1, 32)) / scale.float()[:, :, None]
            tensors[f"{name}.qdata"] = quotients.round().flatten(1).to(torch.int8)
            tensors[f"{name}.scale"] = scale.bfloat16()
    save_file(tensors, target)


if __name__ == "__main__":
    main()
