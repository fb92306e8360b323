"""Another library's integers replace ours in a checkpoint, either all of them or none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.references.__main__ import replace_linears
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.untie import untie
from tests.text_only import write_text_only


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "untied").mkdir()
    (tmp_path / "quantized").mkdir()
    untie(tmp_path / "untied", write_text_only(BUILTIN["tiny-gemma3"], tmp_path / "plain"))
    quantize(tmp_path / "quantized", tmp_path / "untied", load_recipe("SEARCH-INT8-INT4").to_json(), "cpu")
    return tmp_path / "quantized"


def test_every_linear_of_the_decoder_is_replaced_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    before = load_file(checkpoint / "model.safetensors")
    scales = {name.partition("._weight_")[0]: tensor for name, tensor in before.items() if name.endswith("_scale")}
    theirs = {}
    for module, scale in scales.items():
        if ".layers." in module:
            weight = torch.full(before[f"{module}._weight_qdata"].shape, 1.5, dtype=torch.bfloat16)
            theirs |= {f"{module}.weight": weight, f"{module}.scale": torch.full_like(scale, 0.5)}
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert replace_linears(checkpoint, tmp_path / "theirs.safetensors") == 21
    after = load_file(checkpoint / "model.safetensors")
    for name, tensor in after.items():
        expected = before[name]
        if ".layers." in name and name.endswith(("_qdata", "_scale")):
            expected = torch.full_like(expected, 3 if name.endswith("_qdata") else 0.5)
        assert torch.equal(tensor, expected), name
    name = next(name for name in theirs if name.endswith("weight"))
    more = {"model.layers.7.mlp.up_proj.weight": theirs[name].clone()}
    more["model.layers.7.mlp.up_proj.scale"] = theirs[name.replace("weight", "scale")].clone()
    module = name.removesuffix(".weight")
    without = {other: tensor for other, tensor in theirs.items() if not other.startswith(f"{module}.")}
    unweighted = {other: tensor for other, tensor in theirs.items() if other != name}
    bytes_before = (checkpoint / "model.safetensors").read_bytes()
    for other, message in (
        ({**theirs, name: torch.full_like(theirs[name], 4.5)}, "do not fit our format"),
        ({**theirs, f"{module}.scale": -theirs[f"{module}.scale"]}, "do not fit our format"),
        ({**theirs, name: torch.full_like(theirs[name], 1.7)}, r"not on the grid of its scales: .* is 0\.4. steps off"),
        ({**theirs, **more}, r"2 tensors are only in one .*, such as model\.layers\.7\.mlp\.up_proj\.qdata"),
        (without, f"2 tensors are only in one .*, such as {module}.qdata"),
        (unweighted, f"{module} has a scale, but no weight"),
    ):
        save_file(other, tmp_path / "other.safetensors")
        with pytest.raises(AssertionError, match=message):
            replace_linears(checkpoint, tmp_path / "other.safetensors")
        assert (checkpoint / "model.safetensors").read_bytes() == bytes_before
