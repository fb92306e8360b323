"""Export: lower the quantized checkpoint to model.pte, an ExecuTorch program for XNNPACK.

optimum-executorch does the work: its exportable modules and its xnnpack recipe. Bugs in its command line are worked
around here: the example image is created from the configuration instead of downloaded from a website, max_seq_len is
honored, scales have the dtype that XNNPACK needs, and the program's metadata is correct.
(Section "Exporting to ExecuTorch" of PyTorch's card.)
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.models.checkpoint import end_token_ids, is_multimodal, task_of, weight_files
from quantize_gemma.tasks.models.gemma3 import GEMMA3
from quantize_gemma.tasks.models.pte import IMAGE_CHANNEL
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import StageFailed, UserError
from quantize_gemma.tasks.runtime.patches import patched_export, patched_loading
from quantize_gemma.tasks.runtime.patches.optimum_executorch import example_image
from quantize_gemma.tasks.runtime.reporting import report_progress
from quantize_gemma.tasks.runtime.stage import Output, stage
from quantize_gemma.tasks.runtime.units import human_size

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule
    from torch.nn import Module
    from transformers import PreTrainedConfig

# optimum-executorch's recipe, and the dtype of activations and scales: XNNPACK does not support bfloat16.
BACKEND = "xnnpack"
DTYPE = "float32"
# Graph nodes that are not operators.
NO_OPERATORS = {"alloc", "getitem", "sym_size", "cond"}
# ExecuTorch's own kernels for attention, its cache, and quantized embeddings.
CUSTOM = ("llama_", "update_cache", "quantized_decomposed_embedding")
# Operators that are too slow in the portable kernels.
HEAVY = ("linear", "mm", "addmm", "bmm", "convolution", "_softmax", "scaled_dot_product")
# The program's size as a multiple of the quantized checkpoint's, whose int4 weights take a byte each; 4B: 3.18 / 5.37.
PROGRAM_FACTOR = 0.75

# {"xnnpack" | "custom" | "portable": {operator: number of calls}}
OperatorCounts = dict[str, dict[str, int]]


@stage(memory=1.5)
def export(
    target: Path,
    checkpoint: Path,
    max_seq_len: int,
    custom_sdpa: bool = True,
    custom_kv_cache: bool = True,
    last_logits_only: bool = True,
    bidirectional_images: bool = True,
    kv_cache_dtype: str = "float32",
) -> Output:
    """Write model.pte, for sequences of up to `max_seq_len` tokens, and delegation.json, the kernel of each operator.

    With `custom_sdpa` and `custom_kv_cache`, attention and its cache use ExecuTorch's own kernels. With
    `last_logits_only`, the decoder returns only the logits of its last input token, [1, 1, vocabulary], which is all
    that generation needs. With `bidirectional_images`, the tokens of an image attend to each other in both directions,
    as in the model, and embeddings have an additional channel; see image_attention.py. `kv_cache_dtype` is the dtype of
    the custom KV cache: float32, or int8 with one scale for each position and head.

    Raises:
        UserError: The checkpoint is not a quantized Gemma 3, or the disk is full.
        StageFailed: The program's metadata differs from the model's, or a heavy operator is not delegated.
    """
    from optimum.exporters.executorch.convert import export_to_executorch

    from quantize_gemma.tasks.models.image_attention import bidirectional_attention
    from quantize_gemma.tasks.models.kv_cache import make_masks, own_kv_cache
    from quantize_gemma.tasks.models.rotary import shared_rotary_tables

    check_exportable(target, checkpoint)
    report_progress(0, 3, "loading")
    module = _load_exportable(checkpoint, max_seq_len, custom_sdpa, custom_kv_cache)
    if last_logits_only:
        module.model.lm_head = _last_position(module.model.lm_head)
    config = module.config.to_dict()
    task = task_of(config)
    bidirectional_images = bidirectional_images and is_multimodal(config)
    assert custom_kv_cache or not bidirectional_images, "the library's cache has no mask for images"
    expected = expected_metadata(checkpoint, max_seq_len)
    if bidirectional_images:
        expected[IMAGE_CHANNEL] = True
    module.metadata.update(expected)
    report_progress(1, 3, "lowering")
    with contextlib.ExitStack() as stack:
        if bidirectional_images:
            window = module.config.get_text_config().sliding_window
            stack.enter_context(bidirectional_attention(module, make_masks(max_seq_len, window)))
        stack.enter_context(example_image(_blank_image(module.config)))
        stack.enter_context(own_kv_cache(max_seq_len, kv_cache_dtype))
        stack.enter_context(shared_rotary_tables())
        stack.enter_context(patched_export())
        program = export_to_executorch(module, task, BACKEND, str(target))["model"]
    delegation = {
        name: count_operators(program.exported_program(name).graph_module) for name in sorted(program.methods)
    }
    check_delegation(delegation)
    (target / "delegation.json").write_text(json.dumps(delegation, indent=1) + "\n", encoding="utf-8")
    del module, program
    gc.collect()  # Graphs have reference cycles; free their memory before the program is loaded.
    report_progress(2, 3, "verifying the program's metadata")
    metadata = _check_metadata(target / "model.pte", expected)
    settings = {"backend": BACKEND, "dtype": DTYPE, "custom_sdpa": custom_sdpa, "custom_kv_cache": custom_kv_cache}
    settings |= {"kv_cache_dtype": kv_cache_dtype, "bidirectional_images": bidirectional_images}
    settings |= {"max_seq_len": max_seq_len, "last_logits_only": last_logits_only, "task": task}
    return {"metadata": {**settings, "program": metadata, "delegation": delegation}}


def check_exportable(target: Path, checkpoint: Path) -> None:
    """Raise UserError if the checkpoint is not from `quantize`, or there is not enough space for its program."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if (config.get("architectures") or [None])[0] not in GEMMA3.architectures:
        raise UserError(f"{checkpoint} is not a Gemma 3 checkpoint: export the output of the quantize stage")
    if config.get("quantization_config", {}).get("quant_method") != "torchao":
        raise UserError(f"{checkpoint} is not quantized with torchao: export the output of the quantize stage")
    needed = int(PROGRAM_FACTOR * sum(file.stat().st_size for file in weight_files(checkpoint)))
    free = shutil.disk_usage(target).free
    if free < needed:
        raise UserError(
            f"the program takes about {human_size(needed)}, but only {human_size(free)} is free on the disk of {target}"
            ": free some space, or set QUANTIZE_GEMMA_HOME to a directory on a larger disk"
        )


def _load_exportable(checkpoint: Path, max_seq_len: int, custom_sdpa: bool, custom_kv_cache: bool) -> Any:
    """Return optimum-executorch's exportable module, with workarounds for the bugs in its command line."""
    import torch
    from optimum.exporters.executorch.tasks.causal_lm import load_causal_lm_model
    from optimum.exporters.executorch.tasks.multimodal_text_to_text import load_multimodal_text_to_text_model
    from transformers import AutoConfig

    multimodal = is_multimodal(AutoConfig.from_pretrained(checkpoint).to_dict())
    load = load_multimodal_text_to_text_model if multimodal else load_causal_lm_model
    with patched_loading():
        module = load(
            str(checkpoint),
            dtype=DTYPE,
            use_custom_sdpa=custom_sdpa,
            use_custom_kv_cache=custom_kv_cache,
            # The multimodal task reads max_length, the text task max_seq_len.
            **{"max_length" if multimodal else "max_seq_len": max_seq_len},
        )
    module.model.to(getattr(torch, DTYPE))
    # optimum-executorch would limit the tokens per call by this, too.
    module.metadata.pop("sliding_window", None)
    return module


def _blank_image(config: PreTrainedConfig) -> Tensor | None:
    """Return an example image, [1, channels, height, width]; None for a text-only model."""
    import torch

    if not is_multimodal(config.to_dict()):
        return None
    vision = config.vision_config
    return torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, dtype=getattr(torch, DTYPE))


def _last_position(head: Module) -> Module:
    """Return a module that applies lm_head to the last position of its input only.

    For a long prompt, that is a thousandth of the work. It also saves memory, because the program plans memory for the
    longest chunk of a prompt: 1,023 positions of gemma-3-4b's 262,208 logits take 1.07 GB in float32.
    """
    import torch

    class LastPosition(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = self.head(hidden[:, -1:])
            return logits

    return LastPosition()


def count_operators(method: GraphModule) -> OperatorCounts:
    """Return how often each operator of a method's graph is run by XNNPACK, custom, and portable kernels.

    Both branches of a condition are counted.
    """
    from executorch.devtools.backend_debug import get_delegation_info
    from torch.fx import GraphModule

    counts: dict[str, Counter[str]] = {"xnnpack": Counter(), "custom": Counter(), "portable": Counter()}
    attributes = [getattr(method, str(node.target), None) for node in method.graph.nodes if node.op == "get_attr"]
    for graph in [method, *(one for one in attributes if isinstance(one, GraphModule))]:
        for name, usage in get_delegation_info(graph).delegation_by_operator.items():
            if name in NO_OPERATORS:
                continue
            counts["xnnpack"][name] += usage.delegated
            counts["custom" if name.startswith(CUSTOM) else "portable"][name] += usage.non_delegated
    return {kernel: dict(sorted((+calls).items())) for kernel, calls in counts.items()}


def check_delegation(delegation: dict[str, OperatorCounts]) -> None:
    """Raise StageFailed if a matrix product or attention runs on the portable kernels, which are slow."""
    for method, counts in delegation.items():
        slow = [name for name in counts["portable"] if any(f"aten_{word}_" in name for word in HEAVY)]
        if slow:
            raise StageFailed(
                f"{method} of the program runs {', '.join(slow)} on portable kernels, which are slow, instead of on "
                "XNNPACK or custom kernels"
            )


def expected_metadata(checkpoint: Path, max_seq_len: int) -> dict[str, Any]:
    """Return the values that the program's constant methods must have, by name."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    text = config.get_text_config()
    vision = {}
    if is_multimodal(config.to_dict()):
        vision = {"modality": "vision", "vision_token_id": config.image_token_id}
    return {
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": max_seq_len,
        "get_head_dim": text.head_dim,
        "get_n_layers": text.num_hidden_layers,
        "get_n_kv_heads": text.num_key_value_heads,
        "get_vocab_size": text.vocab_size,
        "get_bos_id": text.bos_token_id,
        "get_eos_ids": end_token_ids(checkpoint),
        **vision,
    }


def _check_metadata(program: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return the program's metadata; raise StageFailed if it differs from `expected`."""
    # Read it in a separate process: the runtime keeps the program in memory, in addition to the export's memory.
    arguments = {"program": str(program), "names": list(expected)}
    result = worker.run("quantize_gemma.tasks.export:read_metadata", arguments, lambda *_: None, None)
    metadata: dict[str, Any] = result["metadata"]
    wrong = {name: metadata.get(name) for name, value in expected.items() if metadata.get(name) != value}
    if wrong:
        raise StageFailed(f"the program's metadata differs from the model's: {wrong} instead of {expected}")
    return metadata


def read_metadata(program: str, names: list[str]) -> dict[str, Any]:
    """Return {"metadata": {name: value}} of the program's constant methods among `names`."""
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(program)
    metadata = {}
    for name in names:
        if name in loaded.method_names:
            values = loaded.load_method(name).execute([])
            metadata[name] = values if name == "get_eos_ids" else values[0]
    return {"metadata": metadata}
