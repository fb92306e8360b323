"""Lean lowering gives the program that stock lowering gives, and fails loudly on libraries that it was not made for."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import ALONE, TEXT, quantized_checkpoint, write_checkpoint
from tasks import lean
from tasks.lean import CHANGES, SWITCH, LibraryChanged, lean_lowering

# Both ways in one process, so that the libraries are imported once.
EXPORT = """
import os, sys
from pathlib import Path
from tasks.export import export_checkpoint

for name, stock in ("lean", "0"), ("stock", "1"):
    os.environ[sys.argv[3]] = stock
    target = Path(sys.argv[1]) / name
    target.mkdir()
    export_checkpoint(target, Path(sys.argv[2]), 64, last_logits_only=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Gemma 3 of one layer, without vision."""
    config = {
        **TEXT,
        **ALONE,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 32,
        "max_position_embeddings": 128,
    }
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder / "base", config)
    (folder / "quantized").mkdir()
    quantized_checkpoint(folder / "base", folder / "quantized")
    return folder / "quantized"


def test_the_program_is_the_stock_libraries_program_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path), str(checkpoint), SWITCH], check=True)
    assert (tmp_path / "lean" / "model.pte").read_bytes() == (tmp_path / "stock" / "model.pte").read_bytes()


def snapshot() -> dict[str, Any]:
    """Everything that the changes replace."""
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.exir.backend import backend_api
    from executorch.exir.backend.canonical_partitioners import group_partitioner
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.pass_base import _ExportPassBase
    from torch._dynamo.guards import PyExprCSEPass
    from torch._dynamo.variables import builder
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import ExportedProgram
    from torch.fx.traceback import NodeSource

    return {
        "transform": XNNPACKPassManager.transform,
        "copy": backend_api.copy,
        "lower": backend_api.lower_all_submodules_to_backend,
        "create_partitions": backend_api._create_partitions_in_graph_module,
        "dependencies": group_partitioner._DependencyViewer,
        "can_merge": group_partitioner.GroupBasedPartitioner._can_merge_partitions,
        "delegate": executorch_call_delegate.python_key_table[FakeTensorMode],
        "fx": _ExportPassBase._fx,
        "clone": builder._clone_input,
        "count": PyExprCSEPass.count,
        "replace": PyExprCSEPass.replace,
        "run_decompositions": ExportedProgram.run_decompositions,
        "provenance": vars(NodeSource).get("__deepcopy__"),
    }


def test_the_libraries_are_restored_even_after_an_error() -> None:
    before, inside = snapshot(), {}

    def fail() -> None:
        with lean_lowering():
            inside.update(snapshot())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(inside[name] is not before[name] for name in before)
    assert snapshot() == before


def test_the_switch_leaves_the_libraries_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    before = snapshot()
    with lean_lowering():
        assert snapshot() == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_the_installed_libraries_are_those_that_the_change_was_written_for(change: Any) -> None:
    with change():
        pass


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_refuses_a_library_that_is_another(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "source_hash", lambda function: "another")
    with pytest.raises(LibraryChanged, match=rf"tasks.lean\.py was written for .*{SWITCH}=1"), change():
        pass


def test_descendants_as_bits_decide_as_the_partitioners_sets_do() -> None:
    """Every pair of parts of random graphs: the stock answer, and ours."""
    import random
    from types import SimpleNamespace

    import torch
    from executorch.exir.backend.canonical_partitioners import group_partitioner

    chosen = random.Random(0)
    answers = []
    for _ in range(20):
        graph = torch.fx.Graph()
        nodes = [graph.placeholder("x")]
        for _ in range(30):
            nodes.append(graph.call_function(torch.add, tuple(chosen.choices(nodes[-6:], k=2))))
        graph.output(nodes[-1])
        module = torch.fx.GraphModule({}, graph)
        chosen.shuffle(nodes)
        parts = {i: SimpleNamespace(nodes=dict.fromkeys(nodes[i * 2 : i * 2 + 2])) for i in range(10)}

        def ask(module: Any = module, parts: Any = parts) -> list[bool]:
            partitioner = SimpleNamespace(dependency_viewer=group_partitioner._DependencyViewer(module))
            can_merge = group_partitioner.GroupBasedPartitioner._can_merge_partitions
            return [can_merge(partitioner, a, b, parts) for a in parts for b in parts if a < b]

        stock = ask()
        with lean._short_ancestries():
            assert ask() == stock
        answers += stock
    assert {True, False} == set(answers)


def test_every_change_says_what_is_slow_and_why_the_result_is_the_same() -> None:
    for change in CHANGES:
        summary, _, reasons = inspect.cleandoc(change.__doc__ or "").partition("\n\n")
        assert summary, change
        assert len(reasons) > 100, change
