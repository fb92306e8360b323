"""The export checks its inputs and the delegation, and the program computes the same as the checkpoint."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import quantize_checkpoint
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.export import check_delegation, check_exportable
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError


def delegation_with(**portable: int) -> dict[str, dict[str, dict[str, int]]]:
    custom = {"llama_custom_sdpa_default": 2}
    return {"text_decoder": {"xnnpack": {"aten_linear_default": 3}, "custom": custom, "portable": portable}}


def test_cheap_operators_may_stay_with_the_portable_kernels() -> None:
    check_delegation(delegation_with(aten_mean_dim=4, aten_native_layer_norm_default=2, aten_index_put_default=1))


@pytest.mark.parametrize(
    "name",
    ["aten_linear_default", "aten_mm_default", "aten_bmm_default", "aten_convolution_default", "aten__softmax_default"],
)
def test_a_linear_or_an_attention_that_is_not_delegated_is_an_error(name: str) -> None:
    with pytest.raises(StageFailed, match=f"text_decoder of the program runs {name}"):
        check_delegation(delegation_with(aten_mean_dim=4, **{name: 1}))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint") / "quantized"
    target.mkdir()
    quantize_checkpoint(BUILTIN["tiny-gemma3"], target)
    return target


def test_a_checkpoint_from_another_source_is_rejected(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not quantized with torchao"):
        check_exportable(tmp_path, BUILTIN["tiny-gemma3"])
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match="not a Gemma 3 checkpoint"):
        check_exportable(tmp_path, other)
    with pytest.raises(UserError, match="not a Gemma 3 checkpoint"):
        check_exportable(tmp_path, tmp_path)
    check_exportable(tmp_path, quantized)


def test_too_little_disk_for_the_program_is_reported_with_both_sizes(quantized: Path, tmp_path: Path) -> None:
    """The checkpoint's weights claim 4 TB, in a sparse file."""
    huge = Path(shutil.copytree(quantized, tmp_path / "huge"))
    os.truncate(huge / "model.safetensors", 2**42)
    with pytest.raises(UserError, match=r"the program takes about 3298\.53 GB, but only .* GB is free"):
        check_exportable(tmp_path, huge)


def divergences(program: str, checkpoint: str) -> dict[str, Any]:
    """Return the KL divergences from the checkpoint on a short text, read at once and token by token."""
    import torch

    from quantize_gemma.tasks.models.checkpoint import load_model
    from quantize_gemma.tasks.models.pte import PteProgram
    from quantize_gemma.tasks.verify.distances import mean_kl

    ids = torch.arange(40, 64)[None]
    with torch.no_grad():
        expected = load_model(Path(checkpoint), torch.float32)(ids).logits[0]
    pte = PteProgram(Path(program))
    embedded = pte.embed_tokens(ids)
    return {
        "at_once": mean_kl(expected[-1:], pte.decode(embedded, {23})),
        "step_by_step": mean_kl(expected[8:], pte.decode(embedded, set(range(8, 24)))),
    }


@pytest.mark.long
@pytest.mark.longest
@pytest.mark.parametrize("custom_sdpa", [True, False])
def test_without_the_custom_cache_a_program_is_correct_within_the_sliding_window(
    custom_sdpa: bool, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    values = {"max_seq_len": 64, "custom_sdpa": custom_sdpa, "custom_kv_cache": False, "bidirectional_images": False}
    call = {"function": "quantize_gemma.tasks.export:export", "target": str(tmp_path), "values": values}
    call["paths"] = {"checkpoint": str(quantized)}
    metadata = worker.run("quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None)["metadata"]
    custom = {name for method in metadata["delegation"].values() for name in method["custom"]}
    assert not any(name.startswith("update_cache") for name in custom)
    assert ("llama_custom_sdpa_default" in custom) == custom_sdpa
    arguments = {"program": str(tmp_path / "model.pte"), "checkpoint": str(quantized)}
    kl = worker.run("tests.tasks.test_export:divergences", arguments, lambda *_: None, None)
    assert kl["at_once"] < 0.003, kl
    assert kl["step_by_step"] < 0.003, kl
