"""The disk that a run needs is what it will write, and no more; the memory is that of its workers' models."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.check import MEMORY_FACTOR, MEMORY_OF_LIBRARIES, check_disk, check_memory, disk_needed
from quantize_gemma.tasks.runtime import machine, pruning, store
from quantize_gemma.tasks.runtime.artifact_ref import ref_of
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.prefect_stage import key_of, missing
from quantize_gemma.tasks.runtime.stage import Output, stage


@stage()
def download(target: Path) -> Output:
    raise AssertionError("only its name and its key count")


@stage()
def untie(target: Path) -> Output:
    raise AssertionError("only its name and its key count")


@stage()
def quantize(target: Path) -> Output:
    raise AssertionError("only its name and its key count")


CHAIN = [
    (download, {"source": "a", "revision": "b", "offline": False}),
    (untie, {}),
    (quantize, {"recipe": {"name": "mine"}}),
]


def write(text: str) -> Any:
    def work(target: Path) -> dict[str, Any]:
        (target / "file").write_text(text)
        return {}

    return work


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path))
    return tmp_path


def test_what_a_run_reuses_needs_no_disk_and_what_others_left_does(home: Path) -> None:
    assert missing(CHAIN, []) == ["download", "untie", "quantize"]
    base = store.produce("download", key_of(*CHAIN[0]), write("base"))
    store.produce("untie", "c" * 64, write("of another model"))
    assert missing(CHAIN, []) == ["untie", "quantize"]
    untied = store.produce("untie", key_of(CHAIN[1][0], {"checkpoint": ref_of(base)}), write("untied"))
    assert missing(CHAIN, []) == ["quantize"]
    assert missing(CHAIN, ["download"]) == ["download", "quantize"]
    (untied.path / "file").unlink()
    assert missing(CHAIN, []) == ["untie", "quantize"]


def test_a_run_that_writes_nothing_is_not_refused_however_large_its_model_is(home: Path) -> None:
    weight_bytes = shutil.disk_usage(home).free
    check_disk(weight_bytes, [])
    check_disk(weight_bytes // 2, ["export"])
    with pytest.raises(UserError, match=r"the run needs about .* GB in .*, but .* GB are free"):
        check_disk(weight_bytes)


def test_a_store_full_of_other_models_counts_for_nothing(home: Path) -> None:
    other = home / "download" / ".incoming-0123456789abcdef"
    other.mkdir(parents=True)
    with (other / "model.safetensors").open("wb") as stream:
        stream.truncate(1 << 42)  # A file of holes.
    with pytest.raises(UserError, match="GB are free"):
        check_disk(shutil.disk_usage(home).free * 2)


def test_what_an_interrupted_download_of_this_revision_has_brought_is_written(home: Path) -> None:
    incoming = home / "download" / ".incoming-0123456789abcdef"
    incoming.mkdir(parents=True)
    (incoming / "model.safetensors").write_bytes(bytes(1 << 20))
    assert pruning.incoming_size("download", "0123456789abcdef0123") >= 1 << 20
    assert pruning.incoming_size("download", "f" * 40) == 0
    assert disk_needed(1 << 20, ["download"]) == 1 << 20


def test_each_worker_needs_memory_for_a_model_of_its_own() -> None:
    weights = int((machine.total_memory() // 3 - MEMORY_OF_LIBRARIES) / 2 / MEMORY_FACTOR)
    assert check_memory(weights, workers=2) == 2 * check_memory(weights)
    with pytest.raises(UserError, match=r"5 workers take about .* use at most --workers 3"):
        check_memory(weights, workers=5)
