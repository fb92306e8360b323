"""Time and memory of calibrating one decoder block with GPTQ: `python -m benchmarks.calibrate --shape 4b`.

Print both, the time for the whole decoder at that rate, and the estimate of `quantize-gemma check`. Random weights and
hidden states take as long as real ones: only the order of columns depends on their values.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import SHAPES
from benchmarks.side_by_side import machine, run
from quantize_gemma.tasks.models.recipe import Calibration, Rule, load_recipe
from quantize_gemma.tasks.runtime.units import human_size

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig

    from quantize_gemma.tasks.quantize.blocks import Block
    from quantize_gemma.tasks.quantize.hidden_states import HiddenStates

RECIPE = "GPTQ-INT8-INT4"


def random_block(
    shape: str, settings: Calibration, device: str
) -> tuple[tuple[Block, Block], tuple[HiddenStates, HiddenStates], Rule]:
    """Return random inputs of quantize_block(): a block with full attention, hidden states, and a rule."""
    import torch
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

    from quantize_gemma.tasks.quantize.blocks import Block
    from quantize_gemma.tasks.quantize.hidden_states import HiddenStates

    config = text_config(shape)
    number = config.layer_types.index("full_attention")
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma3DecoderLayer(config, number).state_dict().items()}
    weights = {
        name: torch.randn(size, generator=random).mul_(0.02).bfloat16().to(device) for name, size in shapes.items()
    }
    hidden = torch.randn(settings.sequences, settings.length, config.hidden_size, generator=random)
    folder = Path(tempfile.gettempdir())
    states = HiddenStates(hidden, folder, device), HiddenStates(hidden + 0.01, folder, device)
    pair = Block(config, number, weights), Block(config, number, weights)
    rule = next(rule for rule in load_recipe(RECIPE).rules if rule.algorithm == "gptq")
    return pair, states, rule


def text_config(shape: str) -> Gemma3TextConfig:
    """Return the decoder's configuration for a shape."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(**SHAPES[shape].get("text_config", SHAPES[shape]))
    config._attn_implementation = "sdpa"
    return config


def quantize_one_block(shape: str, sequences: int, device: str) -> dict[str, Any]:
    """Quantize a block with full attention; return the seconds that it takes, and check's estimate for the decoder."""
    import torch

    from quantize_gemma.tasks.check import estimate_calibration, measure_speed
    from quantize_gemma.tasks.models.float32 import fast_products
    from quantize_gemma.tasks.quantize.blocks import quantize_block

    settings = Calibration(sequences=sequences, answers=0)
    pair, states, rule = random_block(shape, settings, device)
    # A previous call has compiled the kernels.
    start = time.monotonic()
    with torch.no_grad(), fast_products():
        quantize_block(pair, states, rule, settings)
    seconds = time.monotonic() - start
    config, recipe = text_config(shape), replace(load_recipe(RECIPE), calibration=settings)
    speed = measure_speed()
    estimate, memory = estimate_calibration(config, recipe, speed)
    return {
        "block_seconds": round(seconds, 1),
        "blocks": config.num_hidden_layers,
        "operations_per_second": speed,
        "check_seconds": round(estimate),
        "check_bytes": memory,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=[*SHAPES], default="4b")
    parser.add_argument("--sequences", type=int, default=64, help="sequences of 512 tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # The first call compiles the kernels.
    for sequences in (1, options.sequences):
        result = run(
            "benchmarks.calibrate:quantize_one_block",
            shape="270m" if sequences == 1 else options.shape,
            sequences=sequences,
            device=options.device,
        )
    report = {"machine": machine(), "shape": options.shape, "device": options.device, **result}
    del report["measured"], report["seconds"]
    if options.json:
        print(json.dumps(report))
        return
    hours = result["block_seconds"] * result["blocks"] / 3600
    print(f"{options.shape}, {options.sequences} x 512 tokens, on {options.device}:")
    print(f"  {result['block_seconds']} s per block, {hours:.2f} hours for {result['blocks']} blocks without the head")
    print(f"  {human_size(result['peak_rss_bytes'])} peak memory")
    print(
        f"  estimate of check: {result['check_seconds'] / 3600:.2f} hours with the head, "
        f"{human_size(result['check_bytes'])}, at {result['operations_per_second'] / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
