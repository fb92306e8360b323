"""A small text-only model and its program, which take seconds to create."""

from pathlib import Path

import pytest

from benchmarks.shapes import ALONE, TEXT, quantize_checkpoint, write_checkpoint
from quantize_gemma.tasks.runtime import worker

WINDOW = 32
# More than six windows, so that the ring buffer is overwritten several times.
MAX_SEQ_LEN = 200
SMALL = {
    **TEXT,
    **ALONE,
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized text-only checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder / "base", SMALL)
    (folder / "quantized").mkdir()
    quantize_checkpoint(folder / "base", folder / "quantized")
    return folder / "quantized"


@pytest.fixture(scope="module")
def program(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("quantize_gemma.tasks.export:export", small, tmp_path_factory.mktemp("program"))


def export(function: str, checkpoint: Path, target: Path, **options: int | str) -> Path:
    """Export in a separate process, as the flow does."""
    call = {"function": function, "target": str(target), "paths": {"checkpoint": str(checkpoint)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        worker.run(
            "quantize_gemma.tasks.runtime.worker_main:call",
            {**call, "values": {"max_seq_len": MAX_SEQ_LEN, **options}},
            lambda *_: None,
            None,
        )
    return target
