"""Another library's integers take the place of ours in a checkpoint, all of them or none."""

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
    parts = {"qdata": torch.int8, "scale": torch.bfloat16}
    theirs = {
        f"{name.partition('._weight_')[0]}.{part}": torch.full_like(tensor, 3)
        for name, tensor in before.items()
        for part in parts
        if ".layers." in name and name.endswith(f"._weight_{part}")
    }
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert replace_linears(checkpoint, tmp_path / "theirs.safetensors") == 21
    after = load_file(checkpoint / "model.safetensors")
    for name, tensor in after.items():
        replaced = ".layers." in name and name.endswith(("_qdata", "_scale"))
        assert torch.equal(tensor, torch.full_like(tensor, 3) if replaced else before[name]), name
    name = next(name for name in theirs if name.endswith("qdata"))
    save_file({**theirs, name: torch.full_like(theirs[name], 9)}, tmp_path / "wrong.safetensors")
    with pytest.raises(AssertionError, match="not of our format"):
        replace_linears(checkpoint, tmp_path / "wrong.safetensors")
    save_file({**theirs, "model.layers.7.mlp.up_proj.qdata": theirs[name].clone()}, tmp_path / "more.safetensors")
    with pytest.raises(AssertionError, match="42 of 43 tensors"):
        replace_linears(checkpoint, tmp_path / "more.safetensors")
