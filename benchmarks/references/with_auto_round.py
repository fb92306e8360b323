"""AutoRound: `python with_auto_round.py CHECKPOINT TOKENS TARGET ITERATIONS`.

It runs in a separate virtual environment without this package, and writes each linear's scales, and its weight as
integers times scales.
"""

import json
import sys

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize the decoder's linears to int4 with a positive scale for each 32 weights, and write them."""
    checkpoint, tokens, target, iterations = sys.argv[1:]
    with open(tokens, encoding="utf-8") as file:
        rows = torch.tensor(json.load(file))
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(checkpoint),
        bits=4,
        group_size=32,
        sym=True,
        data_type="int_sym_gptq",
        scale_dtype="bf16",
        dataset=list(rows.split(8)),
        iters=int(iterations),
        # The library's own recipe has this value for 50 iterations; for 200, its default is right.
        lr=5e-3 if iterations == "50" else None,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        device_map="cpu",
        # Compiled, its backward pass fails with torch 2.15: "modified by an inplace operation".
        enable_torch_compile=False,
    )
    model, _ = rounding.quantize()
    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "scale") and isinstance(module, torch.nn.Linear):
            tensors[f"{name}.weight"] = module.weight.data.to(torch.bfloat16)
            tensors[f"{name}.scale"] = module.scale.data.reshape(len(module.weight), -1).to(torch.bfloat16)
    save_file(tensors, target)


if __name__ == "__main__":
    main()
