"""Untying and quantizing give what the card's own code gives, tensor for tensor."""

import re
from pathlib import Path
from typing import Any

import pytest

from tasks.builtin import BUILTIN
from tasks.checkpoint import load_model, read_headers
from tasks.quantize import quantize_checkpoint
from tasks.recipe import ROLES, load_recipe
from tasks.untie import untie_checkpoint


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("untied")
    untie_checkpoint(target, BUILTIN["tiny-gemma3"])
    return target


@pytest.fixture(scope="module")
def quantized(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantized")
    quantize_checkpoint(target, untied, load_recipe("HQQ-INT8-INT4"))
    return target


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(2, 90)[None]).logits


def test_an_untied_checkpoint_has_two_storages_and_the_base_models_logits(untied: Path) -> None:
    import torch

    base, model = load_model(BUILTIN["tiny-gemma3"], torch.bfloat16), load_model(untied, torch.bfloat16)
    assert base.lm_head.weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert torch.equal(logits(base), logits(model))


def test_an_untied_checkpoint_passes_through_untying_again(untied: Path, tmp_path: Path) -> None:
    assert untie_checkpoint(tmp_path, untied) == {"metadata": {"tied_before": False}}
    assert read_headers(tmp_path) == read_headers(untied)


def test_every_tensor_is_the_one_that_quantize_gives_with_the_cards_config(untied: Path, quantized: Path) -> None:
    import torch
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxUnpackedToInt8Tensor,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup

    hqq = {"intx_choose_qparams_algorithm": "hqq_scale_only"}
    int4 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32), **hqq)
    int8 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0), **hqq)
    weight_only = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0), **hqq)
    card = {
        "_default": int4,
        "model.language_model.embed_tokens": weight_only,
        "model.vision_tower.vision_model.embeddings.position_embedding": weight_only,
    }
    card |= {f"model.vision_tower.vision_model.encoder.layers.{i}.mlp.fc2": int8 for i in range(27)}
    reference = load_model(untied, torch.bfloat16)
    with pytest.warns(UserWarning, match="_default"):  # The card's own way to say "every other linear".
        config = FqnToConfig(card)
    quantize_(reference, config, filter_fn=None)

    ours = dict(load_model(quantized, torch.bfloat16).named_parameters())
    checked = 0
    for name, expected in reference.named_parameters():
        found = ours.pop(name)
        assert type(found) is type(expected), name
        if isinstance(expected, IntxUnpackedToInt8Tensor):
            for part in ("qdata", "scale", "zero_point"):
                assert torch.equal(getattr(found, part), getattr(expected, part)), (name, part)
            assert list(found.block_size) == list(expected.block_size), name
            for part in ("target_dtype", "dtype", "activation_quantization"):
                assert getattr(found, part) == getattr(expected, part), (name, part)
            checked += 1
        else:
            assert torch.equal(found, expected), name
    assert not ours
    # 3 text layers of 7, 2 vision layers of 6, two embeddings, the head.
    assert checked == 3 * 7 + 2 * 6 + 3
    assert torch.equal(logits(load_model(quantized, torch.bfloat16)), logits(reference))


def test_quantizing_twice_writes_the_same_bytes(untied: Path, quantized: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tmp_path, untied, load_recipe("HQQ-INT8-INT4"))
    for path in quantized.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_roles_decide_the_4b_models_modules_once_each() -> None:
    layers = [f"language_model.model.layers.{i}" for i in range(34)]
    names = [f"{layer}.self_attn.{part}" for layer in layers for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += [f"{layer}.mlp.{part}" for layer in layers for part in ("gate_proj", "up_proj", "down_proj")]
    tower = "vision_tower.vision_model"
    vision = [f"{tower}.encoder.layers.{i}" for i in range(27)]
    names += [f"{v}.self_attn.{part}" for v in vision for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    names += [f"{v}.mlp.{part}" for v in vision for part in ("fc1", "fc2")]
    names += [f"{tower}.embeddings.position_embedding", "language_model.model.embed_tokens", "lm_head"]
    for name in names:
        assert sum(bool(re.search(pattern, name)) for pattern in ROLES.values()) == 1, name
        newer = name.replace("vision_tower.vision_model.", "vision_tower.")
        assert sum(bool(re.search(pattern, newer)) for pattern in ROLES.values()) == 1, newer
