"""Untying and quantizing give the same tensors as the code on the card."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quantize import different_tensors, reference_quantize
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.checkpoint import load_model, read_headers
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.quantize import hqq, quantize
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("untied")
    untie(target, BUILTIN["tiny-gemma3"])
    return target


@pytest.fixture(scope="module")
def quantized(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantized")
    quantize(target, untied, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")
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


def test_untying_an_untied_checkpoint_changes_nothing(untied: Path, tmp_path: Path) -> None:
    assert untie(tmp_path, untied) == {"metadata": {"tied_before": False}}
    assert read_headers(tmp_path) == read_headers(untied)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint and change its tensors, which are all written to one file."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    change(tensors)
    target.mkdir()
    for path in source.iterdir():
        if "safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_an_untied_checkpoint_is_the_file_that_safetensors_writes(untied: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    head = load_file(untied / "lm_head.safetensors")
    save_file(head, tmp_path / "file", metadata={"format": "pt"})
    assert (tmp_path / "file").read_bytes() == (untied / "lm_head.safetensors").read_bytes()


def test_a_sharded_checkpoint_is_untied_and_its_shards_are_not_copied(tmp_path: Path) -> None:
    import torch
    from transformers import Gemma3ForConditionalGeneration

    base = load_model(BUILTIN["tiny-gemma3"], torch.bfloat16)
    assert isinstance(base, Gemma3ForConditionalGeneration)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="200kB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    (tmp_path / "untied").mkdir()
    untie(tmp_path / "untied", tmp_path / "sharded")
    for shard in shards:
        assert (tmp_path / "untied" / shard.name).stat().st_ino == shard.stat().st_ino
    assert torch.equal(logits(load_model(tmp_path / "untied", torch.bfloat16)), logits(base))


def test_a_checkpoint_without_an_embedding_cannot_be_untied(tmp_path: Path) -> None:
    def lose(tensors: dict[str, Any]) -> None:
        del tensors["language_model.model.embed_tokens.weight"]

    broken = rewrite(BUILTIN["tiny-gemma3"], tmp_path / "broken", lose)
    (tmp_path / "untied").mkdir()
    with pytest.raises(UserError, match="has no embed_tokens"):
        untie(tmp_path / "untied", broken)


def quantize_with_torchao(weight: Any, group_size: int, dtype: str) -> tuple[Any, Any]:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

    low, high = hqq.BOUNDS[dtype]
    return _choose_qparams_and_quantize_scale_only_hqq(weight, [1, group_size], low, high)


def quantize_in_chunks(weight: Any, group_size: int, dtype: str, chunk: int, kernel: str) -> tuple[Any, Any]:
    """Quantize in chunks of rows, as the stage does, and return integers and scales like torchao."""
    import torch

    def all_chunks(iterations: int) -> list[hqq.QuantizedChunk[Any]]:
        parts = [weight[first : first + chunk] for first in range(0, len(weight), chunk)]
        if kernel == "torch":
            return [hqq.quantize_chunk_with_torch(part, group_size, dtype, iterations) for part in parts]
        bits = [part.view(torch.uint16).numpy() for part in parts]
        return [hqq.quantize_chunk(part, group_size, dtype, hqq.sum_lanes(), iterations) for part in bits]

    chunks = all_chunks(hqq.ITERATIONS)
    needed = hqq.iterations_needed([np.asarray(part.changes) for part in chunks])
    if needed < hqq.ITERATIONS:
        chunks = all_chunks(needed)
    integers = torch.cat([torch.as_tensor(part.integers) for part in chunks])
    return integers.to(torch.int32), torch.cat([torch.as_tensor(part.scales) for part in chunks]).to(weight.dtype)


def edge_case_weights() -> Any:
    """Return an odd number of rows, of every kind, in bfloat16."""
    import torch

    weight = torch.randn(71, 480, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[3] = 0
    weight[5, 64:128] = 0
    weight[7] *= 1e-38
    weight[9, 17] = 1e30
    weight[11] = weight[11].sign()
    weight[13] = torch.arange(480) / 16 - 15
    return weight.bfloat16()


@pytest.mark.parametrize("kernel", ["fused", "torch"])
@pytest.mark.parametrize(
    ("group_size", "dtype"),
    [(32, "int4"), (480, "int8"), (480, "int4"), (8, "int4"), (40, "int8"), (240, "int8")],
)
def test_hqq_matches_torchao_bit_for_bit(group_size: int, dtype: str, kernel: str) -> None:
    import torch

    assert hqq.sum_lanes(), "torch's order of summation is unknown on this processor, so its own kernel is used"
    weight = edge_case_weights()
    expected = quantize_with_torchao(weight, group_size, dtype)
    for chunk in (71, 16):
        actual = quantize_in_chunks(weight, group_size, dtype, chunk, kernel)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("kernel", ["fused", "torch"])
@pytest.mark.parametrize("seeds", [[1071], [1138], [1215], [1429], [1071, 1138], [0, 1429]])
def test_hqq_stops_all_chunks_of_a_matrix_at_torchaos_iteration(seeds: list[int], kernel: str) -> None:
    """In these rows, a scale changes again after an iteration with almost no change, at which torchao stops."""
    import torch

    rows = [np.random.default_rng(seed).standard_normal((1, 2560), np.float32) for seed in seeds]
    weight = torch.from_numpy(np.concatenate(rows)).bfloat16()
    expected = quantize_with_torchao(weight, 2560, "int8")
    actual = quantize_in_chunks(weight, 2560, "int8", 1, kernel)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    if len(seeds) == 1:
        bits = weight.view(torch.uint16).numpy()
        chunk = hqq.quantize_chunk(bits, 2560, "int8", hqq.sum_lanes(), hqq.ITERATIONS)
        assert hqq.iterations_needed([chunk.changes]) < hqq.ITERATIONS


def test_the_error_of_a_chunk_is_that_of_the_stored_values() -> None:
    import torch

    weight = (torch.randn(67, 96, generator=torch.Generator().manual_seed(2)) * 0.02).bfloat16()
    chunk = hqq.quantize_chunk(weight.view(torch.uint16).numpy(), 32, "int4", hqq.sum_lanes(), hqq.ITERATIONS)
    scales = torch.from_numpy(chunk.scales).bfloat16().float().repeat_interleave(32, 1)
    expected = (torch.from_numpy(chunk.integers).float() * scales - weight.float()).double().square().sum()
    assert chunk.error == pytest.approx(float(expected), rel=1e-12)
    assert chunk.square == pytest.approx(float(weight.double().square().sum()), rel=1e-12)


def header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a safetensors file's metadata, with its JSON values parsed, and the entries of its tensors."""
    with path.open("rb") as stream:
        text = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = {
        name: value if name == "format" else json.loads(value) for name, value in text.pop("__metadata__").items()
    }
    return metadata, text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("recipe", ["AFFINE-INT8-INT4", "HQQ-INT8-INT4"])
def test_the_file_of_torchaos_algorithms_equals_the_model_quantized_in_memory(
    recipe: str, dtype: str, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def cast(tensors: dict[str, Any]) -> None:
        tensors.update({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()})

    base = rewrite(untied, tmp_path / "base", cast)
    monkeypatch.setattr("quantize_gemma.tasks.quantize.writer.CHUNK", 1000)  # Many chunks, the last one shorter.
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    quantize(tmp_path / "ours", base, load_recipe(recipe).to_json(), "cpu")
    reference_quantize(str(tmp_path / "theirs"), str(base), recipe)
    files = [tmp_path / name / "model.safetensors" for name in ("ours", "theirs")]
    assert different_tensors(*files) == []
    (ours, tensors), (theirs, _) = (header(file) for file in files)
    newer = {name for name in ours if name.startswith("model.vision_tower.") and "vision_model" not in name}
    assert len(newer) == len([name for name in theirs if "vision_tower.vision_model." in name])
    assert set(ours.pop("tensor_names")) == {*theirs.pop("tensor_names"), *newer}
    assert {name: value for name, value in ours.items() if name not in newer} == theirs
    assert {name.split(".")[0] for name in tensors} == {"language_model", "vision_tower", "multi_modal_projector"}


@pytest.mark.parametrize("recipe", ["SEARCH-INT8-INT4", "GPTQ-INT8-INT4", "GPTQ-INT8-INT4-HEAD8"])
def test_the_file_of_our_algorithms_loads_in_torchao_and_is_valid_in_a_program(
    recipe: str, untied: Path, tmp_path: Path
) -> None:
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from quantize_gemma.tasks.models.calibration import write_calibration

    calibrated = load_recipe(recipe).calibration is not None
    write_calibration(tmp_path, [[2, *range(first, first + 63)] for first in range(5, 105, 10)])
    (tmp_path / "ours").mkdir()
    content = load_recipe(recipe).to_json()
    quantize(tmp_path / "ours", untied, content, "cpu", tmp_path if calibrated else None)
    model, base = load_model(tmp_path / "ours", torch.bfloat16), load_model(untied, torch.bfloat16)
    originals = dict(base.named_parameters())
    int4 = 0
    for name, weight in model.named_parameters():
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            continue
        low, high = (-8, 7) if weight.target_dtype == torch.int4 else (-128, 127)
        size = weight.block_size[1]
        assert weight.scale.dtype == torch.bfloat16
        assert (weight.scale.float() >= 2.0**-126).all(), name
        assert low <= weight.qdata.min(), name
        assert weight.qdata.max() <= high, name
        assert not weight.zero_point.any(), name
        expected = weight.qdata.float() * weight.scale.float().repeat_interleave(size, 1)
        assert torch.equal(weight.dequantize(), expected.bfloat16()), name
        # GPTQ changes weights to preserve outputs, by a lot on so little text; but rows in the wrong order would give
        # an error of about 2.
        difference, limit = expected - originals[name].float(), 0.5 if calibrated else 0.05
        assert difference.square().sum() < limit * originals[name].float().square().sum(), name
        if weight.target_dtype == torch.int4:
            int4 += 1
            assert size == 32, name
    # 3 text layers with 7 modules each; 2 vision layers with 5, which are int8 in calibrated recipes; and the head.
    assert int4 == 3 * 7 + (0 if calibrated else 2 * 5) + (0 if recipe.endswith("HEAD8") else 1)


def test_a_quantized_checkpoint_gives_the_logits_of_the_model_quantized_with_the_cards_config(
    untied: Path, quantized: Path
) -> None:
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
    model = load_model(quantized, torch.bfloat16)
    assert torch.equal(logits(model), logits(reference))
    converted = [name for name, weight in model.named_parameters() if isinstance(weight, IntxUnpackedToInt8Tensor)]
    # 3 text layers with 7 modules each, 2 vision layers with 6, two embeddings, and the head.
    assert len(converted) == 3 * 7 + 2 * 6 + 3


def test_quantizing_twice_writes_the_same_bytes(untied: Path, quantized: Path, tmp_path: Path) -> None:
    quantize(tmp_path, untied, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")
    for path in quantized.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.1.mlp.up_proj.weight", "language_model.model.norm.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_error_names_a_weight_that_is_not_finite(name: str, value: float, untied: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[7] = value

    broken = rewrite(untied, tmp_path / "broken", damage)
    (tmp_path / "quantized").mkdir()
    with pytest.raises(UserError, match=re.escape(name.replace("language_model.model", "model.language_model"))):
        quantize(tmp_path / "quantized", broken, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("language_model.model.norm.weight"), "lacks the weight model.language_model.norm"),
        (lambda tensors: tensors.update(extra=tensors["language_model.model.norm.weight"] + 1), "has the weight extra"),
        (
            lambda tensors: tensors.update(
                {"language_model.model.norm.weight": tensors["language_model.model.norm.weight"][:-1].clone()}
            ),
            "but config.json implies",
        ),
    ],
)
def test_an_error_names_a_weight_that_does_not_fit_the_model(
    change: Callable[[dict[str, Any]], None], message: str, untied: Path, tmp_path: Path
) -> None:
    broken = rewrite(untied, tmp_path / "broken", change)
    (tmp_path / "quantized").mkdir()
    with pytest.raises(UserError, match=message):
        quantize(tmp_path / "quantized", broken, load_recipe("HQQ-INT8-INT4").to_json(), "cpu")


def test_a_matrix_is_read_in_chunks_so_that_memory_does_not_depend_on_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from quantize_gemma.tasks.quantize.source import SourceTensor
    from quantize_gemma.tasks.quantize.writer import CHUNK, CheckpointWriter

    sizes: list[int] = []
    frombuffer = torch.frombuffer

    def record_size(buffer: bytearray, **options: Any) -> torch.Tensor:
        sizes.append(len(buffer))
        return frombuffer(buffer, **options)

    monkeypatch.setattr(torch, "frombuffer", record_size)
    rows, columns = 4096, 640
    with (tmp_path / "matrix").open("wb") as stream:
        os.truncate(stream.fileno(), 2 * rows * columns)
    with (tmp_path / "matrix").open("rb") as file:
        sources = {"lm_head.weight": SourceTensor(file.fileno(), 0, torch.bfloat16, (rows, columns))}
        (rule,) = (rule for rule in load_recipe("HQQ-INT8-INT4").rules if rule.match == "lm_head")
        with CheckpointWriter(tmp_path / "quantized", sources, {"lm_head": rule}, False, "cpu", {}) as writer:
            writer.finish()
    assert sum(sizes) == 2 * rows * columns
    assert max(sizes) <= 2 * CHUNK


def test_each_module_of_the_4b_model_matches_exactly_one_role() -> None:
    layers = [f"language_model.model.layers.{i}" for i in range(34)]
    names = [f"{layer}.self_attn.{part}" for layer in layers for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += [f"{layer}.mlp.{part}" for layer in layers for part in ("gate_proj", "up_proj", "down_proj")]
    tower = "vision_tower.vision_model"
    vision = [f"{tower}.encoder.layers.{i}" for i in range(27)]
    names += [f"{v}.self_attn.{part}" for v in vision for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    names += [f"{v}.mlp.{part}" for v in vision for part in ("fc1", "fc2")]
    names += [f"{tower}.embeddings.position_embedding", "language_model.model.embed_tokens", "lm_head"]
    for name in names:
        assert sum(bool(re.search(pattern, name)) for pattern in GEMMA3.roles.values()) == 1, name
        newer = name.replace("vision_tower.vision_model.", "vision_tower.")
        assert sum(bool(re.search(pattern, newer)) for pattern in GEMMA3.roles.values()) == 1, newer
