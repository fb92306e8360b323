"""Patched libraries give the same results as the stock ones; a library that has changed is used unpatched."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import ALONE, SHAPES, TEXT, quantize_checkpoint, write_checkpoint
from quantize_gemma.tasks.runtime import patches
from quantize_gemma.tasks.runtime.patches import (
    DISABLE,
    SourceDiffers,
    executorch,
    export_patches,
    loading_patches,
    optimum_executorch,
    patched_export,
    patched_loading,
)

PATCHES = loading_patches() + export_patches()

# Export with and without patches in one process, so that the libraries are imported only once.
EXPORT = """
import os, sys
from pathlib import Path
from quantize_gemma.tasks.export import export

for disabled in sys.argv[4:]:
    os.environ[sys.argv[3]] = disabled
    target = Path(sys.argv[1]) / disabled
    target.mkdir()
    export(target, Path(sys.argv[2]), 64, last_logits_only=True)
"""

# Replace one function, and remove another.
CHANGED = """
import copy
from executorch.exir import lowered_backend_module
from executorch.exir.backend.backend_details import BackendDetails
from torch.fx.passes import tools_common

BackendDetails.copy_exported_program_for_preprocess = classmethod(lambda cls, program, specs: copy.deepcopy(program))
del tools_common.legalize_graph
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
    """Quantized Gemma 3 checkpoints: a text-only one with one layer, and a multimodal one with two."""
    folders = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        write_checkpoint(folder / "base", config)
        folders[name] = folder / "quantized"
        folders[name].mkdir()
        quantize_checkpoint(folder / "base", folders[name])
    return folders


@pytest.mark.long
@pytest.mark.parametrize("name", ["text", pytest.param("multimodal", marks=pytest.mark.longest)])
def test_the_program_is_the_stock_libraries_program_byte_for_byte(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    call = [sys.executable, "-c", EXPORT, str(tmp_path), str(checkpoints[name]), DISABLE, "none", "all"]
    subprocess.run(call, check=True)
    assert (tmp_path / "none" / "model.pte").read_bytes() == (tmp_path / "all" / "model.pte").read_bytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_is_loaded_as_in_the_stock_library(name: str, checkpoints: dict[str, Path]) -> None:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    kind = Gemma3ForCausalLM if name == "text" else Gemma3ForConditionalGeneration
    stock = kind.from_pretrained(checkpoints[name], dtype=torch.bfloat16)
    with patched_loading():
        patched = kind.from_pretrained(checkpoints[name], dtype=torch.bfloat16)
    expected, loaded = (dict([*model.named_parameters(), *model.named_buffers()]) for model in (stock, patched))
    assert expected.keys() == loaded.keys()
    for key, tensor in expected.items():
        assert type(tensor) is type(loaded[key]), key
        parts = ("qdata", "scale", "zero_point") if hasattr(tensor, "qdata") else ()
        assert all(torch.equal(getattr(tensor, part), getattr(loaded[key], part)) for part in parts), key
        assert parts or torch.equal(tensor, loaded[key]), key
    quantized = [key for key, tensor in loaded.items() if hasattr(tensor, "qdata")]
    assert len(quantized) == len(
        [module for module in stock.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    )


def snapshot() -> dict[str, Any]:
    """Return everything that the patches replace."""
    import torch
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir import lowered_backend_module
    from executorch.exir.backend import backend_api
    from executorch.exir.backend.canonical_partitioners import group_partitioner
    from executorch.exir.pass_base import _ExportPassBase
    from torch._dynamo.guards import PyExprCSEPass
    from torch._dynamo.variables import builder
    from torch.export import ExportedProgram
    from transformers.integrations import torchao

    return {
        "transform": XNNPACKPassManager.transform,
        "preprocess": XnnpackBackend.preprocess,
        "copy": vars(XnnpackBackend).get("copy_exported_program_for_preprocess"),
        "create_partitions": backend_api._create_partitions_in_graph_module,
        "dependencies": group_partitioner._DependencyViewer,
        "can_merge": group_partitioner.GroupBasedPartitioner._can_merge_partitions,
        "fx": _ExportPassBase._fx,
        "clone": builder._clone_input,
        "count": PyExprCSEPass.count,
        "replace": PyExprCSEPass.replace,
        "run_decompositions": ExportedProgram.run_decompositions,
        "export": torch.export.export,
        "module": ExportedProgram.module,
        "sort": lowered_backend_module.legalize_graph,
        "unflatten": torchao.unflatten_tensor_state_dict,
        "converter": vars(torchao.TorchAoDeserialize).get("__deepcopy__"),
    }


def test_the_libraries_are_restored_even_after_an_error() -> None:
    before, inside = snapshot(), {}

    def fail() -> None:
        with patched_loading(), patched_export():
            inside.update(snapshot())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(inside[name] is not before[name] for name in before)
    assert snapshot() == before


def test_disabled_patches_leave_the_libraries_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "all")
    before = snapshot()
    with patched_loading(), patched_export():
        assert snapshot() == before


def test_one_patch_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "shared_weights,sorted_in_place")
    before = snapshot()
    with patched_export():
        inside = snapshot()
    same = {name for name in before if inside[name] is before[name]}
    assert same == {"copy", "sort", "unflatten", "converter"}


def test_the_example_image_is_still_needed_and_the_class_is_restored() -> None:
    from optimum.exporters.executorch.integrations import VisionExportableModule

    stock = VisionExportableModule.prepare_export_inputs
    assert "https://" in inspect.getsource(stock)
    with optimum_executorch.example_image("pixels"):
        assert VisionExportableModule.prepare_export_inputs(None) == ("pixels", None)
    assert VisionExportableModule.prepare_export_inputs is stock


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_the_installed_libraries_are_those_that_the_patch_was_written_for(patch: Any) -> None:
    with patch():
        pass


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_patch_is_not_applied_to_different_source_code(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setattr(patches, "source_digest", lambda source: "another")
    with pytest.raises(SourceDiffers, match="differs from the version that the patch was written for"), patch():
        pass
    assert snapshot() == before


@pytest.mark.long
def test_an_export_continues_with_the_stock_library_after_one_warning_per_patch_that_does_not_fit(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHANGED + EXPORT, str(tmp_path), str(checkpoints["text"]), DISABLE, "none", "all"],
        check=True,
        capture_output=True,
        text=True,
    )
    warnings = [line for line in done.stderr.splitlines() if "is not applied" in line]
    assert len(warnings) == 2, done.stderr
    for patch, reason in ("shared_weights", "source"), ("sorted_in_place", "legalize_graph"):
        assert any(f"patch {patch} is not applied" in line and reason in line for line in warnings), done.stderr
    assert (tmp_path / "none" / "model.pte").read_bytes() == (tmp_path / "all" / "model.pte").read_bytes()


def test_descendants_as_bits_decides_like_the_partitioners_sets() -> None:
    """For every pair of partitions of random graphs, our answer is the stock answer."""
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
        with executorch.descendants_as_bits():
            assert ask() == stock
        answers += stock
    assert {True, False} == set(answers)


def test_a_graph_is_sorted_in_place_into_the_order_of_the_stock_copy() -> None:
    """In random graphs with nodes before their dependencies, the nodes and their users get the same order."""
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
            # As after a partition is extracted: earlier nodes use the outputs of later ones.
            late = graph.call_function(torch.neg, (nodes[4],))
            for user in pick.sample(nodes[30:], 5):
                user.args = (late, user.args[1])
            graph.output(nodes[-1])
            modules.append(torch.fx.GraphModule({}, graph))
        stock, ours = modules
        lowered_backend_module.legalize_graph(stock)
        with executorch.sorted_in_place():
            lowered_backend_module.legalize_graph(ours)
        order = [[(node.name, [user.name for user in node.users]) for node in m.graph.nodes] for m in modules]
        assert order[0] == order[1]
        ours.graph.lint()


def test_every_patch_says_what_is_slow_why_the_result_is_the_same_and_what_would_make_it_unnecessary() -> None:
    for patch in PATCHES:
        summary, reasons, upstream = inspect.cleandoc(patch.__doc__ or "").split("\n\n")
        assert summary.endswith("."), patch
        assert len(reasons) > 100, patch
        assert upstream.startswith("Unnecessary once "), patch
