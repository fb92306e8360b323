"""The error of int4 and int8 in the vision tower: `python -m benchmarks.vision [--shape 4b]`.

For each way to quantize the tower's linears, print the bytes of the tower, the relative squared error of its output,
and, for the built-in model, the KL divergence of the text after an image. With SigLIP's shape, weights are random, with
outliers among single weights and among whole input channels. The images are synthetic: a fractal, noise, and one color.
Calibration uses different noise and another part of the fractal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from benchmarks.shapes import SHAPES
from benchmarks.side_by_side import machine
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import Algorithm, Rule, WeightDtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# {name: (dtype, group size, algorithm)} of the linears whose number of columns is a multiple of the group size; fc2 is
# always int8.
SCHEMES: dict[str, tuple[WeightDtype, int | None, Algorithm]] = {
    "int4, HQQ (the card's)": ("int4", 32, "hqq_scale_only"),
    "int4, search": ("int4", 32, "search"),
    "int4, calibrated": ("int4", 32, "gptq"),
    "int8 per row": ("int8", None, "search"),
}
# The share of single weights, and of input channels, that are outliers.
WEIGHTS, CHANNELS = 1e-4, 0.01


@dataclass(frozen=True)
class Row:
    """A row of the table: bytes of the tower's matrices, relative squared error of the output, and KL of the text."""

    name: str
    bytes: int
    error: float
    kl: float | None


@dataclass(frozen=True)
class Tower:
    """A vision tower: linears, encoder, and a function that returns the text's log-probabilities after an image."""

    linears: dict[str, torch.nn.Linear]
    encode: Callable[[Tensor], Tensor]
    size: int
    read_text: Callable[[], Tensor] | None


def builtin_tower() -> Tower:
    """Return the built-in model's vision tower."""
    import torch

    from quantize_gemma.tasks.models.checkpoint import load_model
    from quantize_gemma.tasks.verify.image_inputs import make_image_input

    model = load_model(BUILTIN["tiny-gemma3"], torch.float32)
    prompt = make_image_input(BUILTIN["tiny-gemma3"], model.config.image_token_id)

    def read_text() -> Tensor:
        logits = model(input_ids=prompt.ids, pixel_values=prompt.pixels).logits[0]
        after = int(prompt.is_image.nonzero()[-1]) + 1
        return torch.log_softmax(logits[after:], -1)

    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears = {name: module for name, module in modules.items() if GEMMA3.is_vision(name)}
    return Tower(linears, model.model.get_image_features, model.config.vision_config.image_size, read_text)


def random_tower(shape: str, factor: float) -> Tower:
    """Return a SigLIP vision tower of this shape with random weights, and with outliers `factor` times as large."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(**SHAPES[shape]["vision_config"])
    model = SiglipVisionModel(config).eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for linear in linears.values():
        weight = linear.weight.data.normal_(std=0.02)
        weight[torch.rand(weight.shape) < WEIGHTS] *= factor
        weight[:, torch.rand(weight.shape[1]) < CHANNELS] *= factor
        weight.copy_(weight.bfloat16())
    return Tower(linears, lambda pixels: model(pixels).last_hidden_state, config.image_size, None)


def draw_images(size: int, seed: int) -> list[Tensor]:
    """Return pixels, [1, 3, size, size] in [-1, 1]: a part of the Mandelbrot set, noise, and one color."""
    import numpy as np
    import torch
    from PIL import Image

    left = -2 + 0.3 * seed
    fractal = Image.effect_mandelbrot((size, size), (left, -1.2, left + 2, 0.8), 40).convert("RGB")
    pixels = torch.from_numpy(np.array(fractal)).permute(2, 0, 1)[None] / 127.5 - 1
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return [pixels, noise, torch.full_like(pixels, 0.25 - 0.1 * seed)]


@contextmanager
def weights_of(tower: Tower, matrices: dict[str, Tensor]) -> Iterator[None]:
    """Replace the tower's weights within the context."""
    before = {name: linear.weight.data for name, linear in tower.linears.items()}
    for name, matrix in matrices.items():
        tower.linears[name].weight.data = matrix
    try:
        yield
    finally:
        for name, weight in before.items():
            tower.linears[name].weight.data = weight


def hessians(tower: Tower, images: list[Tensor]) -> dict[str, Tensor]:
    """Return the Hessian of each linear: the sum of x x^T over its inputs x, [columns, columns]."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.T @ rows

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))  # type: ignore[misc]
        for name, linear in tower.linears.items()
    ]
    for image in images:
        tower.encode(image)
    for hook in hooks:
        hook.remove()
    return sums


def quantize(weight: Tensor, rule: Rule, hessian: Tensor | None) -> Tensor:
    """Return a weight, quantized and dequantized."""
    from quantize_gemma.tasks.quantize import gptq
    from quantize_gemma.tasks.quantize.algorithms import quantize_rows
    from quantize_gemma.tasks.quantize.blocks import QuantizedMatrix

    if rule.algorithm == "gptq":
        assert hessian is not None, "GPTQ needs inputs"
        assert rule.group_size is not None, "GPTQ is for groups"
        curvature = gptq.prepare(hessian.clone(), rule.group_size, 0.01)
        return QuantizedMatrix(*gptq.quantize_matrix(weight, curvature)).dequantize()
    tensors = quantize_rows(weight.bfloat16(), rule, "cpu").tensors
    return QuantizedMatrix(tensors["qdata"], tensors["scale"]).dequantize()


def measure(tower: Tower) -> list[Row]:
    """Return a row for each way to quantize."""
    import torch

    from quantize_gemma.tasks.models.float32 import fast_products

    with torch.no_grad(), fast_products():
        images, calibration_images = draw_images(tower.size, 0), draw_images(tower.size, 1)
        expected_outputs = [tower.encode(image) for image in images]
        text = tower.read_text() if tower.read_text else None
        sums = hessians(tower, calibration_images)
        rows = []
        for name, (dtype, size, algorithm) in SCHEMES.items():
            matrices, total = {}, 0
            for module, linear in tower.linears.items():
                weight = linear.weight.data
                divisible = size is not None and weight.shape[1] % size == 0
                rule = (
                    Rule("linear", dtype, size, "int8", algorithm)
                    if divisible
                    else Rule("linear", "int8", None, "int8", "search")
                )
                matrices[module] = quantize(weight, rule, sums[module])
                total += weight.numel() * int(rule.weight[3:]) // 8
                total += 2 * weight.numel() // (rule.group_size or weight.shape[1])
            with weights_of(tower, matrices):
                outputs = [tower.encode(image) for image in images]
                text_after = tower.read_text() if tower.read_text else None
            error = sum(
                float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs, expected_outputs, strict=True)
            )
            kl = None
            if text is not None and text_after is not None:
                kl = float((text.exp() * (text - text_after)).sum(-1).mean())
            rows.append(Row(name, total, error / len(images), kl))
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__)
    parser.add_argument("--shape", choices=["tiny", "4b"], default="tiny", help="[default: tiny, the built-in model]")
    parser.add_argument(
        "--outliers", type=float, default=10.0, help="factor of the 4b shape's outliers; 1: none [default: 10]"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(builtin_tower() if options.shape == "tiny" else random_tower(options.shape, options.outliers))
    if options.json:
        print(json.dumps({"machine": machine(), **vars(options), "rows": [asdict(row) for row in rows]}))
        return
    print("| vision tower | bytes | relative squared error of the output | KL of the text after an image |")
    print("|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row.name} | {row.bytes:,} | {row.error:.2e} | {'' if row.kl is None else f'{row.kl:.2e}'} |")


if __name__ == "__main__":
    main()
