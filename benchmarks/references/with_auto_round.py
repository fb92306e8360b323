"""AutoRound: `python with_auto_round.py CHECKPOINT TOKENS TARGET ITERATIONS`.

Runs in a virtual environment of its own, which does not have this package. Writes each linear's integers and scales.
"""

import json
import sys

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantizes the decoder's linears to int4 with a positive scale for each 32 weights, and writes them."""
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
        # Of 50, the library's own recipe says this; of 200, its default is right.
        lr=5e-3 if iterations == "50" else None,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        device_map="cpu",
    )
    model, _ = rounding.quantize()
    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "scale") and isinstance(module, torch.nn.Linear):
            scale = module.scale.data.reshape(module.weight.shape[0], -1).to(torch.bfloat16)
            quotients = module.weight.data.float().unflatten(1, (-1, 32)) / scale.float()[:, :, None]
            integers = quotients.round()
            assert (quotients - integers).abs().max() < 0.1, name
            tensors[f"{name}.qdata"] = integers.flatten(1).to(torch.int8)
            tensors[f"{name}.scale"] = scale
    save_file(tensors, target)


if __name__ == "__main__":
    main()
