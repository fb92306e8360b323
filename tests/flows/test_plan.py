"""What a run will write is known before it starts."""

from pathlib import Path

import pytest

from quantize_gemma.flows.options import RunOptions
from quantize_gemma.flows.plan import writing_stages
from quantize_gemma.tasks.models.recipe import load_recipe
from quantize_gemma.tasks.models.resolved import ResolvedDataset, ResolvedModel

MODEL = ResolvedModel("a/b", "0" * 40, "a/b", False, True, license={}, weight_bytes=8, weights=4, multimodal=True)
TEXT = ResolvedDataset("a/text", "1" * 40, "a/text", False, True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("diagnosis", [False, True])
def test_a_diagnosis_ends_with_the_quantized_checkpoint(diagnosis: bool) -> None:
    stages = writing_stages(RunOptions(), MODEL, load_recipe("DISTILL-INT8-INT4"), TEXT, TEXT, diagnosis)
    names = [planned.stage.name for planned in stages if not planned.stage.name.startswith("download")]
    assert names == ["untie", "calibrate", "quantize"] + ([] if diagnosis else ["distill", "export"])
