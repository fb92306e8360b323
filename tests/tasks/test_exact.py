"""Weights that are on a grid are written without loss; weights that are not are counted and rejected."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.checkpoint import load_model
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import Algorithm, Rule, load_recipe
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.quantize.exact import find_scales
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie
from tests.grid import GROUP, to_grid, write_grid_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_weights(rows: int = 200, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_every_group_is_found_and_reproduces_each_weight(dtype: torch.dtype) -> None:
    weight = to_grid(random_weights(), dtype)
    weight[3, 32:64] = 0
    weight[4, :32] = weight[4, 0]  # All weights are equal.
    weight[5, :32] = 0
    weight[5, 7] = -weight[4, 0]
    integers, scales, off = find_scales(weight, GROUP, "int4")
    assert (off.groups, off.misfits, off.worst_error) == (600, 0, 0.0)
    assert (scales > 0).all()
    assert integers.min() >= -8
    assert integers.max() <= 7
    assert torch.equal((integers * scales.float().repeat_interleave(GROUP, 1)).to(dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scales_of_int8_rows_are_found_too(dtype: torch.dtype) -> None:
    weight = random_weights()
    scales = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16().float()
    weight = ((weight / scales).round().clamp(-128, 127) * scales).to(dtype)
    integers, row_scales, off = find_scales(weight, 96, "int8")
    assert off.misfits == 0
    assert torch.equal((integers * row_scales.float()).to(dtype), weight)


def test_weights_off_the_grid_are_counted_with_their_error() -> None:
    weight = to_grid(random_weights(), torch.float32)
    weight[0, 0] *= 1.01
    weight[9, 40] += 0.3 * weight[9, 32:64].abs().max()
    off = find_scales(weight, GROUP, "int4")[2]
    assert (off.groups, off.misfits, off.negative) == (600, 2, 0)
    assert 0.01 < off.worst_error < 0.1


def test_negative_scales_are_distinguished_from_weights_off_the_grid() -> None:
    """Half of q4_0's scales are negative; with a positive scale, their groups would need the integer 8."""
    off = find_scales(to_grid(random_weights(), torch.float32, negative=True), GROUP, "int4")[2]
    assert 200 < off.misfits < 400
    assert off.negative == off.misfits


def untied_grid(
    folder: Path, dtype: torch.dtype, grid_dtype: torch.dtype | None = None, norm_change: float = 0.0
) -> Path:
    """Write an untied checkpoint on the grid, rounded to `grid_dtype` first; `norm_change` is added to the norms."""
    plain = write_grid_checkpoint(BUILTIN["tiny-gemma3"], folder / "plain", grid_dtype or dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(plain / "model.safetensors").items()}
    for name in tensors:
        if "language_model" in name and name.endswith("norm.weight"):
            tensors[name] += norm_change
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    for name in ("untied", "target"):
        (folder / name).mkdir()
    untie(folder / "untied", plain)
    return folder / "untied"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_on_the_grid_is_written_without_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    grid = untied_grid(tmp_path, dtype)
    output = quantize(tmp_path / "target", grid, load_recipe("EXACT").to_json(), "cpu")
    errors = output["metadata"]["weight_error"]
    assert [errors[role] for role in ("embedding", "linear", "lm_head")] == [0, 0, 0]
    base, exact = (dict(load_model(path, torch.float32).named_parameters()) for path in (grid, tmp_path / "target"))
    compared = 0
    for name, weight in base.items():
        if "vision" not in name:
            quantized = exact[name]
            dense = quantized.dequantize() if hasattr(quantized, "dequantize") and quantized.ndim == 2 else quantized
            assert torch.equal(dense.to(dtype), weight.to(dtype)), name
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("algorithm", ["exact", "affine"])
def test_a_recipe_is_lossless_whatever_it_does_to_the_vision_tower(algorithm: Algorithm, tmp_path: Path) -> None:
    exact = load_recipe("EXACT")
    language = [rule for rule in exact.rules if not GEMMA3.is_vision_role(rule.match)]
    vision = Rule("re:vision_tower", weight="int8", group_size=None, activation=None, algorithm="affine")
    language[0] = replace(language[0], algorithm=algorithm)
    recipe = replace(exact, rules=(*language, vision))
    output = quantize(tmp_path / "target", untied_grid(tmp_path, torch.bfloat16), recipe.to_json(), "cpu")
    assert output["metadata"]["lossless"] == (algorithm == "exact")


def test_weights_on_the_grid_of_another_dtype_are_rejected(tmp_path: Path) -> None:
    grid = untied_grid(tmp_path, torch.float32, grid_dtype=torch.bfloat16)
    with pytest.raises(UserError, match="not on the recipe's grid"):
        quantize(tmp_path / "target", grid, load_recipe("EXACT").to_json(), "cpu")


def test_norms_that_bfloat16_would_change_are_rejected_with_their_number(tmp_path: Path) -> None:
    grid = untied_grid(tmp_path, torch.float32, norm_change=1e-4)
    with pytest.raises(UserError, match=r"change [\d,]+ of their values \(64 in model\.language_model\.\S+norm"):
        quantize(tmp_path / "target", grid, load_recipe("EXACT").to_json(), "cpu")


@pytest.mark.parametrize("negative", [False, True])
def test_a_checkpoint_off_the_grid_is_rejected_with_numbers_and_a_way_out(negative: bool, tmp_path: Path) -> None:
    plain = BUILTIN["tiny-gemma3"]
    if negative:
        plain = write_grid_checkpoint(plain, tmp_path / "q4_0", negative=True)
    for name in ("untied", "target"):
        (tmp_path / name).mkdir()
    untie(tmp_path / "untied", plain)
    with pytest.raises(UserError, match="not on the recipe's grid") as error:
        quantize(tmp_path / "target", tmp_path / "untied", load_recipe("EXACT").to_json(), "cpu")
    counts = re.findall(r"(\S+): ([\d,]+) of ([\d,]+) groups are off the grid \(([\d,]+) with", str(error.value))
    assert len(counts) == 5
    for _, off, groups, signed in counts:
        assert 0 < int(off.replace(",", "")) <= int(groups.replace(",", ""))
        assert (signed == off) == negative
    assert "and 18 more modules: use GPTQ-INT8-INT4" in str(error.value)
