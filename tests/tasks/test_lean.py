"""Lean libraries give what the stock ones give, and fail loudly when they are not those that they were made for."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import ALONE, SHAPES, TEXT, quantized_checkpoint, write_checkpoint
from tasks import lean
from tasks.lean import LOADING, LOWERING, SWITCH, LibraryChanged, lean_loading, lean_lowering

CHANGES = LOADING + LOWERING

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


SMALL = {
    **TEXT,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 32,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "text": {**SMALL, **ALONE, "num_hidden_layers": 1},
    "multimodal": {
        **SHAPES["4b"],
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
        "eos_token_id": [1],
        "mm_tokens_per_image": 4,
        "text_config": {
            **SMALL,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Quantized Gemma 3 of one layer, and of two with vision."""
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        write_checkpoint(folder / "base", config)
        made[name] = folder / "quantized"
        made[name].mkdir()
        quantized_checkpoint(folder / "base", made[name])
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_the_program_is_the_stock_libraries_program_byte_for_byte(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path), str(checkpoints[name]), SWITCH], check=True)
    assert (tmp_path / "lean" / "model.pte").read_bytes() == (tmp_path / "stock" / "model.pte").read_bytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_is_loaded_as_by_the_stock_library(name: str, checkpoints: dict[str, Path]) -> None:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    kind = Gemma3ForCausalLM if name == "text" else Gemma3ForConditionalGeneration
    stock = kind.from_pretrained(checkpoints[name], dtype=torch.bfloat16)
    with lean_loading():
        lean_one = kind.from_pretrained(checkpoints[name], dtype=torch.bfloat16)
    expected, found = (dict([*model.named_parameters(), *model.named_buffers()]) for model in (stock, lean_one))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert type(tensor) is type(found[key]), key
        parts = ("qdata", "scale", "zero_point") if hasattr(tensor, "qdata") else ()
        assert all(torch.equal(getattr(tensor, part), getattr(found[key], part)) for part in parts), key
        assert parts or torch.equal(tensor, found[key]), key
    quantized = [key for key, tensor in found.items() if hasattr(tensor, "qdata")]
    assert len(quantized) == len(
        [module for module in stock.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    )


def snapshot() -> dict[str, Any]:
    """Everything that the changes replace."""
    import torch
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir import lowered_backend_module
    from executorch.exir.backend import backend_api
    from executorch.exir.backend.canonical_partitioners import group_partitioner
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.pass_base import _ExportPassBase
    from torch._dynamo.guards import PyExprCSEPass
    from torch._dynamo.variables import builder
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import ExportedProgram
    from torch.fx.traceback import NodeSource
    from transformers.integrations import torchao
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    return {
        "transform": XNNPACKPassManager.transform,
        "preprocess": XnnpackBackend.preprocess,
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
        "export": torch.export.export,
        "module": ExportedProgram.module,
        "sort": lowered_backend_module.legalize_graph,
        "unflatten": torchao.unflatten_tensor_state_dict,
        "quantizer": vars(TorchAoHfQuantizer).get("__deepcopy__"),
    }


def test_the_libraries_are_restored_even_after_an_error() -> None:
    before, inside = snapshot(), {}

    def fail() -> None:
        with lean_loading(), lean_lowering():
            inside.update(snapshot())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(inside[name] is not before[name] for name in before)
    assert snapshot() == before


def test_the_switch_leaves_the_libraries_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    before = snapshot()
    with lean_loading(), lean_lowering():
        assert snapshot() == before


def test_the_picture_is_still_needed_and_the_class_is_restored() -> None:
    from optimum.exporters.executorch.integrations import VisionExportableModule

    stock = VisionExportableModule.prepare_export_inputs
    assert "https://" in inspect.getsource(stock)
    with lean.example_picture("pixels"):
        assert VisionExportableModule.prepare_export_inputs(None) == ("pixels", None)
    assert VisionExportableModule.prepare_export_inputs is stock


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_the_installed_libraries_are_those_that_the_change_was_written_for(change: Any) -> None:
    with change():
        pass


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_refuses_a_library_that_is_another(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "source_hash", lambda function: "another")
    with pytest.raises(LibraryChanged, match=rf"tasks/lean\.py was written for .*{SWITCH}=1"), change():
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


def test_a_graph_is_sorted_in_place_into_the_order_of_the_stock_copy() -> None:
    """Random graphs with nodes that stand before what they depend on: the same order of nodes, and of their users."""
    import operator
    import random

    import torch
    from executorch.exir import lowered_backend_module

    chosen = random.Random(0)
    for _ in range(20):
        modules = []
        seed = chosen.random()
        for _ in range(2):
            pick = random.Random(seed)
            graph = torch.fx.Graph()
            nodes = [graph.placeholder("x"), graph.placeholder("y")]
            for _ in range(40):
                target = pick.choice([torch.add, torch.mul, operator.add])
                nodes.append(graph.call_function(target, tuple(pick.choices(nodes[-8:], k=2))))
            # As after a cut: what a later node gives is used by earlier ones.
            late = graph.call_function(torch.neg, (nodes[4],))
            for user in pick.sample(nodes[30:], 5):
                user.args = (late, user.args[1])
            graph.output(nodes[-1])
            modules.append(torch.fx.GraphModule({}, graph))
        stock, ours = modules
        lowered_backend_module.legalize_graph(stock)
        with lean._sorted_in_place():
            lowered_backend_module.legalize_graph(ours)
        order = [[(node.name, [user.name for user in node.users]) for node in m.graph.nodes] for m in modules]
        assert order[0] == order[1]
        ours.graph.lint()


def test_every_change_says_what_is_slow_and_why_the_result_is_the_same() -> None:
    for change in CHANGES:
        summary, _, reasons = inspect.cleandoc(change.__doc__ or "").partition("\n\n")
        assert summary, change
        assert len(reasons) > 100, change
