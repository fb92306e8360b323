"""The divergence from quantizing one module alone equals that of a plain model with only that module changed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN, BUILTIN_TEXTS
from quantize_gemma.tasks.fidelity.diagnose import HEAT_MAP, ROLES, Probe, diagnose, draw_heat_map
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.models.text_fidelity import Damage, damage_rows, parse_damage
from quantize_gemma.tasks.quantize import quantize
from quantize_gemma.tasks.runtime import store
from quantize_gemma.tasks.untie import untie

TINY, TEXT = BUILTIN["tiny-gemma3"], BUILTIN_TEXTS["tiny-text"]
RECIPE = load_recipe("HQQ-INT8-INT4").to_json()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base model and its quantized checkpoint, in a store."""
    root = tmp_path_factory.mktemp("store")

    def copy(target: Path) -> dict[str, Any]:
        shutil.copytree(TINY, target, dirs_exist_ok=True)
        return {}

    base = store.produce("download", "0" * 64, copy, root).path
    untied = store.produce("untie", "0" * 64, lambda target: untie(target, TINY), root).path
    quantized = store.produce("quantize", "0" * 64, lambda target: quantize(target, untied, RECIPE, "cpu"), root)
    return base, quantized.path


def run(folder: Path, artifacts: tuple[Path, Path], windows: int = 2) -> dict[str, Any]:
    folder.mkdir()
    diagnose(folder, *artifacts, TEXT, RECIPE, windows, "cpu")
    return json.loads((folder / "results.json").read_text())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("block", "role", "name"),
    [
        (None, "embed_tokens", "model.language_model.embed_tokens"),
        (0, "self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        (2, "mlp.down_proj", "model.language_model.layers.2.mlp.down_proj"),
        (None, "lm_head", "lm_head"),
    ],
)
def test_a_plain_model_with_one_module_changed_is_as_far_from_the_base(
    block: int | None, role: str, name: str, artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    from quantize_gemma.tasks.models.dequantize import quantize_dequantize

    rows = run(tmp_path / "out", artifacts)["rows"]
    (row,) = [row for row in rows if (row["block"], row["role"]) == (block, role)]
    base, changed = (Gemma3ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32) for _ in range(2))
    other = Gemma3ForConditionalGeneration.from_pretrained(artifacts[1], dtype=torch.bfloat16).to(torch.float32)
    module, weight = changed.get_submodule(name), other.get_submodule(name).weight
    assert isinstance(weight, IntxUnpackedToInt8Tensor)
    ids = AutoTokenizer.from_pretrained(TINY)((TEXT / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor([[2, *ids[number * 511 : number * 511 + 255]] for number in range(2)])

    def divergence() -> float:
        with torch.no_grad():
            p, q = (model(windows).logits[:, 3:256:4].log_softmax(-1) for model in (base, changed))
        return float((p.exp() * (p - q)).sum(-1).mean())

    if row["activations"] is None:
        assert role == "embed_tokens"
    else:
        hook = module.register_forward_pre_hook(lambda _, inputs: (quantize_dequantize(inputs[0]),))
        assert divergence() == pytest.approx(row["activations"], rel=0.02, abs=1e-7)
        hook.remove()
    assert divergence() == pytest.approx(0, abs=1e-8)
    module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    assert divergence() == pytest.approx(row["weights"], rel=1e-3)


def test_every_quantized_module_of_the_language_model_has_a_row_a_cell_and_a_place_on_the_heat_map(
    artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    results = run(tmp_path / "out", artifacts)
    assert results["tokens"] == 2 * 64
    measurements = parse_damage(results["rows"])
    assert len(measurements) == 2 + 3 * 7
    first, *_, last = measurements
    assert (first.role, first.parameters, first.activations) == ("embed_tokens", 2048 * 64, None)
    assert last.role == "lm_head"
    table = damage_rows(measurements, "weights")
    assert [row["block"] for row in table] == ["embed_tokens", "block 0", "block 1", "block 2", "lm_head"]
    assert list(table[1])[1:] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(table[1].values())
    assert (tmp_path / "out" / HEAT_MAP).read_bytes().startswith(b"\x89PNG")


def test_the_heat_map_labels_blocks_and_roles_and_lists_modules_outside_of_blocks(tmp_path: Path) -> None:
    blocks = [
        Damage(
            block, role, 1, 10.0 ** (-block - 1), None, 10.0 ** (-block - 2) if role != "mlp.up_proj" else None, None
        )
        for block in range(4)
        for role in ROLES
    ]
    embedding = Damage(None, "embed_tokens", 1, 0.0043, None, None, None)
    head = Damage(None, "lm_head", 1, 0.0643, None, 0.0012, None)
    draw_heat_map([embedding, *blocks, head], tmp_path / "heat-map.svg")
    texts = re.findall("<!-- (.*?) *-->", (tmp_path / "heat-map.svg").read_text("utf-8"))
    assert {"embed_tokens: weights 0.0043 nats", "lm_head: weights 0.064, activations 0.0012 nats"} <= set(texts)
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    assert [text for text in texts if text in names] == names * 2
    assert [text for text in texts if text in ("block", "0", "1", "2", "3")] == ["0", "1", "2", "3", "block"]
    # The color scale.
    assert {"0.0001", "0.001", "0.01", "0.1"} <= set(texts)


def test_a_diagnosis_that_was_killed_resumes_at_the_block_where_it_stopped(
    artifacts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int | None] = []
    real = Probe.measure

    def measure(self: Probe, modules: Any) -> Any:
        measured.append(modules[0].block)
        if len(measured) == stop:
            raise KeyboardInterrupt
        return real(self, modules)

    monkeypatch.setattr(Probe, "measure", measure)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        # Use another number of windows than the other tests, which share the store.
        run(tmp_path / "first", artifacts, windows=1)
    assert measured == [None, 0, 1]
    measured.clear()
    stop = 0
    results = run(tmp_path / "second", artifacts, windows=1)
    assert measured == [1, 2, None]
    assert results["rows"][0]["weights_stderr"] is None
